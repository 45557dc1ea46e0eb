"""The commands, most of them in fresh processes: their output, and one line for a user's mistake."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import REPO, run_here, run_script

DEMO = ["--config", str(REPO / "configs" / "objectives.yaml")]


def assert_one_line(script: str, *arguments: str, tells: str) -> None:
    done = run_here(script, *arguments)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(errors) == 1 and tells in errors[0], done.stderr


def test_train_evaluate_and_roll_out(tiny_overrides: list[str], world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained = run_script("train.py", *DEMO, *tiny_overrides)
    assert trained.returncode == 0, trained.stderr
    byol = ["--config", str(REPO / "configs" / "demo_byol.yaml"), *tiny_overrides, f"run_dir={tmp_path / 'byol'}"]
    assert run_here("train.py", *byol).returncode == 0
    assert run_here("evaluate.py", "--run", str(tmp_path / "byol")).returncode == 0
    evaluated = run_script("evaluate.py", "--run", str(run), "--compare", str(tmp_path / "byol"))
    assert evaluated.returncode == 0, evaluated.stderr
    metrics = json.loads((run / "metrics.json").read_text())
    twin_metrics = json.loads((tmp_path / "byol" / "metrics.json").read_text())
    assert metrics["forecasts"]["no_latent"] == twin_metrics["forecasts"]["model"]
    assert metrics["train"]["seconds"] > 0 and metrics["train"]["steps"] == 6 and metrics["seed"] == 3
    assert f"{metrics['forecasts']['model']['energy_score'][0]:.3f}" in evaluated.stdout
    assert str(run / "report.html") in evaluated.stdout and (run / "report.html").stat().st_size < 5e6

    out = tmp_path / "futures.npz"
    video = world / "test" / "000000.mp4"
    arguments = [
        "--run",
        str(run),
        "--video",
        str(video),
        "--num-samples",
        "5",
        "--horizon",
        "3",
        "--out",
        str(out),
    ]
    rolled = run_here("rollout.py", *arguments)
    assert rolled.returncode == 0, rolled.stderr
    with np.load(out) as stored:
        assert stored["futures"].shape == (5, 3, 16) and stored["context"].shape == (16,)
        assert stored["futures"].std(axis=0).min() > 0

    assert_one_line("rollout.py", *arguments, "--start-frame", "7", tells="it has 9 frames")
    assert_one_line("train.py", *DEMO, *tiny_overrides, tells="already holds a run")
    continued = f"train.lr=0.002, now 1.0: --config {tmp_path}/run/config.yaml continues it, or choose another run_dir"
    assert_one_line("train.py", *DEMO, *tiny_overrides, "--resume", "train.lr=1", tells=continued)


@pytest.mark.parametrize(
    ("overrides", "tells"),
    [
        (["data.root=nowhere"], "nowhere"),
        (["data.root={empty}"], "no video"),
        (["data.root={broken}"], "broken"),
        (["data.num_frames=50"], "150 frames"),
        (["data.batch_size=512", "data.num_lanes=1"], "512"),
        (["train.stepz=1"], "train.stepz"),
        (["data.root={half}"], "max_bad_fraction"),
    ],
)
def test_bad_data_ends_with_one_line(
    tiny_overrides: list[str], world: Path, tmp_path: Path, overrides: list[str], tells: str
) -> None:
    places = {name: tmp_path / name for name in ("empty", "broken", "half")}
    for place in places.values():
        place.mkdir()
    (places["broken"] / "a.mp4").write_bytes(b"no video at all")
    for number in range(4):
        good = (world / "train" / f"{number:06d}.mp4").read_bytes()
        (places["half"] / f"{number}.mp4").write_bytes(good if number % 2 else good[:500])
    filled = [override.format(**places) for override in overrides]
    assert_one_line("train.py", *DEMO, *tiny_overrides, *filled, tells=tells)
    assert not (tmp_path / "run").exists()


def test_few_bad_files_are_skipped_counted_and_named(tiny_overrides: list[str], world: Path, tmp_path: Path) -> None:
    root = tmp_path / "videos"
    shutil.copytree(world, root)
    (root / "world.json").unlink()
    (root / "train" / "zero.mp4").write_bytes(b"")
    (root / "train" / "cut.mp4").write_bytes((root / "train" / "000000.mp4").read_bytes()[:700])
    done = run_script("train.py", *DEMO, *tiny_overrides, f"data.root={root}")
    assert done.returncode == 0, done.stderr
    assert "zero.mp4" in done.stderr and "cut.mp4" in done.stderr and "2 of 66" in done.stderr


def test_a_decoder_that_is_not_installed(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipelines import decoders
    from data_pipelines.errors import UserError

    monkeypatch.setattr(decoders.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        decoders.resolve_decoder("decord")


def test_one_s_own_folder_of_videos(tiny_overrides: list[str], world: Path, tmp_path: Path) -> None:
    """No labels, no split folders, no law: training, scores in embedding space and a report, by changing data.root."""
    root = tmp_path / "holiday"
    root.mkdir()
    for number, path in enumerate(sorted(world.glob("*/*.mp4"))):
        shutil.copy(path, root / f"{number}.mp4")
    run = tmp_path / "run"
    trained = run_here("train.py", *DEMO, *tiny_overrides, f"data.root={root}")
    assert trained.returncode == 0, trained.stderr
    evaluated = run_here("evaluate.py", "--run", str(run))
    assert evaluated.returncode == 0, evaluated.stderr
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["space"] == "embedding"
    assert {"model", "persistence"} <= set(metrics["forecasts"])
    assert (run / "report.html").is_file()


def test_missing_runs_and_files(tmp_path: Path) -> None:
    assert_one_line("evaluate.py", "--run", str(tmp_path / "no"), tells="no run in")
    assert_one_line("rollout.py", "--run", str(tmp_path), "--video", "x.mp4", "--out", "o.npz", tells="no run in")
    assert_one_line("train.py", "--config", str(tmp_path / "no.yaml"), tells="cannot read config")
    (tmp_path / "notes.txt").write_text("mine")
    assert_one_line("make_moving_mnist.py", "--out", str(tmp_path), tells="does not hold a world")
