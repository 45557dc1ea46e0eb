import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_pipelines.errors import UserError
from data_pipelines.worlds import push_t_expert as expert
from data_pipelines.worlds import push_t_law as law
from data_pipelines.worlds.push_t import ENV_ID, PushTEnv
from data_pipelines.worlds.states import State
from tests.conftest import run_python

STILL = np.zeros(5)


def state_of(agent: Any, block: Any = (256, 256), angle: float = 0.0) -> State:
    return np.array([*agent, *block, angle, *STILL], np.float32)


def action_of(x: float, y: float) -> np.ndarray:
    return np.array([x, y], np.float32)


def run(state: State, actions: np.ndarray) -> np.ndarray:
    states = [state]
    for action in actions:
        states.append(law.move(states[-1], action)[0])
    return np.stack(states)


def test_the_disc_follows_the_exact_solution_of_its_controller_and_the_block_rests() -> None:
    start = state_of((60, 400), (350, 150), 2.0)
    actions = np.random.default_rng(0).uniform(-0.2, 0.3, (12, 2)).astype(np.float32)
    states = run(start, actions)
    assert (states[:, 2:5] == start[2:5]).all() and not states[:, 7:].any()
    # Closed form of x'' = 100 (target - x) - 20 x', which the sub-steps of 0.01 s approximate.
    place, velocity = start[:2].astype(float), np.zeros(2)
    for action, seen in zip(actions, states[1:], strict=True):
        target, error = place + 100 * action, -100 * action.astype(float)
        rate = velocity + 10 * error
        place, velocity = target + np.exp(-1) * (error + rate * 0.1), np.exp(-1) * (rate - 10 * (error + rate * 0.1))
        np.testing.assert_allclose(seen[:2], place, atol=1.5)
        place, velocity = seen[:2].astype(float), seen[5:7].astype(float)


def test_a_push_moves_and_turns_the_block_by_the_impulse_of_its_contact() -> None:
    import pymunk

    bar = pymunk.moment_for_poly(1, [(-60, 0), (60, 0), (60, 30), (-60, 30)])
    assert pytest.approx(2 * bar) == law.MOMENT  # what gym-pusht adds up
    for lever in (0, 20, -35):  # along the bar's outer edge, pushed in the direction of the stem
        start = state_of((256 + lever, 256 - 16))
        end = run(start, np.tile(action_of(0, 0.1), (3, 1)))[-1]
        centre = law.to_canvas(law.CENTRE_OF_MASS, end) - law.to_canvas(law.CENTRE_OF_MASS, start)
        turn = float(law.angle_between(end[4], 0))
        assert centre[1] > 4 and abs(centre[0]) < 0.15 * centre[1]
        assert turn == pytest.approx(lever * centre[1] / law.MOMENT, rel=0.1, abs=1e-6)
        gap = float(law.block_distance(law.to_block(end[:2].astype(float), end))) - law.AGENT_RADIUS
        assert -1 < gap < 0.2


def test_a_state_and_actions_give_the_same_states_bit_for_bit() -> None:
    env = PushTEnv()
    _, info = env.reset(seed=3)
    policy = expert.expert(np.random.default_rng(0))
    states, actions = [info["state"]], []
    for _ in range(60):
        actions.append(policy(None, info))
        info = env.step(actions[-1])[-1]
        states.append(info["state"])
    assert np.abs(np.diff(states, axis=0)[:, 2:5]).sum() > 50 and np.any(np.array(states)[:, 7:])  # in contact
    other = PushTEnv()
    other.reset(seed=4)
    for start in (0, 17, 30, 41):
        assert (other.set_state(states[start])["state"] == states[start]).all()
        for action, expected in zip(actions[start:], states[start + 1 :], strict=True):
            assert (other.step(action)[-1]["state"] == expected).all()


def test_the_target_stays_on_the_canvas_and_the_executed_action_says_so() -> None:
    state, applied = law.move(state_of((20, 300)), action_of(-1, 0.5))
    np.testing.assert_allclose(applied, [-0.2, 0.5], atol=1e-6)
    assert 0 < state[0] < 20
    env = PushTEnv()
    env.reset(seed=0, options={"state": state_of((20, 300))})
    assert (env.step(action_of(-9, 0.5))[-1]["applied_action"] == applied).all()


