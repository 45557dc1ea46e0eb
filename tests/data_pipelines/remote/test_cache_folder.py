"""The folder of the cache: full disks, files that are removed or left over, links, rights and locks."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.clips import ClipSpec
from data_pipelines.errors import UserError
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.remote import stores
from data_pipelines.remote.cache import HeldShards
from tests.conftest import REPO
from tests.data_pipelines.remote.shards import (
    FIRST,
    SETTINGS,
    epoch_of,
    files_in,
    remote_of,
)
from tests.data_pipelines.shard_server import ShardServer
from tests.data_pipelines.streams import make_stream


@pytest.mark.parametrize("times", [1, 100])
def test_a_full_disk_loses_what_is_not_in_use_or_is_one_line(
    index: VideoIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    remote = remote_of(index)
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
        assert files_in(tmp_path / "cache") == {names[0], names[2]}
    else:
        with pytest.raises(UserError, match=rf"'{names[2]}' of [\d,]+ bytes cannot be written \(No space left"):
            remote.pin(names[2])
        assert files_in(tmp_path / "cache") == {names[0]}
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
    remote = remote_of(index)
    server.faults[FIRST] = ["stall"]
    command = [sys.executable, "-c", KILLED, json.dumps([server.url, str(tmp_path / "cache"), FIRST])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPO) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for _ in range(500):
            if FIRST in server.requests:
                break
            time.sleep(0.01)
        assert files_in(tmp_path / "cache") == {f"{FIRST}.partial"}
        others = sorted(remote.shards)[1:]
        remote.pin(others[0]).close()
        assert files_in(tmp_path / "cache") == {f"{FIRST}.partial", others[0]}  # it is still being fetched
        process.kill()
    remote.pin(others[1]).close()
    assert files_in(tmp_path / "cache") == set(others[:2])
    remote.pin(FIRST).close()
    assert (remote.folder / FIRST).stat().st_size == remote.shards[FIRST].size_bytes


def test_a_cached_shard_of_another_size_is_fetched_again(server: ShardServer, index: VideoIndex) -> None:
    remote = remote_of(index)
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
    remote, whole = remote_of(index), (packed.root / FIRST).read_bytes()
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
    assert server.requests.count(FIRST) == 2 and files_in(remote.cache_dir) == {FIRST}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_clip_is_lost_if_the_cache_is_removed_between_batches(
    index: VideoIndex, epoch: list[tuple[list[int], str]], num_workers: int
) -> None:
    """Of the shards that lanes hold, and of those that were fetched ahead."""
    remote = remote_of(index)
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
    remote = remote_of(index)
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
        epoch_of(index)


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_cache_folder_without_locks_is_one_line(
    server: ShardServer, index: VideoIndex, monkeypatch: pytest.MonkeyPatch, is_cached: bool
) -> None:
    """As on some network file systems."""
    remote = remote_of(index)
    if is_cached:
        remote.pin(FIRST).close()

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    message = r"^remote_cache_dir='.*cache' cannot be used \(Function not implemented\): name another folder$"
    with pytest.raises(UserError, match=message):
        remote.pin(FIRST)
    assert server.requests.count(FIRST) == is_cached


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
    remote = remote_of(index, max_bytes=0)
    for name in sorted(remote.shards)[:2]:
        remote.pin(name).close()
    assert all(path.read_bytes() == b"mine" for path in mine)
    assert files_in(cache) - {"mine.tar", "mine.tar.partial"} == {sorted(remote.shards)[1]}


@pytest.mark.parametrize("name", [FIRST, f"{FIRST}.lock", f"{FIRST}.partial", "../lock"])
@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_the_cache_writes_through_no_link_and_waits_for_no_fifo(
    index: VideoIndex, tmp_path: Path, name: str, kind: str
) -> None:
    """Others may have left them in a cache below /tmp."""
    remote = remote_of(index)
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
    remote = remote_of(index)
    (tmp_path / "elsewhere").mkdir()
    remote.cache_dir.mkdir()
    remote.folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"cannot be used .*{remote.folder.name} in it is a link"):
        remote.pin(FIRST)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_new_cache_is_for_its_owner_alone(index: VideoIndex, tmp_path: Path) -> None:
    remote = remote_of(index)
    remote.pin(FIRST).close()
    assert remote.cache_dir.stat().st_mode & 0o777 == 0o700
