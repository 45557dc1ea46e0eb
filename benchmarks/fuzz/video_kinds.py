"""Damaged videos, and videos with odd times."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from fractions import Fraction
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fuzz.containers import TIMED_SUFFIXES, damage_record, damage_times
from benchmarks.fuzz.kinds import Case, Kind, require
from benchmarks.fuzz.media import FPS, NUM_FRAMES, number_in, write_all
from benchmarks.fuzz.mutate import damage_bytes
from benchmarks.fuzz.sandbox import is_clean
from data_pipelines.clips import MAX_HOLD_S, frames_on_screen
from data_pipelines.decoders import DecodeError, open_video
from data_pipelines.errors import UserError
from data_pipelines.facts import BadFile, Video, entry_from_fields
from data_pipelines.indexing.probe import index_file

DECODERS = ("pyav", "torchcodec", "decord")
# decord 0.6.0 carries an FFmpeg of 2021, which crashes at some damage: it is not for files from strangers.
SAFE_DECODERS = ("pyav", "torchcodec")
MAX_READS = 60
RATES = (0.5, 1, 10, 24, 25, 29.97, 60, 120)


def prepare_videos(seeds: Path) -> None:
    written = write_all(seeds)
    assert len(written) > 40, f"FFmpeg writes only {len(written)} combinations of codec and container"


def _seeds(folder: Path, suffixes: Sequence[str] | None = None) -> list[Path]:
    return sorted(path for path in folder.iterdir() if suffixes is None or path.suffix in suffixes)


# -------------------------------------------------------------------------------------------------------- damage


def build_video(rng: random.Random, seeds: Path, folder: Path) -> Case:
    """Copy a video and damage its records or its bytes; one in eight stays valid."""
    source, other = rng.choice(_seeds(seeds)), rng.choice(_seeds(seeds))
    path = folder / f"video{source.suffix}"
    data, suffix = source.read_bytes(), source.suffix
    is_good = rng.random() < 0.125
    if not is_good:
        for _ in range(rng.choice((1, 1, 2, 4))):
            if rng.random() < 0.6:
                data = damage_record(rng, data, suffix)
            else:
                data = damage_bytes(rng, data, other.read_bytes())
        if rng.random() < 0.05:
            path = path.with_suffix(rng.choice((".mp4", ".mkv", ".ts", ".avi")))  # not what its name says
    path.write_bytes(data)
    decoders = DECODERS if is_good else (rng.choice(SAFE_DECODERS),)
    numbers = list(range(NUM_FRAMES)) if is_good else None
    fps, order = rng.choice(RATES), rng.choice(("forward", "random"))
    return Case(partial(attempt_video, path, decoders, numbers, fps, order, rng), is_good)


def attempt_video(
    path: Path,
    decoders: Sequence[str],
    numbers: list[int] | None,
    fps: float,
    order: str,
    rng: random.Random,
) -> str:
    """Index a file, check the facts in the index, and read frames. numbers: those that its frames show."""
    entry = index_file(path.parent, path.name)
    if isinstance(entry, BadFile):
        return entry.reason or "without a reason"
    check_facts(entry)
    if numbers is not None:
        require(entry.num_frames == len(numbers), f"{entry.num_frames} frames of {len(numbers)}")
    reason = check_resampling(entry, fps)
    for decoder in decoders:
        refusal = read_some(path, entry, decoder, numbers, order, rng)
        # decord and torchcodec decline files that they read wrongly; PyAV reads whatever is good.
        reason = reason or (refusal if numbers is None or decoder == "pyav" else "")
    return reason


def check_facts(video: Video) -> None:
    """Check that the facts of a video are possible and survive the index file. Raises WrongError: they do not."""
    require(video.num_frames >= 1 and video.width >= 1 and video.height >= 1, f"impossible size: {video}"[:300])
    for name in ("fps", "duration_s", "tick_s"):
        require(0 <= getattr(video, name) < float("inf"), f"{name}={getattr(video, name)}")
    keyframes = video.keyframes
    require(bool(keyframes) and keyframes[0] == 0, f"keyframes start with {keyframes[:3]}")
    require(all(a < b for a, b in pairwise(keyframes)) and keyframes[-1] < video.num_frames, "keyframes out of order")
    require(len(video.keyframe_pts) in (0, len(keyframes)), "keyframes without times")
    require(all(a < b for a, b in pairwise(video.keyframe_pts)), "times of keyframes out of order")
    require(len(video.frame_ms) in (0, video.num_frames - 1), f"{len(video.frame_ms)} steps of time")
    shown_s = video.shown_s()
    require(bool(np.isfinite(shown_s).all()) and bool((np.diff(shown_s) >= 0).all()), "times of frames out of order")
    require(entry_from_fields(json.loads(json.dumps(asdict(video)))) == video, "the index file changes the facts")


def check_resampling(video: Video, fps: float) -> str:
    """Check frames_on_screen at a rate. Return the reason if it refuses."""
    try:
        source = frames_on_screen(video, fps)
    except UserError as error:
        return str(error)
    require(len(source) >= 1 and source[0] >= 0 and source[-1] < video.num_frames, "resampled frames out of range")
    require(bool((np.diff(source) >= 0).all()), "resampled frames go back")
    span_s = float(np.minimum(np.diff(video.shown_s()), MAX_HOLD_S).sum())
    longest_s = span_s + MAX_HOLD_S
    require(span_s * fps - 2 <= len(source) <= longest_s * fps + 2, f"{len(source)} frames at {fps} fps of {span_s} s")
    return ""


def read_some(path: Path, video: Video, decoder: str, numbers: list[int] | None, order: str, rng: random.Random) -> str:
    """Read frames in order or at random. Return the reason if one is missing."""
    count = min(video.num_frames, MAX_READS)
    frames = list(range(count)) if order == "forward" else [rng.randrange(video.num_frames) for _ in range(count // 2)]
    size_px, channels = rng.choice(((None, 3), (None, 1), (32, 1), (96, 3)))
    try:
        reader = open_video(path, video, channels=channels, size_px=size_px, decoder=decoder)
        try:
            for frame in frames:
                picture = reader.read(frame)
                shape = (channels, video.height, video.width) if size_px is None else (channels, size_px, size_px)
                require(picture.dtype == np.uint8 and picture.shape == shape, f"{decoder}: a frame of {picture.shape}")
                if numbers is not None and size_px is None:
                    shown = number_in(picture)
                    require(shown == numbers[frame], f"{decoder} gives {shown} for frame {frame}, of {numbers[frame]}")
        finally:
            reader.close()
    except DecodeError as error:
        require(is_clean(str(error)), f"the reason is not one clean line: {str(error)!r}")
        return str(error) or "without a reason"
    return ""


# --------------------------------------------------------------------------------------------------------- times


def build_times(rng: random.Random, seeds: Path, folder: Path) -> Case:
    """Copy a video with faults in its times, written by FFmpeg from changed packets or changed in its bytes."""
    source = rng.choice(_seeds(seeds, TIMED_SUFFIXES))
    path = folder / f"video{source.suffix}"
    if rng.random() < 0.5:
        data = source.read_bytes()
        for _ in range(rng.choice((1, 1, 2, 3, 8))):
            data = damage_times(rng, data, source.suffix)
        path.write_bytes(data)
    else:
        path = path.with_suffix(rng.choice((source.suffix, ".mkv", ".mp4", ".ts", ".mov")))
        fault = rng.choice(sorted(FAULTS))
        if not _write_with_fault(rng, source, path, FAULTS[fault]):
            shutil.copyfile(source, path.with_suffix(source.suffix))
            path = path.with_suffix(source.suffix)
    decoders = (rng.choice(SAFE_DECODERS),)
    return Case(partial(attempt_video, path, decoders, None, rng.choice(RATES), "forward", rng))


Times = list[list[int | None]]  # of each packet: pts, dts


def _duplicated(rng: random.Random, times: Times, step: int) -> None:
    at = rng.randrange(1, len(times))
    times[at][0] = times[at - 1][0]


def _missing(rng: random.Random, times: Times, step: int) -> None:
    for _ in range(rng.choice((1, 2, len(times)))):
        times[rng.randrange(len(times))][0] = None


def _none_at_all(rng: random.Random, times: Times, step: int) -> None:
    for pair in times:
        pair[0] = None


def _decreasing(rng: random.Random, times: Times, step: int) -> None:
    at = rng.randrange(1, len(times))
    times[at][0], times[at - 1][0] = times[at - 1][0], times[at][0]


def _shifted(rng: random.Random, times: Times, step: int) -> None:
    """Shift times from one packet on: a gap, a jump of hours, a wrap of MPEG's 33 bits, or a jump back."""
    at = rng.randrange(len(times))
    ticks = rng.choice((5 * step, 1000 * step, 3600 * FPS * step, 2**31, 2**33, -step, -100 * step, -(2**31)))
    for pair in times[at:]:
        pair[0] = None if pair[0] is None else pair[0] + ticks
        pair[1] = None if pair[1] is None or ticks < 0 else pair[1] + ticks


