"""Encoded pictures from strangers: decoded by Pillow, within bounds."""

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.convert.episodes import Frame
from data_pipelines.errors import UserError, one_line
from data_pipelines.facts import MAX_FRAME_PX

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PICTURE_BYTES = 2**28
PNG_BEGINS = b"\x89PNG\r\n\x1a\n"


def decode_picture(content: bytes) -> Frame:
    """Return a JPEG, PNG or WebP picture as a frame. Raises UserError: it is damaged, too large, or has 16 bits."""
    if len(content) > MAX_PICTURE_BYTES:
        raise UserError(f"a picture of {len(content):,} bytes: at most {MAX_PICTURE_BYTES:,} are accepted")
    if content[:8] == PNG_BEGINS and content[24:25] == b"\x10":  # Pillow would cut colours to 8 bits
        raise UserError("a picture with 16 bits: convert it to 8 bits")
    try:
        with open_picture(io.BytesIO(content), ("JPEG", "PNG", "WEBP")) as picture:
            return frame_of(picture)
    except picture_errors() as error:
        raise UserError(f"a picture that cannot be decoded: {one_line(error)}") from None


def open_picture(file: io.BytesIO | Path, formats: tuple[str, ...]) -> "Image":
    """Open a picture of one of these formats of Pillow. Raises the exceptions of picture_errors, or UserError."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is checked here
        picture = Image.open(file, formats=formats)
    if picture.width * picture.height > MAX_FRAME_PX:
        picture.close()
        raise UserError(f"frames of {picture.width}x{picture.height} pixels: at most {MAX_FRAME_PX:,} are accepted")
    return picture


def frame_of(picture: "Image") -> Frame:
    """Return the current frame of a picture: gray for modes 1 and L, otherwise RGB without alpha.

    Raises UserError: it has more than 8 bits; and the exceptions of picture_errors.
    """
    if picture.mode in ("1", "L"):
        return np.asarray(picture.convert("L"))
    if picture.mode[0] in "IF":
        raise UserError(f"a picture of mode {picture.mode}, with more than 8 bits: convert it to 8 bits")
    return np.asarray(picture.convert("RGB"))


def is_gray_picture(path: Path) -> bool:
    """Return whether a file is a gray picture of at most 8 bits. Raises UserError: it is damaged, or too large."""
    try:
        with open_picture(path, ("JPEG", "PNG")) as picture:
            return picture.mode in ("1", "L")
    except picture_errors() as error:
        raise UserError(f"'{path.name}' cannot be read: {one_line(error)}") from None


def picture_errors() -> Any:
    """Return the exceptions that Pillow raises on bytes that are not a picture, a tuple of types."""
    from PIL import Image

    return OSError, ValueError, SyntaxError, EOFError, IndexError, Image.DecompressionBombError
