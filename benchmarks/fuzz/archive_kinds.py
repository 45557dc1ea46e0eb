"""Tar shards, their labels and their index; and the index file of a folder of videos."""

import io
import json
import random
import tarfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.fuzz.kinds import Case, Kind, require
from benchmarks.fuzz.media import CODECS, number_in, write_video
from benchmarks.fuzz.mutate import ODD_INTS, damage_bytes, dumps, mutate_json, mutate_text, odd_value
from benchmarks.fuzz.sandbox import is_clean
from benchmarks.fuzz.table_kinds import LENGTHS, check_index, copy_folder, make_rows, prepare_folder
from data_pipelines.containers import video_url
from data_pipelines.decoders import DecodeError, open_video
from data_pipelines.facts import Video, entry_from_fields
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.indexing.index_file import INDEX_NAME
from data_pipelines.shards.index_file import SHARDS_NAME
from data_pipelines.splits import split_index

BLOCK = tarfile.BLOCKSIZE
Header = bytearray


def prepare_tar(seeds: Path) -> None:
    for name, length in LENGTHS.items():
        write_video(seeds / name.replace("/", "_"), CODECS[0], length)


def _samples(seeds: Path) -> list[tuple[str, bytes]]:
    return [(path.stem, path.read_bytes()) for path in sorted(seeds.glob("*.mp4"))]


