"""Effects on the whole process that only a command may have: threads, memory, cores and signal handlers."""

import ctypes
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.errors import one_line_logger
from data_pipelines.processes import environment_int

if TYPE_CHECKING:
    from worldmodel.config import TrainConfig

logger = one_line_logger(__name__)

ECHO_S = 2.0
"""A signal to a process group arrives twice, because launchers pass it on. So soon it is not a second request."""


def prepare_process(config: "TrainConfig", resumed: Path | None = None) -> None:
    """Set the threads, the memory allocator and the cores of this process for training.

    Call it before training starts its own processes and threads.

    resumed: the folder of a run that continues, if it has a checkpoint.

    Raises:
        UserError: LOCAL_WORLD_SIZE or LOCAL_RANK is not a valid number, or the state of the checkpoint is damaged.
    """
    from worldmodel.training.machine import uses_gpu

    set_threads(config.num_threads or (resumed and threads_of_run(resumed)) or threads_alongside_others())
    keep_freed_memory()
    if environment_int("LOCAL_WORLD_SIZE", 1, least=1) > 1 and not uses_gpu():
        pin_to_own_cores(environment_int("LOCAL_RANK", 0))


def set_threads(num_threads: int | None) -> None:
    """Set the number of threads that torch computes with. None: this process's share of the cores."""
    import torch

    from worldmodel.training.machine import fair_share_of_cores

    torch.set_num_threads(num_threads or fair_share_of_cores())


def threads_of_run(run: Path) -> int | None:
    """Return the threads of the latest checkpoint of a run if this process's share of the cores is as large as then.

    Rounding depends on the number of threads.
    """
    from worldmodel.runs.checkpoint import latest_state
    from worldmodel.training.machine import fair_share_of_cores

    state = latest_state(run) or {}
    threads = state.get("num_threads")
    known = isinstance(threads, int) and 1 <= threads <= fair_share_of_cores() == state.get("num_cores")
    return threads if known else None


def threads_alongside_others() -> int:
    """Return a thread for each core of this process's share that other programs leave free, at least one.

    A thread that shares its core with a busy program delays all others, which wait for it several hundred times in a
    step. Trainings that take turns, several processes of a training, and a GPU need no such care.
    """
    from worldmodel.training.machine import busy_cores, fair_share_of_cores, uses_gpu
    from worldmodel.training.turns import another_takes_turns

    share = fair_share_of_cores()
    if environment_int("LOCAL_WORLD_SIZE", 1, least=1) > 1 or uses_gpu() or another_takes_turns():
        return share
    free = max(1, share - busy_cores())
    if free < share:
        logger.warning(
            f"other programs keep {share - free} of {share} cores busy: "
            f"training with {free} thread{'s' * (free > 1)}; train.num_threads sets another number"
        )
    return free


def keep_freed_memory() -> None:
    """Stop glibc from returning freed memory to the system: fresh pages cost page faults in every step.

    It also stops glibc from using mmap for large blocks.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_max = -1, -4  # their numbers in malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def pin_to_own_cores(process: int) -> None:
    """Pin all threads of this training process, and its future children, to its own share of the cores (Linux).

    Processes wait for each other at every layer, so one that is moved onto another's core delays all. Without a core
    for each process, nothing is pinned.

    process: its number among the training processes of this machine.
    """
    from worldmodel.training.machine import CORES, fair_share_of_cores

    share = fair_share_of_cores()
    own = CORES[process * share : (process + 1) * share]
    if own and hasattr(os, "sched_setaffinity"):
        for thread in Path("/proc/self/task").iterdir():
            os.sched_setaffinity(int(thread.name), own)


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Catch SIGINT and SIGTERM. Yields a function that returns the number of the signal that arrived, or 0.

    Raises:
        KeyboardInterrupt: a second signal arrived after more than ECHO_S seconds.
    """
    caught: list[int] = []
    caught_s = 0.0

    def remember(signal_number: int, _frame: Any) -> None:
        nonlocal caught_s
        if not caught:
            caught.append(signal_number)
            caught_s = time.monotonic()
        elif time.monotonic() - caught_s > ECHO_S:
            raise KeyboardInterrupt  # a second request: do not wait for the step to finish

    previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: caught[0] if caught else 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
