"""metrics.json and planning.json of strangers: refused in one line by whoever reads them, at once."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.errors import UserError
from tests.conftest import run_here
from tests.worldmodel.report.samples import make_metrics, make_planning, make_unlabelled_metrics, undeclared
from worldmodel.config import Config, to_yaml
from worldmodel.report.comparison import RunScores, comparison_markdown, flat_numbers, num_steps
from worldmodel.report.run_page import report_of_run
from worldmodel.report.tables import probe_tables
from worldmodel.runs.metrics import MAX_BYTES, place, read_metrics, read_planning, value_at


def changed(content: Any, place: str, value: Any) -> Any:
    """The content with a value at a dotted place."""
    *parents, leaf = place.split(".")
    node: Any = content
    for parent in parents:
        node = node[int(parent)] if isinstance(node, list) else node[parent]
    node[int(leaf) if isinstance(node, list) else leaf] = value
    return content


MISTAKES: list[tuple[str, Any, str]] = [
    ("horizon", 1_000_000_000, "horizon=1000000000, but there are scores of 8 steps"),
    ("horizon", 9, "horizon=9, but there are scores of 8 steps"),
    ("horizon", 0, "horizon=0: input should be greater than or equal to 1"),
    ("horizon", "8", "horizon='8'"),
    ("horizon", True, "horizon=True"),
    ("forecasts.model.energy_score", {"999999999": 1}, "forecasts.model.energy_score={'999999999': 1}"),
    ("forecasts.model.energy_score", {"a": 1}, "forecasts.model.energy_score={'a': 1}"),
    ("forecasts.model.energy_score", 1.0, "forecasts.model.energy_score=1.0"),
    ("forecasts.model.energy_score", ["0.5"] * 8, "forecasts.model.energy_score.0"),
    ("forecasts.model.energy_score", [0.5] * 2000, "at most 1024 items"),
    ("forecasts.model.energy_score.3", 10**400, "the number 1"),
    ("forecasts.model.energy_score.3", 1e300, "a score is at most 1e+100"),
    ("forecasts.model.coverage.90.0", ["<b>"], "forecasts.model.coverage"),
    ("forecasts.model.rank_histogram.0", {"0": 1}, "forecasts.model.rank_histogram.0"),
    ("forecasts.model", [], "forecasts.model=[]"),
    ("forecasts", [], "forecasts=[]"),
    ("forecasts", {str(i): {} for i in range(101)}, "at most 100 items"),
    ("train", 5, "train=5"),
    ("train.seconds", "long", "train.seconds='long'"),
    ("train.steps", 1.5, "train.steps=1.5"),
    ("quantity", "px", "quantity='px'"),
    ("quantity.dimensions", 5, "quantity.dimensions=5"),
    ("queries", "many", "queries='many'"),
    ("embedding.std", "0.1", "embedding.std='0.1'"),
    ("readout.strength", [], "readout.strength=[]"),
    ("probes.r.digit.linear", "high", "probes.r.digit.linear='high'"),
    ("probes", ["r"], "probes=['r']"),
    ("embedding.retrieval.forecasts.model.mrr", {"0": 1}, "embedding.retrieval.forecasts.model.mrr"),
    ("anything", [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]], "nested more than 16 deep"),
]
PLANNING_MISTAKES: list[tuple[str, Any, str]] = [
    ("success_rate", "all", "success_rate='all'"),
    ("ci95", [0.5], "ci95=[0.5]"),
    ("curve", {"0": 1}, "curve={'0': 1}"),
    ("curve.0.labels", "many", "curve.0.labels='many'"),
    ("curve.0", 5, "curve.0=5"),
    ("curve.0", {"labels": 20}, "curve.0.success_rate"),
    ("curve.0.labels", None, "curve.0.labels=None"),
    ("curve.0.ci95", [0.1, None], "curve.0.ci95.1=None"),
    ("curve.0.success_rate", float("inf"), "finite number"),
    ("protocol", [1], "protocol=[1]"),
    ("random_floor", 0.1, "random_floor=0.1"),
    ("per_seed", {"0": 1}, "per_seed={'0': 1}"),
]
TEXTS = {
    "not JSON": ("{", "Expecting property name"),
    "a list": ("[]", "valid dictionary"),
    "deep": ("[" * 200_000, "nested too deep"),
    "long number": ('{"horizon": ' + "9" * 5000 + "}", "4300"),
    "large": (" " * (MAX_BYTES + 1), "larger than 16,777,216 bytes"),
    "many": (json.dumps({"a": [0] * 2**20}), "more than 1,048,576 values"),
}


@pytest.fixture
def run(tiny_config: Callable[..., Config], tmp_path: Path) -> Path:
    folder = tmp_path / "stranger"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(tiny_config()))
    return folder


def assert_refused(run: Path, name: str, tells: str) -> None:
    started_s = time.process_time()
    with pytest.raises(UserError) as caught:
        report_of_run(run)
    message = str(caught.value)
    assert tells in message and str(run / name) in message and "\n" not in message and len(message) < 1_000, message
    assert time.process_time() - started_s < 5
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(("place", "value", "tells"), MISTAKES, ids=range(len(MISTAKES)))
def test_numbers_that_are_none_are_named(run: Path, place: str, value: Any, tells: str) -> None:
    (run / "metrics.json").write_text(json.dumps(changed(make_metrics(), place, value)))
    assert_refused(run, "metrics.json", tells)


@pytest.mark.parametrize(("place", "value", "tells"), PLANNING_MISTAKES, ids=range(len(PLANNING_MISTAKES)))
def test_so_are_those_of_planning(run: Path, place: str, value: Any, tells: str) -> None:
    (run / "planning.json").write_text(json.dumps(changed(make_planning(), place, value)))
    assert_refused(run, "planning.json", tells)


@pytest.mark.parametrize(("text", "tells"), TEXTS.values(), ids=TEXTS)
def test_a_damaged_file_is_one_line(run: Path, text: str, tells: str) -> None:
    for name in ("metrics.json", "planning.json"):
        (run / name).write_text(text)
        assert_refused(run, name, tells)
        (run / name).unlink()


def test_a_pipe_is_not_waited_for(run: Path) -> None:
    os.mkfifo(run / "metrics.json")
    assert_refused(run, "metrics.json", "is not a regular file")


def test_what_evaluations_write_is_taken(tmp_path: Path) -> None:
    nan = changed(make_metrics(), "forecasts.model.energy_score.2", float("nan"))
    for content in (make_metrics(1), make_metrics(8), make_unlabelled_metrics(), {}, {"train": {"steps": 8}}, nan):
        (tmp_path / "metrics.json").write_text(json.dumps(content))
        assert str(read_metrics(tmp_path)) == str(content)
    (tmp_path / "planning.json").write_text(json.dumps(make_planning()))
    assert read_planning(tmp_path) == make_planning()
    assert read_metrics(tmp_path / "no") is None


def test_keys_that_look_like_places_in_lists() -> None:
    odd = {
        "forecasts": {"model": {"energy_score": [1.0, 2.0]}, "model.energy_score.²": {"energy_score": [1.0]}},
        "forecasts.model.energy_score.999999999": 1,
        "forecasts.model.energy_score.x": 1,
        f"forecasts.model.energy_score.{'9' * 5000}": 1,
    }
    runs = [RunScores("a", "none", 0, flat_numbers(odd))]
    assert num_steps(runs) == 2 and "1.000" in comparison_markdown(runs)
    assert value_at(odd, "forecasts.model.energy_score.².energy_score.0") == 1
    assert value_at(odd, f"forecasts.model.energy_score.{'9' * 5000}") is None
    assert value_at(odd, "forecasts.model.energy_score.1") == 2
    dotted = {"probes": {"embedding": {"light": {"knn": 0.5}, "light.level": {"linear": 0.25}}}}
    assert value_at(dotted, "probes.embedding.light.level.linear") == 0.25
    assert value_at(dotted, "probes.embedding.light.knn") == 0.5
    assert [row.cells for _, table in probe_tables(dotted) for row in table.rows]  # type: ignore[arg-type]


def test_a_place_that_no_record_declares_is_refused_also_in_empty_metrics() -> None:
    for known in (
        "forecasts.model.energy_score.0",
        "forecasts.a name.with dots.coverage.90.3.1",
        "probes.embedding.label.of.somebody.linear",
        "planning.curve.2.ci95.1",
        "planning.protocol.planning.anything.at.all",
        "embedding.retrieval.forecasts.model.mrr.{}",
    ):
        assert place(known) == known and value_at({}, known) is None
    for renamed in (
        "horizons",
        "forecasts.model.energy",
        "forecasts.model.energy.0",
        "embedding.rank",
        "probes.embedding.digit.lin",
        "planning.curve.0.path_ratio",
        "planning.success",
    ):
        with pytest.raises(AssertionError, match="has no place"):
            value_at({}, renamed)


def test_the_samples_of_the_reports_tests_hold_nothing_else() -> None:
    assert undeclared(make_metrics(3) | {"planning": make_planning()}) == []
    assert undeclared({"horizons": 3, "forecasts": {"model": {"crsp": [1.0]}}}) == [
        "horizons",
        "forecasts.model.crsp.0",
    ]


def test_the_scripts_that_read_another_run(run: Path, tmp_path: Path) -> None:
    (run / "metrics.json").write_text(json.dumps({"forecasts": {"model": {"energy_score": {"999999999": 1}}}}))
    done = run_here("compare.py", "--runs", str(run), "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"error: {run / 'metrics.json'} is damaged") and "energy_score" in done.stderr
    assert not (tmp_path / "out").exists()
