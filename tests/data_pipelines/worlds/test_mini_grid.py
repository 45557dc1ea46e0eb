from collections import Counter, deque
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_pipelines.errors import UserError
from data_pipelines.worlds import mini_grid_law as law
from data_pipelines.worlds.mini_grid import (
    ENV_ID,
    MiniGridObstaclesEnv,
    PrivilegedCost,
    expert,
    hit_probability,
)
from data_pipelines.worlds.mini_grid_law import FORWARD, LEFT, LOST, RIGHT

CORNER = [(6, 6), (5, 6), (6, 5), (5, 5)]
"""Cells of balls that are out of the way of an agent at the upper left."""


def state(x: int, y: int, direction: int, balls: Any = CORNER, lost: int = 0) -> np.ndarray:
    return np.array([x, y, direction, lost, *np.ravel(balls)], np.float32)


def many(one: np.ndarray, action: int, *, strict: bool = False, count: int = 2000) -> np.ndarray:
    """Draw the states after an action, [count, 12]."""
    return law.move(one[None].repeat(count, 0), np.full(count, action), np.random.default_rng(0), strict=strict)


@pytest.fixture(scope="module")
def package() -> Any:
    """MiniGrid's own environment, of which `put` sets the state."""
    envs = pytest.importorskip("minigrid.envs")
    return envs.DynamicObstaclesEnv(size=8, n_obstacles=4, agent_start_pos=None, highlight=False, tile_size=8)


def put(package: Any, one: np.ndarray) -> None:
    from minigrid.core.grid import Grid
    from minigrid.core.world_object import Ball

    place, direction, _, balls = law.parts_of(one)
    package.grid = Grid(8, 8)
    package.grid.wall_rect(0, 0, 8, 8)
    package.agent_pos, package.agent_dir = tuple(place.tolist()), int(direction)
    package.obstacles = [Ball() for _ in balls]
    for ball, cell in zip(package.obstacles, balls.tolist(), strict=True):
        package.put_obj(ball, *cell)


def test_pictures_are_those_of_the_package(package: Any) -> None:
    from minigrid.core.grid import Grid
    from minigrid.core.world_object import Floor

    package.reset(seed=0)
    for direction in range(4):
        one = state(2, 5, direction, [(1, 1), (6, 6), (3, 5), (2, 4)])
        put(package, one)
        np.testing.assert_array_equal(law.draw(one), package.get_frame(highlight=False, tile_size=8))
        lost = Grid.render_tile(Floor("yellow"), agent_dir=direction, tile_size=8)
        np.testing.assert_array_equal(law.tile("lost", direction), lost.astype(np.uint8))


@pytest.mark.parametrize(
    ("one", "action"),
    [
        (state(2, 2, 0, [(3, 2), (4, 3), (6, 6), (1, 1)]), FORWARD),  # into a ball
        (state(2, 2, 0, [(4, 3), (4, 1), (6, 6), (1, 1)]), FORWARD),  # two balls may move into the way
        (state(1, 2, 2, [(1, 3), (2, 3), (1, 1), (6, 6)]), FORWARD),  # into the wall
        (state(2, 2, 3, [(1, 1), (2, 3), (1, 2), (2, 1)]), LEFT),  # a ball in a corner with little room
    ],
)
def test_the_law_is_that_of_the_package(package: Any, one: np.ndarray, action: int) -> None:
    package.reset(seed=1)
    count, seen = 300, Counter[Any]()
    for _ in range(count):
        put(package, one)
        reward = package.step(action)[1]
        after = [*package.agent_pos, package.agent_dir, reward == -1]
        seen[tuple(int(value) for value in after)] += 1
        for ball in package.obstacles:
            seen["ball", *(int(value) for value in ball.cur_pos)] += 1
    drawn, ours = many(one, action), Counter[Any]()
    for row in drawn.astype(int).tolist():
        ours[tuple(row[:4])] += 1
        for ball in range(4):
            ours["ball", *row[4 + 2 * ball : 6 + 2 * ball]] += 1
    for what in seen | ours:
        share, expected = seen[what] / count, ours[what] / len(drawn)
        error = (expected * abs(1 - expected) / count + 1e-5) ** 0.5
        assert abs(share - expected) < 5 * error + 0.01, what


