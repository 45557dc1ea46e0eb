"""Find out from an H.264 header whether pictures may be fields, which FFmpeg reports only after decoding."""

HIGH_PROFILES = frozenset({44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244})
SPS = 7  # nal_unit_type of a sequence parameter set


class _Bits:
    """A raw byte sequence payload, read bit by bit (ITU-T H.264, 7.2 and 9.1). Raises IndexError past the end."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload.replace(b"\x00\x00\x03", b"\x00\x00")  # without emulation prevention
        self._at = 0

    def bits(self, count: int) -> int:
        value = 0
        for _ in range(count):
            value = value << 1 | self._payload[self._at >> 3] >> (7 - (self._at & 7)) & 1
            self._at += 1
        return value

    def unsigned(self) -> int:
        """Read a ue(v)."""
        zeros = 0
        while not self.bits(1):
            zeros += 1
        return (1 << zeros) - 1 + self.bits(zeros)

    def signed(self) -> int:
        """Read a se(v)."""
        code = self.unsigned()
        return (code + 1) // 2 if code % 2 else -(code // 2)


def may_have_fields(extradata: bytes | None) -> bool:
    """Return whether a stream's sequence parameter sets allow field pictures (frame_mbs_only_flag = 0).

    extradata: of the codec, in the form of MP4 (avcC) or of MPEG-TS (Annex B). Damaged sets count as not allowing it.
    """
    try:
        return any(not _frames_only(unit) for unit in _sps_units(extradata or b""))
    except IndexError:
        return False


def _sps_units(extradata: bytes) -> list[bytes]:
    if extradata[:1] == b"\x01":  # avcC: version, profile, compatibility, level, length size, number of sets
        units, at = [], 6
        for _ in range(extradata[5] & 31):
            length = int.from_bytes(extradata[at : at + 2], "big")
            units.append(extradata[at + 2 : at + 2 + length])
            at += 2 + length
        return units
    return [unit for unit in extradata.split(b"\x00\x00\x01")[1:] if unit and unit[0] & 31 == SPS]


def _frames_only(unit: bytes) -> bool:
    """Return frame_mbs_only_flag of a sequence parameter set (7.3.2.1.1)."""
    sps = _Bits(unit[1:])
    profile = sps.bits(8)
    sps.bits(16)  # constraints, level
    sps.unsigned()  # its number
    if profile in HIGH_PROFILES:
        chroma_format = sps.unsigned()
        if chroma_format == 3:
            sps.bits(1)
        sps.unsigned()  # bit depths
        sps.unsigned()
        sps.bits(1)
        if sps.bits(1):
            for number in range(12 if chroma_format == 3 else 8):
                if sps.bits(1):
                    _skip_scaling_list(sps, 16 if number < 6 else 64)
    sps.unsigned()  # log2_max_frame_num
    order_type = sps.unsigned()
    if order_type == 0:
        sps.unsigned()
    elif order_type == 1:
        sps.bits(1)
        sps.signed()
        sps.signed()
        for _ in range(sps.unsigned()):
            sps.signed()
    sps.unsigned()  # reference frames
    sps.bits(1)
    sps.unsigned()  # width and height
    sps.unsigned()
    return bool(sps.bits(1))


def _skip_scaling_list(sps: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + sps.signed()) % 256
        last = following or last
