"""Roll out sampled futures of a video, as embeddings.

python scripts/rollout.py --run runs/demo --video FILE --num-samples 64 --horizon 4 --out futures.npz
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
import torch

from data_pipelines.decoders import read_frames
from data_pipelines.errors import UserError
from data_pipelines.files import write_bytes
from data_pipelines.transforms import to_float
from worldmodel import TrainedRun, load
from worldmodel.commands.shared import (
    check_counts,
    check_device,
    check_out_file,
    check_seed,
    check_video,
    report_errors,
)
from worldmodel.config import VideosConfig

MAX_SEGMENTS = 2**22  # predicted ones, which are in memory together


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a trained run")
    parser.add_argument("--video", type=Path, required=True, help="a video file")
    parser.add_argument("--out", type=Path, required=True, help=".npz file to write")
    parser.add_argument("--num-samples", type=int, default=64, help="futures to draw")
    parser.add_argument("--horizon", type=int, default=1, help="segments to predict")
    parser.add_argument("--start-frame", type=int, default=0, help="first frame of the context segment")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    with report_errors():
        check_counts(args, "num_samples", "horizon")
        check_seed(args)
        if args.num_samples * args.horizon > MAX_SEGMENTS:
            raise UserError(f"--num-samples times --horizon must be at most {MAX_SEGMENTS:,}")
        trained = load(args.run, device=check_device(args.device))
        check_video(args.video)
        check_out_file(args.out)
        context = read_context(trained, args.video, args.start_frame)
        futures = trained.rollout(context, args.horizon, args.num_samples, args.seed)[0]
        save(args.out, trained.encode(context)[0], futures)
        spread = futures.std(dim=0).mean(dim=-1).tolist() if len(futures) > 1 else [0.0] * args.horizon
        print(f"{args.out}: futures {list(futures.shape)} = [samples, horizon, embedding]")
        print("standard deviation over samples, by step: " + " ".join(f"{value:.3f}" for value in spread))
    return 0


def read_context(trained: TrainedRun, video: Path, start_frame: int) -> torch.Tensor:
    """The context segment: [1, num_frames, C, H, W] in [0, 1]."""
    data = trained.config.data
    fps, decoder = (data.fps, data.decoder) if isinstance(data, VideosConfig) else (None, "auto")
    span = (data.num_frames - 1) * data.frame_stride + 1
    frames = read_frames(
        video,
        start_frame,
        start_frame + span,
        channels=data.channels,
        size_px=data.size_px,
        decoder=decoder,
        fps=fps,
    )
    chosen = [frame for number, frame in enumerate(frames) if number % data.frame_stride == 0]
    return to_float(torch.from_numpy(np.stack(chosen)))[None]


def save(out: Path, context: torch.Tensor, futures: torch.Tensor) -> None:
    """context [D], futures [S, horizon, D]."""
    content = io.BytesIO()
    np.savez(content, context=context.cpu().numpy(), futures=futures.cpu().numpy())
    try:
        write_bytes(out, content.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
