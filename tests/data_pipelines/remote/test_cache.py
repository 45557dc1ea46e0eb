"""Shards from afar: networks that fail, caches that are small or shared, disks that are full."""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.clip_decoder import make_clip_set
from data_pipelines.clips import ClipSpec
from data_pipelines.errors import UserError
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.remote import stores
from data_pipelines.remote.cache import HeldShards, RemoteShards
from data_pipelines.remote.stores import Store
from data_pipelines.shards.index_file import SHARDS_NAME
from data_pipelines.shards.packing import pack_videos
from tests.conftest import REPO
from tests.data_pipelines.shard_server import ShardServer
from tests.data_pipelines.streams import make_stream, read_clips

SETTINGS: dict[str, Any] = {
    "size_px": None,
    "channels": 1,
    "batch_size": 8,
    "num_lanes": 4,
    "pool_clips": 8,
    "seed": 5,
}
FIRST = "shard-000000.tar"


@pytest.fixture(scope="module")
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
    return _index(server.url, tmp_path / "cache", slept)


def _index(url: str, cache: Path, slept: list[float], cache_mb: int = 8) -> VideoIndex:
    store = Store(url, sleep=slept.append, stall_s=0.3)
    return load_videos(url, cache_dir=cache, cache_mb=cache_mb, store=store, progress=False)


def _remote(index: VideoIndex, **changes: Any) -> RemoteShards:
    assert index.remote is not None
    return replace(index.remote, **changes)


def _epoch(index: VideoIndex, num_workers: int = 0, **changes: Any) -> list[tuple[list[int], str]]:
    """The clips of an epoch's batches, and a hash of their pixels."""
    stream = make_stream(index, ClipSpec(), **(SETTINGS | {"num_workers": num_workers} | changes))
    batches = stream.batches()
    try:
        return [
            (batch["clip_id"].tolist(), hashlib.sha256(batch["video"].numpy().tobytes()).hexdigest())
            for batch in islice(batches, stream.batches_per_epoch)
        ]
    finally:
        batches.close()


@pytest.fixture(scope="module")
def epoch(packed: VideoIndex) -> list[tuple[list[int], str]]:
    """An epoch of the plain files."""
    return _epoch(packed)


def _clips(epoch: list[tuple[list[int], str]]) -> list[int]:
    return sorted(clip for clips, _ in epoch for clip in clips)


def _files(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("*/*") if path.suffix != ".lock"}


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
    assert _epoch(index) == epoch
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
        _epoch(index, num_workers)
    assert "\n" not in str(raised.value)


def test_pauses_end_at_half_a_minute(server: ShardServer, index: VideoIndex, slept: list[float]) -> None:
    server.faults[FIRST] = [500] * 100
    with pytest.raises(UserError):
        _epoch(index)
    assert len(slept) == 7 and 15 <= slept[-1] <= 30 and 45 < sum(slept) < 91


def test_what_is_not_there_or_forbidden_is_not_asked_for_again(
    server: ShardServer, index: VideoIndex, slept: list[float]
) -> None:
    for status in (404, 403):
        server.faults[FIRST] = [status]
        with pytest.raises(UserError, match=f"{FIRST}' could not be fetched, tried once"):
            _epoch(index)
    assert server.requests.count(FIRST) == 2 and not slept


def test_an_index_that_is_missing_or_cannot_be_had_is_one_line(
    server: ShardServer, slept: list[float], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"holds no {SHARDS_NAME}: index a copy of the shards"):
        _index(f"{server.url}/elsewhere", tmp_path, slept)
    server.faults[SHARDS_NAME] = [503, "reset"]
    assert len(_index(server.url, tmp_path, slept).videos) == 48


