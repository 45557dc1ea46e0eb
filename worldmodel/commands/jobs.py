"""The processes of `worldmodel compare`: train and evaluate runs, some at a time, each with a log file."""

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm.auto import tqdm

from data_pipelines.errors import UserError
from data_pipelines.files import write_text
from worldmodel.commands.exits import EXIT_USER_ERROR
from worldmodel.commands.grid import GridRun
from worldmodel.commands.process import stop_signals
from worldmodel.config import outside_names, to_yaml
from worldmodel.training.session import Interrupted

POLL_S = 0.2
LAUNCHER_GRACE_S = 30.0  # a launcher may end before its processes have saved
LINES_SHOWN = 12


@dataclass(frozen=True)
class Failure:
    """A run that failed. exit_code: 2 after a user's mistake."""

    run: GridRun
    exit_code: int
    message: str


def check_launcher(launch: str) -> None:
    """Check that the program of --launch exists.

    Raises:
        UserError: it does not.
    """
    try:
        program, *_ = shlex.split(launch) or [sys.executable]
    except ValueError as error:
        raise UserError(f"--launch {launch!r} cannot be split into words: {error}") from error
    if shutil.which(program) is None:
        raise UserError(f"--launch {launch!r}: there is no program {program!r}")


@contextmanager
def only_writer(out: Path) -> Iterator[int]:
    """Hold the lock of a folder and yield its descriptor. Child processes that inherit it also hold the lock.

    Raises:
        UserError: another process, or a child process that one left behind, still writes to the folder.
    """
    with open_regular(out / ".lock", os.O_WRONLY) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process still writes to {out}: wait for its end or choose another --out"
            ) from error
        yield file.fileno()


def open_regular(path: Path, flags: int) -> BinaryIO:
    """Open a file for writing, and create it if it does not exist.

    Raises:
        UserError: it cannot be written, or is a link.
    """
    try:
        # O_NONBLOCK: opening a FIFO would wait for a reader.
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}") from error
    return open(descriptor, "ab" if flags & os.O_APPEND else "wb", buffering=0)


def run_all(todo: Sequence[GridRun], total: int, jobs: int, launch: str, lock: int) -> list[Failure]:
    """Train and evaluate runs, `jobs` at a time. A run that fails does not stop the others.

    Raises:
        Interrupted: SIGINT or SIGTERM arrived; the child processes have saved their checkpoints.
    """
    waiting, failures = list(todo), list[Failure]()
    running: dict[subprocess.Popen[bytes], GridRun] = {}
    with stop_signals() as stop, tqdm(total=total, initial=total - len(todo), unit="run", miniters=0) as bar:
        try:
            while waiting or running:
                if number := stop():
                    bar.set_postfix_str("stopping")
                    interrupt(running)
                    raise Interrupted(number)
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running[start(run, launch, lock)] = run
                bar.set_postfix_str(", ".join(run.name for run in running.values()), refresh=False)
                bar.update(0)  # shows the time
                for child in [child for child in running if child.poll() is not None]:
                    run = running.pop(child)
                    if child.returncode:
                        failures.append(failure_of(run, child.returncode))
                        bar.write(failures[-1].message, file=sys.stderr)
                    bar.update()
                time.sleep(POLL_S)
        finally:
            for child in running:
                signal_group(child, signal.SIGKILL)
                child.wait()
    return failures


def start(run: GridRun, launch: str, lock: int) -> subprocess.Popen[bytes]:
    """Train and then evaluate a run in a process group, so that only this process receives Ctrl-C of a terminal."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    config = run.with_suffix(".yaml")
    write_text(config, to_yaml(run.config))  # as resolved now: later edits of the config file have no effect
    launcher = shlex.split(launch) or [sys.executable]
    trust = ["--trust-code"] if outside_names(run.config) else []
    train = shlex.join([*launcher, "-m", "worldmodel", "train", "--config", str(config), "--resume", *trust])
    evaluate = shlex.join(
        [sys.executable, "-m", "worldmodel", "evaluate", "--run", str(run.folder), "--allow-remote", *trust]
    )
    threads = {"OMP_NUM_THREADS": str(run.config.train.num_threads)} if run.config.train.num_threads else {}
    return start_logged(f"{train} && {evaluate}", run.with_suffix(".log.txt"), lock, environment=threads)


def start_logged(
    command: str, log: Path, lock: int, *, environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a shell command in a process group of its own. Its output is appended to a log.

    lock: a descriptor that the process inherits. environment: further variables. folder: where the command runs.

    Raises:
        UserError: the log cannot be written.
    """
    with open_regular(log, os.O_WRONLY | os.O_APPEND) as file:
        file.write(f"\n$ {command}\n".encode(errors="surrogateescape"))
        return subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={"PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "10", **os.environ, **(environment or {})},
            cwd=folder,
            process_group=0,
            pass_fds=(lock,),
        )


def interrupt(children: Iterable[subprocess.Popen[bytes]]) -> None:
    """Ask all child processes to save and stop, and wait for them, and for a while for their own children."""
    for child in children:
        signal_group(child, signal.SIGINT)
    for child in children:
        child.wait()
    deadline_s = time.monotonic() + LAUNCHER_GRACE_S
    while any(signal_group(child, 0) for child in children) and time.monotonic() < deadline_s:
        time.sleep(POLL_S)


def signal_group(child: subprocess.Popen[bytes], number: int) -> bool:
    """Send a signal to a child process and its own children. Return whether any of them is left."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)
        return True
    return False


def failure_of(run: GridRun, exit_code: int) -> Failure:
    """Read the reason of a failure from the run's log."""
    code, message = reason_of(run.with_suffix(".log.txt"), exit_code)
    return Failure(run, code, f"{run.name}: {message}")


def reason_of(path: Path, exit_code: int) -> tuple[int, str]:
    """Return the exit code and the reason of the last failure in a log.

    The reason is the one line of a user's mistake, otherwise the last lines. A launcher may replace the exit code of a
    user's mistake; it is restored.
    """
    _, _, last = path.read_text(encoding="utf-8", errors="replace").rpartition("\n$ ")
    lines = [line.rstrip() for line in last.splitlines()[1:] if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return EXIT_USER_ERROR, errors[-1]
    shown = "".join(f"\n    {line}" for line in lines[-LINES_SHOWN:])
    return exit_code, f"failed with exit code {exit_code}, see {path}{shown}"
