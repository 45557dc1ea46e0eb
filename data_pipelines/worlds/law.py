"""The true law of a world's future, which evaluations know and models do not.

Dimensions: B clips, M draws, H horizon steps (segments), F frames in a segment, N digits, K dimensions of the quantity.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Quantity:
    """A quantity that is forecast in physical space: its name, its unit and the names of its K dimensions."""

    name: str
    unit: str
    dimensions: tuple[str, ...]


@dataclass(frozen=True)
class ClipFormat:
    """The form of clips for which the labels and the law of a world hold.

    Consecutive segments of num_frames frames, with one channel and size_px. whole_videos: a video is one clip.
    Otherwise clips begin at multiples of num_frames.
    """

    num_frames: int
    size_px: int
    whole_videos: bool


class Law(Protocol):
    """The law of a world. `labels` are those of B clips, as in a batch. A context is the first segment of each clip."""

    @property
    def quantity(self) -> Quantity: ...

    @property
    def clip_format(self) -> ClipFormat: ...

    @property
    def max_horizon(self) -> int | None:
        """The number of segments that can be forecast; None: any number."""

    def sample(self, labels: dict[str, Tensor], horizon: int, num_samples: int, generator: torch.Generator) -> Tensor:
        """Draw futures given the state of each clip: centres of the digits [B, num_samples, H * F, N, 2] px.

        Only `measure` and `render` interpret them. Worlds without digits draw other numbers, [B, num_samples, ...].
        """

    def truth(self, labels: dict[str, Tensor], horizon: int) -> Tensor:
        """Return the observed quantity, [B, H, K]."""

    def measure(self, labels: dict[str, Tensor], centres: Tensor) -> Tensor:
        """Return the quantity in futures: centres [B, M, H * F, N, 2] px -> [B, M, H, K]."""

    def extrapolate(self, labels: dict[str, Tensor], context: Tensor, horizon: int) -> Tensor:
        """Continue the motion seen in the context, frames [B, F, C, 64, 64] in [0, 1] or their labels -> [B, H, K]."""

    def render(self, labels: dict[str, Tensor], centres: Tensor) -> Tensor:
        """Draw futures: centres [B, M, H * F, N, 2] px -> float32 [B, M, H * F, 1, 64, 64] in [0, 1]."""

    def origin(self, labels: dict[str, Tensor]) -> Tensor:
        """Return the position of the digits in the last context frame, as `positions` does: [B, P] px."""

    def positions(self, labels: dict[str, Tensor], values: Tensor) -> Tensor:
        """Return the position of the digits after each segment, [B, S, H, P] px, from the quantity [B, S, H, K].

        The first two of several numbers are a place (x, y) on the frames.
        """

    def probe_targets(self, labels: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the targets of probes: int64 [B] is a class, float32 [B, K] a measure."""
