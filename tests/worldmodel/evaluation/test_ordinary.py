import csv
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.errors import UserError
from tests.conftest import run_here
from tests.worldmodel.commands.test_scripts import assert_one_line
from worldmodel import TrainedRun, load
from worldmodel.evaluation.ordinary import load_ordinary, ordinary_transitions, save_ordinary, threshold_at
from worldmodel.evaluation.surprise import Ordinary, clip_surprise, still_nats
from worldmodel.runs.folder import RunFolder


@pytest.fixture(scope="module")
def evaluated(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A run with what an evaluation stores of its selection clips."""
    folder = tmp_path_factory.mktemp("alarms") / "run"
    shutil.copytree(trained_run, folder)
    run = load(folder)
    save_ordinary(folder, ordinary_transitions(run.networks, 32), run.state["step"])
    return run


def test_a_further_number_exceeds_the_threshold_at_the_rate() -> None:
    """Exactly, as each of N + 1 exchangeable numbers is equally likely to be the further one."""
    numbers = np.random.default_rng(0).permutation(100).astype(float)
    for rate in (0.01, 0.1, 0.29, 0.5):
        exceed = [number > threshold_at(rate, np.sort(np.delete(numbers, i))) for i, number in enumerate(numbers)]
        assert np.mean(exceed) == pytest.approx(rate)


def test_the_threshold_of_selection_predicts_the_rate_of_other_clips() -> None:
    generator = np.random.default_rng(1)
    rates = [
        (generator.gamma(2, size=500) > threshold_at(0.05, np.sort(generator.gamma(2, size=199)))).mean()
        for _ in range(300)
    ]
    assert np.mean(rates) == pytest.approx(0.05, abs=0.004)


def test_stillness_keeps_the_rate_of_false_alarms() -> None:
    """Ordinary motions are compared with each other, as further ones are with them."""
    generator = torch.Generator().manual_seed(0)
    rates = []
    for _ in range(300):
        ordinary, further = (torch.rand(count, generator=generator) for count in (99, 2_000))
        ordinary = ordinary.sort().values
        calibration, found = still_nats(ordinary, ordinary, are_ordinary=True), still_nats(further, ordinary)
        noise = [0.3 * torch.randn(len(nats), generator=generator) for nats in (calibration, found)]
        threshold = threshold_at(0.01, np.sort((calibration + noise[0]).numpy()))
        rates.append(float(((found + noise[1]).numpy() > threshold).mean()))
    assert 0.006 < np.mean(rates) < 0.011


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (0.0, "a false alarm rate of 0 is not between 0 and 1"),
        (1.0, "a false alarm rate of 1 is not between 0 and 1"),
        (float("nan"), "a false alarm rate of nan is not between 0 and 1"),
        (0.01, "a false alarm rate of 0.01 needs 99 selection transitions, but the run was evaluated with 98"),
    ],
)
def test_rates_without_a_threshold_are_refused(rate: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        threshold_at(rate, np.arange(98.0))
    assert threshold_at(0.01, np.arange(99.0)) == 98


def test_selection_clips_are_scored_as_videos_are(evaluated: TrainedRun) -> None:
    found = ordinary_transitions(evaluated.networks, 10)
    networks = replace(evaluated.networks, ordinary_motion=found.motion)
    clips = [clip for batch in evaluated.source.evaluation_batches("selection", 10) for clip in batch["video"]]
    each = [clip_surprise(networks, clip).surprise[0] for clip in clips]
    np.testing.assert_allclose(found.surprise, np.sort(each), rtol=1e-4)


def test_an_evaluated_run_has_thresholds(evaluated: TrainedRun, long_video: Path) -> None:
    ordinary = load_ordinary(evaluated.folder, evaluated.state["step"])
    assert ordinary is not None and ordinary.motion is not None
    assert len(ordinary.surprise) == len(ordinary.motion) == 32
    timeline = evaluated.surprise(long_video, false_alarms=0.25)
    assert timeline.threshold == threshold_at(0.25, ordinary.surprise) and timeline.alarms is not None
    np.testing.assert_array_equal(timeline.alarms, timeline.surprise > timeline.threshold)
    assert evaluated.surprise(long_video).alarms is None
    with pytest.raises(
        UserError, match=r"rate of 0.01 needs 99 selection transitions, but the run was evaluated with 32"
    ):
        evaluated.surprise(long_video, false_alarms=0.01)


def test_the_command_marks_alarms(evaluated: TrainedRun, long_video: Path, tmp_path: Path) -> None:
    arguments = ["--run", str(evaluated.folder), "--video", str(long_video), "--out", str(tmp_path / "out")]
    done = run_here("surprise.py", *arguments, "--false-alarms", "0.25")
    assert done.returncode == 0, done.stderr
    timeline = evaluated.surprise(long_video, false_alarms=0.25)
    assert timeline.alarms is not None
    with (tmp_path / "out" / "surprise.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["is_alarm"] for row in rows] == [str(int(alarm)) for alarm in timeline.alarms]
    expected = f"rate of 0.25: {timeline.threshold:.3f} nats, exceeded by {timeline.alarms.sum()} of 10 transitions"
    assert expected in done.stdout


def test_mistakes(evaluated: TrainedRun, trained_run: Path, long_video: Path, tmp_path: Path) -> None:
    video = ("--video", str(long_video), "--out", str(tmp_path / "out"))
    refused = "a false alarm rate of 1.5 is not between 0 and 1"
    assert_one_line("surprise.py", "--run", str(trained_run), *video, "--false-alarms", "1.5", tells=refused)
    unevaluated = "does not have for this checkpoint: evaluate it"
    assert_one_line("surprise.py", "--run", str(trained_run), *video, "--false-alarms", "0.1", tells=unevaluated)
    path = RunFolder(evaluated.folder).surprise
    kept = path.read_bytes()
    try:
        save_ordinary(evaluated.folder, Ordinary(np.arange(3, dtype=np.float32), torch.arange(3.0)), 5)
        assert evaluated.surprise(long_video).still_nats is None  # of another checkpoint
        with pytest.raises(UserError, match="does not have for this checkpoint: evaluate it"):
            evaluated.surprise(long_video, false_alarms=0.5)
        for damaged in (b"nothing", kept[:-4] + b"\xff\xff\xff\xff"):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=r"surprise.safetensors is damaged, evaluate the run again"):
                evaluated.surprise(long_video, false_alarms=0.5)
    finally:
        path.write_bytes(kept)
