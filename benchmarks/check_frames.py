"""Compare the decoded frames of damaged and odd videos with FFmpeg's.

python benchmarks/check_frames.py [--every N] [--seed S]

Writes videos in every container and codec that FFmpeg can write, in which each frame shows its number. Repacks them
with faulty times: repeated, decreasing and missing timestamps, gaps, varying rates, late starts, dropped frames,
streams that begin at a later keyframe or between keyframes. Then it compares lists of frame numbers:

- all frames, in order and resampled to several rates (`data.fps`), with the `ffmpeg` command and its filter `fps`;
- all frames from torchcodec and decord, and one from the middle, with PyAV's. Both may refuse a file, with a reason.

Frame k of a resampled video is the frame on screen k / fps seconds after the first. In FFmpeg's terms, each timestamp
is rounded up to the grid of the new rate (`round=up`), counted from the first frame. As files round timestamps, a
frame counts as on screen up to 2 ms early; FFmpeg is given timestamps that are earlier by as much. The duration of the
last frame is unknown, so the lists may differ in length there. AVI stores when packets are decoded, not when frames
are shown. For AVI the reference is the packet times, as the command is late by the frames that its decoder holds.

The exit code is 1 if a list is wrong, or a file is refused without a reason.
"""

import argparse
import math
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from data_pipelines.clips import EARLY_S
from data_pipelines.decoders import DecodeError, open_video, read_frames, resolve_decoder
from data_pipelines.errors import UserError
from data_pipelines.facts import BadFile, Video
from data_pipelines.indexing.probe import index_file
from worldmodel.commands.exits import report_errors
from worldmodel.commands.shared import check_counts, check_seed, make_out_folder

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.scheduling import kept_scheduling

SIZE_PX = 96
NUM_FRAMES = 60
RATE = 25
KEY_INTERVAL = 12
RESAMPLED = (6.0, 25.0, 33.3)
MARKS = {0: 1, 3: 0, 12: 0, 15: 0}  # blocks that are the same in all frames; the other 12 are bits of the number
BITS = [block for block in range(16) if block not in MARKS]

H264 = {"preset": "veryfast", "g": str(KEY_INTERVAL), "keyint_min": str(KEY_INTERVAL), "sc_threshold": "0"}


@dataclass(frozen=True)
class Codec:
    """An encoder with its options, and the containers that hold its streams."""

    name: str
    encoder: str
    suffixes: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()
    pix_fmt: str = "yuv420p"

    @property
    def has_b_frames(self) -> bool:
        return dict(self.options).get("bf", "0") != "0" or self.encoder == "libx265"


def _codec(name: str, encoder: str, suffixes: str, pix_fmt: str = "yuv420p", **options: str) -> Codec:
    return Codec(name, encoder, tuple(suffixes.split()), tuple(options.items()), pix_fmt)


