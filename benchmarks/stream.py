"""Measure clips per second: our stream, random access, decoding in order, and ffmpeg, on the same files and cores.

python benchmarks/stream.py --out stream.json

Clips are nine successive frames that do not overlap. Each measurement runs in a separate process. The methods
alternate, --repeats times, and the median is reported. A stream is timed from the start of its workers to the end of
one shuffled epoch; the case http includes fetching all shards from a server on this machine. Reading in order and at
random is timed for --seconds; random access keeps long files open.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from data_pipelines.clip_decoder import clips_of
from data_pipelines.clips import ClipSpec
from data_pipelines.containers import open_container
from data_pipelines.errors import UserError
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.readers.decord import import_decord
from data_pipelines.shards.packing import pack_videos
from data_pipelines.stream import StreamSettings, VideoStream
from data_pipelines.worlds.moving_mnist import write_moving_mnist
from worldmodel.commands.exits import report_errors
from worldmodel.commands.shared import check_counts, check_out_file, write_result
from worldmodel.training.machine import child_processes, machine_description, memory_mb

SPEC = ClipSpec()
BATCH_SIZE = 64
SIZE_PX = 64
DISTINCT_VIDEOS = 3  # of the long ones; the others are copies of them


@dataclass(frozen=True)
class Case:
    """Videos to read, with a keyframe every `keyint` frames."""

    name: str
    title: str
    channels: int
    height_px: int
    width_px: int
    num_videos: int
    num_frames: int
    keyint: int


CASES = (
    Case("tiny", "files of nine 64x64 frames, in gray", 1, 64, 64, 12_000, 9, 250),
    Case(
        "http",
        "those of tiny, in shards of 1 MiB fetched by HTTP on the loopback, none cached",
        1,
        64,
        64,
        12_000,
        9,
        250,
    ),
    Case("long_gop", "640x480 H.264, a keyframe every 250 frames, in colour at 64 px", 3, 480, 640, 27, 1500, 250),
    Case("short_gop", "640x480 H.264, a keyframe every 2 frames, in colour at 64 px", 3, 480, 640, 27, 500, 2),
)


@dataclass(frozen=True)
class Row:
    """One row of the result. A clip has nine frames."""

    case: str
    method: str
    workers: int
    clips_per_s: float
    frames_per_s: float
    peak_rss_mb: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="folder that keeps the videos for the next run (default: a temporary one)"
    )
    parser.add_argument("--out", type=Path, default=Path("stream.json"), help="JSON file to write")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], default=[c.name for c in CASES])
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="methods, such as stream in_order_pyav (default: all)"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="seconds of reading in order and at random (default: 8)"
    )
    parser.add_argument("--fraction", type=float, default=1.0, help="fraction of the videos to use (default: 1)")
    parser.add_argument("--one", nargs=3, metavar=("CASE", "METHOD", "WORKERS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    with report_errors():
        check_counts(args, "repeats")
        if not 0 < args.fraction <= 1:
            raise UserError(f"--fraction must be above 0 and at most 1, not {args.fraction}")
        cases = [shrunk(case, args.fraction) for case in CASES if case.name in args.cases]
        if args.one:
            name, method, workers = args.one
            [case] = [case for case in cases if case.name == name]
            print(json.dumps(asdict(measure(case, method, int(workers), args.data, args.seconds))))
            return 0
        known = list(dict.fromkeys(method for method, _ in methods_here()))
        if unknown := [method for method in args.methods or [] if method not in known]:
            raise UserError(f"--methods {unknown[0]}: this machine has {', '.join(known)}")
        check_out_file(args.out, ".json")
        if args.data:
            rows = bench(cases, args.data, args)
        else:
            with tempfile.TemporaryDirectory(prefix="stream_") as folder:
                rows = bench(cases, Path(folder), args)
        result = {"machine": machine_description(), "rows": [asdict(row) for row in rows]}
        write_result(args.out, result)
        print(f"{table(rows)}\n\n{ratios(rows)}\n\n{args.out}")
    return 0


def shrunk(case: Case, fraction: float) -> Case:
    return Case(**{**asdict(case), "num_videos": max(2, round(case.num_videos * fraction))})


def bench(cases: Sequence[Case], data: Path, args: argparse.Namespace) -> list[Row]:
    methods = [(method, workers) for method, workers in methods_here() if method in (args.methods or [method])]
    plans = [
        (case, method, workers)
        for case in cases
        for method, workers in methods
        if case.name != "http" or method == "stream"
    ]
    found: dict[tuple[str, str, int], list[Row]] = {}
    for case in cases:
        write_videos(case, data / case.name)
        load_videos(data / case.name)
    with tqdm(total=len(plans) * args.repeats, unit="run") as bar:
        for _ in range(args.repeats):
            for case, method, workers in plans:
                bar.set_postfix_str(f"{case.name} {method} {workers}")
                row = measure_apart(case, method, workers, data, args)
                found.setdefault((case.name, method, workers), []).append(row)
                bar.update()
    return [middle(rows) for rows in found.values()]


def methods_here() -> Iterator[tuple[str, int]]:
    """Return (method, workers) for the libraries on this machine."""
    yield from (("stream", workers) for workers in (1, 2))
    for decoder in DECODERS:
        if importlib.util.find_spec("av" if decoder == "pyav" else decoder):
            yield f"in_order_{decoder}", 0
            if decoder != "pyav":
                yield f"random_{decoder}", 0
    if shutil.which("ffmpeg"):
        yield "ffmpeg_null", 0


def measure_apart(case: Case, method: str, workers: int, data: Path, args: argparse.Namespace) -> Row:
    """Call measure() in a fresh process, so that its peak memory is that of the method."""
    command = [sys.executable, __file__, "--one", case.name, method, str(workers), "--data", str(data)]
    command += ["--fraction", str(args.fraction), "--seconds", str(args.seconds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"{case.name} {method}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def middle(rows: Sequence[Row]) -> Row:
    first = rows[0]
    speed = median(row.clips_per_s for row in rows)
    peak_mb = median(row.peak_rss_mb for row in rows)
    return Row(
        first.case, first.method, first.workers, round(speed, 1), round(speed * SPEC.length, 1), round(peak_mb, 1)
    )


def measure(case: Case, method: str, workers: int, data: Path, seconds: float) -> Row:
    if case.name == "http":
        with served(data / case.name) as (url, server_pid), tempfile.TemporaryDirectory(prefix="bench_cache_") as cache:
            index = load_videos(url, cache_dir=Path(cache), cache_mb=4096, progress=False)
            clips_per_s, peak_mb = time_stream(case, index, workers)
            peak_mb -= memory_mb(server_pid, "VmHWM")
        return Row(case.name, method, workers, clips_per_s, clips_per_s * SPEC.length, peak_mb)
    index = load_videos(data / case.name, progress=False)
    if method == "stream":
        clips_per_s, peak_mb = time_stream(case, index, workers)
    elif method == "ffmpeg_null":
        clips_per_s, peak_mb = time_ffmpeg(index, data / case.name)
    else:
        way, _, decoder = method.partition("_order_" if method.startswith("in_") else "_")
        timed = time_in_order if way == "in" else time_random
        clips_per_s, peak_mb = timed(case, index, DECODERS[decoder], seconds), memory_mb(os.getpid(), "VmHWM")
    return Row(case.name, method, workers, clips_per_s, clips_per_s * SPEC.length, peak_mb)


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, int]]:
    """Serve a folder over HTTP, and yield its URL and the server process."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            url = re.search(r"http://[\d.:]+", server.stdout.readline())
            assert url is not None, "the server says where it listens"
            yield url.group(), server.pid
        finally:
            server.kill()


