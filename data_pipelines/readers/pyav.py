"""Frames of one video file through PyAV: every timestamp that the index knows is verified."""

import contextlib
import os
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.containers import decoded_frames, decoding_errors, open_container, prepare_codec, video_stream
from data_pipelines.decoders import SEEK_SAVES_FRAMES, DecodeError, Frame, centre_crop, scaled_size
from data_pipelines.errors import one_line
from data_pipelines.facts import MAX_FRAME_PX, Video
from data_pipelines.indexing.probe import orientation_of

if TYPE_CHECKING:
    from av import VideoFrame
    from av.video.format import VideoFormat

# "TV" luma keeps 16..235 for black..white; bytes.translate applies such a table faster than NumPy does.
_TV_TO_FULL = np.clip(np.round((np.arange(256) - 16) * 255 / 219), 0, 255).astype(np.uint8).tobytes()
_TV_LUMA_FORMATS = frozenset({"yuv420p", "yuv422p", "yuv444p", "nv12", "nv21"})
_FULL_LUMA_FORMATS = frozenset({"yuvj420p", "yuvj422p", "yuvj444p", "gray"})
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG


class PyAVReader:
    """Decodes with PyAV on one thread. Checks the timestamp of each keyframe against the index."""

    def __init__(self, path: str | Path, video: Video, *, channels: int, size_px: int | None) -> None:
        self._av_errors = decoding_errors()
        self._path, self._video = path, video
        self._size_px, self._is_folder = size_px, os.path.isdir(path)
        # As stored: pictures are rotated last.
        self._size = (video.width, video.height) if video.quarter_turns % 2 else (video.height, video.width)
        self._scaled_size = scaled_size(self._size, size_px)
        self._format = "gray" if channels == 1 else _colour_format(self._size, self._scaled_size)
        self._frame_of_pts = dict(zip(video.keyframe_pts, video.keyframes, strict=False))
        self._pts_of_frame = {frame: pts for pts, frame in self._frame_of_pts.items()}
        self._open()

    def _open(self) -> None:
        try:
            self._container = open_container(self._path, self._video.path)
            self._stream = video_stream(self._container, self._video.stream)
            # The index has checked the size against max_frame_px, which may exceed the default.
            prepare_codec(self._stream, max(MAX_FRAME_PX, self._video.width * self._video.height))
            late_pts = self._pts_of_frame.get(0) if self._video.begins_late else None
            self._frames = decoded_frames(
                self._container,
                self._stream,
                first_pts=late_pts,
                from_keyframe=self._video.begins_late and late_pts is None,
            )
        except (*self._av_errors, IndexError) as error:
            raise DecodeError(one_line(error)) from None
        self._next = 0  # the frame that is decoded next

    @staticmethod
    def check_library() -> None:
        import av  # noqa: F401

    def close(self) -> None:
        self._container.close()

    def read(self, frame: int) -> Frame:
        if frame != self._next:
            self._go_to(frame)
        decoded = self._decode()
        if self._next == self._video.num_frames:  # PyAV leaks memory if a generator is not exhausted
            with contextlib.suppress(*self._av_errors):
                deque(self._frames, maxlen=0)
        return self._convert(decoded)

    def _go_to(self, frame: int) -> None:
        """Make `frame` the next one: seek to the keyframe before it if that saves enough frames, then decode."""
        assert 0 <= frame < self._video.num_frames, f"frame {frame} of {self._video.num_frames}"
        keyframe = bisect_right(self._video.keyframes, frame) - 1
        if frame < self._next or self._video.keyframes[keyframe] - self._next >= SEEK_SAVES_FRAMES:
            self._seek(keyframe)
        while self._next < frame:
            self._decode()

    def _decode(self) -> "VideoFrame":
        """Return the next frame in order of presentation; verify its timestamp if the index knows it."""
        decoded = self._advance()
        expected = self._next if decoded.pts is None else self._frame_of_pts.get(decoded.pts, self._next)
        if expected != self._next or self._pts_of_frame.get(self._next, decoded.pts) != decoded.pts:
            raise DecodeError(f"frames are missing before frame {expected}", self._next)
        self._next += 1
        return decoded

    def _advance(self) -> "VideoFrame":
        try:
            decoded = next(self._frames, None)
        except self._av_errors as error:
            raise DecodeError(f"frame {self._next}: {one_line(error)}", self._next) from None
        if decoded is None:
            raise DecodeError(f"ends after {self._next} of {self._video.num_frames} frames", self._next)
        if decoded.is_corrupt:
            raise DecodeError(f"frame {self._next}: damaged", self._next)
        return decoded

    def _seek(self, keyframe: int) -> None:
        """Make keyframe number `keyframe` the next frame, or an earlier keyframe if seeking fails.

        The seek of a container is a hint and may land late. The first frame must have exactly the timestamp of the
        keyframe. Otherwise earlier keyframes are tried, and finally the beginning of the file.
        """
        step = 1
        while keyframe > 0:
            pts = self._video.keyframe_pts[keyframe]
            try:
                self._container.seek(pts, stream=self._stream)
                self._frames = decoded_frames(self._container, self._stream, first_pts=pts)
                self._next = self._video.keyframes[keyframe]
                decoded = self._advance()
                if decoded.pts == pts:
                    self._frames = _chain(decoded, self._frames)
                    return
            except (DecodeError, *self._av_errors):
                pass
            keyframe, step = keyframe - step, 2 * step
        self.close()
        self._open()

    def _convert(self, decoded: "VideoFrame") -> Frame:
        size, frame = (decoded.height, decoded.width), self._next - 1
        if size != self._size:
            raise DecodeError(f"frame {frame}: {size[1]}x{size[0]} in a file of {self._size[1]}x{self._size[0]}", frame)
        # Images have an orientation each, in EXIF; a video has one.
        if self._is_folder and orientation_of(decoded) != (self._video.quarter_turns, self._video.mirrored):
            raise DecodeError(f"frame {frame}: to be turned in another way than the first image", frame)
        luma = _luma(decoded) if self._format == "gray" and self._scaled_size == size else None
        try:
            picture = _reformat(decoded, self._format, self._scaled_size) if luma is None else luma[None]
        except self._av_errors as error:  # such as a size that FFmpeg's scaler does not take
            raise DecodeError(f"frame {frame}: {one_line(error)}", frame) from None
        if self._video.mirrored:
            picture = picture[:, :, ::-1]
        if self._video.quarter_turns:
            picture = np.rot90(picture, self._video.quarter_turns, axes=(1, 2))
        return centre_crop(picture, self._size_px)