@pytest.mark.parametrize(
    ("agent", "block", "turn", "met"),
    [
        ((0, 0), (0, 0), 0, True),
        ((19, 0), (0, 0), 0, True),
        ((0, 0), (0, 21), 0, False),
        ((15, 0), (0, 15), 0, False),  # 21.2 together
        ((12, 0), (0, 12), 0, True),
        ((0, 0), (0, 0), np.pi / 9 - 0.01, True),
        ((0, 0), (0, 0), -np.pi / 9 - 0.01, False),
        ((0, 0), (0, 0), 2 * np.pi - 0.3, True),
    ],
)
def test_the_criterion_joins_disc_and_block_and_bounds_the_angle(
    agent: Any, block: Any, turn: float, met: bool
) -> None:
    goal = state_of((100, 100), (300, 300), 0.1)
    state = state_of(np.add(agent, 100), np.add(block, 300), 0.1 + turn)
    assert law.reaches(state, goal) is met


def test_pictures_are_the_average_of_a_canvas_eight_times_as_large() -> None:
    for seed in range(4):
        env = PushTEnv("rgb_array")
        _, info = env.reset(seed=seed)
        scale = 4
        canvas = Image.new("RGB", (512 * scale, 512 * scale), law.WHITE)
        pen = ImageDraw.Draw(canvas)
        corners = law.to_canvas(law.OUTLINE, info["state"]) * scale - 0.5
        pen.polygon([tuple(corner) for corner in corners.tolist()], law.SLATE)
        x, y = (info["state"][:2] * scale).tolist()
        radius = law.AGENT_RADIUS * scale
        pen.ellipse([x - radius, y - radius, x + radius - 1, y + radius - 1], law.BLUE)
        averaged = np.asarray(canvas.reduce(8 * scale)).astype(int)
        frame = env.render()
        assert frame is not None and frame.shape == (64, 64, 3) and frame.dtype == np.uint8
        apart = np.abs(frame[2:-2, 2:-2] - averaged[2:-2, 2:-2]).max(axis=-1)
        assert apart.max() < 40 and apart.mean() < 0.3  # corners are rounded a little


def test_the_canvas_has_a_colour() -> None:
    (white, _), (picture, _) = (PushTEnv(background=colour).reset(seed=0) for colour in ("white", "olive"))
    bare = (white == 255).all(axis=-1)
    assert bare.mean() > 0.5 and (picture[bare] == [128, 128, 0]).all()
    shapes = (white == law.SLATE).all(axis=-1) | (white == law.BLUE).all(axis=-1)
    assert shapes.sum() > 50 and np.array_equal(picture[shapes], white[shapes])


def test_state_px_is_where_the_block_is_seen() -> None:
    env = PushTEnv()
    for seed in range(3):
        _, info = env.reset(seed=seed)
        seen = 255.0 - env.goal_frame()[2:-2, 2:-2]  # without the wall
        # white minus slate is (136, 119, 102), white minus blue (190, 150, 30): the part that is slate
        slate = (seen[..., 2] - seen[..., 0] * 30 / 190).clip(0) / (102 - 136 * 30 / 190)
        places = np.stack(np.meshgrid(np.arange(2, 62), np.arange(2, 62)), axis=-1)
        centroid = (places * slate[..., None]).sum(axis=(0, 1)) / slate.sum()
        middle = np.array([0, (3600 * 15 + 2700 * 75) / 6300])  # of the T's area, in its frame
        moved = info["goal"].copy()
        moved[2:4] = law.to_canvas(middle, info["goal"])
        np.testing.assert_allclose(PushTEnv.state_px(moved), centroid, atol=0.1)


def test_starts_and_goals_are_drawn_apart_and_repeat_with_the_seed() -> None:
    env = PushTEnv()
    for seed in range(40):
        _, info = env.reset(seed=seed)
        for state in (info["state"], info["goal"]):
            corners = law.to_canvas(law.OUTLINE, state)
            assert corners.min() >= 39.9 and corners.max() <= 472.1 and not state[5:].any()
            assert law.block_distance(law.to_block(state[:2].astype(float), state)) > 14.9
        assert not info["is_success"]
        assert (PushTEnv().reset(seed=seed)[1]["goal"] == info["goal"]).all()


