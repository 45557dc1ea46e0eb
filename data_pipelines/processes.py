"""Worker processes: starting them, noticing those that hang, and ending them with their parent."""

import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Hashable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from data_pipelines.errors import UserError

POLL_S = 1.0
LONGEST_STEP_S = 2 * POLL_S  # the most that a call of waited_s adds
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def environment_int(name: str, default: int, least: int = 0) -> int:
    """Return a whole number of at least `least` from the environment. Raises UserError: it is not one."""
    text = os.environ.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"\s*\d{1,9}\s*", text, re.ASCII) or int(text) < least:
        raise UserError(
            f"the environment variable {name}={text[:40]!r} is not a whole number of at least {least}: unset it, or "
            "start the processes with a launcher that sets it (accelerate launch, torchrun)"
        )
    return int(text)


def worker_context() -> Any:
    """Return the multiprocessing context of workers: on Linux they are forked, so a script needs no __main__ guard."""
    return get_context("fork" if sys.platform == "linux" else "spawn")


def spawned_pool(num_processes: int) -> ProcessPoolExecutor:
    """Return a pool of fresh processes, which ignore Ctrl-C and end with this process, even if it is killed."""
    return ProcessPoolExecutor(
        num_processes, mp_context=get_context("spawn"), initializer=_begin_in_pool, initargs=(Parent.here(),)
    )


def _begin_in_pool(parent: "Parent") -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent.take_along()


@contextmanager
def ending(pool: Executor) -> Iterator[Executor]:
    """Use a pool. After an error its workers end when their current jobs are done, after Ctrl-C at once."""
    try:
        yield pool
    except KeyboardInterrupt:
        # Python 3.14 has a method for this.
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Parent:
    """The process that starts workers, as seen by them."""

    pid: int
    in_main_thread: bool

    @classmethod
    def here(cls) -> "Parent":
        """Return this process. Call it from the thread that starts the workers."""
        return cls(os.getpid(), threading.current_thread() is threading.main_thread())

    def is_gone(self) -> bool:
        """Return whether the parent has ended. Call it in a worker."""
        return os.getppid() != self.pid

    def take_along(self) -> None:
        """End this process when the parent ends, even if this process is stopped at that time.

        Linux sends the signal when that *thread* of the parent ends which forked this process. So only workers of the
        main thread request it. The others, and all workers on other systems, must check is_gone() from time to time.
        """
        if sys.platform == "linux" and self.in_main_thread:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if self.is_gone():  # it ended before the request
            os._exit(1)


class Patience:
    """A clock of the seconds that a worker spends on one task while this process waits.

    Time during which this process was stopped or suspended does not count, because the worker was too.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start to wait."""
        self._task: Hashable = None
        self._waited_s = 0.0
        self._looked_s = time.monotonic()

    def waited_s(self, task: Hashable) -> float:
        """Return the seconds since `task` was first passed. Call it about every POLL_S seconds."""
        now_s = time.monotonic()
        passed_s, self._looked_s = min(now_s - self._looked_s, LONGEST_STEP_S), now_s
        self._waited_s = self._waited_s + passed_s if task == self._task else 0.0
        self._task = task
        return self._waited_s


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped by a signal such as SIGSTOP. False on systems without /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"T"
    except (OSError, IndexError):
        return False
