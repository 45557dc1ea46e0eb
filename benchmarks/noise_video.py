"""Write a video of pure noise, in which nothing can be known of the next frame: the climatology is the best forecast.

python benchmarks/noise_video.py data/noise

Each byte of its frames, 64 x 64 px in colour, is drawn uniformly. The file is lossless.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from data_pipelines.convert.run import Conversion, convert
from worldmodel.commands.exits import report_errors
from worldmodel.commands.shared import add_seed, check_counts, check_seed

SIZE_PX = 64


def write_noise(out: Path, num_frames: int, seed: int) -> None:
    """Write OUT/noise.mp4.

    Raises:
        UserError: the file cannot be written, or `out` holds something else.
    """
    with TemporaryDirectory() as folder:
        source = Path(folder) / "noise.npz"
        np.savez(source, frames=noise(num_frames, seed))
        convert(source, out, Conversion())


def noise(num_frames: int, seed: int) -> np.ndarray:
    """Draw uint8 frames [T, H, W, 3]."""
    return np.random.default_rng(seed).integers(256, size=(num_frames, SIZE_PX, SIZE_PX, 3), dtype=np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the video")
    parser.add_argument("--frames", type=int, default=1500, metavar="N", help="frames (default: 1500)")
    add_seed(parser, "seed of the noise")
    args = parser.parse_args()
    with report_errors():
        check_counts(args, "frames")
        check_seed(args)
        write_noise(args.out, args.frames, args.seed)


if __name__ == "__main__":
    main()
