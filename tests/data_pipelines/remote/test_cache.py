"""Shards from afar: networks that fail, and caches that are small or shared."""

import multiprocessing
import os
import re
import signal
import threading
import time
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.clip_decoder import make_clip_set
from data_pipelines.clips import ClipSpec
from data_pipelines.errors import UserError
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.remote.cache import HeldShards
from data_pipelines.shards.index_file import SHARDS_NAME
from tests.data_pipelines.remote.shards import (
    FIRST,
    SETTINGS,
    clips_of_epoch,
    epoch_of,
    files_in,
    open_index,
    remote_of,
)
from tests.data_pipelines.shard_server import ShardServer
from tests.data_pipelines.streams import make_stream, read_clips


def test_pixels_are_those_of_the_plain_files(index: VideoIndex, packed: VideoIndex, read_numbers: Any) -> None:
    """Videos are numbered in the order of their names."""
    assert index.videos == packed.videos and index.content_hash == packed.content_hash
    shown = []
    for batch in read_clips(index, ClipSpec(), size_px=None, channels=1, batch_size=10):
        for clip, video in zip(batch["clip_id"].tolist(), batch["video"], strict=True):
            number = int(index.videos[clip].path[:2])
            assert [read_numbers(frame) for frame in video] == [(number, frame) for frame in range(9)]
            shown.append(number)
    assert sorted(shown) == list(range(48))


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        (["reset"], "."),
        (["stall"], "[Tt]imeout"),
        (["short"], r"it sends [\d,]+ of [\d,]+ bytes"),
        (["long"], "it sends more than"),
        (["corrupt"], r"its bytes differ from those that were indexed \(sha256\)"),
        ([503, 503], "503"),
        ([429], "429"),
        (["reset", "corrupt", 500], "500"),
    ],
)
def test_a_failure_that_passes_is_survived(
    server: ShardServer,
    index: VideoIndex,
    epoch: list[tuple[list[int], str]],
    slept: list[float],
    caplog: pytest.LogCaptureFixture,
    faults: list[int | str],
    reason: str,
) -> None:
    server.faults[FIRST] = list(faults)
    assert epoch_of(index) == epoch
    assert len(slept) == len(faults)
    for number, pause_s in enumerate(slept):
        assert 0.5 * 2**number <= pause_s < 2**number
    assert server.requests.count(FIRST) == len(faults) + 1
    warnings = [record.getMessage() for record in caplog.records if "trying again" in record.getMessage()]
    assert len(warnings) == len(faults) and FIRST in warnings[0]
    assert any(re.search(reason, warning) for warning in warnings)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("fault", "message"), [("corrupt", "tried 8 times: its bytes differ from those"), (503, "tried 8 times: 503")]
)
def test_a_failure_that_stays_ends_the_run_in_one_line(
    server: ShardServer, index: VideoIndex, fault: int | str, message: str, num_workers: int
) -> None:
    server.faults[FIRST] = [fault] * 100
    with pytest.raises(
        UserError, match=f"{FIRST}' could not be fetched, {message}.*nothing was skipped, so the run can be resumed"
    ) as raised:
        epoch_of(index, num_workers)
    assert "\n" not in str(raised.value)


def test_pauses_end_at_half_a_minute(server: ShardServer, index: VideoIndex, slept: list[float]) -> None:
    server.faults[FIRST] = [500] * 100
    with pytest.raises(UserError):
        epoch_of(index)
    assert len(slept) == 7 and 15 <= slept[-1] <= 30 and 45 < sum(slept) < 91


def test_what_is_not_there_or_forbidden_is_not_asked_for_again(
    server: ShardServer, index: VideoIndex, slept: list[float]
) -> None:
    for status in (404, 403):
        server.faults[FIRST] = [status]
        with pytest.raises(UserError, match=f"{FIRST}' could not be fetched, tried once"):
            epoch_of(index)
    assert server.requests.count(FIRST) == 2 and not slept


def test_an_index_that_is_missing_or_cannot_be_had_is_one_line(
    server: ShardServer, slept: list[float], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"holds no {SHARDS_NAME}: index a copy of the shards"):
        open_index(f"{server.url}/elsewhere", tmp_path, slept)
    server.faults[SHARDS_NAME] = [503, "reset"]
    assert len(open_index(server.url, tmp_path, slept).videos) == 48


