"""Changes that a camera makes to the pictures of any environment: blur, contrast, brightness and noise.

A camera changes every picture: observation, render and goal_frame. The goal's picture comes from the same camera.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from data_pipelines.errors import UserError
from data_pipelines.worlds.shapes import check_number

Picture = NDArray[np.uint8]

WHITE = 255
LUMA = (0.30, 0.59, 0.11)
"""Weights of red, green and blue, as in `data.augment`."""


@dataclass(frozen=True)
class Camera:
    """Changes of a picture, in this order, as `data.augment` makes them at training. The defaults change nothing.

    blur: standard deviation of a Gaussian, px. Edges are continued.
    contrast: factor of the differences from the picture's mean luma.
    brightness: factor of all values.
    noise: standard deviation of Gaussian noise, gray levels of 255, independent at each pixel and channel.

    Values are clipped to 0..255 before and after the noise, and rounded once.

    Raises:
        UserError: a value is out of range.
    """

    blur: float = 0.0
    contrast: float = 1.0
    brightness: float = 1.0
    noise: float = 0.0

    greatest: ClassVar[Mapping[str, float]] = {"blur": 32.0, "contrast": 8.0, "brightness": 8.0, "noise": 255.0}

    def __post_init__(self) -> None:
        for name, high in self.greatest.items():
            check_number(name, getattr(self, name), 0, high)

    def __call__(self, picture: Any, seed: Sequence[int]) -> Picture:
        """Return a picture, RGB uint8 [H, W, 3], as the camera shows it. The noise is a function of the seed.

        Raises:
            UserError: it is not such a picture.
        """
        if not is_picture(picture):
            raise UserError(f"the environment renders {type(picture).__name__}, not RGB pictures: a camera needs them")
        values = picture.astype(np.float64)
        if self.blur:
            values = gaussian_filter(values, self.blur, mode="nearest", axes=(0, 1))
        if self.contrast != 1 or self.brightness != 1:
            luma = (values.mean(axis=(0, 1)) * LUMA).sum()
            values = (self.brightness * (luma + self.contrast * (values - luma))).clip(0, WHITE)
        if self.noise:
            values = values + self.noise * np.random.default_rng(seed).standard_normal(values.shape)
        return np.rint(values.clip(0, WHITE)).astype(np.uint8)


PLAIN = Camera()
"""It changes nothing."""


def is_picture(value: Any) -> bool:
    """Return whether a value is an RGB picture, uint8 [H, W, 3]."""
    return isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3


class ThroughCamera(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment, seen through a camera. Observations that are not pictures remain as they are.

    The noise of a picture is a function of the seed of the last seeded reset, the number of resets since then and the
    number of steps since the last one: observation and render of one moment are the same picture. The goal's picture
    has its own noise, which does not change within an episode.
    """

    def __init__(self, env: gymnasium.Env, camera: Camera) -> None:
        super().__init__(env)
        self.camera = camera
        self._seed = int(np.random.SeedSequence().generate_state(1)[0])
        self._resets = self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._seed, self._resets = (self._seed, self._resets + 1) if seed is None else (seed, 0)
        self._steps = 0
        return self._observed(observation), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._steps += 1
        return self._observed(observation), reward, terminated, truncated, info

    def render(self) -> Any:
        return self._shown(self.env.render(), 1 + self._steps)

    def goal_frame(self) -> Picture:
        """Return the environment's goal_frame() through the camera."""
        return self._shown(self.env.get_wrapper_attr("goal_frame")(), 0)

    def _observed(self, observation: Any) -> Any:
        return self._shown(observation, 1 + self._steps) if is_picture(observation) else observation

    def _shown(self, picture: Any, moment: int) -> Picture:
        return self.camera(picture, [self._seed, self._resets, moment])
