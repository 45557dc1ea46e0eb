"""One video file -> its facts: frames, keyframes, size, found by demuxing.

Nothing is decoded but the first frame, as a check, so that a small file costs about a millisecond.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from av.container import InputContainer

# Timestamps are rounded, in Matroska to milliseconds: closer to a constant rate than this, they keep to it.
ROUNDING_S = 0.00101


@dataclass(frozen=True, slots=True)
class Video:
    """One readable video file.

    keyframes: presentation index of each frame at which decoding can start; the first is always 0.
    keyframe_pts: their timestamps in the container's time base; empty where the container has none that
        can be trusted (then keyframes is (0,): such a file is only ever decoded from its beginning).
    open_gop: some frames are stored after a keyframe and shown before it.
    tick_s: seconds of one tick of the container's time base.
    frame_ms: milliseconds from each frame to the next, where they vary; empty where frame i is shown i / fps seconds
        after the first.
    quarter_turns: how often the stored picture is turned by 90 degrees, counterclockwise, to be shown.
    shard, offset_bytes: the tar that holds its bytes, a name beside the index, and where they start; "" for a plain
        file.
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

    def shown_s(self) -> NDArray[np.float64]:
        """[num_frames], seconds from the first frame to each, right to about a millisecond; zeros if fps is unknown."""
        if self.frame_ms:
            return np.cumsum([0.0, *self.frame_ms]) / 1000
        return np.arange(self.num_frames) / (self.fps or np.inf)


@dataclass(frozen=True, slots=True)
class BadFile:
    """A file with a video's name that cannot be used, and why."""

    path: str
    size_bytes: int
    mtime_ns: int
    reason: str


def entry_from_fields(fields: dict[str, Any]) -> Video | BadFile:
    """What dataclasses.asdict and JSON made of an entry -> the entry. Raises TypeError, KeyError: other fields."""
    if "reason" in fields:
        return BadFile(**fields)
    return Video(**fields | {name: tuple(fields[name]) for name in ("keyframes", "keyframe_pts", "frame_ms")})


def video_url(root: str | Path, video: Video) -> str:
    """What FFmpeg opens: the file's path, or the bytes within the shard that hold it."""
    if not video.shard:
        return f"{root}/{video.path}"
    return part_url(f"{root}/{video.shard}", video.offset_bytes, video.size_bytes)


def part_url(path: str, offset_bytes: int, size_bytes: int) -> str:
    return f"subfile,,start,{offset_bytes},end,{offset_bytes + size_bytes},,:{os.path.abspath(path)}"


def open_container(path: str | Path, name: str = "") -> "InputContainer":
    """Open a file with PyAV for decoding on one thread. name: the one to judge by, if `path` is no name of a video.

    MP4 and MOV state everything in their header. So FFmpeg need not guess the format, nor open a codec and
    decode frames to learn the stream's parameters: a tiny file opens in 0.16 ms instead of 0.40 ms or more.
    What calls itself .mp4 and is something else, or lacks a parameter, is opened as all others are.
    """
    import av

    if os.path.splitext(name or path)[1].lower() in {".mp4", ".m4v", ".mov"}:
        options = {"probesize": "32", "analyzeduration": "0", "codec_whitelist": "none"}
        try:
            container = av.open(str(path), format="mov", options=options)
            streams = container.streams.video
            if streams and streams[0].codec_context and streams[0].width > 0 and streams[0].average_rate:
                return container
            container.close()
        except av.FFmpegError:
            pass
    return av.open(str(path))


def prepare_codec(container: "InputContainer") -> None:
    """One FFmpeg thread (processes are the parallelism); damage is an error, not a plausible picture.

    Raises ValueError: there is no decoder for the stream.
    """
    codec = container.streams.video[0].codec_context
    if codec is None:
        raise ValueError("no decoder for its codec")
    codec.thread_count = 1
    codec.options = {"err_detect": "explode"}


