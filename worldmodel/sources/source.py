"""The protocol of a source of clips."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from data_pipelines.batches import Batch, BatchStream
from data_pipelines.contents import Contents
from data_pipelines.splits import Split
from data_pipelines.worlds.law import Law

EVALUATION_BATCH = 128
"""Clips in a batch of an evaluation."""
MIN_CLIPS = 2
"""Least number of clips in a split: fewer have no spread to compare with."""

Content = Literal["frames", "factors"]


class FactorWorld(Protocol):
    """A generator of observations with known factors."""

    def draw_batch(self, count: int, generator: torch.Generator, width: float = 1.0) -> Batch:
        """Draw "video" [B, S, C, 1, 1] and "labels", among them the factors [B, F] of standard deviation `width`."""


@dataclass(frozen=True)
class ClipPlaces:
    """The place of each of N clips in its video: int64 `video` [N] and `first_frame` [N].

    A video has the same number in all splits that share it. span_frames: source frames from the first frame of a clip
    to its last one, inclusive.
    """

    video: Tensor
    first_frame: Tensor
    span_frames: int


class Source(Protocol):
    """Clips for training and evaluation, in three splits of disjoint identities: "train", "selection" and "test".

    A clip for n steps of prediction has num_segments + n - 1 segments.

    content: "frames" if clips are pictures with values in [0, 1] or 0..255; "factors" if they are observations of known
        factors, which have any values.
    """

    content: Content

    def __init__(self, data: Any, *, seed: int, evaluation_seed: int) -> None:
        """Store the `data` section of a config, and the seeds of training and of evaluation."""

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """C, H, W of a frame."""

    @property
    def url(self) -> str | None:
        """The URL from which videos are read; None if nothing is read over a network."""

    @property
    def factors(self) -> FactorWorld | None:
        """The generator of a source with content "factors"."""

    def training_stream(
        self, steps: int, *, rank: int, world_size: int, device: torch.device, clip_step: int | None = None
    ) -> BatchStream:
        """Return the endless stream of one process's training batches, of clips for `steps` steps of prediction.

        clip_step: source frames between the starts of successive clips, in place of the config's.

        Raises:
            UserError: the data cannot be read, or the number of processes does not divide a batch.
        """

    def evaluation_batches(
        self, split: Split, num_clips: int, horizon: int = 1, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """Yield `num_clips` clips of a split in a fixed order, or all clips if there are fewer.

        A clip is long enough for `horizon` steps of prediction. A rank gets its share; rank after rank, the shares
        are all clips. No batch is empty.

        Raises:
            UserError: the data cannot be read.
        """

    def clip_places(self, split: Split, clip_id: Tensor, horizon: int = 1) -> ClipPlaces:
        """Return the places of the clips with these ids [N] that `evaluation_batches` yields for the same horizon."""

    def known_law(self, split: Split, horizon: int) -> Law | None:
        """Return the true law of a split's clips; None if it is unknown or does not hold for these clips."""

    def check_split(self, split: Split, steps: int, labels: Collection[str], keys: str) -> None:
        """Check that a split has clips for `steps` steps of prediction, and that the labels among `labels` are valid.

        keys: the keys of the config to lower if its videos are too short.

        Raises:
            UserError: no video is long enough, or a label is faulty. The message names the split.
        """

    def contents(self, labels: Collection[str]) -> Contents | None:
        """Return hashes of the training videos and of `labels`; None for a source without files."""

    def video_files(self, split: Split, steps: int) -> Iterator[Path]:
        """Yield the plain video files of a split that are as long as one clip for `steps` steps of prediction.

        There are none for frames of several cameras, which no single file holds.
        """


class Generated:
    """The part of a Source that is the same for all worlds without files."""

    @property
    def url(self) -> None:
        return None

    def check_split(self, split: Split, steps: int, labels: Collection[str], keys: str) -> None:
        """A generated world has any number of clips, and valid labels."""

    def clip_places(self, split: Split, clip_id: Tensor, horizon: int = 1) -> ClipPlaces:
        """Each clip of a generated world is a video of its own."""
        return ClipPlaces(clip_id, torch.zeros_like(clip_id), 1)

    def contents(self, labels: Collection[str]) -> None:
        return None

    def video_files(self, split: Split, steps: int) -> Iterator[Path]:
        return iter(())


def take_clips(stream: BatchStream, batch_size: int, clips: slice) -> Iterator[Batch]:
    """Yield the clips numbered `clips` of a generated stream, in batches of up to `batch_size`."""
    firsts = range(clips.start // batch_size * batch_size, clips.stop, batch_size)
    for first, batch in zip(firsts, stream.batches(firsts.start // batch_size), strict=False):
        rows = slice(max(0, clips.start - first), clips.stop - first)
        if len(batch["video"][rows]):
            yield _rows(batch, rows)


def _rows(batch: Batch, rows: slice) -> Batch:
    return {
        "video": batch["video"][rows],
        "clip_id": batch["clip_id"][rows],
        "row": batch["row"][rows],
        "labels": {name: values[rows] for name, values in batch["labels"].items()},
    }
