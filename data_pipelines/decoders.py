"""Frames of one video file, read forwards, through PyAV, decord or torchcodec behind one small interface.

Frames are uint8 [C, H, W], numbered in order of presentation and rotated as they are to be shown. C = 1 is luma at full
range (0 black, 255 white), C = 3 is RGB. With size_px the short side is resized to it and the long side is cropped
about the centre. Otherwise frames keep their size.

To add a decoder, write a VideoReader in data_pipelines/readers and add it to BACKENDS.
"""

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from itertools import groupby, repeat
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from data_pipelines.clips import frames_on_screen
from data_pipelines.errors import UserError
from data_pipelines.facts import MAX_FRAME_PX, BadFile, Video
from data_pipelines.indexing.probe import index_file

Frame = NDArray[np.uint8]

# A jump forwards to a later keyframe pays if it saves decoding at least this many frames.
SEEK_SAVES_FRAMES = 32


@dataclass(frozen=True)
class Backend:
    """A decoding library: its module, the argument of pip install, and "module:class" of its reader."""

    module: str
    package: str
    reader: str


# In the order in which 'auto' prefers them.
BACKENDS = {
    "pyav": Backend("av", "av", "data_pipelines.readers.pyav:PyAVReader"),
    "torchcodec": Backend(
        "torchcodec", "'worldmodel[torchcodec]'", "data_pipelines.readers.torchcodec:TorchcodecReader"
    ),
    "decord": Backend("decord", "decord2", "data_pipelines.readers.decord:DecordReader"),
}


class DecodeError(Exception):
    """A file does not deliver a frame that its index promises. The message is one line, without the path."""

    def __init__(self, reason: str, frame: int = 0) -> None:
        super().__init__(reason)
        self.frame = frame
        """The number of the frame that is missing."""


class VideoReader(Protocol):
    """An open video. Reading frames in order is cheap. Threads cannot share a reader."""

    def __init__(self, path: str | Path, video: Video, *, channels: int, size_px: int | None) -> None:
        """Open a file. Raises DecodeError."""

    @staticmethod
    def check_library() -> None:
        """Import the library. Raises UserError: the installed version does not work here."""

    def read(self, frame: int) -> Frame:
        """Return frame number `frame` (0 <= frame < num_frames), [C, H, W]. Raises DecodeError."""

    def close(self) -> None:
        """Release the file and the codec."""


def resolve_decoder(decoder: str) -> str:
    """Return the decoder to use for 'auto', 'pyav', 'torchcodec' or 'decord'. Raises UserError: it is not usable.

    'auto' takes the fastest decoder that is installed, in the order of BACKENDS. In one second on one busy core, PyAV,
    torchcodec 0.13 and decord read 1,700, 700 and 600 files of nine 64x64 frames. Of 640x480 H.264, read in order and
    resized to 64 pixels, they read 2,500, 1,300 and 900 gray frames, or 2,200, 1,000 and 950 in colour.

    For videos from strangers use PyAV, or torchcodec with an FFmpeg that still gets security fixes. decord contains the
    FFmpeg of its release. Only PyAV reports damaged frames as errors; through the others FFmpeg conceals them.
    """
    if decoder not in ("auto", *BACKENDS):
        raise UserError(f"decoder={decoder!r} is unknown: use auto, {', '.join(BACKENDS)}")
    for name, backend in BACKENDS.items():
        if decoder in ("auto", name) and importlib.util.find_spec(backend.module) is not None:
            _reader_class(name).check_library()  # imports it before workers are forked
            return name
    name = "pyav" if decoder == "auto" else decoder
    raise UserError(f"decoder={decoder!r} is not installed: pip install {BACKENDS[name].package}")


def open_video(path: str | Path, video: Video, *, channels: int, size_px: int | None, decoder: str) -> VideoReader:
    """Open a file for reading frames. `decoder` is a name that resolve_decoder returned. Raises DecodeError."""
    assert channels in (1, 3), f"channels={channels} must be 1 or 3"
    return _reader_class(decoder)(path, video, channels=channels, size_px=size_px)


