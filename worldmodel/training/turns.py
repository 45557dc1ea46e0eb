"""Trainings that share all cores of a machine take turns, of one step each or of some short ones.

Two trainings with as many threads as there are cores delay each other at every barrier of OpenMP: a thread that the
others wait for has to wait itself until the scheduler takes a core from the other training. Taking turns avoids that.
It changes no result.
"""

import fcntl
import math
import os
import tempfile
import threading
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

TURN_S = 0.25
"""A turn lasts at least so long if steps follow each other at once: the first one of a turn finds the caches cold."""
IDLE_S = 0.02
"""A turn ends if no step begins in this time: its training waits for data, evaluates or writes a checkpoint."""
PATIENCE_S = 5.0
"""A training that has waited so long computes without its turn: another one may be suspended, or have long steps."""
PAUSE_S = 60.0
"""It then takes no turns for this time."""
POLL_S = 0.002
SLEEP_SHARE = 0.5
"""Share of the last wait that a training sleeps at once. Each time it wakes up, it takes a core from the one that
computes, whose other threads wait for that. But turns differ in length, and who sleeps too long leaves the cores idle.
"""
MEMBERS = "members"


class Turns:
    """A context for the computation of one step, in which no other training with a `Turns` of this folder computes.

    Between the steps of a turn a thread watches that they follow each other at once. A training that has just had its
    turn lets those go first that wait already: whoever holds the file `next` is the next one to get the file `now`. All
    share a lock of the file `members` (`another_takes_turns`). The files are locked, not written, so a killed training
    leaves no trace. Without a file system that can lock, there are no turns, nor in a folder or link of another user,
    who could lead elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, int] = {}
        self._waits_s = {"next": 0.0, "now": 0.0}  # the last ones
        self._state = threading.Lock()  # of the next two
        self._has_turn = False
        self._left_s: float | None = None  # the end of a step after which the turn continues
        self._began_s = 0.0
        self._closed = threading.Event()
        self._watch: threading.Thread | None = None
        self._paused_until_s = -math.inf
        with suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            if folder.lstat().st_uid != os.getuid():
                return
            for name in ("next", "now", MEMBERS):
                self._files[name] = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._files[MEMBERS], fcntl.LOCK_SH | fcntl.LOCK_NB)

    def __enter__(self) -> None:
        with self._state:
            if self._left_s is not None:
                self._left_s = None
                return
        started_s = time.monotonic()
        if "now" not in self._files or started_s < self._paused_until_s:
            return
        deadline_s = started_s + PATIENCE_S
        self._has_turn = self._waited("next", deadline_s) and self._waited("now", deadline_s)
        fcntl.flock(self._files["next"], fcntl.LOCK_UN)
        self._began_s = time.monotonic()
        if not self._has_turn:
            self._paused_until_s = self._began_s + PAUSE_S

    def _waited(self, name: str, deadline_s: float) -> bool:
        """Lock a file, and return whether that was possible before the deadline."""
        started_s = time.monotonic()
        is_locked = _locked(self._files[name], deadline_s, SLEEP_SHARE * self._waits_s[name])
        self._waits_s[name] = time.monotonic() - started_s if is_locked else 0.0
        return is_locked

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended_s = time.monotonic()
        with self._state:
            if kind is None and self._has_turn and ended_s - self._began_s < TURN_S:
                self._left_s = ended_s
            else:
                self._end_turn()
        if self._left_s is not None and self._watch is None:
            self._watch = threading.Thread(target=self._end_idle_turns, daemon=True)
            self._watch.start()

    def _end_turn(self) -> None:
        self._left_s, self._has_turn = None, False
        if "now" in self._files:
            fcntl.flock(self._files["now"], fcntl.LOCK_UN)

    def _end_idle_turns(self) -> None:
        while not self._closed.wait(IDLE_S):
            with self._state:
                if self._left_s is not None and time.monotonic() - self._left_s > IDLE_S:
                    self._end_turn()

    def close(self) -> None:
        """Close the files. Further steps do not wait."""
        self._closed.set()
        if self._watch is not None:
            self._watch.join()
        with self._state:
            self._end_turn()
        while self._files:
            os.close(self._files.popitem()[1])


def _locked(file: int, deadline_s: float, first_pause_s: float = 0.0) -> bool:
    """Lock a file, and return whether that was possible before the deadline.

    first_pause_s: the time after which it is tried for the second time.
    """
    pause_s = max(first_pause_s, POLL_S)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                return False
            time.sleep(pause_s)
            pause_s = POLL_S
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
