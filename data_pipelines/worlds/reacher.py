"""Reacher: a Gymnasium environment in which a planar arm of two links turns to the pose of a goal picture.

The physics is MuJoCo's, of the reacher of the DeepMind Control Suite (Tassa et al., arXiv 1801.00690): sizes, masses,
damping, torques, time step. The task is that of stable-worldmodel, swm/ReacherDMControl-v0 with task=qpos_match: each
joint must come within 0.05 rad of the goal's. An action holds for 2 time steps of 0.02 s, as there.

Pictures are drawn here from the joint angles, antialiased, and not by MuJoCo's renderer, which is slow without a GPU.
They show the arm as seen from above, without the suite's floor pattern, shadows and target.

A state is (shoulder, wrist) in rad and their velocities in rad/s. It alone decides what follows, and is rounded to
float32 after each step, so that recorded states and actions can be replayed bit for bit.

Importing this module registers "worldmodel/Reacher-v0", and imports no mujoco. gymnasium.make imports it for the id
"data_pipelines.worlds.reacher:worldmodel/Reacher-v0".
"""

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import UserError
from data_pipelines.worlds.policies import MakePolicy, Policy
from data_pipelines.worlds.shapes import SIZE_PX, Array, capsule_distance, disc_distance, paint, pixel_centres
from data_pipelines.worlds.states import Frame, State, StateEnv

ENV_ID = "worldmodel/Reacher-v0"

STATE = ("shoulder", "wrist", "shoulder velocity", "wrist velocity")
NUM_JOINTS = 2

ARM_M, HAND_M, FINGER_M, RADIUS_M = 0.12, 0.10, 0.12, 0.01
"""Lengths of the links, and the distance of the finger, a ball, from the wrist; radius of all of them."""
WRIST_RANGE = np.deg2rad(160.0)
GOAL_RAD = 0.05
REPEATS = 2

MODEL = f"""
<mujoco>
  <option timestep="0.02"><flag contact="disable"/></option>
  <default><joint type="hinge" axis="0 0 1" damping="0.01"/><motor gear="0.05" ctrlrange="-1 1"/></default>
  <worldbody>
    <body>
      <joint name="shoulder"/>
      <geom type="capsule" fromto="0 0 0 {ARM_M} 0 0" size="{RADIUS_M}"/>
      <body pos="{ARM_M} 0 0">
        <joint name="wrist" limited="true" range="-160 160"/>
        <geom type="capsule" fromto="0 0 0 {HAND_M} 0 0" size="{RADIUS_M}"/>
        <geom type="sphere" pos="{FINGER_M} 0 0" size="{RADIUS_M}"/>
      </body>
    </body>
  </worldbody>
  <actuator><motor joint="shoulder"/><motor joint="wrist"/></actuator>
</mujoco>
"""

VIEW_M = 0.6
PX_PER_M = SIZE_PX / VIEW_M
FLOOR, LINKS, FINGER = (38, 64, 89), (179, 128, 77), (255, 214, 102)

# ------------------------------------------------------------------------------------------------ the law and pictures


class Arm:
    """MuJoCo's simulation.

    Raises:
        UserError: mujoco is not installed.
    """

    def __init__(self) -> None:
        try:
            import mujoco
        except ImportError:
            raise UserError("Reacher needs mujoco, which is not installed: pip install 'worldmodel[reacher]'") from None
        self._mujoco = mujoco
        self._model = mujoco.MjModel.from_xml_string(MODEL)
        self._data = mujoco.MjData(self._model)

    def move(self, state: State, action: NDArray[np.float32]) -> State:
        """Return the state [4] after a step with torques [2] in -1..1, the shoulder within -pi..pi."""
        self._mujoco.mj_resetData(self._model, self._data)  # the solver remembers forces at the wrist's stop
        self._data.qpos[:], self._data.qvel[:], self._data.ctrl[:] = state[:2], state[2:], action
        for _ in range(REPEATS):
            self._mujoco.mj_step(self._model, self._data)
        shoulder, wrist = self._data.qpos
        return np.array([(shoulder + np.pi) % (2 * np.pi) - np.pi, wrist, *self._data.qvel], np.float32)


def pose_error(goal: NDArray[Any], state: NDArray[Any]) -> Array:
    """Return how far the joints [..., 2] have to turn to a goal; the shoulder takes the shorter way round."""
    error = np.asarray(goal[..., :2], np.float64) - state[..., :2]
    error[..., 0] = (error[..., 0] + np.pi) % (2 * np.pi) - np.pi
    return error


def reaches(state: NDArray[Any], goal: NDArray[Any]) -> bool:
    """Return whether both joints are within 0.05 rad of the goal's. stable-worldmodel counts turns of the shoulder."""
    return bool((np.abs(pose_error(goal, state)) < GOAL_RAD).all())


