from typing import Any

import gymnasium
import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy.spatial import ConvexHull
from scipy.spatial.transform import Rotation

from data_pipelines.errors import UserError
from data_pipelines.worlds import cube_law as law
from data_pipelines.worlds.cube import ENV_ID, CubeEnv
from data_pipelines.worlds.cube_law import Bodies, Box, Simulator, simulator_of_process
from tests.conftest import run_python

pytest.importorskip("ogbench")

OUT_OF_SIGHT = Box(np.array([9.0, 9, 9]), np.eye(3))
SCALE = 16  # of the canvas that pictures are compared with


@pytest.fixture(scope="module")
def episode() -> tuple[np.ndarray, np.ndarray, int]:
    """States [T + 1, 41] and actions [T, 5] of the expert, and the step at which the cube arrived."""
    env = CubeEnv()
    _, info = env.reset(seed=0)
    policy = env.policies()["expert"](np.random.default_rng(0))
    states, actions, arrived = [info["state"]], [], []
    for _ in range(120):
        actions.append(policy(None, info))
        _, reward, terminated, _, info = env.step(actions[-1])
        assert terminated == info["is_success"] == (reward == 0)
        states.append(info["state"])
        arrived.append(terminated)
    return np.array(states), np.array(actions), int(np.argmax(arrived))


def test_the_expert_lifts_the_cube_to_its_goal_and_goes_on(episode: Any) -> None:
    states, actions, arrived = episode
    assert 40 < arrived < 90 and np.abs(actions).max() <= 1 and actions.dtype == np.float32
    height = states[:, law.CUBE][:, 2]
    assert height[:arrived].max() > 0.1 and height[0] == pytest.approx(law.CUBE_HALF_M)
    env = CubeEnv()
    goal = env.reset(seed=0)[1]["goal"]
    apart = np.linalg.norm(states[:, law.CUBE] - goal[law.CUBE], axis=1)
    assert (apart[:arrived] > 0.04).all() and apart[arrived + 1] <= 0.04
    assert np.abs(states[arrived + 20 :, :6] - states[arrived + 20, :6]).max() > 0.3  # to the next place


def test_a_state_and_actions_give_the_same_states_bit_for_bit(episode: Any) -> None:
    states, actions, arrived = episode
    env = CubeEnv()
    env.reset(seed=5)
    for start in (0, 30, arrived - 12):  # in the air, at the cube, with the cube in the gripper
        assert (env.set_state(states[start])["state"] == states[start]).all()
        for action, expected in zip(actions[start:][:30], states[start + 1 :], strict=False):
            assert (env.step(action)[-1]["state"] == expected).all()


def test_steps_are_those_of_ogbench(episode: Any) -> None:
    states, actions, arrived = episode
    simulator = simulator_of_process()
    theirs = simulator.ogbench
    theirs.reset(seed=9)
    theirs.set_state(states[0, : law.NUM_POSITIONS].astype(float), states[0, law.NUM_POSITIONS :].astype(float))
    place, yaw, opening = simulator.gripper(states[0])
    np.testing.assert_allclose(place, theirs.compute_ob_info()["proprio/effector_pos"], atol=1e-9)
    for action, expected in zip(actions[: arrived + 5], states[1:], strict=False):  # with the grasp, on its own
        info = theirs.step(action)[-1]
        np.testing.assert_allclose(info["qpos"][law.CUBE], expected[law.CUBE], atol=5e-5)
        np.testing.assert_allclose(info["qpos"][:6], expected[:6], atol=2e-5)
    place, yaw, opening = simulator.gripper(expected)
    seen = [*info["proprio/effector_pos"], *info["proprio/effector_yaw"], *info["proprio/gripper_opening"]]
    np.testing.assert_allclose([*place, yaw, opening], seen, atol=1e-4)
    assert theirs._renderer is None


def averaged(shapes: list[tuple[Box, tuple[int, int, int]]]) -> np.ndarray:
    """Draw boxes as the convex hulls of their corners, on a large canvas that is averaged."""
    canvas = Image.new("RGB", (64 * SCALE, 64 * SCALE), tuple(round(law.FRONT_SHADE * value) for value in law.TABLE))
    above = Image.new("RGB", (64 * SCALE, 34 * SCALE), law.TABLE)
    signs = np.stack(np.meshgrid([-1, 1], [-1, 1], [-1, 1]), axis=-1).reshape(8, 3)
    for box, colour in shapes:
        x, y, z = (box.centre + signs @ box.half_edges).T
        across = 83 * y + 32
        for picture, down in ((above, 83 * (x - 0.22)), (canvas, 64 - 83 * z)):
            corners = SCALE * np.stack([across, down], axis=-1)
            outline = corners[ConvexHull(corners).vertices]
            ImageDraw.Draw(picture).polygon([(a - 0.5, b - 0.5) for a, b in outline], colour)
    canvas.paste(above, (0, 0))
    return np.asarray(canvas.reduce(SCALE)).astype(int)


def test_pictures_are_the_average_of_a_larger_canvas() -> None:
    rng = np.random.default_rng(0)
    nothing = (OUT_OF_SIGHT, OUT_OF_SIGHT)
    for _ in range(6):
        cube = Box(
            rng.uniform([0.3, -0.3, 0.05], [0.55, 0.3, 0.3]), 0.02 * Rotation.random(random_state=rng).as_matrix()
        )
        hand = Box(rng.uniform([0.3, -0.3, 0.05], [0.55, 0.3, 0.3]), 0.04 * np.eye(3))
        frame = law.draw(Bodies(cube, nothing, hand, np.full((2, 3), 9.0)))
        assert frame.shape == (64, 64, 3) and frame.dtype == np.uint8
        apart = np.abs(frame - averaged([(hand, law.HAND), (cube, law.CUBE_RED)])).max(axis=-1)
        assert apart.max() < 60 and apart.mean() < 0.2  # corners are not exact


