"""Tars whose headers lie: what can be used is, the rest is named, in bounded time and memory."""

import json
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.facts import BadFile, Video
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.shards import scan
from data_pipelines.shards.index_file import SHARDS_NAME
from data_pipelines.shards.scan import _scan_shard


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, write_video: Any) -> bytes:
    """Bytes of a readable video."""
    return write_video(tmp_path_factory.mktemp("clip") / "a.mp4", video=7).read_bytes()


def _member(name: str, content: bytes = b"", **changes: Any) -> bytes:
    """A header and what follows it."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in changes.items():
        setattr(member, field, value)
    header = member.tobuf(tarfile.GNU_FORMAT)
    return header + content + bytes(-len(content) % 512)


def _pax(name: str, content: bytes, records: dict[str, str], kind: bytes = b"x") -> bytes:
    """A pax header with these records, and the member that it is for."""
    body = b""
    for key, value in records.items():
        record = f" {key.replace('_', '.')}={value}\n".encode()
        length = len(record) + len(str(len(record)))
        body += f"{length + (len(str(length)) > len(str(len(record))))}".encode() + record
    return _member("pax", body, type=kind) + _member(name, content)


def _without_checksum_errors(header: bytes, place: int, value: bytes) -> bytes:
    """A header with other bytes at a place, and the checksum that fits them."""
    changed = bytearray(header)
    changed[place : place + len(value)] = value
    changed[148:156] = b" " * 8
    changed[148:156] = f"{sum(changed[:512]):06o}\0 ".encode()
    return bytes(changed)


def _in_base_256(size: int) -> bytes:
    """A size as GNU tar writes those that eleven octal digits do not hold."""
    return bytes([0x80 if size >= 0 else 0xFF]) + (size % 2**88).to_bytes(11, "big")


def _index(folder: Path, *parts: bytes) -> VideoIndex:
    (folder / "a.tar").write_bytes(b"".join(parts) + bytes(1024))
    return load_videos(folder, max_bad_fraction=0.99, progress=False)


def _reasons(index: VideoIndex) -> dict[str, str]:
    return {entry.path.removeprefix("a.tar/"): entry.reason for entry in index.bad}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (tarfile.LNKTYPE, "a link or no regular file"),
        (tarfile.SYMTYPE, "a link or no regular file"),
        (tarfile.CHRTYPE, "a link or no regular file"),
        (tarfile.BLKTYPE, "a link or no regular file"),
        (tarfile.FIFOTYPE, "a link or no regular file"),
        (tarfile.DIRTYPE, "a link or no regular file"),
    ],
)
def test_only_regular_members_are_read(tmp_path: Path, clip: bytes, kind: bytes, reason: str) -> None:
    odd = _member("odd.mp4", type=kind, linkname="good.mp4", devmajor=1, devminor=5)
    index = _index(tmp_path, _member("good.mp4", clip), odd, _member("last.mp4", clip))
    assert [video.path for video in index.videos] == ["a.tar/good.mp4", "a.tar/last.mp4"]
    [(name, said)] = _reasons(index).items()
    assert name.startswith("odd.mp4") and reason in said


@pytest.mark.parametrize("name", ["../a.mp4", "/etc/a.mp4", "b/../../a.mp4", "b\\..\\a.mp4", "\\a.mp4", "b/.."])
def test_names_that_lead_out_are_refused(tmp_path: Path, clip: bytes, name: str) -> None:
    name = name if name.endswith("mp4") else f"{name}/a.mp4"
    index = _index(tmp_path, _member("good.mp4", clip), _member(name, clip))
    assert len(index.videos) == 1 and _reasons(index) == {name: "its name leads out of the archive"}


@pytest.mark.parametrize("size", [2**60, 2**33, -1, -512, -(2**60)])
def test_sizes_that_are_not_possible_end_the_archive(tmp_path: Path, clip: bytes, size: int) -> None:
    odd = _without_checksum_errors(_member("odd.mp4"), 124, _in_base_256(size))
    index = _index(tmp_path, _member("good.mp4", clip), odd, _member("last.mp4", clip))
    assert index.videos[0].path == "a.tar/good.mp4" and len(index.videos) <= 2
    assert _reasons(index)


@pytest.mark.parametrize(
    "records",
    [
        {"size": str(2**60)},
        {"size": "-512"},
        {"size": "-1000000"},
        {"size": "9" * 5000},
        {"size": "x"},
        {"GNU_sparse_map": "0,1,2", "GNU_sparse_size": "100"},
        {"GNU_sparse_major": "1", "GNU_sparse_minor": "0", "GNU_sparse_realsize": str(2**60)},
        {"GNU_sparse_major": "1", "GNU_sparse_minor": "0", "GNU_sparse_name": "../odd.mp4"},
        {"path": "../odd.mp4"},
        {"path": "odd.mp4\0.txt"},
        {"path": "odd\0.mp4"},
        {"path": "odd\n\x1b[2J.mp4"},
        {"hdrcharset": "BINARY", "path": "odd.mp4"},
    ],
    ids=str,
)
def test_records_of_pax_that_lie_stop_nothing_else(tmp_path: Path, clip: bytes, records: dict[str, str]) -> None:
    index = _index(tmp_path, _member("good.mp4", clip), _pax("odd.mp4", clip, records))
    assert index.videos[0].path == "a.tar/good.mp4"
    assert all(0 <= video.offset_bytes < video.offset_bytes + video.size_bytes for video in index.videos)
    assert all(".." not in video.path and "\0" not in video.path for video in index.videos)


def test_of_members_with_one_name_the_first_counts(
    tmp_path: Path, clip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed = []
    index_member = scan.index_member

    def count(*place: Any) -> Any:
        probed.append(place)
        return index_member(*place)

    monkeypatch.setattr(scan, "index_member", count)
    index = _index(tmp_path, *[_member("a.mp4", clip), _member("a.mp4", b"noise")] * 3)
    assert [video.size_bytes for video in index.videos] == [len(clip)] and not index.bad and len(probed) == 1


@pytest.mark.parametrize(
    "labels",
    [b"[" * 200_000, b'{"a":' * 200_000, b"9" * 5000, b"", b"\xff\xfe", b"null", b'{"number": 1' + b" " * 2**20],
)
def test_labels_that_are_not_readable_do_not_stop_the_data_set(tmp_path: Path, clip: bytes, labels: bytes) -> None:
    parts = [_member("a.mp4", clip), _member("a.json", labels), _member("b.mp4", clip)]
    index = _index(tmp_path, *parts, _member("b.json", json.dumps({"number": 1}).encode()))
    assert [video.path for video in index.videos] == ["a.tar/a.mp4", "a.tar/b.mp4"] and not index.bad


def test_labels_of_long_videos_are_read_and_larger_ones_named(
    tmp_path: Path, clip: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Packing writes labels of any length: without its index, the shards are to have them still."""
    described = json.dumps({"number": 1, "padding": "x" * 2**21}).encode()
    parts = [_member("a.mp4", clip), _member("a.json", described)]
    assert _index(tmp_path, *parts).labels["number"].tolist() == [1] and not caplog.records
    monkeypatch.setattr(scan, "MAX_LABELS_BYTES", 2**20)
    (tmp_path / SHARDS_NAME).unlink()
    index = _index(tmp_path, *parts, _member("b.mp4", clip), _member("b.json", described))
    assert not index.labels
    assert "more than 1 MiB are left out: those in 'a.tar/a.json' and in 1 other members of 'a.tar'" in caplog.text