def joints_px(states: NDArray[Any]) -> tuple[Array, Array, Array]:
    """Return the places of wrist, end of the hand and finger in pictures, [..., 2] px, for states [..., K >= 2]."""
    shoulder = np.asarray(states[..., 0], np.float64)
    hand = shoulder + states[..., 1]
    arm_way = np.stack([np.cos(shoulder), -np.sin(shoulder)], axis=-1)  # y is up in the plane, down in pictures
    hand_way = np.stack([np.cos(hand), -np.sin(hand)], axis=-1)
    wrist = ROOT_PX + PX_PER_M * ARM_M * arm_way
    return wrist, wrist + PX_PER_M * HAND_M * hand_way, wrist + PX_PER_M * FINGER_M * hand_way


ROOT_PX = np.full(2, SIZE_PX / 2 - 0.5)
_PIXELS = pixel_centres(SIZE_PX)
_EMPTY = np.full((SIZE_PX, SIZE_PX, 3), FLOOR, np.float64)


def draw(state: NDArray[Any]) -> NDArray[np.uint8]:
    """Draw a state [K >= 2] as RGB uint8 [64, 64, 3], antialiased: 0.6 x 0.6 m, the shoulder in the middle."""
    wrist, end, finger = joints_px(state)
    radius = PX_PER_M * RADIUS_M
    links = np.minimum(
        capsule_distance(_PIXELS, ROOT_PX, wrist, radius), capsule_distance(_PIXELS, wrist, end, radius)
    )  # fmt: skip
    picture = paint(paint(_EMPTY, links, LINKS), disc_distance(_PIXELS, finger, radius), FINGER)
    return np.rint(picture).astype(np.uint8)


# ------------------------------------------------------------------------------------------------ the environment


class ReacherEnv(StateEnv):
    """Turn the arm to a goal pose: reward 0 and termination when it is there, -1 per step until then.

    Actions in [-1, 1]^2 are torques of shoulder and wrist for 0.04 s. Observations are uint8 [64, 64, 3]. info: "state"
    and "goal" (float32 [4]) and "is_success".

    Starts and goals are at rest, and uniform over all poses, as the suite draws starts. A goal that the start meets is
    drawn again. reset(options=...) sets "state" and "goal", of 2 numbers (at rest) or 4. The others are drawn.

    Raises:
        UserError: mujoco is missing, an option is unknown, a state is not valid.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}  # noqa: RUF012
    state_names, num_positions = STATE, NUM_JOINTS

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self._arm = Arm()

    def picture(self, state: State) -> Frame:
        return draw(state)

    def reaches(self, state: State, goal: State) -> bool:
        return reaches(state, goal)

    def advance(self, action: NDArray[np.float32]) -> tuple[State, dict[str, Any]]:
        return self._arm.move(self._state, action), {}

    @staticmethod
    def state_px(states: NDArray[Any]) -> NDArray[Any]:
        """Return the position of the finger in the frames, [..., 2] px, for states [..., K >= 2]."""
        return joints_px(states)[-1]

    def policies(self) -> Mapping[str, MakePolicy]:
        """Return the policies for recording, by name."""
        return {"expert": expert}

    def draw_state(self) -> State:
        return np.array([*random_pose(self.np_random), 0, 0], np.float32)


def random_pose(rng: np.random.Generator) -> Array:
    """Draw the angles of shoulder and wrist, [2] rad, uniformly."""
    return rng.uniform([-np.pi, -WRIST_RANGE], [np.pi, WRIST_RANGE])


# ------------------------------------------------------------------------------------------------ the expert

POSITION_GAIN, VELOCITY_GAIN = np.array([3.0, 0.5]), np.array([0.4, 0.0])
"""Of shoulder and wrist; the wrist's own friction damps it."""
EXPERT_NOISE = 0.1
HOLD_STEPS = 40  # after which the expert turns to another pose


def expert(rng: np.random.Generator, noise: float = EXPERT_NOISE) -> Policy:
    """Return a policy that turns to info["goal"], and then to one drawn pose after another, each for 40 steps.

    It controls each joint by its error and velocity. noise: standard deviation of what is added to each action.
    """
    steps = 0
    drawn: Array | None = None

    def act(observation: Any, info: Mapping[str, Any]) -> NDArray[np.float32]:
        nonlocal steps, drawn
        steps += 1
        if info["is_success"] or (drawn is not None and steps % HOLD_STEPS == 0):
            drawn = random_pose(rng)
        state = np.asarray(info["state"], np.float64)
        error = pose_error(info["goal"] if drawn is None else drawn, state)
        action = POSITION_GAIN * error - VELOCITY_GAIN * state[2:] + rng.normal(0, noise, NUM_JOINTS)
        return np.clip(action, -1, 1).astype(np.float32)

    return act


if ENV_ID not in gymnasium.registry:
    gymnasium.register(ENV_ID, entry_point=f"{__name__}:ReacherEnv", max_episode_steps=100)
