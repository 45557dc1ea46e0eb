"""Real, small videos with the numbers of the video and of the frame painted into the pixels."""

import gc
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipelines.decoders import resolve_decoder
from data_pipelines.errors import UserError

Image = NDArray[np.uint8]
BLOCK_PX = 8
NUM_BITS = 12

WriteVideo = Callable[..., Path]
ReadNumbers = Callable[[Any], tuple[int, int]]


@pytest.fixture(scope="module")
def no_other_workers() -> None:
    """End the workers of streams that tests of other files may have left in reference cycles: a file counts its own."""
    gc.collect()


def _is_usable(decoder: str) -> bool:
    try:
        return resolve_decoder(decoder) == decoder
    except UserError:
        return False


DECODERS = list(filter(_is_usable, ("pyav", "decord", "torchcodec")))


def paint(video: int, frame: int, height: int, width: int) -> Image:
    """Two rows of blocks, white for 1: the bits of the video's number, then (below) those of the frame's."""
    image = np.full((height, width), 96, dtype=np.uint8)
    per_row = min(width // BLOCK_PX, NUM_BITS)
    for top, number in ((0, video), (height // BLOCK_PX // 2, frame)):
        for bit in range(NUM_BITS):
            y, x = (top + bit // per_row) * BLOCK_PX, bit % per_row * BLOCK_PX
            image[y : y + BLOCK_PX, x : x + BLOCK_PX] = 235 if number >> bit & 1 else 20
    return image


def _write_video(
    path: Path,
    *,
    video: int = 0,
    num_frames: int = 9,
    size: tuple[int, int] = (48, 64),
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    fps: int = 10,
    images: list[Image] | None = None,
    times_ms: Sequence[int] | None = None,
) -> Path:
    """Encode painted frames, or images (each [H, W] or [H, W, 3]); at times_ms, or evenly from zero on."""
    import av

    num_frames = num_frames if times_ms is None else len(times_ms)

    images = images or [paint(video, frame, *size) for frame in range(num_frames)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if codec == "libx264":
        options = {"preset": "veryfast", "crf": "15"} | (options or {})
    with av.open(str(path), "w", options=container_options or {}) as out:
        stream: Any = out.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        if pix_fmt.startswith("yuvj"):
            stream.codec_context.color_range = 2
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="gray" if image.ndim == 2 else "rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def _read_numbers(frame: Any) -> tuple[int, int]:
    """[C, H, W] -> (video, frame) as painted."""
    image = np.asarray(frame).mean(axis=0)
    height, width = image.shape
    per_row = min(width // BLOCK_PX, NUM_BITS)
    numbers = []
    for top in (0, height // BLOCK_PX // 2):
        number = 0
        for bit in range(NUM_BITS):
            y, x = (top + bit // per_row) * BLOCK_PX, bit % per_row * BLOCK_PX
            number |= int(image[y + 2 : y + 6, x + 2 : x + 6].mean() > 128) << bit
        numbers.append(number)
    return numbers[0], numbers[1]


@pytest.fixture(scope="session")
def write_video() -> WriteVideo:
    return _write_video


@pytest.fixture(scope="session")
def read_numbers() -> ReadNumbers:
    return _read_numbers


@pytest.fixture(scope="session")
def mixed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 files of nine frames and 4 long ones with short and long keyframe intervals and B-frames.

    Videos are numbered in the order of their paths.
    """
    root = tmp_path_factory.mktemp("mixed")
    for video in range(30):
        _write_video(root / f"a{video:02d}.mp4", video=video)
    intervals = {"12": 150, "250": 200, "40": 300, "2": 170}
    for video, (interval, num_frames) in enumerate(intervals.items(), start=30):
        options = {"g": interval, "bf": "3", "sc_threshold": "0"}
        _write_video(root / "long" / f"{video}.mp4", video=video, num_frames=num_frames, options=options)
    return root