def test_a_goal_that_is_set_ends_the_episode() -> None:
    env = gymnasium.make(f"data_pipelines.worlds.push_t:{ENV_ID}", render_mode="rgb_array")
    start = [100, 100, 300, 300, 1.0]
    _, info = env.reset(seed=0, options={"state": start, "goal": [130, 100, 300, 300, 1.0]})
    assert info["state"].tolist() == [*start, 0, 0, 0, 0, 0]
    assert not info["is_success"]
    _, reward, terminated, _, info = env.step(action_of(0.9, 0))
    assert info["is_success"] and terminated and reward == 0
    info = env.unwrapped.set_goal([400, 100, 300, 300, 1.0])  # type: ignore[attr-defined]
    assert not info["is_success"] and info["goal"][0] == 400
    frame = env.unwrapped.goal_frame()  # type: ignore[attr-defined]
    assert frame[12, 49].tolist() == list(law.BLUE)
    assert not env.step(action_of(0, 0))[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": 1}, "reset option 'where' is unknown: use state, goal"),
        ({"state": [1, 2, 3]}, "reset option state=.* must be"),
        ({"goal": [1, 2, 3, 4, 5, 6]}, "reset option goal=.* must be 5 numbers .agent x, .*, or 10 .also"),
        ({"state": [1, 2, 3, 4, np.nan]}, "must be"),
        ({"state": "here"}, "must be"),
        ({"state": [9, 9, 99, 99, 0], "goal": [9, 9, 99, 99, 0]}, "is met by the state already"),
    ],
)
def test_wrong_options_are_reported(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PushTEnv().reset(seed=0, options=options)


def test_pymunk_is_imported_when_an_environment_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, data_pipelines.worlds.push_t; sys.exit('pymunk' in sys.modules)"
    assert run_python("-c", code).returncode == 0
    monkeypatch.setitem(sys.modules, "pymunk", None)
    with pytest.raises(UserError, match=r"pip install 'worldmodel\[pusht\]'"):
        PushTEnv()
    with pytest.raises(UserError, match="render_mode='human' is unknown"):
        PushTEnv("human")


# ------------------------------------------------------------------------------------------------ the expert


def test_contacts_touch_the_block_from_outside() -> None:
    touching = law.block_distance(expert.CONTACTS.centres)
    np.testing.assert_allclose(touching, law.AGENT_RADIUS, atol=1e-6)
    inside = law.block_distance(expert.CONTACTS.centres + 16 * expert.CONTACTS.normals)
    assert (inside < 0).all() and len(touching) > 40
    assert expert.CONTACTS.levers.min() < -40 and expert.CONTACTS.levers.max() > 40


def test_the_response_of_the_disc_is_the_simulation() -> None:
    start = state_of((60, 400), (350, 150))
    start[5:7] = 80, -30
    end, _ = law.move(start, action_of(0.3, 0.1))
    moved = expert.PER_DISTANCE * np.array([30, 10]) + expert.PER_VELOCITY * np.array([80, -30])
    np.testing.assert_allclose(end[:2] - start[:2], moved, atol=1e-3)


def test_ways_go_round_the_block() -> None:
    start, ends = np.array([0.0, -40.0]), np.array([[0.0, 160.0], [40.0, -40.0]])
    lengths, first = expert.ways(start, ends, np.ones(6, bool))
    assert lengths[1] == pytest.approx(40) and (first[1] == ends[1]).all()
    assert 220 < lengths[0] < 320 and expert.is_clear(start, first[0])
    blocked, _ = expert.ways(start, ends, np.zeros(6, bool))
    assert np.isinf(blocked[0])


def test_a_predicted_push_is_the_simulated_one() -> None:
    for contact in range(0, len(expert.CONTACTS.levers), 7):
        start = state_of((0, 0), (256, 256), 0.7)
        start[:2] = law.to_canvas(expert.CONTACTS.centres[contact], start)
        predicted, state = expert.pushed(start, contact, 6.0), start
        for _ in range(6):
            state, _ = law.move(state, expert.action_towards(
                law.to_canvas(expert.CONTACTS.centres[contact], predicted), state, 99
            ).astype(np.float32))  # fmt: skip
        np.testing.assert_allclose(state[2:4], predicted[2:4], atol=1.2)
        assert abs(law.angle_between(state[4], predicted[4])) < 0.02


def episode(kind: str, seed: int, steps: int) -> tuple[np.ndarray, bool]:
    env = PushTEnv()
    _, info = env.reset(seed=seed)
    policy = env.policies()[kind](np.random.default_rng(seed))
    states = [info["state"]]
    for _ in range(steps):
        _, _, done, _, info = env.step(policy(None, info))
        states.append(info["state"])
        if done:
            break
    return np.stack(states), bool(info["is_success"])


def test_the_expert_reaches_drawn_goals() -> None:
    assert sum(episode("expert", seed, 300)[1] for seed in range(500, 504)) >= 3


@pytest.mark.slow
def test_the_weak_policy_pushes_without_a_goal() -> None:
    ends = [episode("weak", seed, 60) for seed in range(6)]
    moved = [np.abs(np.diff(states[:, 2:4], axis=0)).sum() for states, _ in ends]
    assert np.median(moved) > 50 and not any(reached for _, reached in ends)
