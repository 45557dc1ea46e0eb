"""Trainings that share all cores of a machine take turns, one step each.

Two trainings with as many threads as there are cores delay each other at every barrier of OpenMP: a thread that the
others wait for has to wait itself until the scheduler takes a core from the other training. Taking turns avoids that.
It changes no result.
"""

import fcntl
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from worldmodel.training.machine import CORES

if TYPE_CHECKING:
    from accelerate import Accelerator

PATIENCE_S = 5.0
"""A training that has waited so long computes without its turn: another one may be suspended, or have long steps."""
PAUSE_S = 60.0
"""It then takes no turns for this time."""
POLL_S = 0.001
MEMBERS = "members"


class Turns:
    """A context for the computation of one step, in which no other training with a `Turns` of this folder computes.

    A training that has just had its turn lets those go first that wait already: whoever holds the file `next` is the
    next one to get the file `now`. All share a lock of the file `members` (`another_takes_turns`). The files are
    locked, not written, so a killed training leaves no trace. Without a file system that can lock, there are no turns,
    nor in a folder or link of another user, who could lead elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, int] = {}
        self._paused_until_s = -math.inf
        with suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            if folder.lstat().st_uid != os.getuid():
                return
            for name in ("next", "now", MEMBERS):
                self._files[name] = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._files[MEMBERS], fcntl.LOCK_SH | fcntl.LOCK_NB)

    def __enter__(self) -> None:
        started_s = time.monotonic()
        if "now" not in self._files or started_s < self._paused_until_s:
            return
        following, now = self._files["next"], self._files["now"]
        deadline_s = started_s + PATIENCE_S
        has_turn = _locked(following, deadline_s) and _locked(now, deadline_s)
        fcntl.flock(following, fcntl.LOCK_UN)
        if not has_turn:
            self._paused_until_s = time.monotonic() + PAUSE_S

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if "now" in self._files:
            fcntl.flock(self._files["now"], fcntl.LOCK_UN)

    def close(self) -> None:
        """Close the files. Further steps do not wait."""
        while self._files:
            os.close(self._files.popitem()[1])


def _locked(file: int, deadline_s: float) -> bool:
    """Lock a file, and return whether that was possible before the deadline."""
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                return False
            time.sleep(POLL_S)
        except OSError:
            return False
        else:
            return True


@contextmanager
def turns_here(accelerator: "Accelerator") -> Iterator[AbstractContextManager[None]]:
    """Yield the context for each step of a training on this machine.

    It takes turns with the other trainings of this user. It does nothing for a training that leaves cores for another
    one, that is on a GPU, or that has several processes, which wait for each other within a step.
    """
    is_alone = accelerator.device.type == "cpu" and accelerator.num_processes == 1
    if not is_alone or 2 * torch.get_num_threads() <= len(CORES):
        yield nullcontext()
        return
    turns = Turns(_folder())
    try:
        yield turns
    finally:
        turns.close()


def another_takes_turns() -> bool:
    """Return True if a training of this user takes turns on these cores."""
    with suppress(OSError):
        file = os.open(_folder() / MEMBERS, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file)
    return False


def _folder() -> Path:
    """Return the folder of the turns of this user's trainings on these cores."""
    cores = f"{CORES[0]}-{CORES[-1]}-of-{len(CORES)}"
    return Path(tempfile.gettempdir()) / f"worldmodel-turns-{os.getuid()}-{cores}"
