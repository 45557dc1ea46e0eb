"""Measure what grows with size: opening an index, memory, resuming, evaluation, the report, and the step.

python benchmarks/growth.py --out growth

Each point is measured in a fresh process. Writes growth/growth.json and one picture with a chart for each quantity:

    first batch     seconds from nothing to the first batch, against the number of indexed files
    memory          MiB of a stream and its workers after 100 batches, against the number of indexed files
    resume          seconds from a saved state to the next batch, against the number of batches before it
    evaluation      seconds of `worldmodel evaluate`, against the number of queries
    report          MB of report.html, against the number of queries
    step            seconds of a training step on the same global batch, against the number of processes

The files are hard links to 500 videos of nine 64x64 frames; their index is written with the facts of those, so that
100,000 files need not be indexed. Opening them still checks the size and time of each. Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from data_pipelines.clips import ClipSpec
from data_pipelines.errors import UserError
from data_pipelines.facts import Video
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.indexing.index_file import write_index_file
from data_pipelines.indexing.probe import index_file, stamp_of
from data_pipelines.stream import StreamSettings, VideoStream
from data_pipelines.worlds.moving_mnist import write_moving_mnist
from worldmodel.commands.exits import report_errors
from worldmodel.commands.shared import make_out_folder, write_result
from worldmodel.training.machine import child_processes, machine_description, memory_mb

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from worldmodel.report.drawing import Theme

DISTINCT_VIDEOS = 500
RESUMED_FILES = 10_000
MEMORY_BATCHES = 100
SETTINGS = StreamSettings(batch_size=64, size_px=64, channels=1, num_workers=1, num_lanes=32, pool_clips=1024)
TRAIN = (
    "data.mnist_dir=null",
    "data.batch_size=64",
    "model.encoder.width=0.25",
    "train.steps=2",
    "train.warmup_steps=1",
)


@dataclass(frozen=True)
class Quantity:
    """A quantity and its chart: `measure(size, work)` for each size, where `work` is a folder for files."""

    title: str
    x: str
    y: str
    sizes: Sequence[int]
    measure: Callable[[int, Path], float]


# ------------------------------------------------------------------------------------------------------------ measures


def linked_folder(num_files: int, work: Path) -> Path:
    """Return a folder of num_files links to short videos, with its index; it is kept for the next measure."""
    folder = work / f"files_{num_files}"
    if (folder / "done").exists():
        return folder / "videos"
    world = work / "world"
    if not (world / "world.json").exists():
        write_moving_mnist(
            world, {"train": DISTINCT_VIDEOS, "selection": 1, "test": 1}, num_processes=os.cpu_count() or 1
        )
    sources = sorted((world / "train").glob("*.mp4"))
    facts = [index_file(path.parent, path.name) for path in sources]
    entries = []
    videos = folder / "videos"
    videos.mkdir(parents=True)
    for number in tqdm(range(num_files), desc="links", unit="file", leave=False):
        source, fact = sources[number % len(sources)], facts[number % len(facts)]
        name = f"{number:07d}.mp4"
        (videos / name).hardlink_to(source)
        assert isinstance(fact, Video)
        size_bytes, mtime_ns = stamp_of(source)
        entries.append(replace(fact, path=name, size_bytes=size_bytes, mtime_ns=mtime_ns))
    write_index_file(videos, entries)
    (folder / "done").touch()
    return videos


def make_stream(index: VideoIndex) -> VideoStream:
    return VideoStream(index, ClipSpec(num_segments=1, num_frames=9), SETTINGS)


def first_batch_s(num_files: int, work: Path) -> float:
    root = linked_folder(num_files, work)
    started_s = time.perf_counter()
    with closing(make_stream(load_videos(root)).batches()) as batches:
        next(batches)
        return time.perf_counter() - started_s


def stream_mb(num_files: int, work: Path) -> float:
    index = load_videos(linked_folder(num_files, work))
    with closing(make_stream(index).batches()) as batches:
        for _ in islice(batches, MEMORY_BATCHES):
            pass
        return sum(memory_mb(process, "Pss") for process in [os.getpid(), *child_processes(os.getpid())])


def resume_s(num_batches: int, work: Path) -> float:
    index = load_videos(linked_folder(RESUMED_FILES, work))
    started_s = time.perf_counter()
    with closing(make_stream(index).batches(num_batches)) as batches:
        next(batches)
        return time.perf_counter() - started_s


def evaluation_s(queries: int, work: Path) -> float:
    """Evaluate a run after two steps of training."""
    run = work / f"queries_{queries}"
    command = [sys.executable, "-m", "worldmodel"]
    keys = [*TRAIN, f"evaluation.queries={queries}", f"run_dir={run}"]
    subprocess.run([*command, "train", "--config", "paper", *keys], check=True)
    started_s = time.perf_counter()
    subprocess.run([*command, "evaluate", "--run", str(run)], check=True)
    return time.perf_counter() - started_s


def report_mb(queries: int, work: Path) -> float:
    report = work / f"queries_{queries}" / "report.html"
    if not report.exists():
        evaluation_s(queries, work)
    return report.stat().st_size / 1e6


def step_s(num_processes: int, work: Path) -> float:
    out = work / "scaling.json"
    command = [sys.executable, str(Path(__file__).with_name("scaling.py")), "--processes", str(num_processes)]
    subprocess.run([*command, "--rounds", "1", "--steps", "8", "--out", str(out)], check=True)
    step: float = json.loads(out.read_text(encoding="utf-8"))["rows"][0]["step_s"]
    return step


QUANTITIES = {
    "first_batch": Quantity("First batch", "indexed files", "s", (1_000, 10_000, 100_000, 1_000_000), first_batch_s),
    "memory": Quantity("Memory of a stream", "indexed files", "MiB", (1_000, 10_000, 100_000, 1_000_000), stream_mb),
    "resume": Quantity("Resume", "batches before", "s", (100, 10_000, 1_000_000, 100_000_000), resume_s),
    "evaluation": Quantity("Evaluation", "queries", "s", (64, 256, 1_024, 4_096), evaluation_s),
    "report": Quantity("Report", "queries", "MB", (64, 256, 1_024, 4_096), report_mb),
    "step": Quantity("Training step", "processes", "s", (1, 2, 4), step_s),
}


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("growth"), help="folder of the results (default: growth)")
    parser.add_argument("--quantities", nargs="+", choices=list(QUANTITIES), default=list(QUANTITIES))
    parser.add_argument("--most", type=int, help="leave out sizes above this one")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # in one of the processes: QUANTITY=SIZE
    args = parser.parse_args()
    with report_errors():
        if args.measure:
            name, _, size = args.measure.partition("=")
            (args.out / "value.json").write_text(json.dumps(QUANTITIES[name].measure(int(size), args.out)))
            return 0
        names = [name for name in args.quantities if sizes_of(name, args.most)]
        if not names:
            least = min(min(QUANTITIES[name].sizes) for name in args.quantities)
            raise UserError(f"--most {args.most} leaves nothing to measure: the smallest size is {least:,}")
        make_out_folder(args.out)
        result = measured(names, args.most)
        write_result(args.out / "growth.json", {"machine": machine_description()} | result)
        draw(result, args.out / "growth.webp")
        print(f"{table(result)}\n{args.out / 'growth.json'}\n{args.out / 'growth.webp'}")
    return 0


def sizes_of(name: str, most: int | None) -> list[int]:
    """Return the sizes of a quantity that are not above `most`."""
    return [size for size in QUANTITIES[name].sizes if most is None or size <= most]


def measured(names: Sequence[str], most: int | None) -> dict[str, dict[str, list[float]]]:
    """Return {"sizes": [...], "values": [...]} of each quantity."""
    points = [(name, size) for name in names for size in sizes_of(name, most)]
    result: dict[str, dict[str, list[float]]] = {name: {"sizes": [], "values": []} for name in names}
    with tempfile.TemporaryDirectory(prefix="growth_") as folder, tqdm(points, unit="point") as bar:
        for name, size in bar:
            bar.set_postfix_str(f"{name} {size:,}")
            result[name]["sizes"].append(size)
            result[name]["values"].append(value_of(name, size, Path(folder)))
    return result


def value_of(name: str, size: int, work: Path) -> float:
    """Measure one point in a process of its own. Raises UserError: it failed."""
    command = [sys.executable, __file__, "--measure", f"{name}={size}", "--out", str(work)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise UserError(f"{name} of {size} could not be measured:\n{done.stderr[-2000:]}")
    value: float = json.loads((work / "value.json").read_text())
    return value


def table(result: dict[str, dict[str, list[float]]]) -> str:
    lines = []
    for name, points in result.items():
        quantity = QUANTITIES[name]
        pairs = zip(points["sizes"], points["values"], strict=True)
        values = "   ".join(f"{size:,}: {value:.3g} {quantity.y}" for size, value in pairs)
        lines.append(f"{quantity.title:20} by {quantity.x:15} {values}")
    return "\n".join(lines)


def draw(result: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw a chart for each quantity, on logarithmic sizes, from zero."""
    from matplotlib.figure import Figure

    from worldmodel.report.drawing import THEMES, save, style

    with style(THEMES["light"]) as theme:
        figure = Figure(figsize=(9, 5), layout="constrained")
        for position, (name, points) in enumerate(result.items()):
            _draw_one(figure, position, QUANTITIES[name], points, theme)
        with path.open("wb") as file:
            save(figure, file, "webp", dpi=110)


def _draw_one(
    figure: "Figure", position: int, quantity: Quantity, points: dict[str, list[float]], theme: "Theme"
) -> None:
    axes = figure.add_subplot(2, 3, position + 1)
    axes.plot(points["sizes"], points["values"], marker="o", markersize=4, color=theme["model"])
    axes.set_xscale("log", base=2 if quantity.x == "processes" else 10)
    axes.set_xticks(points["sizes"], [f"{size:,}" for size in points["sizes"]], fontsize=8)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_title(f"{quantity.title}, {quantity.y}", fontsize=10)
    axes.set_xlabel(quantity.x)


if __name__ == "__main__":
    sys.exit(main())
