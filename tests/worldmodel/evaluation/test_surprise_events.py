import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from data_pipelines.errors import UserError
from data_pipelines.worlds import kicked_mnist, occlusion
from data_pipelines.worlds.planted import EVENTS, Planted
from tests.conftest import REPO, TINY, run_here
from tests.worldmodel.commands.test_scripts import assert_one_line
from worldmodel import load
from worldmodel.config import Config, load_config
from worldmodel.evaluation.surprise import MEASURES, Transitions
from worldmodel.evaluation.surprise_events import (
    ScoredVideos,
    detect,
    event_alarms,
    event_aurocs,
    share_higher,
    touches,
)
from worldmodel.training.loop import train

STARTS = np.arange(0, 52, 3)  # transitions of nine frames in 60


@pytest.fixture(scope="module")
def kicked_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kicked")
    kicked_mnist.write_kicked_mnist(
        root / "world", {"train": 8, "selection": 4, "test": 4}, num_frames=18, num_processes=1
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    overrides = (f"data.root={root / 'world'}", f"run_dir={root / 'run'}", "data.batch_size=4")
    return train(load_config(REPO / "configs" / "objectives.yaml", [*TINY, *overrides]))


def test_which_transitions_show_a_change_between_frames() -> None:
    assert STARTS[touches(STARTS, 9, 12, 12)].tolist() == [6, 9]  # frames 11 and 12 are both in [6, 15), [9, 18)
    assert STARTS[touches(STARTS, 9, 13, 13)].tolist() == [6, 9, 12]
    assert STARTS[touches(STARTS, 9, 12, 21)].tolist() == [6, 9, 12, 15, 18]


def transitions(surprise: np.ndarray) -> Transitions:
    return Transitions(STARTS, surprise, surprise, -surprise, surprise, surprise)


def marked(frame: int, last: int, event: float, rest: float) -> tuple[Transitions, Planted]:
    """Scores of `event` where the event's first frame is shown, of `rest` where something else of it is, else noise."""
    surprise = np.random.default_rng(frame).normal(size=len(STARTS))
    surprise[touches(STARTS, 9, frame, last)] = rest
    surprise[touches(STARTS, 9, frame, frame)] = event
    return transitions(surprise), Planted(torch.empty(0), frame, last)


def test_events_that_are_seen_score_1_others_a_half_and_what_follows_does_not_count() -> None:
    noise = [transitions(np.random.default_rng(seed).normal(size=len(STARTS))) for seed in range(20)]
    scored = {
        "seen": [marked(frame, frame, 100.0, 100.0) for frame in (12, 30)],
        "lasting": [marked(frame, frame + 12, 100.0, 200.0) for frame in (12, 30)],
        "missed": [marked(12, 12, -100.0, -100.0)],
    }
    aurocs = event_aurocs(ScoredVideos(noise, scored, 9))
    assert aurocs["surprise"]["seen"] == aurocs["surprise"]["lasting"] == 1
    assert aurocs["surprise"]["missed"] == 0 and aurocs["prediction_error"]["missed"] == 1
    assert aurocs["kl_nats"] == aurocs["surprise"]
    assert aurocs["surprise"]["all"] == pytest.approx(8 / 10)  # two transitions of each of five videos


def test_alarms_are_counted_in_normal_videos_and_at_events() -> None:
    normal = [transitions(np.arange(len(STARTS), dtype=float)) for _ in range(4)]  # 18 transitions, 0 to 17
    scored = {"half": [marked(12, 12, 16.5, 0.0), marked(12, 12, 14.5, 99.0)], "none": [marked(12, 12, 15.0, 99.0)]}
    alarms = event_alarms(ScoredVideos(normal, scored, 9), 15.0)
    assert alarms["normal"] == pytest.approx(2 / 18) and alarms["detected"] == {"half": 0.5, "none": 0.0}
    assert alarms["normal_ci95"] == pytest.approx(wilson(8, 72))


def wilson(successes: int, trials: int, z: float = 1.959964) -> list[float]:
    """The score interval by its formula."""
    rate, scale = successes / trials, 1 + z**2 / trials
    centre = (rate + z**2 / (2 * trials)) / scale
    half = z * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2)) / scale
    return [centre - half, centre + half]