def _chain(first: "VideoFrame", rest: Iterator["VideoFrame"]) -> Iterator["VideoFrame"]:
    yield first
    yield from rest


def _plane(decoded: "VideoFrame", number: int) -> Frame:
    """Return a view [H, W] of a plane with one byte per pixel, without the padding at the end of its lines."""
    plane = decoded.planes[number]
    return np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[: decoded.height, : decoded.width]


def _luma(decoded: "VideoFrame") -> Frame | None:
    """Return full-range luma [H, W] from the first plane, or None for formats that need a conversion."""
    name = decoded.format.name
    if name in _FULL_LUMA_FORMATS or (name in _TV_LUMA_FORMATS and decoded.color_range == _FULL_RANGE):
        return _plane(decoded, 0).copy()
    if name in _TV_LUMA_FORMATS:
        luma = _plane(decoded, 0)
        return np.frombuffer(luma.tobytes().translate(_TV_TO_FULL), np.uint8).reshape(luma.shape)
    return None


def _colour_format(size: tuple[int, int], scaled: tuple[int, int]) -> str:
    """Return the format that frames in colour are converted to: planar, so that there is nothing to transpose.

    The direct conversion of subsampled colour to planes, without scaling, leaves up to the last eight columns unwritten
    unless the width is a multiple of 16 (libswscale 9.5 on x86).
    """
    return "rgb24" if size == scaled and size[1] % 16 else "gbrp"


_thread = threading.local()


def _reformatter() -> "Callable[..., VideoFrame]":
    """Return this thread's function that converts frames on one thread. Creating it is expensive."""
    if not hasattr(_thread, "reformat"):
        from av.video.reformatter import Interpolation, VideoReformatter

        # Recent PyAV scales on all cores by default; older versions lack the argument.
        has_threads = "threads" in (VideoReformatter.reformat.__doc__ or "")
        settings: dict[str, Any] = {"interpolation": Interpolation.AREA} | ({"threads": 1} if has_threads else {})
        _thread.reformat = partial(VideoReformatter().reformat, **settings)
    return _thread.reformat


@lru_cache
def _pixel_format(name: str) -> "VideoFormat":
    """Return FFmpeg's format with a name, which PyAV would look up for each frame."""
    from av.video.format import VideoFormat

    return VideoFormat(name)


def _reformat(decoded: "VideoFrame", format_name: str, size: tuple[int, int]) -> Frame:
    """Convert and resize a frame in one step: [C, *size]."""
    height, width = size
    frame = _reformatter()(decoded, format=_pixel_format(format_name), width=width, height=height)
    if format_name == "gray":
        return _plane(frame, 0)[None].copy()
    planes = frame.planes
    if format_name == "rgb24":
        lines = np.frombuffer(memoryview(planes[0]), np.uint8).reshape(-1, planes[0].line_size)
        return np.ascontiguousarray(lines[:height, : 3 * width].reshape(height, width, 3).transpose(2, 0, 1))
    # One copy of all planes. np.stack of views takes three times as long for small frames.
    joined = np.frombuffer(b"".join([planes[2], planes[0], planes[1]]), np.uint8)
    return joined.reshape(len(planes), -1, planes[0].line_size)[:, :height, :width]
