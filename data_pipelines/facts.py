"""Checks of the facts of a video that an index file states: their types, ranges and order.

Index files lie beside the data, or come from servers. Arrays are as long as these numbers say.
"""

import dataclasses
import os
import re
from array import array
from functools import cache
from operator import attrgetter, lt
from typing import TYPE_CHECKING, Any, get_origin

from data_pipelines.text_files import shown

if TYPE_CHECKING:
    from data_pipelines.probe import BadFile, Video

MAX_FRAMES = 2**27  # 25 days at 60 frames a second
MAX_SIDE_PX = 2**16
MAX_STREAMS = 2**16
MAX_FPS = 1e9
MAX_SECONDS = 1e15
MAX_INT = 2**63 - 1
INT = {int}
DIGEST = re.compile("[0-9a-f]{16,128}")
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.tar")  # one that needs no quoting in a path or a URL


def checked(video: "Video") -> "Video":
    """Return a video whose facts a file could have.

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
        raise ValueError("it lies outside of its shard")
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


def checked_bad_file(entry: "BadFile") -> "BadFile":
    """Return a bad file whose values have the types of their fields. Raises ValueError: one does not."""
    _check_types(entry)
    if not 0 <= entry.size_bytes <= MAX_INT or abs(entry.mtime_ns) > MAX_INT:
        raise ValueError("size_bytes or mtime_ns is out of range")
    return entry


def _check_types(entry: Any) -> None:
    """Raises ValueError unless each value is of exactly its field's type: True is not an int, 1 is a float."""
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
    """The names of a dataclass's fields, a function to get their values, and their types."""
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
