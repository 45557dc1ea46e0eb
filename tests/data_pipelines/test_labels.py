"""Labels in the layouts of Hugging Face's videofolder: metadata in three formats, or a folder for each class."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.errors import UserError
from data_pipelines.formats.registry import load_videos
from data_pipelines.labels import read_metadata

Rows = list[dict[str, Any]]


def _labels(root: Path, **arguments: Any) -> dict[str, torch.Tensor]:
    return load_videos(root, progress=False, num_workers=0, **arguments).labels


def _write_jsonl(folder: Path, rows: Rows) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_csv(folder: Path, rows: Rows) -> None:
    with open(folder / "metadata.csv", "w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _write_parquet(folder: Path, rows: Rows) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "metadata.parquet")


WRITERS = [_write_jsonl, _write_csv, _write_parquet]


@pytest.mark.parametrize("write", WRITERS)
def test_numeric_fields_are_labels_in_every_format(
    tmp_path: Path, write_video: Any, write: Callable[[Path, Rows], None]
) -> None:
    for name in ("a.mp4", "sub/b.mp4"):
        write_video(tmp_path / name)
    write(
        tmp_path,
        [
            {"file_name": "sub/b.mp4", "digit": 7, "weight": 1, "name": "x, y", "gap": 1},
            {"file_name": "unused.mp4", "digit": 1, "weight": 2.5, "name": "z", "gap": 2},
            {"file_name": "./a.mp4", "digit": 3, "weight": 0.25, "name": "5", "gap": None},
        ],
    )
    labels = _labels(tmp_path)
    assert labels.keys() == {"digit", "weight"}
    assert labels["digit"].dtype == torch.int64 and labels["digit"].tolist() == [3, 7]
    assert labels["weight"].dtype == torch.float32 and labels["weight"].tolist() == [0.25, 1.0]


def test_digits_with_an_underscore_are_a_text(tmp_path: Path, write_video: Any) -> None:
    """Python reads 1_2 as 12."""
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name)
    _write_csv(
        tmp_path,
        [
            {"file_name": "a.mp4", "take": "1_2", "weight": "0_1.5", "year": "2020"},
            {"file_name": "b.mp4", "take": "1_3", "weight": "1_0e3", "year": "2021"},
        ],
    )
    rows = read_metadata(tmp_path / "metadata.csv")
    assert rows["a.mp4"] == {"take": "1_2", "weight": "0_1.5", "year": 2020}
    labels = _labels(tmp_path)
    assert labels.keys() == {"year"} and labels["year"].tolist() == [2020, 2021]


@pytest.mark.parametrize("write", [_write_jsonl, _write_parquet])
def test_lists_of_numbers_are_labels_if_equally_long(
    tmp_path: Path, write_video: Any, write: Callable[[Path, Rows], None]
) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name)
    rows = [
        {"file_name": "b.mp4", "v": [1.0, 2.5], "ragged": [1]},
        {"file_name": "a.mp4", "v": [0.5, 0.0], "ragged": [1, 2]},
    ]
    write(tmp_path, rows)
    labels = _labels(tmp_path)
    assert labels.keys() == {"v"}
    assert torch.equal(labels["v"], torch.tensor([[0.5, 0.0], [1.0, 2.5]]))


def test_fields_that_a_video_lacks_are_left_out(tmp_path: Path, write_video: Any) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name)
    _write_jsonl(tmp_path, [{"file_name": "a.mp4", "digit": 1, "some": 1}, {"file_name": "b.mp4", "digit": 2}])
    assert _labels(tmp_path).keys() == {"digit"}


def test_file_names_are_relative_to_the_metadata(tmp_path: Path, write_video: Any) -> None:
    for name in ("a/v.mp4", "b/deep/v.mp4", "c.mp4"):
        write_video(tmp_path / name)
    _write_csv(tmp_path, [{"file_name": "c.mp4", "digit": 3}])
    _write_jsonl(tmp_path / "a", [{"file_name": "v.mp4", "digit": 1}])
    _write_parquet(tmp_path / "b", [{"file_name": "deep/v.mp4", "digit": 2}])
    assert _labels(tmp_path)["digit"].tolist() == [1, 2, 3]


def test_folders_without_metadata_are_classes(tmp_path: Path, write_video: Any) -> None:
    for name in ("cat/0.mp4", "ape/1.mp4", "cat/2.mp4", "dog/3.mp4"):
        write_video(tmp_path / "train" / name)
    for name in ("cat/0.mp4", "dog/1.mp4"):
        write_video(tmp_path / "test" / name)
    (tmp_path / "test" / "aaa").mkdir()  # holds no videos
    folders = [tmp_path / "train", tmp_path / "test"]
    train, test = (_labels(folder, siblings=folders)["label"] for folder in folders)
    assert train.tolist() == [0, 1, 1, 2]  # ape, cat, cat, dog
    assert test.tolist() == [1, 2]
    assert _labels(tmp_path / "test")["label"].tolist() == [0, 1]
    assert _labels(tmp_path) == {}  # deeper folders are none
    write_video(tmp_path / "train" / "4.mp4")
    assert _labels(tmp_path / "train") == {}


def test_one_folder_is_no_class(tmp_path: Path, write_video: Any) -> None:
    write_video(tmp_path / "clips" / "0.mp4")
    assert _labels(tmp_path) == {}


def test_metadata_with_gaps_gives_no_labels(tmp_path: Path, write_video: Any, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a/a.mp4", "b/b.mp4"):
        write_video(tmp_path / name)
    _write_jsonl(tmp_path, [{"file_name": "a/a.mp4", "digit": 1}])
    assert _labels(tmp_path) == {}
    assert "'b/b.mp4'" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("jsonl", '{"file_name": "a.mp4"}\nnonsense\n', "metadata.jsonl' line 2 is not a JSON object with a file_name"),
        ("jsonl", '{"file_name": 1}\n', "metadata.jsonl' line 1 is not a JSON object with a file_name"),
        ("jsonl", b"\xff\xfe", "metadata.jsonl' is not UTF-8 text"),
        ("csv", "file,digit\na.mp4,1\n", "metadata.csv' has no column file_name: its columns are .'file', 'digit'."),
        ("csv", "", "metadata.csv' has no column file_name: its columns are none"),
        ("csv", "file_name,digit\na.mp4\n", "metadata.csv' line 2 has more or fewer cells than the header"),
        ("csv", "file_name,digit\na.mp4,1,2\n", "metadata.csv' line 2 has more or fewer cells than the header"),
        ("parquet", "nonsense", "metadata.parquet' is not a readable Parquet file"),
    ],
)
def test_broken_metadata_is_one_line(tmp_path: Path, write_video: Any, name: str, text: Any, message: str) -> None:
    if name == "parquet":
        pytest.importorskip("pyarrow")
    write_video(tmp_path / "a.mp4")
    (tmp_path / f"metadata.{name}").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as caught:
        _labels(tmp_path)
    assert "\n" not in str(caught.value)


def test_two_kinds_of_metadata_are_refused(tmp_path: Path, write_video: Any) -> None:
    write_video(tmp_path / "a.mp4")
    _write_jsonl(tmp_path, [{"file_name": "a.mp4"}])
    _write_csv(tmp_path, [{"file_name": "a.mp4"}])
    with pytest.raises(UserError, match=r"holds metadata.jsonl and metadata.csv: keep one"):
        _labels(tmp_path)


def test_parquet_without_pyarrow_names_the_extra(
    tmp_path: Path, write_video: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "a.mp4")
    _write_parquet(tmp_path, [{"file_name": "a.mp4", "digit": 1}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"metadata.parquet' needs pyarrow.*pip install 'worldmodel\[lerobot\]'"):
        _labels(tmp_path)
