"""Score every transition of a video by how much it surprises a trained run.

Writes surprise.csv, with one row per transition, and a plot of the scores with the frames at their peaks
(surprise.png, surprise.webp).

With a latent variable, surprise is the training loss in nats: kl_nats + prediction_error / beta + scene_nats.
  kl_nats            KL(q || p), of the posterior from the prior of r
  prediction_error   the error that remains with r from the posterior
  scene_nats         -log P(same scene), if the model has a scene code
Without a latent variable, surprise is the prediction error.

example:
  worldmodel surprise --run runs/demo --video clip.mp4 --out surprises
"""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipelines.errors import UserError
from data_pipelines.files import write_bytes, write_text
from worldmodel.commands.shared import (
    add_out,
    add_run,
    add_video,
    check_counts,
    check_video,
    load_run,
    make_out_folder,
)

if TYPE_CHECKING:
    from worldmodel.evaluation.surprise import Timeline

PICTURE_DPI = 150


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, "a trained run with a Gaussian latent variable or none")
    add_video(parser)
    add_out(parser, "the folder (default: the current one)", default=Path())
    parser.add_argument("--peaks", type=int, default=5, metavar="N", help="peaks to show (default: 5)")
    parser.add_argument(
        "--step-frames", type=int, metavar="N", help="frames between transitions (default: the length of a segment)"
    )


def run(args: argparse.Namespace) -> None:
    from worldmodel.report.drawing import save
    from worldmodel.report.timeline import timeline_figure

    check_counts(args, "peaks", "step_frames")
    trained = load_run(args)
    check_video(args.video)
    make_out_folder(args.out)
    timeline = trained.surprise(args.video, num_peaks=args.peaks, step_frames=args.step_frames, progress=True)
    try:
        write_text(args.out / "surprise.csv", csv_of(timeline))
        figure = timeline_figure(timeline)
        for suffix in ("png", "webp"):
            picture = io.BytesIO()
            save(figure, picture, suffix, dpi=PICTURE_DPI)
            write_bytes(args.out / f"surprise.{suffix}", picture.getvalue())
    except OSError as error:
        raise UserError(f"cannot write to {args.out}: {error.strerror}") from error
    print(f"\n{table_of_peaks(timeline)}\n\n{args.out / 'surprise.csv'}\n{args.out / 'surprise.png'}")


def csv_of(timeline: Timeline) -> str:
    """Return one row per transition as CSV. time_s is empty if the video has no frame rate."""
    from worldmodel.evaluation.surprise import MEASURES

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["transition", "frame", "time_s", *MEASURES, "is_peak"])
    peaks = set(timeline.peaks.tolist())
    for row, frame in enumerate(timeline.frame.tolist()):
        scores = [f"{getattr(timeline, name)[row]:.6g}" for name in MEASURES]
        writer.writerow([row, frame, _time(timeline, row), *scores, int(row in peaks)])
    return text.getvalue()


def table_of_peaks(timeline: Timeline) -> str:
    """Return the peaks as a table, the largest first."""
    heading = f"surprise, {timeline.unit}"
    parts = f"{'KL, nats':>9} {'prediction error':>17} {'scene, nats':>12}"
    lines = [f"{'peak':>4} {'frame':>9} {'time, s':>10}  {heading} {parts}"]
    for rank, peak in enumerate(timeline.peaks.tolist(), start=1):
        lines.append(
            f"{rank:>4} {timeline.frame[peak]:>9} {_time(timeline, peak) or '-':>10}  "
            f"{timeline.surprise[peak]:>{len(heading)}.3f} {timeline.kl_nats[peak]:>9.3f} "
            f"{timeline.prediction_error[peak]:>17.3f} {timeline.scene_nats[peak]:>12.3f}"
        )
    return "\n".join(lines)


def _time(timeline: Timeline, row: int) -> str:
    return "" if timeline.time_s is None else f"{timeline.time_s[row]:.3f}"
