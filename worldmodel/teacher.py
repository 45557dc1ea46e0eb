"""The EMA target network (BYOL, Grill et al., arXiv 2006.07733)."""

import copy
import math
from typing import Literal

import torch
from torch import Tensor, nn

from worldmodel.encoders import Embedder


class Teacher(nn.Module):
    """A copy of the student's embedder that follows it slowly. It stays outside DDP and has no gradient.

    Its encoder normalises by running statistics, which follow the student's as its parameters do: the affine maps fold
    into the convolutions, which saves a good part of a training step on a CPU. Its projector normalises by the batch
    while training; with running statistics there too, embeddings collapse within 200 steps.
    """

    def __init__(self, student: Embedder) -> None:
        super().__init__()
        self.embedder = copy.deepcopy(student)
        self.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "Teacher":
        super().train(mode)
        self.embedder.encoder.eval()
        return self

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        """video [B, T, C, H, W] in [0, 1] -> embedding float32 [B, D]."""
        return self.embedder(video)

    @torch.no_grad()
    def update(self, student: Embedder, momentum: float) -> None:
        """own <- momentum * own + (1 - momentum) * student's, for parameters and the encoder's running statistics."""
        torch._foreach_lerp_(_followed(self.embedder), _followed(student), 1 - momentum)


def _followed(embedder: Embedder) -> list[Tensor]:
    statistics = [buffer for buffer in embedder.encoder.buffers() if buffer.is_floating_point()]
    return [parameter.detach() for parameter in embedder.parameters()] + statistics


def ema_momentum(step: int, num_steps: int, base: float, schedule: Literal["constant", "cosine"]) -> float:
    """Momentum at `step`; cosine rises from `base` to 1 at `num_steps`."""
    if schedule == "constant":
        return base
    return 1 - (1 - base) * (math.cos(math.pi * step / num_steps) + 1) / 2
