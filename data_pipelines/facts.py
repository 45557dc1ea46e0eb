"""Facts about videos as index files state them: the records, and checks of their types, ranges and order.

Index files lie alongside the data or come from servers, and arrays are as long as these numbers say. So every record
that is read from a file is checked.
"""

import dataclasses
import os
import re
from array import array
from dataclasses import dataclass
from functools import cache
from operator import attrgetter, lt
from typing import Any, get_origin

import numpy as np
from numpy.typing import NDArray

from data_pipelines.text_files import shown

# Timestamps are rounded, in Matroska to milliseconds: closer to a constant rate than this, they keep to it.
ROUNDING_S = 0.00101

MAX_FRAME_PX = 2**26
"""Frames of more pixels are refused before they are decoded: 8K video has 2**25."""

MAX_FRAMES = 2**27  # 25 days at 60 frames a second
MAX_SIDE_PX = 2**16
MAX_STREAMS = 2**16
MAX_FPS = 1e9
MAX_SECONDS = 1e15
MAX_INT = 2**63 - 1
INT = {int}
DIGEST = re.compile("[0-9a-f]{16,128}")
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.tar")  # one that needs no quoting in a path or a URL


@dataclass(frozen=True, slots=True)
class Video:
    """One readable video: a file, a part of a shard, or a folder of images.

    keyframes: presentation index of each frame at which decoding can start; the first is always 0.
    keyframe_pts: timestamps of the keyframes in the container's time base. Empty where the container has none that
        can be trusted; keyframes is then (0,), and such a file is only ever decoded from its beginning.
    open_gop: some frames are stored after a keyframe and shown before it.
    shard, offset_bytes: the tar that holds the bytes, as a name in the root, and their start; "" for a plain file.
    tick_s: seconds per tick of the container's time base.
    frame_ms: milliseconds from each frame to the next, if they vary. Otherwise empty: frame i is shown i / fps seconds
        after the first.
    quarter_turns: number of counterclockwise turns by 90 degrees that the stored picture needs.
    mirrored: the stored picture is mirrored, left to right, before it is turned.
    stream: number of the stream that holds the video, if the file has several video streams; otherwise -1.
    begins_late: decoding the first packets gives errors or nothing; the first frame is the first that decodes.
    digest: a hash of the packets, equal for equal content; "" if it was not computed.
    """

    path: str  # relative to the root, with forward slashes
    size_bytes: int
    mtime_ns: int
    num_frames: int
    fps: float  # average; 0 if unknown
    width: int  # as shown
    height: int  # as shown
    duration_s: float
    keyframes: tuple[int, ...]
    keyframe_pts: tuple[int, ...]
    open_gop: bool
    shard: str = ""
    offset_bytes: int = 0
    tick_s: float = 0.0
    frame_ms: tuple[int, ...] = ()
    quarter_turns: int = 0
    mirrored: bool = False
    stream: int = -1
    begins_late: bool = False
    digest: str = ""

    def shown_s(self) -> NDArray[np.float64]:
        """Return the seconds from the first frame to each, [num_frames], to about a millisecond; zeros without fps."""
        if self.frame_ms:
            return np.cumsum([0.0, *self.frame_ms]) / 1000
        return np.arange(self.num_frames) / (self.fps or np.inf)


@dataclass(frozen=True, slots=True)
class BadFile:
    """A file with the name of a video that cannot be used, and the reason."""

    path: str
    size_bytes: int
    mtime_ns: int
    reason: str


@dataclass(frozen=True)
class Shard:
    """A tar of videos as its index describes it."""

    name: str
    size_bytes: int
    sha256: str


def entry_from_fields(fields: dict[str, Any]) -> Video | BadFile:
    """Return the entry that dataclasses.asdict and JSON made these fields of.

    Raises TypeError, KeyError, ValueError: other fields, or values that no file has.
    """
    if "reason" in fields:
        return checked_bad_file(BadFile(**fields))
    numbers = {name: tuple(fields[name]) for name in ("keyframes", "keyframe_pts", "frame_ms")}
    return checked(Video(**fields | numbers))


def checked_shard(shard: Shard) -> Shard:
    """Return a shard whose values a tar could have. Raises ValueError: another type, or out of range."""
    if not (isinstance(shard.name, str) and SHARD_NAME.fullmatch(shard.name)):
        raise ValueError(f"name {shard.name!r} is not a valid name of a shard")
    if type(shard.size_bytes) is not int or not 0 <= shard.size_bytes <= MAX_INT:
        raise ValueError(f"size_bytes {shard.size_bytes!r} is not a possible size")
    if not (isinstance(shard.sha256, str) and re.fullmatch("[0-9a-f]{64}", shard.sha256)):
        raise ValueError(f"sha256 {shard.sha256!r} is not 64 hexadecimal digits")
    return shard


