"""Labels that cannot be used are left out and named; those above the splits, or with byte order marks, are read."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.errors import UserError
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.shards.index_file import SHARDS_NAME

NUM_FRAMES = 9
ACTION = [[float(frame), 1.0] for frame in range(NUM_FRAMES)]


def _with(frame: int, value: Any) -> list[Any]:
    return [[value, 1.0] if number == frame else numbers for number, numbers in enumerate(ACTION)]


FAULTS: dict[str, tuple[Any, str]] = {
    "nan": (_with(5, float("nan")), r"'action' of frame 5 of 'b.mp4' is nan, not a number"),
    "infinite": (_with(8, float("inf")), r"frame 8 of 'b.mp4' is inf"),
    "null": (_with(0, None), r"frame 0 of 'b.mp4' is None"),
    "text": (_with(3, "left"), r"frame 3 of 'b.mp4' is 'left'"),
    "huge": (_with(3, 10**400), r"frame 3 of 'b.mp4' is 1000"),
    "one short": (ACTION[:-1], r"'b.mp4' has 9 frames and 8 values of 'action'"),
    "one long": ([*ACTION, [0.0, 0.0]], r"'b.mp4' has 9 frames and 10 values of 'action'"),
    "ragged": ([*ACTION[:4], [1.0], *ACTION[5:]], r"'action' of frame 4 of 'b.mp4' has 1 numbers, and others have 2"),
    "absent": (None, r"'b.mp4' has no 'action'"),
}


def _lines(action: Any) -> list[dict[str, Any]]:
    rows = [{"file_name": f"{name}.mp4", "action": ACTION, "mass": 1.5} for name in "abc"]
    rows[1]["action"] = action
    return rows


@pytest.fixture
def folder(tmp_path: Path, write_video: Any) -> Path:
    for number, name in enumerate("abc"):
        write_video(tmp_path / "videos" / f"{name}.mp4", video=number, num_frames=NUM_FRAMES)
    return tmp_path / "videos"


def _check(index: VideoIndex, fault: str) -> None:
    [text] = [text for name, text in index.label_faults.items() if name == "action"]
    assert text == _Matches(fault)
    assert "action" not in index.frame_labels and "action" not in index.labels
    assert index.labels["mass"].tolist() == [1.5] * 3  # others are read


class _Matches:
    def __init__(self, pattern: str) -> None:
        self.pattern = pattern

    def __eq__(self, text: object) -> bool:
        import re

        return isinstance(text, str) and re.search(self.pattern, text) is not None and "\n" not in text

    def __repr__(self) -> str:
        return self.pattern


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_label_is_named_by_video_and_frame(folder: Path, fault: str) -> None:
    action, message = FAULTS[fault]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, _lines(action))))
    _check(load_videos(folder, progress=False), message)


@pytest.mark.parametrize("fault", ["nan", "one short", "absent"])
def test_a_faulty_label_in_a_tar_is_named(folder: Path, tmp_path: Path, fault: str) -> None:
    action, message = FAULTS[fault]
    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "s.tar", "w") as tar:
        for row in _lines(action):
            name = row.pop("file_name")
            described = json.dumps(row).encode()
            tar.add(folder / name, name)
            member = tarfile.TarInfo(f"{Path(name).stem}.json")
            member.size = len(described)
            tar.addfile(member, io.BytesIO(described))
    _check(load_videos(shards, progress=False), message.replace("'b.mp4'", "'s.tar/b.mp4'"))


@pytest.mark.parametrize("mass", ["nan", "1e999", "light"])
def test_a_faulty_number_in_a_table_is_named(folder: Path, mass: str) -> None:
    (folder / "metadata.csv").write_text(f"file_name,mass\na.mp4,1\nb.mp4,{mass}\nc.mp4,2\n")
    index = load_videos(folder, progress=False)
    assert index.label_faults["mass"].startswith("'mass' of 'b.mp4' is ") and not index.labels


@pytest.mark.parametrize("text", ["[" * 200_000, "3", '"x"', "null", '{"file_name": 7}'])
def test_damaged_lines_are_named_by_their_number_alone(folder: Path, text: str) -> None:
    (folder / "metadata.jsonl").write_text(f'{{"file_name": "a.mp4"}}\n{text}\n')
    with pytest.raises(UserError, match=r"metadata.jsonl' line 2 is not a JSON object with a file_name$"):
        load_videos(folder, progress=False)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks(folder: Path, name: str, encoding: str) -> None:
    lines = {
        "metadata.jsonl": [json.dumps({"file_name": f"{video}.mp4", "mass": 2}) for video in "abc"],
        "metadata.csv": ["file_name,mass", *(f"{video}.mp4,2" for video in "abc")],
    }[name]
    (folder / name).write_text("\n".join(lines), encoding=encoding)
    if encoding == "utf-16":
        with pytest.raises(UserError, match=f"{name}' is not UTF-8 text"):
            load_videos(folder, progress=False)
    else:
        assert load_videos(folder, progress=False).labels["mass"].tolist() == [2] * 3


# ------------------------------------------------------------------------------------------------------------- places


def _three_splits(root: Path, write_video: Any) -> list[Path]:
    for number, path in enumerate(("train/a.mp4", "train/deep/b.mp4", "validation/c.mp4", "test/d.mp4")):
        write_video(root / path, video=number)
    return [root / "train", root / "validation", root / "test"]


def test_metadata_above_the_splits_is_read(tmp_path: Path, write_video: Any) -> None:
    splits = _three_splits(tmp_path, write_video)
    rows = [
        {"file_name": name, "mass": mass}
        for mass, name in enumerate(("train/a.mp4", "./train/deep/b.mp4", "validation/c.mp4", "test/d.mp4"))
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = [load_videos(split, siblings=splits, progress=False).labels["mass"].tolist() for split in splits]
    assert found == [[0, 1], [2], [3]]
    (tmp_path / "train" / "metadata.jsonl").write_text('{"file_name": "a.mp4", "mass": 7}')  # closer, of one video
    assert load_videos(splits[0], siblings=splits, progress=False).labels["mass"].tolist() == [7, 1]


@pytest.mark.parametrize("place", ["", "walk"])
def test_an_archive_beside_videos_is_not_the_data(tmp_path: Path, write_video: Any, place: str) -> None:
    for number, path in enumerate(("walk/a.mp4", "run/b.mp4")):
        write_video(tmp_path / "data" / path, video=number)
    with tarfile.open(tmp_path / "data" / place / "part1.tar", "w") as tar:
        tar.add(tmp_path / "data" / "walk" / "a.mp4", "a.mp4")
    index = load_videos(tmp_path / "data", progress=False)
    assert [video.path for video in index.videos] == ["run/b.mp4", "walk/a.mp4"]
    assert index.labels["label"].tolist() == [0, 1]
    assert not list((tmp_path / "data").rglob(SHARDS_NAME))


def test_an_archive_without_videos_leaves_no_index(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "notes.tar", "w") as tar:
        tar.add(tmp_path / "notes.txt", "notes.txt")
    with pytest.raises(UserError, match="hold no videos"):
        load_videos(tmp_path / "data", progress=False)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["notes.tar"]


@pytest.mark.parametrize("values", [([], [1.0], [2.0]), ([], 1.0, 2.0), ([], [], [1.0])])
def test_lists_of_different_lengths_are_no_label_even_if_the_first_is_empty(folder: Path, values: Any) -> None:
    rows = [{"file_name": f"{name}.mp4", "v": value} for name, value in zip("abc", values, strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    index = load_videos(folder, progress=False)
    assert not index.labels and index.label_faults["v"].startswith(("'v' of 'b.mp4' has", "'v' of 'c.mp4' has"))


def test_two_lines_for_a_video_must_agree(folder: Path) -> None:
    lines = [json.dumps({"file_name": f"{name}.mp4", "mass": 1}) for name in ("a", "b", "c", "./a")]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert load_videos(folder, progress=False).labels["mass"].tolist() == [1] * 3
    (folder / "metadata.jsonl").write_text("\n".join([*lines, '{"file_name": "a.mp4", "mass": 2}']))
    with pytest.raises(UserError, match=r"metadata.jsonl' has different lines for 'a.mp4': keep one"):
        load_videos(folder, progress=False)


@pytest.mark.parametrize("text", ["file_name,mass,mass\na.mp4,1,2\n", f"file_name,{'x' * 200_000}\na.mp4,1\n"])
def test_a_csv_header_that_cannot_be_used_is_one_line(folder: Path, text: str) -> None:
    (folder / "metadata.csv").write_text(text)
    with pytest.raises(UserError, match=r"metadata.csv' (has the column 'mass' twice|line \d is not valid CSV)"):
        load_videos(folder, progress=False)


def test_names_of_folders_are_no_columns_of_a_parquet_file(tmp_path: Path, write_video: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    root = tmp_path / "seed=7"
    write_video(root / "a.mp4")
    parquet.write_table(pyarrow.table({"file_name": ["a.mp4"], "mass": [1]}), root / "metadata.parquet")
    assert load_videos(root, progress=False).labels.keys() == {"mass"}
    parquet.write_table(pyarrow.table({"file_name": [None, "a.mp4"], "mass": [1, 1]}), root / "metadata.parquet")
    with pytest.raises(UserError, match=r"metadata.parquet' row 1 has a file_name that is not text"):
        load_videos(root, progress=False)
