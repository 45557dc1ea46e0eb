"""Frames of one video file, forwards, through PyAV, decord or torchcodec behind one small interface.

Frames are uint8 [C, H, W], numbered in order of presentation, turned as they are to be shown. C = 1 is luma at
full range (0 black, 255 white), C = 3 is RGB. With size_px the short side is resized to it and the long side
cropped about the centre; without, the frame keeps its size.
"""

import contextlib
import importlib.util
import os
import re
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from itertools import groupby, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from data_pipelines.clips import frames_on_screen
from data_pipelines.containers import (
    decoded_frames,
    decoding_errors,
    local_url,
    open_container,
    prepare_codec,
    video_stream,
)
from data_pipelines.errors import UserError, one_line
from data_pipelines.facts import MAX_FRAME_PX, ROUNDING_S, BadFile, Video
from data_pipelines.indexing.probe import index_file

if TYPE_CHECKING:
    from av import VideoFrame
    from av.video.reformatter import VideoReformatter

Frame = NDArray[np.uint8]

# A jump forwards to a later keyframe pays when it saves decoding at least this many frames.
SEEK_SAVES_FRAMES = 32

# "TV" luma keeps 16..235 for black..white; bytes.translate applies such a table faster than NumPy does.
_TV_TO_FULL = np.clip(np.round((np.arange(256) - 16) * 255 / 219), 0, 255).astype(np.uint8).tobytes()
_TV_LUMA_FORMATS = frozenset({"yuv420p", "yuv422p", "yuv444p", "nv12", "nv21"})
_FULL_LUMA_FORMATS = frozenset({"yuvj420p", "yuvj422p", "yuvj444p", "gray"})
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG

# In MPEG streams and WMV decord lands beside the frame asked for, and does not say so.
_DECORD_EXTENSIONS = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".3gp"})
# Elsewhere torchcodec may begin to decode where nothing can be decoded, and gives grey pictures at the right times.
_TORCHCODEC_SEEKS_IN = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm"})

# Name -> module, what pip installs; in the order in which 'auto' prefers them.
_BACKENDS = {
    "pyav": ("av", "av"),
    "torchcodec": ("torchcodec", "'worldmodel[torchcodec]'"),
    "decord": ("decord", "decord"),
}


class DecodeError(Exception):
    """A file does not deliver a frame that its index promises. The message is one line, without the path."""

    def __init__(self, reason: str, frame: int = 0) -> None:
        super().__init__(reason)
        self.frame = frame  # the one that did not come


class VideoReader(Protocol):
    """One open video. Cheap when frames are asked for in order; not to be shared between threads."""

    def read(self, frame: int) -> Frame:
        """Frame number `frame` (0 <= frame < num_frames), [C, H, W]. Raises DecodeError."""

    def close(self) -> None:
        """Release the file and the codec."""


def resolve_decoder(decoder: str) -> str:
    """'auto', 'pyav', 'torchcodec' or 'decord' -> the one to use. Raises UserError when it is not installed.

    'auto' takes the fastest that is installed, as they are listed. In a second of one busy core, PyAV, torchcodec 0.13
    and decord read 1,700, 700 and 600 files of nine 64x64 frames; of 640x480 H.264 in order and resized to 64 pixels,
    2,500, 1,300 and 900 gray frames, or 2,200, 1,000 and 950 in colour.

    For videos from strangers use PyAV, or torchcodec with an FFmpeg that still gets its security fixes: decord 0.6.0
    carries one of 2021. PyAV alone takes damaged frames for errors; FFmpeg conceals them from the others' callers.
    """
    if decoder not in ("auto", *_BACKENDS):
        raise UserError(f"decoder={decoder!r} is unknown: use auto, {', '.join(_BACKENDS)}")
    for name, (module, _) in _BACKENDS.items():
        if decoder in ("auto", name) and importlib.util.find_spec(module) is not None:
            if name == "torchcodec":
                _load_torchcodec(decoder)
            return name
    name = "pyav" if decoder == "auto" else decoder
    raise UserError(f"decoder={decoder!r} is not installed: pip install {_BACKENDS[name][1]}")


