"""The timeline of surprise: a chart for the page, and a picture file with the frames of its peaks.

Legend: N transitions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from worldmodel.evaluation.surprise import Timeline
from worldmodel.report.drawing import THEMES, Theme, short, show_frame, shown_frames, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_timeline(axes: Axes, theme: Theme, timeline: Timeline) -> None:
    """Draw surprise against time with its threshold, if there is one, and mark the peaks with their numbers."""
    x = timeline_axis(timeline)
    if timeline.threshold is not None:
        axes.axhline(timeline.threshold, color=theme["truth"], linewidth=1, linestyle="--")
    axes.fill_between(x, timeline.surprise, color=theme["model"], alpha=0.12, linewidth=0)
    axes.plot(x, timeline.surprise, color=theme["model"], linewidth=1.3)
    for rank, peak in enumerate(timeline.peaks, start=1):
        axes.plot(x[peak], timeline.surprise[peak], marker="o", markersize=5, color=theme["truth"])
        axes.annotate(
            str(rank),
            (x[peak], timeline.surprise[peak]),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            color=theme["truth"],
            fontweight="bold",
        )
    axes.set(xlabel="frame" if timeline.time_s is None else "time, s", ylabel=f"surprise, {short(timeline.unit)}")
    axes.set_ylim(min(0.0, float(np.nanmin(timeline.surprise, initial=0.0))), None)
    axes.margins(x=0.02, y=0.18)


def timeline_axis(timeline: Timeline) -> np.ndarray:
    """Return the positions of transitions on the axis, [N]: seconds, or frames if the video states no frame rate."""
    return timeline.frame if timeline.time_s is None else timeline.time_s


def timeline_moment(timeline: Timeline, index: int) -> str:
    """Return the score and the time of transition `index`, such as '5.00 nats at frame 12, 0.48 s'."""
    moment = f"{timeline.surprise[index]:.2f} {timeline.unit} at frame {timeline.frame[index]:,}"
    return moment if timeline.time_s is None else f"{moment}, {timeline.time_s[index]:.2f} s"


def timeline_figure(timeline: Timeline) -> Figure:
    """Draw surprise against time, and below it the frames at the peaks, for a picture file with a light background.

    Each peak has a row, in the order of `timeline.peaks`: its context segment and, after a gap, its target segment. Of
    long segments a few frames are shown.
    """
    from matplotlib.figure import Figure

    width_in, left_in, right_in, gap_in, title_in, curve_in = 7.0, 0.75, 0.2, 0.05, 0.3, 2.4
    num_frames = timeline.peak_frames.shape[1] // 2
    shown = shown_frames(num_frames)
    columns = [*shown, *(num_frames + i for i in shown)]
    height, width = timeline.peak_frames.shape[-2:]
    tile_w = min((width_in - left_in - right_in - gap_in * (len(columns) + 2)) / len(columns), 1.2)
    tile_h = tile_w * height / width
    row_in = tile_h + title_in + 0.1
    height_in = curve_in + row_in * len(timeline.peaks) + 0.1

    def box(left: float, top: float, w: float, h: float) -> tuple[float, float, float, float]:
        return left / width_in, 1 - (top + h) / height_in, w / width_in, h / height_in

    with style(THEMES["light"]) as theme:
        figure = Figure(figsize=(width_in, height_in))
        axes = figure.add_axes(box(left_in, 0.35, width_in - left_in - right_in, curve_in - 0.95))
        draw_timeline(axes, theme, timeline)
        axes.set_title(short(timeline.video, 80), fontsize=10, loc="left")
        for i, (peak, frames) in enumerate(zip(timeline.peaks, timeline.peak_frames, strict=True)):
            top_in = curve_in + i * row_in
            baseline = 1 - (top_in + 0.2) / height_in
            figure.text(0.3 / width_in, baseline, str(i + 1), color=theme["truth"], weight="bold")
            figure.text(left_in / width_in, baseline, short(timeline_moment(timeline, peak), 80))
            for j, frame in enumerate(frames[columns]):
                x = left_in + j * (tile_w + gap_in) + (3 * gap_in if j >= len(shown) else 0)
                show_frame(figure.add_axes(box(x, top_in + title_in, tile_w, tile_h)), frame)
    return figure
