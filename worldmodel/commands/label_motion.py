"""Label videos of a fixed camera with the positions of what moves in them, frame by frame.

Differences from the background are tracked. The label `position` in FOLDER's metadata.jsonl has x and y of each object
in pixels of the video's frames, from the centre of the top left pixel to the right and downwards. Positions in frames
where an object is not found are interpolated. Videos that are labelled already are skipped.

Look at the picture before you use the label: it shows frames with the positions marked.

example:
  worldmodel label-motion data/mice --objects 2
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipelines.errors import UserError, one_line, one_line_logger, printable
from data_pipelines.text_files import shown
from worldmodel.commands.shared import add_overwrite, check_counts, make_out_folder

if TYPE_CHECKING:
    from data_pipelines.motion.label import Labelled

log = one_line_logger(__name__)

MAX_OBJECTS = 16
MAX_SHOWN = 20
MANY_INTERPOLATED = 0.2
STIRRED = 0.05
PICTURE_NAME = "motion.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "root", type=Path, metavar="FOLDER", help="folder of videos, with train/, test/, ... or without"
    )
    parser.add_argument(
        "--objects", type=int, default=1, metavar="N", help="moving objects to follow in each video (default: 1)"
    )
    parser.add_argument("--label", default="position", metavar="NAME", help="name of the label (default: position)")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help=f"PNG file to check (default: FOLDER/{PICTURE_NAME})"
    )
    add_overwrite(parser, "the positions of videos that are labelled already")


def run(args: argparse.Namespace) -> None:
    from data_pipelines.motion.label import label_motion
    from worldmodel.commands.motion_picture import write_picture

    check_counts(args, "objects")
    if args.objects > MAX_OBJECTS:
        raise UserError(f"--objects must be at most {MAX_OBJECTS}, not {args.objects}")
    if not args.label.isidentifier() or args.label == "file_name":
        raise UserError(f"--label {shown(args.label)} is not a name for a label: use letters, digits and _")
    try:
        if not args.root.is_dir():
            raise UserError(f"{args.root} is not a folder: give a folder that holds videos")
        picture = check_picture(args.picture or args.root / PICTURE_NAME)
        results = label_motion(args.root, num_objects=args.objects, label=args.label, overwrite=args.overwrite)
    except (OSError, ValueError) as error:  # a folder without permission, a name that is too long
        raise UserError(f"{args.root}: {one_line(error)}") from error
    labelled = [result for result in results if result.positions is not None]
    if text := summary(results, args.label):
        print(text)
    for warning in warnings_of(results):
        log.warning("%s", warning)
    if labelled:
        write_picture(picture, labelled)
        print(f"{picture}: look whether the marks are on the objects")
    without = [result for result in results if result.positions is None]
    if without:
        named = ", ".join(f"'{result.root / result.video.path}' ({result.fault})" for result in without[:10])
        raise UserError(
            f"{len(without):,} of {len(results):,} videos have no {args.label}, and the label can only be used if all "
            f"have it: move them away, or change --objects: {named}"
            + (f" and {len(without) - 10:,} more" if len(without) > 10 else "")
        )


def check_picture(path: Path) -> Path:
    """Return the path of the picture after creating its folder, before the work begins.

    Raises:
        UserError: it is not the name of a PNG file, or cannot be written.
    """
    if path.suffix.lower() != ".png" or path.is_dir():
        raise UserError(f"--picture {path} must be the name of a PNG file, such as {PICTURE_NAME}")
    make_out_folder(path.parent, f"--picture {path}")
    return path


def summary(results: "Sequence[Labelled]", label: str) -> str:
    """Describe the videos that were tracked now, and the label."""
    new = [result for result in results if result.motion is not None]
    lines = [
        f"{printable(result.root / result.video.path)}: {result.video.num_frames:,} frames, "
        f"{result.motion.interpolated:.1%} of the positions interpolated"
        for result in new[:MAX_SHOWN]
        if result.motion is not None
    ]
    if len(new) > MAX_SHOWN:
        lines.append(f"and {len(new) - MAX_SHOWN:,} more videos")
    if before := sum(result.positions is not None and result.motion is None for result in results):
        lines.append(f"{before:,} videos were labelled before: --overwrite tracks them again")
    if new:
        frames = sum(result.video.num_frames for result in new)
        share = sum(r.motion.interpolated * r.video.num_frames for r in new if r.motion is not None) / frames
        lines.append(f"{label}: {len(new):,} videos, {frames:,} frames, {share:.1%} of the positions interpolated")
    return "\n".join(lines)


def warnings_of(results: "Sequence[Labelled]") -> list[str]:
    """Return one line for each video whose positions are doubtful, up to MAX_SHOWN."""
    lines = []
    for result in results:
        if result.motion is None:
            continue
        path = result.root / result.video.path
        if result.motion.stirring > STIRRED:
            lines.append(
                f"'{path}': {result.motion.stirring:.0%} of the picture changes besides the objects: this looks like a "
                "moving camera, or more objects than --objects"
            )
        elif result.motion.interpolated > MANY_INTERPOLATED:
            lines.append(
                f"'{path}': {result.motion.interpolated:.0%} of the positions are interpolated: are as many objects "
                "as --objects says visible throughout?"
            )
    return lines[:MAX_SHOWN] + ([f"and {len(lines) - MAX_SHOWN:,} more videos"] if len(lines) > MAX_SHOWN else [])