def read_first_frames(index: VideoIndex, is_good: bool) -> str:
    """Read frames of some videos. Return the reason if one is missing. Raises WrongError: one shows another number."""
    reason = ""
    for video in index.videos[:3]:
        try:
            reader = open_video(video_url(index.root, video), video, channels=1, size_px=None, decoder="pyav")
            try:
                for frame in sorted({0, video.num_frames // 2, video.num_frames - 1}):
                    shown = number_in(reader.read(frame))
                    require(not is_good or shown == frame, f"frame {frame} of '{video.path}' shows {shown}")
            finally:
                reader.close()
        except DecodeError as error:
            require(is_clean(str(error)), f"the reason is not one clean line: {str(error)!r}")
            reason = reason or str(error) or "without a reason"
    return reason


# ---------------------------------------------------------------------------------------------------------- tars


def _member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> list[Any]:
    """Return the header, 512 bytes, and the content of a member."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content), kind
    return [Header(info.tobuf(tarfile.USTAR_FORMAT, errors="surrogateescape")), content]


def _with_checksum(header: Header) -> Header:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return header


_FIELDS = {"name": (0, 100), "mode": (100, 8), "uid": (108, 8), "size": (124, 12), "mtime": (136, 12)}
_FIELDS |= {"checksum": (148, 8), "type": (156, 1), "link": (157, 100), "magic": (257, 8), "prefix": (345, 155)}
_FIELDS |= {"sparse": (386, 24), "sparse_size": (483, 12)}


def _odd_number(rng: random.Random, width: int) -> bytes:
    """Return a number in a tar's notation (octal), in base 256, or none."""
    value = rng.choice((*ODD_INTS, 2**33, 2**60, 2**63, 2**63 - 1))
    return rng.choice(
        (
            b"%0*o\0" % (width - 1, value % 8 ** (width - 1)),
            b"\x80" + (value % 256 ** (width - 1)).to_bytes(width - 1, "big"),
            b"\xff" + (-value % 256 ** (width - 1)).to_bytes(width - 1, "big"),
            b"%o" % value,
            *(b"-1", b"99999999999", b" " * width, b"\0" * width, b"0x10", b"1_0", b"\xff" * width, b"7" * width),
        )
    )[:width]


def _change_header(rng: random.Random, header: Header) -> None:
    name = rng.choice(sorted(_FIELDS))
    start, width = _FIELDS[name]
    if name in ("size", "size", "mtime", "mode", "uid", "sparse", "sparse_size"):
        value = _odd_number(rng, width)
    elif name == "type":
        value = rng.choice(
            (b"0", b"\0", b"1", b"2", b"3", b"5", b"6", b"7", b"S", b"L", b"K", b"x", b"g", b"X", b"D", b"Z")
        )
    elif name in ("name", "prefix", "link"):
        value = rng.choice(
            (b"../a.mp4", b"/a.mp4", b"a.mp4/", b"", b"a\n.mp4", b"\x1b[2J.mp4", b"\xff\xfe.mp4", b".a.mp4")
        )
        value = rng.choice((value, b"x" * width, b"a.json", b"a.left.mp4", b"b/../../c.mp4", b"a\\..\\b.mp4"))
    else:
        value = rng.randbytes(width)
    header[start : start + width] = value[:width].ljust(width, b"\0")


def _pax(records: Sequence[tuple[bytes, bytes]], rng: random.Random) -> bytes:
    """Return records "LENGTH key=value", sometimes with a wrong length."""
    out = b""
    for key, value in records:
        body = b" " + key + b"=" + value + b"\n"
        length = len(body)
        while len(str(length)) + len(body) != length:
            length = len(str(length)) + len(body)
        stated = length if rng.random() < 0.8 else rng.choice((0, 1, length - 1, length + 1, 10**9, 10**30, -1))
        out += str(stated).encode() + body
    return out


def _extra(rng: random.Random, name: str) -> list[Any]:
    """Return a header before a member that extends it: pax records, a long name, or the map of a sparse file."""
    odd = rng.choice(
        (b"", b"0", b"-1", b"x", b"1e3", b"99999999999999999999", b"9" * 5000, b"0,0", b"\xff", b"nan", b"5")
    )
    keys = (
        *(b"size", b"path", b"mtime", b"uid", b"linkpath", b"hdrcharset", b"GNU.sparse.map", b"GNU.sparse.size"),
        *(
            b"GNU.sparse.major",
            b"GNU.sparse.minor",
            b"GNU.sparse.name",
            b"GNU.sparse.realsize",
            b"GNU.sparse.numblocks",
        ),
    )
    records = [
        (rng.choice(keys), rng.choice((odd, odd, b"1", b"../x.mp4", b"a\n.mp4"))) for _ in range(rng.randint(1, 4))
    ]
    what = rng.randrange(4)
    if what == 0:
        return _member("././@LongLink", rng.choice((name.encode() * 50, b"../x.mp4\0", b"", b"\xff" * 600)), b"L")
    if what == 1:
        return _member("././@LongLink", b"../x.mp4\0", b"K")
    return _member("pax", _pax(records, rng), rng.choice((b"x", b"x", b"g", b"X")))


def build_tar(rng: random.Random, seeds: Path, folder: Path) -> Case:
    """Build one or two shards of videos and labels with odd headers; one in eight stays valid."""
    is_good = rng.random() < 0.125
    for shard in range(rng.choice((1, 1, 2))):
        members = []
        for key, content in _samples(seeds):
            members += [_member(f"{key}.mp4", content), _member(f"{key}.json", json.dumps({"label": shard}).encode())]
        if not is_good:
            _mutate_members(rng, members)
        data = b""
        for header, content in members:
            intact = is_good or rng.random() < 0.9
            data += bytes(_with_checksum(header) if intact else header) + content + bytes(-len(content) % BLOCK)
        data += bytes(2 * BLOCK)
        if not is_good and rng.random() < 0.15:
            data = damage_bytes(rng, data)
        (folder / f"shard-{shard}.tar").write_bytes(data)
    if not is_good and rng.random() < 0.1:
        (folder / rng.choice(("b.TAR", "a b.tar", "x\n.tar", "-.tar", "c.tar.gz"))).write_bytes(rng.randbytes(600))
    return Case(partial(attempt_shards, folder, is_good), is_good)


def _mutate_members(rng: random.Random, members: list[list[Any]]) -> None:
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(members))
        what = rng.randrange(10)
        if what < 5:
            _change_header(rng, members[at][0])
        elif what == 5:
            members.insert(at, _extra(rng, "a.mp4"))
        elif what == 6:
            members.insert(at, [Header(members[at][0]), members[at][1]])
        elif what == 7:
            members[at][1] = damage_bytes(rng, members[at][1])
        elif what == 8:
            members.insert(
                at, rng.choice((_member("l.mp4", b"", b"2"), _member("x/", b"", b"5"), [Header(BLOCK), b""]))
            )
        else:
            other = rng.randrange(len(members))
            members[at], members[other] = members[other], members[at]


def attempt_shards(folder: Path, is_good: bool) -> str:
    index = load_videos(folder, max_bad_fraction=1.0, progress=False)
    again = load_videos(folder, max_bad_fraction=1.0, progress=False)  # from the index that was written
    require(
        index.content_hash == again.content_hash and list(index.bad) == list(again.bad), "the index reads otherwise"
    )
    for entry in index.bad:
        require(bool(entry.reason) and is_clean(entry.reason), f"the reason is not one clean line: {entry.reason!r}")
    check_index(index)
    if is_good:
        require(not index.bad and len(index.videos) % len(LENGTHS) == 0, f"{len(index.videos)} videos, {index.bad}")
        require("label" in index.labels, "the labels are left out")
    return read_first_frames(index, is_good)


def build_labels(rng: random.Random, seeds: Path, folder: Path) -> Case:
    """Build a shard whose KEY.json files hold odd labels."""
    is_good = rng.random() < 0.125
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for (key, content), row in zip(_samples(seeds), make_rows(rng), strict=True):
            changed = row if is_good or rng.random() < 0.4 else mutate_json(rng, row)
            text = dumps(rng, changed)
            labels = mutate_text(rng, text) if not is_good and rng.random() < 0.2 else text.encode()
            for name, data in ((f"{key}.mp4", content), (f"{key}.json", labels)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (folder / "shard.tar").write_bytes(out.getvalue())
    return Case(partial(attempt_shards, folder, is_good), is_good)


# ------------------------------------------------------------------------------------------------- index of shards


def prepare_shards(seeds: Path) -> None:
    """Write shards with their index."""
    for name, length in LENGTHS.items():
        write_video(seeds / name.replace("/", "_"), CODECS[0], length)
    samples = _samples(seeds)
    for path in seeds.glob("*.mp4"):
        path.unlink()
    for shard in range(2):
        with tarfile.open(seeds / f"shard-{shard}.tar", "w") as tar:
            for key, content in samples:
                for name, data in ((f"{key}.mp4", content), (f"{key}.json", b'{"label": 1, "pose": [0.5, 2]}')):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    load_videos(seeds, progress=False)


def _mutate_lines(rng: random.Random, text: str) -> tuple[list[Any], str]:
    """Change the objects of some lines. Return the objects and their text."""
    rows = [json.loads(line) for line in text.splitlines()]
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(rows))
        if rng.random() < 0.85 and isinstance(rows[at], dict):
            rows[at] = _mutate_fields(rng, rows[at])
        elif rng.random() < 0.5:
            rows.insert(at, rows[at])
        else:
            rows[at] = mutate_json(rng, rows[at])
    return rows, "".join(dumps(rng, row) + "\n" for row in rows)


def _mutate_fields(rng: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    """Change one field of an index entry, mostly to a value of the right type that no file has."""
    row = dict(row)
    key = rng.choice(sorted(row)) if row else "x"
    value = row.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.6:
        row[key] = rng.choice((0, -1, 1, value + 1, value - 1, value * 1000, 10**7, 10**10, 2**62, 2**64, 1e300, 0.5))
    elif isinstance(value, list) and rng.random() < 0.7:
        odd: Any = rng.choice((0, -1, 3, 10**10, 2**64, 0.5, None, "x", []))
        row[key] = rng.choice(([], [odd], [*value, odd], [odd, *value], value[::-1], [0, 1, 2], [0] * 5, [0, 10**10]))
    elif rng.random() < 0.5:
        row[key] = odd_value(rng)
    else:
        return dict(changed) if isinstance(changed := mutate_json(rng, row), dict) else {"x": changed}
    return row


def build_shards(rng: random.Random, seeds: Path, folder: Path) -> Case:
    copy_folder(seeds, folder)
    path = folder / SHARDS_NAME
    is_good = rng.random() < 0.05
    if not is_good:
        text = path.read_text()
        if rng.random() < 0.75:
            text = _mutate_lines(rng, text)[1]
        path.write_bytes(text.encode() if rng.random() < 0.7 else mutate_text(rng, text))
    return Case(partial(attempt_shards, folder, is_good), is_good)


# ----------------------------------------------------------------------------------------------- index of a folder


def build_index(rng: random.Random, seeds: Path, folder: Path) -> Case:
    """Build a folder with a changed index file, whose hash sometimes fits the changes."""
    copy_folder(seeds, folder)
    path = folder / INDEX_NAME
    is_good = rng.random() < 0.05
    if not is_good:
        text = path.read_text()
        if rng.random() < 0.8:
            rows, text = _mutate_lines(rng, text)
            if rng.random() < 0.8 and isinstance(rows[0], dict):
                rows[0] = rows[0] | {"content_hash": _hash_of(rows[1:])}
                text = "".join(dumps(rng, row) + "\n" for row in rows)
        path.write_bytes(text.encode() if rng.random() < 0.8 else mutate_text(rng, text))
    return Case(partial(attempt_index, folder, is_good), is_good)


def _hash_of(rows: Sequence[Any]) -> Any:
    """Return the hash of those rows that are entries."""
    try:
        entries = [entry_from_fields(dict(row)) for row in rows]
        return VideoIndex(Path(), [entry for entry in entries if isinstance(entry, Video)]).content_hash
    except (TypeError, ValueError, KeyError, OverflowError):
        return "0" * 16


def attempt_index(folder: Path, is_good: bool) -> str:
    index = load_videos(folder, num_workers=0, max_bad_fraction=1.0, progress=False)
    for entry in index.bad:
        require(is_clean(entry.reason), f"the reason is not one clean line: {entry.reason!r}")
    check_index(index)
    json.dumps([asdict(video) for video in index.videos])
    for part in ("train", "selection", "test"):
        _ = split_index(index, part).frame_ranges
    if is_good:
        require([video.path for video in index.videos] == list(LENGTHS), f"{index.videos}"[:300])
        require([video.num_frames for video in index.videos] == list(LENGTHS.values()), f"{index.videos}"[:300])
    return read_first_frames(index, is_good)


KINDS = (
    Kind("tar", prepare_tar, build_tar),
    Kind("labels", prepare_tar, build_labels),
    Kind("shards", prepare_shards, build_shards),
    Kind("index", prepare_folder, build_index),
)
