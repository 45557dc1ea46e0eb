"""Pictures of a report: charts, frames of the video and animations, each with its message in words.

Pictures are WebP in data URIs. Charts are drawn twice, for a light and a dark page, and the browser picks; frames of
the video are drawn once. Matplotlib and Pillow are imported where they are used.

Legend: Q queries, S sampled futures, M draws of the law, H horizon steps, K dimensions of the forecast quantity.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from data_pipelines.errors import printable
from worldmodel.report.illustrations import Fans, Latents, PlannedEpisode, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from PIL.Image import Image as PillowImage

Theme = Mapping[str, str]

MAX_FRAMES_SHOWN = 4  # of each segment, so that a frame stays large on a phone
MAX_FRAMES_MOVING, MAX_STEPS_MOVING = 32, 64  # of an animation: of a video, of an episode of planning
ANIMATION_PX, CHART_DPI = 320, 200
MAX_ANIMATION_BYTES, MAX_EPISODE_BYTES = 250_000, 120_000
CONTEXT_MS, FUTURE_MS, STEP_MS, PAUSE_MS = 300, 160, 200, 1800
BAR_PX = 12  # height of the bar that fills below an animation
DIMMED = 0.6  # frames under paths, for these to stand out
SIDE_IN = 3.9  # width of a chart, for 10 pt to be legible on a phone

# Over frames of a video, whatever the page's colours.
FAN, TRUTH, GOAL = "#5cb8ff", "#ffb020", "#ff6ad5"
THEMES: dict[str, Theme] = {
    "light": {
        "model": "#1f5fd6",
        "law": "#9aa1ab",
        "truth": "#d9480f",
        "text": "#4a525c",
        "grid": "#e3e6ea",
        "surface": "#ffffff",
        "violet": "#7c4dbd",
        "pink": "#c2255c",
        "teal": "#0b7a75",
        "brown": "#a65a00",
        "olive": "#6b6b2a",
        "sky": "#3a9ad9",
    },
    "dark": {
        "model": "#7ab2ff",
        "law": "#8a94a0",
        "truth": "#ff9a4d",
        "text": "#aab3bd",
        "grid": "#2b323b",
        "surface": "#171c22",
        "violet": "#b79cf0",
        "pink": "#f783ac",
        "teal": "#4fc7b8",
        "brown": "#e0a060",
        "olive": "#c5c57a",
        "sky": "#8fd0ff",
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


# Text is drawn as it is: names of files and runs are in it, and "$" in them begins no formula.
PLAIN_TEXT: Any = {"text.parse_math": False, "text.usetex": False, "font.family": ["DejaVu Sans"]}


def save(figure: Figure, file: BinaryIO, suffix: str, *, dpi: int) -> None:
    """Write a figure whose text is plain: Matplotlib makes some labels no sooner than it draws them."""
    import matplotlib

    with matplotlib.rc_context(PLAIN_TEXT):
        figure.savefig(file, format=suffix, dpi=dpi)


@contextmanager
def style(theme: Theme) -> Iterator[Theme]:
    """The theme again, under Matplotlib's settings for a theme, whatever a user's matplotlibrc says."""
    import matplotlib

    with matplotlib.rc_context(
        {
            **PLAIN_TEXT,
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


def chart(draw: Callable[[Figure, Theme], None], alt: str, *, size_in: tuple[float, float] = (SIDE_IN, 2.7)) -> Picture:
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


def strip(frames: np.ndarray, alt: str, *, max_px: int = 96) -> Picture:
    """Frames uint8 [n, C, H, W] side by side, at most `max_px` wide each; the page enlarges small ones."""
    from PIL import Image

    tiles = []
    for frame in frames:
        image = Image.fromarray(_pixels(frame)).convert("RGBA")
        image.thumbnail((max_px, max_px))
        tiles.append(image)
    width, height = tiles[0].size
    gap = max(1, width // 24)
    whole = Image.new("RGBA", (len(tiles) * (width + gap) - gap, height))
    for i, tile in enumerate(tiles):
        whole.paste(tile, (i * (width + gap), 0))
    buffer = BytesIO()
    whole.save(buffer, format="webp", **({"lossless": True} if frames.shape[1] == 1 else {"quality": 70}))
    uri = data_uri(buffer.getvalue())
    return Picture(uri, uri, alt, *whole.size)


def _pixels(frame: np.ndarray) -> np.ndarray:
    """A frame uint8 [C, H, W] as [H, W], or [H, W, 3] where it has colour."""
    return frame[0] if len(frame) == 1 else np.moveaxis(frame, 0, -1)


def show_frame(axes: Axes, frame: np.ndarray) -> AxesImage:
    """A frame uint8 [C, H, W] that fills the axes; pixel centres are at integers."""
    axes.set_axis_off()
    return axes.imshow(_pixels(frame), cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")


# -------------------------------------------------------------------------------------------------------- surprise


def draw_timeline(axes: Axes, theme: Theme, timeline: Timeline) -> None:
    """Surprise against time, the peaks marked with their numbers."""
    x = timeline_axis(timeline)
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
    """[N] where transitions stand on the axis: seconds, or frames where the video states no frame rate."""
    return timeline.frame if timeline.time_s is None else timeline.time_s


def timeline_moment(timeline: Timeline, index: int) -> str:
    """When transition `index` is and what it scored: '5.00 nats at frame 12, 0.48 s'."""
    moment = f"{timeline.surprise[index]:.2f} {timeline.unit} at frame {timeline.frame[index]:,}"
    return moment if timeline.time_s is None else f"{moment}, {timeline.time_s[index]:.2f} s"


def timeline_figure(timeline: Timeline) -> Figure:
    """Surprise against time, and below it the frames at each of the peaks, for a picture file with a light surface.

    A row a peak, in the order of `timeline.peaks`, its context segment and, after a gap, its target; a segment of many
    frames is shown by a few of them.
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


