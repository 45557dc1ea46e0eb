"""Pictures of a report: charts, frames of the video and animations, each with its message in words.

Pictures are WebP in data URIs. Charts are drawn twice, for a light and a dark page, and the browser picks; frames of
the video are drawn once. Matplotlib and Pillow are imported where they are used.

Legend: Q queries, S sampled futures, M draws of the law, H horizon steps, K dimensions of the forecast quantity.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from worldmodel.evaluation.illustrations import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Theme = Mapping[str, str]

MAX_FRAMES_SHOWN = 4  # of each segment, so that a frame stays large on a phone
STRIP_DPI, CHART_DPI = 100, 200

# Over frames of a video, whatever the page's colours.
FAN, TRUTH = "#5cb8ff", "#ffb020"
THEMES: dict[str, Theme] = {
    "light": {
        "model": "#1f5fd6",
        "law": "#9aa1ab",
        "truth": "#d9480f",
        "text": "#4a525c",
        "grid": "#e3e6ea",
        "surface": "#ffffff",
    },
    "dark": {
        "model": "#7ab2ff",
        "law": "#8a94a0",
        "truth": "#ff9a4d",
        "text": "#aab3bd",
        "grid": "#2b323b",
        "surface": "#171c22",
    },
}


@dataclass(frozen=True)
class Picture:
    """An image for the page: `light` and `dark` are data URIs, equal when one serves both.

    `still` is what stands in for an animation where a reader wants less motion; None for an image that does not move.
    """

    light: str
    dark: str
    alt: str
    width_px: int
    height_px: int
    still: str | None = None


# ------------------------------------------------------------------------------------------------------ primitives


def data_uri(webp: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(webp).decode()


def _picture_uri(figure: Figure, *, dpi: int, lossless: bool) -> tuple[str, int, int]:
    """The figure as a WebP data URI, with its width and height in pixels."""
    buffer = BytesIO()
    options = {"lossless": True} if lossless else {"quality": 82}
    figure.savefig(buffer, format="webp", dpi=dpi, transparent=True, pil_kwargs=options)
    width_px, height_px = (round(float(side) * dpi) for side in figure.get_size_inches())
    return data_uri(buffer.getvalue()), width_px, height_px


@contextmanager
def style(theme: Theme) -> Iterator[Theme]:
    """The theme again, under Matplotlib's settings for a theme, whatever a user's matplotlibrc says."""
    import matplotlib

    with matplotlib.rc_context(
        {
            "font.size": 10,
            "text.color": theme["text"],
            "axes.labelcolor": theme["text"],
            "axes.edgecolor": theme["law"],
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": theme["grid"],
            "grid.linewidth": 0.8,
            "xtick.color": theme["text"],
            "ytick.color": theme["text"],
            "xtick.major.size": 0,
            "ytick.major.size": 0,
            "lines.linewidth": 1.6,
            "legend.frameon": False,
            "figure.facecolor": theme["surface"],
            "axes.facecolor": "none",
        }
    ):
        yield theme


def chart(draw: Callable[[Figure, Theme], None], alt: str, *, size_in: tuple[float, float] = (3.9, 2.7)) -> Picture:
    """A chart in both themes; `draw(figure, colours)` draws it."""
    from matplotlib.figure import Figure

    uris = {}
    for name, theme in THEMES.items():
        with style(theme):
            figure = Figure(figsize=size_in, layout="constrained")
            draw(figure, theme)
            uris[name], width_px, height_px = _picture_uri(figure, dpi=CHART_DPI, lossless=True)
    return Picture(uris["light"], uris["dark"], alt, width_px, height_px)


def shown_frames(num_frames: int) -> list[int]:
    """Indices of the frames of a segment to draw: all, or a few from the first to the last."""
    if num_frames <= MAX_FRAMES_SHOWN:
        return list(range(num_frames))
    return [round(i * (num_frames - 1) / (MAX_FRAMES_SHOWN - 1)) for i in range(MAX_FRAMES_SHOWN)]


def strip(frames: np.ndarray, alt: str, *, tile_px: int) -> Picture:
    """Frames uint8 [n, C, H, W] side by side, each about `tile_px` wide.

    Small frames are enlarged by a whole factor with nearest neighbours, so that their pixels stay crisp.
    """
    from matplotlib.figure import Figure

    num, channels, height, width = frames.shape
    factor = tile_px / max(width, height)
    factor = float(max(1, round(factor))) if factor >= 0.75 else factor
    tile_w, tile_h, gap = width * factor, height * factor, max(4.0, width * factor / 32)
    total_w = num * tile_w + (num - 1) * gap
    with style(THEMES["light"]):
        figure = Figure(figsize=(total_w / STRIP_DPI, tile_h / STRIP_DPI))
        for i, frame in enumerate(frames):
            show_frame(figure.add_axes((i * (tile_w + gap) / total_w, 0, tile_w / total_w, 1)), frame)
        uri, width_px, height_px = _picture_uri(figure, dpi=STRIP_DPI, lossless=channels == 1)
    return Picture(uri, uri, alt, width_px, height_px)


def show_frame(axes: Axes, frame: np.ndarray) -> None:
    """A frame uint8 [C, H, W] that fills the axes; pixel centres are at integers."""
    axes.set_axis_off()
    pixels = frame[0] if len(frame) == 1 else np.moveaxis(frame, 0, -1)
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")


# -------------------------------------------------------------------------------------------------------- surprise


def draw_timeline(axes: Axes, theme: Theme, timeline: Timeline) -> None:
    """KL against time, the peaks marked with their numbers."""
    x = timeline_axis(timeline)
    axes.fill_between(x, timeline.kl_nats, color=theme["model"], alpha=0.12, linewidth=0)
    axes.plot(x, timeline.kl_nats, color=theme["model"], linewidth=1.3)
    for rank, peak in enumerate(timeline.peaks, start=1):
        axes.plot(x[peak], timeline.kl_nats[peak], marker="o", markersize=5, color=theme["truth"])
        axes.annotate(
            str(rank),
            (x[peak], timeline.kl_nats[peak]),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            color=theme["truth"],
            fontweight="bold",
        )
    axes.set(xlabel="frame" if timeline.time_s is None else "time, s", ylabel="surprise, nats")
    axes.set_ylim(min(0.0, float(np.nanmin(timeline.kl_nats, initial=0.0))), None)
    axes.margins(x=0.02, y=0.18)


def timeline_axis(timeline: Timeline) -> np.ndarray:
    """[N] where transitions stand on the axis: seconds, or frames where the video states no frame rate."""
    return timeline.frame if timeline.time_s is None else timeline.time_s


def timeline_moment(timeline: Timeline, index: int) -> str:
    """When transition `index` is and what it scored: '5.00 nats at frame 12, 0.48 s'."""
    moment = f"{timeline.kl_nats[index]:.2f} nats at frame {timeline.frame[index]:,}"
    return moment if timeline.time_s is None else f"{moment}, {timeline.time_s[index]:.2f} s"


def timeline_figure(timeline: Timeline) -> Figure:
    """Surprise against time, and below it the frames at each of the peaks, for a picture file with a light surface.

    A row a peak, in the order of `timeline.peaks`, its context segment and, after a gap, its target; a segment of many
    frames is shown by a few of them.
    """
    from matplotlib.figure import Figure

    width_in, left_in, right_in, gap_in, title_in, curve_in = 7.0, 0.6, 0.2, 0.05, 0.3, 2.4
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
        axes.set_title(timeline.video, fontsize=10, loc="left")
        for i, (peak, frames) in enumerate(zip(timeline.peaks, timeline.peak_frames, strict=True)):
            top_in = curve_in + i * row_in
            baseline = 1 - (top_in + 0.2) / height_in
            figure.text(0.3 / width_in, baseline, str(i + 1), color=theme["truth"], weight="bold")
            figure.text(left_in / width_in, baseline, timeline_moment(timeline, peak))
            for j, frame in enumerate(frames[columns]):
                x = left_in + j * (tile_w + gap_in) + (3 * gap_in if j >= len(shown) else 0)
                show_frame(figure.add_axes(box(x, top_in + title_in, tile_w, tile_h)), frame)
    return figure
