"""Decoded futures as pictures: an animation of a clip with its sampled futures, and the same frames side by side.

The frames of several cameras are side by side, so a frame may be wider than high.

Legend: L frames of the future, N frames, C channels, P pixels of a side, W = cameras * P pixels of the width.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.files import write_bytes
from worldmodel.evaluation.decoded import DecodedFutures
from worldmodel.report.animations import CONTEXT_MS, FUTURE_MS, PAUSE_MS, moving_bytes, spread_over
from worldmodel.report.drawing import Picture, data_uri, pixels, webp_that_fits
from worldmodel.runs.folder import RunFolder

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

MOVING_TILE_PX = 112
STILL_TILES_PX, STILL_WIDTH_PX = (64, 112), 760  # a still of few frames has larger tiles
GAP_PX, LABEL_PX, FONT_PX = 4, 16, 11
STUB_PX = 86  # width of the names of the rows
MAX_SEEN, MAX_COLUMNS = 3, 8  # frames of the context and of the future in a still
MAX_MOVING_BYTES, MAX_STILL_BYTES = 100_000, 70_000
SPREAD_GAIN = 2
"""A standard deviation of 0.5, the largest of values in [0, 1], is shown as white."""
BACKGROUND, INK = "#0b0e12", "#c9d1d9"


def decoded_pictures(futures: DecodedFutures) -> list[tuple[Picture, Picture]]:
    """Return the animation of each clip, and its frames side by side, as pictures of a page."""
    pictures = []
    for clip in range(len(futures.context)):
        images, durations_ms = moving_images(futures, clip)
        shown = f"what came, {_counted(futures)}, and the mean and the spread of all {futures.num_samples:,}"
        side_by_side = data_uri(still_bytes(futures, clip))
        moving = data_uri(moving_bytes(images, durations_ms, max_bytes=MAX_MOVING_BYTES))
        words, size = f"Clip {clip + 1}, moving: {shown}.", images[0].size
        animation = Picture(moving, moving, words, *size, still=side_by_side)
        words, size = f"Clip {clip + 1}, frame by frame: {shown}.", _still_size(futures)
        pictures.append((animation, Picture(side_by_side, side_by_side, words, *size)))
    return pictures


def write_futures(run: Path, futures: DecodedFutures) -> list[Path]:
    """Write an animation (.webp) and a still (.png) of each clip into the folder of a run; return their paths.

    Raises:
        OSError: a file cannot be written.
    """
    folder = RunFolder(run).futures
    folder.mkdir(exist_ok=True)
    paths = []
    for clip in range(len(futures.context)):
        png = BytesIO()
        still_image(futures, clip).save(png, format="png")
        moving = moving_bytes(*moving_images(futures, clip), max_bytes=MAX_MOVING_BYTES)
        for suffix, content in (("webp", moving), ("png", png.getvalue())):
            paths.append(folder / f"clip_{clip + 1}.{suffix}")
            write_bytes(paths[-1], content)
    return paths


# --------------------------------------------------------------------------------------------------------- animation


def moving_images(futures: DecodedFutures, clip: int) -> tuple[list[PillowImage], list[int]]:
    """Draw the images of an animation, with their durations: first the context in each panel, then what came."""
    context = futures.context[clip]
    blank = np.zeros_like(context[0])
    panels = [futures.real[clip], futures.mean[clip], _brightened(futures.spread[clip]), *futures.samples[clip]]
    names = ["what came", "mean of all samples", "spread of all samples", *_names(futures)]
    images = [_panels([frame, frame, blank, *[frame] * len(futures.samples[clip])], names) for frame in context]
    images += [_panels([panel[i] for panel in panels], names) for i in range(len(futures.frame_numbers))]
    durations_ms = [CONTEXT_MS] * len(context) + [FUTURE_MS] * len(futures.frame_numbers)
    durations_ms[-1] = PAUSE_MS
    return images, durations_ms


def _counted(futures: DecodedFutures) -> str:
    count = futures.samples.shape[1]
    return "a sampled future" if count == 1 else f"{count} sampled futures"


def _names(futures: DecodedFutures) -> list[str]:
    return [f"sample {number + 1}" for number in range(futures.samples.shape[1])]


def _moving_size(num_samples: int, cameras: int) -> tuple[int, int]:
    """Return the width and the height of an animation: a row of three panels, and samples in rows of three."""
    rows = 1 + -(-num_samples // 3)
    return 3 * (cameras * MOVING_TILE_PX + GAP_PX) - GAP_PX, rows * (MOVING_TILE_PX + LABEL_PX)


def _panels(frames: Sequence[np.ndarray], names: Sequence[str]) -> PillowImage:
    """Draw frames uint8 [C, P, W] in rows of three, each below its name."""
    from PIL import Image, ImageDraw

    cameras = _cameras_in(frames[0])
    whole = Image.new("RGB", _moving_size(len(frames) - 3, cameras), BACKGROUND)
    draw = ImageDraw.Draw(whole)
    for place, (frame, name) in enumerate(zip(frames, names, strict=True)):
        left, top = place % 3 * (cameras * MOVING_TILE_PX + GAP_PX), place // 3 * (MOVING_TILE_PX + LABEL_PX)
        draw.text((left + 2, top + 1), name, INK, font())
        whole.paste(tile(frame, MOVING_TILE_PX), (left, top + LABEL_PX))
    return whole


# ------------------------------------------------------------------------------------------------------------- still


def still_bytes(futures: DecodedFutures, clip: int) -> bytes:
    """Return the frames of a clip side by side as WebP, with the best quality that fits."""
    options = [{"quality": quality} for quality in (82, 60, 35, 10)]
    return webp_that_fits(still_image(futures, clip), options, MAX_STILL_BYTES)


def still_image(futures: DecodedFutures, clip: int) -> PillowImage:
    """Draw a row for what came, for the same after encoder and decoder, for each sample, and for mean and spread.

    The context is in the first row, left of the future.
    """
    from PIL import Image, ImageDraw

    seen = [int(i) for i in spread_over(len(futures.context[clip]), MAX_SEEN)]
    columns = [int(i) for i in spread_over(len(futures.frame_numbers), MAX_COLUMNS)]
    whole = Image.new("RGB", _still_size(futures), BACKGROUND)
    draw, tile_px = ImageDraw.Draw(whole), _still_tile_px(futures)
    across, down = _steps(futures)
    begin = STUB_PX + len(seen) * across + 2 * GAP_PX
    draw.text((STUB_PX, 1), "seen", INK, font())
    for place, i in enumerate(columns):
        draw.text((begin + place * across, 1), f"+{futures.frame_numbers[i]}", INK, font())
    for row, (name, frames) in enumerate(_rows(futures, clip)):
        top = LABEL_PX + row * down
        draw.text((2, top + tile_px // 2 - FONT_PX), name, INK, font())
        if row == 0:
            for place, i in enumerate(seen):
                whole.paste(tile(futures.context[clip, i], tile_px), (STUB_PX + place * across, top))
        for place, i in enumerate(columns):
            whole.paste(tile(frames[i], tile_px), (begin + place * across, top))
    return whole


def _rows(futures: DecodedFutures, clip: int) -> list[tuple[str, np.ndarray]]:
    """Return the name and the frames uint8 [L, C, P, W] of each row."""
    return [
        ("what came", futures.real[clip]),
        ("... decoded", futures.decoded_real[clip]),
        *zip(_names(futures), futures.samples[clip], strict=True),
        ("mean", futures.mean[clip]),
        ("spread", _brightened(futures.spread[clip])),
    ]


def _still_size(futures: DecodedFutures) -> tuple[int, int]:
    (across, down), num_rows = _steps(futures), 4 + futures.samples.shape[1]
    return STUB_PX + _num_columns(futures) * across + 2 * GAP_PX, LABEL_PX + num_rows * down


def _steps(futures: DecodedFutures) -> tuple[int, int]:
    """Return the pixels from a tile of a still to the next, across and down."""
    tile_px = _still_tile_px(futures)
    return _cameras_in(futures.context) * tile_px + GAP_PX, tile_px + GAP_PX


def _cameras_in(frames: np.ndarray) -> int:
    """Return the number of cameras that are side by side in frames [..., P, W]."""
    return frames.shape[-1] // frames.shape[-2]


def _still_tile_px(futures: DecodedFutures) -> int:
    least, most = STILL_TILES_PX
    across_px = STILL_WIDTH_PX // _num_columns(futures) - GAP_PX
    return min(most, max(least, across_px // _cameras_in(futures.context)))


def _num_columns(futures: DecodedFutures) -> int:
    return min(MAX_SEEN, futures.context.shape[1]) + min(MAX_COLUMNS, len(futures.frame_numbers))


def _brightened(spread: np.ndarray) -> np.ndarray:
    return np.minimum(SPREAD_GAIN * spread.astype(np.uint16), 255).astype(np.uint8)


def tile(frame: np.ndarray, side_px: int) -> PillowImage:
    """Draw a frame uint8 [C, P, W] with `side_px` pixels of height; single pixels of a small one stay visible."""
    from PIL import Image

    image = Image.fromarray(pixels(frame)).convert("RGB")
    resample = Image.Resampling.NEAREST if side_px % image.height == 0 else Image.Resampling.BICUBIC
    return image.resize((_cameras_in(frame) * side_px, side_px), resample)


def font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(FONT_PX)