# ---------------------------------------------------------------------------------------------------------- charts


@dataclass(frozen=True)
class Line:
    """A line of a chart; `colour` is one of a theme's names."""

    label: str
    values: np.ndarray
    colour: str
    dashes: str | tuple[int, tuple[float, ...]] = "-"
    width: float = 1.5


# Of series that have no colour of their own, in their order.
SERIES_COLOURS = ("model", "truth", "teal", "violet", "olive", "pink", "sky", "brown", "text", "law")

# How each forecast is drawn, wherever it is.
FORECAST_LINES: dict[str, tuple[str, str | tuple[int, tuple[float, ...]], float]] = {
    "model": ("model", "-", 2.6),
    "prior_mean": ("violet", "-", 1.4),
    "shuffled_r": ("sky", "-", 1.4),
    "no_latent": ("pink", "-", 1.4),
    "pixel_constant_velocity": ("teal", "-", 1.4),
    "persistence": ("brown", "-", 1.4),
    "climatology": ("olive", "-", 1.4),
    "encode_decode_oracle": ("text", (0, (4, 2)), 1.4),
    "simulator_oracle": ("text", "-", 1.8),
}


def forecast_line(name: str, label: str, values: np.ndarray) -> Line:
    colour, dashes, width = FORECAST_LINES.get(name, ("law", "-", 1.4))
    return Line(label, values, colour, dashes, width)


def short(text: str, most: int = 24) -> str:
    """Return text that others chose as a chart can show it: on one line, by glyphs there are, at most its end."""
    line = printable(" ".join(text.split()))
    line = line if len(line) <= most else "…" + line[1 - most :]
    glyphs = _glyphs()
    drawn = "".join(c if ord(c) in glyphs else "□" for c in line)
    return f" {drawn}" if drawn.startswith("_") else drawn  # Matplotlib leaves labels with that start out of legends


