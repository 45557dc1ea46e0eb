"""Cube: a Gymnasium environment in which a robot arm moves a cube on a table (cube_law.py).

The world is OGBench's cube-single-v0, and so is the criterion: the cube is within 0.04 m of its position in the goal.
stable-worldmodel uses the same (its issue 271). The goal is a picture of a state, which has a pose of the arm too; it
need not be met. Where a recorded start and goal are near in time, the cube often is at its goal from the start (issue
23 of le-wm). `worldmodel plan --protocol recorded` leaves such starts out.

Pictures are drawn here from the state, in two views. They are not OGBench's camera.

Importing this module registers "worldmodel/Cube-v0", and imports no mujoco. gymnasium.make imports it for the id
"data_pipelines.worlds.cube:worldmodel/Cube-v0".
"""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from data_pipelines.worlds.cube_law import (
    CUBE,
    CUBE_HALF_M,
    CUBE_QUATERNION,
    CUBE_RED,
    NUM_ACTIONS,
    NUM_POSITIONS,
    STATE,
    STEP_S,
    TABLE,
    Simulator,
    cube_px,
    draw,
    reaches,
    simulator_of_process,
)
from data_pipelines.worlds.policies import MakePolicy, Policy
from data_pipelines.worlds.shapes import Array, Colour, rgb_of
from data_pipelines.worlds.states import Frame, State, StateEnv

ENV_ID = "worldmodel/Cube-v0"


class CubeEnv(StateEnv):
    """Bring the cube to its place in a goal: reward 0 and termination when it is there, -1 per step until then.

    Actions in [-1, 1]^5 move the target of the gripper, relative to the gripper: by 0.05 m in x, y and z, by 0.3 rad
    about z, and by the whole range of its opening (1 closes). It holds for 0.05 s. Observations are uint8 [64, 64, 3].
    info: "state" and "goal" (float32 [41], see cube_law.STATE) and "is_success".

    Starts and goals are drawn independently, as OGBench draws the starts of its data: the cube's position on the table
    and its angle, and the pose of the open gripper above, are uniform. A goal that the start meets is drawn again.

    background: the colour of the table. cube_colour: that of the cube.

    reset(options=...) sets "state" and "goal", of 21 numbers (at rest) or 41. The others are drawn.

    Raises:
        UserError: OGBench cannot be imported, an option is unknown, a colour or a state is not valid.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012
    state_names, num_positions, num_actions = STATE, NUM_POSITIONS, NUM_ACTIONS
    factors = ("background", "cube_colour")
    """The arguments that are factors of variation (worldmodel.planning.vary)."""

    def __init__(
        self, render_mode: str | None = None, background: Colour = TABLE, cube_colour: Colour = CUBE_RED
    ) -> None:
        super().__init__(render_mode)
        self.background, self.cube_colour = background, cube_colour
        self._colours = rgb_of("background", background), rgb_of("cube_colour", cube_colour)
        self._simulator = simulator_of_process()

    def picture(self, state: State) -> Frame:
        return draw(self._simulator.bodies(state), *self._colours)

    def reaches(self, state: State, goal: State) -> bool:
        return reaches(state, goal)

    def advance(self, action: NDArray[np.float32]) -> tuple[State, dict[str, Any]]:
        return self._simulator.move(self._state, action), {}

    def draw_state(self) -> State:
        return self._simulator.draw_state(self.np_random)

    @staticmethod
    def state_px(states: NDArray[Any]) -> NDArray[Any]:
        """Return the position of the cube in the view from above, [..., 2] px, for states [..., K >= 17]."""
        return cube_px(states)

    def policies(self) -> Mapping[str, MakePolicy]:
        """Return the policies for recording, by name, the usual one first."""
        return {
            "expert": partial(expert, self._simulator, noise=EXPERT_NOISE),
            "weak": partial(expert, self._simulator, noise=WEAK_NOISE),
        }


# ------------------------------------------------------------------------------------------------ the expert

EXPERT_NOISE, WEAK_NOISE = 0.1, 0.5
"""Standard deviation of the noise of plans, relative to the largest action. OGBench's play data has 0.1."""


def expert(simulator: Simulator, rng: np.random.Generator, *, noise: float) -> Policy:
    """Return a policy that brings the cube to info["goal"], and then to one drawn place after another.

    It follows OGBench's CubePlanOracle: pick, place and retreat along a plan of about 4.5 s with random keyframes, and
    noise that is correlated in time. After a plan that failed, it makes another one. Drawn places are OGBench's:
    uniform on the table, at any angle.
    """
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle

    oracle = CubePlanOracle(env=simulator.ogbench, noise=noise)
    steps, is_planned, was_reached = 0, False, False

    def act(observation: Any, info: Mapping[str, Any]) -> NDArray[np.float32]:
        nonlocal steps, is_planned, was_reached
        was_reached |= info["is_success"]
        seen = _seen_by_oracle(simulator, info["state"], steps * STEP_S)
        if not is_planned or oracle.done:
            target = _random_cube(simulator, rng) if was_reached else _cube_of(info["goal"])
            with _global_generator(rng):
                oracle.reset(None, seen | _named("target_block", *target))
            is_planned = True
        steps += 1
        return np.clip(oracle.select_action(None, seen), -1, 1).astype(np.float32)

    return act


def _seen_by_oracle(simulator: Simulator, state: State, time_s: float) -> dict[str, Any]:
    """Return what OGBench's oracles read of a state."""
    place, yaw, opening = simulator.gripper(state)
    gripper = {"effector_pos": place, "effector_yaw": np.array([yaw]), "gripper_opening": np.array([opening])}
    return {
        "time": np.array([time_s]),
        "privileged/target_block": 0,
        **{f"proprio/{name}": value for name, value in gripper.items()},
        **_named("block_0", *_cube_of(state)),
    }


def _named(block: str, place: Array, yaw: float) -> dict[str, Any]:
    return {f"privileged/{block}_pos": place, f"privileged/{block}_yaw": np.array([yaw])}


def _cube_of(state: State) -> tuple[Array, float]:
    """Return the position [3] in m and the angle about z in rad of the cube."""
    w, x, y, z = state[CUBE_QUATERNION].astype(np.float64)
    return state[CUBE].astype(np.float64), float(np.arctan2(2 * (w * z + x * y), w * w + x * x - y * y - z * z))


def _random_cube(simulator: Simulator, rng: np.random.Generator) -> tuple[Array, float]:
    x, y = rng.uniform(*simulator.ogbench._target_sampling_bounds)
    return np.array([x, y, CUBE_HALF_M]), float(rng.uniform(0, 2 * np.pi))


@contextlib.contextmanager
def _global_generator(rng: np.random.Generator) -> Iterator[None]:
    """Seed numpy's global generator, from which OGBench's oracles draw, and restore it afterwards."""
    before = np.random.get_state()
    np.random.seed(int(rng.integers(2**32)))
    try:
        yield
    finally:
        np.random.set_state(before)


if ENV_ID not in gymnasium.registry:
    gymnasium.register(ENV_ID, entry_point=f"{__name__}:CubeEnv", max_episode_steps=200)