def _load_torchcodec(decoder: str) -> None:
    """Raises UserError unless the FFmpeg libraries that torchcodec needs are there and fit."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        raise UserError(
            f"decoder={decoder!r}: torchcodec finds no FFmpeg libraries, or is not for PyTorch {torch.__version__}: "
            "install FFmpeg 4 to 8 and the torchcodec that fits, or use decoder='pyav'"
        ) from None


def open_video(path: str | Path, video: Video, *, channels: int, size_px: int | None, decoder: str) -> VideoReader:
    """Open a file for reading frames. decoder is what resolve_decoder returned. Raises DecodeError."""
    assert channels in (1, 3), f"channels={channels} must be 1 or 3"
    if decoder == "decord":
        return DecordReader(path, video, channels=channels, size_px=size_px)
    if decoder == "torchcodec":
        return TorchcodecReader(path, video, channels=channels, size_px=size_px)
    return PyAVReader(path, video, channels=channels, size_px=size_px)


def read_facts(path: str | Path) -> Video:
    """The facts of a single file that needs no index. Raises UserError: it is missing or unreadable."""
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
    """Frames [start_frame, stop_frame) of a single file that needs no index, each uint8 [C, H, W].

    fps: as in ClipSpec; frames are then counted in the resampled video.
    video: what `read_facts` said of the file, to save finding it out again.

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


class PyAVReader:
    """Decodes with PyAV on one thread, and checks each keyframe's timestamp against the index."""

    def __init__(self, path: str | Path, video: Video, *, channels: int, size_px: int | None) -> None:
        self._av_errors = decoding_errors()
        self._path, self._video = path, video
        self._size_px = size_px
        self._format = "gray" if channels == 1 else "gbrp"  # planar: nothing to transpose
        # As stored; pictures are turned last.
        self._size = (video.width, video.height) if video.quarter_turns % 2 else (video.height, video.width)
        self._scaled_size = scaled_size(self._size, size_px)
        self._frame_of_pts = dict(zip(video.keyframe_pts, video.keyframes, strict=False))
        self._pts_of_frame = {frame: pts for pts, frame in self._frame_of_pts.items()}
        self._open()

    def _open(self) -> None:
        try:
            self._container = open_container(self._path, self._video.path)
            self._stream = video_stream(self._container, self._video.stream)
            # The index has judged the size by data.max_frame_px, which may be more than the default.
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
        self._next = 0  # the frame that decoding will give next

    def close(self) -> None:
        self._container.close()

    def read(self, frame: int) -> Frame:
        if frame != self._next:
            self._go_to(frame)
        decoded = self._decode()
        if self._next == self._video.num_frames:  # a generator that is left before its end leaks memory in PyAV
            with contextlib.suppress(*self._av_errors):
                deque(self._frames, maxlen=0)
        return self._convert(decoded)

    def _go_to(self, frame: int) -> None:
        """Make `frame` the next one: seek to the keyframe before it where that pays, and decode up to it."""
        assert 0 <= frame < self._video.num_frames, f"frame {frame} of {self._video.num_frames}"
        keyframe = bisect_right(self._video.keyframes, frame) - 1
        if frame < self._next or self._video.keyframes[keyframe] - self._next >= SEEK_SAVES_FRAMES:
            self._seek(keyframe)
        while self._next < frame:
            self._decode()

    def _decode(self) -> "VideoFrame":
        """The next frame in order of presentation, verified wherever the index knows its timestamp."""
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
        """Make keyframe number `keyframe` the next frame, or an earlier one where seeking there fails.

        A container's seek is a hint: it may land late. So the first frame from the keyframe on must have
        exactly the keyframe's timestamp; if not, try earlier keyframes, in the end the beginning of the file.
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
        size = (decoded.height, decoded.width)
        if size != self._size:
            frame = self._next - 1
            raise DecodeError(f"frame {frame}: {size[1]}x{size[0]} in a file of {self._size[1]}x{self._size[0]}", frame)
        luma = _luma(decoded) if self._format == "gray" and self._scaled_size == size else None
        picture = _reformat(decoded, self._format, self._scaled_size) if luma is None else luma[None]
        if self._video.mirrored:
            picture = picture[:, :, ::-1]
        if self._video.quarter_turns:
            picture = np.rot90(picture, self._video.quarter_turns, axes=(1, 2))
        return _centre_crop(picture, self._size_px)


def _chain(first: "VideoFrame", rest: Iterator["VideoFrame"]) -> Iterator["VideoFrame"]:
    yield first
    yield from rest


def _plane(decoded: "VideoFrame", number: int) -> Frame:
    """A plane of one byte a pixel without the padding at the end of its lines, [H, W]; a view."""
    plane = decoded.planes[number]
    return np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[: decoded.height, : decoded.width]


def _luma(decoded: "VideoFrame") -> Frame | None:
    """Full-range luma [H, W] straight from the first plane, or None for formats that need a conversion."""
    name = decoded.format.name
    if name in _FULL_LUMA_FORMATS or (name in _TV_LUMA_FORMATS and decoded.color_range == _FULL_RANGE):
        return _plane(decoded, 0).copy()
    if name in _TV_LUMA_FORMATS:
        luma = _plane(decoded, 0)
        return np.frombuffer(luma.tobytes().translate(_TV_TO_FULL), np.uint8).reshape(luma.shape)
    return None


_thread = threading.local()


def _reformatter() -> "tuple[VideoReformatter, dict[str, Any]]":
    """This thread's converter (its set-up costs more than a small frame) and how to keep it on one thread."""
    if not hasattr(_thread, "reformatter"):
        from av.video.reformatter import VideoReformatter

        # Recent PyAV scales on all cores unless told otherwise; older ones have no such argument.
        has_threads = "threads" in (VideoReformatter.reformat.__doc__ or "")
        _thread.reformatter = VideoReformatter(), ({"threads": 1} if has_threads else {})
    return _thread.reformatter


