"""Streams from settings by name, as most tests of batches need them."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

from data_pipelines.batches import Batch
from data_pipelines.clips import ClipSpec
from data_pipelines.index import VideoIndex
from data_pipelines.stream import ReadSettings, StreamSettings, VideoStream, read_all

SPEC = ClipSpec()
SETTINGS: dict[str, Any] = {
    "size_px": None,
    "channels": 1,
    "batch_size": 16,
    "num_lanes": 8,
    "pool_clips": 64,
    "seed": 3,
}
"""Those of most streams of `mixed_folder` (conftest.py)."""


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


def mixed_stream(index: VideoIndex, spec: ClipSpec = SPEC, **changes: Any) -> VideoStream:
    """Return a stream with SETTINGS but for changes."""
    return make_stream(index, spec, **(SETTINGS | changes))


def take(stream: VideoStream, count: int, start_batch: int = 0) -> list[Batch]:
    """Return this number of batches of a stream."""
    batches = stream.batches(start_batch)
    try:
        return list(islice(batches, count))
    finally:
        batches.close()


def batch_hash(batch: Batch) -> str:
    """Return a hash of the pixels and the ids of a batch."""
    digest = hashlib.sha256(batch["video"].numpy().tobytes())
    digest.update(batch["clip_id"].numpy().tobytes())
    return digest.hexdigest()[:16]
