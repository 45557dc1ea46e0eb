"""Convert a data set of another program into a folder of videos with labels, or into shards.

SOURCE is a folder of image folders, of GIF or WebP files, HDF5 or .npz files with frames and bounds of episodes (also
those of stable-worldmodel, robomimic and D4RL), a Lance table, or a LeRobot data set of version 2, of which one camera
is converted. Actions, states and rewards become labels of the frames. Every video is decoded and compared with its
source. The same command continues an interrupted conversion.

examples:
  worldmodel convert pusht.h5 data/pusht
  worldmodel convert demos.npz data/demos --frames rgb --bounds ends --crf 18
"""

import argparse
import os
from pathlib import Path

from data_pipelines.errors import UserError
from worldmodel.commands.shared import add_overwrite, add_processes, check_counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a file or folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    keys = parser.add_argument_group("keys", "names of arrays, for those that are not found by their usual names")
    keys.add_argument("--frames", metavar="KEY", help="the frames, or the one camera of LeRobot")
    keys.add_argument("--actions", metavar="KEY", help="the label 'action'")
    keys.add_argument("--states", metavar="KEY", help="the label 'state'")
    keys.add_argument("--rewards", metavar="KEY", help="the label 'reward'")
    keys.add_argument(
        "--bounds",
        nargs="+",
        default=[],
        metavar="KEY",
        help="bounds of the episodes: lengths, ends, lengths and offsets, the number of the episode of each row, or "
        "marks of last rows",
    )
    keys.add_argument("--labels", nargs="+", default=[], metavar="KEY", help="further labels of frames to keep")
    parser.add_argument(
        "--crf", type=int, metavar="N", help="quality of H.264, 0 (best) to 51; prints the PSNR (default: lossless)"
    )
    parser.add_argument(
        "--fps", type=float, default=10, metavar="N", help="frames per second if the source states none (default: 10)"
    )
    parser.add_argument("--shards", action="store_true", help="write tar shards instead of single videos")
    parser.add_argument(
        "--shard-mb", type=float, metavar="MIB", help="MiB of video per shard, with --shards (default: 64)"
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave out episodes that cannot be converted")
    add_processes(parser)
    add_overwrite(parser, "a conversion with other settings, or of a source that has changed")


def run(args: argparse.Namespace) -> None:
    from data_pipelines.convert.episodes import Keys
    from data_pipelines.convert.run import Conversion, convert
    from data_pipelines.shards.packing import check_shard_mb

    check_counts(args, "num_processes")
    if args.shard_mb is not None and not args.shards:
        raise UserError(f"--shard-mb {args.shard_mb:g} is of --shards")
    shard_mb = 64 if args.shard_mb is None else args.shard_mb
    check_shard_mb(shard_mb, "--shard-mb ")
    keys = Keys(args.frames, args.actions, args.states, args.rewards, tuple(args.bounds), tuple(args.labels))
    settings = Conversion(
        keys=keys,
        fps=args.fps,
        crf=args.crf,
        in_shards=args.shards,
        shard_mb=shard_mb,
        skip_bad=args.skip_bad,
        overwrite=args.overwrite,
        num_processes=args.num_processes if args.num_processes is not None else os.cpu_count() or 1,
    )
    result = convert(args.source, args.out, settings)
    kept = f", {result.num_kept:,} of them from before" if result.num_kept else ""
    print(f"{result.layout}: {result.num_videos:,} videos in {args.out}{kept}")
    if result.bad:
        print(f"{len(result.bad):,} episodes could not be converted")
    if result.psnr_db:
        lowest = min(result.psnr_db, key=result.psnr_db.__getitem__)
        mean = sum(result.psnr_db.values()) / len(result.psnr_db)
        print(f"PSNR: mean {mean:.2f} dB, lowest {result.psnr_db[lowest]:.2f} dB ({lowest})")
    else:
        print("every video decodes to the frames of its source, bit for bit")
