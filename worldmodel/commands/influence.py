"""Find the training clips that influenced a forecast: those that lowered its loss most, and those that raised it most.

The forecast is that of a clip of the video: its context, and what followed. Writes influence.csv, with a row for each
training clip, the most helpful first, and influence.png, with the frames of the clip and of the training clips at both
ends. Influence is in units of the loss: above 0 if the training clip lowered the loss of this forecast.

The gradients of the training clips are computed once, and stored in the run folder: about 10 ms for a clip on one core.

example:
  worldmodel influence --run runs/demo --video clip.mp4 --start-frame 0 --num 8 --out influences
"""

from __future__ import annotations

import argparse
import csv
import io
from typing import TYPE_CHECKING

from data_pipelines.errors import UserError, printable
from data_pipelines.files import write_bytes, write_text
from worldmodel.commands.process import keep_freed_memory
from worldmodel.commands.shared import (
    add_data,
    add_out,
    add_run,
    add_video,
    check_counts,
    check_remote,
    check_video,
    load_run,
    make_out_folder,
)

if TYPE_CHECKING:
    from worldmodel.evaluation.influence import Influence

PICTURE_DPI = 150


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, "a trained run on video files, with a Gaussian latent variable or none")
    add_video(parser)
    add_out(parser, "the folder")
    parser.add_argument("--start-frame", type=int, default=0, metavar="N", help="first frame of the clip (default: 0)")
    parser.add_argument(
        "--num", type=int, default=8, metavar="N", help="training clips to show at each end (default: 8)"
    )
    parser.add_argument(
        "--clips",
        type=int,
        default=2**14,
        metavar="N",
        help=f"training clips to compare, at most, spread evenly over all (default: {2**14:,})",
    )
    add_data(parser)


def run(args: argparse.Namespace) -> None:
    from worldmodel.report.drawing import save
    from worldmodel.report.influence_picture import influence_figure

    check_counts(args, "num", "clips")
    keep_freed_memory()
    trained = load_run(args)
    check_video(args.video)
    check_remote(trained.source.url, args.allow_remote)
    make_out_folder(args.out)
    found = trained.influence(
        args.video, start_frame=args.start_frame, num_shown=args.num, num_clips=args.clips, progress=True
    )
    table, picture = args.out / "influence.csv", args.out / "influence.png"
    content = io.BytesIO()
    save(influence_figure(found), content, "png", dpi=PICTURE_DPI)
    try:
        write_text(table, csv_of(found))
        write_bytes(picture, content.getvalue())
    except OSError as error:
        raise UserError(f"cannot write to {args.out}: {error.strerror}") from error
    print("", table_of_ends(found), "", table, picture, sep="\n")


def csv_of(found: Influence) -> str:
    """Return one row per training clip as CSV, the largest influence first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["clip", "video", "start_frame", "influence"])
    rows = zip(found.clip_id.tolist(), found.names, found.first_frame.tolist(), found.influence.tolist(), strict=True)
    for clip, name, start_frame, influence in rows:
        writer.writerow([clip, printable(name), start_frame, f"{influence:.6g}"])
    return text.getvalue()


def table_of_ends(found: Influence) -> str:
    """Return the clips at both ends as a table: those that lowered the loss most, and those that raised it most."""
    num_shown = len(found.largest)
    last = len(found.clip_id) - 1
    parts = {"lowered the loss": range(num_shown), "raised the loss": range(last, last - num_shown, -1)}
    lines = [f"{'':<16} {'influence':>10} {'frame':>7}  video"]
    for title, places in parts.items():
        for place in places:
            name = printable(found.names[place])
            lines.append(f"{title:<16} {found.influence[place]:>10.3g} {found.first_frame[place]:>7}  {name}")
            title = ""
    return "\n".join(lines)
