"""What index files state of videos: accepted if a file could have it, else refused in one line."""

import json
import math
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.errors import UserError
from data_pipelines.facts import MAX_FRAMES, BadFile, Video, entry_from_fields
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.indexing.index_file import INDEX_NAME, index_path
from data_pipelines.shards.index_file import SHARDS_HEADER, SHARDS_NAME, parse_shards

FACTS: dict[str, Any] = {
    "path": "a/b.mp4",
    "size_bytes": 5000,
    "mtime_ns": 0,
    "num_frames": 4,
    "fps": 25.0,
    "width": 64,
    "height": 48,
    "duration_s": 0.16,
    "keyframes": [0, 2],
    "keyframe_pts": [-512, 512],
    "open_gop": False,
    "shard": "s.tar",
    "offset_bytes": 512,
    "tick_s": 1 / 12800,
    "frame_ms": [40, 0, 80],
    "quarter_turns": 1,
}
SHARD = {"name": "s.tar", "size_bytes": 10_000, "sha256": "0" * 64}
HUGE = 10**4000

ODD: dict[tuple[str, ...], tuple[Any, ...]] = {
    ("num_frames", "width", "height"): ("x", 0, -1, True, 1.0, None, [], HUGE),
    ("num_frames",): (5001, MAX_FRAMES + 1, 10**10, 2**63),
    ("width", "height"): (2**16 + 1,),
    ("size_bytes", "mtime_ns", "offset_bytes"): ("x", 2**63, HUGE, None, False),
    ("fps", "duration_s", "tick_s"): (-1.0, math.nan, math.inf, "1", None, HUGE),
    ("fps",): (1e-300,),
    ("keyframes",): ([], [1], [0, 4], [0, 2, 2], [0, 3, 1], [0, "a"], [0, True], [0, 1.0], [0, HUGE], 0, None, "ab"),
    ("keyframe_pts",): ([0], [0, 1, 2], [5, 5], [5, 4], ["a", "b"], [0, 2**63], [-(2**64), 0], {"a": 1, "b": 2}),
    ("frame_ms",): ([1, 2], [1, 2, 3, 4], [-1, 2, 3], [1, 2, "x"], [1, 2, 2**64], [True, 1, 1], [[1], 2, 3]),
    ("path",): ("", "/etc/passwd", "../a.mp4", "a/../../b.mp4", "..", "a\0.mp4", "\ud800.mp4", 1, None, ["a"]),
    ("shard",): ("../s.tar", "/s.tar", "s", "s.tar\n", "a/s.tar", "other.tar", "", 1, None, [], {}),
    ("quarter_turns",): (-1, 4, True, "1", [1]),
    ("open_gop", "mirrored", "begins_late"): (0, "false", None),
    ("stream",): (-2, 2**63, "0", True, None),
    ("digest",): ("x", "0" * 200, "0" * 15 + "\n", 1, None),
    ("reason", "surprise"): (1,),
}
CASES = [(name, value) for names, values in ODD.items() for name in names for value in values]


def _text(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in (SHARDS_HEADER, *rows)).encode()


def _name(value: Any) -> str:
    return re.sub(r"\W", "_", repr(value))[:20]


def test_what_a_file_can_have_is_accepted() -> None:
    video = entry_from_fields(dict(FACTS))
    assert isinstance(video, Video) and entry_from_fields(json.loads(json.dumps(asdict(video)))) == video
    one_keyframe: dict[str, Any] = {"keyframes": [0], "keyframe_pts": []}
    others: list[dict[str, Any]] = [{"frame_ms": []}, {"fps": 0.0}, {"fps": 25}, {"path": "a..b"}]
    for changes in (one_keyframe, *others):
        assert isinstance(entry_from_fields(FACTS | changes), Video)
    longest = FACTS | {"num_frames": MAX_FRAMES, "size_bytes": MAX_FRAMES, "frame_ms": []}
    assert isinstance(entry_from_fields(longest), Video)
    bad = BadFile("s.tar/../a.mp4", 0, 0, "its name leads out of the archive")
    assert entry_from_fields(asdict(bad)) == bad


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{name}-{_name(value)}" for name, value in CASES])
def test_what_no_file_can_have_is_refused_in_one_line(name: str, value: Any) -> None:
    if value not in ("", "other.tar") or name != "shard":  # which a file could have, but not in this shard
        with pytest.raises((TypeError, ValueError, KeyError)):
            entry_from_fields(FACTS | {name: value})
    with pytest.raises(UserError, match=r"'there' is damaged in line 3 \(.*\): index the shards again") as raised:
        parse_shards(_text(SHARD, FACTS | {name: value}), "there")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize(
    "line",
    [
        "[" * 200_000,
        '{"a": ' * 200_000,
        '{"num_frames": ' + "9" * 5000 + "}",
        "",
        "1",
        '"sha256"',
        "[]",
        "null",
        "NaN",
        json.dumps(SHARD | {"name": None}),
        json.dumps(SHARD | {"name": ["s.tar"]}),
        json.dumps(SHARD | {"name": "../s.tar"}),
        json.dumps(SHARD | {"size_bytes": -1}),
        json.dumps(SHARD | {"size_bytes": True}),
        json.dumps(SHARD | {"size_bytes": 1e9}),
        json.dumps(SHARD | {"sha256": "x"}),
        json.dumps(SHARD | {"sha256": None}),
        json.dumps(FACTS | {"labels": 1}),
        json.dumps(FACTS | {"labels": [["a", 1]]}),
        json.dumps(FACTS | {"path": "s.tar/twice.mp4"}),
        "\xff",
    ],
    ids=range(21),
)
def test_a_damaged_line_of_shards_jsonl_is_one_line(line: str) -> None:
    text = _text(SHARD, FACTS | {"path": "s.tar/twice.mp4"}) + line.encode("latin-1") + b"\n"
    with pytest.raises(UserError, match=r"'there' is damaged in line 4 ") as raised:
        parse_shards(text, "there")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_videos_of_an_impossible_length_in_all_are_refused() -> None:
    """Each of them would be possible."""
    size = {"size_bytes": MAX_FRAMES, "num_frames": MAX_FRAMES, "frame_ms": []}
    rows = [FACTS | size | {"path": f"{number}.mp4"} for number in range(33)]
    shard = SHARD | {"size_bytes": 2**40}
    assert len(parse_shards(_text(shard, *rows[:32]), "there")[1]) == 32
    with pytest.raises(UserError, match=r"line 35 .* more than 4,294,967,296 frames"):
        parse_shards(_text(shard, *rows), "there")


