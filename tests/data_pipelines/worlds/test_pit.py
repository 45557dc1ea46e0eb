"""The pit beside the shortest path between the two rooms."""

import itertools
import math

import numpy as np
import pytest
import torch

from data_pipelines.errors import UserError
from data_pipelines.worlds.two_rooms import PrivilegedCost, TwoRoomsEnv
from data_pipelines.worlds.two_rooms_law import (
    FIXED_DOOR_Y_PX,
    FIXED_WALL_X_PX,
    LOW_PX,
    PIT_PX,
    UNREACHABLE_PX,
    distances_around_the_pit,
    draw,
    in_pit,
    move,
    step_of_action,
)

(LEFT, TOP), (RIGHT, BOTTOM) = PIT_PX


def test_who_steps_into_the_pit_stays_there() -> None:
    env = TwoRoomsEnv(pit=True)
    env.reset(seed=0, options={"state": [20, TOP - 2], "goal": [50, 10]})
    down = np.array([0.0, 1.0], np.float32)
    for action in (down, -down, np.array([1.0, 0.0], np.float32)):
        info = env.step(action)[4]
        assert info["state"].tolist() == [20, TOP + 2] and not info["is_success"]
    assert info["applied_action"].tolist() == [1, 0]
    flat = TwoRoomsEnv()
    flat.reset(seed=0, options={"state": [20, TOP - 2], "goal": [50, 10]})
    assert flat.step(down)[4]["state"].tolist() == [20, TOP + 2]
    assert flat.step(-down)[4]["state"].tolist() == [20, TOP - 2]


def test_its_edge_is_firm_ground() -> None:
    corners = torch.tensor(list(itertools.product((LEFT, RIGHT), (TOP, BOTTOM))))
    assert not in_pit(corners).any()
    inside = corners + 0.01 * torch.tensor([(x, y) for x, y in itertools.product((1, -1), (1, -1))])
    assert in_pit(inside).all()
    env = TwoRoomsEnv(pit=True)
    env.reset(seed=0, options={"state": [20, TOP - 3], "goal": [50, 10]})
    assert env.step(np.array([0.0, 0.75], np.float32))[4]["state"].tolist() == [20, TOP]
    assert env.step(np.array([0.5, 0.0], np.float32))[4]["state"].tolist() == [22, TOP]


def test_starts_and_goals_are_outside_of_it() -> None:
    env = TwoRoomsEnv(pit=True, cross_room=1.0)
    points = []
    for seed in range(300):
        info = env.reset(seed=seed)[1]
        points += [info["state"], info["goal"]]
    assert not in_pit(torch.tensor(np.stack(points))).any()
    assert math.isnan(env.shortest_path_px())
    with pytest.raises(UserError, match=r"outside the wall at x=31.5 px and the pit \(\(16.0"):
        env.reset(options={"state": [20, 30]})
    with pytest.raises(UserError, match="pit=true needs layout=fixed, not random"):
        TwoRoomsEnv(layout="random", pit=True)


def test_it_is_drawn_in_blue() -> None:
    place = torch.tensor([[50.0, 10.0]])
    picture = draw(place, FIXED_WALL_X_PX, FIXED_DOOR_Y_PX, pit=True)[0]
    without = draw(place, FIXED_WALL_X_PX, FIXED_DOOR_Y_PX)[0]
    assert torch.equal(picture[..., :2], without[..., :2]) and without[..., 2].max() == 0
    assert picture[..., 2].double().sum() / 255 == pytest.approx((RIGHT - LEFT) * (BOTTOM - TOP), rel=0.01)
    rows, columns = (picture[..., 2] > 200).nonzero(as_tuple=True)
    assert (rows.min() - 0.5, rows.max() + 0.5) == pytest.approx((TOP, BOTTOM), abs=1)
    assert (columns.min() - 0.5, columns.max() + 0.5) == pytest.approx((LEFT, RIGHT), abs=1)
    env = TwoRoomsEnv(pit=True)
    assert env.reset(seed=0)[0][..., 2].max() == 255 and env.goal_frame()[..., 2].max() == 255


def test_distances_lead_around_it() -> None:
    """By hand: straight where nothing is between, over the corners of pit and door where they are."""
    goal = torch.tensor([50.0, 45.0])
    lengths = distances_around_the_pit(goal)

    def length(x: float, y: float) -> float:
        return float(lengths[round(y - LOW_PX), round(x - LOW_PX)])

    def path(*points: tuple[float, float]) -> float:
        return sum(math.dist(*pair) for pair in itertools.pairwise(points))

    assert length(50, 45) == 0
    assert length(58, 58) == pytest.approx(path((58, 58), (50, 45)), rel=0.02)
    assert length(40, 20) == pytest.approx(path((40, 20), (RIGHT, TOP), (50, 45)), rel=0.02)
    assert length(10, 45) == pytest.approx(
        path((10, 45), (LEFT, TOP), (30, 25), (33, 25), (RIGHT, TOP), (50, 45)), rel=0.02
    )
    assert length(20, 33) == UNREACHABLE_PX


def walls_off(slip: float) -> PrivilegedCost:
    env = TwoRoomsEnv(slip=slip, pit=True)
    env.reset(seed=0, options={"state": [17, TOP - 1], "goal": [29, TOP - 1]})
    return PrivilegedCost([env])


def test_the_privileged_cost_knows_the_slips() -> None:
    """Along the edge is shorter, and costs more as soon as one may slip: the mean over futures is that of the law."""
    along = torch.zeros(1, 1, 4, 2)
    along[..., 0] = 0.7
    away = along.clone()
    away[0, 0, 0] = torch.tensor([0.0, -0.7])
    both = torch.cat([along, away], dim=1)
    sure = walls_off(0.0)(both)[0]
    assert sure[0] < sure[1]
    cost, slipped = walls_off(0.5), torch.zeros(2)
    for _ in range(40):
        slipped += cost(both)[0] / 40
    assert slipped[0] > slipped[1] and (slipped > sure).all()

    generator, count, total = torch.Generator().manual_seed(1), 20_000, 0.0  # the same mean, by itself
    left = distances_around_the_pit(torch.tensor([29.0, TOP - 1]))
    state, is_lost = torch.tensor([17.0, TOP - 1]).expand(count, 2), torch.zeros(count, dtype=torch.bool)
    for action in along[0, 0]:
        slips = torch.rand(count, generator=generator) < 0.5
        drawn = torch.rand(count, 2, generator=generator) * 2 - 1
        step = step_of_action(torch.where(slips[:, None], drawn, action))
        state = torch.where(is_lost[:, None], state, move(state, step, FIXED_WALL_X_PX, FIXED_DOOR_Y_PX))
        is_lost |= in_pit(state)
        x, y = (state - LOW_PX).round().long().unbind(-1)
        total += float(torch.where(is_lost, UNREACHABLE_PX, left[y, x]).mean())
    assert float(slipped[0]) == pytest.approx(total, rel=0.05)