@cache
def _glyphs() -> frozenset[int]:
    """Code points of the font of PLAIN_TEXT, which Matplotlib brings along."""
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def spread_labels(places: Sequence[float], gap: float) -> list[float]:
    """The places from 0 to 1 of labels that would stand at `places`, moved as little as keeps them `gap` apart."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    placed = [0.0] * len(places)
    floor = -math.inf
    for i in order:
        placed[i] = floor = max(places[i], floor + gap)
    ceiling = max(1.0, gap * (len(places) - 1))
    for i in reversed(order):
        placed[i] = ceiling = min(placed[i], ceiling)
        ceiling -= gap
    return placed


def horizon_chart(
    lines: Sequence[Line],
    *,
    ylabel: str,
    xlabel: str,
    alt: str,
    levels: Sequence[float] = (),
    ylim: tuple[float | None, float | None] = (None, None),
) -> Picture:
    """Lines against the horizon, each named at its right end; `levels` are dashed horizontal lines of reference."""

    from matplotlib.ticker import MaxNLocator

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        for level in levels:
            axes.axhline(level, color=theme["law"], linewidth=1, linestyle=(0, (2, 2)), zorder=1)
        ends = []
        for line in lines:
            steps = np.arange(1, len(line.values) + 1)
            order = 3 if line.colour == "model" else 2
            axes.plot(
                *(steps, line.values),
                color=theme[line.colour],
                linestyle=line.dashes,
                linewidth=line.width,
                marker="o",
                markersize=line.width + 1.6,
                zorder=order,
            )
            finite = line.values[np.isfinite(line.values)]
            ends.append(finite[-1] if len(finite) else math.nan)
        axes.set_ylim(*ylim)
        axes.set(xlabel=short(xlabel, 40), ylabel=short(ylabel, 40))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        low, high = axes.get_ylim()
        named = [(line, (end - low) / (high - low)) for line, end in zip(lines, ends, strict=True)]
        named = [(line, place) for line, place in named if -0.02 <= place <= 1.02]
        places = spread_labels([place for _, place in named], 0.085)
        for (line, _), place in zip(named, places, strict=True):
            bold = "bold" if line.colour == "model" else "normal"
            axes.annotate(
                short(line.label),
                (1.02, place),
                xycoords="axes fraction",
                color=theme[line.colour],
                fontsize=8.5,
                va="center",
                fontweight=bold,
            )

    return chart(draw, alt, size_in=(SIDE_IN, 2.9))


def calibration_chart(curves: Sequence[tuple[str, Sequence[float], Sequence[float]]], alt: str) -> Picture:
    """How often intervals of each nominal level hold the truth: `curves` are (name, nominal, empirical)."""

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=theme["law"], linewidth=1, linestyle=(0, (2, 2)))
        axes.annotate("calibrated", (0.13, 0.15), color=theme["text"], fontsize=8.5, rotation=45, ha="left")
        for i, (name, nominal, empirical) in enumerate(curves):
            axes.plot(
                *(nominal, empirical),
                color=theme[SERIES_COLOURS[i % len(SERIES_COLOURS)]],
                marker="os^Dv"[i % 5],
                markersize=5,
                label=short(name),
            )
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="nominal level", ylabel="share within", box_aspect=1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
        axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8.5, handlelength=1.4)

    return chart(draw, alt, size_in=(SIDE_IN, 2.9))


def rank_chart(histograms: Sequence[tuple[str, np.ndarray]], alt: str) -> Picture:
    """Histograms of the truth's rank among the samples: (name, shares); flat is calibrated."""

    def draw(figure: Figure, theme: Theme) -> None:
        panels = figure.subplots(len(histograms), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, shares) in zip(panels, histograms, strict=True):
            edges = np.linspace(0, 1, len(shares) + 1)
            axes.bar(edges[:-1], shares, width=0.88 / len(shares), align="edge", color=theme["model"], alpha=0.85)
            axes.axhline(1 / len(shares), color=theme["truth"], linewidth=1.2, linestyle=(0, (4, 2)))
            axes.set_ylabel(f"share\n{short(name)}" if name else "share")
            axes.set_ylim(0, max(2 / len(shares), 1.08 * float(np.nanmax(shares))))
            axes.grid(axis="x", visible=False)
            axes.set_xticks([0, 0.5, 1], ["lowest", "middle", "highest"])
        panels[-1].set_xlabel("rank of the truth among the samples")

    return chart(draw, alt, size_in=(SIDE_IN, 2.9))


