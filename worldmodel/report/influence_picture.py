"""The picture of an influence: the clip of the forecast, and the training clips at both ends.

Legend: P clips, L segments of a clip, T frames of a segment, C channels, H = W pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from worldmodel.evaluation.influence import Influence
from worldmodel.report.drawing import THEMES, short, show_frame, shown_frames, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH_IN, MARGIN_IN, GAP_IN, TITLE_IN = 10.0, 0.2, 0.04, 0.24
"""Of the figure: width, margin, space between frames, and height of a line of text."""


def influence_figure(found: Influence) -> Figure:
    """Draw the clip of the forecast, and below it the training clips that lowered its loss, and those that raised it.

    Each row is a clip: its context and, after a gap, what followed. Of long segments a few frames are shown.
    """
    from matplotlib.figure import Figure

    columns = shown_columns(len(found.frames), found.num_frames)
    half_in = (WIDTH_IN - 3 * MARGIN_IN) / 2
    tile_in = (half_in - 2 * MARGIN_IN) / len(columns) - GAP_IN
    row_in = tile_in + TITLE_IN + 0.06
    top_in = 2 * TITLE_IN + row_in
    height_in = top_in + 2 * TITLE_IN + row_in * len(found.largest)

    with style(THEMES["light"]) as theme:
        figure = Figure(figsize=(WIDTH_IN, height_in))

        def text(left: float, top: float, words: str, colour: str = theme["text"], weight: str = "normal") -> None:
            figure.text(left / WIDTH_IN, 1 - (top + 0.17) / height_in, words, color=colour, weight=weight)

        def draw_clip(left: float, top: float, words: str, frames: np.ndarray) -> None:
            text(left, top, words)
            for place, number in enumerate(columns):
                x = left + place * (tile_in + GAP_IN) + (MARGIN_IN if number >= found.num_frames else 0)
                box = (
                    x / WIDTH_IN,
                    1 - (top + TITLE_IN + tile_in) / height_in,
                    tile_in / WIDTH_IN,
                    tile_in / height_in,
                )
                show_frame(figure.add_axes(box), frames[number])

        text(MARGIN_IN, 0, "the forecast: the context, and what followed", weight="bold")
        draw_clip(MARGIN_IN, TITLE_IN, f"{short(found.video, 60)}, frame {found.start_frame:,}", found.frames)
        last = len(found.clip_id) - 1
        ends = [
            ("lowered its loss most", found.largest, range(len(found.largest)), theme["model"]),
            ("raised its loss most", found.smallest, range(last, last - len(found.smallest), -1), theme["truth"]),
        ]
        for side, (title, clips, places, colour) in enumerate(ends):
            left = MARGIN_IN + side * (half_in + MARGIN_IN)
            text(left, top_in, f"training clips that {title}", colour, "bold")
            for row, (frames, place) in enumerate(zip(clips, places, strict=True)):
                name = f"{short(found.names[place], 36)}, frame {found.first_frame[place]:,}"
                draw_clip(left, top_in + TITLE_IN + row * row_in, f"{found.influence[place]:+.2g}  {name}", frames)
    return figure


def shown_columns(num_all: int, num_frames: int) -> list[int]:
    """Return the indices of the frames to draw of a clip of num_all frames: some of each segment of num_frames."""
    return [first + number for first in range(0, num_all, num_frames) for number in shown_frames(num_frames)]
