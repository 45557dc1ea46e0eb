import sys
import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

pytest.importorskip("ogbench")

from ogbench.locomaze.maze import make_maze_env

from data_pipelines.errors import UserError
from data_pipelines.worlds import point_mazes
from data_pipelines.worlds.digits import pixel_centroid
from data_pipelines.worlds.point_mazes import MazeName, PointMazeEnv, cell_of, centre_of, way_between
from tests.conftest import run_python

MAZES: tuple[MazeName, ...] = ("medium", "large", "teleport")
ENTRANCES, EXITS = {(4, 6), (5, 1)}, {(1, 7), (6, 1), (6, 10)}


def ogbench_env(maze: MazeName) -> Any:
    return make_maze_env("point", "maze", maze_type=maze, terminate_at_goal=False)


@pytest.mark.parametrize("maze", MAZES)
def test_the_point_moves_as_in_ogbench(maze: MazeName) -> None:
    env, theirs, rng = PointMazeEnv(maze), ogbench_env(maze), np.random.default_rng(0)
    theirs._teleport_info = None  # its exits come from numpy's global generator
    _, info = env.reset(seed=1)
    theirs.set_xy(info["state"].astype(np.float64))
    heading, touched, sent = np.zeros(2), 0, False
    for _ in range(500):
        heading = np.clip(0.95 * heading + 0.3 * rng.normal(size=2), -1, 1)
        before = info["state"]
        _, reward, terminated, _, info = env.step(heading.astype(np.float32))
        assert terminated == info["is_success"] == (reward == 0)
        theirs.step(heading)
        sent = sent or float(np.abs(info["state"] - before).max()) > 1
        if sent:
            break
        assert np.abs(info["state"] - theirs.get_xy()).max() < 1e-4
        touched += bool(np.abs(info["state"] - before - 0.2 * heading).max() > 0.01)
    assert touched > 20 or sent


@pytest.mark.parametrize("maze", MAZES)
def test_cells_and_ways_are_those_of_ogbench(maze: MazeName) -> None:
    env, theirs, rng = PointMazeEnv(maze), ogbench_env(maze), np.random.default_rng(0)
    for point in rng.uniform(-3, 20, (200, 2)):
        assert cell_of(point) == theirs.xy_to_ij(point)
    for cell in env.maze.cells:
        assert tuple(centre_of(cell)) == theirs.ij_to_xy(cell)
        _, bfs = theirs.get_oracle_subgoal(centre_of(cell), centre_of(cell))
        assert np.array_equal(env.maze.steps_to(cell), bfs)
    start, goal = env.maze.open_cells[0], env.maze.open_cells[-1]
    way = way_between(env.maze, centre_of(start), centre_of(goal))
    assert len(way) == env.maze.steps_to(goal)[start] + 1
    assert np.allclose(np.linalg.norm(np.diff(way, axis=0), axis=1), 4)
    assert all(env.maze.free[cell_of(point)] for point in way)


@pytest.mark.parametrize(("maze", "size_px"), [("medium", 64), ("large", 64), ("teleport", 96)])
def test_frames_show_the_state_and_the_cells(maze: MazeName, size_px: int) -> None:
    env = PointMazeEnv(maze, size_px, render_mode="rgb_array")
    for seed in range(10):
        picture, info = env.reset(seed=seed)
        for frame, state in ((picture, info["state"]), (env.goal_frame(), info["goal"])):
            x, y = pixel_centroid(torch.from_numpy(frame[..., 1] / 255)).tolist()
            assert np.abs(env.state_px(state) - [x, y]).max() < 0.05
        again = env.render()
        assert again is not None and np.array_equal(again, picture)
    rows, columns = env.maze.free.shape
    for row in range(rows):
        for column in range(columns):
            x, y = env.state_px(centre_of((row, column))).round().astype(int)
            assert picture[y, x, 0] == (0 if env.maze.free[row, column] else 255)
            blue = 255 if (row, column) in ENTRANCES else 128 if (row, column) in EXITS else 0
            assert picture[y, x, 2] == (blue if maze == "teleport" else 0)
    walls_px = picture[..., 0].sum() / 255
    assert walls_px == pytest.approx(size_px**2 - env.maze.free.sum() * (size_px / max(rows, columns)) ** 2, rel=0.01)


def test_the_point_has_a_size_and_the_floor_a_colour() -> None:
    (usual, info), (picture, as_well) = (
        env.reset(seed=3) for env in (PointMazeEnv(), PointMazeEnv(agent_size=1.5, background=[9, 60, 30]))
    )
    assert np.array_equal(info["state"], as_well["state"])
    walls, floor = usual[..., 0] == 255, usual.max(axis=-1) == 0
    far = np.hypot(*(np.indices((64, 64))[::-1] - PointMazeEnv().state_px(info["state"])[:, None, None])) > 9
    assert (picture[floor & far] == [9, 60, 30]).all() and (picture[walls & far] == [255, 0, 0]).all()
    x, y = PointMazeEnv().state_px(info["state"]).round().astype(int)
    assert picture[y, x, 1] > 240 and picture[y, x, [0, 2]].max() <= 5
    assert picture[y, x + 2, 1] > usual[y, x + 2, 1] + 20