G = str(KEY_INTERVAL)
CODECS = (
    _codec("h264", "libx264", ".mp4 .mov .mkv .avi .ts .m2ts .flv .3gp", bf="0", **H264),
    _codec("h264 B", "libx264", ".mp4 .mov .mkv .avi .ts .m2ts .flv .3gp", bf="2", **H264),
    _codec("h264 open", "libx264", ".mp4 .mkv .ts .m2ts", bf="2", **H264, **{"x264-params": "open-gop=1"}),
    _codec(
        "hevc", "libx265", ".mp4 .mkv .ts", preset="ultrafast", **{"x265-params": f"keyint={G}:open-gop=0:log-level=0"}
    ),
    _codec(
        "hevc open",
        "libx265",
        ".mp4 .mkv .ts",
        preset="ultrafast",
        **{"x265-params": f"keyint={G}:open-gop=1:bframes=2:log-level=0"},
    ),
    _codec("mpeg2", "mpeg2video", ".mpg .ts .mkv .avi", g=G, bf="0", b="900k"),
    _codec("mpeg2 B", "mpeg2video", ".mpg .ts .mkv", g=G, bf="2", b="900k"),
    _codec("mpeg1", "mpeg1video", ".mpg .mkv", g=G, bf="2", b="900k"),
    _codec("mpeg4", "mpeg4", ".mp4 .mov .mkv .avi .3gp .ts", g=G, b="900k"),
    _codec("mpeg4 B", "mpeg4", ".mp4 .mkv", g=G, bf="2", b="900k"),
    _codec("vp8", "libvpx", ".webm .mkv", g=G, deadline="realtime", **{"cpu-used": "8"}),
    _codec("vp9", "libvpx-vp9", ".webm .mkv .mp4", g=G, deadline="realtime", **{"cpu-used": "8"}),
    _codec("av1", "libsvtav1", ".mkv .mp4 .webm", g=G, preset="12", **{"svtav1-params": "lp=1"}),
    _codec("mjpeg", "mjpeg", ".avi .mov .mkv", "yuvj420p"),
    _codec("ffv1", "ffv1", ".mkv .avi"),
    _codec("wmv2", "wmv2", ".wmv .avi", g=G, b="900k"),
    _codec("msmpeg4", "msmpeg4", ".avi .wmv", g=G, b="900k"),
    _codec("flv1", "flv", ".flv", g=G, b="900k"),
)

Times = list[int]  # presentation times of frames, in ticks of 1 / 1000 s
Retime = Callable[[Times, np.random.Generator], Times]


def _varying(times: Times, rng: np.random.Generator) -> Times:
    return np.cumsum([0, *rng.choice([20, 40, 80, 33], len(times) - 1)]).tolist()


def _gap(times: Times, rng: np.random.Generator) -> Times:
    at = int(rng.integers(10, len(times) - 10))
    return [time + (3000 if i >= at else 0) for i, time in enumerate(times)]


def _repeated(times: Times, rng: np.random.Generator) -> Times:
    at = int(rng.integers(10, len(times) - 10))
    return [times[i - 1] if i == at else time for i, time in enumerate(times)]


def _decreasing(times: Times, rng: np.random.Generator) -> Times:
    at = int(rng.integers(10, len(times) - 10))
    return [times[i - 1] - 20 if i == at else time for i, time in enumerate(times)]


def _dropped(times: Times, rng: np.random.Generator) -> Times:
    """Hold every frame from the 20th on for three frames."""
    return [time if i < 20 else times[20] + 3 * (time - times[20]) for i, time in enumerate(times)]


RETIMED: dict[str, Retime] = {
    "none": lambda times, rng: times,
    "late start": lambda times, rng: [time + 5000 for time in times],
    "varying": _varying,
    "gap": _gap,
    "repeated": _repeated,
    "decreasing": _decreasing,
    "dropped": _dropped,
}
CUT = ("cut at keyframe", "cut inside")
PATCHED = "missing"
FAULTS = (*RETIMED, *CUT, PATCHED)

# What FFmpeg's command does not show as it was recorded, and so cannot be compared with.
EXCLUDED = {
    "decreasing B": "which frame a decreasing timestamp belongs to shows only where all frames are decoded",
    "varying in .mpg": "releases of FFmpeg guess the timestamps that MPEG program streams leave out differently",
    "before keyframe": "FFmpeg shows grey pictures before the first keyframe",
}


# --------------------------------------------------------------------------------------------------------- pictures