def _scan(folder: Path, *parts: bytes) -> tuple[list[Video | BadFile], float, int]:
    """The entries of a tar, the seconds of one core that they took, and the most bytes that Python held meanwhile."""
    (folder / "a.tar").write_bytes(b"".join(parts) + bytes(1024))
    tracemalloc.start()
    begin_s = time.process_time()
    try:
        entries = [entry for entry, _ in _scan_shard(folder, "a.tar")]
        return entries, time.process_time() - begin_s, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _pax_header(clip: bytes, kind: bytes) -> bytes:
    return _pax("a.mp4", clip, {"comment": "x" * 50_000_000}, kind)


def _long_name(clip: bytes, kind: bytes) -> bytes:
    return _member("././@LongLink", b"a" * 50_000_000, type=kind) + _member("a.mp4", clip)


def _sparse_map(clip: bytes, _: bytes) -> bytes:
    """The blocks of a sparse file's map, each of which says that there is one more."""
    first = _without_checksum_errors(_member("a.mp4", type=tarfile.GNUTYPE_SPARSE), 482, b"\1")
    return first + (b"%011o\0" % 1 * 42 + b"\1" * 8) * 100_000


def _chain(clip: bytes, kind: bytes) -> bytes:
    return _pax("a", b"", {"comment": "x"}, kind)[:1024] * 50_000


def _global_records(clip: bytes, kind: bytes) -> bytes:
    records = {f"key{number}": "x" for number in range(30_000)}
    return _pax("a", b"", records, kind) + b"".join(_pax(f"{number}", b"", {"comment": "x"}) for number in range(2000))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (_pax_header, b"x"),
        (_pax_header, b"g"),
        (_long_name, b"L"),
        (_long_name, b"K"),
        (_sparse_map, b"S"),
        (_chain, b"x"),
        (_chain, b"g"),
        (_global_records, b"g"),
    ],
)
def test_headers_without_measure_cost_little(
    tmp_path: Path, clip: bytes, make: Callable[[bytes, bytes], bytes], kind: bytes
) -> None:
    """Of 50 MB of headers one megabyte is looked at."""
    entries, seconds, peak_bytes = _scan(tmp_path, _member("good.mp4", clip), make(clip, kind))
    damage, good = entries
    assert isinstance(damage, BadFile) and "not a readable tar: " in damage.reason
    assert isinstance(good, Video) and good.path == "a.tar/good.mp4"
    assert seconds < 5 and peak_bytes < 2e7, (seconds, peak_bytes)


def test_the_members_of_a_tar_are_not_kept(tmp_path: Path, clip: bytes) -> None:
    empty = b"".join(_member(f"{number}.txt") for number in range(1000))
    [good], seconds, peak_bytes = _scan(tmp_path, _member("good.mp4", clip), empty * 20)
    assert isinstance(good, Video) and seconds < 20 and peak_bytes < 1e6, (seconds, peak_bytes)