def curve_chart(curves: Sequence[tuple[str, str, np.ndarray, np.ndarray]], alt: str) -> Picture:
    """Learning curves (name, colour, steps, values): many points as a moving average over the noise of batches."""

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        for name, colour, steps, values in curves:
            width = len(steps) // 40
            if width > 1:
                if len(curves) <= 2:
                    axes.plot(steps, values, color=theme["law"], linewidth=0.8, alpha=0.45)
                mean = np.convolve(values, np.ones(width) / width, mode="valid")
                steps, values = steps[width // 2 : width // 2 + len(mean)], mean
            dots = "o" if len(steps) <= 40 else ""
            axes.plot(steps, values, color=theme[colour], marker=dots, markersize=3.5, label=short(name))
        if len(curves) > 1:
            axes.legend(fontsize=8.5)
        axes.set_xlabel("step")

    return chart(draw, alt)


# ------------------------------------------------------------------------------------------------------- forecasts


def fan_chart(fans: Fans, query: int, dimensions: Sequence[str], unit: str, alt: str) -> Picture:
    """Each dimension of the quantity against the horizon: 50% and 90% of the samples, of the law, and the truth."""
    from matplotlib.ticker import MaxNLocator

    origin = fans.origin[query]

    def bands(values: np.ndarray, k: int, level: float) -> tuple[np.ndarray, np.ndarray]:
        tail = 50 * (1 - level)
        low, high = np.nanpercentile(values[..., k], [tail, 100 - tail], axis=0)
        return np.concatenate([origin[k : k + 1], low]), np.concatenate([origin[k : k + 1], high])

    def draw(figure: Figure, theme: Theme) -> None:
        panels = figure.subplots(len(dimensions), 1, sharex=True, squeeze=False)[:, 0]
        steps = np.arange(fans.true.shape[1] + 1)
        for k, (axes, name) in enumerate(zip(panels, dimensions, strict=True)):
            if fans.law is not None:
                for edge in bands(fans.law[query], k, 0.9):
                    axes.plot(steps, edge, color=theme["text"], linewidth=1.1, linestyle=(0, (3, 2)))
            for level, alpha in ((0.9, 0.2), (0.5, 0.4)):
                axes.fill_between(
                    steps, *bands(fans.samples[query], k, level), color=theme["model"], alpha=alpha, linewidth=0
                )
            truth = np.concatenate([origin[k : k + 1], fans.true[query, :, k]])
            axes.plot(steps, truth, color=theme["truth"], marker="o", markersize=3.5)
            axes.set_ylabel(short(f"{name}, {unit}" if unit else name))
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            if fans.on_frames and k == 1:
                axes.invert_yaxis()
        panels[-1].set_xlabel("horizon, segments")
        figure.align_ylabels()

    return chart(draw, alt, size_in=(SIDE_IN, 0.7 + 1.15 * len(dimensions)))


def fan_words(fans: Fans, query: int, dimensions: Sequence[str], unit: str) -> str:
    """The message of a fan: mean and SD of the samples and of the law, and the truth, at the first and last step."""

    def spread(values: np.ndarray) -> str:
        return f"{np.nanmean(values):.1f} ± {np.nanstd(values):.1f}"

    parts = []
    for step in sorted({0, fans.true.shape[1] - 1}):
        words = []
        for k, name in enumerate(dimensions):
            law = "" if fans.law is None else f" (law {spread(fans.law[query, :, step, k])})"
            sampled = spread(fans.samples[query, :, step, k])
            words.append(f"{name} {sampled}{law}, true {fans.true[query, step, k]:.1f}")
        parts.append(f"Horizon {step + 1}: {'; '.join(words)}.")
    return f"{fans.samples.shape[1]} sampled futures, mean ± SD, in {unit or 'their own unit'}. {' '.join(parts)}"


def path_until(origin: np.ndarray, ends: np.ndarray, segments: float) -> np.ndarray:
    """[..., P, 2] the path from `origin` [2] through `ends` [..., H, 2] until `segments` segments after the origin.

    Between the ends of segments, where it is known, it goes straight.
    """
    whole, part = int(segments), segments - int(segments)
    points = np.concatenate([np.broadcast_to(origin, (*ends.shape[:-2], 1, 2)), ends], axis=-2)
    path = points[..., : whole + 1, :]
    if part > 0:
        tip = points[..., whole, :] + part * (points[..., whole + 1, :] - points[..., whole, :])
        path = np.concatenate([path, tip[..., None, :]], axis=-2)
    return path


class Screen:
    """Frames of height x width px, enlarged, with room for paths over them and a bar below that fills."""

    def __init__(self, height: int, width: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        scale = ANIMATION_PX / max(height, width)
        wide, high = round(width * scale), round(height * scale)
        self.figure = Figure(figsize=(wide / 100, (high + BAR_PX) / 100), dpi=100, facecolor="#0b0e12")
        self.canvas = FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, BAR_PX / (high + BAR_PX), 1, high / (high + BAR_PX)))
        self.image = show_frame(self.axes, np.zeros((1, height, width), np.uint8))
        self.axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        self.bar = self.figure.add_axes((0, 0, 1, BAR_PX / (high + BAR_PX)))
        self.bar.set_axis_off()
        self.bar.set(ylim=(0, 1))

    def fill(self, left: float, right: float, colour: str) -> None:
        """Colour a stretch of the bar."""
        self.bar.axvspan(left, right, 0.3, 0.8, color=colour, lw=0)

    def paths(self, count: int) -> Callable[[np.ndarray], None]:
        """What draws `count` imagined paths [count, P, 2], thinner the more they are, with their heads."""
        from matplotlib.collections import LineCollection

        alpha = float(np.clip(14 / count, 0.1, 0.9))
        lines = LineCollection([], colors=FAN, linewidths=1.3, alpha=alpha)
        self.axes.add_collection(lines)
        (heads,) = self.axes.plot([], [], ".", color=FAN, markersize=7, alpha=min(0.85, 3 * alpha), markeredgewidth=0)

        def draw(paths: np.ndarray) -> None:
            lines.set_segments(list(paths))
            heads.set_data(paths[:, -1, 0], paths[:, -1, 1])

        return draw

    def shot(self, frame: np.ndarray, *, dimmed: bool) -> PillowImage:
        """The screen as it is, over a frame uint8 [C, H, W]."""
        from PIL import Image

        self.image.set_data(_pixels((frame * DIMMED).astype(np.uint8) if dimmed else frame))
        self.canvas.draw()
        return Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3].copy())


