"""Labels in metadata files: merged with what is there, for splits and folders of images, and continued."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.decoders import DecodeError
from data_pipelines.errors import UserError
from data_pipelines.facts import Video
from data_pipelines.formats.registry import load_videos
from data_pipelines.motion import label as module
from data_pipelines.motion.follow import Motion, NothingMoves
from data_pipelines.motion.label import label_motion
from data_pipelines.split_folders import load_split
from tests.data_pipelines.conftest import WriteVideo
from tests.data_pipelines.motion.painted import line, painted, scenery

NUM_FRAMES = 12


@pytest.fixture(scope="module")
def one_video(write_video: WriteVideo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk that moves from (20, 20) to (100, 70)."""
    path = line(NUM_FRAMES, (20, 20), (100, 70))[:, None]
    return write_video(tmp_path_factory.mktemp("one") / "a.mp4", images=painted(scenery(), path, [10]))


@pytest.fixture
def folder_of(one_video: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function from names of videos to a folder with copies of the video."""

    def make(*names: str) -> Path:
        for name in names:
            (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(one_video, tmp_path / "videos" / name)
        return tmp_path / "videos"

    return make


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the tracking by known positions; return the list of the paths that are tracked."""
    calls: list[str] = []

    def follow(root: Path, video: Video, num_objects: int) -> Iterator[int | Motion]:
        calls.append(video.path)
        if "still" in video.path:
            raise NothingMoves("nothing moves")
        if "damaged" in video.path:
            raise DecodeError("frame 3: damaged", 3)
        positions = np.arange(video.num_frames * num_objects * 2.0).reshape(video.num_frames, num_objects, 2)
        yield Motion(positions, np.ones(positions.shape[:2], bool), 0.0)

    monkeypatch.setattr(module, "follow", follow)
    return calls


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]


def test_labels_are_read_as_labels_of_frames(folder_of: Callable[..., Path]) -> None:
    root = folder_of("a.mp4")
    [result] = label_motion(root, progress=False)
    index = load_videos(root)
    assert index.frame_labels["position"].shape == (NUM_FRAMES, 2) and not index.labels
    expected = line(NUM_FRAMES, (20, 20), (100, 70))
    assert np.abs(index.frame_labels["position"].numpy() - expected).max() < 1
    assert result.positions is not None and result.motion is not None
    assert np.allclose(index.frame_labels["position"].numpy(), result.positions[:, 0])


