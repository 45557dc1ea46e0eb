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

from data_pipelines.worlds.policies import MakePolicy
from data_pipelines.worlds.push_t_expert import expert, weak
from data_pipelines.worlds.push_t_law import (
    AGENT_RADIUS,
    CANVAS,
    OUTLINE,
    POSE_NUMBERS,
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
from data_pipelines.worlds.shapes import Colour, rgb_of
from data_pipelines.worlds.states import Frame, State, StateEnv

ENV_ID = "worldmodel/PushT-v0"

AGENT_RANGE, BLOCK_RANGE = (50.0, 450.0), (100.0, 400.0)
"""Of the positions that are drawn, on both axes, as stable-worldmodel has them."""
BLOCK_MARGIN = 40.0  # of the drawn block's corners from the canvas's edges, so that the disc fits in between


class PushTEnv(StateEnv):
    """Bring block and disc to a goal: reward 0 and termination when they are there, -1 per step until then.

    Actions in [-1, 1]^2 times 100 units are added to the disc's position and give the target of its controller for
    0.1 s. Observations are uint8 [64, 64, 3]. info: "state" and "goal" (float32 [10], see push_t_law.STATE) and
    "is_success"; after a step also "applied_action" (float32 [2]), which keeps the target on the canvas.

    Starts and goals are drawn independently: the disc's position and the block's are uniform, as its angle is, and
    drawn again if they overlap or the block comes near the edge. A goal that the start meets is drawn again.

    background: the colour of the canvas.

    reset(options=...) sets "state" and "goal", of 5 numbers (at rest) or 10. The others are drawn.

    Raises:
        UserError: pymunk is missing, an option is unknown, a colour or a state is not valid.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    state_names, num_positions = STATE, POSE_NUMBERS
    factors = ("background",)
    """The arguments that are factors of variation (worldmodel.planning.vary)."""

    def __init__(self, render_mode: str | None = None, background: Colour = "white") -> None:
        super().__init__(render_mode)
        self.background, self._background_rgb = background, rgb_of("background", background)
        load_pymunk()

    def picture(self, state: State) -> Frame:
        return draw(state, self._background_rgb)

    def reaches(self, state: State, goal: State) -> bool:
        return reaches(state, goal)

    def advance(self, action: NDArray[np.float32]) -> tuple[State, dict[str, Any]]:
        state, applied = move(self._state, action)
        return state, {"applied_action": applied}

    @staticmethod
    def state_px(states: NDArray[Any]) -> NDArray[Any]:
        """Return the position of the block in the frames, [..., 2] px, for states [..., K >= 5]."""
        return states[..., 2:4] / UNITS_PER_PX - 0.5

    def policies(self) -> Mapping[str, MakePolicy]:
        """Return the policies for recording, by name, the usual one first."""
        return {"expert": expert, "weak": weak}

    def draw_state(self) -> State:
        while True:
            agent = self.np_random.uniform(*AGENT_RANGE, 2)
            block = self.np_random.uniform(*BLOCK_RANGE, 2)
            angle = self.np_random.uniform(0, 2 * np.pi)
            state = np.array([*agent, *block, angle, *[0.0] * (len(STATE) - POSE_NUMBERS)], np.float32)
            corners = to_canvas(OUTLINE, state)
            inside = corners.min() >= BLOCK_MARGIN and corners.max() <= CANVAS - BLOCK_MARGIN
            if inside and block_distance(to_block(agent, state)) > AGENT_RADIUS:
                return state


if ENV_ID not in gymnasium.registry:
    gymnasium.register(ENV_ID, entry_point=f"{__name__}:PushTEnv", max_episode_steps=300)
