"""LeRobot data sets: each episode's frames and what was recorded with them stay together; strangers' paths stay in."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines.batches import Batch
from data_pipelines.clips import ClipSpec
from data_pipelines.errors import UserError
from data_pipelines.facts import BadFile, Video
from data_pipelines.formats import lerobot
from data_pipelines.formats.lerobot import frames_of_episode
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.indexing.folder import index_folder
from data_pipelines.shards.packing import pack_videos
from data_pipelines.splits import split_index
from tests.data_pipelines.streams import make_stream, read_clips

pyarrow = pytest.importorskip("pyarrow")

FPS = 10
FRONT, WRIST = "observation.images.front", "observation.images.wrist"
LENGTHS = (30, 200, 25, 5, 61)  # the third episode begins the second file
FIRST_OF_FILE = 2
SPEC = ClipSpec(num_segments=2, num_frames=2, frame_stride=2, clip_step=3)
SETTINGS: dict[str, Any] = {"size_px": None, "channels": 1, "batch_size": 8, "num_lanes": 4, "pool_clips": 16}
INFO: dict[str, Any] = {
    "codebase_version": "v3.0",
    "fps": FPS,
    "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    "features": {
        FRONT: {"dtype": "video", "shape": [48, 64, 3]},
        WRIST: {"dtype": "video", "shape": [48, 64, 3]},
        "action": {"dtype": "float32", "shape": [2]},
        "observation.state": {"dtype": "float64", "shape": [2, 2]},
        "next.done": {"dtype": "bool", "shape": [1]},
        "language": {"dtype": "string", "shape": [1]},
        **{name: {"dtype": "int64", "shape": [1]} for name in ("frame_index", "episode_index", "index", "task_index")},
    },
}


def _write_table(path: Path, columns: dict[str, Any]) -> None:
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)


def _write_data_set(root: Path, write_video: Any) -> None:
    """Two files a camera with 230 and 91 frames, painted with the camera's and the frame's number.

    The first action of a frame is its number in its file, the second its episode.
    """
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps(INFO))
    starts = np.cumsum([0, *LENGTHS])
    files = [int(episode >= FIRST_OF_FILE) for episode in range(len(LENGTHS))]
    first_of_file = [starts[0], starts[FIRST_OF_FILE]]
    for number, camera in enumerate((FRONT, WRIST)):
        for file, stop in enumerate((starts[FIRST_OF_FILE], starts[-1])):
            path = root / "videos" / camera / "chunk-000" / f"file-{file:03d}.mp4"
            options = {"g": "40", "bf": "2", "sc_threshold": "0"}
            write_video(path, video=number, num_frames=int(stop - first_of_file[file]), options=options, fps=FPS)
    for file, episodes in enumerate(((0, 1, 2), (3, 4))):  # tables are divided elsewhere than videos
        frames = [(episode, frame) for episode in episodes for frame in range(LENGTHS[episode])]
        in_file = [starts[episode] - first_of_file[files[episode]] + frame for episode, frame in frames]
        columns = {
            "action": [[float(frame), float(episode)] for frame, (episode, _) in zip(in_file, frames, strict=True)],
            "observation.state": [[[frame, 0.5], [0.0, 1.0]] for frame in in_file],
            "next.done": [frame == LENGTHS[episode] - 1 for episode, frame in frames],
            "language": ["x"] * len(frames),
            "frame_index": [frame for _, frame in frames],
            "episode_index": [episode for episode, _ in frames],
            "index": [int(starts[episode]) + frame for episode, frame in frames],
            "task_index": [episode % 2 for episode, _ in frames],
        }
        _write_table(root / "data" / "chunk-000" / f"file-{file:03d}.parquet", columns)
    in_file_s = [float(starts[episode] - first_of_file[file]) / FPS for episode, file in enumerate(files)]
    columns = {
        "episode_index": list(range(len(LENGTHS))),
        "dataset_from_index": starts[:-1].tolist(),
        "dataset_to_index": starts[1:].tolist(),
        "tasks": [["push"]] * len(LENGTHS),
    }
    for camera in (FRONT, WRIST):
        columns |= {
            f"videos/{camera}/chunk_index": [0] * len(LENGTHS),
            f"videos/{camera}/file_index": files,
            f"videos/{camera}/from_timestamp": [seconds + 1e-7 for seconds in in_file_s],
            f"videos/{camera}/to_timestamp": [s + n / FPS for s, n in zip(in_file_s, LENGTHS, strict=True)],
        }
    _write_table(root / "meta" / "episodes" / "chunk-000" / "file-000.parquet", columns)


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory, write_video: Any) -> Path:
    root = tmp_path_factory.mktemp("lerobot")
    _write_data_set(root, write_video)
    return root


@pytest.fixture
def own(tmp_path: Path, data_set: Path) -> Path:
    """A copy of the data set to change."""
    import shutil

    shutil.copytree(data_set, tmp_path / "own")
    return tmp_path / "own"


def _index(root: Path, **arguments: Any) -> VideoIndex:
    return load_videos(root, progress=False, num_workers=0, **arguments)


def _check(batches: list[Batch], camera: int, read_numbers: Any) -> list[tuple[int, int]]:
    """Frames and labels belong together. -> (episode, first frame in it) of each clip"""
    clips = []
    for batch in batches:
        labels = batch["labels"]
        num_clips = len(batch["video"])
        assert labels["action"].shape == (num_clips, SPEC.length, 2)
        assert labels["observation.state"].shape == (num_clips, SPEC.length, 2, 2)
        assert labels["action"].dtype == labels["observation.state"].dtype == torch.float32
        for row in range(num_clips):
            shown = [read_numbers(frame) for frame in batch["video"][row]]
            assert shown == [(camera, frame) for frame in labels["action"][row, :, 0].tolist()]
            assert labels["observation.state"][row, :, 0, 0].tolist() == [frame for _, frame in shown]
            episode = int(labels["episode_index"][row])
            assert labels["action"][row, :, 1].tolist() == [episode] * SPEC.length
            assert int(labels["task_index"][row]) == episode % 2
            frames = labels["frame_index"][row]
            assert frames.tolist() == list(range(int(frames[0]), LENGTHS[episode]))[: SPEC.span : 2]
            assert labels["next.done"][row].tolist() == [int(frame) == LENGTHS[episode] - 1 for frame in frames]
            clips.append((episode, int(frames[0])))
    return clips


ALL_CLIPS = {
    (episode, first) for episode, length in enumerate(LENGTHS) for first in range(0, length - SPEC.span + 1, SPEC.step)
}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_frames_and_actions_belong_together_and_no_clip_crosses_episodes(
    data_set: Path, read_numbers: Any, num_workers: int
) -> None:
    stream = make_stream(_index(data_set), SPEC, seed=0, num_workers=num_workers, **SETTINGS)
    batches = stream.batches()
    epoch = list(islice(batches, stream.batches_per_epoch))
    batches.close()
    clips = _check(epoch, 0, read_numbers)
    assert len(clips) == len(set(clips)) == len(ALL_CLIPS) // 8 * 8
    assert set(clips) <= ALL_CLIPS


def test_every_clip_of_the_other_camera(data_set: Path, read_numbers: Any) -> None:
    index = _index(data_set, camera=WRIST)
    clips = _check(list(read_clips(index, SPEC, size_px=None, channels=1, batch_size=32)), 1, read_numbers)
    assert len(clips) == len(ALL_CLIPS) and set(clips) == ALL_CLIPS


def test_actions_follow_the_frames_of_a_resampled_video(data_set: Path, read_numbers: Any) -> None:
    spec = ClipSpec(num_segments=2, num_frames=2, fps=FPS / 2)
    num_clips = 0
    for batch in read_clips(_index(data_set), spec, size_px=None, channels=1, batch_size=32):
        for video, action in zip(batch["video"], batch["labels"]["action"], strict=True):
            shown = [read_numbers(frame)[1] for frame in video]
            assert action[:, 0].tolist() == shown == list(range(shown[0], shown[0] + 8, 2))
            assert len(set(action[:, 1].tolist())) == 1  # one episode
            num_clips += 1
    assert num_clips > 30


def test_files_of_several_episodes_are_not_packed_as_one_video_each(data_set: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a LeRobot data set: only a folder of video files can be packed"):
        pack_videos(data_set, tmp_path / "shards", progress=False)


def test_few_episodes_are_split_by_time_within_each(data_set: Path, read_numbers: Any) -> None:
    seen = {}
    for split in ("train", "selection", "test"):
        batches = read_clips(split_index(_index(data_set), split), SPEC, size_px=None, channels=1, batch_size=32)
        seen[split] = set(_check(list(batches), 0, read_numbers))
        assert seen[split]
    assert all(first + SPEC.span <= 160 for episode, first in seen["train"] if episode == 1)
    assert all(first >= 180 for episode, first in seen["test"] if episode == 1)


def test_episodes_of_a_bad_or_short_file_are_left_out(
    own: Path, write_video: Any, caplog: pytest.LogCaptureFixture
) -> None:
    videos = own / "videos" / FRONT / "chunk-000"
    write_video(videos / "file-001.mp4", num_frames=30, fps=FPS)
    index = _index(own, max_bad_fraction=0.5)
    assert index.labels["episode_index"].tolist() == [0, 1, 2, 3]
    assert index.frame_ranges == [(0, 30), (30, 230), (0, 25), (25, 30)]
    assert index.frame_label_offsets is not None and index.frame_label_offsets.tolist() == [0, 0, 230, 230]
    assert "has 30 frames, but an episode in it ends at frame 91" in caplog.text
    (videos / "file-000.mp4").unlink()
    with pytest.raises(UserError, match=r"none of 2 .*file-000.mp4' \(no such file\)"):
        _index(own)


def _edit_info(root: Path, **changes: Any) -> None:
    (root / "meta" / "info.json").write_text(json.dumps(INFO | changes))


@pytest.mark.parametrize(
    "template",
    [
        "../{video_key}/{chunk_index}/{file_index}.mp4",
        "videos/{video_key}/../../../{chunk_index}-{file_index}.mp4",
        "/etc/{video_key}.mp4",
        "videos/{video_key.__class__}.mp4",
        "videos/{video_key!r}.mp4",
        "videos/{chunk_index:999999999d}.mp4",
        "videos/{episode_index}.mp4",
        "videos/{}.mp4",
        "videos/{video_key",
    ],
)
def test_paths_from_strangers_stay_in_the_data_set(own: Path, template: str) -> None:
    _edit_info(own, video_path=template)
    with pytest.raises(UserError, match=r"video_path='.*' in meta/info.json is refused"):
        _index(own)


def test_a_camera_whose_name_leads_out_is_refused(own: Path) -> None:
    features = {name.replace(FRONT, "../../out"): feature for name, feature in INFO["features"].items()}
    _edit_info(own, features=features)
    table = own / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    from pyarrow import parquet

    columns = parquet.read_table(table)
    parquet.write_table(columns.rename_columns([n.replace(FRONT, "../../out") for n in columns.column_names]), table)
    with pytest.raises(UserError, match=r"is refused: it must be a path in the data set"):
        _index(own)


def test_mistakes_are_one_line(own: Path, tmp_path: Path, write_video: Any) -> None:
    with pytest.raises(UserError, match=rf"camera='top' is unknown: .* has {FRONT}, {WRIST}$"):
        _index(own, camera="top")
    write_video(tmp_path / "plain" / "a.mp4")
    with pytest.raises(UserError, match=r"camera='top': .*plain' is a folder of video files, which has no cameras"):
        _index(tmp_path / "plain", camera="top")
    _edit_info(own, codebase_version="v1.6")
    with pytest.raises(UserError, match=r"is of version 'v1.6', and only v2 and v3 are read: convert it by LeRobot's"):
        _index(own)
    _edit_info(own, fps=0)
    with pytest.raises(UserError, match=r"has fps=0: it must be a positive number"):
        _index(own)
    _edit_info(own, features={"action": {"dtype": "float32"}})
    with pytest.raises(UserError, match="has no camera: none of its features is of dtype video"):
        _index(own)
    (own / "meta" / "info.json").write_text("[]")
    with pytest.raises(UserError, match=r"info.json' is not the info.json of a LeRobot data set"):
        _index(own)


def test_tables_that_are_broken_or_not_all_there_are_one_line(own: Path) -> None:
    data = own / "data" / "chunk-000" / "file-001.parquet"
    data.write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"file-001.parquet' is not a table of a LeRobot data set"):
        _index(own)
    data.unlink()
    with pytest.raises(UserError, match=r"rows 255 to 260 of data/ are not those of episode 3"):
        _index(own)
    _edit_info(own, features=INFO["features"] | {"reward": {"dtype": "float32"}})
    with pytest.raises(UserError, match=r"file-000.parquet' has no column reward"):
        _index(own)
    (own / "meta" / "episodes" / "chunk-000" / "file-000.parquet").unlink()
    with pytest.raises(UserError, match=r"has no meta/episodes/\*/\*.parquet: download it whole"):
        _index(own)


def test_without_pyarrow_the_extra_is_named(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow.*pip install 'worldmodel\[lerobot\]'"):
        _index(data_set)


@pytest.mark.parametrize("column", ["episode_index", "dataset_from_index", f"videos/{FRONT}/chunk_index"])
@pytest.mark.parametrize("value", [[1, 2], 0.5, None, "x"])
def test_tables_of_another_kind_are_one_line(own: Path, column: str, value: Any) -> None:
    import pyarrow
    from pyarrow import parquet

    path = own / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    table = parquet.read_table(path)
    place = table.schema.get_field_index(column)
    parquet.write_table(table.set_column(place, column, pyarrow.array([value] * table.num_rows)), path)
    with pytest.raises(UserError, match="LeRobot data set") as caught:
        _index(own)
    assert column.rpartition("/")[2] in str(caught.value) and "\n" not in str(caught.value)


def test_row_numbers_that_are_lists_are_one_line(own: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    for path in (own / "data").glob("*/*.parquet"):
        table = parquet.read_table(path)
        place = table.schema.get_field_index("episode_index")
        pairs = pyarrow.array([[0, 1]] * table.num_rows)
        parquet.write_table(table.set_column(place, "episode_index", pairs), path)
    with pytest.raises(UserError, match="episode_index"):
        _index(own)


@pytest.mark.parametrize(
    ("start_s", "length", "expected"),
    [
        (0.0, 10, (0, 10)),
        (1.04, 10, (10, 20)),
        (1.06, 10, (11, 21)),
        (9.06, 10, (90, 100)),  # would end one frame behind the file
        (9.2, 10, (92, 102)),
        (20.0, 5, (200, 205)),
    ],
)
def test_an_episode_begins_with_the_nearest_frame(start_s: float, length: int, expected: tuple[int, int]) -> None:
    assert frames_of_episode(start_s, length, np.arange(100) / 10) == expected


@pytest.mark.parametrize("start_s", [1e20, 1.7e308])
def test_an_episode_that_begins_at_any_time_behind_the_file_is_outside(start_s: float) -> None:
    assert frames_of_episode(start_s, 5, np.arange(100) / 10)[0] > 1e9
    assert frames_of_episode(start_s, 5, np.linspace(0, 1e-298, 100))[0] > 1e9


def test_the_times_of_the_file_decide_and_not_its_rate() -> None:
    shown_s = np.concatenate([np.arange(50) / 10, 5.3 + np.arange(50) / 10])  # measured: a pause of 0.3 s
    assert frames_of_episode(5.31, 20, shown_s) == (50, 70)
    nearest: Callable[[float], int] = lambda time: int(np.abs(shown_s - time).argmin())  # noqa: E731
    for start_s in np.random.default_rng(0).uniform(0, 9, 50):
        assert frames_of_episode(start_s, 3, shown_s)[0] == nearest(start_s)


# ------------------------------------------------------------------------------------------------- faults of the tables


def _change_table(path: Path, change: Callable[[Any], Any]) -> None:
    from pyarrow import parquet

    parquet.write_table(change(parquet.ParquetFile(path).read()), path)


def _with_column(table: Any, name: str, values: list[Any], kind: Any = None) -> Any:
    return table.set_column(table.schema.get_field_index(name), name, pyarrow.array(values, kind))


def test_tables_are_read_in_the_order_of_their_numbers(own: Path, data_set: Path) -> None:
    chunk = own / "data" / "chunk-000"
    (chunk / "file-000.parquet").rename(chunk / "file-999.parquet")
    (chunk / "file-001.parquet").rename(chunk / "file-1000.parquet")
    assert torch.equal(_index(own).frame_labels["action"], _index(data_set).frame_labels["action"])


def test_an_episode_that_is_listed_twice_is_refused(own: Path) -> None:
    path = own / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    _change_table(path, lambda table: pyarrow.concat_tables([table, table.slice(1, 1)]))
    with pytest.raises(UserError, match="meta/episodes lists episode 1 twice"):
        _index(own)


def test_a_column_that_is_there_twice_is_left_out(own: Path) -> None:
    for path in (own / "data").glob("*/*.parquet"):
        _change_table(path, lambda table: table.append_column("action", table["action"]))
    index = _index(own)
    assert "action" in index.label_faults and "action" not in index.frame_labels
    assert "observation.state" in index.frame_labels


def test_numbers_beyond_63_bits_are_no_label(own: Path) -> None:
    path = own / "data" / "chunk-000" / "file-001.parquet"

    def change(table: Any) -> Any:
        return _with_column(table, "frame_index", [0, 0, 2**63, *[0] * (table.num_rows - 3)], pyarrow.uint64())

    _change_table(path, change)
    index = _index(own)
    assert "row 2 is 9223372036854775808" in index.label_faults["frame_index"]
    assert "frame_index" not in index.frame_labels


def test_a_table_that_is_a_fifo_is_not_opened(own: Path) -> None:
    path = own / "data" / "chunk-000" / "file-001.parquet"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"file-001.parquet is not a regular file"):
        _index(own)


def test_the_stated_rate_counts_if_a_file_has_none(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _index(data_set).episodes

    def without_times(*arguments: Any, **settings: Any) -> list[Video | BadFile]:
        entries = index_folder(*arguments, **settings)
        return [replace(entry, fps=0.0, frame_ms=()) if isinstance(entry, Video) else entry for entry in entries]

    monkeypatch.setattr(lerobot, "index_folder", without_times)
    assert _index(data_set).episodes == expected
