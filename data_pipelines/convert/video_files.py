"""One clip -> one video file, decoded again and compared with its source.

Lossless files hold every byte of the frames: H.264 of RGB (GBR planes, lossless mode) in colour, full-range luma alone
for gray frames. All decoders of this project return these bytes.
"""

import hashlib
import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data_pipelines.convert.episodes import Clip, Frame, checked_frames
from data_pipelines.decoders import read_frames
from data_pipelines.errors import UserError, one_line
from data_pipelines.files import replacing

FULL_RANGE = 2  # AVCOL_RANGE_JPEG
LOSSLESS = {"qp": "0", "preset": "veryfast"}
FILE_BYTES = 2**20  # read at once


class Written(NamedTuple):
    """A verified file. psnr_db: of all its frames together, infinite if they are equal; None: it is lossless."""

    digest: str
    size_bytes: int
    psnr_db: float | None


def write_clip(path: Path, clip: Clip, fps: Fraction, crf: int | None) -> Written:
    """Write a clip as an .mp4 file, which appears complete or not at all, and verify it.

    fps: frames per second if the clip does not state them.
    crf: quality of x264, 0 (best) to 51; None: lossless, and a clip that is a video file is copied.

    Raises UserError: the source cannot be read, or the file does not decode to it; OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if clip.video is not None and crf is None:
            digest, psnr_db = _copy(clip.video, path), None
        else:
            hashes, is_gray = _encode(path, clip, clip.fps or fps, crf)
            digest, psnr_db = _digest_of(hashes), None
            if crf is None:
                _check_lossless(path, hashes, is_gray=is_gray)
            else:
                psnr_db = _measure_psnr(path, clip, is_gray=is_gray)
    except UserError:
        with suppress(OSError):
            path.unlink()
        raise
    return Written(digest, path.stat().st_size, psnr_db)


def source_digest(clip: Clip, crf: int | None) -> str:
    """Return the digest that write_clip would return, without writing. Raises UserError."""
    if clip.video is not None and crf is None:
        return _file_digest(clip.video)
    return _digest_of([_hash_of(frame) for frame in checked_frames(clip)])


# -------------------------------------------------------------------------------------------------------- writing


def _copy(source: Path, path: Path) -> str:
    """Copy a video file. Returns its digest. Raises UserError: it does not decode, or the copy differs."""
    for _ in read_frames(source, channels=1, size_px=None, decoder="pyav"):
        pass
    with open(source, "rb") as file, replacing(path) as copy:
        shutil.copyfileobj(file, copy, FILE_BYTES)
    digest = _file_digest(source)
    if digest != _file_digest(path):
        raise UserError(f"'{source}' changed while it was copied, or its copy is damaged")
    return digest


def _encode(path: Path, clip: Clip, fps: Fraction, crf: int | None) -> tuple[list[bytes], bool]:
    """Encode the frames of a clip. Returns a hash of each, and whether they are gray. Raises UserError."""
    import av

    hashes: list[bytes] = []
    is_gray = False

    def hashed() -> Iterator[Frame]:
        nonlocal is_gray
        for frame in checked_frames(clip):
            hashes.append(_hash_of(frame))
            is_gray = frame.ndim == 2
            yield frame

    try:
        with replacing(path) as file:
            _encode_frames(file, hashed(), fps, clip.frame_ms, crf)
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error.__context__, OSError):  # PyAV hides what writing to the file raised
            raise error.__context__ from None
        raise UserError(f"its frames cannot be encoded: {one_line(error)}") from None
    return hashes, is_gray


def _encode_frames(file: BinaryIO, frames: Iterator[Frame], fps: Fraction, frame_ms: Any, crf: int | None) -> None:
    import av

    first = next(frames)  # checked_frames raises if there is none
    is_gray, even = first.ndim == 2, first.shape[0] % 2 == 0 and first.shape[1] % 2 == 0
    pixels = "gray" if is_gray else "rgb24" if crf is None else "yuv420p" if even else "yuv444p"
    codec = "libx264rgb" if pixels == "rgb24" else "libx264"
    times_ms = np.cumsum([0, *frame_ms]).tolist()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream(codec, rate=fps, options=LOSSLESS if crf is None else {"crf": str(crf)})
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = pixels
        stream.codec_context.thread_count = 1
        if is_gray:
            stream.codec_context.color_range = FULL_RANGE
        if len(frame_ms):
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, frame in enumerate(_chain(first, frames)):
            picture = av.VideoFrame.from_ndarray(frame, format="gray" if is_gray else "rgb24")
            if len(frame_ms):
                picture.pts, picture.time_base = times_ms[number], Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def _chain(first: Frame, rest: Iterator[Frame]) -> Iterator[Frame]:
    yield first
    yield from rest


# ---------------------------------------------------------------------------------------------------- verification


def _check_lossless(path: Path, hashes: list[bytes], *, is_gray: bool) -> None:
    """Raise UserError unless the file decodes to frames with these hashes."""
    decoded = (_hash_of(frame) for frame in _decode(path, is_gray))
    for number, (has, expected) in enumerate(zip_longest(decoded, hashes)):
        if has != expected:
            raise UserError(f"frame {number} of the written file does not decode to the frame of the source")


def _measure_psnr(path: Path, clip: Clip, *, is_gray: bool) -> float:
    """Return the peak signal-to-noise ratio of all frames together, in dB. Raises UserError: frames are missing."""
    squares, count = 0.0, 0
    for has, expected in zip_longest(_decode(path, is_gray), checked_frames(clip)):
        if has is None or expected is None or has.shape != expected.shape:
            raise UserError("the written file does not decode to as many frames as the source has")
        squares += float(np.square(has.astype(np.int32) - expected).sum())
        count += expected.size
    return 10 * math.log10(255**2 * count / squares) if squares else math.inf


def _decode(path: Path, is_gray: bool) -> Iterator[Frame]:
    for frame in read_frames(path, channels=1 if is_gray else 3, size_px=None, decoder="pyav"):
        yield frame[0] if is_gray else frame.transpose(1, 2, 0)


def _hash_of(frame: Frame) -> bytes:
    return hashlib.blake2b(repr(frame.shape).encode() + np.ascontiguousarray(frame).tobytes(), digest_size=16).digest()


def _digest_of(hashes: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(hashes)).hexdigest()[:32]


def _file_digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {one_line(error)}") from None
