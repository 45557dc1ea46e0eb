"""Basics of all pictures of a report: colours, charts in two themes, and frames of a video.

A picture is WebP in a data URI. Charts are drawn for a light and a dark page, and the browser chooses. Frames of a
video are drawn once. Matplotlib and Pillow are imported where they are used.

Legend: N frames, C channels, H = W pixels.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from data_pipelines.errors import printable

if TYPE_CHECKING:
    import PIL.Image
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.transforms import Bbox

Theme = Mapping[str, str]

MAX_FRAMES_SHOWN = 4  # of each segment, so that a frame stays large on a phone
CHART_DPI = 200
MAX_STRIP_BYTES = 8_000  # of frames side by side, above which they are stored with less quality
SIDE_IN = 3.9  # width of a chart, for 10 pt to be legible on a phone

# Over frames of a video, for any colours of the page.
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
    """An image for the page: `light` and `dark` are data URIs, equal if one serves both.

    `still` replaces an animation for readers who prefer less motion; None for a static image.
    """

    light: str
    dark: str
    alt: str
    width_px: int
    height_px: int
    still: str | None = None


def data_uri(webp: bytes) -> str:
    """Return a WebP image as a data URI."""
    return "data:image/webp;base64," + base64.b64encode(webp).decode()


def _picture_uri(figure: Figure, *, dpi: int, lossless: bool) -> tuple[str, int, int]:
    """Return the figure as a WebP data URI, with its width and height in pixels."""
    buffer = BytesIO()
    # Without loss, `quality` is effort: 48 ms a chart, and 59 ms at the default of 80, which saves 1% of the bytes.
    options = {"lossless": True, "method": 1, "quality": 30} if lossless else {"quality": 82}
    figure.savefig(buffer, format="webp", dpi=dpi, transparent=True, pil_kwargs=options)
    width_px, height_px = (round(float(side) * dpi) for side in figure.get_size_inches())
    return data_uri(buffer.getvalue()), width_px, height_px


# Text is drawn literally: it holds names of files and runs, in which "$" does not start a formula.
PLAIN_TEXT: Any = {"text.parse_math": False, "text.usetex": False, "font.family": ["DejaVu Sans"]}


def save(figure: Figure, file: BinaryIO, suffix: str, *, dpi: int) -> None:
    """Write a figure with literal text. Matplotlib creates some labels only when it draws them."""
    import matplotlib

    with matplotlib.rc_context(PLAIN_TEXT):
        figure.savefig(file, format=suffix, dpi=dpi)


@contextmanager
def style(theme: Theme) -> Iterator[Theme]:
    """Apply Matplotlib's settings for a theme, independent of a user's matplotlibrc; yield the theme."""
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
    """Draw a chart in both themes by `draw(figure, theme)`.

    Both have the layout of the first, as their texts are equal: a layout takes as long as drawing.
    """
    from matplotlib.figure import Figure

    uris: dict[str, str] = {}
    places: list[Bbox] = []
    for name, theme in THEMES.items():
        with style(theme):
            figure = Figure(figsize=size_in, layout="constrained")
            draw(figure, theme)
            if places:
                figure.set_layout_engine("none")
                for axes, place in zip(figure.axes, places, strict=True):
                    axes.set_position(place)
            uris[name], width_px, height_px = _picture_uri(figure, dpi=CHART_DPI, lossless=True)
            places = [axes.get_position() for axes in figure.axes]
    return Picture(uris["light"], uris["dark"], alt, width_px, height_px)


def short(text: str, most: int = 24) -> str:
    """Shorten foreign text for a chart: one line, only glyphs of the font, at most the last `most` characters."""
    line = printable(" ".join(text.split()))
    line = line if len(line) <= most else "…" + line[1 - most :]
    glyphs = _glyphs()
    drawn = "".join(c if ord(c) in glyphs else "□" for c in line)
    return f" {drawn}" if drawn.startswith("_") else drawn  # Matplotlib omits labels with a leading _ from legends


@cache
def _glyphs() -> frozenset[int]:
    """Return the code points of the font of PLAIN_TEXT, which is part of Matplotlib."""
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def shown_frames(num_frames: int) -> list[int]:
    """Return the indices of the frames of a segment to draw: all, or a few from the first to the last."""
    if num_frames <= MAX_FRAMES_SHOWN:
        return list(range(num_frames))
    return [round(i * (num_frames - 1) / (MAX_FRAMES_SHOWN - 1)) for i in range(MAX_FRAMES_SHOWN)]


def strip(frames: np.ndarray, alt: str, *, max_px: int = 96) -> Picture:
    """Draw frames uint8 [N, C, H, W] side by side, each at most `max_px` high; the page enlarges small ones.

    W is H, or that of several cameras side by side.
    """
    from PIL import Image

    tiles = []
    for frame in frames:
        image = Image.fromarray(pixels(frame)).convert("RGBA")
        image.thumbnail((max_px * max(1, image.width // image.height), max_px))
        tiles.append(image)
    width, height = tiles[0].size
    gap = max(1, width // 24)
    whole = Image.new("RGBA", (len(tiles) * (width + gap) - gap, height))
    for i, tile in enumerate(tiles):
        whole.paste(tile, (i * (width + gap), 0))
    best = {"lossless": True} if frames.shape[1] == 1 else {"quality": 70}
    uri = data_uri(webp_that_fits(whole, (best, {"quality": 50}), MAX_STRIP_BYTES))  # noise does not fit
    return Picture(uri, uri, alt, *whole.size)


def webp_that_fits(image: PIL.Image.Image, options: Sequence[Mapping[str, Any]], max_bytes: int) -> bytes:
    """Encode an image as WebP with the first of the options of Pillow that fits into `max_bytes`, or with the last."""
    for each in options:
        buffer = BytesIO()
        image.save(buffer, format="webp", **each)
        if buffer.tell() <= max_bytes:
            break
    return buffer.getvalue()


def pixels(frame: np.ndarray) -> np.ndarray:
    """Return a frame uint8 [C, H, W] as [H, W], or as [H, W, 3] with colour."""
    return frame[0] if len(frame) == 1 else np.moveaxis(frame, 0, -1)


def show_frame(axes: Axes, frame: np.ndarray) -> AxesImage:
    """Show a frame uint8 [C, H, W] that fills the axes; pixel centres are at integers."""
    axes.set_axis_off()
    return axes.imshow(pixels(frame), cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