def checked(video: Video) -> Video:
    """Return a video whose facts a file could have; other facts are an error.

    Raises ValueError: a value has another type than its field, is out of range, or contradicts another one.
    """
    _check_types(video)
    num_frames, keyframes, times = video.num_frames, video.keyframes, video.frame_ms
    path, shard = video.path, video.shard
    path.encode("utf-8", "surrogateescape")  # or UnicodeEncodeError, a ValueError: no file has such a name
    if not path or path[0] == "/" or "\0" in path or (".." in path and ".." in path.replace(os.sep, "/").split("/")):
        raise ValueError(f"path={shown(path)} is not a relative path within the folder")
    if shard and not SHARD_NAME.fullmatch(shard):
        raise ValueError(f"shard={shown(shard)} is not a valid name of a shard")
    if shard and (video.offset_bytes < 0 or video.size_bytes < 1):
        raise ValueError("it is outside its shard")
    if not (0 <= video.size_bytes <= MAX_INT and 0 <= video.offset_bytes <= MAX_INT and abs(video.mtime_ns) <= MAX_INT):
        raise ValueError("size_bytes, offset_bytes or mtime_ns is out of range")
    if not 0 < num_frames <= min(MAX_FRAMES, video.size_bytes):
        raise ValueError(f"num_frames={num_frames} is not possible in {video.size_bytes} bytes")
    if not (0 < video.width <= MAX_SIDE_PX and 0 < video.height <= MAX_SIDE_PX and 0 <= video.quarter_turns <= 3):
        raise ValueError(
            f"width={video.width}, height={video.height} or quarter_turns={video.quarter_turns} is out of range"
        )
    if not -1 <= video.stream < MAX_STREAMS or (video.digest and not DIGEST.fullmatch(video.digest)):
        raise ValueError(f"stream={video.stream} or digest={shown(video.digest)} is not possible")
    fps = video.fps  # NaN is in no range
    if not (
        (fps == 0 or 1 / MAX_FPS <= fps <= MAX_FPS)
        and 0 <= video.duration_s <= MAX_SECONDS
        and 0 <= video.tick_s <= MAX_SECONDS
    ):
        raise ValueError(f"fps={fps}, duration_s={video.duration_s} or tick_s={video.tick_s} is out of range")
    if not keyframes or keyframes[0] != 0 or keyframes[-1] >= num_frames or not _ascend(keyframes):
        raise ValueError(f"keyframes={shown(keyframes)} do not ascend from 0 to at most {num_frames - 1}")
    pts = video.keyframe_pts
    if pts and (len(pts) != len(keyframes) or not _ascend(pts) or pts[0] < -MAX_INT or pts[-1] > MAX_INT):
        raise ValueError(f"keyframe_pts={shown(pts)} are not {len(keyframes)} ascending times")
    if times and (len(times) != num_frames - 1 or not _fit(times)):
        raise ValueError(f"frame_ms={shown(times)} are not {num_frames - 1} durations")
    return video


def checked_bad_file(entry: BadFile) -> BadFile:
    """Return a bad file whose values have the types of their fields. Raises ValueError: one does not."""
    _check_types(entry)
    if not 0 <= entry.size_bytes <= MAX_INT or abs(entry.mtime_ns) > MAX_INT:
        raise ValueError("size_bytes or mtime_ns is out of range")
    return entry


def _check_types(entry: Any) -> None:
    """Raise ValueError unless each value has exactly the type of its field: True is not an int, 1 is a float."""
    names, values_of, types = _types(entry.__class__)
    values = values_of(entry)
    if tuple(map(type, values)) != types:
        for name, value, wanted in zip(names, values, types, strict=True):
            if type(value) is not wanted and not (wanted is float and type(value) is int and abs(value) <= MAX_INT):
                raise ValueError(f"{name}={shown(value)} is not of type {wanted.__name__}")
    for numbers in values:
        if type(numbers) is tuple and numbers and set(map(type, numbers)) != INT:
            raise ValueError(f"{shown(numbers)} are not whole numbers")


@cache
def _types(kind: type) -> tuple[tuple[str, ...], Any, tuple[type, ...]]:
    """Return the names of a dataclass's fields, a function that gets their values, and their types."""
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    return tuple(fields), attrgetter(*fields), tuple(get_origin(wanted) or wanted for wanted in fields.values())  # type: ignore[misc]


def _ascend(numbers: tuple[int, ...]) -> bool:
    return len(numbers) == 1 or all(map(lt, numbers, numbers[1:]))


def _fit(times: tuple[int, ...]) -> bool:
    """Return True where numbers are neither negative nor wider than 64 bits."""
    try:
        return bool(array("Q", times))
    except OverflowError:
        return False
