"""Streams from settings by name, as most tests of batches need them."""

from collections.abc import Iterator
from typing import Any

from data_pipelines.batches import Batch
from data_pipelines.clips import ClipSpec
from data_pipelines.index import VideoIndex
from data_pipelines.stream import ReadSettings, StreamSettings, VideoStream, read_all


def make_stream(
    index: VideoIndex, spec: ClipSpec, *, rank: int = 0, world_size: int = 1, **settings: Any
) -> VideoStream:
    """Return a stream with these fields of StreamSettings."""
    return VideoStream(index, spec, StreamSettings(**settings), rank=rank, world_size=world_size)


def read_clips(
    index: VideoIndex,
    spec: ClipSpec,
    *,
    max_clips: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    **settings: Any,
) -> Iterator[Batch]:
    """Return the batches of one pass with these fields of ReadSettings."""
    return read_all(index, spec, ReadSettings(**settings), max_clips=max_clips, rank=rank, world_size=world_size)