def test_moves_of_balls_are_uniform_over_free_neighbours() -> None:
    one = state(2, 2, 0, [(3, 3), (6, 6), (6, 5), (6, 4)])
    first = many(one, LEFT)[:, 4:6]
    places = Counter(map(tuple, first.astype(int).tolist()))
    assert set(places) == {(x, y) for x in (2, 3, 4) for y in (2, 3, 4)} - {(2, 2), (3, 3)}
    np.testing.assert_allclose(np.array(list(places.values())) / 2000, 1 / 7, atol=0.04)
    boxed = np.array([[[1, 1], [2, 1], [1, 2]]])
    assert not law.free_neighbours(boxed, np.array([[2, 2]]), 0).any()
    assert (law.move_balls(boxed, np.array([[2, 2]]), np.random.default_rng(0))[0, 0] == 1).all()


def test_a_ball_that_moves_ahead_blocks_and_in_the_strict_law_is_hit() -> None:
    one = state(2, 2, 0, [(4, 2), (6, 6), (6, 5), (6, 4)])
    for strict in (False, True):
        after = many(one, FORWARD, strict=strict)
        blocked = (after[:, 4:6] == [3, 2]).all(axis=1)
        assert blocked.mean() == pytest.approx(1 / 8, abs=0.03)
        np.testing.assert_array_equal(after[:, 0], np.where(blocked, 2, 3))
        np.testing.assert_array_equal(after[:, LOST], blocked if strict else 0)
    place, _, _, balls = law.parts_of(one)
    ahead = np.array([3, 2])
    assert hit_probability(place, ahead, balls, strict=True) == pytest.approx(1 / 8)
    assert hit_probability(place, ahead, balls, strict=False) == 0
    assert hit_probability(place, np.array([4, 2]), balls, strict=False) == 1


def test_a_lost_agent_stays_lost() -> None:
    env = MiniGridObstaclesEnv()
    env.reset(seed=0, options={"state": state(1, 1, 3), "goal": state(1, 2, 0)})
    _, reward, terminated, _, info = env.step(FORWARD)
    assert env.is_lost(info["state"]) and not terminated and reward == -1
    for action in (RIGHT, RIGHT, FORWARD):  # to the goal, if it were not lost
        _, _, _, _, after = env.step(action)
        np.testing.assert_array_equal(after["state"][:4], info["state"][:4])
    assert not after["is_success"] and (after["state"][4:] != info["state"][4:]).any()


def test_least_steps_are_those_of_a_search() -> None:
    goal = np.array([4, 3])
    steps, queue = {(4, 3, direction): 0 for direction in range(4)}, deque((4, 3, direction) for direction in range(4))
    while queue:  # backwards from the goal
        x, y, direction = queue.popleft()
        dx, dy = law.HEADINGS[direction].tolist()
        for before in ((x, y, (direction + 1) % 4), (x, y, (direction - 1) % 4), (x - dx, y - dy, direction)):
            if before not in steps and 1 <= before[0] <= 6 and 1 <= before[1] <= 6:
                steps[before] = steps[x, y, direction] + 1
                queue.append(before)
    assert len(steps) == 4 * 36
    cells = np.array(list(steps))
    np.testing.assert_array_equal(law.least_steps(cells[:, :2], cells[:, 2], goal), list(steps.values()))


