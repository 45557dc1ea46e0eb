"""The lock of a run folder: one training at a time.

It is a POSIX record lock on RUN/.lock. The system releases it when the process ends, by whatever signal, and forked
processes do not inherit it. A process loses it when it closes any descriptor of the file, so nothing else opens it.
"""

import errno
import fcntl
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_pipelines.errors import UserError, one_line_logger
from worldmodel.runs.folder import RunFolder

logger = one_line_logger(__name__)

_held: set[tuple[int, int]] = set()
"""Device and inode of the lock files that this process holds. The system would let it lock them again."""


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the lock of a run folder, and create the folder if it is missing.

    On a file system without locks, it logs a warning and holds nothing.

    Raises:
        UserError: another training holds the lock, or the folder cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        number = _locked(run)
    except OSError as error:
        raise UserError(f"cannot write to run_dir={run}: {error.strerror or error}") from error
    if number is None:
        yield
        return
    status = os.fstat(number)
    inode = (status.st_dev, status.st_ino)
    _held.add(inode)
    try:
        yield
    finally:
        with suppress(OSError):
            if _is_at(RunFolder(run).lock, inode):
                os.unlink(RunFolder(run).lock)
        _held.discard(inode)
        os.close(number)


def _locked(run: Path) -> int | None:
    """Return a descriptor that holds the lock of a folder, or None if the file system has no locks."""
    path = RunFolder(run).lock
    while True:
        with suppress(FileNotFoundError):
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"'{path}' is not a regular file: remove it")
            if (status.st_dev, status.st_ino) in _held:  # closing another descriptor of it would release it
                raise _in_use(run, f"process {os.getpid()} on {socket.gethostname()}, this one")
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            content = os.read(number, 300)
            os.close(number)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = re.match(
                    rb"(\d{1,10}) ([\w.-]{1,255})\n", content
                )  # no match: it has only just locked the file
                named = f"process {holder[1].decode()} on {holder[2].decode()}" if holder else "another process"
                raise _in_use(run, named) from None
            logger.warning(
                "%s: the file system has no locks (%s): do not start two trainings in this folder",
                run,
                error.strerror,
            )
            return None
        status = os.fstat(number)
        if _is_at(path, (status.st_dev, status.st_ino)):
            os.ftruncate(number, 0)
            os.pwrite(number, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
            return number
        os.close(number)  # the last holder removed it in between: try the present file


def _is_at(path: Path, inode: tuple[int, int]) -> bool:
    """Return True if a path leads to this file."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return (status.st_dev, status.st_ino) == inode


def _in_use(run: Path, process: str) -> UserError:
    return UserError(
        f"run_dir={run} is being trained by {process}: wait until it ends, stop it, or choose another run_dir"
    )
