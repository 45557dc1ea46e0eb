"""Many files at once: whatever one of them does to the process that reads it, the others are indexed."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.facts import BadFile, Video
from data_pipelines.indexing import parallel
from data_pipelines.indexing.parallel import index_files
from data_pipelines.indexing.probe import index_file

NAMES = [f"{i}.mp4" for i in range(8)]


@pytest.fixture
def folder(tmp_path: Path, write_video: Any) -> Path:
    data = write_video(tmp_path / NAMES[0]).read_bytes()
    for name in NAMES[1:]:
        (tmp_path / name).write_bytes(data)
    return tmp_path


def _index(root: Path, paths: list[str], num_workers: int = 2) -> dict[str, Video | BadFile]:
    entries = list(index_files(root, paths, num_workers=num_workers, progress=False))
    assert len(entries) == len(paths)
    return {entry.path: entry for entry in entries}


def _make_faulty(monkeypatch: pytest.MonkeyPatch, act: Callable[[str], object]) -> None:
    """The files 3 and 4 (one of each process's), and the very last one."""

    def faulty(root: str | Path, path: str, *limit: int) -> Video | BadFile:
        if path in ("3.mp4", "4.mp4", "7.mp4"):
            act(path)
        return index_file(root, path, *limit)

    monkeypatch.setattr(parallel, "index_file", faulty)
    monkeypatch.setattr(parallel, "FILES_PER_PROCESS", 2)


def _check(found: dict[str, Video | BadFile], root: Path, reason: str) -> None:
    for name in NAMES:
        entry = found[name]
        if name in ("3.mp4", "4.mp4", "7.mp4"):
            stat = os.stat(root / name)
            assert isinstance(entry, BadFile) and reason in entry.reason
            assert (entry.size_bytes, entry.mtime_ns) == (stat.st_size, stat.st_mtime_ns)
        else:
            assert entry == index_file(root, name)


def test_files_that_crash_the_process_are_bad_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make_faulty(monkeypatch, lambda path: os._exit(11))
    _check(_index(folder, NAMES), folder, "crashes the process that reads it")


def test_files_that_hang_are_bad_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make_faulty(monkeypatch, lambda path: time.sleep(1000))
    monkeypatch.setattr(parallel, "FILE_TIMEOUT_S", 0.5)
    monkeypatch.setattr(parallel, "POLL_S", 0.05)
    _check(_index(folder, NAMES), folder, "not read within ")


def test_one_death_is_forgiven(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die_once(path: str) -> None:
        if not (folder / f"{path}.tried").exists():
            (folder / f"{path}.tried").touch()
            os._exit(9)

    _make_faulty(monkeypatch, die_once)
    assert _index(folder, NAMES) == {name: index_file(folder, name) for name in NAMES}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_process_that_is_stopped_is_replaced_without_blame(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop_once(path: str) -> None:
        if not (folder / f"{path}.tried").exists():
            (folder / f"{path}.tried").touch()
            os.kill(os.getpid(), signal.SIGSTOP)

    _make_faulty(monkeypatch, stop_once)
    monkeypatch.setattr(parallel, "FILE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(parallel, "POLL_S", 0.05)
    assert _index(folder, NAMES) == {name: index_file(folder, name) for name in NAMES}


def test_a_file_that_vanishes_is_a_bad_file(folder: Path) -> None:
    for num_workers in (0, 2):
        gone = _index(folder, [*NAMES, "gone.mp4"], num_workers=num_workers)["gone.mp4"]
        assert isinstance(gone, BadFile) and "No such file" in gone.reason
