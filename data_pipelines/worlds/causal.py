"""A small world of known factors for causal representation learning: x = g(z), pairs z+ ~ p(z+ | z).

A fixed invertible network g, which the seed determines, mixes six factors z, uniform with unit variance. A pair shares
a change: z~ = z + change(z), z+ = z~ + jitter, z++ = z~ + jitter'. The jitters are independent, so x++ reveals the
change without being the target. The change is drawn in one of five ways:

    isotropic        0.3 eps
    anisotropic      0.3 diag(s) eps, s from 0.3 to 3 in geometric steps, in an order set by the seed
    diagonal         0.3 diag(3 ** tanh(W z)) eps: the state sets the size of each factor's change, not a direction;
                     rows of W have length 1
    heteroscedastic  D sum_i eps_i (M_i z + 0.1 b_i), i = 1..3: three "actions" of random size, each moves z along its
                     own field; D is a diagonal from 1/3 to 3 in geometric steps, divided by its root mean square
    multimodal       1.8 on one random factor, up or down, + 0.09 eps

The design is ours: AdaSSL (arXiv 2602.02381) reports this experiment without its generator. Batches have the form of a
video stream's: three segments of one frame, with the observation along the channels.

Legend: B clips, F = 6 factors.
"""

import math
from collections.abc import Generator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.batches import Batch, BatchStream
from data_pipelines.worlds.fresh import batch_generator, share_of_rank

Change = Literal["isotropic", "anisotropic", "diagonal", "heteroscedastic", "multimodal"]

NUM_FACTORS = 6
JITTER_STD = 0.15
CHANGE_STD = 0.3
NUM_ACTIONS = 3
WIDER = 2.0
"""Width of the box of factors out of distribution, relative to that of training."""


class CausalWorld:
    """The mixing network and the law that a seed determines."""

    SLOPE = 0.3

    def __init__(self, change: Change, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.kind = change
        self.rotations = [torch.linalg.qr(normal(NUM_FACTORS, NUM_FACTORS))[0] for _ in range(3)]
        self.shifts = [0.2 * normal(NUM_FACTORS) for _ in range(2)]
        geometric = torch.logspace(-1, 1, NUM_FACTORS, base=3)
        order = torch.randperm(NUM_FACTORS, generator=generator)
        self.axis_std = torch.logspace(math.log10(0.3), math.log10(3), NUM_FACTORS)[order]
        self.fields = normal(NUM_ACTIONS, NUM_FACTORS, NUM_FACTORS) / math.sqrt(NUM_FACTORS)
        self.drifts = 0.1 * normal(NUM_ACTIONS, NUM_FACTORS)
        self.field_scale = geometric / geometric.square().mean().sqrt()
        self.size_directions = F.normalize(normal(NUM_FACTORS, NUM_FACTORS), dim=1)

    def draw_factors(self, count: int, generator: torch.Generator, width: float = 1.0) -> Tensor:
        """Draw z [B, F], uniform, with standard deviation `width`."""
        return width * math.sqrt(3) * (2 * torch.rand(count, NUM_FACTORS, generator=generator) - 1)

    def mix(self, factors: Tensor) -> Tensor:
        """Return x = g(z), [..., F] -> [..., F]. g is invertible: rotations, and leaky ReLUs that keep the variance."""
        values = factors
        for rotation, shift in zip(self.rotations, self.shifts, strict=False):
            values = F.leaky_relu(values @ rotation + shift, self.SLOPE) * math.sqrt(2 / (1 + self.SLOPE**2))
        return values @ self.rotations[-1]

    def draw_change(self, factors: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the change [B, F] of factors z [B, F]."""
        count = len(factors)
        eps = torch.randn(count, NUM_FACTORS, generator=generator)
        if self.kind == "isotropic":
            return CHANGE_STD * eps
        if self.kind == "anisotropic":
            return CHANGE_STD * self.axis_std * eps
        if self.kind == "diagonal":
            return CHANGE_STD * 3 ** (factors @ self.size_directions.T).tanh() * eps
        if self.kind == "heteroscedastic":
            moves = torch.einsum("kij,bj->bki", self.fields, factors) + self.drifts
            return self.field_scale * (eps[:, :NUM_ACTIONS, None] * moves).sum(dim=1)
        factor = torch.randint(NUM_FACTORS, (count,), generator=generator)
        sign = 2 * torch.randint(2, (count, 1), generator=generator) - 1
        return 6 * CHANGE_STD * sign * F.one_hot(factor, NUM_FACTORS) + 0.3 * CHANGE_STD * eps

    def draw_batch(self, count: int, generator: torch.Generator, width: float = 1.0) -> Batch:
        """Draw video [B, 3, F, 1, 1], and as labels the factors z and the change, each [B, F]."""
        z = self.draw_factors(count, generator, width)
        change = self.draw_change(z, generator)
        jitters = JITTER_STD * torch.randn(2, count, NUM_FACTORS, generator=generator)
        views = self.mix(torch.stack([z, z + change + jitters[0], z + change + jitters[1]], dim=1))
        rows = torch.arange(count)
        labels = {"factors": z, "change": change}
        return {"video": views[..., None, None], "clip_id": rows, "row": rows, "labels": labels}


class CausalStream(BatchStream):
    """Fresh pairs without end.

    A global batch is a pure function of (seed, batch number). A rank takes its slice.

    Raises:
        UserError: `batch_size` is not a multiple of `world_size`.
    """

    batches_per_epoch = 1

    def __init__(self, world: CausalWorld, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.world = world
        self.batch_size = batch_size
        self.seed = seed
        self._slice = share_of_rank(batch_size, rank, world_size)
        self.fingerprint = f"causal-{world.kind}-{batch_size}-{seed}"

    def batches(self, start_batch: int = 0) -> Generator[Batch, None, None]:
        """Yield batches from number `start_batch` on, with video float32 [B, 3, F, 1, 1]."""
        batch = start_batch
        while True:
            whole = self.world.draw_batch(self.batch_size, batch_generator(self.seed, batch))
            ids = torch.arange(batch * self.batch_size, (batch + 1) * self.batch_size)
            yield {
                "video": whole["video"][self._slice],
                "clip_id": ids[self._slice],
                "row": torch.arange(self._slice.start, self._slice.stop),
                "labels": {name: values[self._slice] for name, values in whole["labels"].items()},
            }
            batch += 1
