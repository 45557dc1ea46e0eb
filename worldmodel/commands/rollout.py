"""Sample futures of a video and write their embeddings.

Writes an .npz file with `context` [D] and `futures` [samples, horizon, D].

example:
  worldmodel rollout --run runs/demo --video clip.mp4 --num-samples 64 --horizon 4 --out futures.npz
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipelines.errors import UserError
from data_pipelines.files import write_bytes
from worldmodel.commands.shared import (
    add_out,
    add_run,
    add_seed,
    add_video,
    check_counts,
    check_out_file,
    check_seed,
    check_video,
    load_run,
)

if TYPE_CHECKING:
    from torch import Tensor

    from worldmodel import TrainedRun

MAX_SEGMENTS = 2**22  # predicted segments, all of which are in memory at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_video(parser)
    add_out(parser, "the .npz file", metavar="FILE")
    parser.add_argument("--num-samples", type=int, default=64, metavar="N", help="futures to sample (default: 64)")
    parser.add_argument("--horizon", type=int, default=1, metavar="N", help="segments to predict (default: 1)")
    parser.add_argument(
        "--start-frame",
        type=int,
        default=0,
        metavar="N",
        help="first frame of the context segment; a run with data.history_segments also reads the segments before it "
        "(default: 0)",
    )
    parser.add_argument(
        "--recalibrate",
        action="store_true",
        help="change spread and share of climatology as fitted by an evaluation with evaluation.recalibrate",
    )
    add_seed(parser, "seed of the samples")


def run(args: argparse.Namespace) -> None:
    check_counts(args, "num_samples", "horizon")
    check_seed(args)
    if args.num_samples * args.horizon > MAX_SEGMENTS:
        raise UserError(f"--num-samples times --horizon must be at most {MAX_SEGMENTS:,}")
    trained = load_run(args)
    if trained.source.content != "frames":
        raise UserError(f"rollout needs a run on videos: this one has data.source={trained.config.data.source}")
    check_video(args.video)
    check_out_file(args.out, ".npz")
    clip = read_clip(trained, args.video, args.start_frame)
    futures = trained.rollout(
        clip, args.horizon, args.num_samples, args.seed, recalibrate=args.recalibrate, video=args.video
    )[0]
    save(args.out, trained.encode(clip[:, -trained.config.data.num_frames :])[0], futures)
    spread = futures.std(dim=0).mean(dim=-1).tolist() if len(futures) > 1 else [0.0] * args.horizon
    print(f"{args.out}: futures {list(futures.shape)} = [samples, horizon, embedding]")
    print("standard deviation over samples, by step: " + " ".join(f"{value:.3f}" for value in spread))


def read_clip(trained: TrainedRun, video: Path, start_frame: int) -> Tensor:
    """Read the context segment of a video: [1, num_frames, C, H, W] in [0, 1].

    With data.history_segments, the segments before it that the video has come first: [1, n * num_frames, C, H, W].

    Raises:
        UserError: the video cannot be read, or is too short.
    """
    import numpy as np
    import torch

    from data_pipelines.decoders import read_frames
    from data_pipelines.transforms import to_float
    from worldmodel.config import VideosConfig
    from worldmodel.data import check_one_camera

    data = trained.config.data
    check_one_camera(data, video)
    fps, decoder = (data.fps, data.decoder) if isinstance(data, VideosConfig) else (None, "auto")
    step = data.num_frames * data.frame_stride
    first_frame = start_frame - step * min(data.history_segments, max(0, start_frame) // step)
    frames = read_frames(
        video,
        first_frame,
        start_frame + step - data.frame_stride + 1,
        channels=data.channels,
        size_px=data.size_px,
        decoder=decoder,
        fps=fps,
    )
    chosen = [frame for number, frame in enumerate(frames) if number % data.frame_stride == 0]
    return to_float(torch.from_numpy(np.stack(chosen)))[None]


def save(out: Path, context: Tensor, futures: Tensor) -> None:
    """Write context [D] and futures [samples, horizon, D].

    Raises:
        UserError: the file cannot be written.
    """
    import numpy as np

    content = io.BytesIO()
    np.savez(content, context=context.cpu().numpy(), futures=futures.cpu().numpy())
    try:
        write_bytes(out, content.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