@lru_cache
def _reader_class(decoder: str) -> type[VideoReader]:
    module, _, name = BACKENDS[decoder].reader.partition(":")
    return getattr(import_module(module), name)


def read_facts(path: str | Path) -> Video:
    """Return the facts of a single file without an index. Raises UserError: it is missing or unreadable."""
    path = Path(path)
    video = index_file(path.parent, path.name)
    if isinstance(video, BadFile):
        raise UserError(f"video '{path}' cannot be read: {video.reason}")
    return video


def read_frames(
    path: str | Path,
    start_frame: int = 0,
    stop_frame: int | None = None,
    *,
    channels: int,
    size_px: int | None,
    decoder: str = "auto",
    fps: float | None = None,
    video: Video | None = None,
) -> Iterator[Frame]:
    """Yield frames [start_frame, stop_frame) of a single file without an index, each uint8 [C, H, W].

    fps: as in ClipSpec. Frames are then counted in the resampled video.
    video: the result of `read_facts`, if it is known already.

    Raises UserError: the file is missing, unreadable, damaged, or shorter than stop_frame.
    """
    decoder = resolve_decoder(decoder)
    path = os.path.abspath(path)
    video = read_facts(path) if video is None else video
    source_frames = frames_on_screen(video, fps).tolist()
    stop_frame = len(source_frames) if stop_frame is None else stop_frame
    if not 0 <= start_frame <= stop_frame <= len(source_frames):
        raise UserError(f"frames [{start_frame}, {stop_frame}) of '{path}': it has {len(source_frames)} frames")
    try:
        reader = open_video(path, video, channels=channels, size_px=size_px, decoder=decoder)
        try:
            for number, repeats in groupby(source_frames[start_frame:stop_frame]):
                yield from repeat(reader.read(number), len(list(repeats)))
        finally:
            reader.close()
    except DecodeError as error:
        raise UserError(f"video '{path}' cannot be decoded: {error}") from None


def scaled_size(size: tuple[int, int], size_px: int | None) -> tuple[int, int]:
    """Return (height, width) with the short side scaled to size_px, or the same size if size_px is None.

    Raises DecodeError: a frame grows beyond MAX_FRAME_PX pixels, as a line of one pixel's width would.
    """
    if size_px is None:
        return size
    height, width = round(size[0] * size_px / min(size)), round(size[1] * size_px / min(size))
    if height * width > max(MAX_FRAME_PX, size[0] * size[1]):
        raise DecodeError(
            f"frames of {size[1]}x{size[0]} would be resized to {width}x{height} before they are cropped, more than "
            f"{MAX_FRAME_PX:,} pixels"
        )
    return height, width


def centre_crop(frame: Frame, size_px: int | None) -> Frame:
    """Crop a frame [C, H, W] to [C, size_px, size_px], or not if size_px is None.

    The result is contiguous. That of a crop is a copy: a view would keep the whole frame in memory.
    """
    if size_px is not None and frame.shape[1:] != (size_px, size_px):
        top, left = (frame.shape[1] - size_px) // 2, (frame.shape[2] - size_px) // 2
        return frame[:, top : top + size_px, left : left + size_px].copy()
    return np.ascontiguousarray(frame)


def from_rgb(rgb: Frame, channels: int, size_px: int | None) -> Frame:
    """Convert RGB [H, W, 3] to [C, H, W], resize and crop it."""
    size = scaled_size((rgb.shape[0], rgb.shape[1]), size_px)
    if size != rgb.shape[:2]:
        image = torch.from_numpy(rgb).permute(2, 0, 1)[None]
        image = F.interpolate(image, size=size, mode="bilinear", antialias=True)
        rgb = image[0].permute(1, 2, 0).numpy()
    if channels == 3:
        return centre_crop(rgb.transpose(2, 0, 1), size_px)
    red, green, blue = (rgb[:, :, channel].astype(np.uint16) for channel in range(3))
    luma = (77 * red + 150 * green + 29 * blue + 128) >> 8  # BT.601; the weights sum to 256
    return centre_crop(luma.astype(np.uint8)[None], size_px)
