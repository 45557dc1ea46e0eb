"""`worldmodel compare` in fresh processes: a grid, the same grid again, more seeds, an interruption, mistakes."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from data_pipelines.errors import UserError
from tests.conftest import REPO, TINY, run_here, run_script, script_environment
from tests.worldmodel.commands.test_script_mistakes import parsed
from worldmodel.commands import compare
from worldmodel.commands.grid import check_same_configs, is_done, keep_threads, make_grid
from worldmodel.commands.jobs import only_writer
from worldmodel.config import to_yaml
from worldmodel.config.reading import read_with_bases

DEMO = str(REPO / "configs" / "objectives.yaml")


def grid(out: Path, *arguments: str, objectives: str = "byol infonce", seeds: str = "0") -> list[str]:
    return [
        *("--config", DEMO, "--out", str(out), "--objectives", *objectives.split(), "--latents", "none", "gaussian"),
        *("--seeds", *seeds.split(), *arguments),
    ]


def tiny(world: Path) -> list[str]:
    """The tiny overrides that a grid leaves free."""
    return [*(override for override in TINY if not override.startswith("seed=")), f"data.root={world}"]


def assert_one_line(*arguments: str, tells: str) -> None:
    done = run_here("compare.py", *arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert len(done.stderr.splitlines()) == 1 and tells in done.stderr, done.stderr


@pytest.mark.slow
def test_a_grid_then_nothing_then_a_new_seed_only(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid"
    arguments = ["--jobs", "2", "--set", "byol/none:train.lr=3e-3", *tiny(world), "train.steps=2"]
    first = run_script("compare.py", *grid(out, *arguments), timeout_s=400)
    assert first.returncode == 0, first.stderr
    names = ["byol-none", "byol-gaussian", "infonce-none", "infonce-gaussian"]
    content = json.loads((out / "comparison.json").read_text())
    assert [run["folder"] for run in content["runs"]] == [f"{name}/seed_0" for name in names]
    assert yaml.safe_load(content["config_text"]) == read_with_bases(Path(DEMO)) and content["grid"]["seeds"] == [0]
    table = (out / "comparison.md").read_text()
    assert table.strip() in first.stdout and str(out / "comparison.png") in first.stdout
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in table.splitlines()[2:6]]
    assert [row[:3] for row in rows] == [
        ["byol", "none", "1"],
        ["", "gaussian", "1"],
        ["infonce", "none", "1"],
        ["", "gaussian", "1"],
    ]
    for name, row, cell in zip(names, rows, content["cells"], strict=True):
        score = json.loads((out / name / "seed_0" / "metrics.json").read_text())["forecasts"]["model"]["energy_score"][
            0
        ]
        assert row[3] == f"{score:.3f}"
        assert cell["stats"]["forecasts.model.energy_score.0"] == {"mean": score, "sd": None, "n": 1}
        rate = "0.003" if name == "byol-none" else "0.002"
        assert f"lr: {rate}\n" in (out / name / "seed_0" / "config.yaml").read_text()
        assert (out / name / "seed_0.log.txt").stat().st_size > 0
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")

    before = {path: path.stat().st_mtime_ns for path in out.glob("*/**/*") if path.is_file()}
    second = run_script("compare.py", *grid(out, *arguments))
    assert second.returncode == 0, second.stderr
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/**/*") if path.is_file()} == before
    assert (out / "comparison.md").read_text() == table

    more = grid(out, *arguments, "--latents", "none", objectives="byol", seeds="0 1")
    third = run_script("compare.py", *more, timeout_s=400)
    assert third.returncode == 0, third.stderr
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in before.items())
    assert [path.parent.name for path in out.glob("*/seed_1")] == ["byol-none"]
    assert re.search(r"\| byol +\| none +\| +2 \| +\d+\.\d{3} ± \d+\.\d{3} ", (out / "comparison.md").read_text())

    only = run_script("compare.py", *grid(out, *arguments, "--table-only", objectives="byol", seeds="0 1 2"))
    assert only.returncode == 0, only.stderr
    assert not list(out.glob("*/seed_2")) and "| byol" in (out / "comparison.md").read_text()

    assert_one_line(*grid(out, *arguments, "train.steps=3"), tells="byol-none/seed_0 holds a run of another config")


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others(world: Path, tmp_path: Path) -> None:
    broken = ["--set", "byol/none:data.root=nowhere", *tiny(world), "train.steps=1"]
    done = run_script("compare.py", *grid(tmp_path, *broken, objectives="byol"), timeout_s=200)
    assert done.returncode == 2
    told = [line for line in done.stderr.splitlines() if line.startswith("byol-none/seed_0: ")]
    assert len(told) == 1 and "nowhere" in told[0] and "Traceback" not in done.stderr
    assert "1 of 2 runs failed: byol-none/seed_0;" in done.stderr
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert [run["latent"] for run in content["runs"]] == ["gaussian"] and list(content["failed"]) == [
        "byol-none/seed_0"
    ]


@pytest.mark.slow
def test_an_interruption_saves_and_the_same_command_goes_on(world: Path, tmp_path: Path) -> None:
    slow = ["train.steps=200", "train.eval_every=200", "train.checkpoint_every=200"]
    arguments = grid(tmp_path, *tiny(world), *slow, objectives="byol")
    command = [sys.executable, str(REPO / "scripts" / "compare.py"), *arguments]
    rows = tmp_path / "byol-none" / "seed_0" / "metrics.jsonl"
    with subprocess.Popen(command, env=script_environment(), cwd=REPO, stderr=subprocess.PIPE, text=True) as running:
        deadline_s = time.monotonic() + 60
        while not (rows.is_file() and rows.stat().st_size) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 130 and "the same command continues" in errors, errors
    index = json.loads((rows.parent / "checkpoints" / "index.json").read_text())
    step = int(index["latest"].removeprefix("step_"))
    assert 0 < step < 200
    assert not (tmp_path / "byol-gaussian").exists() and not (tmp_path / "comparison.md").exists()

    resumed = run_script("compare.py", *arguments, timeout_s=300)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming {rows.parent} at step {step}" in rows.parent.with_name("seed_0.log.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "tells"),
    [
        (["--objectives", "simclr"], "--objectives simclr: allowed are byol, jepa, infonce"),
        (["--latents", "bernoulli"], "--latents bernoulli: allowed are gaussian"),
        (["--set", "infonce:train.lr=1"], "--set infonce:train.lr=1"),
        (["--set", "byol/sparse:train.lr=1"], "OBJECTIVE[/LATENT]"),
        (["--set", "byol:seed=1"], "use --seeds"),
        (["run_dir=elsewhere"], "use --out"),
        (["train.stepz=1"], "unknown key train.stepz=1"),
        (["--jobs", "0"], "--jobs 0"),
        (["--launch", "no_such_launcher"], "no_such_launcher"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path: Path, arguments: list[str], tells: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError) as caught:
        compare.compare(parsed(*grid(out, objectives="byol"), *arguments))
    assert tells in str(caught.value) and "\n" not in str(caught.value)
    assert not out.exists()


def test_a_bad_objective_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    assert_one_line(*grid(tmp_path / "out", objectives="byol simclr"), tells="--objectives simclr")
    assert not (tmp_path / "out").exists()


def test_folders_of_evaluated_runs_are_compared_without_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, _ = make_grid(parsed(*grid(tmp_path / "made", objectives="byol")))
    for run, shift in zip(runs, (0.0, 0.5), strict=True):
        run.folder.mkdir(parents=True)
        (run.folder / "config.yaml").write_text(to_yaml(run.config))
        scores = {"energy_score": [0.5 + shift, 1.0 + shift]}
        (run.folder / "metrics.json").write_text(json.dumps({"forecasts": {"model": scores}}))
        (run.folder / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 2.0}\n')
    out = tmp_path / "out"
    arguments = ["--runs", *(str(run.folder) for run in runs), "--out", str(out)]
    assert compare.compare_folders(parsed(*arguments)) == 0
    rows = json.loads((out / "comparison.json").read_text())["cells"]
    assert [row["objective"] for row in rows] == ["byol-none/seed_0", "byol-gaussian/seed_0"]
    assert [row["stats"]["forecasts.model.energy_score.1"]["mean"] for row in rows] == [1.0, 1.5]
    page = (out / "compare.html").read_text()
    assert (
        "Energy Score at horizon 2" in page and "1.500" in page and str(out / "compare.html") in capsys.readouterr().out
    )
    assert "forecasts best" not in page and "in its own embedding space" in page
    (runs[0].folder / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"--runs .*seed_0: there is no metrics\.json, evaluate the run first"):
        compare.compare_folders(parsed(*arguments))


@pytest.mark.parametrize(
    ("arguments", "tells"),
    [
        (["--jobs", "2"], "--runs takes --out only, not --jobs"),
        (["--launch", "none"], "--runs takes --out only, not --launch"),
        (["--table-only"], "--runs takes --out only, not --table-only"),
        (["--skip-refused"], "--runs takes --out only, not --skip-refused"),
        (["seed=1"], "--runs takes --out only, not seed=1"),
    ],
)
def test_given_runs_take_no_options_of_a_grid(tmp_path: Path, arguments: list[str], tells: str) -> None:
    assert_one_line("--runs", "a", "b", "--out", str(tmp_path / "out"), *arguments, tells=tells)
    assert not (tmp_path / "out").exists()


def test_a_run_is_given_once(tmp_path: Path) -> None:
    run = make_grid(parsed(*grid(tmp_path / "made", objectives="byol")))[0][0]
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(to_yaml(run.config))
    (run.folder / "metrics.json").write_text("{}")
    (tmp_path / "link").symlink_to(run.folder)
    twice = [str(run.folder), str(tmp_path / "link"), "--out", str(tmp_path / "out")]
    assert_one_line("--runs", *twice, tells="link: this run is given twice")


def test_scores_that_cannot_be_compared_name_no_winner(tmp_path: Path) -> None:
    """Those of two runs without labels are in the spaces of two embeddings."""
    speed, place = ({"name": name, "unit": "px", "dimensions": ["x"]} for name in ("speed", "position"))
    first: Any = {"queries_sha256": "ab", "quantity": speed, "forecasts": {"model": {"energy_score": [0.5]}}}
    assert not compare.why_not_comparable([first])
    assert not compare.why_not_comparable([first, first, cast(Any, {"factors": {}})])
    for change, tells in (
        ({"queries_sha256": "cd"}, "different queries"),
        ({"quantity": place}, "different quantities"),
        ({"quantity": None}, "in its own embedding space"),
    ):
        assert tells in compare.why_not_comparable([first, first | change])
    assert "in its own embedding space" in compare.why_not_comparable([first | {"quantity": None}] * 2)


def test_overrides_from_the_general_to_the_particular(tmp_path: Path) -> None:
    settings = ["--set", "byol/none:train.lr=3e-3", "byol:train.lr=2e-3", "train.lr=1e-3", "train.steps=7"]
    runs, refused = make_grid(parsed(*grid(tmp_path, *settings, seeds="0 4 4")))
    assert [(run.name, run.config.train.lr) for run in runs if run.seed == 4] == [
        ("byol-none/seed_4", 3e-3),
        ("byol-gaussian/seed_4", 2e-3),
        ("infonce-none/seed_4", 1e-3),
        ("infonce-gaussian/seed_4", 1e-3),
    ]
    assert len(runs) == 8 and not refused
    assert {run.config.train.steps for run in runs} == {7}
    assert runs[-1].config.run_dir == str(tmp_path / "infonce-gaussian" / "seed_4")
    last = runs[-1].config
    assert (last.objective.name, last.model.latent.name, last.seed) == ("infonce", "gaussian", 4)


def test_combinations_that_the_config_refuses(tmp_path: Path) -> None:
    arguments = grid(tmp_path, "model.editor=sum")
    with pytest.raises(UserError, match=r"byol/gaussian, infonce/gaussian: .*editor=sum.*--skip-refused"):
        make_grid(parsed(*arguments))
    runs, refused = make_grid(parsed(*arguments, "--skip-refused"))
    assert [run.name for run in runs] == ["byol-none/seed_0", "infonce-none/seed_0"]
    assert refused.startswith("byol/gaussian, infonce/gaussian: ")
    with pytest.raises(UserError, match=r"train\.lr=-1"):
        make_grid(parsed(*arguments, "train.lr=-1", "--skip-refused"))


def test_metrics_count_only_for_the_same_config_and_the_last_step(tmp_path: Path) -> None:
    def only_run(*overrides: str) -> Any:
        runs, _ = make_grid(parsed(*grid(tmp_path, *overrides, objectives="byol")))
        return runs[0]

    run = only_run("train.steps=8")
    folder = tmp_path / "byol-none" / "seed_0"
    folder.mkdir(parents=True)
    assert not is_done(run)
    (folder / "config.yaml").write_text(to_yaml(run.config))
    (folder / "metrics.json").write_text('{"train": {"steps": 8}}')
    assert is_done(run) and is_done(only_run("train.steps=8", "data.num_workers=0"))
    changed = only_run("train.steps=8", "train.lr=5e-3")
    assert not is_done(changed)
    with pytest.raises(UserError, match=r"byol-none/seed_0 .*train\.lr=0\.002, now 0\.005"):
        check_same_configs([changed])
    (folder / "metrics.json").write_text('{"train": {"steps": 4}}')
    assert not is_done(run)
    (folder / "metrics.json").write_text('{"train": {"steps": 8, "refine_steps": 2}}')
    assert not is_done(run)
    (folder / "metrics.json").write_text('{"train": {"steps": 8, "refine_steps": 0}}')
    assert is_done(run)


def test_cores_are_shared_and_a_begun_run_keeps_its_threads(tmp_path: Path) -> None:
    runs, _ = make_grid(parsed(*grid(tmp_path, objectives="byol")))
    given, _ = make_grid(parsed(*grid(tmp_path, "train.num_threads=5", objectives="byol")))
    assert keep_threads(runs[0], 3).config.train.num_threads == 3
    assert keep_threads(runs[0], None).config.train.num_threads is None
    assert keep_threads(given[0], 3).config.train.num_threads == 5
    runs[0].folder.mkdir(parents=True)
    (runs[0].folder / "config.yaml").write_text(to_yaml(keep_threads(runs[0], 3).config))
    assert keep_threads(runs[0], None).config.train.num_threads == 3


def test_a_folder_has_one_comparison_at_a_time_children_counted(tmp_path: Path) -> None:
    with only_writer(tmp_path) as lock:
        child = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
        with pytest.raises(UserError, match="another process still writes"), only_writer(tmp_path):
            pass
    try:
        with pytest.raises(UserError, match="another process still writes"), only_writer(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()
    with only_writer(tmp_path):
        pass