def _reformat(decoded: "VideoFrame", format_name: str, size: tuple[int, int]) -> Frame:
    """Convert and resize in one go -> [C, *size]."""
    height, width = size
    reformatter, one_thread = _reformatter()
    frame = reformatter.reformat(
        decoded, format=format_name, width=width, height=height, interpolation="AREA", **one_thread
    )
    order = (0,) if format_name == "gray" else (2, 0, 1)
    return np.stack([_plane(frame, plane) for plane in order])


def scaled_size(size: tuple[int, int], size_px: int | None) -> tuple[int, int]:
    """(height, width) with the short side at size_px and the same aspect, or as it is."""
    if size_px is None:
        return size
    return round(size[0] * size_px / min(size)), round(size[1] * size_px / min(size))


def _centre_crop(frame: Frame, size_px: int | None) -> Frame:
    """[C, H, W] -> contiguous [C, size_px, size_px], or [C, H, W] if size_px is None."""
    if size_px is not None and frame.shape[1:] != (size_px, size_px):
        top, left = (frame.shape[1] - size_px) // 2, (frame.shape[2] - size_px) // 2
        frame = frame[:, top : top + size_px, left : left + size_px]
    return np.ascontiguousarray(frame)


class DecordReader:
    """Decodes with decord on one thread. It always converts to RGB; luma is computed from that (BT.601)."""

    def __init__(self, path: str | Path, video: Video, *, channels: int, size_px: int | None) -> None:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        if video.quarter_turns or video.mirrored:
            raise DecodeError("its pictures are to be turned, which decord does wrongly: use decoder='pyav'")
        if video.stream >= 0:
            raise DecodeError("it has several video streams, of which decord chooses one itself: use decoder='pyav'")
        if os.path.splitext(video.path)[1].lower() not in _DECORD_EXTENSIONS:
            raise DecodeError("decord gives the wrong frames of files of its kind: use decoder='pyav'")
        self._path, self._video, self._channels, self._size_px = local_url(path), video, channels, size_px
        self._errors = (decord.DECORDError, RuntimeError, OSError, StopIteration, IndexError)
        self._open()

    def _open(self) -> None:
        import decord

        try:
            self._reader = decord.VideoReader(self._path, ctx=decord.cpu(0), num_threads=1)
            num_frames = len(self._reader)
        except self._errors as error:
            raise DecodeError(one_line(error)) from None
        if num_frames != self._video.num_frames:
            raise DecodeError(f"decord finds {num_frames} of {self._video.num_frames} frames")
        self._next = 0

    def close(self) -> None:
        self._reader = None

    def read(self, frame: int) -> Frame:
        assert 0 <= frame < self._video.num_frames, f"frame {frame} of {self._video.num_frames}"
        keyframes = self._video.keyframes
        # decord's seeking cannot be verified and lands wrong in open GOPs; its skip_frames miscounts too.
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
        # Where padding makes lines 4 x width long (48 pixels do), decord takes it for a fourth channel.
        rgb = rgb.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)
        return _from_rgb(rgb, self._channels, self._size_px)


