"""Videos of disks on known paths: the oracle for positions that are tracked."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.data_pipelines.conftest import WriteVideo

Array = NDArray[np.floating]
HEIGHT, WIDTH = 96, 128


def scenery(height: int = HEIGHT, width: int = WIDTH, level: float = 120.0, seed: int = 0) -> Array:
    """A slope with boxes on it, [H, W], around a grey level."""
    random = np.random.default_rng(seed)
    picture = level + np.linspace(-25, 25, width)[None] + np.linspace(-10, 10, height)[:, None]
    for _ in range(12):
        y, x = int(random.integers(height - 8)), int(random.integers(width - 8))
        picture[y : y + height // 8, x : x + width // 8] += random.uniform(-15, 15)
    return picture


def painted(
    background: Array,
    paths: Array,
    levels: Any,
    *,
    radius: float = 7.0,
    noise: float = 0.0,
    light: Array | None = None,
    seed: int = 0,
) -> list[NDArray[np.uint8]]:
    """Frames with disks at paths [F, N, 2]; a NaN hides one. levels: their grey levels. light: a gain per frame."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[: background.shape[0], : background.shape[1]]
    frames = []
    for number, places in enumerate(paths):
        frame = background.copy()
        for (centre_x, centre_y), level in zip(places, levels, strict=True):
            inside = np.clip(radius + 0.5 - np.hypot(x - centre_x, y - centre_y), 0, 1)
            frame = frame + np.nan_to_num(inside) * (level - frame)
        frame *= 1.0 if light is None else light[number]
        frame += random.normal(0, noise, frame.shape) if noise else 0.0
        frames.append(np.clip(frame.round(), 0, 255).astype(np.uint8))
    return frames


def circle(num_frames: int, *, turns: float = 1.5, phase: float = 0.0) -> Array:
    """A path on an ellipse within the picture, [F, 2]."""
    angle = 2 * np.pi * turns * np.arange(num_frames) / num_frames + phase
    return np.stack([WIDTH / 2 + 42 * np.cos(angle), HEIGHT / 2 + 30 * np.sin(angle)], axis=1)


def line(num_frames: int, start: tuple[float, float], stop: tuple[float, float]) -> Array:
    """A straight path at constant speed, [F, 2]."""
    return np.linspace(start, stop, num_frames)


def write(write_video: WriteVideo, path: Path, frames: list[NDArray[np.uint8]], **options: Any) -> Path:
    """Encode frames as H.264."""
    return write_video(path, images=frames, **options)
