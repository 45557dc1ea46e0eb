"""One video -> its facts: frames, keyframes, size. Found by demuxing.

If packets and their timestamps state which frames come out and when, only the first frame is decoded, as a check: a
small file costs about a millisecond. Otherwise the file is decoded once: field pictures, streams that begin at a
packet that does not decode, timestamps that are missing, repeated or in the order of decoding, AVI.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipelines.containers import (
    decoding_errors,
    image_names,
    open_container,
    part_url,
    prepare_codec,
    video_stream,
)
from data_pipelines.errors import one_line
from data_pipelines.facts import MAX_FRAME_PX, ROUNDING_S, BadFile, Video, checked
from data_pipelines.indexing.h264 import may_have_fields

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

Stamp = tuple[int, int]  # size in bytes and time stamp in nanoseconds


def stamp_of(path: str | Path) -> Stamp:
    """Return size and time stamp of a file, or of all images of a folder together. Raises OSError: it is missing."""
    status = os.stat(path)
    if not stat.S_ISDIR(status.st_mode):
        return status.st_size, status.st_mtime_ns
    images = [os.stat(os.path.join(path, name)) for name in image_names(path)]
    return sum(image.st_size for image in images), max([status.st_mtime_ns, *(image.st_mtime_ns for image in images)])


def _check_regular(path: str) -> None:
    """Raise ValueError for a folder without images, and if opening a file or image could block: a FIFO, a device."""
    images = image_names(path) if os.path.isdir(path) else []
    if not images and not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    for name in images:
        if not stat.S_ISREG(os.stat(os.path.join(path, name)).st_mode):
            raise ValueError(f"{name} is not a regular file")


def index_file(root: str | Path, path: str, max_frame_px: int = MAX_FRAME_PX) -> Video | BadFile:
    """Index a file or a folder of images, given relative to root. Any fault of it makes a BadFile; never raises.

    The images of a folder are the frames of one video, in the order of their names. Its rate is unknown (fps = 0).

    If the system refused to read it, for rights or memory or open files, size and time stamp of the BadFile are 0: it
    counts as changed and is read again the next time.
    """
    size_bytes, mtime_ns = 0, 0
    place = os.path.join(root, path)
    try:
        size_bytes, mtime_ns = stamp_of(place)
        _check_regular(place)
        if size_bytes == 0:
            raise ValueError("empty file (0 bytes)")
        facts = _probe(lambda: open_container(place), max_frame_px)
        if os.path.isdir(place):
            facts |= {"fps": 0.0, "duration_s": 0.0, "frame_ms": ()}
        return checked(Video(path=path, size_bytes=size_bytes, mtime_ns=mtime_ns, **facts))
    except (*decoding_errors(), LookupError, ArithmeticError) as error:
        is_of_system = isinstance(error, OSError | MemoryError)
        return BadFile(path, *((0, 0) if is_of_system else (size_bytes, mtime_ns)), one_line(error))


def index_member(
    root: str | Path, shard: str, path: str, offset_bytes: int, size_bytes: int, max_frame_px: int = MAX_FRAME_PX
) -> Video | BadFile:
    """Index a part of the tar `shard` in root, which gets the path `path`. Any fault makes a BadFile; never raises."""
    url = part_url(f"{root}/{shard}", offset_bytes, size_bytes)
    try:
        facts = _probe(lambda: open_container(url, path), max_frame_px)
        return checked(
            Video(path=path, size_bytes=size_bytes, mtime_ns=0, shard=shard, offset_bytes=offset_bytes, **facts)
        )
    except (*decoding_errors(), LookupError, ArithmeticError) as error:
        return BadFile(path, size_bytes, 0, one_line(error))


def _choose_stream(container: "InputContainer", reopen: Callable[[], "InputContainer"]) -> "VideoStream":
    """Return the stream that holds the video: not an attached picture; several frames before one; then the default."""
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


class _Packet(NamedTuple):
    """A packet that is shown: timestamps of presentation and decoding, and whether it is a keyframe."""

    pts: int | None
    dts: int | None
    is_key: bool


@dataclass(frozen=True, slots=True)
class _Demuxed:
    """The packets of a stream in file order, and its first frame.

    shown: the packets without those that an edit list cuts away, which are decoded and not shown.
    is_reordered: frames may be shown in another order than that of the packets.
    first_frame: None if decoding gives none, or an error.
    """

    shown: Sequence[_Packet]
    begins_at_keyframe: bool
    is_reordered: bool
    first_frame: "VideoFrame | None"
    digest: str

    @property
    def is_certain(self) -> bool:
        """Return whether each packet is one frame, shown at the time that the packet states (field pictures aside)."""
        times = [packet.pts for packet in self.shown if packet.pts is not None]
        # Streams with B-frames go back every few packets. A single step back is a fault.
        inversions = sum(later < earlier for earlier, later in pairwise(times))
        return (
            self.begins_at_keyframe
            and self.first_frame is not None
            and len(set(times)) == len(self.shown)
            and self.first_frame.pts == min(times)
            and not self.may_follow_decoding
            and (not inversions or (self.is_reordered and inversions > len(times) / 20))
        )

    @property
    def may_follow_decoding(self) -> bool:
        """Return whether frames may be reordered but no time steps back, as in a file that was copied from an AVI."""
        times = [packet.pts for packet in self.shown]
        return self.is_reordered and len(times) > 2 and _ascend(times)

    @property
    def has_open_gop(self) -> bool:
        """Return whether a packet is stored after a keyframe and shown before it."""
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

    pts: their timestamps. A packet in the middle that does not decode counts as a frame: reading it is an error.
    times: the same, with guesses for those that are missing or repeated.
    key_pts: the timestamps of keyframes.
    begins_late: as in Video.
    """

    first_frame: "VideoFrame"
    pts: Sequence[int | None]
    times: Sequence[int | None]
    key_pts: frozenset[int | None]
    begins_late: bool


