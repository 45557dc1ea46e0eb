"""The temporal distance: the least number of steps from one state to another, learned from clips alone.

Distances between embeddings are learned over the few segments of a rollout. Beyond those they saturate, and two places
on either side of a thin wall look alike. The temporal distance is a quasimetric: d(a, a) = 0 and d(a, c) <= d(a, b) +
d(b, c), but d(b, a) may differ. Training makes it as large as possible while successive segments are at most one step
apart (quasimetric reinforcement learning; Wang et al., ICML 2023, arXiv 2304.01203). By the triangle inequality it is
then at most the length of the shortest path that can be pieced together from clips, and if no clip passes through a
wall, that path leads around it. No label, action or reward is read.

    d(a, b) = mean over groups of max(0, the largest of phi(a) - phi(b) in the group)

Training pairs come from the same clip or from similar clips; for other pairs it is unknown whether a path exists. Clips
are similar if their scene codes agree on what is constant within a clip, such as a layout.

Legend: N clips, B of them or of pairs, D embedding dimensions, P numbers of a scene code's persistent part (0 without
one), L numbers of phi, Q directions of a scene code, M similar clips.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.nets.encoders import mlp

NUM_GROUPS = 8
NUM_SIMILAR = 8
CLIPS_AT_ONCE = 1024
STEP_WEIGHT = 10.0  # of the constraint; the paper's multiplier settles near this value
FAR_STEPS, SOFT_STEPS = 15.0, 10.0  # as in the paper for short paths; pairs that are farther apart are pushed less


class NoDistance(nn.Module):
    """The temporal distance of a model without one: phi has no numbers."""

    num_values = 0

    def forward(self, persistent: Tensor) -> Tensor:
        """Return an empty phi for states [..., D + P]: [..., 0]."""
        return persistent[..., :0]


class TemporalDistance(nn.Module):
    """phi, a code of states from which the distance is computed. It is learned in refinement alone."""

    def __init__(self, state_dim: int, hidden_dim: int, distance_dim: int) -> None:
        super().__init__()
        self.num_values = NUM_GROUPS * distance_dim
        self.net = mlp([state_dim, hidden_dim, hidden_dim, self.num_values], norm="none")
        self.requires_grad_(False)

    def forward(self, persistent: Tensor) -> Tensor:
        """Return phi of the persistent part of states [..., D + P]: float32 [..., L].

        phi counts tens of steps, which bf16 would round to a good part of a step.
        """
        hidden = self.net[:-1](persistent)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.net[-1](hidden.float())


Distance = NoDistance | TemporalDistance


def steps_between(start: Tensor, end: Tensor) -> Tensor:
    """Return the least number of steps from one state to another: phi [..., L] each, broadcast -> [...]."""
    return (start - end).unflatten(-1, (NUM_GROUPS, -1)).amax(dim=-1).relu().mean(dim=-1)


def excess_steps(before: Tensor, after: Tensor) -> Tensor:
    """Return the mean squared excess over one step between successive segments: phi [..., L] -> []."""
    return (steps_between(before, after) - 1).relu().square().mean()


def nearness(start: Tensor, end: Tensor) -> Tensor:
    """Return how near pairs are that should be far: phi [B, L] -> [], a softplus of FAR_STEPS less their distance."""
    return SOFT_STEPS * F.softplus((FAR_STEPS - steps_between(start, end)) / SOFT_STEPS).mean()


def similar_clips(projected: Tensor, correlation: Tensor) -> Tensor:
    """Return the M = NUM_SIMILAR most similar clips of each clip, which include itself: [N, M], or [N, N] if N < M.

    Args:
        projected: [N, Q], the clips' means along the directions of a scene code.
        correlation: [Q], that of two segments of one clip along each direction. Directions count by the variance
            between clips over that within them.
    """
    weighted = projected * (correlation / (1 - correlation)).sqrt()
    count = min(NUM_SIMILAR, len(projected))
    near = [torch.cdist(part, weighted).topk(count, largest=False).indices for part in weighted.split(CLIPS_AT_ONCE)]
    return torch.cat(near)