def test_a_slow_network_is_not_taken_for_a_decoder_that_hangs(
    server: ShardServer, epoch: list[tuple[list[int], str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = load_videos(server.url, cache_dir=tmp_path, cache_mb=8, progress=False)
    server.faults[FIRST] = ["slow"]
    assert _epoch(index, 1, decode_timeout_s=0.5) == epoch
    assert not caplog.records


def test_a_shard_is_fetched_once_by_workers_and_ranks_that_share_a_cache(
    server: ShardServer, packed: VideoIndex, tmp_path: Path
) -> None:
    index = load_videos(server.url, cache_dir=tmp_path, cache_mb=8, progress=False)
    server.faults[FIRST] = ["slow"]
    ranks = [{"rank": rank, "world_size": 2, "num_workers": 2, "num_lanes": 8} for rank in range(2)]
    with ThreadPool(2) as pool:
        halves = pool.map(lambda rank: _epoch(index, **rank), ranks)
    assert _clips(halves[0] + halves[1]) == _clips(_epoch(packed, num_lanes=8))
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
    remote = _remote(index)
    a, b, c, d = (remote.shards[name] for name in sorted(remote.shards)[:4])
    small = replace(remote, max_bytes=a.size_bytes + b.size_bytes + c.size_bytes)
    in_use = small.pin(a.name)
    for shard in (b, c, b):
        small.pin(shard.name).close()
        time.sleep(0.01)
    small.pin(d.name).close()
    assert {a.name, d.name} <= _files(tmp_path / "cache") and c.name not in _files(tmp_path / "cache")
    in_use.close()
    sizes = [path.stat().st_size for path in (tmp_path / "cache").glob("*/*.tar")]
    assert sum(sizes) <= small.max_bytes


def test_a_lane_lets_go_of_one_shard_before_it_takes_the_next(
    index: VideoIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remote = _remote(index)
    a, b = sorted(remote.shards)[:2]
    held = HeldShards(replace(remote, max_bytes=max(remote.shards[name].size_bytes for name in (a, b))))
    for name in (a, b, b, a):
        held.hold(0, name)
        assert _files(tmp_path / "cache") == {name}
    assert not caplog.records
    held.hold(1, b)
    assert _files(tmp_path / "cache") == {a, b} and "all of it is in use" in caplog.text
    held.close()


def test_a_small_cache_changes_no_batch(
    server: ShardServer,
    index: VideoIndex,
    epoch: list[tuple[list[int], str]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sizes = sorted(shard.size_bytes for shard in _remote(index).shards.values())
    for num_workers, num_held in ((0, 5), (2, 6)):
        small = replace(index, remote=_remote(index, max_bytes=sum(sizes[-num_held:])))
        assert _epoch(small, num_workers) == epoch
        kept = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*.tar"))
        assert kept <= sum(sizes[-num_held:]) and not caplog.records  # the bound never gave way
    assert len([name for name in server.requests if name.endswith(".tar")]) > len(sizes)  # some came twice


def test_a_cache_that_cannot_hold_what_is_in_use_is_refused(index: VideoIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four lanes and one ahead for each of two workers."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    sizes = sorted(shard.size_bytes for shard in _remote(index).shards.values())
    for num_workers, needed in ((0, 5), (1, 5), (2, 6)):
        fits = replace(index, remote=_remote(index, max_bytes=sum(sizes[-needed:])))
        make_stream(fits, ClipSpec(), **SETTINGS, num_workers=num_workers)
        tight = replace(index, remote=_remote(index, max_bytes=sum(sizes[-needed:]) - 1))
        with pytest.raises(UserError, match=rf"remote_cache_mb=0 cannot hold the {needed} shards.* at least 1,"):
            make_stream(tight, ClipSpec(), **SETTINGS, num_workers=num_workers)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # of four hosts, each has one lane
    make_stream(tight, ClipSpec(), **SETTINGS, rank=1, world_size=4, num_workers=0)


@pytest.mark.parametrize("times", [1, 100])
def test_a_full_disk_loses_what_is_not_in_use_or_is_one_line(
    index: VideoIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    remote = _remote(index)
    names = sorted(remote.shards)
    in_use = remote.pin(names[0])
    remote.pin(names[1]).close()
    failures = iter([OSError(errno.ENOSPC, "No space left on device")] * times)

    def write_all(out: Any, chunk: bytes) -> None:
        if error := next(failures, None):
            raise error
        out.write(chunk)

    monkeypatch.setattr(stores, "write_all", write_all)
    if times == 1:
        remote.pin(names[2]).close()
        assert _files(tmp_path / "cache") == {names[0], names[2]}
    else:
        with pytest.raises(UserError, match=rf"'{names[2]}' of [\d,]+ bytes cannot be written \(No space left"):
            remote.pin(names[2])
        assert _files(tmp_path / "cache") == {names[0]}
    in_use.close()


KILLED = """
import json, sys
from pathlib import Path
from data_pipelines.formats.registry import load_videos

url, cache, name = json.loads(sys.argv[1])
index = load_videos(url, cache_dir=Path(cache), cache_mb=8, progress=False)
print("ready", flush=True)
index.remote.pin(name)
"""


def test_what_a_process_killed_while_it_fetched_left_is_cleaned_up(
    server: ShardServer, index: VideoIndex, tmp_path: Path
) -> None:
    remote = _remote(index)
    server.faults[FIRST] = ["stall"]
    command = [sys.executable, "-c", KILLED, json.dumps([server.url, str(tmp_path / "cache"), FIRST])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPO) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for _ in range(500):
            if FIRST in server.requests:
                break
            time.sleep(0.01)
        assert _files(tmp_path / "cache") == {f"{FIRST}.partial"}
        others = sorted(remote.shards)[1:]
        remote.pin(others[0]).close()
        assert _files(tmp_path / "cache") == {f"{FIRST}.partial", others[0]}  # it is still being fetched
        process.kill()
    remote.pin(others[1]).close()
    assert _files(tmp_path / "cache") == set(others[:2])
    remote.pin(FIRST).close()
    assert (remote.folder / FIRST).stat().st_size == remote.shards[FIRST].size_bytes


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
    assert _epoch(index, 1) == epoch
    killer.join()


def test_a_cached_shard_of_another_size_is_fetched_again(server: ShardServer, index: VideoIndex) -> None:
    remote = _remote(index)
    remote.pin(FIRST).close()
    with open(remote.folder / FIRST, "ab") as tar:
        tar.write(b"x")
    with remote.pin(FIRST) as pin:
        assert os.fstat(pin.fileno()).st_size == remote.shards[FIRST].size_bytes
        with open(remote.folder / FIRST, "rb") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert server.requests.count(FIRST) == 2


@pytest.mark.parametrize("what", ["shard", "folder", "cache", "cache, by a process that begins again"])
def test_a_shard_is_fetched_again_if_the_cache_is_removed_meanwhile(
    server: ShardServer, index: VideoIndex, packed: VideoIndex, what: str
) -> None:
    """A file that another process has begun since then is not taken for the shard."""
    remote, whole = _remote(index), (packed.root / FIRST).read_bytes()
    partial = remote.folder / f"{FIRST}.partial"

    def remove_and_answer(handler: BaseHTTPRequestHandler) -> None:
        if what == "shard":
            partial.unlink()
        else:
            shutil.rmtree(remote.folder if what == "folder" else remote.cache_dir)
        if what.endswith("again"):
            remote.folder.mkdir(parents=True)
            partial.write_bytes(bytes(len(whole)))
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(whole)))
        handler.end_headers()
        handler.wfile.write(whole)

    server.faults[FIRST] = [remove_and_answer]
    with remote.pin(FIRST) as pin:
        assert pin.read() == whole
    assert server.requests.count(FIRST) == 2 and _files(remote.cache_dir) == {FIRST}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_clip_is_lost_if_the_cache_is_removed_between_batches(
    index: VideoIndex, epoch: list[tuple[list[int], str]], num_workers: int
) -> None:
    """Of the shards that lanes hold, and of those that were fetched ahead."""
    remote = _remote(index)
    stream = make_stream(index, ClipSpec(), **(SETTINGS | {"num_workers": num_workers}))
    shown = []
    with closing(stream.batches()) as batches:
        for _ in range(stream.batches_per_epoch):
            batch = next(batches)
            shown.append((batch["clip_id"].tolist(), hashlib.sha256(batch["video"].numpy().tobytes()).hexdigest()))
            shutil.rmtree(remote.cache_dir, ignore_errors=True)
    assert shown == epoch


def test_a_shard_that_was_removed_is_held_again(server: ShardServer, index: VideoIndex) -> None:
    """Before each group of clips, also if the lane holds it or it was fetched ahead."""
    remote = _remote(index)
    first, second = sorted(remote.shards)[:2]
    with closing(HeldShards(remote)) as held:
        held.expect([(0, first), (0, second)])
        held.hold(0, first)
        while not (remote.folder / second).is_file():
            time.sleep(0.001)
        shutil.rmtree(remote.cache_dir)
        held.hold(0, first)
        assert (remote.folder / first).is_file()
        held.hold(0, second)
        assert (remote.folder / second).is_file()
    assert server.requests.count(first) == server.requests.count(second) == 2


def test_a_cache_folder_that_cannot_be_written_is_one_line(server: ShardServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    index = load_videos(server.url, cache_dir=tmp_path / "file", cache_mb=8, progress=False)
    with pytest.raises(UserError, match=r"remote_cache_dir='.*file' cannot be used"):
        _epoch(index)


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_cache_folder_without_locks_is_one_line(
    server: ShardServer, index: VideoIndex, monkeypatch: pytest.MonkeyPatch, is_cached: bool
) -> None:
    """As on some network file systems."""
    remote = _remote(index)
    if is_cached:
        remote.pin(FIRST).close()

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    message = r"^remote_cache_dir='.*cache' cannot be used \(Function not implemented\): name another folder$"
    with pytest.raises(UserError, match=message):
        remote.pin(FIRST)
    assert server.requests.count(FIRST) == is_cached


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
        index = _index("s3://videos/some/where", tmp_path, [])
        assert _epoch(index, 2) == epoch
        bucket.rm(f"videos/some/where/{FIRST}")
        again = _index("s3://videos/some/where", tmp_path / "other", [])
        with pytest.raises(UserError, match=f"{FIRST}' could not be fetched, tried once"):
            _epoch(again, 1)
        with pytest.raises(UserError, match=f"holds no {SHARDS_NAME}"):
            _index("s3://videos/elsewhere", tmp_path, [])
    finally:
        server.stop()


def test_nothing_but_shards_of_ours_is_removed_from_the_folder_of_the_cache(index: VideoIndex, tmp_path: Path) -> None:
    """A config may name any folder as the cache, also one that holds tars of the user."""
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    mine = [
        cache / "backups" / "mine.tar",
        cache / "backups" / "mine.tar.partial",
        cache / "0123456789abcdef" / "mine.tar",  # without a lock
        elsewhere / "mine.tar",
        elsewhere / "mine.tar.lock",
    ]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
    (cache / "fedcba9876543210").symlink_to(elsewhere)
    remote = _remote(index, max_bytes=0)
    for name in sorted(remote.shards)[:2]:
        remote.pin(name).close()
    assert all(path.read_bytes() == b"mine" for path in mine)
    assert _files(cache) - {"mine.tar", "mine.tar.partial"} == {sorted(remote.shards)[1]}


@pytest.mark.parametrize("name", [FIRST, f"{FIRST}.lock", f"{FIRST}.partial", "../lock"])
@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_the_cache_writes_through_no_link_and_waits_for_no_fifo(
    index: VideoIndex, tmp_path: Path, name: str, kind: str
) -> None:
    """Others may have left them in a cache below /tmp."""
    remote = _remote(index)
    precious = tmp_path / "precious"
    precious.write_bytes(b"x" * remote.shards[FIRST].size_bytes)
    remote.folder.mkdir(parents=True)
    if kind == "link":
        (remote.folder / name).symlink_to(precious)
    else:
        os.mkfifo(remote.folder / name)
    try:
        with remote.pin(FIRST) as pin:
            assert hashlib.sha256(pin.read()).hexdigest() == remote.shards[FIRST].sha256
    except UserError as error:
        assert re.search(r"remote_cache_dir='.*cache'", str(error)) and "\n" not in str(error)
    assert precious.read_bytes() == b"x" * remote.shards[FIRST].size_bytes


def test_a_folder_of_the_cache_that_is_a_link_is_refused(index: VideoIndex, tmp_path: Path) -> None:
    remote = _remote(index)
    (tmp_path / "elsewhere").mkdir()
    remote.cache_dir.mkdir()
    remote.folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"cannot be used .*{remote.folder.name} in it is a link"):
        remote.pin(FIRST)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_new_cache_is_for_its_owner_alone(index: VideoIndex, tmp_path: Path) -> None:
    remote = _remote(index)
    remote.pin(FIRST).close()
    assert remote.cache_dir.stat().st_mode & 0o777 == 0o700
