"""Sources from strangers: nothing is read or written elsewhere, nothing is unpickled, and a message is one line."""

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
import pytest
from PIL import Image

from benchmarks.fuzz.sandbox import is_clean
from data_pipelines.convert import npz
from data_pipelines.convert.columns import find_bounds
from data_pipelines.convert.episodes import Keys, checked_name
from data_pipelines.convert.hdf5 import HDF5_TABLE
from data_pipelines.convert.npz import open_npz
from data_pipelines.convert.pictures import decode_picture
from data_pipelines.convert.run import Conversion, convert
from data_pipelines.errors import UserError
from tests.data_pipelines.convert.conftest import (
    LENGTHS,
    columns_of,
    painted,
    write_animations,
    write_lance,
    write_lerobot,
    write_robomimic,
)

SECRET = bytes(range(256)) * 48


def refusal(source: Path, out: Path, **settings: Any) -> str:
    """Return the message of the refusal to convert a source, one clean line; nothing is written outside of `out`."""
    keys = {name: settings.pop(name) for name in list(settings) if name in Keys.__dataclass_fields__}
    with pytest.raises(UserError) as caught:
        convert(source, out, Conversion(keys=Keys(**keys), **settings))
    assert is_clean(str(caught.value)), str(caught.value)
    assert not list(out.rglob("*.mp4"))
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------- HDF5


def _external_link(file: h5py.File, other: Path) -> None:
    file["pixels"] = h5py.ExternalLink(str(other), "/pixels")


def _soft_link_through_one(file: h5py.File, other: Path) -> None:
    file["elsewhere"] = h5py.ExternalLink(str(other), "/")
    file["pixels"] = h5py.SoftLink("/elsewhere/pixels")


def _external_data(file: h5py.File, other: Path) -> None:
    raw = other.with_suffix(".raw")
    raw.write_bytes(SECRET)
    file.create_dataset("pixels", (4, 48, 64), np.uint8, external=[(str(raw), 0, len(SECRET))])


def _virtual_data(file: h5py.File, other: Path) -> None:
    layout = h5py.VirtualLayout((9, 48, 64, 3), np.uint8)
    layout[:] = h5py.VirtualSource(str(other), "pixels", (9, 48, 64, 3))
    file.create_virtual_dataset("pixels", layout)


@pytest.mark.parametrize("lead", [_external_link, _soft_link_through_one, _external_data, _virtual_data])
@pytest.mark.parametrize("key", [None, "pixels"])
def test_hdf5_that_leads_to_other_files_is_refused(
    lead: Callable[[h5py.File, Path], None], key: str | None, tmp_path: Path
) -> None:
    other = tmp_path / "secret.h5"
    with h5py.File(other, "w") as file:
        file["pixels"] = painted(0)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        lead(file, other)
    message = refusal(tmp_path / "a.h5", tmp_path / "out", frames=key)
    assert "which is refused: copy the data into this file" in message and "a.h5" in message


def test_a_demo_that_is_a_link_is_refused(tmp_path: Path) -> None:
    write_robomimic(tmp_path / "secret.hdf5")
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["data/demo_0"] = h5py.ExternalLink(str(tmp_path / "secret.hdf5"), "/data/demo_0")
    assert "is a link to another file" in refusal(tmp_path / "a.hdf5", tmp_path / "out")