def test_ties_of_pairs_count_half() -> None:
    found = share_higher(np.array([3.0, 1.0, 2.0, 5.0]), np.array([1.0, 1.0, 3.0, 4.0]))
    assert found["share"] == 2.5 / 4 and found["ci95"] == pytest.approx(wilson(2, 4))


@pytest.mark.slow
def test_pairs_of_the_occlusion_world_are_compared(tiny_config: Callable[..., Config], occlusion_world: Path) -> None:
    run = train(
        tiny_config(f"data.root={occlusion_world}", "data.num_frames=6", "data.num_segments=2", "data.batch_size=4")
    )
    result = detect(load(run), 3, 0, 0.1)
    assert set(result["pairs"]) == {*occlusion.EVENTS} and result == detect(load(run), 3, 0, 0.1)
    assert all(found["share"] * 6 % 1 == 0 for found in result["pairs"].values())
    done = run_here("benchmarks/surprise.py", "--run", str(run), "--num-videos", "3")
    assert done.returncode == 0, done.stderr
    shares = [result["pairs"][event]["share"] for event in occlusion.EVENTS]
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(occlusion.EVENTS)]
    assert [row[:2] for row in rows] == [
        [event, f"{share:.3f}"] for event, share in zip(occlusion.EVENTS, shares, strict=True)
    ]
    assert json.loads((run / "surprise_events.json").read_text())["pairs"] == result["pairs"]


def test_detects_on_a_run_deterministically(kicked_run: Path) -> None:
    run = load(kicked_run)
    result = detect(run, 3, 1, 0.1)
    found, alarms = result["auroc"], result["alarms"]
    assert list(found) == list(MEASURES) == ["surprise", "kl_nats", "prediction_error", "scene_nats", "still_nats"]
    for measure in MEASURES:
        assert set(found[measure]) == {*EVENTS, "all"}
        assert all(0 <= value <= 1 for value in found[measure].values())
    assert set(alarms["detected"]) == {*EVENTS} and alarms["rate"] == 0.1
    assert alarms["normal_ci95"][0] <= alarms["normal"] <= alarms["normal_ci95"][1]
    assert result == detect(run, 3, 1, 0.1) != detect(run, 3, 2, 0.1)


def test_the_script_writes_and_prints_the_table(kicked_run: Path, tmp_path: Path) -> None:
    shutil.copytree(kicked_run, tmp_path / "run")
    options = ("--num-videos", "2", "--false-alarms", "0.2")
    done = run_here("benchmarks/surprise.py", "--run", str(tmp_path / "run"), *options)
    assert done.returncode == 0, done.stderr
    stored = json.loads((tmp_path / "run" / "surprise_events.json").read_text())
    assert stored["num_videos"] == 2 and stored["seed"] == 0 and stored["step"] == 6
    assert all(math.isfinite(value) for values in stored["auroc"].values() for value in values.values())
    of_change = [stored["auroc"][measure]["digit_change"] for measure in MEASURES]
    row, _ = [line.split() for line in done.stdout.splitlines() if line.startswith("digit change")]
    assert row[2:] == [f"{value:.3f}" for value in of_change]
    assert f"above {stored['alarms']['threshold']:.3f}, the threshold at a false alarm rate of 0.2:" in done.stdout
    assert_one_line("benchmarks/surprise.py", "--run", str(kicked_run), "--num-videos", "0", tells="not 0")
    refused = "a false alarm rate of 2 is not between 0 and 1"
    assert_one_line("benchmarks/surprise.py", "--run", str(kicked_run), "--false-alarms", "2", tells=refused)


def test_events_need_the_kicked_world(trained_run: Path) -> None:
    with pytest.raises(UserError, match="events are planted in the kicked world"):
        detect(load(trained_run), 2, 0, 0.1)
