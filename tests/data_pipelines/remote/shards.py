"""Remote shards as the tests of their cache read them."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipelines.clips import ClipSpec
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.remote.cache import RemoteShards
from data_pipelines.remote.stores import Store
from tests.data_pipelines.streams import make_stream, take

SETTINGS: dict[str, Any] = {
    "size_px": None,
    "channels": 1,
    "batch_size": 8,
    "num_lanes": 4,
    "pool_clips": 8,
    "seed": 5,
}
FIRST = "shard-000000.tar"


def open_index(url: str, cache: Path, slept: list[float], cache_mb: int = 8) -> VideoIndex:
    store = Store(url, sleep=slept.append, stall_s=0.3)
    return load_videos(url, cache_dir=cache, cache_mb=cache_mb, store=store, progress=False)


def remote_of(index: VideoIndex, **changes: Any) -> RemoteShards:
    assert index.remote is not None
    return replace(index.remote, **changes)


def epoch_of(index: VideoIndex, num_workers: int = 0, **changes: Any) -> list[tuple[list[int], str]]:
    """The clips of an epoch's batches, and a hash of their pixels."""
    stream = make_stream(index, ClipSpec(), **(SETTINGS | {"num_workers": num_workers} | changes))
    return [
        (batch["clip_id"].tolist(), hashlib.sha256(batch["video"].numpy().tobytes()).hexdigest())
        for batch in take(stream, stream.batches_per_epoch)
    ]


def clips_of_epoch(epoch: list[tuple[list[int], str]]) -> list[int]:
    return sorted(clip for clips, _ in epoch for clip in clips)


def files_in(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("*/*") if path.suffix != ".lock"}
