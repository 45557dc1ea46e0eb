"""Each layout -> videos: every frame, by the numbers painted into it, next to the labels of that frame."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.clips import ClipSpec
from data_pipelines.convert.columns import Column
from data_pipelines.convert.episodes import Keys
from data_pipelines.convert.lance import LanceColumns
from data_pipelines.convert.run import Conversion, convert
from data_pipelines.decoders import read_frames
from data_pipelines.errors import UserError
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from tests.data_pipelines.conftest import DECODERS, ReadNumbers
from tests.data_pipelines.convert.conftest import (
    CAMERA,
    LENGTHS,
    LOSSLESS,
    WRITERS,
    columns_of,
    encoded,
    painted,
    write_image_folders,
)
from tests.data_pipelines.streams import make_stream, read_clips

WITH_LABELS = [name for name in WRITERS if name not in ("gif", "webp")]
SPEC = ClipSpec(num_segments=2, num_frames=2, frame_stride=1, clip_step=1)
Source = Callable[[str], Path]


def frames_of(path: Path, **options: Any) -> np.ndarray:
    """Return the frames of a file in colour, [T, H, W, 3]."""
    return np.stack(list(read_frames(path, channels=3, size_px=None, **options))).transpose(0, 2, 3, 1)


def index_of(root: Path) -> VideoIndex:
    return load_videos(root, progress=False, num_workers=0)


@pytest.mark.parametrize("layout", WRITERS)
def test_frames_and_labels_stay_together(
    layout: str, source_of: Source, tmp_path: Path, read_numbers: ReadNumbers
) -> None:
    result = convert(source_of(layout), tmp_path / "out", Conversion())
    assert result.num_videos == 4 and not result.bad
    index = index_of(tmp_path / "out")
    assert [video.num_frames for video in index.videos] == list(LENGTHS) and not index.bad
    seen = set()
    for batch in read_clips(index, SPEC, size_px=None, channels=3, batch_size=8, num_workers=0):
        for clip, video in enumerate(batch["video"]):
            numbers = [read_numbers(frame) for frame in video]
            episode, first = numbers[0]
            assert numbers == [(episode, first + step) for step in range(4)]
            seen.add((episode, first))
            if layout in WITH_LABELS:
                rows = columns_of([episode])
                for name in ("action", "state", "reward"):
                    expected = rows[name][first : first + 4].reshape(4, -1)
                    assert torch.equal(batch["labels"][name][clip], torch.from_numpy(expected).float()), name
    assert seen == {(e, first) for e, length in enumerate(LENGTHS) for first in range(length - 3)}


@pytest.mark.parametrize("layout", LOSSLESS)
def test_lossless_videos_hold_every_byte(layout: str, source_of: Source, tmp_path: Path) -> None:
    convert(source_of(layout), tmp_path / "out", Conversion())
    for episode, video in enumerate(index_of(tmp_path / "out").videos):
        for decoder in DECODERS:
            decoded = frames_of(tmp_path / "out" / video.path, decoder=decoder)
            assert np.array_equal(decoded, painted(episode)), (layout, decoder)


def test_a_lerobot_video_is_copied(source_of: Source, tmp_path: Path) -> None:
    source = source_of("lerobot")
    convert(source, tmp_path / "out", Conversion())
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.mp4")}
    assert written == {path.name: path.read_bytes() for path in source.glob(f"videos/*/{CAMERA}/*.mp4")}
    index = index_of(tmp_path / "out")
    assert index.labels["episode_index"].tolist() == [0, 1, 2, 3]
    assert index.labels["task_index"].tolist() == [0, 1, 0, 1] and index.videos[0].fps == 20


def test_the_stream_of_a_conversion_is_that_of_its_images(source_of: Source, tmp_path: Path) -> None:
    """Image folders are read as they are as well: both ways give the same bytes."""
    convert(source_of("image folders"), tmp_path / "out", Conversion())
    batches = []
    for root in (source_of("image folders"), tmp_path / "out"):
        settings = {"size_px": 32, "channels": 1, "batch_size": 8, "num_lanes": 4, "num_workers": 0, "shuffle": False}
        batches.append(next(iter(make_stream(index_of(root), SPEC, **settings))))
    assert torch.equal(batches[0]["video"], batches[1]["video"])
    assert batches[0]["labels"]["number"].tolist() == batches[1]["labels"]["number"].tolist()


def test_times_of_animations(tmp_path: Path) -> None:
    from PIL import Image

    pictures = [Image.fromarray(frame) for frame in painted(0)]
    tmp_path.joinpath("gifs").mkdir()
    for name, durations in {"even": 50, "uneven": [100, 200, 40, 40, 40, 40, 40, 500, 100]}.items():
        pictures[0].save(
            tmp_path / "gifs" / f"{name}.gif", save_all=True, append_images=pictures[1:], duration=durations
        )
    convert(tmp_path / "gifs", tmp_path / "out", Conversion())
    even, uneven = index_of(tmp_path / "out").videos
    assert even.fps == 20 and not even.frame_ms
    assert uneven.frame_ms == (100, 200, 40, 40, 40, 40, 40, 500)


def test_gray_frames_are_stored_as_luma(tmp_path: Path, read_numbers: ReadNumbers) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (12, 32, 48), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", frames=frames)
    convert(tmp_path / "a.npz", tmp_path / "out", Conversion())
    [video] = index_of(tmp_path / "out").videos
    for decoder in DECODERS:
        for channels in (1, 3):
            decoded = np.stack(
                list(read_frames(tmp_path / "out" / video.path, channels=channels, size_px=None, decoder=decoder))
            )
            assert np.array_equal(decoded, np.repeat(frames[:, None], channels, axis=1)), (decoder, channels)


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 3, 1, 2)], ids=["last axis", "first axis"])
def test_alpha_of_arrays_is_dropped(tmp_path: Path, axes: tuple[int, ...]) -> None:
    """As simulators render it."""
    alpha = np.full((9, 48, 64, 1), 7, np.uint8)
    np.savez(tmp_path / "a.npz", frames=np.concatenate([painted(0), alpha], axis=3).transpose(axes))
    convert(tmp_path / "a.npz", tmp_path / "out", Conversion())
    [video] = index_of(tmp_path / "out").videos
    assert np.array_equal(frames_of(tmp_path / "out" / video.path), painted(0))


def test_odd_sizes_and_a_single_frame(tmp_path: Path) -> None:
    frames = np.random.default_rng(1).integers(0, 256, (5, 33, 47, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", frames=frames, episode_ends=[1, 5])
    for crf in (None, 10):
        out = tmp_path / str(crf)
        convert(tmp_path / "a.npz", out, Conversion(crf=crf))
        videos = index_of(out).videos
        assert [video.num_frames for video in videos] == [1, 4]
        difference = frames_of(out / videos[1].path).astype(int) - frames[1:]
        assert (np.abs(difference).max() == 0) == (crf is None)


BOUNDS: dict[str, Any] = {
    "lengths": np.array(LENGTHS),
    "ends": np.cumsum(LENGTHS),
    "numbers": np.repeat([3, 0, 7, 5], LENGTHS),
    "last": np.isin(np.arange(sum(LENGTHS)), np.cumsum(LENGTHS) - 1),
    "marks": np.isin(np.arange(sum(LENGTHS)), np.cumsum(LENGTHS) - 1).astype(np.float32)[:, None],
}


@pytest.mark.parametrize("kind", BOUNDS)
def test_bounds_are_told_by_their_content(kind: str, tmp_path: Path) -> None:
    columns = columns_of()
    np.savez(
        tmp_path / "a.npz", rgb=columns["pixels"], moves=columns["action"], other=columns["pixels"], b=BOUNDS[kind]
    )
    keys = Keys(frames="rgb", actions="moves", bounds=("b",))
    convert(tmp_path / "a.npz", tmp_path / "out", Conversion(keys=keys))
    index = index_of(tmp_path / "out")
    assert [video.num_frames for video in index.videos] == list(LENGTHS)
    assert index.frame_labels["action"].tolist() == columns["action"].tolist()


@pytest.mark.parametrize("names", [("length", "offset"), ("offset", "length")])
def test_lengths_and_offsets_in_either_order(names: tuple[str, str], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", frames=painted(1), length=np.array([5, 7]), offset=np.array([0, 5]))
    convert(tmp_path / "a.npz", tmp_path / "out", Conversion(keys=Keys(bounds=names)))
    assert [video.num_frames for video in index_of(tmp_path / "out").videos] == [5, 7]


def test_rows_in_no_episode_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.savez(tmp_path / "a.npz", frames=painted(1), ep_len=np.array([5, 3]), ep_offset=np.array([0, 6]))
    convert(tmp_path / "a.npz", tmp_path / "out", Conversion())
    (record,) = caplog.records
    assert record.getMessage() == f"'{tmp_path / 'a.npz'}': 4 of 12 rows are in no episode, and left out"
    assert [video.num_frames for video in index_of(tmp_path / "out").videos] == [5, 3]


def test_two_episodes_may_be_numbered_0_and_1(tmp_path: Path) -> None:
    frames = painted(1)
    np.savez(tmp_path / "a.npz", frames=frames, b=np.repeat([0, 1], [5, 7]))
    convert(tmp_path / "a.npz", tmp_path / "out", Conversion(keys=Keys(bounds=("b",))))
    assert [video.num_frames for video in index_of(tmp_path / "out").videos] == [5, 7]


def test_an_archive_per_episode(tmp_path: Path) -> None:
    (tmp_path / "episodes").mkdir()
    for episode in range(3):
        columns = columns_of([episode])
        np.savez(tmp_path / "episodes" / f"e{episode}.npz", image=columns["pixels"], action=columns["action"][:-1])
    convert(tmp_path / "episodes", tmp_path / "out", Conversion())
    index = index_of(tmp_path / "out")
    assert [video.path for video in index.videos] == ["e0.mp4", "e1.mp4", "e2.mp4"]
    actions = index.frame_labels["action"]
    assert actions[LENGTHS[0] - 1].tolist() == [0, 0]  # no action was taken at the last frame
    assert actions[LENGTHS[0] - 2].tolist() == [LENGTHS[0] - 2, 0]


def test_an_archive_of_arrays_in_fortran_order(tmp_path: Path) -> None:
    """NumPy saves transposes in that order."""
    columns, labels = columns_of(), ("action", "state", "reward")
    arrays: dict[str, Any] = {name: np.asfortranarray(columns[name]) for name in ("pixels", *labels)}
    np.savez_compressed(tmp_path / "a.npz", ep_len=np.array(LENGTHS), **arrays)
    convert(tmp_path / "a.npz", tmp_path / "out", Conversion())
    index = index_of(tmp_path / "out")
    for episode, video in enumerate(index.videos):
        assert np.array_equal(frames_of(tmp_path / "out" / video.path, decoder=DECODERS[0]), painted(episode))
    for name in labels:
        rows = index.frame_labels[name]
        assert np.array_equal(rows, columns[name].reshape(len(rows), -1).astype(np.float32).reshape(rows.shape)), name


def test_an_action_that_is_nan_at_the_end_becomes_zero(tmp_path: Path) -> None:
    columns = columns_of([0])
    columns["action"][-1] = np.nan
    np.savez(tmp_path / "a.npz", pixels=columns["pixels"], action=columns["action"])
    convert(tmp_path / "a.npz", tmp_path / "out", Conversion())
    assert index_of(tmp_path / "out").frame_labels["action"][-1].tolist() == [0, 0]


def test_encoded_frames_in_hdf5(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        rows = file.create_dataset("pixels", (9,), dtype=h5py.vlen_dtype(np.uint8))
        for number, frame in enumerate(painted(0)):
            rows[number] = np.frombuffer(encoded(frame), np.uint8)
    convert(tmp_path / "a.h5", tmp_path / "out", Conversion())
    [video] = index_of(tmp_path / "out").videos
    assert np.array_equal(frames_of(tmp_path / "out" / video.path), painted(0))


def test_a_picture_next_to_image_folders_is_not_the_data(tmp_path: Path) -> None:
    source = write_image_folders(tmp_path / "images")
    Image.fromarray(painted(0)[0]).save(source / "motion.png")
    assert convert(source, tmp_path / "out", Conversion()).num_videos == 4
    assert convert(source / "clip_1", tmp_path / "clip", Conversion()).num_videos == 1


def test_colour_after_a_gray_image_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    for number, frame in enumerate(painted(0)[:4]):
        picture = Image.fromarray(frame)
        (picture.convert("L") if number == 0 else picture).save(folder / f"{number}.png")
    convert(tmp_path / "images", tmp_path / "out", Conversion())
    found = frames_of(tmp_path / "out" / "a.mp4")
    assert np.array_equal(found[1:], painted(0)[1:4])


@pytest.mark.parametrize("names", [("obs/pose", "next/pose"), ("next/action",)])
def test_labels_of_one_name_are_refused(names: tuple[str, ...], source_of: Source, tmp_path: Path) -> None:
    path = Path(shutil.copyfile(source_of("stable-worldmodel"), tmp_path / "a.h5"))
    with h5py.File(path, "r+") as file:
        for name in names:
            file[name] = np.zeros((sum(LENGTHS), 2))
    with pytest.raises(UserError, match=r"would both be the label '(pose|action)': keep one of them"):
        convert(path, tmp_path / "out", Conversion(keys=Keys(labels=names)))


def test_another_camera_and_further_labels(source_of: Source, tmp_path: Path) -> None:
    keys = Keys(frames="obs/robot0_eye_in_hand_image", labels=("obs/robot0_eef_pos", "dones"))
    convert(source_of("robomimic"), tmp_path / "out", Conversion(keys=keys))
    index = index_of(tmp_path / "out")
    assert np.array_equal(frames_of(tmp_path / "out" / "demo_0.mp4"), 255 - painted(0))
    assert index.frame_labels["robot0_eef_pos"].shape == (sum(LENGTHS), 3)
    assert index.frame_labels["dones"].sum() == 4 and index.frame_labels["dones"].dtype == torch.int64


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("action", np.zeros((LENGTHS[0] + LENGTHS[1] - 2, 2))),  # each episode has one row less
        ("reward", np.zeros(2)),  # one for each episode
        ("observation", painted(0, LENGTHS[0] + LENGTHS[1], size=(8, 8))),
    ],
)
def test_usual_labels_that_are_left_out_are_named(
    name: str, left_out: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, lengths, label = tmp_path / "a.npz", LENGTHS[:2], {"observation": "state"}.get(name, name)
    columns = columns_of([0, 1]) | {"ep_len": np.array(lengths)}
    columns.pop(label)
    np.savez(source, **(columns | {name: left_out}))  # type: ignore[arg-type]
    convert(source, tmp_path / "out", Conversion())
    (record,) = caplog.records
    assert f"'{source}': the label '{label}' is left out, as '{name}' is {left_out.dtype} [" in record.getMessage()
    assert index_of(tmp_path / "out").frame_labels.keys() == {"action", "state", "reward"} - {label}


def test_pictures_are_a_label_if_they_are_named(tmp_path: Path) -> None:
    board = painted(0, LENGTHS[0], size=(8, 8))[..., 0]
    np.savez(tmp_path / "a.npz", pixels=painted(0), board=board)
    convert(tmp_path / "a.npz", tmp_path / "out", Conversion(keys=Keys(states="board")))
    assert index_of(tmp_path / "out").frame_labels["state"].shape == (LENGTHS[0], 64)


def test_pixels_of_a_lance_table_are_bytes() -> None:
    """Nested lists of a fixed size; the table stands for one that Lance has opened."""
    pyarrow = pytest.importorskip("pyarrow")
    frames = painted(0, 4, size=(8, 10))
    values = pyarrow.array(frames.ravel())
    for size in (3, 10, 8):
        values = pyarrow.FixedSizeListArray.from_arrays(values, size)
    table = pyarrow.table({"pixels": values, "number": pyarrow.array([1, 2, 3, 4])})

    class Opened:
        schema = table.schema

        def count_rows(self) -> int:
            return len(table)

        def to_table(self, columns: list[str], offset: int, limit: int) -> Any:
            return table.select(columns).slice(offset, limit)

    columns = LanceColumns(Opened())
    assert columns.columns()["pixels"] == Column((4, 8, 10, 3), np.dtype(np.uint8))
    rows = columns.read("pixels", 1, 3)
    assert rows.dtype == np.uint8 and np.array_equal(rows, frames[1:3])
    assert columns.read("number", 0, 4).dtype == np.int64
