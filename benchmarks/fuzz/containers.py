"""The records of video containers (boxes, elements, chunks, packets, tags), and damage to them and to their times."""

import random
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from benchmarks.fuzz.mutate import ODD_INTS, odd_integer


class Record(NamedTuple):
    """A part [start, stop) of a file: the content from `content` on, its size in `size_bytes` bytes at `size_at`."""

    start: int
    content: int
    stop: int
    size_at: int
    size_bytes: int
    is_little: bool = False
    name: bytes = b""


_MP4_PARENTS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"udta", b"dinf", b"mvex", b"moof", b"traf"}
_EBML_PARENTS = {
    *(0x18538067, 0x1654AE6B, 0xAE, 0xE0, 0x1F43B675, 0xA0, 0x1C53BB6B, 0xBB, 0xB7, 0x114D9B74, 0x4DBB, 0x1549A966),
    0x1A45DFA3,
}


def mp4_boxes(data: bytes, start: int = 0, stop: int | None = None) -> Iterator[Record]:
    stop = len(data) if stop is None else stop
    while start + 8 <= stop:
        size, name = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        end = start + size
        if size < 8 or end > stop:
            return
        yield Record(start, start + 8, end, start, 4, name=name)
        if name in _MP4_PARENTS:
            yield from mp4_boxes(data, start + 8, end)
        start = end


def ebml_elements(data: bytes, start: int = 0, stop: int | None = None) -> Iterator[Record]:
    stop = len(data) if stop is None else stop
    while start + 2 <= stop and data[start]:
        id_bytes = 9 - data[start].bit_length()
        size_at = start + id_bytes
        if size_at >= stop or not data[size_at]:
            return
        size_bytes = 9 - data[size_at].bit_length()
        size = int.from_bytes(data[size_at : size_at + size_bytes], "big") & ~(1 << 7 * size_bytes)
        content = size_at + size_bytes
        is_unknown = size == (1 << 7 * size_bytes) - 1
        end = stop if is_unknown else content + size
        if end > stop:
            return
        name = data[start:size_at]
        yield Record(start, content, end, size_at, size_bytes, name=name)
        if int.from_bytes(name, "big") in _EBML_PARENTS:
            yield from ebml_elements(data, content, end)
        start = end


def riff_chunks(data: bytes, start: int = 0, stop: int | None = None) -> Iterator[Record]:
    stop = len(data) if stop is None else stop
    while start + 8 <= stop:
        name, size = data[start : start + 4], int.from_bytes(data[start + 4 : start + 8], "little")
        end = min(stop, start + 8 + size + size % 2)
        yield Record(start, start + 8, end, start + 4, 4, True, name)
        if name in (b"RIFF", b"LIST"):
            yield from riff_chunks(data, start + 12, end)
        start = end


def ts_packets(data: bytes) -> Iterator[Record]:
    for start in range(0, len(data) - 187, 188):
        yield Record(start, start + 4, start + 188, start + 4, 1)


def flv_tags(data: bytes) -> Iterator[Record]:
    start = 13
    while start + 15 <= len(data):
        stop = start + 15 + int.from_bytes(data[start + 1 : start + 4], "big")
        if stop > len(data):
            return
        yield Record(start, start + 11, stop, start + 1, 3)
        start = stop


def asf_objects(data: bytes) -> Iterator[Record]:
    start = 0
    while start + 24 <= len(data):
        size = int.from_bytes(data[start + 16 : start + 24], "little")
        stop = min(len(data), start + size)
        if size < 24:
            return
        yield Record(start, start + 24, stop, start + 16, 8, True)
        if start == 0:  # the header: its objects follow six bytes
            inner = start + 30
            while inner + 24 <= stop:
                size = int.from_bytes(data[inner + 16 : inner + 24], "little")
                if size < 24:
                    break
                yield Record(inner, inner + 24, min(stop, inner + size), inner + 16, 8, True)
                inner += size
        start = stop


def ogg_pages(data: bytes) -> Iterator[Record]:
    starts = [match.start() for match in re.finditer(b"OggS", data)]
    for start, stop in pairwise([*starts, len(data)]):
        yield Record(start, start + 27, stop, start + 26, 1)


def pes_packets(data: bytes) -> Iterator[Record]:
    starts = [match.start() for match in re.finditer(rb"\x00\x00\x01[\xba-\xef]", data)]
    for start, stop in pairwise([*starts, len(data)]):
        yield Record(start, start + 6, stop, start + 4, 2, name=data[start + 3 : start + 4])


_RECORDS: dict[str, Callable[[bytes], Iterator[Record]]] = {
    **dict.fromkeys((".mp4", ".mov", ".3gp", ".m4v"), mp4_boxes),
    **dict.fromkeys((".mkv", ".webm"), ebml_elements),
    **{".avi": riff_chunks, ".ts": ts_packets, ".flv": flv_tags, ".wmv": asf_objects, ".ogv": ogg_pages},
    ".mpg": pes_packets,
}


def records_of(data: bytes, suffix: str) -> list[Record]:
    """Return the records of a container, parents before children, up to the first damage."""
    return list(_RECORDS[suffix](data))


