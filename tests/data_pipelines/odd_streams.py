"""Streams that no encoder here writes: H.264 whose frames are pairs of fields, of uncompressed macroblocks."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
MACROBLOCK_PX = 16


class _Writer:
    """Bits of a raw byte sequence payload (ITU-T H.264, 7.2)."""

    def __init__(self) -> None:
        self._bits: list[int] = []

    def bits(self, count: int, value: int) -> "_Writer":
        self._bits += [value >> place & 1 for place in reversed(range(count))]
        return self

    def unsigned(self, *values: int) -> "_Writer":
        """ue(v) of each value."""
        for value in values:
            length = (value + 1).bit_length()
            self.bits(2 * length - 1, value + 1)
        return self

    def align(self) -> "_Writer":
        self._bits += [0] * (-len(self._bits) % 8)
        return self

    def pcm(self, content: bytes) -> "_Writer":
        self._bits += np.unpackbits(np.frombuffer(content, np.uint8)).tolist()
        return self

    def unit(self, header: int) -> bytes:
        """A NAL unit in a byte stream, with its trailing bits and emulation prevention."""
        self.bits(1, 1).align()
        payload, safe, zeros = np.packbits(np.array(self._bits, np.uint8)).tobytes(), bytearray(), 0
        for byte in payload:
            if zeros >= 2 and byte <= 3:
                safe.append(3)
                zeros = 0
            safe.append(byte)
            zeros = zeros + 1 if byte == 0 else 0
        return b"\0\0\0\1" + bytes([header]) + bytes(safe)


def field_pictures(images: Sequence[Image], *, rate: int = 25) -> bytes:
    """Images [H, W], H a multiple of 32 and W of 16 -> H.264 in which each frame is two field pictures."""
    height, width = images[0].shape
    assert height % (2 * MACROBLOCK_PX) == 0 and width % MACROBLOCK_PX == 0
    sps = _Writer().bits(8, 77).bits(8, 0).bits(8, 30)  # main profile
    sps.unsigned(0, 0, 2, 1).bits(1, 0)  # number; 16 frame numbers; order of decoding is that of presentation
    sps.unsigned(width // MACROBLOCK_PX - 1, height // MACROBLOCK_PX // 2 - 1)
    sps.bits(1, 0).bits(1, 0).bits(1, 1).bits(1, 0)  # fields; not adaptive; direct 8x8; no cropping
    sps.bits(1, 1).bits(1, 0).bits(1, 0).bits(1, 0).bits(1, 0)  # VUI: no aspect, overscan, signal, chroma place
    sps.bits(1, 1).bits(32, 1).bits(32, 2 * rate).bits(1, 1).bits(1, 0).bits(1, 0).bits(1, 0).bits(1, 0)  # its rate
    pps = _Writer().unsigned(0, 0).bits(1, 0).bits(1, 0).unsigned(0, 0, 0).bits(1, 0).bits(2, 0)
    pps.unsigned(0, 0, 0).bits(1, 0).bits(1, 0).bits(1, 0)  # as signed zeros; no deblocking control
    parameters = sps.unit(0x67) + pps.unit(0x68)
    stream = b""
    for number, image in enumerate(images):
        stream += b"\0\0\0\1\x09\x10" + parameters + _field(image[0::2], number, is_bottom=False)
        stream += b"\0\0\0\1\x09\x10" + _field(image[1::2], number, is_bottom=True)
    return stream


def _field(lines: Image, number: int, *, is_bottom: bool) -> bytes:
    """One field picture, the first of a frame as IDR."""
    slice_ = _Writer().unsigned(0, 7, 0).bits(4, 0).bits(1, 1).bits(1, is_bottom)  # an I slice of a field
    if is_bottom:
        slice_.bits(1, 0)  # reference marking by sliding window
    else:
        slice_.unsigned(number % 2).bits(2, 0)  # idr_pic_id; reference marking of an IDR
    slice_.unsigned(0)  # the quantiser as it is
    for top in range(0, lines.shape[0], MACROBLOCK_PX):
        for left in range(0, lines.shape[1], MACROBLOCK_PX):
            luma = lines[top : top + MACROBLOCK_PX, left : left + MACROBLOCK_PX].tobytes()
            slice_.unsigned(25).align().pcm(luma + bytes([128]) * 128)  # I_PCM
    return slice_.unit(0x61 if is_bottom else 0x65)
