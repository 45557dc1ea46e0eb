"""Score every transition of a video by how much it surprises a trained run.

Writes surprise.csv, with one row per transition, and a plot of the scores with the frames at their peaks
(surprise.png, surprise.webp).

With a latent variable, surprise is in nats: kl_nats + prediction_error / beta + scene_nats + still_nats.
  kl_nats            KL(q || p), of the posterior from the prior of r
  prediction_error   the error that remains with r from the posterior
  scene_nats         -log P(same scene), if the model has a scene code
  still_nats         -log P(ordinary motion), if the run was evaluated: high if everything stops
Without a latent variable, surprise is the prediction error. A part that the model does not have is left out.

--false-alarms adds a threshold, which that share of the transitions of the run's selection clips exceeds: a line in the
plot, and a column is_alarm in surprise.csv. It needs an evaluated run.

example:
  worldmodel surprise --run runs/demo --video clip.mp4 --out surprises
  worldmodel surprise --run runs/demo --video clip.mp4 --false-alarms 0.01 --out surprises
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
HEADINGS = {
    "kl_nats": "KL, nats",
    "prediction_error": "prediction error",
    "scene_nats": "scene, nats",
    "still_nats": "still, nats",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, "a trained run with a Gaussian latent variable or none")
    add_video(parser)
    add_out(parser, "the folder (default: the current one)", default=Path())
    parser.add_argument("--peaks", type=int, default=5, metavar="N", help="peaks to show (default: 5)")
    parser.add_argument(
        "--step-frames", type=int, metavar="N", help="frames between transitions (default: the length of a segment)"
    )
    parser.add_argument(
        "--false-alarms", type=float, metavar="RATE", help="mark what exceeds the threshold at this rate, such as 0.01"
    )


def run(args: argparse.Namespace) -> None:
    from worldmodel.report.drawing import save
    from worldmodel.report.timeline import timeline_figure

    check_counts(args, "peaks", "step_frames")
    trained = load_run(args)
    check_video(args.video)
    make_out_folder(args.out)
    timeline = trained.surprise(
        args.video,
        num_peaks=args.peaks,
        step_frames=args.step_frames,
        false_alarms=args.false_alarms,
        progress=True,
    )
    table, pictures = args.out / "surprise.csv", [args.out / f"surprise.{suffix}" for suffix in ("png", "webp")]
    try:
        write_text(table, csv_of(timeline))
        figure = timeline_figure(timeline)
        for path in pictures:
            picture = io.BytesIO()
            save(figure, picture, path.suffix.removeprefix("."), dpi=PICTURE_DPI)
            write_bytes(path, picture.getvalue())
    except OSError as error:
        raise UserError(f"cannot write to {args.out}: {error.strerror}") from error
    print("", table_of_peaks(timeline), *alarm_lines(timeline, args.false_alarms), "", table, *pictures, sep="\n")


def csv_of(timeline: Timeline) -> str:
    """Return one row per transition as CSV. time_s is empty if the video has no frame rate.

    The column is_alarm exists if the timeline has a threshold.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    alarms = {} if timeline.alarms is None else {"is_alarm": timeline.alarms}
    writer.writerow(["transition", "frame", "time_s", *timeline.measures, "is_peak", *alarms])
    peaks = set(timeline.peaks.tolist())
    for row, frame in enumerate(timeline.frame.tolist()):
        scores = [f"{values[row]:.6g}" for values in timeline.measures.values()]
        marks = [int(row in peaks), *(int(values[row]) for values in alarms.values())]
        writer.writerow([row, frame, _time(timeline, row), *scores, *marks])
    return text.getvalue()


def table_of_peaks(timeline: Timeline) -> str:
    """Return the peaks as a table, the largest first."""
    headings = {"surprise": f"surprise, {timeline.unit}", **HEADINGS}
    shown = {f"{headings[name]:>9}": values for name, values in timeline.measures.items()}
    lines = [f"{'peak':>4} {'frame':>9} {'time, s':>10}  {'  '.join(shown)}"]
    for rank, peak in enumerate(timeline.peaks.tolist(), start=1):
        scores = "  ".join(f"{values[peak]:>{len(heading)}.3f}" for heading, values in shown.items())
        lines.append(f"{rank:>4} {timeline.frame[peak]:>9} {_time(timeline, peak) or '-':>10}  {scores}")
    return "\n".join(lines)


def alarm_lines(timeline: Timeline, rate: float | None) -> list[str]:
    """Return a line with the threshold and the number of alarms; none without a threshold."""
    if timeline.alarms is None:
        return []
    above = f"{int(timeline.alarms.sum())} of {len(timeline.alarms)} transitions"
    return [
        "",
        f"threshold at a false alarm rate of {rate:g}: {timeline.threshold:.3f} {timeline.unit}, exceeded by {above}",
    ]


def _time(timeline: Timeline, row: int) -> str:
    return "" if timeline.time_s is None else f"{timeline.time_s[row]:.3f}"
