"""One video file -> its facts: frames, keyframes, size, found by demuxing.

Where packets and their timestamps state which frames come out and when, only the first frame is decoded, as a check:
a small file costs about a millisecond. Otherwise the file is decoded once: field pictures, streams that begin where
decoding cannot, timestamps that are missing or repeated, AVI.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import printable
from data_pipelines.facts import checked, checked_bad_file
from data_pipelines.h264 import may_have_fields

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# Timestamps are rounded, in Matroska to milliseconds: closer to a constant rate than this, they keep to it.
ROUNDING_S = 0.00101

# A frame of more pixels is refused before it is decoded: 8K video has 2**25.
MAX_FRAME_PX = 2**26


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
    mirrored: the stored picture is mirrored, left to right, before it is turned.
    stream: the number of the stream that holds the video, where the file has several video streams; otherwise -1.
    begins_late: decoding the first packets gives errors or nothing; the first frame is the first that decodes.
    digest: a hash of the video's packets, equal for equal content; "" where it was not computed.
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
    mirrored: bool = False
    stream: int = -1
    begins_late: bool = False
    digest: str = ""

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
    """What dataclasses.asdict and JSON made of an entry -> the entry.

    Raises TypeError, KeyError, ValueError: other fields, or values that no file has (data_pipelines.facts).
    """
    if "reason" in fields:
        return checked_bad_file(BadFile(**fields))
    numbers = {name: tuple(fields[name]) for name in ("keyframes", "keyframe_pts", "frame_ms")}
    return checked(Video(**fields | numbers))


def video_url(root: str | Path, video: Video) -> str:
    """What FFmpeg opens: the file's path, or the bytes within the shard that hold it."""
    if not video.shard:
        return os.path.abspath(f"{root}/{video.path}")
    return part_url(f"{root}/{video.shard}", video.offset_bytes, video.size_bytes)


def part_url(path: str, offset_bytes: int, size_bytes: int) -> str:
    return f"{PART_PREFIX}start,{offset_bytes},end,{offset_bytes + size_bytes},,:{os.path.abspath(path)}"


PART_PREFIX = "subfile,,"


def local_url(path: str | Path) -> str:
    """The name of a local file, or of a part of one, in which FFmpeg takes no colon for a protocol."""
    return str(path) if str(path).startswith(PART_PREFIX) else os.path.abspath(path)


def open_container(path: str | Path, name: str = "") -> "InputContainer":
    """Open a file with PyAV for decoding on one thread. name: the one to judge by, if `path` is not a video's name.

    MP4 and MOV state everything in their header. So FFmpeg need not guess the format, nor open a codec and
    decode frames to learn the stream's parameters: a tiny file opens in 0.16 ms instead of 0.40 ms or more.
    What calls itself .mp4 and is something else, or lacks a parameter, is opened as all others are.
    """
    import av

    url = local_url(path)
    if os.path.splitext(name or path)[1].lower() in {".mp4", ".m4v", ".mov"}:
        options = {"probesize": "32", "analyzeduration": "0", "codec_whitelist": "none"}
        try:
            container = av.open(url, format="mov", options=options)
            streams = container.streams.video
            if streams and all(s.codec_context and s.width > 0 and s.average_rate for s in streams):
                return container
            container.close()
        except av.FFmpegError:
            pass
    return av.open(url)


def video_stream(container: "InputContainer", number: int = -1) -> "VideoStream":
    """The stream with the number that the index states; -1: the only video stream.

    Raises ValueError: there is no such video stream.
    """
    streams = [stream for stream in container.streams.video if number in (-1, stream.index)]
    if not streams:
        raise ValueError("no video stream")
    return streams[0]


def _choose_stream(container: "InputContainer", reopen: Callable[[], "InputContainer"]) -> "VideoStream":
    """The stream that holds the video: never an attached picture, rather several frames than one, the default one."""
    from av.stream import Disposition

    stills = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    streams = [stream for stream in container.streams.video if not stream.disposition & stills]
    if not streams:
        raise ValueError("no video stream but an attached picture" if container.streams.video else "no video stream")
    if len(streams) == 1:
        return streams[0]
    counts = dict.fromkeys((stream.index for stream in streams), 0)
    with reopen() as counted:
        for packet in counted.demux([counted.streams[number] for number in counts]):
            counts[packet.stream.index] += packet.size > 0
    return max(
        streams,
        key=lambda stream: (counts[stream.index] > 1, bool(stream.disposition & Disposition.default), -stream.index),
    )