def test_links_are_not_followed_before_they_are_looked_at(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # opening it would wait without end
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["pixels"] = h5py.ExternalLink(str(tmp_path / "fifo"), "/pixels")
    assert "is a link to another file" in refusal(tmp_path / "a.h5", tmp_path / "out")


def test_soft_links_within_a_file_are_followed(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["group/data"] = painted(0)
        file["group/again"] = h5py.SoftLink("data")
        file["pixels"] = h5py.SoftLink("/group/again")
        file["nowhere"] = h5py.SoftLink("/missing/data")
        file["round"] = h5py.SoftLink("/round")
    assert "leads through more than 8 soft links" in refusal(tmp_path / "a.h5", tmp_path / "out", frames="pixels")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        del file["round"]
    assert convert(tmp_path / "a.h5", tmp_path / "out", Conversion(keys=Keys(frames="pixels"))).num_videos == 1


@pytest.mark.parametrize("what", ["a group without arrays", "an array"])
def test_a_damaged_first_episode_of_robomimic_is_one_bad_episode(what: str, tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "a.hdf5")
    with h5py.File(path, "a") as file:
        del file["data/demo_0"]
        if what == "an array":
            file["data/demo_0"] = 5
        else:
            file.create_group("data/demo_0")
    result = convert(path, tmp_path / "out", Conversion(skip_bad=True))
    assert result.num_videos == 3 and list(result.bad) == ["a.hdf5:data/demo_0"]


@pytest.mark.parametrize("frames", ["data", "pixels"])
def test_an_array_called_data_is_no_group_of_robomimic(tmp_path: Path, frames: str) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file[frames] = painted(0)
        if frames != "data":
            file["data"] = np.arange(LENGTHS[0], dtype=np.float32)
    result = convert(tmp_path / "a.h5", tmp_path / "out", Conversion())
    assert (result.layout, result.num_videos) == (HDF5_TABLE.name, 1)


@pytest.mark.parametrize("place", ["", "group/", "data/", "data/demo_0/obs/", "mask/"])
def test_names_that_are_not_utf8_are_one_line(tmp_path: Path, place: str) -> None:
    if place.startswith(("data", "mask")):
        write_robomimic(tmp_path / "a.h5", masks=True)
    else:
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file["pixels"] = painted(0)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file[place.encode() + b"k\xe4se"] = np.zeros(LENGTHS[0])
    refused = refusal(tmp_path / "a.h5", tmp_path / "out")
    assert str(tmp_path / "a.h5") in refused and r"the name b'k\xe4se' is not UTF-8: rename it" in refused


@pytest.mark.parametrize("names", [b"demo_0", h5py.Empty("S6")], ids=["scalar", "empty"])
def test_masks_that_are_no_lists_are_one_line(tmp_path: Path, names: Any) -> None:
    write_robomimic(tmp_path / "a.hdf5", masks=True)
    with h5py.File(tmp_path / "a.hdf5", "r+") as file:
        del file["mask/train"]
        file["mask/train"] = names
    assert "a.hdf5': 'mask/train' does not hold texts" in refusal(tmp_path / "a.hdf5", tmp_path / "out")


def test_damaged_hdf5_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("pixels", data=painted(0), compression="gzip", chunks=(1, 48, 64, 3))
        file["action"] = columns_of([0])["action"]
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for number in range(40):
        content = bytearray(good)
        start = int(rng.integers(0, len(content) - 8))
        content[start : start + int(rng.integers(1, 200))] = rng.bytes(8)
        path.write_bytes(content if number % 2 else content[:start])
        try:
            convert(path, tmp_path / f"out{number}", Conversion())
        except UserError as error:
            assert is_clean(str(error)), str(error)
    path.write_bytes(b"nonsense")
    assert "a.h5' is not a readable HDF5 file" in refusal(path, tmp_path / "out")
    path.unlink()
    os.mkfifo(path)
    assert "a.h5' has no layout that is known" in refusal(path, tmp_path / "out")


def test_chunks_that_would_fill_the_memory_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("pixels", (2000, 1024, 1024), np.uint8, chunks=(2000, 1024, 1024))
    assert "has chunks of more than 1,073,741,824 bytes" in refusal(tmp_path / "a.h5", tmp_path / "out")


# -------------------------------------------------------------------------------------------------------------- npz


def test_python_objects_are_not_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "trapped"),)

    np.savez(tmp_path / "a.npz", frames=painted(0), action=np.array([Trap()], dtype=object))
    message = refusal(tmp_path / "a.npz", tmp_path / "out", actions="action")
    assert "'action' is no numbers [1]: a label has numbers" in message
    with (
        open_npz(tmp_path / "a.npz") as table,
        pytest.raises(UserError, match="holds Python objects, which are not un"),
    ):
        table.read("action", 0, 1)
    assert convert(tmp_path / "a.npz", tmp_path / "out", Conversion()).num_videos == 1  # without that array
    assert not (tmp_path / "trapped").exists()