def test_lists_without_number_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipelines.shards.index_file.MAX_LISTS", 1000)
    rows = [FACTS | {"path": f"{number}.mp4", "labels": {"a": [[]] * 100}} for number in range(10)]
    assert len(parse_shards(_text(SHARD, *rows[:9]), "there")[1]) == 9
    with pytest.raises(UserError, match=r"line 12 .* more than 1,000 lists and objects"):
        parse_shards(_text(SHARD, *rows), "there")


def test_a_line_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipelines.files.MAX_LINE_BYTES", 1000)
    with pytest.raises(UserError, match="longer than 1,000 bytes"):
        parse_shards(_text(SHARD, FACTS) + b'{"labels": "' + b"x" * 1000, "there")


# ------------------------------------------------------------------------------------------------- the cached index


@pytest.fixture
def videos(write_video: Any, tmp_path: Path) -> Path:
    root = tmp_path / "videos"
    for video in range(3):
        write_video(root / f"{video}.mp4", video=video)
    return root


def _tamper(root: Path, index: VideoIndex, **changes: Any) -> None:
    """Change the facts of the first video in the cached index, and make its hash fit."""
    path = index_path(root)
    assert path is not None
    header, *lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    lines[0] |= changes
    try:
        entries = [Video(**line) for line in lines]
        header["content_hash"] = VideoIndex(root, entries).content_hash
    except (TypeError, ValueError, AttributeError):
        pass  # of no type that can be hashed
    path.write_text("".join(json.dumps(line) + "\n" for line in (header, *lines)), encoding="utf-8")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_frames": 10**10},
        {"num_frames": 2**27, "keyframes": [0]},
        {"num_frames": "x"},
        {"keyframes": []},
        {"width": 0},
        {"fps": math.nan},
        {"frame_ms": [-1] * 8},
        {"shard": "../../etc/s.tar", "offset_bytes": 0},
        {"shard": "s.tar", "offset_bytes": 0},
        {"path": "../0.mp4"},
    ],
    ids=str,
)
def test_a_cached_index_with_impossible_facts_is_built_again(
    videos: Path, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    before = load_videos(videos, progress=False)
    _tamper(videos, before, **changes)
    after = load_videos(videos, progress=False)
    assert after.videos == before.videos and [video.num_frames for video in after.videos] == [9] * 3
    [warning] = [record.getMessage() for record in caplog.records]
    assert "is unreadable (" in warning and "\n" not in warning and len(warning) < 500
    caplog.clear()
    assert load_videos(videos, progress=False).videos == before.videos and not caplog.records


@pytest.mark.parametrize("kind", ["fifo", "folder", "nesting", "digits", "bytes"])
def test_what_is_no_index_is_built_again(videos: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    before = load_videos(videos, progress=False)
    path = videos / INDEX_NAME
    header = path.read_text(encoding="utf-8").splitlines()[0]
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        damage = {"nesting": "[" * 200_000, "digits": "9" * 5000, "bytes": "\xff"}[kind]
        path.write_bytes(f"{header}\n{damage}\n".encode("latin-1"))
    assert load_videos(videos, progress=False).videos == before.videos
    assert "is unreadable (" in caplog.text


@pytest.mark.parametrize("name", [INDEX_NAME, SHARDS_NAME])
def test_an_index_is_not_written_through_a_link(videos: Path, name: str, tmp_path: Path) -> None:
    """Neither through the name of the index, nor through one that a process would take for the time of writing."""
    precious = tmp_path / "precious"
    precious.write_text("mine", encoding="utf-8")
    for link in (name, f"{name}.{os.getpid()}.tmp", f".{name}.{os.getpid()}.tmp"):
        (videos / link).symlink_to(precious)
    if name == INDEX_NAME:
        load_videos(videos, progress=False)
    else:
        (videos / name).unlink()
        import tarfile

        shards = tmp_path / "shards"
        shards.mkdir()
        with tarfile.open(shards / "a.tar", "w") as tar:
            tar.add(videos / "0.mp4", "0.mp4")
        for link in (f"{name}.{os.getpid()}.tmp", f".{name}.{os.getpid()}.tmp"):
            (shards / link).symlink_to(precious)
        load_videos(shards, progress=False)
        assert (shards / name).is_file()
    assert precious.read_text(encoding="utf-8") == "mine"