def test_a_picture_shows_where_the_cube_is_in_three_dimensions() -> None:
    env = CubeEnv()
    _, info = env.reset(seed=2)
    for place in ([0.31, -0.29, 0.02], [0.437, 0.121, 0.2], [0.55, 0.3, 0.1]):
        state = info["state"].copy()
        state[law.CUBE] = place
        redness = env.picture(state)[..., 0].astype(float) - env.picture(info["state"])[..., 0]
        (x, y), (front_x, front_y) = (
            (weights[..., None] * law.pixel_centres(64)[:rows]).sum(axis=(0, 1)) / weights.sum()
            for rows, weights in ((34, redness[:34].clip(0)), (30, redness[34:].clip(0)))
        )
        np.testing.assert_allclose([x, y], env.state_px(state), atol=0.15)
        np.testing.assert_allclose([front_x, front_y], [83 * place[1] + 31.5, 29.5 - 83 * place[2]], atol=0.15)


def test_fingers_have_the_opening_and_the_angle_of_the_gripper(episode: Any) -> None:
    states, _, arrived = episode
    simulator = simulator_of_process()
    for number, gap_m in ((0, 0.085), (arrived - 12, 0.04)):  # open; with the cube in between
        bodies, (place, yaw, _) = simulator.bodies(states[number]), simulator.gripper(states[number])
        right, left = bodies.fingers
        between = right.centre - left.centre
        inner = np.linalg.norm(between) - 2 * np.linalg.norm(right.half_edges[1])
        assert inner == pytest.approx(gap_m, abs=0.004)
        off = (right.centre + left.centre) / 2 - place
        assert np.linalg.norm(off[:2]) < 0.006 and abs(off[2]) < 0.016  # fingers rise as they open
        turn = np.arctan2(between[1], between[0]) - yaw
        assert abs(np.cos(turn)) < 0.05 or abs(np.sin(turn)) < 0.05
    cube = simulator.bodies(states[0]).cube
    w, *xyz = states[0, law.CUBE_QUATERNION]
    np.testing.assert_allclose(cube.half_edges, 0.02 * Rotation.from_quat([*xyz, w]).as_matrix().T, atol=1e-6)


@pytest.mark.parametrize(
    ("shift", "met"),
    [
        ((0, 0, 0), True),
        ((0.0399, 0, 0), True),
        ((0, 0.0401, 0), False),
        ((0.03, 0, 0.03), False),
        ((0.02, 0.02, 0.02), True),
    ],
)
def test_the_cube_must_be_within_four_centimetres(shift: Any, met: bool) -> None:
    goal = np.random.default_rng(0).uniform(-1, 1, 41)
    state = np.random.default_rng(1).uniform(-1, 1, 41)  # another pose of arm and cube
    state[law.CUBE] = goal[law.CUBE] + shift
    assert law.reaches(state, goal) is met


def test_starts_and_goals_are_drawn_on_the_table() -> None:
    env = CubeEnv("rgb_array")
    drawn = []
    for seed in range(40):
        _, info = env.reset(seed=seed)
        assert not info["is_success"]
        drawn += [info["state"], info["goal"]]
    assert (CubeEnv().reset(seed=39)[1]["goal"] == drawn[-1]).all()
    x, y, z = np.array(drawn)[:, law.CUBE].T
    assert 0.3 <= x.min() < 0.33 and 0.52 < x.max() <= 0.55 and -0.3 <= y.min() < -0.25 and 0.25 < y.max() <= 0.3
    np.testing.assert_allclose(z, law.CUBE_HALF_M, atol=1e-7)
    np.testing.assert_array_equal(env.goal_frame(), env.picture(drawn[-1]))
    np.testing.assert_array_equal(env.render(), env.picture(drawn[-2]))
    other = CubeEnv(background="white", cube_colour=[0, 0, 255])
    assert (other.picture(drawn[-1])[0, 0] == 255).all() and env.picture(drawn[-1])[0, 0].tolist() == list(law.TABLE)


def test_policies_depend_on_their_generator_alone() -> None:
    env = gymnasium.make(f"data_pipelines.worlds.cube:{ENV_ID}")
    _, info = env.reset(seed=1)
    before = np.random.get_state()[1].tolist()  # type: ignore[index]
    for name in ("expert", "weak"):
        make = env.unwrapped.policies()[name]  # type: ignore[attr-defined]
        first, again, other = (make(np.random.default_rng(seed))(None, info) for seed in (0, 0, 1))
        assert (first == again).all() and (first != other).any()
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": 1}, "reset option 'where' is unknown: use state, goal"),
        ({"state": [1, 2, 3]}, "reset option state=.* must be 21 numbers .shoulder pan, .*, or 41"),
        ({"state": np.zeros(21), "goal": np.zeros(41)}, "is met by the state already"),
    ],
)
def test_wrong_options_are_reported(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CubeEnv().reset(seed=0, options=options)


def test_ogbench_is_imported_when_an_environment_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, data_pipelines.worlds.cube; sys.exit('mujoco' in sys.modules or 'ogbench' in sys.modules)"
    assert run_python("-c", code).returncode == 0
    with pytest.raises(UserError, match="cube_colour='reddish' must be a colour"):
        CubeEnv(cube_colour="reddish")
    monkeypatch.setattr(Simulator, "__init__", lambda self: __import__("a_module_that_is_not_there"))
    with pytest.raises(UserError, match=r"cannot be imported .*pip install 'worldmodel\[cube\]'"):
        simulator_of_process.__wrapped__()
