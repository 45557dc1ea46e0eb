"""Frames of one video file through decord: decord2, the maintained fork with the same module name."""

import ctypes
import os
import sys
from bisect import bisect_right
from pathlib import Path
from types import ModuleType

from data_pipelines.containers import local_url
from data_pipelines.decoders import SEEK_SAVES_FRAMES, DecodeError, Frame, from_rgb
from data_pipelines.errors import UserError, one_line
from data_pipelines.facts import Video

# In MPEG streams and WMV decord returns neighbours of the requested frame without an error.
_EXTENSIONS = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".3gp"})


def import_decord() -> ModuleType:
    """Import decord, and keep its FFmpeg to itself.

    It loads its libraries with RTLD_GLOBAL. Other libraries that use an FFmpeg, such as torchcodec, would then call
    functions of decord's and crash.
    """
    if "decord" not in sys.modules:
        exported = ctypes.RTLD_GLOBAL
        setattr(ctypes, "RTLD_GLOBAL", ctypes.RTLD_LOCAL)  # noqa: B010 (mypy takes it for a constant)
        try:
            import decord
        finally:
            setattr(ctypes, "RTLD_GLOBAL", exported)  # noqa: B010
    import decord

    return decord


class DecordReader:
    """Decodes with decord on one thread. It always converts to RGB; luma is computed from that (BT.601)."""

    def __init__(self, path: str | Path, video: Video, *, channels: int, size_px: int | None) -> None:
        decord = import_decord()
        decord.logging.set_level(decord.logging.QUIET)
        if video.mirrored:
            raise DecodeError("its pictures are mirrored, which decord ignores: use decoder='pyav'")
        if video.stream >= 0:
            raise DecodeError("it has several video streams, and decord cannot select one: use decoder='pyav'")
        if os.path.splitext(video.path)[1].lower() not in _EXTENSIONS:
            raise DecodeError("decord returns wrong frames for files of its kind: use decoder='pyav'")
        self._path, self._video, self._channels, self._size_px = local_url(path), video, channels, size_px
        self._errors = (decord.DECORDError, RuntimeError, OSError, StopIteration, IndexError)
        self._open()

    def _open(self) -> None:
        decord = import_decord()
        try:
            self._reader = decord.VideoReader(self._path, ctx=decord.cpu(0), num_threads=1)
            num_frames = len(self._reader)
        except self._errors as error:
            raise DecodeError(one_line(error)) from None
        if num_frames != self._video.num_frames:
            raise DecodeError(f"decord finds {num_frames} of {self._video.num_frames} frames")
        self._next = 0

    @staticmethod
    def check_library() -> None:
        """Import decord. Raises UserError: it is the unmaintained original, which rotates pictures wrongly."""
        decord = import_decord()
        if int(decord.__version__.partition(".")[0]) < 3:
            raise UserError(
                f"decoder='decord': version {decord.__version__} is too old: pip uninstall decord, then pip install "
                "decord2 (the maintained fork), or use decoder='pyav'"
            )

    def close(self) -> None:
        self._reader = None

    def read(self, frame: int) -> Frame:
        assert 0 <= frame < self._video.num_frames, f"frame {frame} of {self._video.num_frames}"
        keyframes = self._video.keyframes
        # decord's seeking cannot be verified, and is wrong in open GOPs; its skip_frames miscounts.
        keyframe = 0 if self._video.open_gop else keyframes[bisect_right(keyframes, frame) - 1]
        if frame < self._next and keyframe == 0:
            self._open()
        try:
            if frame < self._next or keyframe - self._next >= SEEK_SAVES_FRAMES:
                self._reader.seek_accurate(keyframe)
                self._next = keyframe
            while self._next < frame:
                self._reader.next()
                self._next += 1
            rgb = self._reader.next().asnumpy()
        except self._errors as error:
            raise DecodeError(f"frame {self._next}: {one_line(error)}", self._next) from None
        self._next += 1
        height, width = self._video.height, self._video.width
        if rgb.shape[:2] != (height, width):
            size = f"{rgb.shape[1]}x{rgb.shape[0]}"
            raise DecodeError(f"frame {frame}: {size} in a file of {width}x{height}", frame)
        # If padding makes lines 4 x width bytes long, as for 48 pixels, decord returns it as a fourth channel.
        rgb = rgb.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)
        return from_rgb(rgb, self._channels, self._size_px)
