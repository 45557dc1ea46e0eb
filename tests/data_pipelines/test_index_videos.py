"""`worldmodel index`: its output, the index, and its messages for mistakes."""

import os
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.formats.registry import load_videos
from data_pipelines.indexing.index_file import INDEX_NAME
from data_pipelines.shards.packing import pack_videos
from worldmodel.commands.main import main


@pytest.fixture
def folder(tmp_path: Path, write_video: Any) -> Path:
    root = tmp_path / "videos"
    for name in ("a.mp4", "b/c.mp4"):
        write_video(root / name, num_frames=30, fps=10)
    (root / "empty.mp4").write_bytes(b"")
    return root


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    try:
        return main(["index", *arguments])
    except SystemExit as exit_code:
        assert isinstance(exit_code.code, int)
        return exit_code.code


def test_the_index_is_the_one_that_training_builds(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = load_videos(folder, progress=False, max_bad_fraction=0.5)
    cache = folder / INDEX_NAME
    expected = cache.read_bytes()
    cache.unlink()
    assert _run(monkeypatch, str(folder)) == 0
    assert cache.read_bytes() == expected
    out = capsys.readouterr().out
    assert f"{folder}: 2 videos, 60 frames, 0.00 hours, hash {index.content_hash}" in out
    assert "1 bad files:\n    empty.mp4: empty file (0 bytes)" in out
    assert f"index: {cache}" in out


def test_parts_and_merge(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(monkeypatch, str(folder), "--part", "1/2", "--workers", "1") == 0
    assert _run(monkeypatch, str(folder), "--merge") == 2
    assert "lacks part 2 of 2" in capsys.readouterr().err
    assert _run(monkeypatch, str(folder), "--part", "2/2") == 0
    assert _run(monkeypatch, str(folder), "--merge") == 0
    assert "2 videos, 60 frames" in capsys.readouterr().out
    assert [path.name for path in folder.glob(".*")] == [INDEX_NAME]


def test_splits_that_share_a_folder_are_indexed_once(
    tmp_path: Path, write_video: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And those with fewer videos than parts are merged, too."""
    for name in ("train/a", "train/b", "train/c", "test/a"):
        write_video(tmp_path / f"{name}.mp4", video=ord(name[-1]) - 97)
    for part in range(1, 4):
        assert _run(monkeypatch, str(tmp_path), "--part", f"{part}/3", "--workers", "1") == 0
    capsys.readouterr()
    assert _run(monkeypatch, str(tmp_path), "--merge") == 0
    printed = capsys.readouterr().out
    assert printed.count("3 videos") == printed.count("1 videos") == 1
    assert _run(monkeypatch, str(tmp_path), "--verify", "--workers", "1") == 0
    assert capsys.readouterr().out.count("0 changes") == 2


def test_each_split_folder_gets_an_index(tmp_path: Path, write_video: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / name for name in ("train", "validation", "test")]
    for folder in folders:
        write_video(folder / "a.mp4")
    assert _run(monkeypatch, str(tmp_path)) == 0
    assert all((folder / INDEX_NAME).is_file() for folder in folders)
    assert not (tmp_path / INDEX_NAME).exists()


def test_verify_names_what_size_and_time_do_not_tell(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], write_video: Any
) -> None:
    assert _run(monkeypatch, str(folder), "--verify") == 2
    assert "has no index to compare with" in capsys.readouterr().err
    assert _run(monkeypatch, str(folder)) == 0
    index = (folder / INDEX_NAME).read_bytes()
    os.utime(folder / "a.mp4")
    assert _run(monkeypatch, str(folder), "--verify") == 0
    assert f"{folder}: 0 changes since it was indexed" in capsys.readouterr().out
    before = (folder / "a.mp4").stat()
    data = bytearray((folder / "a.mp4").read_bytes())
    data[data.index(b"mdat") + 400] ^= 1
    (folder / "a.mp4").write_bytes(data)
    os.utime(folder / "a.mp4", ns=(before.st_atime_ns, before.st_mtime_ns))
    write_video(folder / "new.mp4")
    (folder / "b" / "c.mp4").unlink()
    assert _run(monkeypatch, str(folder), "--verify") == 2
    out, err = capsys.readouterr()
    assert "  'a.mp4' has changed (its content differs)\n  'b/c.mp4' is gone\n  'new.mp4' is new\n" in out
    assert "error: 3 files have changed since they were indexed" in err
    assert (folder / INDEX_NAME).read_bytes() == index


def test_verify_compares_shards_by_checksum(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty.mp4").unlink()
    shards = tmp_path / "shards"
    pack_videos(folder, shards, shard_mb=1e-6, progress=False)
    assert _run(monkeypatch, str(shards), "--verify") == 0
    data = bytearray((shards / "shard-000001.tar").read_bytes())
    data[data.index(b"mdat") + 400] ^= 1
    (shards / "shard-000001.tar").write_bytes(data)
    assert _run(monkeypatch, str(shards), "--verify") == 2
    assert "  'shard-000001.tar' has changed (its sha256 differs)\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "data root 'missing' is not a folder"),
        ([".", "--part", "3/2"], "--part='3/2' must read K/N with K from 1 to N, such as 2/8"),
        ([".", "--part", "half"], "--part='half' must read K/N"),
        ([".", "--workers", "0"], "--workers must be at least 1, not 0"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, *arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
