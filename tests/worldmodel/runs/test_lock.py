"""One training at a time in a run folder; nothing is left of one that is killed."""

import errno
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.errors import UserError
from tests.conftest import REPO, script_environment
from tests.worldmodel.runs.checkpoints import make, saved_steps
from tests.worldmodel.training.test_loop import DEMO, wait_for_step
from worldmodel.config import Config
from worldmodel.runs.checkpoint import remove_leftovers, save_checkpoint
from worldmodel.runs.lock import run_lock
from worldmodel.runs.tracking import Tracker
from worldmodel.training.loop import train
from worldmodel.training.machine import child_processes

HOLD = """
import os, sys, time
from pathlib import Path
from worldmodel.runs.lock import run_lock
with run_lock(Path(sys.argv[1])):
    if os.fork() == 0:
        time.sleep(60)  # a worker that outlives it
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the lock of tmp_path/run, and has forked another one since."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPO,
        env=script_environment(),
        start_new_session=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline().strip() == str(process.pid)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_folder_in_use_is_refused_until_its_process_dies(
    holder: "subprocess.Popen[str]", tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / "config.yaml").write_text("not: looked at")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    line = f"run_dir={run} is being trained by process {holder.pid} on {socket.gethostname()}: wait until it ends"
    choices: list[dict[str, Any]] = [{}, {"resume": True}, {"overwrite": True}]
    for flags in choices:
        with pytest.raises(UserError, match=f"^{re.escape(line)}"):
            train(tiny_config(), **flags)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    holder.kill()
    holder.wait()
    (run / "config.yaml").unlink()
    assert (run / ".lock").exists()
    train(tiny_config("train.steps=1"))
    assert not (run / ".lock").exists()


def test_a_process_does_not_lock_twice_and_keeps_what_it_has(
    tmp_path: Path, tiny_config: Callable[..., Config]
) -> None:
    with run_lock(tmp_path / "run"):
        for _ in range(2):
            with pytest.raises(UserError, match=f"is being trained by process {os.getpid()} on .*, this one"):
                train(tiny_config())
        code = "from worldmodel.runs.lock import run_lock as lock; import pathlib, sys"
        code += "\nwith lock(pathlib.Path(sys.argv[1])): 0"
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "run")],
            cwd=REPO,
            env=script_environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1 and f"is being trained by process {os.getpid()} on" in done.stderr
    assert not list((tmp_path / "run").iterdir())


def test_a_lock_that_was_removed_by_its_last_holder_is_not_taken_for_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removed between opening and locking."""
    lockf = fcntl.lockf
    opened: list[int] = []

    def removed_before(number: int, operation: int) -> None:
        if not opened:
            (tmp_path / ".lock").unlink()
        opened.append(os.fstat(number).st_ino)
        lockf(number, operation)

    monkeypatch.setattr(fcntl, "lockf", removed_before)
    with run_lock(tmp_path):
        assert len(opened) == 2 and (tmp_path / ".lock").stat().st_ino == opened[1]


def test_without_locks_there_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with run_lock(tmp_path):
        assert "the file system has no locks (No locks available)" in caplog.text


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_a_lock_that_is_not_a_file_is_refused(tmp_path: Path, kind: str) -> None:
    lock, precious = tmp_path / "run" / ".lock", tmp_path / "precious"
    lock.parent.mkdir()
    precious.write_text("years")
    {"link": lambda: lock.symlink_to(precious), "fifo": lambda: os.mkfifo(lock), "folder": lock.mkdir}[kind]()
    with pytest.raises(UserError, match="is not a regular file: remove it"), run_lock(lock.parent):
        raise AssertionError
    assert precious.read_text() == "years"