# ------------------------------------------------------------------------------------------------------- methods


def time_stream(case: Case, index: VideoIndex, workers: int) -> tuple[float, float]:
    """Return clips per second over one epoch, and the peak memory of all processes together."""
    stream = VideoStream(
        index,
        SPEC,
        StreamSettings(
            size_px=SIZE_PX,
            channels=case.channels,
            batch_size=BATCH_SIZE,
            num_lanes=32,
            pool_clips=1024,
            seed=0,
            num_workers=workers,
        ),
    )
    num_clips = 0
    started_s = time.perf_counter()
    batches = stream.batches()
    for batch in islice(batches, stream.batches_per_epoch):
        num_clips += len(batch["clip_id"])
    elapsed_s = time.perf_counter() - started_s
    peak_mb = sum(memory_mb(pid, "VmHWM") for pid in (os.getpid(), *child_processes(os.getpid())))
    batches.close()
    return num_clips / elapsed_s, peak_mb


def time_in_order(case: Case, index: VideoIndex, opened: "OpenVideo", seconds: float) -> float:
    """Return clips per second with every file opened once and decoded from the first frame to the last."""
    num_frames = 0
    started_s = time.perf_counter()
    for video in index.videos:
        reader = opened(index.root / video.path, case)
        for _ in reader.in_order():
            num_frames += 1
        if time.perf_counter() - started_s > seconds:
            break
    return num_frames / SPEC.length / (time.perf_counter() - started_s)


