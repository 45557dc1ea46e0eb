"""Videos whose frames show their numbers, in many codecs and containers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.scheduling import kept_scheduling

HEIGHT, WIDTH, BLOCK = 96, 128, 32  # a size that H.263 has too
NUM_FRAMES, FPS = 24, 25
NUM_BITS = 6  # painted twice, the second time inverted

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mpg", ".flv", ".wmv", ".3gp", ".ogv")


@dataclass(frozen=True)
class Codec:
    """An encoder of FFmpeg."""

    name: str
    pix_fmt: str = "yuv420p"
    options: tuple[tuple[str, str], ...] = ()


CODECS = (
    Codec("libx264", options=(("preset", "veryfast"), ("g", "12"), ("bf", "2"))),
    Codec("libx265", options=(("preset", "ultrafast"), ("x265-params", "log-level=none:pools=1"))),
    Codec("libsvtav1", options=(("preset", "8"), ("crf", "10"), ("svtav1-params", "lp=1"))),
    Codec("mpeg1video"),
    Codec("mpeg2video", options=(("bf", "2"),)),
    Codec("mpeg4", options=(("bf", "1"),)),
    Codec("libvpx", options=(("deadline", "realtime"), ("cpu-used", "8"))),
    Codec("libvpx-vp9", options=(("deadline", "realtime"), ("cpu-used", "8"))),
    Codec("mjpeg", "yuvj420p"),
    Codec("ffv1"),
    Codec("wmv2"),
    Codec("flv"),
    Codec("h263"),
)


def paint(number: int) -> NDArray[np.uint8]:
    """Paint the bits of a number, [H, W], with the inverted bits below."""
    bits = np.array([number >> bit & 1 for bit in range(NUM_BITS)])
    blocks = np.concatenate([bits, 1 - bits]).reshape(HEIGHT // BLOCK, WIDTH // BLOCK)
    return (40 + 170 * blocks).astype(np.uint8).repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)


def number_in(frame: NDArray[Any]) -> int | None:
    """Return the number that a picture [C, H, W] or [H, W] shows, None if it shows none."""
    image = frame.astype(np.float32)
    image = image.mean(axis=0) if image.ndim == 3 else image
    if image.shape != (HEIGHT, WIDTH):
        return None
    blocks = image.reshape(HEIGHT // BLOCK, BLOCK, WIDTH // BLOCK, BLOCK).mean(axis=(1, 3)).reshape(-1) > 128
    bits, inverted = blocks[:NUM_BITS], blocks[NUM_BITS:]
    return int(bits @ (1 << np.arange(NUM_BITS))) if (bits != inverted).all() else None


def write_video(path: Path, codec: Codec, num_frames: int = NUM_FRAMES) -> None:
    """Write a video. Raises av.FFmpegError, ValueError: the container does not support the codec."""
    import av

    with kept_scheduling(), av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec.name, rate=FPS, options=dict(codec.options))
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, codec.pix_fmt
        stream.codec_context.thread_count = 1
        if codec.pix_fmt.startswith("yuvj"):
            stream.codec_context.color_range = 2
        for number in range(num_frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(paint(number), format="gray")))
        container.mux(stream.encode(None))


def shows_its_numbers(path: Path, num_frames: int = NUM_FRAMES) -> bool:
    """Return whether FFmpeg decodes all frames in order."""
    import av

    try:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    except (av.FFmpegError, ValueError, IndexError):
        return False
    return [number_in(frame) for frame in frames] == list(range(num_frames))


def write_all(folder: Path) -> list[Path]:
    """Write every combination of codec and container that FFmpeg writes and reads back in order: CODEC.SUFFIX."""
    import av

    written = []
    for codec in CODECS:
        for suffix in SUFFIXES:
            path = folder / f"{codec.name}{suffix}"
            try:
                write_video(path, codec)
            except (av.FFmpegError, ValueError):
                path.unlink(missing_ok=True)
                continue
            if shows_its_numbers(path):
                written.append(path)
            else:
                path.unlink()
    return written
