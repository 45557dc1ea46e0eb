"""Pack a folder of videos into tar shards for streaming, from a disk or from a store such as S3.

python scripts/make_shards.py SOURCE OUT     pack videos and labels; train/, selection/ and test/ each by itself
python scripts/make_shards.py --index OUT    index shards that are there, of WebDataset's layout

OUT, put behind a URL (http, https, s3, gs, az, abfs, hf), is then a data.root: data.root=s3://bucket/folder.
"""

import argparse
import sys
from pathlib import Path

from data_pipelines.formats.registry import load_videos
from data_pipelines.shards.packing import pack_videos
from data_pipelines.shards.scan import index_shards
from data_pipelines.split_folders import split_folders
from worldmodel.commands.shared import report_errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", help="folder of videos")
    parser.add_argument("out", type=Path, help="folder of shards")
    parser.add_argument("--shard-mb", type=float, default=64, help="MiB of video in a shard (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="shuffles the videos over the shards (default: 0)")
    parser.add_argument("--index", action="store_true", help="write the index of the shards that are in OUT")
    args = parser.parse_args()
    if args.index != (args.source is None):
        parser.error("give SOURCE and OUT, or --index and OUT")
    with report_errors():
        if args.index:
            index_shards(args.out)
            print(f"{len(load_videos(args.out).videos):,} videos in {args.out}")
            return 0
        splits = split_folders(args.source)
        sources = (
            {args.out: args.source} if splits is None else {args.out / name: Path(splits[name]) for name in splits}
        )
        for out, source in sources.items():
            siblings = list(sources.values())
            index = pack_videos(source, out, siblings=siblings, shard_mb=args.shard_mb, seed=args.seed)
            num_shards = len({video.shard for video in index.videos})
            print(f"{len(index.videos):,} videos in {num_shards:,} shards in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
