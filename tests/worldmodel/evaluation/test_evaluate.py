"""The files that an evaluation writes into a run folder, and the runs that it compares."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.errors import UserError
from tests.worldmodel.report.samples import make_illustrations
from worldmodel.evaluation import evaluate as module
from worldmodel.evaluation.evaluate import evaluate
from worldmodel.evaluation.forecast import Evaluation
from worldmodel.runs.folder import RunFolder
from worldmodel.runs.metrics import Metrics
from worldmodel.runs.trained_run import load

QUANTITY = {"name": "velocity", "unit": "px/frame", "dimensions": ["x", "y"]}
SCORED: Any = {
    "queries_sha256": "ab", "quantity": QUANTITY, "horizon": 1, "forecasts": {"model": {"energy_score": [1.0]}}
}  # fmt: skip


@pytest.fixture
def run(trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose evaluation takes no time: forecasts are made up, and there are no labels and no recalibration."""
    result = Evaluation(Metrics(**SCORED), make_illustrations(queries=1, size_px=8), None, None, {})
    monkeypatch.setattr(module, "evaluate_forecasts", lambda *_: result)
    monkeypatch.setattr(module, "timeline_of_test_video", lambda _: None)
    monkeypatch.setattr(module, "why_unsupported", lambda _: "no surprise")
    return Path(shutil.copytree(trained_run, tmp_path / "evaluated"))


def test_files_of_an_evaluation_with_other_settings_go(run: Path) -> None:
    stale = [RunFolder(run).readout, RunFolder(run).recalibration, RunFolder(run).surprise]
    for path in stale:
        path.write_bytes(b"of another checkpoint")
    evaluate(load(run))
    assert RunFolder(run).metrics.is_file() and not any(path.exists() for path in stale)


def test_a_full_disk_is_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_records", full)
    with pytest.raises(UserError, match=f"cannot write to '{run}': No space left on device"):
        evaluate(load(run))


@pytest.mark.parametrize(
    ("change", "tells"),
    [
        ({}, ""),
        ({"queries_sha256": "cd"}, "was scored on other queries"),
        ({"horizon": 2, "forecasts": {"model": {"energy_score": [1.0, 2.0]}}}, "by another quantity or horizon"),
        ({"quantity": QUANTITY | {"name": "position"}}, "by another quantity or horizon"),
        ({"quantity": QUANTITY | {"dimensions": ["x"]}}, "by another quantity or horizon"),
    ],
)
def test_only_scores_of_the_same_quantity_are_compared(
    change: dict[str, Any], tells: str, run: Path, tmp_path: Path, make_folder: Callable[..., Path]
) -> None:
    other = make_folder(SCORED | change)
    if not tells:
        assert evaluate(load(run), compare=other)["forecasts"]["no_latent"] == SCORED["forecasts"]["model"]
        return
    with pytest.raises(UserError, match=tells):
        evaluate(load(run), compare=other)
    assert not RunFolder(run).metrics.exists()


def test_only_a_run_without_a_latent_is_a_control(run: Path, make_folder: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"has model\.latent=gaussian: compare with a run without a latent"):
        evaluate(load(run), compare=make_folder(SCORED, "gaussian"))


def test_the_folder_names_the_run_wherever_one_is(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    assert evaluate(load("."))["run"] == run.name


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes metrics into the folder of a run with a latent, `none` by default."""

    def made(metrics: dict[str, Any], latent: str = "none") -> Path:
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "metrics.json").write_text(json.dumps(metrics))
        (tmp_path / "other" / "config.yaml").write_text(f"run_dir: other\nmodel: {{latent: {latent}}}\n")
        return tmp_path / "other"

    return made
