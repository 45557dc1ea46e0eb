import math
import warnings
from collections.abc import Iterator

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from data_pipelines.errors import UserError
from data_pipelines.worlds.digits import pixel_centroid
from data_pipelines.worlds.two_rooms import ENV_ID, PrivilegedCost, TwoRoomsEnv, run_straight, wander
from data_pipelines.worlds.two_rooms_law import (
    DOOR_HEIGHT_PX,
    DOOR_Y_RANGE_PX,
    FIXED_DOOR_Y_PX,
    FIXED_WALL_X_PX,
    HIGH_PX,
    LOW_PX,
    WALL_WIDTH_PX,
    WALL_X_RANGE_PX,
    draw,
    is_free,
    move,
    shortest_path_px,
    step_of_action,
)

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def scenes(count: int, seed: int = 0) -> Arrays:
    """Free states and steps of up to 6 px with the layouts they are in, most of them near the wall: float64."""
    rng = np.random.default_rng(seed)
    wall_x, door_y = rng.uniform(*WALL_X_RANGE_PX, count), rng.uniform(*DOOR_Y_RANGE_PX, count)
    near = np.stack([wall_x + rng.uniform(-6, 6, count), door_y + rng.uniform(-9, 9, count)], axis=-1)
    state = np.where((rng.random(count) < 0.7)[:, None], near, rng.uniform(LOW_PX, HIGH_PX, (count, 2)))
    angle, length = rng.uniform(-math.pi, math.pi, count), rng.uniform(0, 6, count)
    step = np.stack([length * np.cos(angle), length * np.sin(angle)], axis=-1)
    keep = free(state, wall_x, door_y)
    return state[keep], step[keep], wall_x[keep], door_y[keep]


def free(at: np.ndarray, wall_x: np.ndarray, door_y: np.ndarray) -> np.ndarray:
    in_slab = np.abs(at[:, 0] - wall_x) < WALL_WIDTH_PX / 2
    in_door = np.abs(at[:, 1] - door_y) <= DOOR_HEIGHT_PX / 2
    return ((at >= LOW_PX) & (at <= HIGH_PX)).all(axis=1) & (~in_slab | in_door)


def crawl(state: np.ndarray, step: np.ndarray, wall_x: np.ndarray, door_y: np.ndarray, num_parts: int) -> np.ndarray:
    """The law by tiny parts of a step, each tried out: what is not free costs the axis that is in the way."""
    at, part = state.copy(), step / num_parts
    contacts = np.zeros(len(at), dtype=int)
    for _ in range(num_parts):
        tried = at + part
        bad = ~free(tried, wall_x, door_y)
        along = [np.stack([part[:, 0], 0 * part[:, 1]], axis=-1), np.stack([0 * part[:, 0], part[:, 1]], axis=-1)]
        may = [free(at + only, wall_x, door_y) for only in along]
        contacts += bad
        slid = np.where(may[1][:, None], along[1], np.where(may[0][:, None], along[0], 0))
        part = np.where(bad[:, None], np.where((contacts > 1)[:, None], 0, slid), part)
        at = np.where(free(at + part, wall_x, door_y)[:, None], at + part, at)
    return at


def tensors(arrays: Arrays) -> Iterator[torch.Tensor]:
    return (torch.tensor(values, dtype=torch.float32) for values in arrays)


def test_a_state_and_a_goal_can_be_set() -> None:
    env = TwoRoomsEnv()
    env.reset(seed=0)
    start, goal = np.array([10.5, 12.25], np.float32), np.array([50.0, 40.0], np.float32)
    assert env.set_state(start)["state"].tolist() == start.tolist()
    info = env.set_goal(goal)
    assert info["goal"].tolist() == goal.tolist() and not info["is_success"]
    assert env.set_state(goal)["is_success"]
    with pytest.raises(UserError, match=r"state=\[31.5, 50\] must be"):
        env.set_state([31.5, 50])


