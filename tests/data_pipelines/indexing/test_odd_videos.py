"""Videos that are not one frame a packet, at even times, upright, in the only stream, from a keyframe on."""

import os
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.clips import frames_on_screen
from data_pipelines.decoders import DecodeError, open_video, read_frames
from data_pipelines.errors import UserError
from data_pipelines.facts import BadFile, Video
from data_pipelines.indexing.h264 import may_have_fields
from data_pipelines.indexing.probe import index_file
from tests.conftest import run_script
from tests.data_pipelines.conftest import DECODERS, paint
from tests.data_pipelines.odd_streams import field_pictures

B_FRAMES = {"g": "12", "bf": "2", "sc_threshold": "0"}
Numbers = list[tuple[int, int]]


def _indexed(path: Path) -> Video:
    video = index_file(path.parent, path.name)
    assert isinstance(video, Video), video
    return video


def _numbers(path: Path, read_numbers: Any, decoder: str = "pyav") -> list[int]:
    return [read_numbers(frame)[1] for frame in read_frames(path, channels=1, size_px=None, decoder=decoder)]


def _repack(
    source: Path,
    target: Path,
    *,
    first: int = 0,
    times_ms: Callable[[int], int] | None = None,
    early_ms: int | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Copy packets from number `first` on into another container; times_ms: from the number of a frame to its time.

    early_ms: how long before its even time a frame is decoded; None: when it is shown.
    """
    import av

    with av.open(str(source), options=options or {}) as container, av.open(str(target), "w") as out:
        stream = container.streams.video[0]
        copy = out.add_stream_from_template(stream)
        packets = [packet for packet in container.demux(stream) if packet.size]
        order = np.argsort(np.argsort([packet.pts or 0 for packet in packets], kind="stable")).tolist()
        for number, packet in enumerate(packets[first:], start=first):
            packet.stream = copy
            if times_ms is not None:
                packet.time_base = Fraction(1, 1000)
                packet.pts = times_ms(order[number])
                packet.dts = packet.pts if early_ms is None else 40 * number - early_ms
            out.mux(packet)
    return target


# ------------------------------------------------------------------------------------------------------------ fields


@pytest.mark.parametrize("name", ["v.MTS", "v.ts", "v.mkv", "v.mp4"])
def test_two_fields_are_one_frame(tmp_path: Path, read_numbers: Any, name: str) -> None:
    raw = tmp_path / "fields.h264"
    raw.write_bytes(field_pictures([paint(5, i, 64, 64) for i in range(30)]))
    path = _repack(raw, tmp_path / name, times_ms=lambda field: 20 * field, options={"framerate": "50"})
    video = _indexed(path)
    assert (video.num_frames, video.fps) == (30, pytest.approx(25, rel=1e-3))
    assert _numbers(path, read_numbers) == list(range(30))
    reader = open_video(path, video, channels=1, size_px=None, decoder="pyav")
    assert [read_numbers(reader.read(i))[1] for i in (29, 3, 17, 0)] == [29, 3, 17, 0]
    for decoder in set(DECODERS) - {"pyav"}:
        try:
            assert _numbers(path, read_numbers, decoder) == list(range(30))
        except UserError as error:
            assert "cannot be decoded" in str(error)


@pytest.mark.parametrize(("options", "expected"), [({}, False), ({"flags": "+ildct+ilme"}, True)])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p"])
def test_interlaced_streams_are_recognised(
    tmp_path: Path, write_video: Any, options: dict[str, str], expected: bool, pix_fmt: str
) -> None:
    import av

    for name in ("v.mp4", "v.ts"):
        path = write_video(tmp_path / name, options=options, pix_fmt=pix_fmt)
        with av.open(str(path)) as container:
            assert may_have_fields(container.streams.video[0].codec_context.extradata) == expected
    assert (
        not may_have_fields(None) and not may_have_fields(b"\x01\x64\x00\x1e\xff\xe1\x00") and not may_have_fields(b"")
    )


# ----------------------------------------------------------------------------------------------------------- streams


def _with_stills(path: Path, *, attached: bool, stills: int, frames: int, still_first: bool = True) -> Path:
    """A still picture of another size and a video of numbered frames, in the order that is asked for."""
    import av
    from av.stream import Disposition

    with av.open(str(path), "w") as out:

        def add_still() -> Any:
            stream: Any = out.add_stream("mjpeg", rate=25)
            stream.width, stream.height, stream.pix_fmt = 80, 48, "yuvj420p"
            stream.codec_context.color_range = 2
            if attached:
                stream.disposition = Disposition.attached_pic | Disposition.default
            return stream

        still: Any = add_still() if stills and still_first else None
        video: Any = None
        if frames:
            video = out.add_stream("libx264", rate=25, options=B_FRAMES)
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        if stills and not still_first:
            still = add_still()
        for stream, count, size in ((still, stills, (48, 80)), (video, frames, (48, 64))):
            for number in range(count):
                frame = av.VideoFrame.from_ndarray(paint(5, number, *size), format="gray")
                out.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
            if count:
                out.mux(stream.encode())
    return path


@pytest.mark.parametrize("still_first", [True, False])
@pytest.mark.parametrize(("name", "attached"), [("v.mp4", True), ("v.mkv", True), ("v.mkv", False), ("v.mov", False)])
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_still_picture_is_not_the_video(
    tmp_path: Path, read_numbers: Any, name: str, attached: bool, still_first: bool, decoder: str
) -> None:
    path = _with_stills(tmp_path / name, attached=attached, stills=1, frames=40, still_first=still_first)
    video = _indexed(path)
    assert (video.num_frames, video.width, video.height) == (40, 64, 48)
    try:
        assert _numbers(path, read_numbers, decoder) == list(range(40))
    except UserError as error:
        assert decoder == "decord" and "several video streams" in str(error)


def test_music_with_a_cover_is_not_a_video(tmp_path: Path) -> None:
    import av
    from av.stream import Disposition

    with av.open(str(tmp_path / "music.mp4"), "w") as out:
        cover: Any = out.add_stream("mjpeg", rate=25)
        cover.width, cover.height, cover.pix_fmt = 80, 48, "yuvj420p"
        cover.codec_context.color_range = 2
        cover.disposition = Disposition.attached_pic
        sound: Any = out.add_stream("aac", rate=48_000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 48_000
        picture = av.VideoFrame.from_ndarray(paint(5, 0, 48, 80), format="gray").reformat(format="yuvj420p")
        for stream, frame in ((cover, picture), (sound, silence)):
            out.mux(stream.encode(frame))
            out.mux(stream.encode())
    entry = index_file(tmp_path, "music.mp4")
    assert isinstance(entry, BadFile) and "attached picture" in entry.reason


# ------------------------------------------------------------------------------------------------------- orientation

MATRICES = {
    (1, 0, 0, 1): lambda image: image,
    (0, -1, 1, 0): lambda image: np.rot90(image, 1),
    (-1, 0, 0, -1): lambda image: np.rot90(image, 2),
    (0, 1, -1, 0): lambda image: np.rot90(image, 3),
    (-1, 0, 0, 1): lambda image: image[:, ::-1],
    (1, 0, 0, -1): lambda image: image[::-1],
    (0, 1, 1, 0): lambda image: image.T,
    (0, -1, -1, 0): lambda image: image[::-1, ::-1].T,
}


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("decoder", DECODERS)
def test_every_display_matrix_is_applied(
    tmp_path: Path, write_video: Any, matrix: tuple[int, int, int, int], decoder: str
) -> None:
    image = np.full((48, 64), 60, np.uint8)
    image[:20, :24], image[:10, 40:] = 200, 130  # which way up, and whether it is mirrored
    path = write_video(tmp_path / "v.mp4", images=[image] * 3, options={"crf": "5"})
    a, b, c, d = matrix
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44
    data[place : place + 36] = struct.pack(">9i", *(v << 16 for v in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)
    path.write_bytes(data)
    expected = MATRICES[matrix](image)
    video = _indexed(path)
    assert (video.height, video.width) == expected.shape
    if decoder == "decord" and video.mirrored:
        with pytest.raises(DecodeError, match="mirrored"):
            open_video(path, video, channels=1, size_px=None, decoder=decoder)
        return
    frame = next(iter(read_frames(path, channels=1, size_px=None, decoder=decoder)))[0].astype(int)
    assert frame.shape == expected.shape and np.abs(frame - expected).mean() < 4


# ------------------------------------------------------------------------------------------------------------- starts


@pytest.mark.parametrize("inside", [0, 5])
@pytest.mark.parametrize("name", ["v.ts", "v.mkv", "v.mp4", "v.mts"])
@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", B_FRAMES | {"x264-params": "open-gop=1"}),
        ("libx265", {"preset": "ultrafast", "x265-params": "keyint=12:open-gop=1:bframes=2:log-level=0"}),
        ("mpeg2video", {"g": "12", "bf": "2"}),
    ],
)
def test_a_cut_stream_begins_at_the_first_frame_that_decodes(
    tmp_path: Path, write_video: Any, read_numbers: Any, codec: str, options: dict[str, str], name: str, inside: int
) -> None:
    source = write_video(tmp_path / "source.ts", video=5, num_frames=60, codec=codec, options=options, fps=25)
    import av

    with av.open(str(source)) as container:
        keys = [i for i, p in enumerate(q for q in container.demux(video=0) if q.size) if p.is_keyframe]
    path = _repack(source, tmp_path / name, first=keys[2] + inside)
    numbers = _numbers(path, read_numbers)
    assert numbers == list(range(numbers[0], 60)) and 12 < numbers[0] <= 24 + 12 * (inside > 0) + 2
    video = _indexed(path)
    assert video.num_frames == len(numbers)
    reader = open_video(path, video, channels=1, size_px=None, decoder="pyav")
    for i in (len(numbers) - 1, 1, 0, len(numbers) // 2):
        assert read_numbers(reader.read(i))[1] == numbers[i]


def test_damage_in_the_middle_stays_an_error(tmp_path: Path, write_video: Any, read_numbers: Any) -> None:
    source = write_video(tmp_path / "source.ts", video=5, num_frames=60, options=B_FRAMES, fps=25)
    import av

    with av.open(str(source)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    path = _repack(source, tmp_path / "v.ts", first=5)
    data = bytearray(path.read_bytes())
    middle = bytes(packets[40])[8:24]
    place = data.index(middle)
    data[place : place + 16] = b"\xff" * 16
    path.write_bytes(data)
    video = index_file(tmp_path, "v.ts")
    if isinstance(video, Video):
        with pytest.raises(UserError, match="cannot be decoded"):
            _numbers(path, read_numbers)


# -------------------------------------------------------------------------------------------------------------- times


def _resampled(path: Path, fps: float) -> list[int]:
    return frames_on_screen(_indexed(path), fps).tolist()


def test_avi_with_b_frames_keeps_its_rate(tmp_path: Path, write_video: Any) -> None:
    path = write_video(tmp_path / "v.avi", num_frames=50, options=B_FRAMES, fps=25)
    assert _indexed(path).fps == pytest.approx(25)
    assert _resampled(path, 5) == list(range(0, 50, 5))


@pytest.mark.parametrize("name", ["v.mp4", "v.mov", "v.mkv"])
@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_times_in_the_order_of_decoding_move_no_frame(
    tmp_path: Path, write_video: Any, read_numbers: Any, name: str, codec: str
) -> None:
    """As in a file that was copied from an AVI: frames with B-frames between them, and times that never step back."""
    import av

    source = write_video(tmp_path / "source.mp4", num_frames=50, codec=codec, options=B_FRAMES, fps=25)
    with av.open(str(source)) as container, av.open(str(tmp_path / name), "w") as out:
        stream = container.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for number, packet in enumerate(packet for packet in container.demux(stream) if packet.size):
            packet.stream, packet.time_base = copy, Fraction(1, 1000)
            packet.pts = packet.dts = 40 * number
            out.mux(packet)
    video = _indexed(tmp_path / name)
    assert (video.fps, video.frame_ms, video.keyframes) == (25, (), (0,))
    assert _numbers(tmp_path / name, read_numbers) == list(range(50))
    assert _resampled(tmp_path / name, 5) == list(range(0, 50, 5))


def test_avi_with_dropped_frames_keeps_its_length(tmp_path: Path, write_video: Any) -> None:
    source = write_video(tmp_path / "source.mkv", num_frames=30, codec="mpeg4", options={"g": "5"}, fps=25)
    path = _repack(source, tmp_path / "v.avi", times_ms=lambda i: 40 * i if i < 10 else 400 + 1000 * (i - 10))
    video = _indexed(path)
    assert video.num_frames == 30 and video.shown_s()[-1] == pytest.approx(19.4, abs=0.05)
    assert len(_resampled(path, 1)) >= 20


TIMES: dict[str, Sequence[int]] = {
    "repeated": [40 * i if i != 20 else 40 * 19 for i in range(50)],
    "decreasing": [40 * i if i != 20 else 40 * 19 - 20 for i in range(50)],
}


@pytest.mark.parametrize("fault", TIMES)
def test_one_bad_timestamp_costs_no_others(tmp_path: Path, write_video: Any, fault: str) -> None:
    """As without the fault, but for the frame that has it."""
    source = write_video(tmp_path / "source.mkv", num_frames=50, codec="mpeg4", options={"g": "5"}, fps=25)
    times = TIMES[fault]
    path = _repack(source, tmp_path / "v.mkv", times_ms=lambda i: times[i], early_ms=100)
    video = _indexed(path)
    assert video.num_frames == 50 and video.shown_s()[-1] == pytest.approx(1.96)
    assert _resampled(path, 25) == [i if i != 19 else 20 for i in range(50)]


@pytest.mark.slow
def test_frame_lists_are_those_of_ffmpeg() -> None:
    done = run_script("benchmarks/check_frames.py", "--seed", "5", timeout_s=900)
    if "ffmpeg" in done.stderr and "No such file" in done.stderr:
        pytest.skip("the ffmpeg command is not installed")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "WRONG" in done.stdout.splitlines()[0]  # the column; a row would begin with it


# -------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name", ["take:1.mp4", "http:x.mp4", "concat:a|b.mp4", "-x.mp4", "subfile,,a.mp4", "a b%20#?.mp4"]
)
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_name_is_a_name_and_not_an_address(
    tmp_path: Path, write_video: Any, read_numbers: Any, monkeypatch: pytest.MonkeyPatch, name: str, decoder: str
) -> None:
    write_video(tmp_path / "v.mp4", video=5).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert _indexed(Path(name)).num_frames == 9
    assert _numbers(Path(name), read_numbers, decoder) == list(range(9))


def test_what_is_not_a_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    (tmp_path / "folder.mp4").mkdir()
    for name in ("fifo.mp4", "zero.mp4", "folder.mp4"):
        entry = index_file(tmp_path, name)
        assert isinstance(entry, BadFile) and entry.reason == "not a regular file"
