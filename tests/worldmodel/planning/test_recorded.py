"""Starts and goals from recorded episodes, compared with the lines of their metadata."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines.errors import UserError
from data_pipelines.worlds.recorder import Recording, record
from data_pipelines.worlds.two_rooms_law import in_pit
from tests.conftest import REPO
from worldmodel.build import build_training_model
from worldmodel.config import load_config
from worldmodel.planning.controls import ReplayPolicy
from worldmodel.planning.protocol import EpisodeResults, PlanningProtocol, run_episodes
from worldmodel.planning.recorded import RecordedStarts, recorded_starts
from worldmodel.runs.trained_run import TrainedRun

ROOMS = "data_pipelines.worlds.two_rooms:worldmodel/TwoRooms-v0"
MAZES = "data_pipelines.worlds.point_mazes:worldmodel/PointMaze-v0"


def recorded(root: Path, env: str, num_steps: int, **kwargs: Any) -> TrainedRun:
    """An untrained run on recorded episodes."""
    facts = Recording(env=env, kwargs=kwargs, past_end=True, num_steps=num_steps)
    record(root, {"train": 1, "selection": 1, "test": 6}, facts, num_processes=1)
    config = load_config(REPO / "configs" / "two_rooms.yaml", [f"data.root={root}", "model.encoder.width=0.125"])
    return TrainedRun(root / "run", config, build_training_model(config).eval(), None, {})


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return recorded(tmp_path_factory.mktemp("rooms") / "data", ROOMS, 32, layout="random")


def protocol(env: str = ROOMS, seeds: int = 2, episodes: int = 8, first_seed: int = 0, **env_kwargs: Any) -> Any:
    return PlanningProtocol(
        env=env, env_kwargs=env_kwargs, seeds=seeds, episodes=episodes, budget=20, first_seed=first_seed
    )


def rows_of(run: TrainedRun) -> list[dict[str, Any]]:
    root = run.config.data.root  # type: ignore[union-attr]
    return [json.loads(line) for line in (Path(str(root)) / "test" / "metadata.jsonl").read_text().splitlines()]


def replayed(protocol: PlanningProtocol, starts: RecordedStarts, num_steps: int, seed: int = 0) -> EpisodeResults:
    actions = np.stack([episode.actions[:num_steps] for episode in starts.episodes[seed]])
    return run_episodes(dataclasses.replace(protocol, starts=starts), seed, lambda envs: ReplayPolicy(actions))


def test_start_and_goal_are_frames_of_an_episode_that_are_the_offset_apart(rooms: TrainedRun) -> None:
    rows, places = rows_of(rooms), []
    starts = recorded_starts(rooms, protocol(layout="random"), 15)
    for episodes in starts.episodes:
        for episode in episodes:
            (row,) = [row for row in rows if np.float32(row["wall_x_px"]) == np.float32(episode.options["wall_x_px"])]
            states = np.array(row["state"], np.float32)
            (frame,) = np.flatnonzero(
                (states[:-15] == episode.start).all(axis=1) & (states[15:] == episode.goal).all(1)
            )
            assert np.array_equal(episode.actions, np.array(row["action"], np.float32)[frame : frame + 15])
            assert episode.options.keys() == {"wall_x_px", "door_y_px"}
            assert np.linalg.norm(episode.start - episode.goal) > 4
            places.append((rows.index(row), int(frame)))
        assert len(set(places[-len(episodes) :])) == len(episodes) == 8
    assert len({row for row, _ in places}) > 3 and places[:8] != places[8:]


def test_the_choice_depends_on_the_first_seed_and_the_seed_alone(rooms: TrainedRun) -> None:
    def goals(**options: Any) -> list[np.ndarray]:
        starts = recorded_starts(rooms, protocol(layout="random", **options), 15)
        return [np.stack([episode.goal for episode in episodes]) for episodes in starts.episodes]

    both = goals()
    assert all(np.array_equal(*pair) for pair in zip(both, goals(), strict=True))
    assert np.array_equal(goals(seeds=1)[0], both[0]) and np.array_equal(goals(episodes=5)[1], both[1][:5])
    assert not np.array_equal(goals(first_seed=1)[0], both[0])


def test_starts_that_meet_their_goal_are_left_out_and_counted(rooms: TrainedRun) -> None:
    rows, offset = rows_of(rooms), 3
    states = [np.array(row["state"], np.float32) for row in rows]
    away = np.concatenate([np.linalg.norm(way[offset:] - way[:-offset], axis=1) for way in states])
    unsolved = int((away > 4).sum())
    starts = recorded_starts(rooms, protocol(seeds=1, episodes=unsolved, layout="random"), offset)
    assert len(starts.episodes[0]) == unsolved and 0 < starts.left_out <= len(away) - unsolved
    assert starts.facts["left_out"] == starts.left_out and starts.facts["offset"] == offset
    with pytest.raises(UserError, match=rf"the test split has {unsolved} unsolved pairs of frames that are 3 apart"):
        recorded_starts(rooms, protocol(seeds=1, episodes=unsolved + 1, layout="random"), offset)


def test_starts_and_goals_in_a_pit_are_left_out_and_counted(tmp_path: Path) -> None:
    run = recorded(tmp_path / "data", ROOMS, 60, slip=0.2, pit=True, cross_room=1)
    falls = np.concatenate([in_pit(torch.tensor(row["state"])).numpy() for row in rows_of(run)])
    assert falls.any() and not falls.all()
    asked = protocol(seeds=1, episodes=60, slip=0.2, pit=True, cross_room=1)
    starts = recorded_starts(run, asked, 10)
    places = np.stack([place for one in starts.episodes[0] for place in (one.start, one.goal)])
    assert starts.left_out > 0 and not in_pit(torch.from_numpy(places)).any()


def test_recorded_actions_reach_the_goal_and_no_actions_do_not(rooms: TrainedRun) -> None:
    asked = protocol(layout="random")
    starts = recorded_starts(rooms, asked, 15)
    repeated, idle = replayed(asked, starts, 15, seed=1), replayed(asked, starts, 0, seed=1)
    assert repeated.success.all() and repeated.steps.max() <= 15 and not idle.success.any()
    for episode, way, still in zip(starts.episodes[1], repeated.states, idle.states, strict=True):
        assert np.array_equal(way[0], episode.start) and (still == episode.start).all()
        assert len(way) < 16 or np.array_equal(way[15], episode.goal)


@pytest.mark.slow
def test_recorded_actions_are_exact_in_mazes(tmp_path: Path) -> None:
    pytest.importorskip("ogbench")
    run = recorded(tmp_path / "data", MAZES, 60)
    asked = protocol(MAZES, seeds=1, episodes=20)
    asked = dataclasses.replace(asked, budget=60)
    starts = recorded_starts(run, asked, 40)
    results = replayed(asked, starts, 40)
    assert results.success.all() and not replayed(asked, starts, 0).success.any()
    rows = rows_of(run)
    for episode, way in zip(starts.episodes[0], results.states, strict=True):
        ways = [np.array(row["state"], np.float32) for row in rows]
        assert any(
            np.array_equal(states[first : first + len(way)], way)
            for states in ways
            for first in np.flatnonzero((states == episode.start).all(axis=1))
        )
    # 2 px per unit; the way to the radius of the goal
    legs = [2 * np.linalg.norm(np.diff(way, axis=0), axis=1).sum() for way in results.states]
    assert results.path == pytest.approx(legs, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "offset", "tells"),
    [
        ({}, 33, "--offset=33: the longest episode of the test split of .* has 33 frames"),
        ({"env": "CartPole-v1"}, 5, "CartPole-v1 has no set_state"),
    ],
)
def test_mistakes(rooms: TrainedRun, options: dict[str, Any], offset: int, tells: str) -> None:
    with pytest.raises(UserError, match=tells):
        recorded_starts(rooms, protocol(**options), offset)


def test_videos_without_labels_of_states_cannot_start_episodes(rooms: TrainedRun, tmp_path: Path) -> None:
    for split in ("train", "selection", "test"):
        (tmp_path / split).mkdir()
        for video in (Path(str(rooms.config.data.root)) / split).glob("*.mp4"):  # type: ignore[union-attr]
            (tmp_path / split / video.name).symlink_to(video)
    config = load_config(REPO / "configs" / "two_rooms.yaml", [f"data.root={tmp_path}"])
    bare = dataclasses.replace(rooms, config=config)
    with pytest.raises(UserError, match="has no label 'state' of frames"):
        recorded_starts(bare, protocol(), 5)
