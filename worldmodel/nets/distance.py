"""The temporal distance: how many steps lead from one state to another, at the least, learned from clips alone.

Distances between embeddings are learned over the few segments of a rollout: beyond they saturate, and two places on
either side of a thin wall look alike. The temporal distance is a quasimetric: d(a, a) = 0 and d(a, c) <= d(a, b) +
d(b, c), but d(b, a) may differ. It is as large as it can be while successive segments are at most one step apart
(quasimetric reinforcement learning; Wang et al., ICML 2023, arXiv 2304.01203): no more, by the triangle inequality,
than the steps of the shortest way that can be pieced together from clips, and where no clip passes, the way around. No
label, no action and no reward is read.

    d(a, b) = mean over groups of max(0, the largest of phi(a) - phi(b) in the group)

How far two states are apart is asked of two segments of one clip, or of two clips alike: of all others it is not
known whether there is a way. Alike are clips in what the scene code finds that a clip keeps, such as a layout.

Legend: N clips, B and P of them or of pairs, K steps, D embedding dimensions, S numbers of a scene code that are kept
(0 without one), L numbers of phi, Q directions of a scene code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.nets.encoders import mlp

NUM_GROUPS = 8
NUM_ALIKE = 8
CLIPS_AT_ONCE = 1024
STEP_WEIGHT = 10.0  # of the constraint, in place of the paper's multiplier, which settles near it
FAR_STEPS, SOFT_STEPS = 15.0, 10.0  # as in the paper, for its shorter ways: what lies farther is pushed less


class TemporalDistance(nn.Module):
    """phi, a code of states of which the distance is read. It is learned in refinement alone."""

    def __init__(self, state_dim: int, hidden_dim: int, distance_dim: int) -> None:
        super().__init__()
        self.net = mlp([state_dim, hidden_dim, hidden_dim, NUM_GROUPS * distance_dim], norm="none")
        self.requires_grad_(False)

    def forward(self, lasting: Tensor) -> Tensor:
        """What states hold that outlasts a step, [..., D + S] -> phi, float32 [..., L]: in tens of steps, so that bf16
        would round away a good part of one."""
        hidden = self.net[:-1](lasting)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.net[-1](hidden.float())


def steps_between(start: Tensor, end: Tensor) -> Tensor:
    """phi of states, [..., L] each, broadcast -> steps from the one to the other, at the least: [...]."""
    return (start - end).unflatten(-1, (NUM_GROUPS, -1)).amax(dim=-1).relu().mean(dim=-1)


def excess_steps(before: Tensor, after: Tensor) -> Tensor:
    """By how much more than one step successive segments are apart, squared, over all of them: phi [..., L] -> []."""
    return (steps_between(before, after) - 1).relu().square().mean()


def nearness(start: Tensor, end: Tensor) -> Tensor:
    """How near pairs are that should be far: phi [P, L] -> [], a softplus of FAR_STEPS less their distance."""
    return SOFT_STEPS * F.softplus((FAR_STEPS - steps_between(start, end)) / SOFT_STEPS).mean()


def clips_alike(kept: Tensor, correlation: Tensor) -> Tensor:
    """For each clip the NUM_ALIKE most like it, itself among them, or all where there are fewer: [N, <= NUM_ALIKE].

    kept [N, Q] are the clips' means along the directions of a scene code, correlation [Q] how alike two segments of a
    clip are along each: directions count by the variance between clips over that within.
    """
    weighted = kept * (correlation / (1 - correlation)).sqrt()
    count = min(NUM_ALIKE, len(kept))
    near = [torch.cdist(part, weighted).topk(count, largest=False).indices for part in weighted.split(CLIPS_AT_ONCE)]
    return torch.cat(near)
