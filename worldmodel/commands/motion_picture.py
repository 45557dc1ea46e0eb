"""A picture to check tracked positions: frames with marks, and the positions over time, per video."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from data_pipelines.containers import video_url
from data_pipelines.decoders import DecodeError, Frame, open_video, resolve_decoder
from data_pipelines.errors import UserError
from data_pipelines.files import write_bytes
from data_pipelines.motion.label import Labelled
from worldmodel.commands.contact_sheet import spread
from worldmodel.report.drawing import THEMES, pixels, save, short, style

MAX_VIDEOS, COLUMNS, FRAME_ROWS = 6, 6, 2
COLUMN_IN, DPI = 2.0, 120
FRAME_PX = 320  # longest side of a frame in the picture
MAX_POINTS = 4_000  # of a curve
COLOURS = ("#ff3030", "#20a8ff", "#e0a000", "#20b020", "#d040d0", "#00a0a0")


def write_picture(out: Path, labelled: Sequence[Labelled]) -> None:
    """Write a PNG of up to MAX_VIDEOS labelled videos, evenly spread. Colours stand for objects.

    Raises:
        UserError: the file cannot be written.
    """
    chosen = [labelled[number] for number in spread(len(labelled), MAX_VIDEOS)]
    content = io.BytesIO()
    with style(THEMES["light"]):
        height_in = sum(FRAME_ROWS * _row_in(entry) + 2.4 for entry in chosen)
        figure = Figure(figsize=(COLUMNS * COLUMN_IN, height_in), layout="constrained")
        parts = figure.subfigures(
            len(chosen), 1, squeeze=False, height_ratios=[FRAME_ROWS * _row_in(entry) + 2.4 for entry in chosen]
        )
        for part, entry in zip(parts[:, 0], chosen, strict=True):
            _draw(part, entry)
        save(figure, content, "png", dpi=DPI)
    try:
        write_bytes(out, content.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error


def _row_in(entry: Labelled) -> float:
    """Return the height of a row of frames in inches."""
    return min(max(COLUMN_IN * entry.video.height / entry.video.width, COLUMN_IN / 3), 2 * COLUMN_IN)


def _draw(part: Any, entry: Labelled) -> None:
    assert entry.positions is not None
    numbers = spread(entry.video.num_frames, COLUMNS * FRAME_ROWS)
    row_in = _row_in(entry)
    mosaic: list[Any] = [[f"{row} {column}" for column in range(COLUMNS)] for row in range(FRAME_ROWS)]
    axes = part.subplot_mosaic(
        [*mosaic, ["x"] * COLUMNS, ["y"] * COLUMNS],
        height_ratios=[row_in] * FRAME_ROWS + [1.0, 1.0],
    )
    part.suptitle(short(entry.video.path, 80), fontsize=10)
    for place, number in enumerate(numbers):
        panel = axes[f"{place // COLUMNS} {place % COLUMNS}"]
        panel.set_title(f"frame {number:,}", fontsize=8)
    for place in range(COLUMNS * FRAME_ROWS):
        axes[f"{place // COLUMNS} {place % COLUMNS}"].set_axis_off()
    for place, (number, frame) in enumerate(zip(numbers, _frames(entry, numbers), strict=False)):
        panel = axes[f"{place // COLUMNS} {place % COLUMNS}"]
        step = max(1, max(frame.shape[1:]) // FRAME_PX)
        panel.imshow(
            pixels(frame[:, ::step, ::step]),
            extent=(-0.5, frame.shape[2] - 0.5, frame.shape[1] - 0.5, -0.5),
            interpolation="nearest",
        )
        for object_number, (x, y) in enumerate(entry.positions[number]):
            colour = COLOURS[object_number % len(COLOURS)]
            panel.plot(x, y, "o", color=colour, fillstyle="none", markersize=9)
            panel.plot(x, y, ".", color=colour, markersize=2)
    frames = np.array(spread(entry.video.num_frames, MAX_POINTS))
    for axis, name in enumerate("xy"):
        for object_number in range(entry.positions.shape[1]):
            series = entry.positions[frames, object_number, axis]
            axes[name].plot(frames, series, color=COLOURS[object_number % len(COLOURS)], linewidth=1)
        axes[name].set_ylabel(f"{name}, px")
    axes["y"].set_xlabel("frame")


def _frames(entry: Labelled, numbers: Sequence[int]) -> list[Frame]:
    """Decode frames in colour at their full size; those after a damaged one are left out."""
    frames: list[Frame] = []
    try:
        reader = open_video(
            video_url(entry.root, entry.video), entry.video, channels=3, size_px=None, decoder=resolve_decoder("auto")
        )
        try:
            frames += [reader.read(number) for number in numbers]
        finally:
            reader.close()
    except DecodeError:
        pass
    return frames
