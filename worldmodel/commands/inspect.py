"""Describe a folder of videos, a video file, a tar shard, a folder of shards, a LeRobot data set or a run; list runs.

Data: counts, sizes, durations, frame rates, splits, labels, and bad files with the reason. A folder is indexed as
training does it: this writes .worldmodel_index.jsonl into it, for shards shards.jsonl, and training will read that
file. A run: its config, steps, checkpoints, last metrics and files. A folder of runs: a line for each run.

examples:
  worldmodel inspect data/moving_mnist --sheet sheet.png
  worldmodel inspect runs/demo
  worldmodel inspect runs
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from data_pipelines.errors import UserError, one_line, printable
from worldmodel.commands.shared import check_out_file

if TYPE_CHECKING:
    from data_pipelines.index import VideoIndex

MAX_BAD_SHOWN = 20
MAX_VALUES_SHOWN = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="a folder or a file")
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE", help="write a contact sheet of some videos into this PNG file"
    )
    parser.add_argument(
        "--camera",
        nargs="+",
        default=[],
        metavar="NAME",
        help="cameras of a LeRobot data set, compared with each other (default: the first by name)",
    )


def run(args: argparse.Namespace) -> None:
    from worldmodel.commands.contact_sheet import write_sheet
    from worldmodel.commands.inspect_run import describe_run, describe_runs, is_run, runs_below

    try:
        if not args.path.exists():
            raise UserError(f"{args.path}: there is no such file or folder")
        runs = [args.path] if is_run(args.path) else runs_below(args.path)
        if runs:
            if args.sheet:
                raise UserError(f"--sheet: {args.path} holds no videos: it is a run, or a folder of runs")
            if args.camera:
                raise UserError(f"--camera: {args.path} has no cameras: it is a run, or a folder of runs")
            print(describe_run(args.path) if runs == [args.path] else describe_runs(args.path, runs))
            return
        if args.sheet:
            check_out_file(args.sheet, ".png", "--sheet")
        if args.camera and not args.path.is_dir():
            raise UserError(f"--camera: {args.path} has no cameras: it is a file")
        with opened(args.path, args.camera) as splits:
            for name, index in splits.items():
                print(describe_videos(name, index))
                if args.path.is_dir() and (stored := index_file(index.root)):
                    print(f"  index     {stored}, which training also reads")
            if len(splits) == 1 and args.path.is_dir():
                print(describe_division(next(iter(splits.values()))))
            if args.sheet:
                print(write_sheet(args.sheet, [index for index in splits.values() if index.videos]))
    except BrokenPipeError:  # the reader of the output, such as `head`, has left
        raise
    except (OSError, ValueError) as error:  # such as a folder without permission, or a name that is too long
        raise UserError(f"{args.path}: {one_line(error)}") from error


@contextmanager
def opened(path: Path, cameras: Sequence[str] = ()) -> Iterator[dict[str, VideoIndex]]:
    """Index a data set, and yield the index of each split by its heading. The files can be read inside the block.

    cameras: those to take, for data sets with cameras; none: the first by name.

    Raises:
        UserError: the data set cannot be used.
    """
    from data_pipelines.decoders import read_facts
    from data_pipelines.formats.registry import load_videos
    from data_pipelines.index import VideoIndex
    from data_pipelines.split_folders import split_folders

    if path.is_dir():
        found = split_folders(path)
        folders = {"": str(path)} if found is None else {str(split): folder for split, folder in found.items()}
        siblings = list(map(Path, folders.values()))
        places: dict[str, list[str]] = {}  # splits may share a folder
        for split, folder in folders.items():
            places.setdefault(folder, []).append(split)
        yield {
            ", ".join(filter(None, (" and ".join(names), folder))): load_videos(
                folder, camera=cameras, siblings=siblings if len(folders) > 1 else (), max_bad_fraction=1.0
            )
            for folder, names in places.items()
        }
    elif path.suffix.lower() == ".tar":
        # The index of a shard is written next to it: into a temporary folder, not the user's.
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "shard.tar").symlink_to(path.resolve())
            yield {str(path): load_videos(folder, max_bad_fraction=1.0)}
    else:
        yield {str(path): VideoIndex(path.parent.resolve(), [read_facts(path)])}


def index_file(folder: Path) -> Path | None:
    """Return the file that holds the index of a folder of videos or shards; None if there is none."""
    from data_pipelines.indexing.index_file import index_path
    from data_pipelines.shards.index_file import SHARDS_NAME

    shards = folder / SHARDS_NAME
    return shards if shards.is_file() else index_path(folder)


def describe_videos(name: str, index: VideoIndex) -> str:
    """Describe the videos, labels and bad files of an index, below a heading."""
    files = {(video.shard, video.path): video for video in index.all_videos}.values()
    starts_stops = index.frame_ranges
    lengths = [stop - start for start, stop in starts_stops]
    size_mb = sum(video.size_bytes for video in files) / 2**20
    hours = sum(video.duration_s for video in files) / 3600
    lines = [name, f"  files     {len(files):,}, {size_mb:,.2f} MiB, {hours:,.2f} hours, {sum(lengths):,} frames"]
    if index.episodes is not None:
        lines.append(f"  episodes  {len(index.episodes):,}")
    if index.num_cameras > 1:
        lines.append(f"  cameras   {index.num_cameras}, side by side in the channels of a frame")
    if shards := {video.shard for video in files if video.shard}:
        lines.append(f"  shards    {len(shards):,}")
    if lengths:
        lines += [
            f"  size      {common(f'{video.width}x{video.height}' for video in files)}",
            f"  rate      {common(f'{video.fps:g} frames/s' if video.fps else 'unknown' for video in files)}",
            f"  length    {min(lengths):,} to {max(lengths):,} frames, median {median(lengths):g}",
        ]
    row = "video" if index.episodes is None else "episode"
    for kind, labels in ((row, index.labels), ("frame", index.frame_labels)):
        for label, values in labels.items():
            shape = f"{list(values.shape[1:])} numbers" if values.ndim > 1 else "one number"
            lines.append(f"  label     {label}: {shape} per {kind}, {str(values.dtype).removeprefix('torch.')}")
    lines += [f"  label     {label} is left out: {why}" for label, why in index.label_faults.items()]
    if index.bad:
        lines.append(f"  bad       {len(index.bad):,}")
        lines += [f"            {printable(entry.path)}: {entry.reason}" for entry in index.bad[:MAX_BAD_SHOWN]]
        if len(index.bad) > MAX_BAD_SHOWN:
            lines.append(f"            and {len(index.bad) - MAX_BAD_SHOWN:,} more")
    return "\n".join(lines)


def describe_division(index: VideoIndex) -> str:
    """Describe how training divides a folder that has no folders per split."""
    from data_pipelines.splits import split_index

    splits: Sequence[str] = ("train", "selection", "test")
    parts = {split: split_index(index, split) for split in splits}  # type: ignore[arg-type]
    if parts["train"].share != index.share:
        shares = ", ".join(f"{name} {part.share[0]:.0%} to {part.share[1]:.0%}" for name, part in parts.items())
        return f"  splits    of the time of each video: {shares}"
    return "  splits    by a hash of the paths: " + ", ".join(f"{name} {len(p.videos):,}" for name, p in parts.items())


def common(values: Iterator[str]) -> str:
    """List the most common values with their counts: "64x64 (12), 32x32 (3), 5 more"."""
    counts = Counter(values).most_common()
    if len(counts) == 1:
        return counts[0][0]
    listed = [f"{value} ({count:,})" for value, count in counts[:MAX_VALUES_SHOWN]]
    return ", ".join(listed + [f"{len(counts) - MAX_VALUES_SHOWN:,} more"] * (len(counts) > MAX_VALUES_SHOWN))