def paint(number: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Paint a number as a grid of 4 x 4 blocks: [H, W]."""
    blocks = np.array([MARKS.get(block, 0) for block in range(16)], np.uint8)
    blocks[BITS] = [number >> bit & 1 for bit in range(len(BITS))]
    return np.kron(blocks.reshape(4, 4), np.ones((SIZE_PX // 4, SIZE_PX // 4), np.uint8)) * 200 + 28


def read_number(picture: np.ndarray[Any, Any]) -> int:
    """Return the number that a picture [H, W] shows, -1 if it shows none."""
    side = SIZE_PX // 4
    means = (
        picture.reshape(4, side, 4, side)[:, side // 4 : -side // 4, :, side // 4 : -side // 4]
        .mean(axis=(1, 3))
        .reshape(-1)
    )
    is_clear = (np.abs(means - 128) > 40).all() and all((means[block] > 128) == value for block, value in MARKS.items())
    return sum(int(means[block] > 128) << bit for bit, block in enumerate(BITS)) if is_clear else -1


# ------------------------------------------------------------------------------------------------------------ files


def encode(path: Path, codec: Codec) -> None:
    """Encode a video of NUM_FRAMES numbered frames."""
    import av

    with kept_scheduling(), av.open(str(path), "w") as out:
        stream: Any = out.add_stream(codec.encoder, rate=RATE, options=dict(codec.options))
        stream.width, stream.height, stream.pix_fmt = SIZE_PX, SIZE_PX, codec.pix_fmt
        stream.codec_context.thread_count = 1
        for number in range(NUM_FRAMES):
            frame = av.VideoFrame.from_ndarray(paint(number), format="gray").reformat(format=codec.pix_fmt)
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def repack(source: Path, target: Path, fault: str, rng: np.random.Generator) -> None:
    """Copy the packets of `source` into another container, with a fault.

    Raises:
        av.FFmpegError, ValueError: the container does not accept them.
    """
    import av

    with av.open(str(source)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        order = np.argsort(np.argsort([packet.pts or 0 for packet in packets]))  # of presentation
        even = [1000 // RATE * i for i in range(len(packets))]
        times = RETIMED[fault](even, rng) if fault in RETIMED else even
        first = 0
        if fault in CUT:
            first = [i for i, packet in enumerate(packets) if packet.is_keyframe][2]
            first += 5 if fault == "cut inside" else 0
        decoded = decoding_times([times[place] for place in order], times, stream.codec_context.reorder_depth)
        with av.open(
            str(target), "w", options={"avoid_negative_ts": "disabled"} if fault == "late start" else {}
        ) as out:
            copy = out.add_stream_from_template(stream, opaque=True)
            for i, packet in enumerate(packets[first:], start=first):
                packet.stream = copy
                packet.time_base = Fraction(1, 1000)
                packet.pts, packet.dts, packet.duration = times[order[i]], decoded[i], 1000 // RATE
                out.mux(packet)
    if fault == PATCHED:
        remove_timestamp(target, rng)


def decoding_times(stored: Times, shown: Times, depth: int) -> Times:
    """Return times at which packets are decoded: ascending, and shortly before their frames are shown.

    stored, shown: presentation times in the order of the packets and of the frames. depth: frames that a decoder holds.
    """
    late = [shown[0] - 1000 // RATE * (depth - i) for i in range(depth)]
    times = [*late, *sorted(shown)][: len(stored)]
    for i in reversed(range(len(times))):
        times[i] = min(times[i], stored[i], times[i + 1] - 1 if i + 1 < len(times) else stored[i])
    return times


def remove_timestamp(path: Path, rng: np.random.Generator) -> None:
    """Remove the timestamps from one PES packet of an MPEG stream. Raises ValueError: there are none."""
    data = bytearray(path.read_bytes())
    places = [
        i
        for i in range(len(data) - 9)
        if data[i : i + 3] == b"\0\0\1" and data[i + 3] & 0xF0 == 0xE0 and data[i + 7] & 0xC0
    ]
    if len(places) < 20:
        raise ValueError("no timestamps in packet headers")
    place = places[int(rng.integers(10, len(places) - 5))]
    length = 10 if data[place + 7] & 0x40 else 5
    data[place + 7] &= 0x3F
    data[place + 9 : place + 9 + length] = b"\xff" * length
    path.write_bytes(data)


# ------------------------------------------------------------------------------------------------------------ lists


def by_ffmpeg(path: Path, fps: float | None, early_s: float) -> list[int]:
    """Return the frame numbers that the ffmpeg command decodes."""
    shift = f"settb=1/1000000,setpts=PTS-STARTPTS-{round(early_s * 1e6)},fps={fps}:round=up:start_time=0"
    filters = [] if fps is None else ["-vf", shift]
    command = ["ffmpeg", "-v", "quiet", "-i", str(path), *filters, "-fps_mode", "passthrough"]
    raw = subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "gray", "-"], capture_output=True, check=False).stdout
    return [read_number(picture) for picture in np.frombuffer(raw, np.uint8).reshape(-1, SIZE_PX, SIZE_PX)]


def packet_times(path: Path) -> list[float]:
    """Return the seconds from the first packet to each packet, as the ffprobe command reports them."""
    shown = ["-select_streams", "v", "-show_entries", "packet=dts_time", "-of", "csv=p=0"]
    done = subprocess.run(["ffprobe", "-v", "quiet", *shown, str(path)], capture_output=True, text=True, check=True)
    times = sorted(float(line.strip(",")) for line in done.stdout.split())
    return [time - times[0] for time in times]


def by_us(path: Path, video: Video, fps: float | None, decoder: str) -> list[int]:
    """Return the frame numbers that a reader decodes. Raises UserError: it rejects the file."""
    frames = read_frames(path, channels=1, size_px=None, decoder=decoder, fps=fps, video=video)
    return [read_number(frame[0]) for frame in frames]


def by_times(shown_s: Sequence[float], fps: float, early_s: float) -> list[int]:
    """Return the frames on screen at each multiple of 1 / fps up to the last frame, from known times."""
    shown_s = [time - shown_s[0] for time in shown_s]
    slots = range(math.floor((shown_s[-1] - early_s) * fps) + 1)
    return [max(i for i, time in enumerate(shown_s) if time <= slot / fps + early_s + 1e-9) for slot in slots]


def agree(ours: Sequence[int], theirs: Sequence[int], last_slot: int) -> bool:
    """Return whether two lists are equal up to `last_slot` and contain only the last frame after it."""
    decided = max(0, last_slot)
    rest = {*ours[decided:], *theirs[decided:]}
    return bool(ours) and list(ours[:decided]) == list(theirs[:decided]) and rest <= {ours[-1]}


@dataclass(frozen=True)
class Combination:
    codec: Codec
    suffix: str
    fault: str


def combinations() -> list[Combination]:
    return [Combination(codec, suffix, fault) for codec in CODECS for suffix in codec.suffixes for fault in FAULTS]


def check(
    folder: Path, combination: Combination, rng: np.random.Generator, decoders: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Return the verdicts on a file: ("same" | "refused" | "excluded" | "unwritable" | "WRONG", reason)."""
    import av

    codec, fault = combination.codec, combination.fault
    suffix = ".nut" if codec.encoder in ("wmv2", "flv") else ".mkv"  # Matroska does not take these
    source = folder / f"{codec.name.replace(' ', '_')}.source{suffix}"
    path = folder / f"{codec.name}_{fault}{combination.suffix}".replace(" ", "_")
    try:
        if not source.exists():
            encode(source, codec)
        repack(source, path, fault, rng)
    except (av.FFmpegError, ValueError) as error:
        yield "unwritable", str(error)
        return
    video = index_file(folder, path.name)
    if isinstance(video, BadFile):
        yield ("refused" if video.reason else "WRONG"), f"index: {video.reason}"
        return
    try:
        frames = by_us(path, video, None, "pyav")
    except UserError as error:
        yield "refused", f"pyav: {error}"
        return
    theirs = by_ffmpeg(path, None, 0)
    if -1 in theirs and -1 not in frames:
        yield "excluded", "before keyframe"
    else:
        yield ("same" if frames == theirs else "WRONG"), f"frames: {frames} not {theirs}"
        early_s = min(EARLY_S, float(video.shown_s()[-1]) / max(1, video.num_frames - 1) / 4)
        for fps in RESAMPLED:
            if fault == "decreasing" and codec.has_b_frames:
                yield "excluded", "decreasing B"
                continue
            if fault == "varying" and combination.suffix == ".mpg":
                yield "excluded", "varying in .mpg"
                continue
            ours = by_us(path, video, fps, "pyav")
            if combination.suffix == ".avi":
                theirs = [frames[i] for i in by_times(packet_times(path)[-len(frames) :], fps, early_s)]
            else:
                theirs = by_ffmpeg(path, fps, early_s)
            last_slot = math.ceil((float(video.shown_s()[-1]) - early_s) * fps)
            yield ("same" if agree(ours, theirs, last_slot) else "WRONG"), f"fps={fps:g}: {ours} not {theirs}"
    middle = len(frames) // 2
    for decoder in ("pyav", *decoders):
        try:
            direct = open_video(path, video, channels=1, size_px=None, decoder=decoder)
            found = read_number(direct.read(middle)[0])
            direct.close()
            yield (
                ("same" if found == frames[middle] else "WRONG"),
                f"{decoder}, frame {middle} alone: {found} not {frames[middle]}",
            )
        except (UserError, DecodeError) as error:
            yield "refused", f"{decoder}: {error}"
    for decoder in decoders:
        try:
            others = by_us(path, video, None, decoder)
            yield ("same" if others == frames else "WRONG"), f"{decoder}: {others} not {frames}"
        except UserError as error:
            yield "refused", f"{decoder}: {error}"


def usable_decoders() -> list[str]:
    found = []
    for decoder in ("torchcodec", "decord"):
        try:
            found.append(resolve_decoder(decoder))
        except UserError as error:
            print(f"{error}: left out")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="check every N-th combination (default: 1)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the faults, and the first combination (default: 0)"
    )
    parser.add_argument("--keep", type=Path, help="folder that keeps the files (default: a temporary one)")
    args = parser.parse_args()
    with report_errors():
        check_counts(args, "every")
        check_seed(args)
        if args.keep:
            make_out_folder(args.keep, f"--keep {args.keep}")
        decoders = usable_decoders()
        counts: dict[tuple[str, str], Counter[str]] = {}
        wrong: list[str] = []
        taken = combinations()[args.seed % args.every :: args.every]
        with tempfile.TemporaryDirectory() as temporary:
            folder = args.keep or Path(temporary)
            for number, combination in enumerate(tqdm(taken, unit="file")):
                row = counts.setdefault((combination.codec.name, combination.suffix), Counter())
                rng = np.random.default_rng([args.seed, number])
                try:
                    verdicts = list(check(folder, combination, rng, decoders))
                except Exception as error:  # a crash is a finding, whatever it is
                    verdicts = [("WRONG", f"{type(error).__name__}: {error}")]
                row["files"] += verdicts[0][0] != "unwritable"
                for verdict, what in verdicts:
                    row[verdict] += 1
                    if verdict == "WRONG":
                        wrong.append(f"{combination.codec.name} {combination.suffix} {combination.fault}: {what}")
        columns = ("files", "same", "refused", "excluded", "unwritable", "WRONG")
        print(f"{'codec':<10} {'file':<6}" + "".join(f"{name:>11}" for name in columns))
        for (codec, suffix), row in counts.items():
            print(f"{codec:<10} {suffix:<6}" + "".join(f"{row[name]:>11}" for name in columns))
        total = sum(counts.values(), Counter())
        print(f"{'all':<17}" + "".join(f"{total[name]:>11}" for name in columns))
        for name, reason in EXCLUDED.items():
            print(f"excluded, {name}: {reason}")
        for line in wrong:
            print(f"WRONG {line}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
