"""PushT: a Gymnasium environment in which a disc pushes a T-shaped block (push_t_law.py).

The task is that of stable-worldmodel, swm/PushT-v1: the goal is a picture of a state, its actions are relative, and it
is reached when disc and block are together within 20 units, and the block within pi / 9, of that state. gym-pusht's own
task differs: absolute actions, one goal, 95 % of it covered by the block.

Importing this module registers "worldmodel/PushT-v0", and imports no pymunk. gymnasium.make imports it for the id
"data_pipelines.worlds.push_t:worldmodel/PushT-v0".
"""

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import UserError
from data_pipelines.worlds.policies import MakePolicy
from data_pipelines.worlds.push_t_expert import expert, weak
from data_pipelines.worlds.push_t_law import (
    AGENT_RADIUS,
    CANVAS,
    OUTLINE,
    POSE_NUMBERS,
    SIZE_PX,
    STATE,
    UNITS_PER_PX,
    block_distance,
    draw,
    load_pymunk,
    move,
    reaches,
    to_block,
    to_canvas,
)
from data_pipelines.worlds.states import State, whole_state

ENV_ID = "worldmodel/PushT-v0"

AGENT_RANGE, BLOCK_RANGE = (50.0, 450.0), (100.0, 400.0)
"""Of the positions that are drawn, on both axes, as stable-worldmodel has them."""
BLOCK_MARGIN = 40.0  # of the drawn block's corners from the canvas's edges, so that the disc fits in between


class PushTEnv(gymnasium.Env[NDArray[np.uint8], NDArray[np.float32]]):
    """Bring block and disc to a goal: reward 0 and termination when they are there, -1 per step until then.

    Actions in [-1, 1]^2 times 100 units are added to the disc's position and give the target of its controller for
    0.1 s. Observations are uint8 [64, 64, 3]. info: "state" and "goal" (float32 [10], see push_t_law.STATE) and
    "is_success"; after a step also "applied_action" (float32 [2]), which keeps the target on the canvas.

    Starts and goals are drawn independently: the disc's position and the block's are uniform, as its angle is, and
    drawn again if they overlap or the block comes near the edge. A goal that the start meets is drawn again.

    reset(options=...) sets "state" and "goal", of 5 numbers (at rest) or 10. The others are drawn.

    Raises:
        UserError: pymunk is missing, an option is unknown, a state is not valid.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise UserError(f"render_mode={render_mode!r} is unknown: use rgb_array, or leave it out")
        load_pymunk()
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.Box(0, 255, (SIZE_PX, SIZE_PX, 3), np.uint8)
        self.action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        self._state = self._goal = np.zeros(len(STATE), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """Draw a start and a goal. Return the observation and info."""
        super().reset(seed=seed)
        options = options or {}
        if unknown := sorted(options.keys() - {"state", "goal"}):
            raise UserError(f"reset option {unknown[0]!r} is unknown: use state, goal")
        state, goal = (
            None if options.get(name) is None else _checked(f"reset option {name}", options[name])
            for name in ("state", "goal")
        )
        if state is not None and goal is not None and reaches(state, goal):
            raise UserError(f"reset option goal={goal.tolist()} is met by the state already")
        self._state = self._draw_state(goal) if state is None else state
        self._goal = self._draw_state(self._state) if goal is None else goal
        return draw(self._state), self._info()

    def set_state(self, state: Any) -> dict[str, Any]:
        """Continue from a state of 5 numbers (at rest) or 10, and return info. It has the same future each time."""
        self._state = _checked("state", state)
        return self._info()

    def set_goal(self, state: Any) -> dict[str, Any]:
        """Make a state of 5 or 10 numbers the goal, and return info. Its velocities do not count."""
        self._goal = _checked("goal", state)
        return self._info()

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.uint8], float, bool, bool, dict[str, Any]]:
        """Execute an action [2]. Return observation, reward, terminated, truncated (always False), info."""
        self._state, applied = move(self._state, np.clip(np.asarray(action, np.float32), -1, 1))
        info = self._info() | {"applied_action": applied}
        return draw(self._state), 0.0 if info["is_success"] else -1.0, info["is_success"], False, info

    def render(self) -> NDArray[np.uint8] | None:
        """Return the observation; None without a render mode."""
        return None if self.render_mode is None else draw(self._state)

    def goal_frame(self) -> NDArray[np.uint8]:
        """Return the observation in the goal state, uint8 [64, 64, 3]."""
        return draw(self._goal)

    @staticmethod
    def state_px(states: NDArray[Any]) -> NDArray[Any]:
        """Return the position of the block in the frames, [..., 2] px, for states [..., K >= 5]."""
        return states[..., 2:4] / UNITS_PER_PX - 0.5

    def policies(self) -> Mapping[str, MakePolicy]:
        """Return the policies for recording, by name, the usual one first."""
        return {"expert": expert, "weak": weak}

    def _draw_state(self, other: State | None) -> State:
        """Draw a state at rest that does not meet another one."""
        while True:
            agent = self.np_random.uniform(*AGENT_RANGE, 2)
            block = self.np_random.uniform(*BLOCK_RANGE, 2)
            angle = self.np_random.uniform(0, 2 * np.pi)
            state = np.array([*agent, *block, angle, *[0.0] * (len(STATE) - POSE_NUMBERS)], np.float32)
            corners = to_canvas(OUTLINE, state)
            inside = corners.min() >= BLOCK_MARGIN and corners.max() <= CANVAS - BLOCK_MARGIN
            apart = block_distance(to_block(agent, state)) > AGENT_RADIUS
            if inside and apart and (other is None or not reaches(state, other)):
                return state

    def _info(self) -> dict[str, Any]:
        return {
            "state": self._state.copy(),
            "goal": self._goal.copy(),
            "is_success": reaches(self._state, self._goal),
        }


def _checked(name: str, value: Any) -> State:
    return whole_state(name, value, STATE, POSE_NUMBERS)


if ENV_ID not in gymnasium.registry:
    gymnasium.register(ENV_ID, entry_point=f"{__name__}:PushTEnv", max_episode_steps=300)