def time_random(case: Case, index: VideoIndex, opened: "OpenVideo", seconds: float) -> float:
    """Return clips per second in random order, each read by its frame numbers."""
    table = clips_of(index, SPEC)
    clips = np.random.default_rng(0).permutation(table.num_clips)
    readers: dict[int, Any] = {}
    num_clips = 0
    started_s = time.perf_counter()
    for video, start in zip(table.videos_of(clips).tolist(), table.starts_of(clips).tolist(), strict=True):
        if video not in readers:
            if case.num_frames == SPEC.length:
                readers.clear()
            readers[video] = opened(index.root / index.videos[video].path, case)
        assert len(readers[video].clip(start, start + SPEC.length)) == SPEC.length
        num_clips += 1
        if time.perf_counter() - started_s > seconds:
            break
    return num_clips / (time.perf_counter() - started_s)


def time_ffmpeg(index: VideoIndex, root: Path) -> tuple[float, float]:
    """Time ffmpeg on one thread with all files in one process, without conversion or output."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as playlist:
        for video in index.videos:
            playlist.write(f"file '{(root / video.path).resolve()}'\n")
        playlist.flush()
        command = ["ffmpeg", "-v", "error", "-nostdin", "-threads", "1", "-f", "concat", "-safe", "0"]
        started_s = time.perf_counter()
        child = subprocess.Popen([*command, "-i", playlist.name, "-map", "0:v", "-f", "null", "-"])
        peak_mb = 0.0
        while child.poll() is None:
            with suppress(StopIteration, OSError):  # it has just ended
                peak_mb = memory_mb(child.pid, "VmHWM")
            time.sleep(0.02)
        elapsed_s = time.perf_counter() - started_s
    if child.returncode:
        raise UserError(f"ffmpeg failed on the videos of {root}")
    num_frames = sum(video.num_frames for video in index.videos)
    return num_frames / SPEC.length / elapsed_s, peak_mb


class PyavVideo:
    """A video read in order. The stream is built on PyAV's random access."""

    def __init__(self, path: Path, case: Case) -> None:
        from av.video.reformatter import VideoReformatter

        self._container = open_container(path)
        self._container.streams.video[0].thread_type = "NONE"
        self._channels = case.channels
        self._size = {"width": SIZE_PX * case.width_px // case.height_px, "height": SIZE_PX}
        self._reformatter = VideoReformatter()

    def in_order(self) -> Iterator[np.ndarray]:
        format_name = "gray" if self._channels == 1 else "rgb24"
        with self._container as container:
            for frame in container.decode(video=0):
                converted = self._reformatter.reformat(
                    frame, format=format_name, interpolation="AREA", threads=1, **self._size
                )
                yield converted.to_ndarray()


class DecordVideo:
    """A video read by decord, which resizes during decoding, always to RGB."""

    def __init__(self, path: Path, case: Case) -> None:
        decord = import_decord()
        width_px = SIZE_PX * case.width_px // case.height_px
        self._reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1, width=width_px, height=SIZE_PX)

    def in_order(self) -> Iterator[np.ndarray]:
        for _ in range(len(self._reader)):
            yield self._reader.next().asnumpy()

    def clip(self, start: int, stop: int) -> np.ndarray:
        return self._reader.get_batch(range(start, stop)).asnumpy()


class TorchcodecVideo:
    """A video read by torchcodec at full size. Resizing is not timed."""

    def __init__(self, path: Path, case: Case) -> None:
        from torchcodec.decoders import VideoDecoder

        self._decoder = VideoDecoder(str(path), num_ffmpeg_threads=1)

    def in_order(self) -> Iterator[np.ndarray]:
        num_frames = len(self._decoder)
        for start in range(0, num_frames, 32):
            yield from self._decoder.get_frames_in_range(start, min(start + 32, num_frames)).data.numpy()

    def clip(self, start: int, stop: int) -> np.ndarray:
        return self._decoder.get_frames_in_range(start, stop).data.numpy()