def test_a_slow_network_is_not_taken_for_a_decoder_that_hangs(
    server: ShardServer, epoch: list[tuple[list[int], str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = load_videos(server.url, cache_dir=tmp_path, cache_mb=8, progress=False)
    server.faults[FIRST] = ["slow"]
    assert epoch_of(index, 1, decode_timeout_s=0.5) == epoch
    assert not caplog.records


def test_a_shard_is_fetched_once_by_workers_and_ranks_that_share_a_cache(
    server: ShardServer, packed: VideoIndex, tmp_path: Path
) -> None:
    index = load_videos(server.url, cache_dir=tmp_path, cache_mb=8, progress=False)
    server.faults[FIRST] = ["slow"]
    ranks = [{"rank": rank, "world_size": 2, "num_workers": 2, "num_lanes": 8} for rank in range(2)]
    with ThreadPool(2) as pool:
        halves = pool.map(lambda rank: epoch_of(index, **rank), ranks)
    assert clips_of_epoch(halves[0] + halves[1]) == clips_of_epoch(epoch_of(packed, num_lanes=8))
    fetched = [name for name in server.requests if name.endswith(".tar")]
    assert len(fetched) == len(set(fetched))


def test_the_next_shard_is_fetched_while_one_is_decoded_and_no_more(server: ShardServer, index: VideoIndex) -> None:
    shards = sorted({video.shard for video in index.videos})
    held = HeldShards(index.remote)
    held.expect([(0, shards[3]), (1, shards[3]), (0, shards[1]), (1, shards[2])])

    def requested(count: int) -> list[str]:
        for _ in range(200):
            if len(server.requests) > count:
                break
            time.sleep(0.01)
        time.sleep(0.05)
        return server.requests[1:]

    held.hold(0, shards[3])
    assert requested(2) == [shards[3], shards[1]]
    held.hold(1, shards[3])
    assert requested(2) == [shards[3], shards[1]]
    held.hold(0, shards[1])
    assert requested(3) == [shards[3], shards[1], shards[2]]
    held.close()


def test_an_epoch_may_begin_with_the_shard_that_ended_the_one_before(server: ShardServer, index: VideoIndex) -> None:
    a, b, c, d = sorted({video.shard for video in index.videos})[:4]
    held = HeldShards(index.remote)

    def ahead() -> str | None:
        """The shard that is being fetched ahead, once it is there."""
        if held._ahead is None:
            return None
        held._ahead[1].result(timeout=30)
        return held._ahead[0]

    held.expect([(0, a), (0, b)])
    for shard, expected in ((a, b), (b, None)):
        held.hold(0, shard)
        assert ahead() == expected
    held.expect([(0, b), (0, c), (0, a), (0, d)])
    for shard, expected in ((b, c), (c, a), (a, d), (d, None)):
        held.hold(0, shard)
        assert ahead() == expected
    held.hold(0, d)  # it is held, and not planned again
    assert ahead() is None
    held.close()
    assert server.requests == [SHARDS_NAME, a, b, c, d]  # a is in the cache


def test_the_cache_keeps_to_its_bound_without_what_was_used_least_recently(
    server: ShardServer, index: VideoIndex, tmp_path: Path
) -> None:
    remote = remote_of(index)
    a, b, c, d = (remote.shards[name] for name in sorted(remote.shards)[:4])
    small = replace(remote, max_bytes=a.size_bytes + b.size_bytes + c.size_bytes)
    in_use = small.pin(a.name)
    for shard in (b, c, b):
        small.pin(shard.name).close()
        time.sleep(0.01)
    small.pin(d.name).close()
    assert {a.name, d.name} <= files_in(tmp_path / "cache") and c.name not in files_in(tmp_path / "cache")
    in_use.close()
    sizes = [path.stat().st_size for path in (tmp_path / "cache").glob("*/*.tar")]
    assert sum(sizes) <= small.max_bytes


def test_a_lane_lets_go_of_one_shard_before_it_takes_the_next(
    index: VideoIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remote = remote_of(index)
    a, b = sorted(remote.shards)[:2]
    held = HeldShards(replace(remote, max_bytes=max(remote.shards[name].size_bytes for name in (a, b))))
    for name in (a, b, b, a):
        held.hold(0, name)
        assert files_in(tmp_path / "cache") == {name}
    assert not caplog.records
    held.hold(1, b)
    assert files_in(tmp_path / "cache") == {a, b} and "all of it is in use" in caplog.text
    held.close()


def test_a_small_cache_changes_no_batch(
    server: ShardServer,
    index: VideoIndex,
    epoch: list[tuple[list[int], str]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sizes = sorted(shard.size_bytes for shard in remote_of(index).shards.values())
    for num_workers, num_held in ((0, 5), (2, 6)):
        small = replace(index, remote=remote_of(index, max_bytes=sum(sizes[-num_held:])))
        assert epoch_of(small, num_workers) == epoch
        kept = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*.tar"))
        assert kept <= sum(sizes[-num_held:]) and not caplog.records  # the bound never gave way
    assert len([name for name in server.requests if name.endswith(".tar")]) > len(sizes)  # some came twice


def test_a_cache_that_cannot_hold_what_is_in_use_is_refused(index: VideoIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four lanes and one ahead for each of two workers."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    sizes = sorted(shard.size_bytes for shard in remote_of(index).shards.values())
    for num_workers, needed in ((0, 5), (1, 5), (2, 6)):
        fits = replace(index, remote=remote_of(index, max_bytes=sum(sizes[-needed:])))
        make_stream(fits, ClipSpec(), **SETTINGS, num_workers=num_workers)
        tight = replace(index, remote=remote_of(index, max_bytes=sum(sizes[-needed:]) - 1))
        with pytest.raises(UserError, match=rf"remote_cache_mb=0 cannot hold the {needed} shards.* at least 1,"):
            make_stream(tight, ClipSpec(), **SETTINGS, num_workers=num_workers)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # of four hosts, each has one lane
    make_stream(tight, ClipSpec(), **SETTINGS, rank=1, world_size=4, num_workers=0)


def test_a_worker_killed_while_it_fetches_is_replaced(
    server: ShardServer, epoch: list[tuple[list[int], str]], tmp_path: Path
) -> None:
    index = load_videos(server.url, cache_dir=tmp_path, cache_mb=8, progress=False)
    names = sorted({video.shard for video in index.videos})
    for name in names:
        server.faults[name] = ["stall"]  # for as long as the server lives, but for the kill
    before = set(multiprocessing.active_children())

    def kill() -> None:
        while not any(name in server.requests for name in names):
            time.sleep(0.01)
        server.faults.clear()
        for child in set(multiprocessing.active_children()) - before:
            os.kill(child.pid or 0, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    assert epoch_of(index, 1) == epoch
    killer.join()


def test_shards_follow_each_other_in_a_lane(packed: VideoIndex) -> None:
    source = make_clip_set(packed, ClipSpec(), size_px=None, channels=1, decoder="pyav")
    first = source.table.first_clip_of_shard
    assert first is not None and first[-1] == 48
    assert [packed.videos[clip].shard for clip in first[:-1]] == sorted({video.shard for video in packed.videos})


def test_s3(
    packed: VideoIndex, epoch: list[tuple[list[int], str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moto_server = pytest.importorskip("moto.server")
    import fsspec

    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    server = moto_server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        bucket = fsspec.filesystem("s3", skip_instance_cache=True)
        bucket.mkdir("videos")
        bucket.put(f"{packed.root}/", "videos/some/where/", recursive=True)
        index = open_index("s3://videos/some/where", tmp_path, [])
        assert epoch_of(index, 2) == epoch
        bucket.rm(f"videos/some/where/{FIRST}")
        again = open_index("s3://videos/some/where", tmp_path / "other", [])
        with pytest.raises(UserError, match=f"{FIRST}' could not be fetched, tried once"):
            epoch_of(again, 1)
        with pytest.raises(UserError, match=f"holds no {SHARDS_NAME}"):
            open_index("s3://videos/elsewhere", tmp_path, [])
    finally:
        server.stop()
