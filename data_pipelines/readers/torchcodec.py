"""Frames of one video file through torchcodec, with the FFmpeg libraries of the system."""

import contextlib
import os
import re
from pathlib import Path

import numpy as np
import torch

from data_pipelines.containers import is_image, local_url
from data_pipelines.decoders import DecodeError, Frame, from_rgb
from data_pipelines.errors import UserError, one_line
from data_pipelines.facts import ROUNDING_S, Video

# In other containers torchcodec may start to decode at a frame that cannot be decoded by itself. It then returns grey
# pictures with the right times.
_SEEKS_IN = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm"})


class TorchcodecReader:
    """Decodes with torchcodec on one thread. Checks the time of each frame against the index.

    torchcodec locates a frame by the frame rate, or by times for which it scans the whole file when it opens it. The
    scan is skipped if the rate is constant according to the index. If a jump lands wrong, the file is opened again with
    a scan. FFmpeg conceals damage: a damaged frame is returned as a picture.
    """

    def __init__(self, path: str | Path, video: Video, *, channels: int, size_px: int | None) -> None:
        self._path, self._video, self._channels, self._size_px = local_url(path), video, channels, size_px
        # Versions of torchcodec differ in what they raise; a failed torch operator is a RuntimeError.
        self._errors = (RuntimeError, ValueError, IndexError, OSError, AssertionError)
        is_avi = os.path.splitext(video.path)[1].lower() == ".avi"
        if not (video.keyframe_pts or is_avi):
            raise DecodeError("torchcodec locates frames by times, and some in this file are wrong: use decoder='pyav'")
        if is_image(video.path) and (video.quarter_turns or video.mirrored):
            raise DecodeError("its EXIF says that it is to be turned, which torchcodec ignores: use decoder='pyav'")
        if is_image(video.path) and "%" in self._path:
            raise DecodeError("torchcodec takes the % in its path for a pattern of names: use decoder='pyav'")
        self._shown_s = video.shown_s() + video.keyframe_pts[0] * video.tick_s if video.keyframe_pts else None
        self._tolerance_s = min(2 * ROUNDING_S, 0.5 / (video.fps or 1))
        self._open(scan=bool(video.frame_ms))

    def _open(self, *, scan: bool) -> None:
        from torchcodec.decoders import VideoDecoder

        try:
            self._decoder = VideoDecoder(
                self._path,
                stream_index=None if self._video.stream < 0 else self._video.stream,
                dimension_order="NHWC",
                num_ffmpeg_threads=1,
                device="cpu",
                seek_mode="exact" if scan else "approximate",
            )
            num_frames = len(self._decoder)
        except self._errors as error:
            if not scan:  # the header may lack facts that a scan finds
                return self._open(scan=True)
            raise DecodeError(_without_place(error)) from None
        if num_frames != self._video.num_frames:
            if not scan:
                return self._open(scan=True)
            raise DecodeError(f"torchcodec finds {num_frames} of {self._video.num_frames} frames")
        self._scanned, self._next = scan, 0

    @staticmethod
    def check_library() -> None:
        """Import torchcodec. Raises UserError: the FFmpeg libraries that it needs are missing or do not fit."""
        try:
            import torchcodec.decoders  # noqa: F401
        except (ImportError, OSError, RuntimeError):
            raise UserError(
                f"decoder='torchcodec': torchcodec finds no FFmpeg libraries, or is not for PyTorch "
                f"{torch.__version__}: install FFmpeg 4 to 8 and the torchcodec that fits, or use decoder='pyav'"
            ) from None

    def close(self) -> None:
        del self._decoder

    def read(self, frame: int) -> Frame:
        assert 0 <= frame < self._video.num_frames, f"frame {frame} of {self._video.num_frames}"
        rgb = self._decode(frame) if frame == self._next else self._jump(frame)
        height, width = self._video.height, self._video.width
        if rgb.shape != (height, width, 3):
            size = f"{rgb.shape[1]}x{rgb.shape[0]}"
            raise DecodeError(f"frame {frame}: {size} in a file of {width}x{height}", frame)
        if self._video.mirrored:  # torchcodec ignores the mirroring: its rotation is off by two quarter turns
            turns = self._video.quarter_turns
            rgb = np.ascontiguousarray(np.rot90(np.rot90(rgb, -(turns + 2))[:, ::-1], turns))
        return from_rgb(rgb, self._channels, self._size_px)

    def _decode(self, frame: int) -> Frame:
        """Return a frame [H, W, 3]. torchcodec seeks unless it is the frame after the last one."""
        try:
            decoded = self._decoder.get_frame_at(frame)
        except self._errors as error:
            raise DecodeError(f"frame {frame}: {_without_place(error)}", frame) from None
        if self._shown_s is not None and abs(decoded.pts_seconds - self._shown_s[frame]) > self._tolerance_s:
            raise DecodeError(f"frame {frame}: another one came in its place", frame)
        self._next = frame + 1
        return decoded.data.numpy()

    def _jump(self, frame: int) -> Frame:
        """Return a frame that is not the next one: by seeking if that lands right, otherwise from the beginning."""
        seeks = self._shown_s is not None and os.path.splitext(self._video.path)[1].lower() in _SEEKS_IN
        if seeks:
            for scan in dict.fromkeys((self._scanned, True)):
                if scan != self._scanned:
                    self._open(scan=True)
                with contextlib.suppress(DecodeError):
                    return self._decode(frame)
        if frame < self._next or seeks:
            self._open(scan=self._scanned)
        while self._next < frame:
            self._decode(self._next)
        return self._decode(frame)


def _without_place(error: Exception) -> str:
    """Return the message of torchcodec as one line, without the source file and line with which it starts."""
    return re.sub(r"^.*\.cpp:\d+, ", "", one_line(error))