def moving_picture(
    images: Sequence[PillowImage], durations_ms: Sequence[int], still: PillowImage, alt: str, *, max_bytes: int
) -> Picture:
    """Images as an animated WebP: as fine as fits, as restless video would make the page heavy."""
    for quality, shrink in ((72, 1), (45, 1), (30, 2), (30, 4)):
        moving, sized = BytesIO(), [image.reduce(shrink) for image in images]
        sized[0].save(
            moving,
            format="webp",
            save_all=True,
            append_images=sized[1:],
            duration=list(durations_ms),
            loop=0,
            quality=quality,
        )
        if moving.tell() <= max_bytes:
            break
    stands = BytesIO()
    still.save(stands, format="webp", quality=82)
    uri = data_uri(moving.getvalue())
    return Picture(uri, uri, alt, *images[0].size, still=data_uri(stands.getvalue()))


def spread_over(total: int, most: int) -> np.ndarray:
    """At most `most` of the indices below `total`, from the first to the last."""
    return np.unique(np.linspace(0, total - 1, min(total, most)).round().astype(int))


def animation(frames: np.ndarray, num_frames: int, alt: str, *, fans: Fans | None = None, query: int = 0) -> Picture:
    """A context segment and what followed, uint8 [T, C, H, W], as an animated WebP with a still of its end.

    Sampled paths of `fans`, positions on the frames, grow frame by frame over what followed. A bar at the bottom fills
    with the segments: the context first.
    """
    total = len(frames)
    images, durations_ms = [], []
    with style(THEMES["dark"]):
        screen = Screen(*frames.shape[-2:])
        screen.bar.set_xlim(0, total)
        for left in range(0, total, num_frames):
            screen.fill(left + 0.1, left + num_frames - 0.1, "#323a44")
        if fans is not None:
            draw_paths = screen.paths(fans.samples.shape[1])
            (trace,) = screen.axes.plot([], [], color=TRUTH, linewidth=1.8)
            (ring,) = screen.axes.plot([], [], "o", color=TRUTH, markersize=16, markerfacecolor="none", mew=2)
        for index in spread_over(total, MAX_FRAMES_MOVING):
            future = index >= num_frames
            if fans is not None and future:
                segments = (index + 1 - num_frames) / num_frames
                truth = path_until(fans.origin[query], fans.true[query], segments)
                draw_paths(path_until(fans.origin[query], fans.samples[query], segments))
                trace.set_data(truth[:, 0], truth[:, 1])
                ring.set_data(truth[-1:, 0], truth[-1:, 1])
            left = index // num_frames * num_frames
            right = min(index + 0.9, left + num_frames - 0.1)
            screen.fill(left + 0.1, right, TRUTH if future else "#ffffff")
            images.append(screen.shot(frames[index], dimmed=fans is not None and future))
            durations_ms.append(FUTURE_MS if future else CONTEXT_MS)
    durations_ms[-1] = PAUSE_MS
    return moving_picture(images, durations_ms, images[-1], alt, max_bytes=MAX_ANIMATION_BYTES)


