"""Write stochastic Moving-MNIST as thousands of H.264 files with their labels.

python scripts/make_moving_mnist.py --out data/moving_mnist
"""

import argparse
import os
import sys
from pathlib import Path

from data_pipelines.sources.moving_mnist import Split, write_world
from worldmodel.cli import report_errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=16_384, help="training videos")
    parser.add_argument("--selection", type=int, default=2_048, help="videos for choices during development")
    parser.add_argument("--test", type=int, default=1_024, help="videos for reported scores")
    parser.add_argument("--setting", choices=["A", "B"], default="A", help="how the changed axis is drawn")
    parser.add_argument("--mnist-dir", type=Path, help="MNIST's IDX files; without it scikit-learn's bundled digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--overwrite", action="store_true", help="replace a world of other parameters")
    args = parser.parse_args()
    counts: dict[Split, int] = {"train": args.train, "selection": args.selection, "test": args.test}
    with report_errors():
        write_world(
            args.out,
            counts,
            setting=args.setting,
            mnist_dir=args.mnist_dir,
            seed=args.seed,
            num_processes=args.num_processes,
            overwrite=args.overwrite,
        )
        print(f"{sum(counts.values()):,} videos in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