def test_a_teleporter_sends_to_each_exit_by_the_environments_own_chance() -> None:
    def sent(seed: int) -> list[tuple[int, int]]:
        env = PointMazeEnv("teleport")
        env.reset(seed=seed)
        cells = []
        for _ in range(120):
            env.set_state(centre_of((4, 6)) - [0, 1.6])
            assert cell_of(env.step(np.array([0, 0], np.float32))[-1]["state"]) == (4, 6)
            _, _, _, _, info = env.step(np.array([0, 1], np.float32))
            cells.append(cell_of(info["state"]))
        return cells

    np.random.seed(0)
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    first = sent(3)
    assert np.array_equal(before, np.random.get_state()[1])  # type: ignore[index]
    assert first == sent(3) != sent(4)
    assert {cell: first.count(cell) > 20 for cell in first} == dict.fromkeys(EXITS, True)


def test_shortest_paths_go_around_walls_and_end_at_the_goals_radius() -> None:
    env = PointMazeEnv("medium")
    env.reset(seed=0, options={"state": centre_of((1, 1)), "goal": (4, 1)})
    straight = np.hypot(4, 1) - 1
    assert env.shortest_path_px() == pytest.approx(2 * straight)  # 2 px per unit
    env.reset(seed=0, options={"state": centre_of((6, 1)), "goal": centre_of((4, 2))})
    assert env.shortest_path_px() == pytest.approx(2 * (3 * 4 - 1))
    teleport = PointMazeEnv("teleport")
    teleport.reset(seed=0)
    assert np.isnan(teleport.shortest_path_px())


def test_drawn_goals_are_unsolved_and_neither_walled_in_nor_entrances() -> None:
    env, places = PointMazeEnv("teleport"), set()
    for seed in range(400):
        _, info = env.reset(seed=seed)
        assert np.linalg.norm(info["state"] - info["goal"]) > 1 and not info["is_success"]
        places |= {cell_of(info["state"]), cell_of(info["goal"])}
    assert places == set(env.maze.cells) - ENTRANCES - {(1, 7)}


def test_a_state_and_a_goal_can_be_set() -> None:
    env = PointMazeEnv("medium")
    start, goal = np.array([0.3, -0.2], np.float32), np.array([1.5, 0.1], np.float32)
    _, info = env.reset(seed=0, options={"state": start, "goal": goal})
    assert np.array_equal(info["state"], start) and np.array_equal(info["goal"], goal)
    assert not env.set_goal(goal)["is_success"] and env.set_state(goal)["is_success"]
    assert env.set_goal(start)["goal"].tolist() == start.tolist()
    with pytest.raises(UserError, match="within 1 units of the state"):
        env.reset(options={"state": start, "goal": start + 0.5})


@pytest.mark.parametrize("maze", ["medium", *(pytest.param(maze, marks=pytest.mark.slow) for maze in MAZES[1:])])
def test_exploration_visits_every_cell(maze: MazeName) -> None:
    env, cells = PointMazeEnv(maze), set()
    for episode in range(40):
        _, info = env.reset(seed=episode)
        policy = env.exploration_policy(np.random.default_rng(episode))
        for _ in range(300):
            before = cell_of(info["state"])
            _, _, _, _, info = env.step(policy(None, info))
            cells |= {before, cell_of(info["state"])}
    # A point is sent off at the edge of the cell of an entrance.
    assert cells >= set(env.maze.cells) - (ENTRANCES if maze == "teleport" else set())


@pytest.mark.parametrize(
    ("arguments", "tells"),
    [
        ({"maze": "giant"}, "maze='giant' is unknown: use medium, large, teleport"),
        ({"size_px": 8}, "size_px=8 must be an integer within 16..1024"),
        ({"agent_size": "big"}, "agent_size='big' must be a number within 0.25..4"),
        ({"background": 7}, "background=7 must be a colour"),
        ({"render_mode": "human"}, "render_mode='human'"),
    ],
)
def test_arguments_that_cannot_be(arguments: dict[str, Any], tells: str) -> None:
    with pytest.raises(UserError, match=tells):
        PointMazeEnv(**arguments)


@pytest.mark.parametrize(
    ("options", "tells"),
    [
        ({"wall": 3}, "option 'wall' is unknown"),
        ({"state": [8, 0]}, r"option state=\[8, 0\] must be"),
        ({"goal": [99, 0]}, "in a free cell"),
        ({"goal": [float("nan"), 0]}, "in a free cell"),
        ({"goal": "here"}, "in a free cell"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], tells: str) -> None:
    with pytest.raises(UserError, match=tells):
        PointMazeEnv().reset(options=options)


def test_gymnasium_accepts_the_environment() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(gymnasium.make(point_mazes.ENV_ID, render_mode="rgb_array").unwrapped)


def test_the_packages_are_imported_late_and_named_if_they_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "import sys, data_pipelines.worlds.point_mazes; print({'mujoco', 'ogbench'} & set(sys.modules))"
    assert run_python("-c", listed).stdout == "set()\n"
    point_mazes.simulator_of_process.cache_clear()
    monkeypatch.setitem(sys.modules, "ogbench.locomaze.maze", None)
    with pytest.raises(UserError, match=r"point mazes need ogbench, .*: pip install 'worldmodel\[mazes\]'"):
        PointMazeEnv()