OpenVideo = Callable[[Path, Case], PyavVideo | DecordVideo | TorchcodecVideo]
DECODERS: dict[str, OpenVideo] = {"pyav": PyavVideo, "decord": DecordVideo, "torchcodec": TorchcodecVideo}

# -------------------------------------------------------------------------------------------------------- videos


def write_videos(case: Case, folder: Path) -> None:
    """Write the videos of a case, except those that exist."""
    if case.name == "tiny":
        write_moving_mnist(
            folder, {"train": case.num_videos, "selection": 1, "test": 1}, num_processes=os.cpu_count() or 1
        )
        return
    if case.name == "http":
        write_videos(Case(**{**asdict(case), "name": "tiny"}), folder.with_name("tiny"))
        if not folder.exists():
            pack_videos(folder.with_name("tiny"), folder, shard_mb=1)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for number in tqdm(range(case.num_videos), desc=f"{case.name} videos", unit="file"):
        path = folder / f"{number:03d}.mp4"
        if path.is_file():
            continue
        if number >= DISTINCT_VIDEOS:
            shutil.copyfile(folder / f"{number % DISTINCT_VIDEOS:03d}.mp4", path)
        else:
            write_scene(path.with_suffix(".partial"), case, number)
            path.with_suffix(".partial").replace(path)


def write_scene(path: Path, case: Case, seed: int, codec: str = "libx264", **options: str) -> None:
    """Write a textured background that pans, with blocks that move across it, at 25 frames per second.

    options: of the codec, instead of those for H.264.
    """
    import av

    height, width = case.height_px, case.width_px
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8)
    background = np.kron(coarse, np.ones((40, 40, 1), dtype=np.uint8)) // 2
    background += rng.integers(0, 8, background.shape, dtype=np.uint8)
    starts, speeds = rng.uniform(0, 1, (6, 2)), rng.uniform(-0.01, 0.01, (6, 2))
    colours = rng.integers(0, 256, (6, 3))
    with av.open(str(path), "w", format="mp4") as container:
        options = options or {"crf": "23", "preset": "veryfast", "sc_threshold": "0"}
        stream: Any = container.add_stream(codec, rate=25, options={**options, "g": str(case.keyint)})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for time_step in range(case.num_frames):
            image = np.roll(background, (time_step // 2, time_step), axis=(0, 1))
            corners = ((starts + time_step * speeds) % 1 * (height - 60, width - 60)).astype(int)
            for (top, left), colour in zip(corners, colours, strict=True):
                image[top : top + 60, left : left + 60] = colour
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


# -------------------------------------------------------------------------------------------------------- results


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'case':<10} {'method':<20} {'workers':>7} {'clips/s':>9} {'frames/s':>9} {'peak RSS, MB':>13}"]
    for case in CASES:
        for row in rows:
            if row.case == case.name:
                lines.append(
                    f"{row.case:<10} {row.method:<20} {row.workers:>7} {row.clips_per_s:>9,.1f} "
                    f"{row.frames_per_s:>9,.0f} {row.peak_rss_mb:>13,.0f}"
                )
    return "\n".join(lines)


def ratios(rows: Sequence[Row]) -> str:
    """Return the ratios that the benchmark is about, one line per case."""
    speeds = {(row.case, row.method, row.workers): row.clips_per_s for row in rows}
    lines = []
    for case in CASES:
        one = speeds.get((case.name, "stream", 1))
        if one is None:
            continue
        parts = [f"two workers {speeds[case.name, 'stream', 2] / one:.2f} x one"]
        for label, key in (
            ("random access by decord", ("random_decord", 0)),
            ("random access by torchcodec", ("random_torchcodec", 0)),
            ("decoding in order by PyAV", ("in_order_pyav", 0)),
        ):
            if other := speeds.get((case.name, *key)):
                parts.append(f"{one / other:.2f} x {label}")
        lines.append(f"{case.name} ({case.title}), one worker: {'; '.join(parts)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