# -------------------------------------------------------------------------------------------------------- planning


def imagined_paths(episode: PlannedEpisode, step: int) -> np.ndarray:
    """[S, 1 + H, 2] px: from where the agent is at a step to where its plan there is imagined to lead."""
    assert episode.way_px is not None and episode.imagined_px is not None
    imagined = episode.imagined_px[step]
    here = np.broadcast_to(episode.way_px[step], (len(imagined), 1, 2))
    return np.concatenate([here, imagined], axis=1)


def planning_animation(episode: PlannedEpisode, alt: str) -> Picture:
    """An episode as an animated WebP: a cross at the goal, the way so far, and the path imagined for the plan.

    The still has the whole way, and the path imagined at the first step. A bar at the bottom fills with the steps.
    """
    total, drawn = len(episode.frames), episode.imagined_px is not None
    images = []
    with style(THEMES["dark"]):
        screen = Screen(*episode.frames.shape[-2:])
        screen.bar.set_xlim(0, total)
        screen.fill(0.1, total - 0.1, "#323a44")
        if episode.imagined_px is not None:
            draw_paths = screen.paths(episode.imagined_px.shape[1])
        (way,) = screen.axes.plot([], [], color=TRUTH, linewidth=1.8)
        if episode.goal_px is not None:
            screen.axes.plot(*episode.goal_px, "x", color=GOAL, markersize=11, markeredgewidth=2.2)

        def shot(step: int, planned_at: int | None) -> PillowImage:
            if episode.way_px is not None:
                way.set_data(*episode.way_px[: step + 1].T)
            if drawn:
                draw_paths(imagined_paths(episode, planned_at) if planned_at is not None else np.empty((0, 1, 2)))
            return screen.shot(episode.frames[step], dimmed=drawn)

        for step in spread_over(total, MAX_STEPS_MOVING):
            screen.fill(0.1, min(step + 0.9, total - 0.1), TRUTH)
            images.append(shot(int(step), int(step) if step < total - 1 else None))
        still = shot(total - 1, 0)
    durations_ms = [*[STEP_MS] * (len(images) - 1), PAUSE_MS]
    return moving_picture(images, durations_ms, still, alt, max_bytes=MAX_EPISODE_BYTES)


