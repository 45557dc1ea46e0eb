"""scripts/index_videos.py: what it prints, what it writes, and what it says about mistakes."""

from pathlib import Path
from typing import Any

import pytest

from data_pipelines.index import INDEX_NAME, load_or_build_index
from scripts.index_videos import main


@pytest.fixture
def folder(tmp_path: Path, write_video: Any) -> Path:
    root = tmp_path / "videos"
    for name in ("a.mp4", "b/c.mp4"):
        write_video(root / name, num_frames=30, fps=10)
    (root / "empty.mp4").write_bytes(b"")
    return root


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["index_videos.py", *arguments])
    try:
        return main()
    except SystemExit as exit_code:
        assert isinstance(exit_code.code, int)
        return exit_code.code


def test_the_index_is_the_one_that_training_builds(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = load_or_build_index(folder, progress=False, max_bad_fraction=0.5)
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


def test_each_split_folder_gets_an_index(tmp_path: Path, write_video: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / name for name in ("train", "validation", "test")]
    for folder in folders:
        write_video(folder / "a.mp4")
    assert _run(monkeypatch, str(tmp_path)) == 0
    assert all((folder / INDEX_NAME).is_file() for folder in folders)
    assert not (tmp_path / INDEX_NAME).exists()


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
