"""Index a folder of videos: read the frames, keyframes and timestamps of every file.

Training does the same at its first start. Files that have not changed since the last time are not read again.
If FOLDER has train/, selection/ and test/, each of them gets an index.

examples:
  worldmodel index data/videos
  worldmodel index data/videos --verify

on a cluster: one job for each part 1/8 to 8/8, then --merge:
  worldmodel index data/videos --part 1/8
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.errors import UserError, printable
from data_pipelines.facts import BadFile, Video
from worldmodel.commands.shared import check_counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", type=Path, metavar="FOLDER", help="folder of videos")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--part", metavar="K/N", help="index every N-th file only, from the K-th on, for --merge")
    what.add_argument("--merge", action="store_true", help="merge the N parts into the index")
    what.add_argument(
        "--verify", action="store_true", help="read all files or shards again and name those that differ from the index"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that read the files (default: one per core)"
    )


def run(args: argparse.Namespace) -> None:
    from data_pipelines.indexing.folder import index_folder, merge_parts
    from data_pipelines.split_folders import split_folders

    part = parse_part(args.part) if args.part else None
    check_counts(args, "workers")
    splits = split_folders(args.root)
    folders = [args.root] if splits is None else [Path(folder) for folder in dict.fromkeys(splits.values())]
    if args.verify:
        verify(folders, args.workers)
        return
    for folder in folders:
        entries = merge_parts(folder) if args.merge else index_folder(folder, part=part, num_workers=args.workers)
        print(summary(folder, entries))
        print(f"  stored part {args.part}: --merge merges all parts" if part else f"  {index_place(folder)}")


def verify(folders: Sequence[Path], num_workers: int | None) -> None:
    """Print the files that have changed since they were indexed.

    Raises:
        UserError: there are some.
    """
    from data_pipelines.formats.registry import detect_format
    from data_pipelines.formats.tar_shards import ShardFolder
    from data_pipelines.indexing.folder import verify_folder
    from data_pipelines.shards.index_file import verify_shards

    num_changes = 0
    for folder in folders:
        in_shards = isinstance(detect_format(str(folder)), ShardFolder)
        changes = verify_shards(folder) if in_shards else verify_folder(folder, num_workers=num_workers)
        print(f"{folder}: {len(changes):,} changes since it was indexed")
        print("".join(f"  {printable(change)}\n" for change in changes), end="")
        num_changes += len(changes)
    if num_changes:
        raise UserError(f"{num_changes:,} files have changed since they were indexed: restore them, or index again")


def parse_part(text: str) -> tuple[int, int]:
    """Return K and N of "K/N".

    Raises:
        UserError: the text is not of that form, or K is not from 1 to N.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--part={text!r} must read K/N with K from 1 to N, such as 2/8")
    return int(match[1]), int(match[2])


def summary(folder: Path, entries: Sequence[Video | BadFile]) -> str:
    """Describe an index: its counts and its bad files."""
    from data_pipelines.index import VideoIndex

    videos = [entry for entry in entries if isinstance(entry, Video)]
    bad = [entry for entry in entries if isinstance(entry, BadFile)]
    num_frames = sum(video.num_frames for video in videos)
    hours = sum(video.duration_s for video in videos) / 3600
    content_hash = VideoIndex(folder, videos).content_hash
    lines = [f"{folder}: {len(videos):,} videos, {num_frames:,} frames, {hours:.2f} hours, hash {content_hash}"]
    if bad:
        lines.append(f"  {len(bad):,} bad files:")
        lines += [f"    {printable(entry.path)}: {entry.reason}" for entry in bad]
    return "\n".join(lines)


def index_place(folder: Path) -> str:
    """Name the file that holds the index of a folder."""
    from data_pipelines.indexing.index_file import index_path

    path = index_path(folder)
    return "the index could not be stored" if path is None else f"index: {path}"
