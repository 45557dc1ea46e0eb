"""Environments whose state can be set, and whose goal is another state.

States that a user gives have positions alone, or also the velocities.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import gymnasium
import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import UserError
from data_pipelines.worlds.shapes import SIZE_PX, check_render_mode

State = NDArray[np.float32]
Frame = NDArray[np.uint8]


class StateEnv(gymnasium.Env[Frame, Any], ABC):
    """Reach a goal state: reward 0 and termination when it is reached, -1 per step until then.

    Actions are in [-1, 1]^A, or one of num_choices. Observations are uint8 [64, 64, 3]. info: "state", "goal" (float32
    [K]) and "is_success".

    state_names: of the K numbers of a state; the first num_positions are positions, the others velocities.
    num_actions: the numbers of an action, A.
    num_choices: above 0, actions are integers below it, and num_actions has no meaning.
    """

    state_names: ClassVar[tuple[str, ...]]
    num_positions: ClassVar[int]
    num_actions: ClassVar[int] = 2
    num_choices: ClassVar[int] = 0
    action_space: gymnasium.spaces.Space[Any]

    def __init__(self, render_mode: str | None = None) -> None:
        check_render_mode(render_mode)
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.Box(0, 255, (SIZE_PX, SIZE_PX, 3), np.uint8)
        self.action_space = (
            gymnasium.spaces.Discrete(self.num_choices)
            if self.num_choices
            else gymnasium.spaces.Box(-1, 1, (self.num_actions,), np.float32)
        )
        self._state = self._goal = np.zeros(len(self.state_names), np.float32)

    @abstractmethod
    def picture(self, state: State) -> Frame:
        """Draw a state [K] as RGB [64, 64, 3]."""

    @abstractmethod
    def reaches(self, state: State, goal: State) -> bool:
        """Return whether a state [K] is close enough to a goal [K]."""

    @abstractmethod
    def draw_state(self) -> State:
        """Draw a state at rest."""

    @abstractmethod
    def advance(self, action: Any) -> tuple[State, dict[str, Any]]:
        """Return the state after an action, float32 [A] in -1..1 or an integer, and what info has besides."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Frame, dict[str, Any]]:
        """Draw a start and a goal. Return the observation and info."""
        super().reset(seed=seed)
        options = options or {}
        if unknown := sorted(options.keys() - {"state", "goal"}):
            raise UserError(f"reset option {unknown[0]!r} is unknown: use state, goal")
        state, goal = (
            None if options.get(name) is None else self._checked(f"reset option {name}", options[name])
            for name in ("state", "goal")
        )
        if state is not None and goal is not None and self.reaches(state, goal):
            raise UserError(f"reset option goal={goal.tolist()} is met by the state already")
        self._state = self._draw_apart(goal) if state is None else state
        self._goal = self._draw_apart(self._state) if goal is None else goal
        return self.picture(self._state), self._info()

    def set_state(self, state: Any) -> dict[str, Any]:
        """Continue from a state [K], or [num_positions] at rest, and return info.

        It has the same future each time, unless the environment's own generator decides.
        """
        self._state = self._checked("state", state)
        return self._info()

    def set_goal(self, state: Any) -> dict[str, Any]:
        """Make a state [K] or [num_positions] the goal, and return info. Its velocities do not count."""
        self._goal = self._checked("goal", state)
        return self._info()

    def step(self, action: Any) -> tuple[Frame, float, bool, bool, dict[str, Any]]:
        """Execute an action [A]. Return observation, reward, terminated, truncated (always False), info."""
        allowed = int(action) if self.num_choices else np.clip(np.asarray(action, np.float32), -1, 1)
        self._state, more = self.advance(allowed)
        info = self._info() | more
        return self.picture(self._state), 0.0 if info["is_success"] else -1.0, info["is_success"], False, info

    def render(self) -> Frame | None:
        """Return the observation; None without a render mode."""
        return None if self.render_mode is None else self.picture(self._state)

    def goal_frame(self) -> Frame:
        """Return the observation in the goal state, uint8 [64, 64, 3]."""
        return self.picture(self._goal)

    def _draw_apart(self, other: State | None) -> State:
        """Draw a state that does not meet another one."""
        while True:
            state = self.draw_state()
            if other is None or not self.reaches(state, other):
                return state

    def _checked(self, name: str, value: Any) -> State:
        return whole_state(name, value, self.state_names, self.num_positions)

    def _info(self) -> dict[str, Any]:
        return {
            "state": self._state.copy(),
            "goal": self._goal.copy(),
            "is_success": self.reaches(self._state, self._goal),
        }


def whole_state(name: str, value: Any, names: tuple[str, ...], num_positions: int) -> State:
    """Return a state as float32 [len(names)], at rest if it has the first num_positions numbers only.

    Raises:
        UserError: it has another form.
    """
    try:
        state = np.array(value, np.float32)
    except (ValueError, TypeError):
        state = np.empty(0, np.float32)
    if state.ndim != 1 or len(state) not in (num_positions, len(names)) or not np.isfinite(state).all():
        velocities = f", or {len(names)} (also {', '.join(names[num_positions:])})" if names[num_positions:] else ""
        raise UserError(
            f"{name}={value!r} must be {num_positions} numbers ({', '.join(names[:num_positions])}){velocities}"
        )
    return np.pad(state, (0, len(names) - len(state)))