def test_a_folder_that_a_kill_left_before_its_config_is_taken(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    for name in (".lock", ".config.yaml.partial"):
        (tmp_path / "run" / name).write_text("cut sh")
    train(tiny_config("train.steps=1"), resume=True)


def test_a_refused_folder_keeps_no_lock(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="does not hold a run"):
        train(tiny_config())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_the_lock_is_held_until_training_ends(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []
    monkeypatch.setattr(Tracker, "close", lambda _: held.append((tmp_path / "run" / ".lock").read_text()))
    train(tiny_config("train.steps=1"))
    assert held == [f"{os.getpid()} {socket.gethostname()}\n"]


def test_nothing_is_left_of_a_main_process_that_is_killed(tiny_overrides: list[str], tmp_path: Path) -> None:
    shared = set(os.listdir("/dev/shm"))
    endless = ["train.steps=100000", "train.checkpoint_every=1", "train.eval_every=100000", "data.num_workers=2"]
    process = subprocess.Popen(
        [sys.executable, str(REPO / "scripts" / "train.py"), *DEMO, *tiny_overrides, *endless],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        cwd=REPO,
        env=script_environment(),
        start_new_session=True,
    )
    try:
        wait_for_step(process, tmp_path / "run", 3)
        workers = child_processes(process.pid)
        assert len(workers) >= 2
        os.kill(workers[0], signal.SIGSTOP)
        process.kill()
        process.wait()
        deadline_s = time.monotonic() + 2
        while any(map(is_alive, workers)) and time.monotonic() < deadline_s:
            time.sleep(0.02)
        assert not list(filter(is_alive, workers))
        assert set(os.listdir("/dev/shm")) <= shared
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "run" / ".lock").read_text().startswith(f"{process.pid} ")
    with run_lock(tmp_path / "run"):
        pass


def is_alive(pid: int) -> bool:
    """True for a process that runs or is stopped. One that ended stays a zombie until init looks at it."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


def test_checkpoints_of_no_index_and_files_written_aside_are_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, make(step), keep=2, is_best=step == 1)
    folder = tmp_path / "checkpoints"
    for name in ("step_00000007", ".step_00000008.partial", "notes"):
        shutil.copytree(folder / "step_00000003", folder / name)
    for name in ("step_00000009", ".step_00000010.partial"):
        (folder / name).symlink_to(folder / "notes")
    shutil.copytree(folder / "step_00000003", folder / "step_00000006")
    (folder / "step_00000006" / "state.json").unlink()  # killed in the middle of the removal
    (folder / "step_00000011").mkdir()
    (folder / "step_00000011" / "thesis.tex").write_text("years")
    shutil.copytree(folder / "step_00000011", folder / ".step_00000012.partial")
    (folder / ".step_00000013.partial").mkdir()
    (folder / ".step_00000013.partial" / ".model.safetensors.partial").write_bytes(b"cut sh")
    for path in (folder / ".index.json.partial", tmp_path / ".metrics.jsonl.partial", tmp_path / ".mine.partial"):
        path.write_text("cut sh")
    remove_leftovers(tmp_path)
    assert {path.name for path in folder.iterdir()} == {
        *("index.json", "notes", ".step_00000010.partial", ".step_00000012.partial"),
        *(f"step_{step:08d}" for step in (1, 2, 3, 9, 11)),
    }
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", ".mine.partial"}


def test_without_the_latest_checkpoint_nothing_is_an_orphan(tmp_path: Path) -> None:
    remove_leftovers(tmp_path)
    save_checkpoint(tmp_path, make(1), keep=2, is_best=False)
    shutil.copytree(tmp_path / "checkpoints" / "step_00000001", tmp_path / "checkpoints" / "step_00000002")
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000001")
    remove_leftovers(tmp_path)
    (tmp_path / "checkpoints" / "index.json").unlink()
    remove_leftovers(tmp_path)
    assert saved_steps(tmp_path) == ["step_00000002"]


def test_a_training_removes_what_a_kill_left(tiny_config: Callable[..., Config]) -> None:
    run = train(tiny_config("train.keep_checkpoints=1"))
    shutil.copytree(run / "checkpoints" / "step_00000006", run / "checkpoints" / "step_00000002")
    train(tiny_config("train.keep_checkpoints=1"), resume=True)
    assert saved_steps(run) == ["step_00000006"]
