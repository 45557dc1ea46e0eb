"""Write Moving-MNIST as H.264 files with their labels: thousands of short videos with one random change, or longer ones
in which digits are kicked again and again.

python scripts/make_moving_mnist.py --out data/moving_mnist
python scripts/make_moving_mnist.py --world kicked --out data/kicked_mnist
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from data_pipelines.errors import UserError
from data_pipelines.worlds import kicked_mnist, moving_mnist
from worldmodel.commands.shared import report_errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--world", choices=["single", "kicked"], default="single", help="one change, or many kicks")
    parser.add_argument("--train", type=int, help="training videos (16,384; kicked: 12,000)")
    parser.add_argument("--selection", type=int, help="videos for choices during development (2,048; kicked: 512)")
    parser.add_argument("--test", type=int, help="videos for reported scores (1,024; kicked: 512)")
    parser.add_argument("--setting", choices=["A", "B"], help="single: how the changed axis is drawn (A)")
    parser.add_argument("--num-frames", type=int, help="kicked: frames in a video (60)")
    parser.add_argument("--num-digits", type=int, choices=[1, 2], help="kicked: digits in a video (1)")
    parser.add_argument("--borders", choices=["bounce", "crop"], help="kicked: what digits do there (bounce)")
    parser.add_argument("--mnist-dir", type=Path, help="MNIST's IDX files; without it scikit-learn's bundled digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--overwrite", action="store_true", help="replace a world of other parameters")
    args = parser.parse_args()
    world = moving_mnist if args.world == "single" else kicked_mnist
    write = moving_mnist.write_moving_mnist if args.world == "single" else kicked_mnist.write_kicked_mnist
    counts = {split: getattr(args, split) or count for split, count in world.VIDEO_COUNTS.items()}
    with report_errors():
        write(
            args.out,
            counts,
            **own_options(args),
            mnist_dir=args.mnist_dir,
            seed=args.seed,
            num_processes=args.num_processes,
            overwrite=args.overwrite,
        )
        print(f"{sum(counts.values()):,} videos in {args.out}")
    return 0


def own_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that only the chosen world has, as far as they are given.

    Raises:
        UserError: one belongs to the other world.
    """
    of_world = {"single": ("setting",), "kicked": ("num_frames", "num_digits", "borders")}
    given = {
        name: getattr(args, name) for names in of_world.values() for name in names if getattr(args, name) is not None
    }
    for name, value in given.items():
        if name not in of_world[args.world]:
            raise UserError(f"--{name.replace('_', '-')} {value} is no option of --world {args.world}")
    return given


if __name__ == "__main__":
    sys.exit(main())