def _probe(reopen: Callable[[], "InputContainer"], max_frame_px: int) -> dict[str, Any]:
    """Return the facts of a file as fields of Video. Raises ValueError: it is bad."""
    with reopen() as container:
        stream = _choose_stream(container, reopen)
        prepare_codec(stream, max_frame_px)
        number = stream.index if len(container.streams.video) > 1 else -1
        demuxed = _demux(container, stream)
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        tick_s = float(stream.time_base or 0)
        is_avi = container.format.name == "avi"
        may_be_fields = stream.codec_context.name == "h264" and may_have_fields(stream.codec_context.extradata)
    times: Sequence[int | None] = sorted(packet.pts for packet in demuxed.shown if packet.pts is not None)
    key_pts = frozenset(packet.pts for packet in demuxed.shown if packet.is_key)
    pts, first_frame, begins_late = times, demuxed.first_frame, False
    # AVI has no presentation times: what is reported as such follows the order of decoding, and may have been copied.
    follows_decoding = is_avi
    if first_frame is None or is_avi or may_be_fields or not demuxed.is_certain:
        with reopen() as container:
            stream = video_stream(container, number)
            prepare_codec(stream, max_frame_px)
            decoded = _decode_all(container, stream, demuxed.begins_at_keyframe)
        first_frame, begins_late = decoded.first_frame, decoded.begins_late
        key_pts &= decoded.key_pts  # the packets of field pictures may all call themselves keyframes
        pts = decoded.pts
        is_copied = demuxed.may_follow_decoding and len(pts) == len(times) and not _ascend(pts)
        follows_decoding = is_avi or is_copied
        if not is_copied:
            times = _avi_times(demuxed, len(pts)) if is_avi else decoded.times
    keyframes, keyframe_pts = [0], []
    if _ascend(pts) and not follows_decoding:
        ascending = [time for time in pts if time is not None]
        keyframes = [i for i, time in enumerate(ascending) if i == 0 or time in key_pts]
        keyframe_pts = [ascending[i] for i in keyframes]
    quarter_turns, mirrored = orientation_of(first_frame)
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
    """Read all packets and decode the first frame. Raises ValueError: the file is cut off, or holds no frames."""
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
    # The count in the header: without what edit lists cut away (newer PyAV), otherwise the plain count.
    promised = len(stream.index_entries) if hasattr(stream, "index_entries") else stream.frames
    if "mp4" in container.format.name and num_packets < promised:
        raise ValueError(f"truncated: {num_packets} of {promised} frames")
    if not shown:
        raise ValueError("no frames")
    return _Demuxed(shown, begins_at_keyframe, stream.codec_context.has_b_frames, first_frame, digest.hexdigest())