def prepare_codec(stream: "VideoStream", max_frame_px: int = MAX_FRAME_PX) -> None:
    """One FFmpeg thread (processes are the parallelism); damage is an error, not a plausible picture.

    Raises ValueError: there is no decoder for the stream, or its frames are too large.
    """
    codec = stream.codec_context
    if codec is None:
        raise ValueError("no decoder for its codec")
    if codec.width * codec.height > max_frame_px:
        raise ValueError(f"frames of {codec.width}x{codec.height}, more than data.max_frame_px={max_frame_px}")
    codec.thread_count = 1
    # FFmpeg counts what codecs add to fill their blocks, too.
    codec.options = {"err_detect": "explode", "max_pixels": str(min(2 * max_frame_px + 2**14, 2**31 - 1))}


def decoded_frames(
    container: "InputContainer", stream: "VideoStream", *, first_pts: int | None = None, from_keyframe: bool = False
) -> "Iterator[VideoFrame]":
    """Frames in order of presentation, from where the container is.

    first_pts: leave out the frames before this timestamp, and pass over packets before it that do not decode.
    from_keyframe: the same up to the first undamaged keyframe, whatever its timestamp.

    Raises av.FFmpegError or ValueError: another packet does not decode.
    """
    is_waiting = from_keyframe or first_pts is not None
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except decoding_errors():
            if is_waiting and (from_keyframe or packet.pts is None):
                continue
            if first_pts is not None and packet.pts is not None and packet.pts < first_pts:
                continue
            raise
        for frame in frames:
            if is_waiting and from_keyframe and (frame.is_corrupt or not frame.key_frame):
                continue
            if is_waiting and first_pts is not None and (frame.pts is None or frame.pts < first_pts):
                continue
            is_waiting = False
            yield frame


def decoding_errors() -> Any:
    """The exceptions that PyAV raises on bytes that do not decode, a tuple of types."""
    import av

    return av.FFmpegError, OSError, ValueError


