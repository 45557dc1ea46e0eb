"""Values from strangers in index files, metadata and shards.jsonl: refused in one line, or accepted and possible."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipelines.facts import BadFile, Video, entry_from_fields
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.indexing.index_file import INDEX_HEADER, INDEX_NAME
from data_pipelines.labels import read_labels
from data_pipelines.shards.index_file import parse_shards
from tests.data_pipelines.generated import DEEP, EXAMPLES, JSON, result_or_refusal
from tests.data_pipelines.test_parsers import FACTS, PATHS, SHARD, VIDEOS, shards_text

FIELDS = asdict(FACTS)
IN_SHARD = FIELDS | {"shard": "s.tar", "offset_bytes": 512, "size_bytes": 500}


def assert_possible(entry: Video | BadFile) -> None:
    """Fail unless a file could have these facts: types, ranges, order, and one number where one belongs."""
    assert isinstance(entry.path, str) and type(entry.size_bytes) is int and entry.size_bytes >= 0
    if isinstance(entry, BadFile):
        assert isinstance(entry.reason, str)
        return
    for name in ("num_frames", "width", "height"):
        assert type(getattr(entry, name)) is int and 1 <= getattr(entry, name) < 2**31, name
    for name in ("fps", "duration_s", "tick_s"):
        value = getattr(entry, name)
        assert isinstance(value, int | float) and 0 <= value < math.inf, name
    keys, pts = entry.keyframes, entry.keyframe_pts
    assert all(type(number) is int for number in (*keys, *pts, *entry.frame_ms))
    assert keys and keys[0] == 0 and keys[-1] < entry.num_frames and list(keys) == sorted(set(keys))
    assert len(pts) in (0, len(keys)) and list(pts) == sorted(set(pts))
    assert len(entry.frame_ms) in (0, entry.num_frames - 1) and all(step >= 0 for step in entry.frame_ms)
    assert isinstance(entry.shard, str) and type(entry.offset_bytes) is int and entry.offset_bytes >= 0
    assert entry.quarter_turns in (0, 1, 2, 3) and isinstance(entry.open_gop, bool)


@EXAMPLES
@given(st.sampled_from(sorted(FIELDS)), JSON)
@example("num_frames", "x")
@example("num_frames", 0)
@example("num_frames", 10**10)
@example("width", 0)
@example("fps", math.nan)
@example("keyframes", [])
@example("keyframes", [0, "a"])
@example("keyframes", [0, 10**10])
@example("keyframe_pts", [0])
@example("frame_ms", [-1, 5, 5])
@example("quarter_turns", [1])
def test_an_entry_that_no_file_has_is_refused(name: str, value: Any) -> None:
    try:
        entry = entry_from_fields(FIELDS | {name: value})
    except (TypeError, ValueError, KeyError):
        return
    assert_possible(entry)


@EXAMPLES
@given(st.sampled_from(sorted(IN_SHARD)), JSON)
@example("num_frames", "x")
@example("num_frames", 10**10)
@example("width", [1])
@example("keyframes", [])
@example("quarter_turns", {})
@example("path", None)
@example("shard", [])
@example("shard", "\x1b[2J")
def test_shards_jsonl_with_an_odd_value_is_refused(name: str, value: Any) -> None:
    parsed = result_or_refusal(lambda: parse_shards(shards_text(SHARD, IN_SHARD | {name: value}), "here"))
    for entry, _ in parsed[1] if parsed else []:
        assert_possible(entry)


@pytest.mark.parametrize("deep", DEEP, ids=["list", "object"])
def test_deep_nesting_is_refused(tmp_path: Path, deep: str) -> None:
    assert result_or_refusal(lambda: parse_shards(shards_text() + deep.encode(), "here")) is None
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4", "x": ' + deep)
    assert result_or_refusal(lambda: read_labels(tmp_path, VIDEOS, [])) is None


@EXAMPLES
@given(JSON, JSON)
@example(10**400, 1)
@example([10**400], [0.5])
@example([[1], [2], [3]], [[1], [2], [10**400], [4]])
@example("\ud800", {"\ud800": 1})
def test_metadata_with_odd_values_is_read_or_refused(tmp_path: Path, first: Any, second: Any) -> None:
    rows = [{"file_name": path, "x": value} for path, value in zip(PATHS, (first, second), strict=True)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = result_or_refusal(lambda: read_labels(tmp_path, VIDEOS, []))
    if labels is not None and "x" in labels.of_videos:
        assert len(labels.of_videos["x"]) == 2 and labels.of_videos["x"].dtype in (torch.int64, torch.float32)


@EXAMPLES
@given(JSON)
@example({"file_name": "a\n.mp4"})
def test_any_json_in_metadata_is_a_row_or_is_refused(tmp_path: Path, row: Any) -> None:
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    result_or_refusal(lambda: read_labels(tmp_path, VIDEOS, []))


@EXAMPLES
@given(st.text(max_size=200))
@example("\x1b[2J,label\n")
@example("file_name,label\na.mp4,1\nsub/b.mp4,2,3\n")
@example('file_name\n"a.mp4')
def test_any_text_is_csv_or_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "metadata.csv").write_bytes(text.encode("utf-8", "surrogatepass"))
    result_or_refusal(lambda: read_labels(tmp_path, VIDEOS, []))


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_frames", "x"), ("num_frames", 10**10), ("num_frames", 0), ("keyframes", [0, "a"]), ("width", [])],
)
def test_an_index_file_that_lies_is_built_again(tmp_path: Path, write_video: Any, name: str, value: Any) -> None:
    """Its hash is no secret: here it is the right one of the wrong facts."""
    write_video(tmp_path / "a.mp4", num_frames=9)
    true = load_videos(tmp_path, num_workers=0, progress=False).videos[0]
    wrong = replace(true)
    object.__setattr__(wrong, name, value)
    header = INDEX_HEADER | {"content_hash": VideoIndex(tmp_path, [wrong]).content_hash}
    (tmp_path / INDEX_NAME).write_text("".join(json.dumps(row) + "\n" for row in (header, asdict(wrong))))
    assert load_videos(tmp_path, num_workers=0, progress=False).videos == [true]
