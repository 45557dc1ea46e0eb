"""Pairs of observations of known factors, generated on demand."""

from collections.abc import Iterator

import torch

from data_pipelines.batches import Batch
from data_pipelines.splits import SPLITS, Split
from data_pipelines.stream import share_of_pass
from data_pipelines.worlds.causal import NUM_FACTORS, CausalStream, CausalWorld
from worldmodel.config import CausalConfig
from worldmodel.sources.source import EVALUATION_BATCH, Content, Generated, take_clips


class CausalSource(Generated):
    """Fresh pairs in every batch (worldmodel.sources.source.Source). The seed also fixes the mixing network."""

    content: Content = "factors"
    frame_shape = (NUM_FACTORS, 1, 1)

    def __init__(self, data: CausalConfig, *, seed: int, evaluation_seed: int) -> None:
        self._batch_size, self._seed, self._evaluation_seed = data.batch_size, seed, evaluation_seed
        self.factors = CausalWorld(data.change, seed)

    def training_stream(
        self, steps: int, *, rank: int, world_size: int, device: torch.device, clip_step: int | None = None
    ) -> CausalStream:
        return CausalStream(
            self.factors, batch_size=self._batch_size, seed=self._seed, rank=rank, world_size=world_size
        )

    def evaluation_batches(
        self, split: Split, num_clips: int, horizon: int = 1, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        size, seed = min(EVALUATION_BATCH, num_clips), self._evaluation_seed + SPLITS.index(split)
        stream = CausalStream(self.factors, batch_size=size, seed=seed)
        return take_clips(stream, size, share_of_pass(num_clips, rank, world_size))

    def known_law(self, split: Split, horizon: int) -> None:
        return None