def one_line(error: BaseException) -> str:
    """An exception as one short line, without the path that FFmpeg's messages repeat."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return printable(" ".join(str(text).split())[:200])


def index_file(root: str | Path, path: str, max_frame_px: int = MAX_FRAME_PX) -> Video | BadFile:
    """Index one file, given relative to root. Whatever is wrong with it becomes a BadFile; never raises."""
    size_bytes, mtime_ns = 0, 0
    try:
        place = os.path.join(root, path)
        status = os.stat(place)
        size_bytes, mtime_ns = status.st_size, status.st_mtime_ns
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if size_bytes == 0:
            raise ValueError("empty file (0 bytes)")
        facts = _probe(lambda: open_container(place), max_frame_px)
        return checked(Video(path=path, size_bytes=size_bytes, mtime_ns=mtime_ns, **facts))
    except (*decoding_errors(), IndexError, ArithmeticError) as error:
        return BadFile(path, size_bytes, mtime_ns, one_line(error))


def index_member(
    root: str | Path, shard: str, path: str, offset_bytes: int, size_bytes: int, max_frame_px: int = MAX_FRAME_PX
) -> Video | BadFile:
    """Index a part of the tar `shard` in root, to be called `path`. Whatever is wrong with it becomes a BadFile."""
    url = part_url(f"{root}/{shard}", offset_bytes, size_bytes)
    try:
        facts = _probe(lambda: open_container(url, path), max_frame_px)
        return checked(
            Video(path=path, size_bytes=size_bytes, mtime_ns=0, shard=shard, offset_bytes=offset_bytes, **facts)
        )
    except (*decoding_errors(), IndexError, ArithmeticError) as error:
        return BadFile(path, size_bytes, 0, one_line(error))


class _Packet(NamedTuple):
    """What matters of a packet that is shown: timestamps of presentation and decoding, and whether it is a keyframe."""

    pts: int | None
    dts: int | None
    is_key: bool


@dataclass(frozen=True, slots=True)
class _Demuxed:
    """The packets of a stream in the order of the file, and its first frame, where decoding gives one without an error.

    is_reordered: frames may be shown in another order than that of the packets.
    shown: without what an edit list cuts away, which is decoded and not shown.
    """

    shown: Sequence[_Packet]
    begins_at_keyframe: bool
    is_reordered: bool
    first_frame: "VideoFrame | None"
    digest: str

    @property
    def is_certain(self) -> bool:
        """Each packet is one frame, shown at the time that the packet states (but for field pictures)."""
        times = [packet.pts for packet in self.shown if packet.pts is not None]
        # Streams with B-frames go back every few packets. A single step back is a fault.
        inversions = sum(later < earlier for earlier, later in pairwise(times))
        return (
            self.begins_at_keyframe
            and self.first_frame is not None
            and len(set(times)) == len(self.shown)
            and self.first_frame.pts == min(times)
            and (not inversions or (self.is_reordered and inversions > len(times) / 20))
        )

    @property
    def has_open_gop(self) -> bool:
        key_pts = None
        for packet in self.shown:
            if packet.is_key:
                key_pts = packet.pts
            elif key_pts is not None and packet.pts is not None and packet.pts < key_pts:
                return True
        return False


@dataclass(frozen=True, slots=True)
class _Decoded:
    """All frames of a stream in order of presentation.

    pts: their timestamps. A packet in the middle that does not decode counts as a frame: its reader reports it.
    times: the same, guessed where they are missing or repeated.
    key_pts: the timestamps of keyframes.
    begins_late: as in Video.
    """

    first_frame: "VideoFrame"
    pts: Sequence[int | None]
    times: Sequence[int | None]
    key_pts: frozenset[int | None]
    begins_late: bool


def _probe(reopen: Callable[[], "InputContainer"], max_frame_px: int) -> dict[str, Any]:
    """The facts of a file, as fields of Video. Raises ValueError if it is bad."""
    with reopen() as container:
        stream = _choose_stream(container, reopen)
        prepare_codec(stream, max_frame_px)
        number = stream.index if len(container.streams.video) > 1 else -1
        demuxed = _demux(container, stream)
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        tick_s = float(stream.time_base or 0)
        # AVI has no presentation times: what is reported as such follows the order of decoding.
        is_avi = container.format.name == "avi"
        may_be_fields = stream.codec_context.name == "h264" and may_have_fields(stream.codec_context.extradata)
    times: Sequence[int | None] = sorted(packet.pts for packet in demuxed.shown if packet.pts is not None)
    key_pts = frozenset(packet.pts for packet in demuxed.shown if packet.is_key)
    pts, first_frame, begins_late = times, demuxed.first_frame, False
    if first_frame is None or is_avi or may_be_fields or not demuxed.is_certain:
        with reopen() as container:
            stream = video_stream(container, number)
            prepare_codec(stream, max_frame_px)
            decoded = _decode_all(container, stream, demuxed.begins_at_keyframe)
        first_frame, begins_late = decoded.first_frame, decoded.begins_late
        key_pts &= decoded.key_pts  # the packets of field pictures may all call themselves keyframes
        times = _avi_times(demuxed, len(decoded.pts)) if is_avi else decoded.times
        pts = decoded.pts
    ascending = [time for time in pts if time is not None]
    is_ascending = len(ascending) == len(pts) and all(a < b for a, b in pairwise(ascending))
    keyframes, keyframe_pts = [0], []
    if is_ascending and not is_avi:
        keyframes = [i for i, time in enumerate(ascending) if i == 0 or time in key_pts]
        keyframe_pts = [ascending[i] for i in keyframes]
    quarter_turns, mirrored = _orientation(first_frame)
    height, width = first_frame.height, first_frame.width
    return {
        **_pace(_shown_s(times, fps, tick_s), fps),
        "num_frames": len(times),
        "width": height if quarter_turns % 2 else width,
        "height": width if quarter_turns % 2 else height,
        "keyframes": tuple(keyframes),
        "keyframe_pts": tuple(keyframe_pts),
        "open_gop": demuxed.has_open_gop,
        "tick_s": tick_s,
        "quarter_turns": quarter_turns,
        "mirrored": mirrored,
        "stream": number,
        "begins_late": begins_late,
        "digest": demuxed.digest,
    }


def _demux(container: "InputContainer", stream: "VideoStream") -> _Demuxed:
    """Read all packets and decode the first frame. ValueError: the file is cut off, or holds no frames."""
    shown: list[_Packet] = []
    first_frame, is_decoding = None, True
    num_packets, begins_at_keyframe = 0, True
    digest = hashlib.blake2b(digest_size=8)
    for packet in container.demux(stream):
        if is_decoding:
            try:
                first_frame = next(iter(packet.decode()), None)
                is_decoding = first_frame is None
            except decoding_errors():
                is_decoding = False
        if packet.size == 0:
            continue
        num_packets += 1
        digest.update(packet)
        if packet.is_corrupt:
            raise ValueError(f"truncated: packet {num_packets} is cut off")
        if num_packets == 1:
            begins_at_keyframe = packet.is_keyframe
        if not packet.is_discard:
            shown.append(_Packet(packet.pts, packet.dts, packet.is_keyframe))
    # The header's promise: what is left of it after edit lists (newer PyAV), otherwise the plain count.
    promised = len(stream.index_entries) if hasattr(stream, "index_entries") else stream.frames
    if "mp4" in container.format.name and num_packets < promised:
        raise ValueError(f"truncated: {num_packets} of {promised} frames")
    if not shown:
        raise ValueError("no frames")
    return _Demuxed(shown, begins_at_keyframe, stream.codec_context.has_b_frames, first_frame, digest.hexdigest())


def _decode_all(container: "InputContainer", stream: "VideoStream", begins_at_keyframe: bool) -> _Decoded:
    """Decode every frame. ValueError: the first keyframe does not decode, or nothing does."""
    first, begins_late = None, False
    pts: list[int | None] = []
    dts: list[int | None] = []
    key_pts: set[int | None] = set()
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except decoding_errors() as error:
            is_early = first is None or (first.pts is not None and (packet.pts is None or packet.pts < first.pts))
            if packet.is_keyframe and first is None:
                raise ValueError(f"the first frame does not decode ({one_line(error)})") from None
            if is_early:
                begins_late = True
            else:
                pts.append(packet.pts)
                dts.append(packet.dts)
            continue
        for frame in frames:
            if first is None and (frame.is_corrupt or not (begins_at_keyframe or frame.key_frame)):
                begins_late = True
                continue
            first = first or frame
            pts.append(frame.pts)
            dts.append(frame.dts)
            if frame.key_frame:
                key_pts.add(frame.pts)
    if first is None:
        raise ValueError("no frame of it decodes")
    return _Decoded(first, pts, _guessed_times(pts, dts), frozenset(key_pts), begins_late)


def _guessed_times(pts: Sequence[int | None], dts: Sequence[int | None]) -> list[int | None]:
    """Guess the times of frames by FFmpeg's rule: pts, unless more of them than of dts did not ascend so far."""
    guessed: list[int | None] = []
    faulty_pts = faulty_dts = 0
    last_pts = last_dts = -(2**63)
    for shown, decoded in zip(pts, dts, strict=True):
        if decoded is not None:
            faulty_dts += decoded <= last_dts
            last_dts = decoded
        elif shown is not None:
            last_dts = shown
        if shown is not None:
            faulty_pts += shown <= last_pts
            last_pts = shown
        elif decoded is not None:
            last_pts = decoded
        is_trusted = shown is not None and (decoded is None or faulty_pts <= faulty_dts)
        guessed.append(shown if is_trusted else decoded)
    return guessed


