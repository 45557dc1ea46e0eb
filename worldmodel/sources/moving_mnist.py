"""Stochastic Moving-MNIST, generated on demand."""

from collections.abc import Iterator
from pathlib import Path

import torch

from data_pipelines.batches import Batch
from data_pipelines.splits import SPLITS, Split
from data_pipelines.stream import share_of_pass
from data_pipelines.worlds.digits import Sprites, load_sprites
from data_pipelines.worlds.moving_mnist import MovingMnistLaw, MovingMnistStream
from worldmodel.config import MovingMnistConfig
from worldmodel.sources.source import EVALUATION_BATCH, Content, Generated, take_clips


class MovingMnistSource(Generated):
    """Fresh trajectories of digits in every batch (worldmodel.sources.source.Source)."""

    content: Content = "frames"
    factors = None

    def __init__(self, data: MovingMnistConfig, *, seed: int, evaluation_seed: int) -> None:
        self._data, self._seed, self._evaluation_seed = data, seed, evaluation_seed
        self._sprites: dict[Split, Sprites] = {}

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        return self._data.channels, self._data.size_px, self._data.size_px

    def sprites(self, split: Split) -> Sprites:
        """Return the digits of a split. Raises UserError: the files of MNIST cannot be read."""
        if split not in self._sprites:
            self._sprites[split] = load_sprites(split, Path(self._data.mnist_dir) if self._data.mnist_dir else None)
        return self._sprites[split]

    def training_stream(
        self, steps: int, *, rank: int, world_size: int, device: torch.device, clip_step: int | None = None
    ) -> MovingMnistStream:
        return MovingMnistStream(
            self.sprites("train"),
            setting=self._data.setting,
            batch_size=self._data.batch_size,
            seed=self._seed,
            rank=rank,
            world_size=world_size,
            device=device,
        )

    def evaluation_batches(
        self, split: Split, num_clips: int, horizon: int = 1, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        size, seed = min(EVALUATION_BATCH, num_clips), self._evaluation_seed + SPLITS.index(split)
        stream = MovingMnistStream(self.sprites(split), setting=self._data.setting, batch_size=size, seed=seed)
        return take_clips(stream, size, share_of_pass(num_clips, rank, world_size))

    def known_law(self, split: Split, horizon: int) -> MovingMnistLaw:
        return MovingMnistLaw(self._data.setting, self.sprites(split))