def interval_chart(
    points: Sequence[tuple[float, float, float, float]], levels: Mapping[str, float], *, xlabel: str, alt: str
) -> Picture:
    """Rates with their intervals, (x, rate, low, high), against x on a logarithmic axis; levels have names."""
    from matplotlib.ticker import NullLocator

    x, rate, low, high = np.array(sorted(points)).T

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        for name, level in levels.items():
            axes.axhline(level, color=theme["law"], linewidth=1, linestyle=(0, (2, 2)), zorder=1)
            axes.annotate(
                name, (0.99, level), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
                ha="right", color=theme["text"], fontsize=8.5,
            )  # fmt: skip
        axes.vlines(x, low, high, color=theme["model"], linewidth=1.6)
        axes.plot(x, rate, color=theme["model"], marker="o", markersize=5)
        axes.set(xscale="log", ylim=(0, 1.08), xlabel=xlabel, ylabel="success")
        axes.set_xticks(x, [f"{value:,.0f}" for value in x])
        axes.xaxis.set_minor_locator(NullLocator())

    return chart(draw, alt)


# --------------------------------------------------------------------------------------------------------- latents

MAX_POINTS = 1500


def principal_components(r: np.ndarray) -> tuple[np.ndarray, float]:
    """[N, 2] the coordinates of r [N, R] along its two leading directions, and the share of variance they hold."""
    centred = r - r.mean(axis=0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    held = float((singular[:2] ** 2).sum() / max((singular**2).sum(), 1e-12))
    plane = centred @ directions[:2].T
    return np.pad(plane, ((0, 0), (0, 2 - plane.shape[1]))), held


def latent_charts(latents: Latents) -> list[tuple[str, Picture]]:
    """Inferred r in its leading plane: a title and a chart for each dimension of what truly changed, or one plain."""
    if len(latents.r) < 3 or latents.r.shape[1] == 0:
        return []
    plane, held = principal_components(latents.r.astype(float))
    keep = np.linspace(0, len(plane) - 1, min(len(plane), MAX_POINTS)).round().astype(int)
    about = f"{len(plane):,} inferred r in the plane that holds {held:.0%} of their variance"
    if latents.change is None:
        return [("r", chart(lambda f, t: _scatter(f, t, plane[keep], None), f"{about}."))]
    charts = []
    inputs = np.column_stack([plane, np.ones(len(plane))])
    for k in range(latents.change.shape[1]):
        change = latents.change[:, k].astype(float)
        fit = inputs @ np.linalg.lstsq(inputs, change, rcond=None)[0]
        r2 = 1 - ((change - fit) ** 2).sum() / max(((change - change.mean()) ** 2).sum(), 1e-12)
        name = f"{latents.change_name}, dimension {k + 1}" if latents.change.shape[1] > 1 else latents.change_name
        alt = f"{about}, coloured by {name}: a straight line across the plane explains {max(r2, 0.0):.0%} of it."

        def draw(figure: Figure, theme: Theme, change: np.ndarray = change) -> None:
            _scatter(figure, theme, plane[keep], change[keep])

        charts.append((name, chart(draw, alt)))
    return charts


def _scatter(figure: Figure, theme: Theme, points: np.ndarray, colour: np.ndarray | None) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    axes = figure.add_subplot()
    if colour is None:
        axes.scatter(points[:, 0], points[:, 1], s=7, color=theme["model"], alpha=0.6, linewidths=0)
    else:
        # The middle is grey, not white, so that it shows on both pages.
        diverging = LinearSegmentedColormap.from_list("change", [theme["model"], theme["law"], theme["truth"]])
        limit = max(float(np.nanpercentile(np.abs(colour), 98)), 1e-9)
        drawn = axes.scatter(
            points[:, 0], points[:, 1], s=8, c=colour, cmap=diverging, vmin=-limit, vmax=limit, alpha=0.85, linewidths=0
        )
        scale = figure.colorbar(drawn, ax=axes, fraction=0.05, pad=0.03)
        scale.outline.set_visible(False)
        scale.ax.grid(False)
    axes.set(xlabel="first component of r", ylabel="second component")
