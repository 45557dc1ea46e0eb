"""Index a folder of videos, as training does by itself at the first start; on a cluster in parts.

python scripts/index_videos.py FOLDER
python scripts/index_videos.py FOLDER --part 1/8   (one job for each of 1/8 to 8/8, then --merge)
python scripts/index_videos.py FOLDER --verify     (read all files again, and name those that differ from the index)

Files that did not change since the last time are not read again. Where FOLDER has train/, selection/ and test/, each
gets an index of its own.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.errors import UserError
from data_pipelines.facts import BadFile, Video
from data_pipelines.formats.registry import detect_format
from data_pipelines.formats.tar_shards import ShardFolder
from data_pipelines.index import VideoIndex
from data_pipelines.indexing.folder import index_folder, merge_parts, verify_folder
from data_pipelines.indexing.index_file import index_path
from data_pipelines.shards.index_file import verify_shards
from data_pipelines.split_folders import split_folders
from worldmodel.commands.shared import check_counts, report_errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="FOLDER")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--part", metavar="K/N", help="index only every N-th file and put the result aside")
    what.add_argument("--merge", action="store_true", help="put the N parts together")
    what.add_argument("--verify", action="store_true", help="compare all files, or shards, with the index by content")
    parser.add_argument("--workers", type=int, help="processes of this machine; default: one a core")
    args = parser.parse_args()
    with report_errors():
        part = parse_part(args.part) if args.part else None
        check_counts(args, "workers")
        splits = split_folders(args.root)
        folders = [args.root] if splits is None else list(map(Path, splits.values()))
        if args.verify:
            verify(folders, args.workers)
            return 0
        for folder in folders:
            entries = merge_parts(folder) if args.merge else index_folder(folder, part=part, num_workers=args.workers)
            print(summary(folder, entries))
            print(f"  part {args.part} put aside: --merge puts all together" if part else f"  {where(folder)}")
    return 0


def verify(folders: Sequence[Path], num_workers: int | None) -> None:
    """Raises UserError: files have changed; they are printed first."""
    num_changes = 0
    for folder in folders:
        in_shards = isinstance(detect_format(str(folder)), ShardFolder)
        changes = verify_shards(folder) if in_shards else verify_folder(folder, num_workers=num_workers)
        print(f"{folder}: {len(changes):,} changes since it was indexed")
        print("".join(f"  {change}\n" for change in changes), end="")
        num_changes += len(changes)
    if num_changes:
        raise UserError(f"{num_changes:,} files have changed since they were indexed: restore them, or index again")


def parse_part(text: str) -> tuple[int, int]:
    """ "2/8" -> (2, 8)"""
    match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--part={text!r} must read K/N with K from 1 to N, such as 2/8")
    return int(match[1]), int(match[2])


def summary(folder: Path, entries: Sequence[Video | BadFile]) -> str:
    videos = [entry for entry in entries if isinstance(entry, Video)]
    bad = [entry for entry in entries if isinstance(entry, BadFile)]
    num_frames = sum(video.num_frames for video in videos)
    hours = sum(video.duration_s for video in videos) / 3600
    content_hash = VideoIndex(folder, videos).content_hash
    lines = [f"{folder}: {len(videos):,} videos, {num_frames:,} frames, {hours:.2f} hours, hash {content_hash}"]
    if bad:
        lines.append(f"  {len(bad):,} bad files:")
        lines += [f"    {entry.path}: {entry.reason}" for entry in bad]
    return "\n".join(lines)


def where(folder: Path) -> str:
    path = index_path(folder)
    return "the index could not be stored" if path is None else f"index: {path}"


if __name__ == "__main__":
    sys.exit(main())
