"""The EMA target network (BYOL, Grill et al., arXiv 2006.07733).

Legend: B clips, T frames, C channels, H = W pixels, D embedding dimensions.
"""

import copy

import torch
from torch import Tensor, nn

from worldmodel.nets.encoders import Embedder
from worldmodel.nets.parallel import local_shard


class Teacher(nn.Module):
    """A copy of the student's embedder whose parameters slowly follow it. It has no gradient and stays outside DDP.

    Its batch-norm statistics are separate: in training it normalises by the batch and updates running statistics. With
    running statistics in training too, embeddings collapse within 200 steps (docs/experiments.md).
    """

    def __init__(self, student: Embedder) -> None:
        super().__init__()
        self.embedder = copy.deepcopy(student)
        self.requires_grad_(False)
        self._followed: tuple[list[Tensor], list[Tensor]] | None = None  # own parameters, the student's

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        """Embed video [B, T, C, H, W] in [0, 1]: float32 [B, D]."""
        return self.embedder(video)

    @torch.no_grad()
    def update(self, student: Embedder, momentum: float) -> None:
        """Set parameters to momentum * parameters + (1 - momentum) * student's.

        `student` is the same module in every call. Parameters of a frozen encoder are skipped: they are equal anyway.
        """
        if self._followed is None:
            pairs = zip(self.embedder.parameters(), student.parameters(), strict=True)
            learned = [
                (local_shard(own.detach()), local_shard(other.detach())) for own, other in pairs if other.requires_grad
            ]
            self._followed = [own for own, _ in learned], [other for _, other in learned]
        own, followed = self._followed
        if own:
            torch._foreach_lerp_(own, followed, 1 - momentum)
