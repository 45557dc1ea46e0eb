"""Pairs of images in files: of one class, of one image, or listed in a file."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipelines.batches import Batch
from data_pipelines.contents import Contents, contents_of
from data_pipelines.errors import UserError
from data_pipelines.formats.image_files import ImageFiles
from data_pipelines.images.relations import Relation, classes_of, listed_pairs, pairs_of_file, same_class, same_image
from data_pipelines.images.stream import PairSettings, PairStream, read_pairs
from data_pipelines.index import VideoIndex
from data_pipelines.remote.stores import is_url
from data_pipelines.split_folders import load_split
from data_pipelines.splits import MIN_VIDEOS_TO_DEAL, SPLITS, Split
from worldmodel.config import ImagesConfig, PairsFileConfig, RelationConfig, SameClassConfig
from worldmodel.sources.source import EVALUATION_BATCH, MIN_CLIPS, ClipPlaces, Content
from worldmodel.sources.videos import video_number


class ImagesSource:
    """Clips of two or three segments of one image each (worldmodel.sources.source.Source).

    Each split is indexed when it is first needed. The same source sees the same images and pairs from then on.
    """

    content: Content = "frames"
    factors = None
    url = None

    def __init__(self, data: ImagesConfig, *, seed: int, evaluation_seed: int) -> None:
        self._data, self._seed, self._evaluation_seed = data, seed, evaluation_seed
        self._splits: dict[Split, tuple[VideoIndex, Relation]] = {}

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        return self._data.channels, self._data.size_px, self._data.size_px

    def pairs(self, split: Split) -> tuple[VideoIndex, Relation]:
        """Return the index of a split's images, and their relation.

        Raises:
            UserError: there are no images, too many cannot be read, or the labels or the file of pairs do not fit them.
        """
        if split not in self._splits:
            index = load_images(self._data, split)
            self._splits[split] = index, make_relation(self._data.relation, Path(self._data.root), index)
        return self._splits[split]

    def training_stream(
        self, steps: int, *, rank: int, world_size: int, device: torch.device, clip_step: int | None = None
    ) -> PairStream:
        index, relation = self.pairs("train")
        settings = self._settings(self._data.batch_size)
        return PairStream(index, relation, settings, seed=self._seed, rank=rank, world_size=world_size)

    def evaluation_batches(
        self, split: Split, num_clips: int, horizon: int = 1, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        index, relation = self.pairs(split)
        settings = self._settings(EVALUATION_BATCH)
        seed = self._evaluation_seed + SPLITS.index(split)
        batches = read_pairs(
            index, relation, settings, seed=seed, max_pairs=num_clips, rank=rank, world_size=world_size
        )
        yield from (batch for batch in batches if len(batch["video"]))

    def _settings(self, batch_size: int) -> PairSettings:
        data = self._data
        return PairSettings(
            batch_size=batch_size,
            size_px=data.size_px,
            channels=data.channels,
            decoder="pyav",
            num_workers=data.num_workers,
            max_bad_fraction=data.max_bad_fraction,
            decode_timeout_s=data.decode_timeout_s,
            num_segments=data.num_segments,
            cache_mb=data.cache_mb,
        )

    def clip_places(self, split: Split, clip_id: Tensor, horizon: int = 1) -> ClipPlaces:
        """Each context is a video of its own, with the number of its path."""
        index, relation = self.pairs(split)
        paths = [f"{split}/{index.videos[image].path}" for image in relation.contexts[clip_id.numpy()].tolist()]
        return ClipPlaces(torch.tensor([video_number(path) for path in paths]), torch.zeros_like(clip_id), 1)

    def known_law(self, split: Split, horizon: int) -> None:
        return None

    def check_split(self, split: Split, steps: int, labels: Collection[str], keys: str) -> None:
        index, relation = self.pairs(split)
        for name in sorted(index.label_faults.keys() & labels):
            raise UserError(f"the label {name!r} cannot be used: {index.label_faults[name]}")
        if relation.num_pairs < MIN_CLIPS:
            raise UserError(
                f"the {split} split of {self._data.root} has {relation.num_pairs} pairs of data.relation="
                f"{self._data.relation.name}, fewer than {MIN_CLIPS}: add images"
            )

    def contents(self, labels: Collection[str]) -> Contents:
        relation = self._data.relation
        classes = {relation.label} if isinstance(relation, SameClassConfig) else set()
        return contents_of(self.pairs("train")[0], {*labels} | classes)

    def video_files(self, split: Split, steps: int) -> Iterator[Path]:
        """An image is not a video of several segments."""
        return iter(())


def load_images(data: ImagesConfig, split: Split) -> VideoIndex:
    """Return the index of a split's images.

    Raises:
        UserError: the root is a URL, there are no images, too many cannot be read, or there are too few to divide.
    """
    if is_url(data.root):
        raise UserError(f"data.root={data.root} is a URL: data.source=images reads folders, so copy the images first")
    options: dict[str, Any] = {"max_bad_fraction": data.max_bad_fraction, "max_frame_px": data.max_frame_px}
    index = load_split(data.root, split, format=ImageFiles(), **options)
    if index.share != (0.0, 1.0):
        raise UserError(
            f"data.root={data.root} has {len(index.videos)} images to divide, fewer than {MIN_VIDEOS_TO_DEAL}: add "
            "images, or make the folders train/, selection/ and test/"
        )
    return index


def make_relation(config: RelationConfig, root: Path, index: VideoIndex) -> Relation:
    """Return the relation that the config names, between the images of an index below `root`.

    Raises:
        UserError: the images lack the classes, or the file of pairs does not fit them.
    """
    if isinstance(config, SameClassConfig):
        return same_class(classes_of(index, config.label))
    if isinstance(config, PairsFileConfig):
        return listed_pairs(pairs_of_file(Path(config.path), root, index))
    return same_image(len(index.videos))
