import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_pipelines.errors import UserError
from data_pipelines.worlds import reacher
from data_pipelines.worlds.reacher import ENV_ID, Arm, ReacherEnv
from tests.conftest import run_python


def action_of(shoulder: float, wrist: float) -> np.ndarray:
    return np.array([shoulder, wrist], np.float32)


def test_the_arm_is_the_one_of_the_control_suite() -> None:
    suite = pytest.importorskip("dm_control.suite.reacher")
    import mujoco

    xml, assets = suite.get_model_and_assets()
    model = mujoco.MjModel.from_xml_string(xml.decode(), assets)
    data = mujoco.MjData(model)
    rng = np.random.default_rng(0)
    arm, state = Arm(), np.array([0.5, -2.5, 0, 0], np.float32)
    data.qpos[:] = state[:2]
    for _ in range(60):  # through the wrist's stop at -160 degrees
        action = rng.uniform([-1, -1], [1, 0.6]).astype(np.float32)
        state = arm.move(state, action)
        data.ctrl[:] = action
        mujoco.mj_step(model, data, 2)
        turn = (data.qpos - state[:2] + np.pi) % (2 * np.pi) - np.pi
        np.testing.assert_allclose(turn, 0, atol=1e-4)
        np.testing.assert_allclose(data.qvel, state[2:], atol=1e-3)


def test_a_state_and_actions_give_the_same_states_bit_for_bit() -> None:
    env, other = ReacherEnv(), ReacherEnv()
    _, info = env.reset(seed=1, options={"state": [0, 2.6]})
    rng = np.random.default_rng(0)
    actions = rng.uniform([-1, -0.2], [1, 1], (60, 2)).astype(np.float32)
    states = [info["state"], *(env.step(action)[-1]["state"] for action in actions)]
    assert max(state[1] for state in states) > reacher.WRIST_RANGE - 0.02  # at the stop
    other.reset(seed=2)
    for start in (0, 13, 40):
        assert (other.set_state(states[start])["state"] == states[start]).all()
        for action, expected in zip(actions[start:], states[start + 1 :], strict=True):
            assert (other.step(action)[-1]["state"] == expected).all()


@pytest.mark.parametrize(
    ("turn", "met"),
    [((0, 0), True), ((0.04, -0.04), True), ((0.06, 0), False), ((0, 0.06), False), ((2 * np.pi - 0.04, 0), True)],
)
def test_both_joints_must_be_within_a_twentieth_rad(turn: Any, met: bool) -> None:
    goal = np.array([3.13, 1.0, 0, 0])
    assert reacher.reaches(goal + np.array([*turn, 5, 5]), goal) is met
    np.testing.assert_allclose(reacher.pose_error(np.array([3.0, 1.0]), np.array([-3.0, 0.5])), [6 - 2 * np.pi, 0.5])


def test_pictures_are_the_average_of_a_larger_canvas() -> None:
    scale = 8 * 64 / 0.6  # of a canvas eight times as large
    for shoulder, wrist in ((0.3, 1.2), (-2, -0.8), (3, 2.7)):
        points = [np.zeros(2)]
        for length, angle in ((0.12, shoulder), (0.1, shoulder + wrist)):
            points.append(points[-1] + length * np.array([np.cos(angle), np.sin(angle)]))
        points.append(points[-2] + 0.12 * (points[-1] - points[-2]) / 0.1)
        root, elbow, end, finger = [256 + scale * point * [1, -1] for point in points]
        canvas = Image.new("RGB", (512, 512), reacher.FLOOR)
        pen, radius = ImageDraw.Draw(canvas), 0.01 * scale
        pen.line([*root, *elbow, *end], reacher.LINKS, round(2 * radius), joint="curve")
        for place, colour in ((root, 0), (elbow, 0), (end, 0), (finger, 1)):
            pen.ellipse([*(place - radius), *(place + radius)], (reacher.LINKS, reacher.FINGER)[colour])
        averaged = np.asarray(canvas.reduce(8)).astype(int)
        frame = reacher.draw(np.array([shoulder, wrist]))
        assert frame.shape == (64, 64, 3) and frame.dtype == np.uint8
        apart = np.abs(frame - averaged).max(axis=-1)
        assert apart.max() < 45 and apart.mean() < 0.5
        px = ReacherEnv.state_px(np.array([[shoulder, wrist, 9, 9]]))
        np.testing.assert_allclose(px, [finger / 8 - 0.5], atol=1e-6)


def test_starts_and_goals_are_drawn_over_all_poses() -> None:
    env = ReacherEnv("rgb_array")
    states, goals = [], []
    for seed in range(300):
        _, info = env.reset(seed=seed)
        states.append(info["state"])
        goals.append(info["goal"])
        assert not info["is_success"]
    assert (ReacherEnv().reset(seed=299)[1]["goal"] == goals[-1]).all()
    for poses in (np.array(states), np.array(goals)):
        assert not poses[:, 2:].any()
        np.testing.assert_allclose(np.abs(poses[:, :2]).mean(axis=0), [np.pi / 2, np.deg2rad(80)], rtol=0.1)
    assert (env.goal_frame() == reacher.draw(goals[-1])).all()
    np.testing.assert_array_equal(env.render(), reacher.draw(states[-1]))


def test_the_expert_reaches_its_goal_and_goes_on() -> None:
    reached = 0
    for seed in range(20):
        env = gymnasium.make(f"data_pipelines.worlds.reacher:{ENV_ID}", max_episode_steps=60)
        _, info = env.reset(seed=seed)
        policy = env.unwrapped.policies()["expert"](np.random.default_rng(seed))  # type: ignore[attr-defined]
        states = []
        for _ in range(60):
            _, reward, terminated, _, info = env.step(policy(None, info))
            states.append(info["state"])
            assert terminated == info["is_success"] == (reward == 0)
            reached += bool(terminated)
            if terminated:
                break
    assert reached >= 18
    moving = [env.step(policy(None, info))[-1]["state"][:2] for _ in range(40)]
    assert np.ptp(moving, axis=0).max() > 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": 1}, "reset option 'where' is unknown: use state, goal"),
        ({"state": [1, 2, 3]}, "reset option state=.* must be 2 numbers .shoulder, wrist., or 4"),
        ({"goal": "there"}, "reset option goal='there' must be"),
        ({"state": [1, 1], "goal": [1.01, 1]}, "is met by the state already"),
    ],
)
def test_wrong_options_are_reported(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ReacherEnv().reset(seed=0, options=options)


def test_mujoco_is_imported_when_an_environment_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, data_pipelines.worlds.reacher; sys.exit('mujoco' in sys.modules)"
    assert run_python("-c", code).returncode == 0
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(UserError, match=r"pip install 'worldmodel\[reacher\]'"):
        ReacherEnv()
    with pytest.raises(UserError, match="render_mode='human' is unknown"):
        ReacherEnv("human")