def test_moving_is_crawling_and_never_leads_through_a_wall() -> None:
    arrays = scenes(6_000)
    state, step, wall_x, door_y = arrays
    expected = crawl(*arrays, num_parts=1_500)
    moved = move(*tensors(arrays)).double().numpy()
    off = np.abs(moved - expected).max(axis=1)
    # Which side of a corner a path passes is a matter of rounding, for one in thousands.
    assert (off > 0.02).mean() < 2e-3 and np.median(off) < 1e-4
    crossed = (state[:, 0] < wall_x) != (moved[:, 0] < wall_x)
    hindered = np.abs(moved - state - step).max(axis=1) > 1e-3
    assert crossed.sum() > 300 and hindered.sum() > 500
    at, _, wall, door = (torch.tensor(values, dtype=torch.float32) for values in (moved, step, wall_x, door_y))
    assert is_free(at, wall, door).float().mean() > 0.999
    slack = 1e-4  # of float32
    in_slab = np.abs(moved[:, 0] - wall_x) < WALL_WIDTH_PX / 2 - slack
    assert (np.abs(moved[:, 1] - door_y)[in_slab] <= DOOR_HEIGHT_PX / 2 + slack).all()


def test_no_number_of_steps_tunnels() -> None:
    """Pushed into the wall beside the door for ever, by steps from 1e-7 px to 4 px."""
    generator = torch.Generator().manual_seed(0)
    wall_x, door_y = torch.tensor(31.5), torch.tensor(20.0)
    state = torch.stack([torch.full((400,), 29.0), torch.linspace(30, HIGH_PX, 400)], dim=-1)
    for _ in range(300):
        size = 10 ** (torch.rand(400, 1, generator=generator) * 7.6 - 7)
        heading = torch.randn(400, 2, generator=generator) * torch.tensor([1.0, 0.1])
        heading[:, 0] = heading[:, 0].abs()
        heading[:, 1] = torch.where(state[:, 1] < 27, heading[:, 1].abs(), heading[:, 1])
        state = move(state, size * heading / heading.norm(dim=-1, keepdim=True), wall_x, door_y)
    assert state[:, 0].max() <= 30.001 and (state[:, 0] > 29.999).float().mean() > 0.9


@pytest.mark.parametrize(
    ("start", "step", "end"),
    [
        ((29.0, 20.0), (4.0, 0.0), (33.0, 20.0)),  # through the door
        ((29.0, 25.0), (4.0, 0.0), (33.0, 25.0)),  # along its edge
        ((29.0, 26.0), (4.0, 0.0), (30.0, 26.0)),  # against the wall
        ((29.0, 26.0), (2.0, 2.0), (30.0, 28.0)),  # and along it
        ((29.0, 28.0), (2.0, -5.0), (30.0, 23.0)),  # past the door: the part into the wall is lost
        ((31.5, 24.0), (0.5, 3.0), (32.0, 25.0)),  # within the door
        ((31.5, 24.0), (3.0, 3.0), (34.5, 25.0)),  # out of it, along its edge
        ((58.0, 58.0), (3.0, 2.0), (59.0, 59.0)),  # into a corner
        ((34.0, 50.0), (-4.0, 0.0), (33.0, 50.0)),  # from the right
        ((10.0, 10.0), (0.0, 0.0), (10.0, 10.0)),
    ],
)
def test_contact_in_closed_form(start: tuple, step: tuple, end: tuple) -> None:
    moved = move(torch.tensor(start), torch.tensor(step), 31.5, 20.0)
    torch.testing.assert_close(moved, torch.tensor(end), atol=1e-5, rtol=0)


def test_many_candidates_at_once_are_moved_as_each_alone() -> None:
    state, step, wall_x, door_y = tensors(scenes(12))
    candidates = step[None].expand(len(state), -1, -1)  # [E, N, 2]
    together = move(state[:, None], candidates, wall_x[:, None], door_y[:, None])
    assert together.shape == (len(state), len(step), 2)
    for row in range(len(state)):
        for column in range(len(step)):
            alone = move(state[row], step[column], wall_x[row], door_y[row])
            assert torch.equal(together[row, column], alone)


