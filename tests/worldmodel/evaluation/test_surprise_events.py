import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from data_pipelines.errors import UserError
from data_pipelines.worlds import kicked_mnist
from data_pipelines.worlds.planted import EVENTS, Planted
from tests.conftest import REPO, TINY, run_here
from tests.worldmodel.commands.test_scripts import assert_one_line
from worldmodel import load
from worldmodel.config import load_config
from worldmodel.evaluation.surprise import MEASURES, Transitions
from worldmodel.evaluation.surprise_events import detect_events, event_aurocs, touches
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
    return train(load_config(REPO / "configs" / "demo.yaml", [*TINY, *overrides]))


def test_which_transitions_show_a_change_between_frames() -> None:
    assert STARTS[touches(STARTS, 9, 12, 12)].tolist() == [6, 9]  # frames 11 and 12 are both in [6, 15), [9, 18)
    assert STARTS[touches(STARTS, 9, 13, 13)].tolist() == [6, 9, 12]
    assert STARTS[touches(STARTS, 9, 12, 21)].tolist() == [6, 9, 12, 15, 18]


def transitions(surprise: np.ndarray) -> Transitions:
    return Transitions(STARTS, surprise, surprise, -surprise, surprise)


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
    aurocs = event_aurocs(noise, scored, 9)
    assert aurocs["surprise"]["seen"] == aurocs["surprise"]["lasting"] == 1
    assert aurocs["surprise"]["missed"] == 0 and aurocs["prediction_error"]["missed"] == 1
    assert aurocs["kl_nats"] == aurocs["surprise"]
    assert aurocs["surprise"]["all"] == pytest.approx(8 / 10)  # two transitions of each of five videos


def test_detects_on_a_run_deterministically(kicked_run: Path) -> None:
    run = load(kicked_run)
    found = detect_events(run, 3, seed=1)
    assert list(found) == list(MEASURES) == ["surprise", "kl_nats", "prediction_error", "scene_nats"]
    for measure in MEASURES:
        assert set(found[measure]) == {*EVENTS, "all"}
        assert all(0 <= value <= 1 for value in found[measure].values())
    assert found == detect_events(run, 3, seed=1) != detect_events(run, 3, seed=2)


def test_the_script_writes_and_prints_the_table(kicked_run: Path, tmp_path: Path) -> None:
    shutil.copytree(kicked_run, tmp_path / "run")
    done = run_here("benchmarks/surprise.py", "--run", str(tmp_path / "run"), "--num-videos", "2")
    assert done.returncode == 0, done.stderr
    stored = json.loads((tmp_path / "run" / "surprise_events.json").read_text())
    assert stored["num_videos"] == 2 and stored["seed"] == 0 and stored["step"] == 6
    assert all(math.isfinite(value) for values in stored["auroc"].values() for value in values.values())
    of_change = [stored["auroc"][measure]["digit_change"] for measure in MEASURES]
    (row,) = [line.split() for line in done.stdout.splitlines() if line.startswith("digit change")]
    assert row[2:] == [f"{value:.3f}" for value in of_change]
    assert_one_line("benchmarks/surprise.py", "--run", str(kicked_run), "--num-videos", "0", tells="not 0")


def test_events_need_the_kicked_world(trained_run: Path) -> None:
    with pytest.raises(UserError, match="events are planted in the kicked world"):
        detect_events(load(trained_run), 2, seed=0)