def _avi_times(demuxed: _Demuxed, num_frames: int) -> Sequence[int | None]:
    """Timestamps of an AVI's frames: those of its packets in ascending order, the last ones where it begins late."""
    stated = (packet.pts if packet.dts is None else packet.dts for packet in demuxed.shown)
    times = sorted(time for time in stated if time is not None)
    return times[len(times) - num_frames :] if len(times) >= num_frames else num_frames * [None]


def _shown_s(times: Sequence[int | None], fps: float, tick_s: float) -> NDArray[np.float64]:
    """Seconds from the first frame to each: a missing time follows from the one before, an earlier one is that."""
    step = 1 / fps / tick_s if fps and tick_s else 1.0
    known = next((i for i, time in enumerate(times) if time is not None), 0)
    filled = [(times[known] or 0) - step * (known - i) for i in range(known)] if times[known] is not None else []
    for time in times[len(filled) :]:
        filled.append(time if time is not None else filled[-1] + step if filled else 0.0)
    seconds = np.maximum.accumulate(np.array(filled, dtype=np.float64)) * (tick_s or 1 / (fps or 1))
    return seconds - seconds[0]


def _orientation(frame: "VideoFrame") -> tuple[int, bool]:
    """quarter_turns and mirrored of Video, from the frame's display matrix as FFmpeg's command line applies it."""
    from av.sidedata.sidedata import Type

    side_data: Any = frame.side_data
    matrices = [bytes(data) for data in side_data if data.type == Type.DISPLAYMATRIX]
    if not matrices:
        return 0, False
    a, b, _, c, d = np.frombuffer(matrices[0], np.int32)[:5].astype(float)  # x' = a x + c y, y' = b x + d y
    if not (np.hypot(a, c) and np.hypot(b, d)):
        return 0, False
    mirrored = bool(a * d - b * c < 0)
    # In a mirrored picture x has changed its sign before it is turned.
    sign = -1 if mirrored else 1
    return round(float(np.degrees(np.arctan2(-sign * b, sign * a))) / 90) % 4, mirrored


def _pace(shown_s: NDArray[np.float64], fps: float) -> dict[str, Any]:
    """Seconds from the first frame to each, and the header's rate -> fps, frame_ms and duration_s of Video."""
    last_s, intervals = float(shown_s[-1]), len(shown_s) - 1
    if not last_s:
        return {"fps": fps, "frame_ms": (), "duration_s": len(shown_s) / fps if fps else 0.0}
    duration_s = last_s * (intervals + 1) / intervals
    for rate in (fps, intervals / last_s):
        if rate and np.abs(np.arange(len(shown_s)) / rate - shown_s).max() <= ROUNDING_S:
            return {"fps": float(rate), "frame_ms": (), "duration_s": duration_s}
    frame_ms = tuple(int(step) for step in np.diff(np.rint(shown_s * 1000)))
    return {"fps": fps or intervals / last_s, "frame_ms": frame_ms, "duration_s": duration_s}