def one_line(error: BaseException) -> str:
    """An exception as one short line, without the path that FFmpeg's messages repeat."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:200]


def index_file(root: str | Path, path: str) -> Video | BadFile:
    """Index one file, given relative to root. Whatever is wrong with it becomes a BadFile; never raises."""
    import av

    size_bytes, mtime_ns = 0, 0
    try:
        stat = os.stat(os.path.join(root, path))
        size_bytes, mtime_ns = stat.st_size, stat.st_mtime_ns
        if size_bytes == 0:
            raise ValueError("empty file (0 bytes)")
        with open_container(os.path.join(root, path)) as container:
            facts = _demux(container)
    except (av.FFmpegError, OSError, ValueError, IndexError, ArithmeticError) as error:
        return BadFile(path, size_bytes, mtime_ns, one_line(error))
    return Video(path=path, size_bytes=size_bytes, mtime_ns=mtime_ns, **facts)


def index_member(root: str | Path, shard: str, path: str, offset_bytes: int, size_bytes: int) -> Video | BadFile:
    """Index a part of the tar `shard` in root, to be called `path`. Whatever is wrong with it becomes a BadFile."""
    import av

    try:
        with open_container(part_url(f"{root}/{shard}", offset_bytes, size_bytes), path) as container:
            facts = _demux(container)
    except (av.FFmpegError, OSError, ValueError, IndexError, ArithmeticError) as error:
        return BadFile(path, size_bytes, 0, one_line(error))
    return Video(path=path, size_bytes=size_bytes, mtime_ns=0, shard=shard, offset_bytes=offset_bytes, **facts)


def _demux(container: "InputContainer") -> dict[str, Any]:
    """Count packets, find keyframes in presentation order, decode the first frame. ValueError if bad."""
    if not container.streams.video:
        raise ValueError("no video stream")
    prepare_codec(container)
    stream = container.streams.video[0]
    shown: list[tuple[int | None, bool]] = []
    first_frame = None
    num_packets = 0
    open_gop, key_pts = False, None
    for packet in container.demux(stream):
        if first_frame is None:
            first_frame = next(iter(packet.decode()), None)
        if packet.size == 0:
            continue
        num_packets += 1
        if packet.is_corrupt:
            raise ValueError(f"truncated: packet {num_packets} is cut off")
        if not packet.is_discard:  # decoded but not shown: what an edit list cuts away
            shown.append((packet.pts, packet.is_keyframe))
            if packet.is_keyframe:
                key_pts = packet.pts
            elif key_pts is not None and packet.pts is not None and packet.pts < key_pts:
                open_gop = True
    # The header's promise: what is left of it after edit lists (newer PyAV), else the plain count.
    promised = len(stream.index_entries) if hasattr(stream, "index_entries") else stream.frames
    if "mp4" in container.format.name and num_packets < promised:
        raise ValueError(f"truncated: {num_packets} of {promised} frames")
    if not shown:
        raise ValueError("no frames")
    if first_frame is None:
        raise ValueError("the first frame does not decode")

    num_frames = len(shown)
    pts = [time for time, _ in shown]
    times = sorted(time for time in pts if time is not None)
    # AVI has no presentation times: what is reported as such follows the order of decoding.
    is_timed = len(set(times)) == num_frames and container.format.name != "avi"
    if not is_timed:
        keyframes, keyframe_pts = [0], []
    else:
        ordered = sorted((time, is_key) for time, is_key in shown if time is not None)
        keyframes = sorted({0, *(i for i, (_, is_key) in enumerate(ordered) if is_key)})
        keyframe_pts = [times[i] for i in keyframes]
    fps = float(stream.average_rate or stream.guessed_rate or 0)
    tick_s = float(stream.time_base or 0)
    if len(times) > 1 and tick_s:
        span_s = (times[-1] - times[0]) * tick_s
        duration_s = span_s * num_frames / (num_frames - 1) if num_frames > 1 else span_s
    else:
        duration_s = num_frames / fps if fps else 0.0
    fps = fps if fps or not duration_s else num_frames / duration_s
    frame_ms: tuple[int, ...] = ()
    if is_timed and num_frames > 1 and tick_s:
        fps, frame_ms = _pace([(time - times[0]) * tick_s for time in times], fps)
    quarter_turns = round(first_frame.rotation / 90) % 4
    width, height = first_frame.width, first_frame.height
    return {
        "num_frames": num_frames,
        "fps": fps,
        "width": height if quarter_turns % 2 else width,
        "height": width if quarter_turns % 2 else height,
        "duration_s": duration_s,
        "keyframes": tuple(keyframes),
        "keyframe_pts": tuple(keyframe_pts),
        "open_gop": open_gop,
        "tick_s": tick_s,
        "frame_ms": frame_ms,
        "quarter_turns": quarter_turns,
    }


def _pace(shown_s: Sequence[float], fps: float) -> tuple[float, tuple[int, ...]]:
    """Seconds from the first frame to each, and the header's rate -> Video's fps and frame_ms."""
    times = np.asarray(shown_s)
    for rate in (fps, (len(times) - 1) / times[-1]):
        if np.abs(np.arange(len(times)) / rate - times).max() <= ROUNDING_S:
            return float(rate), ()
    return fps, tuple(int(step) for step in np.diff(np.rint(times * 1000)))
