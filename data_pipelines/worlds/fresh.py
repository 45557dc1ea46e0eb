"""Fresh batches of generated worlds: each is a pure function of (seed, number), and ranks divide it."""

import numpy as np
import torch

from data_pipelines.errors import UserError


def batch_generator(seed: int, batch: int) -> torch.Generator:
    """Return the generator of global batch number `batch`, on the CPU."""
    mixed = np.random.SeedSequence([seed, batch]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed))


def share_of_rank(batch_size: int, rank: int, world_size: int) -> slice:
    """Return the rows of a global batch that a rank takes.

    Raises:
        UserError: `batch_size` is not a multiple of `world_size`.
    """
    if batch_size % world_size:
        raise UserError(f"data.batch_size={batch_size} is not a multiple of the {world_size} processes")
    local = batch_size // world_size
    return slice(rank * local, (rank + 1) * local)