def test_a_state_that_is_set_has_the_future_of_the_seed() -> None:
    env, other = (gymnasium.make(f"data_pipelines.worlds.mini_grid:{ENV_ID}", render_mode="rgb_array") for _ in "ab")
    _, info = env.reset(seed=4)
    other.reset(seed=4)
    settable: Any = other.unwrapped
    assert (settable.set_state(info["state"])["state"] == info["state"]).all()
    for action in (LEFT, LEFT, RIGHT):
        seen, info = env.step(action)[0], env.step(action)[-1]
        same, again = other.step(action)[0], other.step(action)[-1]
        np.testing.assert_array_equal(seen, same)
        np.testing.assert_array_equal(info["state"], again["state"])
    assert settable.set_goal(state(3, 4, 1))["goal"][:2].tolist() == [3, 4]
    np.testing.assert_array_equal(settable.goal_frame(), law.draw(state(3, 4, 1)))
    settable.set_state(state(3, 1, 1))
    assert settable.shortest_path_px() == 24
    np.testing.assert_array_equal(settable.state_px(state(3, 4, 1)), [27.5, 35.5])
    assert settable.set_state(state(3, 4, 0))["is_success"]  # the direction does not count
    assert not settable.set_state(state(3, 4, 0, lost=1))["is_success"]


def test_starts_are_drawn_apart() -> None:
    env = MiniGridObstaclesEnv()
    for seed in range(100):
        _, info = env.reset(seed=seed)
        assert not info["is_success"]
        for one in (info["state"], info["goal"]):
            assert (env.set_state(one)["state"] == one).all()  # valid


@pytest.mark.parametrize(("strict", "least"), [(False, 39), (True, 33)])
def test_the_expert_reaches_its_goal(strict: bool, least: int) -> None:
    env, reached = MiniGridObstaclesEnv(strict=strict), 0
    for seed in range(40):
        _, info = env.reset(seed=seed)
        policy = expert(np.random.default_rng(seed), strict=strict, noise=0)
        for _ in range(50):
            info = env.step(policy(None, info))[-1]
            if info["is_success"]:
                reached += 1
                break
    assert reached >= least


def test_policies_go_on_to_other_goals() -> None:
    env = MiniGridObstaclesEnv()
    assert list(env.policies()) == ["expert", "weak"]
    _, info = env.reset(seed=0, options={"state": state(1, 1, 0), "goal": state(2, 1, 0)})
    policy = env.policies()["expert"](np.random.default_rng(0))
    places = set()
    for _ in range(60):
        info = env.step(policy(None, info))[-1]
        places.add(tuple(info["state"][:2]))
    assert len(places) > 8


def test_the_privileged_cost_knows_the_law() -> None:
    env = MiniGridObstaclesEnv(strict=True)
    env.reset(seed=0, options={"state": state(1, 1, 0, [(1, 2), (4, 1), (6, 6), (6, 5)]), "goal": state(6, 1, 0)})
    actions = F.one_hot(torch.tensor([[[FORWARD], [LEFT], [RIGHT]]]), 3).float()
    cost = env.privileged_cost([env, env])(actions.expand(2, -1, -1, -1))
    assert cost.shape == (2, 3) and cost[0, 1:].tolist() == [6, 6]
    risks = 4 + (40 - 4) * np.arange(17) / 16  # of 16 futures, some end in a hit
    assert np.abs(risks - cost[0, 0].item()).min() < 1e-4 and cost[0, 0] > 4
    chances: PrivilegedCost = env.privileged_cost([env, env])
    chances.keep(torch.tensor([True, False]))
    assert chances(actions).shape == (1, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": 1}, "reset option 'where' is unknown"),
        ({"state": [1, 1]}, "reset option state=.* must be 12 numbers"),
        ({"state": state(0, 1, 0)}, "in different cells"),
        ({"state": state(6, 6, 0)}, "in different cells"),
        ({"goal": state(1, 1, 4)}, "a direction of 0 to 3"),
        ({"goal": state(1, 1, 0) + 0.5}, "in different cells"),
        ({"state": state(1, 1, 0), "goal": state(1, 1, 2)}, "is met by the state already"),
    ],
)
def test_wrong_options_are_reported(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MiniGridObstaclesEnv().reset(seed=0, options=options)
    with pytest.raises(UserError, match="strict='yes' must be true or false"):
        MiniGridObstaclesEnv(strict="yes")  # type: ignore[arg-type]
