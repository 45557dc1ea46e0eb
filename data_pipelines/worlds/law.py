"""What an evaluation may know of a world and no model does: the true law of what comes next.

Dimensions: B clips, M draws, H horizon steps (segments), F frames in a segment, N digits, K dimensions of the quantity.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Quantity:
    """What is forecast in physical space: a name, its unit and the names of its K dimensions."""

    name: str
    unit: str
    dimensions: tuple[str, ...]


@dataclass(frozen=True)
class ClipFormat:
    """The one way of cutting and showing clips to which a world's labels and law belong.

    Segments of num_frames frames, one after the other, of one channel and size_px. whole_videos: a video is one clip;
    otherwise clips begin at multiples of num_frames.
    """

    num_frames: int
    size_px: int
    whole_videos: bool


class Law(Protocol):
    """The law of a world. `labels` are those of B clips, as batches carry them; a context is their first segment."""

    @property
    def quantity(self) -> Quantity: ...

    @property
    def clip_format(self) -> ClipFormat: ...

    @property
    def max_horizon(self) -> int | None:
        """Segments that can be forecast; None: any number."""

    def sample(self, labels: dict[str, Tensor], horizon: int, num_samples: int, generator: torch.Generator) -> Tensor:
        """Fresh futures given each clip's state: centres of the digits [B, num_samples, H * F, N, 2] px."""

    def truth(self, labels: dict[str, Tensor], horizon: int) -> Tensor:
        """The quantity as it came: [B, H, K]."""

    def measure(self, labels: dict[str, Tensor], centres: Tensor) -> Tensor:
        """The quantity in given futures: centres [B, M, H * F, N, 2] px -> [B, M, H, K]."""

    def extrapolate(self, context: Tensor, horizon: int) -> Tensor:
        """The motion that pixels of the context show goes on: [B, F, 1, 64, 64] in [0, 1] -> [B, H, K]."""

    def render(self, labels: dict[str, Tensor], centres: Tensor) -> Tensor:
        """Futures as pixels: centres [B, M, H * F, N, 2] px -> float32 [B, M, H * F, 1, 64, 64] in [0, 1]."""

    def origin(self, labels: dict[str, Tensor]) -> Tensor:
        """Where the digits are in the last context frame: [B, 2] px."""

    def positions(self, labels: dict[str, Tensor], values: Tensor) -> Tensor:
        """Values of the quantity [B, S, H, K] -> where that puts the digits at the end of each segment, [..., 2] px."""

    def probe_targets(self, labels: dict[str, Tensor]) -> dict[str, Tensor]:
        """What probes look for: int64 [B] is a class, float32 [B, K] a measure."""
