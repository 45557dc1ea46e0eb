"""The EMA target network (BYOL, Grill et al., arXiv 2006.07733)."""

import copy
import math
from typing import Literal

import torch
from torch import Tensor, nn

from worldmodel.nets.encoders import Embedder
from worldmodel.training.sharding import local


class Teacher(nn.Module):
    """A copy of the student's embedder whose parameters follow it slowly. It stays outside DDP and has no gradient.

    Its batch-norm statistics are its own: it normalises by the batch while training and gathers running statistics.
    With running statistics in training too, embeddings collapse within 200 steps (docs/experiments.md).
    """

    def __init__(self, student: Embedder) -> None:
        super().__init__()
        self.embedder = copy.deepcopy(student)
        self.requires_grad_(False)
        self._followed: tuple[list[Tensor], list[Tensor]] | None = None  # own parameters, the student's

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        """video [B, T, C, H, W] in [0, 1] -> embedding float32 [B, D]."""
        return self.embedder(video)

    @torch.no_grad()
    def update(self, student: Embedder, momentum: float) -> None:
        """parameters <- momentum * parameters + (1 - momentum) * student's, which is the same one each time; a frozen
        encoder's are the same anyway."""
        if self._followed is None:
            pairs = zip(self.embedder.parameters(), student.parameters(), strict=True)
            learned = [(local(own.detach()), local(other.detach())) for own, other in pairs if other.requires_grad]
            own, followed = (list(values) for values in zip(*learned, strict=True))
            self._followed = own, followed
        own, followed = self._followed
        torch._foreach_lerp_(own, followed, 1 - momentum)


def ema_momentum(step: int, num_steps: int, base: float, schedule: Literal["constant", "cosine"]) -> float:
    """Momentum at `step`; cosine rises from `base` to 1 at `num_steps`."""
    if schedule == "constant":
        return base
    return 1 - (1 - base) * (math.cos(math.pi * step / num_steps) + 1) / 2