def damage_record(rng: random.Random, data: bytes, suffix: str) -> bytes:
    """Change one record: its size, its name, an integer in it, its place; or remove or repeat it."""
    records = records_of(data, suffix)
    if not records:
        return data
    record = rng.choice(records)
    start, content, stop, size_at, size_bytes = record[:5]
    own, what = data[start:stop], rng.randrange(10)
    if what < 2:
        order: Any = "little" if record.is_little else "big"
        size = int.from_bytes(data[size_at : size_at + size_bytes], order)
        size = rng.choice(
            (rng.choice(ODD_INTS), 2 ** (8 * size_bytes) - 1, size + rng.choice((-8, -1, 1, 8)), size * 2)
        )
        size %= 2 ** (8 * size_bytes)
        return data[:size_at] + size.to_bytes(size_bytes, order) + data[size_at + size_bytes :]
    if what < 6:
        return odd_integer(rng, data, content, min(stop, content + rng.choice((8, 64, 4096))))
    if what == 6:
        other = rng.choice(records)
        name = other.name if record.name and other.name else rng.randbytes(1)
        at = start + 4 if suffix in (".mp4", ".mov", ".3gp", ".m4v") else start
        return data[:at] + name + data[at + len(name) :]
    if what == 7:
        return data[:start] + data[stop:]
    if what == 8:
        return data[:stop] + own * rng.choice((1, 1, 2, 50)) + data[stop:]
    other = rng.choice(records)
    if other.stop <= start:
        return data[: other.stop] + own + data[other.stop : start] + data[stop:]
    return data[:content] + bytes(stop - content) + data[stop:]


# --------------------------------------------------------------------------------------------------------- times

_ODD_TICKS = (0, 1, 2, 3, 40, 512, 1000, 0x7FFF, 0x8000, 0xFFFF, 90_000, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 512)


def _put(data: bytes, at: int, value: int, size: int) -> bytes:
    return data[:at] + (value % 2 ** (8 * size)).to_bytes(size, "big") + data[at + size :]


def _mp4_times(rng: random.Random, data: bytes) -> bytes:
    """Change one word of a table of times, or of a header with a time scale."""
    names = (b"stts", b"stts", b"ctts", b"ctts", b"elst", b"mvhd", b"mdhd", b"tkhd")
    boxes = [box for box in mp4_boxes(data) if box.name == rng.choice(names) and box.stop - box.content > 8]
    if not boxes:
        return data
    box = rng.choice(boxes)
    words = range(box.content + 4, box.stop - 3, 4)
    return _put(data, rng.choice(words), rng.choice(_ODD_TICKS), 4)


def _ebml_times(rng: random.Random, data: bytes) -> bytes:
    """Change the time of a block or of a cluster, the scale, or a duration."""
    lengths = {
        b"\xa3": None,
        b"\xa1": None,
        b"\xe7": 0,
        b"\x2a\xd7\xb1": 0,
        b"\x23\xe3\x83": 0,
        b"\x44\x89": 0,
        b"\x9b": 0,
    }
    elements = [element for element in ebml_elements(data) if element.name in lengths]
    if not elements:
        return data
    names = sorted({element.name for element in elements})
    name = rng.choice(names)
    element = rng.choice([element for element in elements if element.name == name])
    if lengths[name] is None:  # a block: the track in one byte, then 16 bits
        return _put(data, element.content + 1, rng.choice((0, 1, 40, 41, 0x7FFF, 0x8000, 0xFFFF)), 2)
    return _put(data, element.content, rng.choice((*_ODD_TICKS, 2**62)), max(1, element.stop - element.content))


def _pes_times(rng: random.Random, data: bytes) -> bytes:
    """Move the presentation time of an MPEG packet, or remove it (clear its flag)."""
    places = [
        match.start() for match in re.finditer(rb"\x00\x00\x01[\xe0-\xef]..[\x80-\x8f][\x80-\xc0]", data, re.DOTALL)
    ]
    if not places:
        return data
    at = rng.choice(places)
    if rng.random() < 0.3:
        return data[: at + 7] + b"\0" + data[at + 8 :]
    ticks = rng.choice((0, 1, 3600, 7200, 90_000, 2**31, 2**32, 2**33 - 1, rng.randrange(2**33)))
    coded = (ticks >> 30 << 33 | (ticks >> 15 & 0x7FFF) << 17 | (ticks & 0x7FFF) << 1) | 0x0100010001 | 0x2000000000
    return _put(data, at + 9, coded, 5)


def _flv_times(rng: random.Random, data: bytes) -> bytes:
    tags = records_of(data, ".flv")
    return _put(data, rng.choice(tags).start + 4, rng.choice(_ODD_TICKS), 4) if tags else data


def _avi_times(rng: random.Random, data: bytes) -> bytes:
    """Change the rate or the length in a header, or drop a frame (an empty chunk)."""
    chunks = list(riff_chunks(data))
    headers = [chunk for chunk in chunks if chunk.name in (b"strh", b"avih")]
    frames = [chunk for chunk in chunks if chunk.name[2:] in (b"dc", b"db")]
    if headers and rng.random() < 0.6:
        chunk = rng.choice(headers)
        at = rng.choice(range(chunk.content, chunk.stop - 3, 4))
        return data[:at] + rng.choice(_ODD_TICKS).to_bytes(4, "little") + data[at + 4 :]
    if not frames:
        return data
    chunk = rng.choice(frames)
    return data[: chunk.start] + chunk.name + bytes(4) + data[chunk.start :]


_TIMES: dict[str, Callable[[random.Random, bytes], bytes]] = {
    **dict.fromkeys((".mp4", ".mov", ".3gp"), _mp4_times),
    **dict.fromkeys((".mkv", ".webm"), _ebml_times),
    **dict.fromkeys((".ts", ".mpg"), _pes_times),
    **{".flv": _flv_times, ".avi": _avi_times},
}
TIMED_SUFFIXES = tuple(_TIMES)


def damage_times(rng: random.Random, data: bytes, suffix: str) -> bytes:
    """Change one time in a file's bytes, or a value that times are computed from."""
    return _TIMES[suffix](rng, data)