class TorchcodecReader:
    """Decodes with torchcodec on one thread, and checks each frame's time against the index.

    torchcodec finds a frame by the frame rate, or by times that it scans the whole file for when it opens it. The scan
    is saved where the index says that the rate is constant; should a jump land wrong nevertheless, the file is opened
    again with it. FFmpeg conceals damage here: what a damaged frame still shows passes as a picture.
    """

    def __init__(self, path: str | Path, video: Video, *, channels: int, size_px: int | None) -> None:
        self._path, self._video, self._channels, self._size_px = local_url(path), video, channels, size_px
        # A torchcodec of another version may raise any of these; a failed torch operator is a RuntimeError.
        self._errors = (RuntimeError, ValueError, IndexError, OSError, AssertionError)
        is_avi = os.path.splitext(video.path)[1].lower() == ".avi"
        if not (video.keyframe_pts or is_avi):
            raise DecodeError("torchcodec finds frames by times, and some of its are wrong: use decoder='pyav'")
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
            if not scan:  # the header may lack what the file holds
                return self._open(scan=True)
            raise DecodeError(_without_place(error)) from None
        if num_frames != self._video.num_frames:
            if not scan:
                return self._open(scan=True)
            raise DecodeError(f"torchcodec finds {num_frames} of {self._video.num_frames} frames")
        self._scanned, self._next = scan, 0

    def close(self) -> None:
        del self._decoder

    def read(self, frame: int) -> Frame:
        assert 0 <= frame < self._video.num_frames, f"frame {frame} of {self._video.num_frames}"
        rgb = self._decode(frame) if frame == self._next else self._jump(frame)
        height, width = self._video.height, self._video.width
        if rgb.shape != (height, width, 3):
            size = f"{rgb.shape[1]}x{rgb.shape[0]}"
            raise DecodeError(f"frame {frame}: {size} in a file of {width}x{height}", frame)
        if self._video.mirrored:  # torchcodec has turned it as if it were not: by two quarters more
            turns = self._video.quarter_turns
            rgb = np.ascontiguousarray(np.rot90(np.rot90(rgb, -(turns + 2))[:, ::-1], turns))
        return _from_rgb(rgb, self._channels, self._size_px)

    def _decode(self, frame: int) -> Frame:
        """[H, W, 3]. torchcodec seeks unless this is the frame after the last one."""
        try:
            decoded = self._decoder.get_frame_at(frame)
        except self._errors as error:
            raise DecodeError(f"frame {frame}: {_without_place(error)}", frame) from None
        if self._shown_s is not None and abs(decoded.pts_seconds - self._shown_s[frame]) > self._tolerance_s:
            raise DecodeError(f"frame {frame}: another one came in its place", frame)
        self._next = frame + 1
        return decoded.data.numpy()

    def _jump(self, frame: int) -> Frame:
        """_decode for a frame that is not the next one: by seeking where that lands right, else from the beginning."""
        seeks = self._shown_s is not None and os.path.splitext(self._video.path)[1].lower() in _TORCHCODEC_SEEKS_IN
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
    """torchcodec's message as one short line, without its own source file and line that open it."""
    return re.sub(r"^.*\.cpp:\d+, ", "", one_line(error))


def _from_rgb(rgb: Frame, channels: int, size_px: int | None) -> Frame:
    """RGB [H, W, 3] -> [C, H, W], resized and cropped."""
    size = scaled_size((rgb.shape[0], rgb.shape[1]), size_px)
    if size != rgb.shape[:2]:
        image = torch.from_numpy(rgb).permute(2, 0, 1)[None]
        image = F.interpolate(image, size=size, mode="bilinear", antialias=True)
        rgb = image[0].permute(1, 2, 0).numpy()
    if channels == 3:
        return _centre_crop(rgb.transpose(2, 0, 1), size_px)
    red, green, blue = (rgb[:, :, channel].astype(np.uint16) for channel in range(3))
    luma = (77 * red + 150 * green + 29 * blue + 128) >> 8  # BT.601; the weights sum to 256
    return _centre_crop(luma.astype(np.uint8)[None], size_px)
