"""Many files at once: whatever one of them does to the process that reads it, the others are indexed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipelines import index_engines
from data_pipelines.index_engines import Engine, index_files
from data_pipelines.probe import BadFile, Video, index_file
from tests.conftest import REPO

NAMES = [f"{i}.mp4" for i in range(8)]


@pytest.fixture
def folder(tmp_path: Path, write_video: Any) -> Path:
    data = write_video(tmp_path / NAMES[0]).read_bytes()
    for name in NAMES[1:]:
        (tmp_path / name).write_bytes(data)
    return tmp_path


def _index(root: Path, paths: list[str], engine: Engine = "local", num_workers: int = 2) -> dict[str, Video | BadFile]:
    entries = list(index_files(root, paths, engine=engine, num_workers=num_workers, progress=False))
    assert len(entries) == len(paths)
    return {entry.path: entry for entry in entries}


def _make_faulty(monkeypatch: pytest.MonkeyPatch, act: Callable[[str], object]) -> None:
    """The files 3 and 4 (one of each process's), and the very last one."""

    def faulty(root: str | Path, path: str, *limit: int) -> Video | BadFile:
        if path in ("3.mp4", "4.mp4", "7.mp4"):
            act(path)
        return index_file(root, path, *limit)

    monkeypatch.setattr(index_engines, "index_file", faulty)
    monkeypatch.setattr(index_engines, "FILES_PER_TASK", 2)


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
    monkeypatch.setattr(index_engines, "FILE_TIMEOUT_S", 0.5)
    monkeypatch.setattr(index_engines, "POLL_S", 0.05)
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
    monkeypatch.setattr(index_engines, "FILE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(index_engines, "POLL_S", 0.05)
    assert _index(folder, NAMES) == {name: index_file(folder, name) for name in NAMES}


def test_a_file_that_vanishes_is_a_bad_file(folder: Path) -> None:
    for num_workers in (0, 2):
        gone = _index(folder, [*NAMES, "gone.mp4"], num_workers=num_workers)["gone.mp4"]
        assert isinstance(gone, BadFile) and "No such file" in gone.reason


ON_RAY = """
import os, sys
from pathlib import Path
from data_pipelines import index_engines
from data_pipelines.errors import UserError
from data_pipelines.index import index_folder

index_engines.FILES_PER_TASK = 3
root = Path(sys.argv[1])
local = index_folder(root, num_workers=0, progress=False)
[path.unlink() for path in root.glob(".worldmodel_index.jsonl")]
assert index_folder(root, engine="ray", num_workers=2, progress=False) == local
reasons = [entry.reason for entry in local if hasattr(entry, "reason")]
assert reasons == ["a file that is empty (0 bytes)", "No such file or directory"]
assert len(local) == 10
try:
    list(index_engines.index_files(root / "missing", ["a.mp4"], engine="ray", num_workers=2, progress=False))
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_ray_gives_the_same_index_with_the_same_code(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A changed copy of the package, not the one that is installed, is what runs here and must run on Ray."""
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "gone.mp4").symlink_to(folder / "nowhere")
    copy = tmp_path_factory.mktemp("code")
    shutil.copytree(REPO / "data_pipelines", copy / "data_pipelines", ignore=shutil.ignore_patterns("__pycache__"))
    probe = copy / "data_pipelines" / "probe.py"
    probe.write_text(probe.read_text(encoding="utf-8").replace("empty file", "a file that is empty"), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(copy)!r})\n{ON_RAY}", str(folder)],
        capture_output=True, text=True, timeout=240, cwd=folder, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "missing' is not a folder on the Ray node" in done.stdout


def test_ray_that_is_not_installed_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(index_engines.UserError, match=r"engine=ray .*pip install 'worldmodel\[ray\]'"):
        _index(folder, NAMES, engine="ray")