def _npy(shape: tuple[int, ...], kind: str = "|u1", content: bytes = b"", *, fortran: bool = False) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": fortran, "shape": shape})
    return file.getvalue() + content


def test_archives_that_promise_too_much(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    cases = {
        "a frame larger than any": (
            {"frames": _npy((2, 2**20, 2**20, 3), content=bytes(1000))},
            "is refused: 1 rows of",
        ),
        "an end that is missing": ({"frames": _npy((9, 48, 64, 3), content=bytes(48 * 64 * 3 * 5))}, "it ends early"),
        "too many rows": ({"frames": _npy((2**40, 48, 64)), "ep_len": _npy((2**40,), "<i8")}, "1,099,511,627,776 rows"),
        "an end that is missing, in Fortran order": (
            {"frames": _npy((9, 48, 64, 3), content=bytes(48 * 64 * 3 * 5), fortran=True)},
            "it ends early",
        ),
        "an array in Fortran order that is large": (
            {"frames": _npy((2**20, 48, 64), fortran=True)},
            "3,221,225,472 bytes in Fortran order: save np.ascontiguousarray",
        ),
        "a negative shape": ({"frames": _npy((-4, 48, 64))}, ""),
        "another file": ({"frames": b"nonsense"}, "is not a readable .npz archive"),
    }
    for members, expected in cases.values():
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(f"{name}.npy", content)
        assert expected in refusal(path, tmp_path / "out", overwrite=True)
    path.write_bytes(b"PK nonsense")
    assert "a.npz' is not a readable .npz archive" in refusal(path, tmp_path / "out")


def test_archives_are_read_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in ascending order are decompressed once; a step back starts again."""
    values = np.arange(1000, dtype=np.int64).reshape(100, 10)
    np.savez_compressed(tmp_path / "a.npz", values=values)
    skipped: list[int] = []
    skip = npz._skip

    def noted(file: IO[bytes], count: int) -> None:
        skipped.append(count)
        skip(file, count)

    monkeypatch.setattr(npz, "_skip", noted)
    with open_npz(tmp_path / "a.npz") as table:
        for start, stop in ((0, 10), (10, 20), (50, 60), (5, 7)):
            assert np.array_equal(table.read("values", start, stop), values[start:stop])
    assert skipped == [0, 0, 30 * 80, 5 * 80]


# ----------------------------------------------------------------------------------------------- names, bounds, rest


@pytest.mark.parametrize(
    "name", ["../a", "a/../b", "/a", "", ".hidden", "a/.b", "a\\b", "a\0b", "a\nb", "C:a", "x" * 300, "\ud800"]
)
def test_names_that_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="is refused: it cannot be the path of a video") as caught:
        checked_name(name, "a.h5")
    assert is_clean(str(caught.value))


def test_a_demo_whose_name_leads_out_is_refused(tmp_path: Path) -> None:
    write_robomimic(tmp_path / "a.hdf5")
    with h5py.File(tmp_path / "a.hdf5", "r+") as file:
        file["data"].move("demo_3", "demo_3\x1b[2J")
    assert "is refused: it cannot be the path of a video" in refusal(tmp_path / "a.hdf5", tmp_path / "out")


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"ep_len": [9, 12], "ep_offset": [0, -3]}, "states an episode that leads beyond the 42 rows"),
        ({"ep_len": [9, 12], "ep_offset": [0, 2**62]}, "states an episode that leads beyond the 42 rows"),
        ({"ep_len": [9, 12]}, "'ep_len' does not state the bounds of episodes in 42 rows"),
        ({"episode_ends": [9, 50]}, "does not state the bounds"),
        ({"ep_len": [9.5, 32.5]}, "holds other numbers than whole ones"),
        ({"ep_len": [np.nan, 42]}, "holds other numbers than whole ones"),
        ({"episode_ends": [[9, 42]]}, "bounds are one number per row or episode"),
        ({"done": ["a", "b"]}, "bounds are whole numbers, or true and false"),
    ],
)  # fmt: skip
def test_impossible_bounds_are_one_line(bounds: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert sum(LENGTHS) == 42
    arrays: dict[str, Any] = {name: np.array(values) for name, values in bounds.items()}
    np.savez(tmp_path / "a.npz", pixels=columns_of()["pixels"], **arrays)
    assert message in refusal(tmp_path / "a.npz", tmp_path / "out")


def test_bounds_cover_all_rows_without_overlap() -> None:
    class Given:
        def __init__(self, values: Any) -> None:
            self.values = values

        def columns(self) -> Any:
            raise AssertionError

        def read(self, name: str, start: int, stop: int) -> Any:
            return self.values[start:stop]

    from data_pipelines.convert.columns import Column

    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = rng.integers(1, 6, rng.integers(1, 6))
        some_empty = lengths * rng.integers(0, 2, len(lengths))
        ends = np.cumsum(some_empty)
        for name, values in {"ep_len": some_empty, "episode_ends": ends}.items():
            if name == "ep_len" or len(values) < ends[-1]:
                columns = {name: Column(values.shape, values.dtype)}
                expected = list(zip((ends - some_empty).tolist(), ends.tolist(), strict=True))
                assert find_bounds(Given(values), columns, int(ends[-1]), ()) == expected, (name, some_empty)
        count = int(lengths.sum())
        expected = list(zip((np.cumsum(lengths) - lengths).tolist(), np.cumsum(lengths).tolist(), strict=True))
        marks = np.isin(np.arange(count), np.cumsum(lengths) - 1)
        numbers = np.repeat(rng.permutation(20)[: len(lengths)], lengths)
        for name, values in {"episode_idx": numbers, "dones": marks, "episode_ends": np.cumsum(lengths)}.items():
            columns = {name: Column(values.shape, values.dtype)}
            if name == "episode_ends" and len(values) == count:
                continue  # every row is an episode: ends look like numbers
            assert find_bounds(Given(values), columns, count, ()) == expected, (name, lengths)


def test_frames_that_are_no_pictures(tmp_path: Path) -> None:
    path, out = tmp_path / "a.npz", tmp_path / "out"
    np.savez(path, observations=np.zeros((20, 17), np.float32), actions=np.zeros((20, 6), np.float32))
    assert "it has no array of pictures: name the array of the frames. it has observations float32 [20, 17]" in refusal(
        path, out
    )
    np.savez(path, a=painted(0), b=painted(0))
    assert "it has several arrays of pictures ('a', 'b'): name the array of the frames" in refusal(path, out)
    for key in (None, "frames"):
        np.savez(path, frames=painted(0).astype(np.float32))
        assert "'frames' is float32 [9, 48, 64, 3]: frames are uint8" in refusal(path, out, frames=key)
    np.savez(path, frames=painted(0))
    assert "it has no array 'rgb'" in refusal(path, out, frames="rgb")
    assert "'speed' is not there: a label has numbers for each of the 9 rows" in refusal(path, out, actions="speed")
    np.savez(path, frames=painted(0), action=np.full((9, 2), np.inf))
    assert "'action' of frame 0 is not a finite number" in refusal(path, out)
    np.savez(path, frames=painted(0), source=np.zeros(9))
    assert "a label cannot be called 'source'" in refusal(path, out, labels=("source",), overwrite=True)


def test_animations_of_strangers(tmp_path: Path) -> None:
    source = write_animations(tmp_path / "gifs", "gif")
    for name in ("clip_1", "clip_2", "clip_3"):
        (source / f"{name}.gif").unlink()
    good = (source / "clip_0.gif").read_bytes()
    (source / "clip_0.gif").write_bytes(good[: len(good) // 2])
    assert "the first is 'clip_0.gif' (cannot be decoded" in refusal(source, tmp_path / "out")
    (source / "clip_0.gif").write_bytes(good[:6] + b"\xff\xff\xff\xff" + good[10:])  # 65,535 x 65,535
    assert "frames of 65535x65535 pixels" in refusal(source, tmp_path / "out") or "cannot be decoded"
    Image.new("RGB", (8, 8)).save(source / "clip_0.gif", "TIFF")
    assert "clip_0.gif" in refusal(source, tmp_path / "out")


def test_images_with_16_bits_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    for frame in range(3):
        Image.fromarray(np.full((32, 32), 1000 * frame, np.uint16)).save(tmp_path / "images" / "a" / f"{frame}.png")
    assert "with more than 8 bits: convert them to 8 bits" in refusal(tmp_path / "images", tmp_path / "out")


def test_encoded_colours_with_16_bits_are_refused() -> None:
    """Pillow would cut them to 8."""
    data = zlib.compress(b"".join(b"\0" + bytes(6 * 4) for _ in range(4)))

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    assert Image.open(io.BytesIO(content)).mode == "RGB"
    with pytest.raises(UserError, match="a picture with 16 bits: convert it to 8 bits"):
        decode_picture(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_path": "../../{episode_index}.parquet"}, "data_path='../../{episode_index}.parquet' in meta"),
        ({"video_path": "/etc/{video_key}"}, "is refused: it must be a path in the data set, of {video_key}, "),
        ({"video_path": "{video_key.__class__}"}, "is refused"),
        ({"fps": 0}, "has fps=0: it must be a positive number"),
        ({"fps": "fast"}, "has fps='fast': it must be a positive number"),
        ({"total_episodes": 10**9}, "must be whole numbers from 1"),
        ({"chunks_size": 0}, "must be whole numbers from 1"),
        ({"features": {"action": {"dtype": "float32"}}}, "has no camera: none of its features is of dtype video"),
        ({"features": []}, "is not the info.json of a LeRobot data set"),
        ({"total_episodes": 5}, "1 of 5 episodes cannot be converted; the first is 'episode 4'"),
    ],
)  # fmt: skip
def test_lerobot_data_of_strangers(change: dict[str, Any], message: str, tmp_path: Path, write_video: Any) -> None:
    source = write_lerobot(tmp_path / "lerobot", write_video)
    path = source / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as caught:
        convert(source, tmp_path / "out", Conversion())
    assert message in str(caught.value) and is_clean(str(caught.value))


def test_a_lerobot_video_of_another_length_is_a_bad_episode(tmp_path: Path, write_video: Any) -> None:
    source = write_lerobot(tmp_path / "lerobot", write_video)
    [path] = source.glob("videos/*/*/episode_000001.mp4")
    write_video(path, num_frames=LENGTHS[1] - 1)
    with pytest.raises(UserError, match="has 11 frames, and its table has 12 rows"):
        convert(source, tmp_path / "out", Conversion())


def test_lance_that_leads_to_other_folders_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lance(tmp_path / "a.lance")
    import lance

    monkeypatch.setattr(lance.LanceDataset, "base_paths", lambda self: {1: "/elsewhere"})
    assert "it names files in other folders, which is refused" in refusal(path, tmp_path / "out")


def test_sources_that_are_read_as_they_are(tmp_path: Path, write_video: Any) -> None:
    write_video(tmp_path / "videos" / "a.mp4")
    for _ in range(2):
        assert "is a folder of video files, which is read as it is: data.root=" in refusal(
            tmp_path / "videos", tmp_path / "out"
        )
        Image.new("L", (8, 8)).save(tmp_path / "videos" / "motion.png")  # as label-motion does
    (tmp_path / "empty").mkdir()
    assert "has no layout that is known: a LeRobot data set of version 2, " in refusal(
        tmp_path / "empty", tmp_path / "out"
    )
    assert "missing' does not exist" in refusal(tmp_path / "missing", tmp_path / "out")
    source = write_animations(tmp_path / "gifs", "gif")
    assert "frames='x': a folder of GIF or WebP files has no such key" in refusal(source, tmp_path / "out", frames="x")
