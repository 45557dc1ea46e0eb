"""Arrays of an evaluation for the pictures of the report.

Legend: Q queries, S samples, M draws of the law, N transitions, L horizon steps that are shown, P neighbours, K
dimensions of the quantity, R latent dimensions, T frames of a segment, C channels, H = W pixels.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from einops import rearrange
from torch import Tensor

from worldmodel.evaluation.records import Axes
from worldmodel.evaluation.surprise import Timeline


@dataclass(frozen=True)
class Fans:
    """Forecasts of a physical quantity at the last frame of each future segment.

    samples [Q, S, horizon, K]; law [Q, M, horizon, K], draws of the true law, or None if it is not known; true
    [Q, horizon, K]; origin [Q, K], the quantity in the last context frame. `on_frames`: the first two
    dimensions are a position (x, y) in pixels of the frames, x right and y down, pixel centres at integers.
    """

    samples: Annotated[np.ndarray, Axes("f", "query* sample horizon number")]
    law: Annotated[np.ndarray, Axes("f", "query* draw horizon number")] | None
    true: Annotated[np.ndarray, Axes("f", "query* horizon number")]
    origin: Annotated[np.ndarray, Axes("f", "query* number")]
    on_frames: bool


@dataclass(frozen=True)
class Latents:
    """Inferred r [N, R] of held-out transitions, and the true change [N, K] there, None without labels.

    `change_name` names the change, such as "velocity change, px/frame"; empty without labels.
    """

    r: Annotated[np.ndarray, Axes("f", "transition* latent")]
    change: Annotated[np.ndarray, Axes("f", "transition* change")] | None
    change_name: str


@dataclass(frozen=True)
class Illustrations:
    """At most 6 queries to draw, and the arrays for the figures of the whole evaluation.

    frames uint8 [Q, (1 + horizon) * T, C, H, W], C 1 or 3: the context segment and those that followed; T is
    num_frames. neighbours uint8 [Q, L, P, T, C, H, W]: the real segments nearest to P sampled futures, at each of the
    horizon steps `neighbour_steps`, counted from 1. The frames of several cameras are side by side, W = cameras * H.
    """

    frames: Annotated[np.ndarray, Axes("u", "query* frame channel height width")]
    num_frames: int
    fans: Fans | None
    neighbours: Annotated[np.ndarray, Axes("u", "query* step* neighbour* segment_frame channel height width")]
    neighbour_steps: tuple[int, ...]
    latents: Latents | None
    timeline: Timeline | None

    def __post_init__(self) -> None:
        """Raise ValueError for numbers that do not fit the frames, as in a damaged file."""
        if self.num_frames < 1 or self.frames.shape[1] % self.num_frames or self.frames.shape[2] not in (1, 3):
            raise ValueError(f"frames of shape {self.frames.shape} in segments of {self.num_frames}")
        steps, num_steps = self.neighbour_steps, self.frames.shape[1] // self.num_frames - 1
        fits = self.neighbours.shape[1] == len(steps) and self.neighbours.shape[3] == self.num_frames
        if not fits or not all(1 <= step <= num_steps for step in steps):
            raise ValueError(f"neighbours of shape {self.neighbours.shape} at the steps {steps} of {num_steps}")


MAX_GRAY = 8
"""Channels that are shown of frames that are neither gray nor RGB."""


def side_by_side(frames: Tensor, num_cameras: int) -> np.ndarray:
    """Return frames [..., num_cameras * C, H, W] as pictures [..., C, H, num_cameras * W], one beside the other.

    Pictures have one or three channels. Of frames with other channels, the first few are shown as gray pictures.
    """
    channels = frames.shape[-3]
    if channels // num_cameras not in (1, 3):
        num_cameras = min(channels, MAX_GRAY)
        frames = frames[..., :num_cameras, :, :]
    return rearrange(frames, "... (n c) h w -> ... c h (n w)", n=num_cameras).numpy()


NO_ILLUSTRATIONS = Illustrations(
    frames=np.zeros((0, 2, 1, 1, 1), np.uint8),
    num_frames=1,
    fans=None,
    neighbours=np.zeros((0, 0, 0, 1, 1, 1, 1), np.uint8),
    neighbour_steps=(),
    latents=None,
    timeline=None,
)
