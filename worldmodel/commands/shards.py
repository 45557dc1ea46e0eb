"""Pack a folder of videos and labels into tar shards for streaming from a disk or a store such as S3.

If SOURCE has train/, selection/ and test/, each is packed into a folder of its name. With OUT behind a URL (http,
https, s3, gs, az, abfs, hf), that URL is a data.root: data.root=s3://bucket/folder.

example:
  worldmodel shards data/videos data/shards

index existing shards in WebDataset's layout:
  worldmodel shards --index data/shards
"""

import argparse
from pathlib import Path

from data_pipelines.errors import UserError
from worldmodel.commands.shared import add_seed, check_seed

SHARD_MB = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, nargs="?", metavar="SOURCE", help="folder of videos")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of shards")
    parser.add_argument(
        "--shard-mb", type=float, default=SHARD_MB, metavar="MIB", help=f"MiB of video per shard (default: {SHARD_MB})"
    )
    add_seed(parser, "seed of the shuffle of videos over shards")
    parser.add_argument("--index", action="store_true", help="index the shards in OUT instead of packing")


def run(args: argparse.Namespace) -> None:
    from data_pipelines.formats.registry import load_videos
    from data_pipelines.shards.packing import pack_videos
    from data_pipelines.shards.scan import index_shards
    from data_pipelines.split_folders import split_folders

    check_seed(args)
    if args.index and (args.shard_mb, args.seed) != (SHARD_MB, 0):
        raise UserError("--index takes shards as they are: leave out --shard-mb and --seed")
    if args.index != (args.source is None):
        raise UserError("shards takes SOURCE and OUT, or --index and OUT")
    if args.index:
        index_shards(args.out)
        print(f"{len(load_videos(args.out).videos):,} videos in {args.out}")
        return
    splits = split_folders(args.source)
    sources = {args.out: args.source} if splits is None else {}
    for name, folder in (splits or {}).items():
        if Path(folder) not in sources.values():  # splits that share a folder share its shards in the same way
            sources[args.out / name] = Path(folder)
    siblings = list(sources.values())
    for out, source in sources.items():
        index = pack_videos(source, out, siblings=siblings, shard_mb=args.shard_mb, seed=args.seed)
        num_shards = len({video.shard for video in index.videos})
        print(f"{len(index.videos):,} videos in {num_shards:,} shards in {out}")
