"""An environment as plain as can be, for the tests of the recorder: a counter that ends by itself."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

END = 5
SHAPE = (15, 21, 3)


class CounterEnv(gymnasium.Env[np.ndarray, Any]):
    """Action k of three adds k; five steps end it. The picture's red is 40 * steps, its blue 10 * sum."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 7}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, actions: str = "discrete", pictures: bool = True) -> None:
        self.render_mode, self._pictures = render_mode, pictures
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
        kinds = {"discrete": spaces.Discrete(3), "lists": spaces.Sequence(spaces.Discrete(3))}
        self.action_space = kinds[actions]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._steps, self._sum, self._luck = 0, 0, float(self.np_random.random())
        return self._observation(), {"luck": np.float64(self._luck), "done": False, "text": "no number", "seed": -1}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._steps += 1
        self._sum += int(action) if self.action_space == spaces.Discrete(3) else 0
        return self._observation(), 0.0, self._steps >= END, False, {}

    def render(self) -> Any:
        return np.full(SHAPE, [40 * self._steps, 0, 10 * self._sum], np.uint8) if self._pictures else "a picture"

    def _observation(self) -> np.ndarray:
        return np.array([self._steps, self._sum, self._luck])


gymnasium.register("tests/Counter-v0", entry_point=f"{__name__}:CounterEnv", max_episode_steps=4)
