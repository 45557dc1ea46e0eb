"""Fixtures of remote shards: videos in shards, a server of them, and their index with a cache."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.index import VideoIndex
from data_pipelines.shards.packing import pack_videos
from tests.data_pipelines.remote.shards import epoch_of, open_index
from tests.data_pipelines.shard_server import ShardServer


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory, write_video: Any) -> VideoIndex:
    """48 videos in a dozen shards."""
    source = tmp_path_factory.mktemp("source")
    for video in range(48):
        write_video(source / f"{video:02d}.mp4", video=video)
    index = pack_videos(source, tmp_path_factory.mktemp("shards"), shard_mb=0.008, progress=False)
    assert 8 <= len({video.shard for video in index.videos}) <= 16
    return index


@pytest.fixture
def server(packed: VideoIndex) -> Iterator[ShardServer]:
    with ShardServer(packed.root) as server:
        yield server


@pytest.fixture
def slept() -> list[float]:
    return []


@pytest.fixture
def index(server: ShardServer, slept: list[float], tmp_path: Path) -> VideoIndex:
    return open_index(server.url, tmp_path / "cache", slept)


@pytest.fixture(scope="session")
def epoch(packed: VideoIndex) -> list[tuple[list[int], str]]:
    """An epoch of the plain files."""
    return epoch_of(packed)