def test_other_lines_and_columns_stay(folder_of: Callable[..., Path], quick: list[str]) -> None:
    root = folder_of("a.mp4", "b/c.mp4", "d.mp4")
    gone = '{"speed":1e3,  "file_name": "gone.mp4"}'
    again = '{"file_name": "./a.mp4", "speed": 1.5, "note": "ä"}'
    (root / "metadata.jsonl").write_text(f"\ufeff{gone}\n\n{again}\n{again}\n", encoding="utf-8")
    inner = '{"file_name": "c.mp4", "big": 123456789012345678901234567890}'
    (root / "b" / "metadata.jsonl").write_text(inner + "\n", encoding="utf-8")
    label_motion(root, num_objects=2, progress=False)
    lines = (root / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines[0] == gone and len(lines) == 4 and lines[1] == lines[2]
    row = json.loads(lines[1])
    assert (row["file_name"], row["speed"], row["note"]) == ("./a.mp4", 1.5, "ä")
    assert row["position"][1] == [4.0, 5.0, 6.0, 7.0] and len(row["position"]) == NUM_FRAMES
    assert json.loads(lines[3])["file_name"] == "d.mp4"
    [row] = rows_of(root / "b" / "metadata.jsonl")
    assert row["big"] == 123456789012345678901234567890 and len(row["position"]) == NUM_FRAMES
    assert load_videos(root).frame_labels["position"].shape == (3 * NUM_FRAMES, 4)


def test_splits_with_metadata_in_them_or_above(folder_of: Callable[..., Path], quick: list[str]) -> None:
    root = folder_of("train/a.mp4", "train/b.mp4", "test/c.mp4")
    (root / "metadata.jsonl").write_text('{"file_name": "train/a.mp4", "speed": 1}\n', encoding="utf-8")
    label_motion(root, progress=False)
    assert [row["file_name"] for row in rows_of(root / "metadata.jsonl")] == ["train/a.mp4"]
    assert [row["file_name"] for row in rows_of(root / "train" / "metadata.jsonl")] == ["b.mp4"]
    assert [row["file_name"] for row in rows_of(root / "test" / "metadata.jsonl")] == ["c.mp4"]
    for split in ("train", "test"):
        index = load_split(str(root), split)
        assert list(index.frame_labels) == ["position"]


def test_classes_of_folders_stay(folder_of: Callable[..., Path], quick: list[str]) -> None:
    root = folder_of("train/run/a.mp4", "train/walk/b.mp4", "test/walk/c.mp4")
    before = load_split(str(root), "train").labels["label"].tolist()
    label_motion(root, progress=False)
    index = load_split(str(root), "train")
    assert index.labels["label"].tolist() == before == [0, 1] and "position" in index.frame_labels
    assert load_split(str(root), "test").labels["label"].tolist() == [1]


def test_added_videos_get_the_class_of_their_folder(folder_of: Callable[..., Path], quick: list[str]) -> None:
    root = folder_of("run/a.mp4", "walk/b.mp4")
    label_motion(root, progress=False)
    label_motion(folder_of("run/c.mp4", "walk/a.mp4"), progress=False)
    index = load_videos(root)
    assert [video.path for video in index.videos] == ["run/a.mp4", "run/c.mp4", "walk/a.mp4", "walk/b.mp4"]
    assert index.labels["label"].tolist() == [0, 0, 1, 1] and not index.label_faults.keys() & {"label"}


@pytest.mark.parametrize("labels", [(0, 1, 1), (0, 0, 0), ("a", "a", "b"), (None, None, None)])
def test_labels_that_are_not_those_of_folders_are_not_guessed(
    labels: tuple[Any, ...], folder_of: Callable[..., Path], quick: list[str]
) -> None:
    names = ("run/a.mp4", "run/b.mp4", "walk/a.mp4")
    root = folder_of(*names, "run/new.mp4")
    known = zip(names, labels, strict=True)
    rows = [{"file_name": name} | ({} if label is None else {"label": label}) for name, label in known]
    (root / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    label_motion(root, progress=False)
    assert [row.get("label") for row in rows_of(root / "metadata.jsonl")] == [*labels, None]


def test_folders_of_images(tmp_path: Path) -> None:
    path = line(NUM_FRAMES, (20, 20), (100, 70))[:, None]
    (tmp_path / "clip").mkdir()
    for number, frame in enumerate(painted(scenery(), path, [10])):
        Image.fromarray(frame).save(tmp_path / "clip" / f"{number:04d}.png")
    label_motion(tmp_path, progress=False)
    [row] = rows_of(tmp_path / "metadata.jsonl")
    assert row["file_name"] == "clip" and np.abs(np.array(row["position"]) - path[:, 0]).max() < 1


def test_an_interrupted_call_continues(
    folder_of: Callable[..., Path], quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder_of("a.mp4", "b.mp4", "c.mp4")
    follow = module.follow

    def interrupted(root: Path, video: Video, num_objects: int) -> Iterator[int | Motion]:
        if video.path == "b.mp4":
            raise KeyboardInterrupt
        yield from follow(root, video, num_objects)

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(module, "follow", interrupted)
        label_motion(root, progress=False)
    assert [row["file_name"] for row in rows_of(root / "metadata.jsonl") if "position" in row] == ["a.mp4"]
    quick.clear()
    results = label_motion(root, progress=False)
    assert quick == ["b.mp4", "c.mp4"]
    assert [result.motion is None for result in results] == [True, False, False]
    assert all(result.positions is not None for result in results)
    quick.clear()
    before = (root / "metadata.jsonl").read_bytes()
    label_motion(root, progress=False)
    assert quick == [] and (root / "metadata.jsonl").read_bytes() == before


def test_what_is_tracked_again(folder_of: Callable[..., Path], quick: list[str], write_video: WriteVideo) -> None:
    root = folder_of("a.mp4", "b.mp4")
    label_motion(root, progress=False)
    write_video(root / "b.mp4", num_frames=7)  # another video of the same name
    quick.clear()
    label_motion(root, progress=False)
    assert quick == ["b.mp4"]
    quick.clear()
    label_motion(root, num_objects=2, progress=False)
    assert quick == ["a.mp4", "b.mp4"]
    quick.clear()
    label_motion(root, num_objects=2, overwrite=True, progress=False)
    assert quick == ["a.mp4", "b.mp4"]


def test_a_label_that_was_deleted_is_tracked_again(folder_of: Callable[..., Path], quick: list[str]) -> None:
    """Its line still says where the label came from."""
    root = folder_of("a.mp4", "b.mp4")
    label_motion(root, progress=False)
    first, second = rows_of(root / "metadata.jsonl")
    without = {name: value for name, value in first.items() if name != "position"}
    assert without.keys() == {"file_name", "position_source"}
    (root / "metadata.jsonl").write_text(f"{json.dumps(without)}\n{json.dumps(second)}\n", encoding="utf-8")
    quick.clear()
    label_motion(root, progress=False)
    assert quick == ["a.mp4"] and rows_of(root / "metadata.jsonl") == [first, second]


def test_a_video_without_motion_has_a_null(folder_of: Callable[..., Path], quick: list[str]) -> None:
    root = folder_of("a.mp4", "still.mp4")
    for _ in range(2):
        first, second = label_motion(root, progress=False)
        assert (first.fault, second.fault, second.positions) == ("", "nothing moves", None)
    assert quick == ["a.mp4", "still.mp4"]
    assert rows_of(root / "metadata.jsonl")[1]["position"] is None
    assert "position" in load_videos(root).label_faults


def test_a_damaged_video_is_tried_again(folder_of: Callable[..., Path], quick: list[str]) -> None:
    root = folder_of("a.mp4", "damaged.mp4")
    for _ in range(2):
        results = label_motion(root, progress=False)
        assert [result.fault for result in results] == ["", "cannot be decoded: frame 3: damaged"]
    assert quick == ["a.mp4", "damaged.mp4", "damaged.mp4"]
    assert rows_of(root / "metadata.jsonl")[1] == {"file_name": "damaged.mp4"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.csv", "file_name,speed\na.mp4,1\n", "metadata.csv' does not take labels of frames"),
        ("metadata.jsonl", '{"file_name": "a.mp4", "position": 1}', "does not come from here: use another name"),
        ("metadata.jsonl", '{"name": "a.mp4"}', "line 1 is not a JSON object with a file_name"),
    ],
)
def test_metadata_that_is_refused(
    name: str, text: str, message: str, folder_of: Callable[..., Path], quick: list[str]
) -> None:
    root = folder_of("a.mp4")
    (root / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        label_motion(root, progress=False)
    assert quick == [] and (root / name).read_text(encoding="utf-8") == text
    assert sorted(path.name for path in root.glob("[!.]*")) == ["a.mp4", name]