def _negative(rng: random.Random, times: Times, step: int) -> None:
    ticks = rng.choice((step, 10 * step, 1000 * step))
    for pair in times:
        pair[:] = [None if time is None else time - ticks for time in pair]


def _uneven(rng: random.Random, times: Times, step: int) -> None:
    for pair in times:
        pair[0] = None if pair[0] is None else pair[0] + rng.randint(-step // 2, step // 2)


def _equal(rng: random.Random, times: Times, step: int) -> None:
    for pair in times:
        pair[0] = 0


def _dropped(rng: random.Random, times: Times, step: int) -> None:
    """Drop a packet, possibly the first one."""
    del times[rng.choice((0, 1, rng.randrange(len(times))))]


FAULTS: dict[str, Callable[[random.Random, Times, int], None]] = {
    **{"duplicated": _duplicated, "missing": _missing, "none": _none_at_all, "decreasing": _decreasing},
    **{"shifted": _shifted, "negative": _negative, "uneven": _uneven, "equal": _equal, "dropped": _dropped},
}
TIME_BASES = (
    None,
    None,
    None,
    Fraction(1, 1000),
    Fraction(1, 1),
    Fraction(1, 2**31 - 1),
    Fraction(1, 25),
    Fraction(7, 3),
)


def _write_with_fault(
    rng: random.Random, source: Path, path: Path, fault: Callable[[random.Random, Times, int], None]
) -> bool:
    """Copy packets with changed times. Return whether FFmpeg wrote the file."""
    import av

    try:
        with av.open(str(source)) as read, av.open(str(path), "w") as out:
            stream: Any = out.add_stream_from_template(read.streams.video[0])
            packets = [packet for packet in read.demux(video=0) if packet.size]
            base = rng.choice(TIME_BASES)
            if base is not None:
                stream.time_base = base
            step = max(1, round(1 / (FPS * (packets[0].time_base or 1))))
            times: Times = [[packet.pts, packet.dts] for packet in packets]
            fault(rng, times, step)
            for packet, (pts, dts) in zip(packets, times, strict=False):
                packet.pts, packet.dts = pts, dts
                packet.stream = stream
                out.mux_one(packet)
    except (av.FFmpegError, ValueError, OverflowError):
        return path.is_file() and path.stat().st_size > 1000  # the packets before the one that it refused
    return True


KINDS = (
    Kind("videos", prepare_videos, build_video, cpu_s=20),
    Kind("times", prepare_videos, build_times, cpu_s=20),
)
