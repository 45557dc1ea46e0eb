"""Find the moments of a video that surprise a trained run: what every transition costs by the training loss.

python scripts/surprise.py --run runs/demo --video FILE --out surprises

Writes surprise.csv, a row a transition, and a picture of the timeline with the frames of its peaks (surprise.png,
surprise.webp) into --out. surprise = kl_nats + prediction_error / beta + scene_nats, in nats: how far r was from what
was expected, what even that r does not explain, and how improbable it is that the scene is the same; without a latent
the prediction error alone (worldmodel/evaluation/surprise.py).
"""

import argparse
import csv
import io
import sys
from pathlib import Path

import torch

from data_pipelines.errors import UserError
from data_pipelines.files import write_bytes, write_text
from worldmodel import load
from worldmodel.commands.shared import check_counts, check_device, check_video, make_out_folder, report_errors
from worldmodel.evaluation.surprise import MEASURES, Timeline
from worldmodel.report.drawing import save
from worldmodel.report.timeline import timeline_figure

PICTURE_DPI = 150


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a trained run, its latent Gaussian or none")
    parser.add_argument("--video", type=Path, required=True, help="a video file")
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write to; default: this one")
    parser.add_argument("--peaks", type=int, default=5, help="how many of the most surprising moments to show")
    parser.add_argument("--step-frames", type=int, help="frames between transitions; default: segments tile the video")
    parser.add_argument("--checkpoint", choices=["latest", "best"], default="latest")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    with report_errors():
        check_counts(args, "peaks", "step_frames")
        trained = load(args.run, which=args.checkpoint, device=check_device(args.device))
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
    return 0


def csv_of(timeline: Timeline) -> str:
    """A row a transition; time_s is empty where the video states no frame rate."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["transition", "frame", "time_s", *MEASURES, "is_peak"])
    peaks = set(timeline.peaks.tolist())
    for row, frame in enumerate(timeline.frame.tolist()):
        scores = [f"{getattr(timeline, name)[row]:.6g}" for name in MEASURES]
        writer.writerow([row, frame, _time(timeline, row), *scores, int(row in peaks)])
    return text.getvalue()


def table_of_peaks(timeline: Timeline) -> str:
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


if __name__ == "__main__":
    sys.exit(main())