def _decode_all(container: "InputContainer", stream: "VideoStream", begins_at_keyframe: bool) -> _Decoded:
    """Decode every frame. Raises ValueError: the first keyframe does not decode, or nothing does."""
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


def _ascend(times: Sequence[int | None]) -> bool:
    return None not in times and all(a < b for a, b in pairwise(times))  # type: ignore[operator]


def _guessed_times(pts: Sequence[int | None], dts: Sequence[int | None]) -> list[int | None]:
    """Guess the times of frames by FFmpeg's rule: pts, unless more of them than of dts have failed to ascend so far."""
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
    """Return the timestamps of an AVI's frames: those of its packets, ascending; the last ones if it begins late."""
    stated = (packet.pts if packet.dts is None else packet.dts for packet in demuxed.shown)
    times = sorted(time for time in stated if time is not None)
    return times[len(times) - num_frames :] if len(times) >= num_frames else num_frames * [None]


def _shown_s(times: Sequence[int | None], fps: float, tick_s: float) -> NDArray[np.float64]:
    """Return the seconds from the first frame to each, [F]: ascending, missing times from the one before."""
    step = 1 / fps / tick_s if fps and tick_s else 1.0
    known = next((i for i, time in enumerate(times) if time is not None), 0)
    filled = [(times[known] or 0) - step * (known - i) for i in range(known)] if times[known] is not None else []
    for time in times[len(filled) :]:
        filled.append(time if time is not None else filled[-1] + step if filled else 0.0)
    seconds = np.maximum.accumulate(np.array(filled, dtype=np.float64)) * (tick_s or 1 / (fps or 1))
    return seconds - seconds[0]


def orientation_of(frame: "VideoFrame") -> tuple[int, bool]:
    """Return quarter_turns and mirrored of Video, from the display matrix as FFmpeg's command line applies it."""
    matrices = [bytes(data) for data in _side_data(frame) if data.type.name == "DISPLAYMATRIX"]
    if not matrices:
        return 0, False
    a, b, _, c, d = np.frombuffer(matrices[0], np.int32)[:5].astype(float)  # x' = a x + c y, y' = b x + d y
    if not (np.hypot(a, c) and np.hypot(b, d)):
        return 0, False
    mirrored = bool(a * d - b * c < 0)
    # In a mirrored picture x has changed its sign before it is turned.
    sign = -1 if mirrored else 1
    return round(float(np.degrees(np.arctan2(-sign * b, sign * a))) / 90) % 4, mirrored


def _side_data(frame: "VideoFrame") -> Any:
    """Return the side data of a frame, also where one is of a type that PyAV has no name for.

    PyAV refuses all of it then: EXIF, in photographs, is such a type of FFmpeg 8.
    """
    from av.sidedata.sidedata import Type

    setattr(Type, "_missing_", classmethod(_unnamed_type))  # noqa: B010 (mypy takes it for a method)
    return frame.side_data


def _unnamed_type(types: Any, number: object) -> Any:
    """Return a member of the enumeration `types` for a number that has no name there."""
    member = object.__new__(types)
    member._name_, member._value_ = f"TYPE_{number}", number
    return member


def _pace(shown_s: NDArray[np.float64], fps: float) -> dict[str, Any]:
    """Return fps, frame_ms and duration_s of Video, from the frames' times in seconds [F] and the header's rate."""
    last_s, intervals = float(shown_s[-1]), len(shown_s) - 1
    if not last_s:
        return {"fps": fps, "frame_ms": (), "duration_s": len(shown_s) / fps if fps else 0.0}
    duration_s = last_s * (intervals + 1) / intervals
    for rate in (fps, intervals / last_s):
        if rate and np.abs(np.arange(len(shown_s)) / rate - shown_s).max() <= ROUNDING_S:
            return {"fps": float(rate), "frame_ms": (), "duration_s": duration_s}
    frame_ms = tuple(int(step) for step in np.diff(np.rint(shown_s * 1000)))
    return {"fps": fps or intervals / last_s, "frame_ms": frame_ms, "duration_s": duration_s}
