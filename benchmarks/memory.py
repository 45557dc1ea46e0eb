"""Stream many clips and check that memory does not grow.

python benchmarks/memory.py

Prints the resident size of the main process and its workers: the mean over the batches of each tenth of the clips. From
one batch to the next it varies with the number of clips that wait to be shuffled. The exit code is 1 if it has grown by
2% or more since the first tenth. Linux only.
"""

import argparse
import os
import sys
import tempfile
from itertools import islice
from pathlib import Path
from statistics import fmean

from tqdm.auto import tqdm

from data_pipelines.clips import ClipSpec
from data_pipelines.errors import UserError
from data_pipelines.formats.registry import load_videos
from data_pipelines.stream import StreamSettings, VideoStream
from data_pipelines.worlds.moving_mnist import write_moving_mnist
from worldmodel.commands.exits import report_errors
from worldmodel.training.machine import child_processes, memory_mb

BATCH_SIZE = 64
SAMPLE_EVERY = 7  # batches; not a divisor of an epoch's, so that all parts of epochs are seen
MAX_GROWTH = 0.02
LEAST_CLIPS = 10 * SAMPLE_EVERY * BATCH_SIZE  # a sample in each tenth


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder of videos (default: small ones in a temporary folder)")
    parser.add_argument("--clips", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--size-px", type=int, default=64)
    parser.add_argument("--channels", type=int, default=1, choices=[1, 3])
    parser.add_argument("--decoder", default="auto")
    args = parser.parse_args()
    with report_errors():
        if args.clips < LEAST_CLIPS:
            raise UserError(f"--clips must be at least {LEAST_CLIPS:,}, not {args.clips}: each tenth is measured")
        if args.root:
            return check(args.root, args)
        with tempfile.TemporaryDirectory(prefix="memory_") as folder:
            write_moving_mnist(
                Path(folder), {"train": 2000, "selection": 1, "test": 1}, num_processes=os.cpu_count() or 1
            )
            return check(Path(folder) / "train", args)


def check(root: Path, args: argparse.Namespace) -> int:
    stream = VideoStream(
        load_videos(root),
        ClipSpec(),
        StreamSettings(
            size_px=args.size_px,
            channels=args.channels,
            batch_size=BATCH_SIZE,
            num_lanes=32,
            pool_clips=1024,
            seed=0,
            num_workers=args.workers,
            decoder=args.decoder,
        ),
    )
    batches = stream.batches()
    means_mb: list[float] = []
    with tqdm(total=args.clips, unit="clip") as bar:
        for tenth in range(1, 11):
            samples_mb = []
            while bar.n < args.clips * tenth / 10:
                for batch in islice(batches, SAMPLE_EVERY):
                    bar.update(len(batch["clip_id"]))
                pids = (os.getpid(), *child_processes(os.getpid()))
                samples_mb.append(sum(memory_mb(pid, "Pss") for pid in pids))
            means_mb.append(fmean(samples_mb))
            bar.write(f"{bar.n:>9,} clips  {means_mb[-1]:7.1f} MiB", file=sys.stdout)
    batches.close()
    growth = max(means_mb[1:]) / means_mb[0] - 1
    print(f"largest growth since the first tenth: {growth:+.2%} (less than {MAX_GROWTH:.0%} is wanted)")
    return int(growth >= MAX_GROWTH)


if __name__ == "__main__":
    sys.exit(main())