def test_steps_are_no_longer_than_4_px() -> None:
    action = torch.tensor([[1.0, 1.0], [0.3, -0.4], [-1.0, 0.0], [0.0, 0.0]])
    expected = torch.tensor([[math.sqrt(8), math.sqrt(8)], [1.2, -1.6], [-4.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(step_of_action(action), expected)


def test_the_shortest_path_is_the_least_of_densely_sampled_ones() -> None:
    """From room to room over every pair of points of the door's two ends; within a room, or the door, straight."""
    rng = np.random.default_rng(1)
    half, across = WALL_WIDTH_PX / 2, np.linspace(-DOOR_HEIGHT_PX / 2, DOOR_HEIGHT_PX / 2, 401)
    longer = 0
    for _ in range(150):
        wall_x, door_y = rng.uniform(*WALL_X_RANGE_PX), rng.uniform(*DOOR_Y_RANGE_PX)
        left = np.array([rng.uniform(LOW_PX, wall_x - half), rng.uniform(LOW_PX, HIGH_PX)])
        right = np.array([rng.uniform(wall_x + half, HIGH_PX), rng.uniform(LOW_PX, HIGH_PX)])
        inside = np.array([rng.uniform(wall_x - half, wall_x + half), door_y + rng.uniform(-5, 5)])
        to_near = np.hypot(wall_x - half - left[0], door_y + across - left[1])
        to_far = np.hypot(wall_x + half - right[0], door_y + across - right[1])
        through = np.hypot(WALL_WIDTH_PX, across[:, None] - across)
        from_inside = np.hypot(wall_x + half - inside[0], door_y + across - inside[1])
        cases = [
            (left, right, (to_near[:, None] + through + to_far).min()),
            (right, inside, (from_inside + to_far).min()),
            (left, left[::-1].clip(LOW_PX, wall_x - half), None),
        ]
        starts, ends = (torch.tensor(np.stack(points)) for points in list(zip(*cases, strict=True))[:2])
        there, back = shortest_path_px(torch.cat([starts, ends]), torch.cat([ends, starts]), wall_x, door_y).chunk(2)
        for number, (start, end, dense) in enumerate(cases):
            straight = float(np.linalg.norm(start - end))
            expected = straight if dense is None else float(dense)
            for found in (there[number], back[number]):
                assert found.item() == pytest.approx(expected, abs=1e-3 + 1e-3 * (dense is not None))
                assert found.item() >= straight - 1e-9
            longer += expected > straight + 1
    assert longer > 60


def test_the_shortest_path_by_hand() -> None:
    state, goal = torch.tensor([[10.0, 50.0], [10.0, 20.0]]), torch.tensor([[50.0, 50.0], [50.0, 20.0]])
    found = shortest_path_px(state, goal, 31.5, 20.0)
    around = math.hypot(20, 25) + 3 + math.hypot(17, 25)
    torch.testing.assert_close(found, torch.tensor([around, 40.0]).double())


def test_the_dot_is_drawn_where_it_is() -> None:
    state, _, wall_x, door_y = tensors(scenes(400))
    corners = torch.tensor([[LOW_PX, LOW_PX], [HIGH_PX, HIGH_PX], [LOW_PX, HIGH_PX], [30.5, 20.0]])
    state = torch.cat([state, corners])
    wall_x, door_y = torch.cat([wall_x, torch.full((4,), 31.5)]), torch.cat([door_y, torch.full((4,), 20.0)])
    pictures = draw(state, wall_x, door_y)
    assert pictures.shape == (len(state), 64, 64, 3) and pictures.dtype == torch.uint8
    assert (pixel_centroid(pictures[..., 1].float()) - state).norm(dim=-1).max() < 0.1
    alone = draw(state[7:8], wall_x[7:8], door_y[7:8])
    assert torch.equal(alone[0], pictures[7])
    wall = pictures[..., 0].float() / 255
    torch.testing.assert_close(wall.sum(dim=(1, 2)), torch.full((len(state),), 3.0 * 54), atol=0.5, rtol=0)
    columns = wall.sum(dim=1)
    centre = (columns * torch.arange(64)).sum(dim=1) / columns.sum(dim=1)
    torch.testing.assert_close(centre, wall_x, atol=0.01, rtol=0)
    gap = 1 - wall[-1].amax(dim=1)
    assert (gap * torch.arange(64)).sum() / gap.sum() == pytest.approx(20.0, abs=0.01)
    assert pictures[..., 2].max() == 0


def covered(centre: torch.Tensor, width_px: float) -> torch.Tensor:
    """The fraction of each of 64 pixels that intervals cover: [N, 64]."""
    return (width_px / 2 + 0.5 - (torch.arange(64.0) - centre[:, None]).abs()).clamp(0, 1)


def test_a_usual_picture_is_its_parts_in_a_channel_each_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    state = LOW_PX + (HIGH_PX - LOW_PX) * torch.rand(300, 2, generator=generator)
    wall_x, door_y = 20 + 23 * torch.rand(300, generator=generator), 9 + 45 * torch.rand(300, generator=generator)
    columns, rows = torch.exp(-0.5 * ((torch.arange(64.0) - state[..., None]) / 1.4) ** 2).unbind(-2)
    wall = covered(wall_x, WALL_WIDTH_PX)[:, None, :] * (1 - covered(door_y, DOOR_HEIGHT_PX))[..., None]
    dot = rows[..., :, None] * columns[..., None, :]
    for pit, blue in ((False, 0), (True, 255)):
        pictures = draw(state, wall_x, door_y, pit=pit)
        assert torch.equal(pictures[..., :2], (torch.stack([wall, dot], dim=-1) * 255).round().byte())
        assert pictures[..., 2].max() == blue and torch.equal(
            pictures[..., 2], pictures[:1, ..., 2].expand(300, 64, 64)
        )


def test_the_dot_has_a_size_and_the_rest_a_background() -> None:
    options = {"state": [14, 48], "goal": [50, 48]}
    usual, changed = TwoRoomsEnv(), TwoRoomsEnv(agent_size=2, background=[10, 20, 30], pit=True)
    usual_picture, _ = usual.reset(seed=0, options=options)
    picture, info = changed.reset(seed=0, options=options)
    assert picture[60, 5].tolist() == [10, 20, 30] and picture[60, 31].tolist() == [255, 0, 0]
    assert picture[33, 22].tolist() == [0, 0, 255] and changed.goal_frame()[60, 5].tolist() == [10, 20, 30]
    dot = (picture[39:58, 5:24, 1].astype(float) - 20) / 235
    assert dot.sum() == pytest.approx(2 * math.pi * 2.8**2, rel=0.01)
    assert (usual_picture[..., 1] / 255).sum() == pytest.approx(2 * math.pi * 1.4**2, rel=0.01)
    assert np.array_equal(info["state"], [14, 48])  # it is a point in the law
    navy, black = (TwoRoomsEnv(background=name).reset(seed=0)[0] for name in ("navy", "black"))
    assert np.array_equal(navy[..., :2], black[..., :2]) and navy[60, 5, 2] == 128
    assert np.array_equal(black, TwoRoomsEnv().reset(seed=0)[0])


@pytest.mark.parametrize("kwargs", [{}, {"layout": "random", "slip": 0.3, "cross_room": 1.0}])
def test_gymnasium_finds_nothing_to_complain_about(kwargs: dict) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(ENV_ID, render_mode="rgb_array", **kwargs)
        check_env(env.unwrapped)
        module = TwoRoomsEnv.__module__
        other = gymnasium.make(f"{module}:{ENV_ID}", **kwargs)
    assert isinstance(other.unwrapped, TwoRoomsEnv)
    first, _ = other.reset(seed=5)
    again, _ = env.reset(seed=5)
    rendered = env.render()
    assert isinstance(rendered, np.ndarray) and np.array_equal(first, again) and np.array_equal(rendered, again)


def test_steps_follow_the_law_and_the_goal_ends_them() -> None:
    env = TwoRoomsEnv(render_mode="rgb_array")
    _, info = env.reset(seed=0, options={"state": [20, 40], "goal": [26, 40]})
    assert info["state"].tolist() == [20, 40] and not info["is_success"]
    assert info["state"].dtype == info["goal"].dtype == np.float32
    picture, reward, terminated, truncated, info = env.step(np.array([0.25, 0.25], np.float32))
    assert info["state"].tolist() == [21, 41] and (reward, terminated, truncated) == (-1.0, False, False)
    assert np.array_equal(picture, draw(torch.tensor([[21.0, 41.0]]), 31.5, 20.0)[0].numpy())
    goal = pixel_centroid(torch.from_numpy(env.goal_frame())[..., 1].float())
    torch.testing.assert_close(goal, torch.tensor([26.0, 40.0]), atol=0.05, rtol=0)
    _, reward, terminated, _, info = env.step(np.array([0.3, 0.0], np.float32))  # 3.96 px from the goal
    assert (reward, terminated, info["is_success"]) == (0.0, True, True)


def test_episodes_end_after_50_steps() -> None:
    env = gymnasium.make(ENV_ID)
    env.reset(seed=0, options={"state": [10, 10], "goal": [50, 50]})
    ends = [env.step(np.zeros(2, np.float32))[2:4] for _ in range(50)]
    assert ends == [(False, False)] * 49 + [(False, True)]


@pytest.mark.slow
def test_slips_replace_actions_as_often_as_asked() -> None:
    env = TwoRoomsEnv(slip=0.3)
    env.reset(seed=1)
    action = np.array([0.6, 0.0], np.float32)
    applied = np.stack([env.step(action)[4]["applied_action"] for _ in range(3_000)])
    slipped = (applied != action).any(axis=1)
    assert slipped.mean() == pytest.approx(0.3, abs=0.03)  # 3.6 standard deviations
    drawn = applied[slipped]
    assert np.abs(drawn.mean(axis=0)).max() < 0.08 and np.linalg.norm(drawn, axis=1).max() <= 1 + 1e-6
    assert (np.linalg.norm(drawn, axis=1) > 0.999).mean() == pytest.approx(1 - math.pi / 4, abs=0.06)  # cut corners
    sure = TwoRoomsEnv()
    sure.reset(seed=1)
    assert np.array_equal(sure.step(action)[4]["applied_action"], action)


def test_resets_are_drawn_as_said() -> None:
    env = TwoRoomsEnv(layout="random", cross_room=0.25)
    infos = [env.reset(seed=3 if number == 0 else None)[1] for number in range(1_200)]
    state, goal = (np.stack([info[name] for info in infos]) for name in ("state", "goal"))
    wall_x, door_y = (np.array([info[name] for info in infos]) for name in ("wall_x_px", "door_y_px"))
    assert ((state[:, 0] > wall_x) != (goal[:, 0] > wall_x)).mean() == pytest.approx(0.25, abs=0.045)
    assert np.linalg.norm(state - goal, axis=1).min() > 4
    assert free(state, wall_x, door_y).all() and free(goal, wall_x, door_y).all()
    for values, (low, high) in ((wall_x, WALL_X_RANGE_PX), (door_y, DOOR_Y_RANGE_PX), (state[:, 1], (4, 59))):
        assert values.min() == pytest.approx(low, abs=0.5) and values.max() == pytest.approx(high, abs=0.5)
        assert values.mean() == pytest.approx((low + high) / 2, abs=(high - low) / 25)
    fixed = TwoRoomsEnv().reset(seed=0)[1]
    assert (fixed["wall_x_px"], fixed["door_y_px"]) == (FIXED_WALL_X_PX, FIXED_DOOR_Y_PX)


def test_the_seed_is_all_the_chance_there_is() -> None:
    def episode(seed: int) -> list[np.ndarray]:
        env = TwoRoomsEnv(layout="random", slip=0.5)
        env.reset(seed=seed)
        return [env.step(np.array([0.5, 0.1], np.float32))[4]["state"] for _ in range(20)]

    assert np.array_equal(episode(4), episode(4)) and not np.array_equal(episode(4), episode(5))


def test_reset_options_are_taken_and_the_rest_is_drawn_around_them() -> None:
    env = TwoRoomsEnv(cross_room=1.0)
    options = {"state": (50.0, 20.0), "wall_x_px": 40.0, "door_y_px": 30}
    for _ in range(20):
        _, info = env.reset(options=options)
        assert info["state"].tolist() == [50, 20] and info["goal"][0] <= 38.5
        assert (info["wall_x_px"], info["door_y_px"]) == (40, 30)
        _, info = env.reset(options={"goal": (10.0, 20.0)})
        assert info["goal"].tolist() == [10, 20] and info["state"][0] >= 33


@pytest.mark.parametrize(
    ("options", "tells"),
    [
        ({"stat": (1, 2)}, "'stat' is unknown: use state, goal"),
        ({"state": (31.0, 40.0)}, r"state=\(31.0, 40.0\) must be \(x, y\) within 4..59 px and outside the wall"),
        ({"goal": (3.9, 40.0)}, "goal="),
        ({"goal": "here"}, "goal='here'"),
        ({"state": (float("nan"), 5)}, "state="),
        ({"state": (10, 10), "goal": (12, 12)}, r"goal=\[12.0, 12.0\] is within 4 px of the state"),
        ({"wall_x_px": 10}, "wall_x_px=10 must be a number within 20..43"),
        ({"door_y_px": "low"}, "door_y_px='low' must be a number within 9..54"),
    ],
)
def test_wrong_reset_options_are_told(options: dict, tells: str) -> None:
    with pytest.raises(UserError, match=tells):
        TwoRoomsEnv().reset(seed=0, options=options)


@pytest.mark.parametrize(
    ("kwargs", "tells"),
    [
        ({"layout": "round"}, "layout='round' is unknown: use fixed or random"),
        ({"slip": 1.5}, "slip=1.5 must be a number within 0..1"),
        ({"cross_room": "often"}, "cross_room='often'"),
        ({"goal_radius_px": 30}, "goal_radius_px=30 must be a number within 0..10"),
        ({"agent_size": 5}, "agent_size=5 must be a number within 0.25..4"),
        ({"background": "#00112233"}, "background='#00112233' must be a colour"),
        ({"background": [True, 0, 0]}, r"background=\[True, 0, 0\] must be a colour"),
        ({"render_mode": "human"}, "render_mode='human'"),
    ],
)
def test_wrong_arguments_are_told(kwargs: dict, tells: str) -> None:
    with pytest.raises(UserError, match=tells):
        TwoRoomsEnv(**kwargs)


def test_wandering_leads_through_the_door_and_over_both_rooms() -> None:
    visited = np.zeros((2, 3))
    crossings = 0
    for seed in range(4):
        rng = np.random.default_rng(seed)
        env, policy = TwoRoomsEnv(layout="random"), wander(rng)
        observation, info = env.reset(seed=seed)
        sides = []
        for _ in range(250):
            action = policy(observation, info)
            assert env.action_space.contains(action)
            observation, _, _, _, info = env.step(action)
            side = int(info["state"][0] > info["wall_x_px"])
            visited[side, int((info["state"][1] - LOW_PX) / 55 * 2.999)] += 1
            sides.append(side)
        crossings += int(np.abs(np.diff(sides)).sum())
    assert crossings >= 12 and visited.min() > 20


def test_running_straight_pushes_against_the_wall_from_both_sides_and_all_along_it() -> None:
    pushes = np.zeros((2, 3))
    for seed in range(8):
        rng = np.random.default_rng(seed)
        env, policy = TwoRoomsEnv(layout="random"), run_straight(rng)
        observation, info = env.reset(seed=seed)
        for _ in range(100):
            action = policy(observation, info)
            assert env.action_space.contains(action)
            asked = info["state"][0] + float(step_of_action(torch.as_tensor(action))[0])
            observation, _, _, _, info = env.step(action)
            x, y = info["state"]
            if abs(asked - x) > 0.1 and abs(x - info["wall_x_px"]) < WALL_WIDTH_PX:
                pushes[int(x > info["wall_x_px"]), int((y - LOW_PX) / 55 * 2.999)] += 1
    assert pushes.sum() / 800 > 0.4 and pushes.min() > 20


def test_explorations_walk_wander_and_run_straight_equally_often() -> None:
    env = TwoRoomsEnv()
    names = [env.exploration_policy(np.random.default_rng(seed)).__qualname__.split(".")[0] for seed in range(900)]
    assert {name: pytest.approx(1 / 3, abs=0.05) for name in names} == {
        name: names.count(name) / 900 for name in ("smooth_walk", "wander", "run_straight")
    }


def test_the_privileged_cost_is_the_shortest_path_from_free_places_by_the_wall() -> None:
    """The grid that its distances come from is 1 px wide, and its nearest point may lie in the wall."""
    rng, seen = np.random.default_rng(0), 0
    while seen < 8:
        env = TwoRoomsEnv(layout="random")
        env.reset(seed=int(rng.integers(2**31)))
        wall_x, door_y = env._wall_x, env._door_y
        beside = wall_x + rng.choice([-1, 1]) * (WALL_WIDTH_PX / 2 + rng.uniform(0.01, 0.4)), rng.uniform(5, 58)
        in_door = (
            wall_x + rng.uniform(-2, 2),
            door_y + rng.choice([-1, 1]) * (DOOR_HEIGHT_PX / 2 - rng.uniform(0.01, 0.4)),
        )
        state = torch.tensor(beside if seen % 2 else in_door, dtype=torch.float32)
        env._state = state
        if bool(is_free(state, wall_x, door_y)):
            cost = PrivilegedCost([env])(torch.zeros(1, 1, 1, 2))
            whole = float(shortest_path_px(state, env._goal, wall_x, door_y))
            assert cost.item() == pytest.approx(whole, abs=1.0)
            seen += 1
