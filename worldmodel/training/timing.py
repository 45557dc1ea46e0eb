"""Timing of benchmarks and of the parts of training steps."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch.profiler import record_function
from tqdm.auto import tqdm


def seconds_in_turns(
    calls: Sequence[Callable[[], object]], repeats: int, name: str, device: torch.device | None = None
) -> list[list[float]]:
    """Time calls in turns, so that other load on the machine affects all alike, and return the seconds of each call.

    A first round is not counted. A GPU given as `device` is synchronised before a clock is read.
    """
    times: list[list[float]] = [[] for _ in calls]
    for turn in tqdm(range(repeats + 1), desc=name, unit="round"):
        for call, seconds in zip(calls, times, strict=True):
            synchronise(device)
            started_s = time.perf_counter()
            call()
            synchronise(device)
            if turn:
                seconds.append(time.perf_counter() - started_s)
    return times


def synchronise(device: torch.device | None) -> None:
    """Wait until a GPU has finished. Does nothing for other devices."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


class StepTimes:
    """Times the parts of training steps: `with times("forward"): ...`.

    On a GPU, CUDA events time each part without synchronising. Data loading shows only if the GPU was idle.
    """

    def __init__(self, device: torch.device) -> None:
        self.labelled = False
        """Label the parts in a profile, too, at about 20 microseconds each."""
        self._on_gpu = device.type == "cuda"
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the time of the block to that of a part. Blocks that raise are not counted."""
        if self._on_gpu:
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            started.record()
            with record_function(part) if self.labelled else nullcontext():
                yield
            ended.record()
            self._pending.append((part, started, ended))
            while self._pending and self._pending[0][2].query():  # free finished events early
                self._read()
        else:
            started_s = time.perf_counter()
            with record_function(part) if self.labelled else nullcontext():
                yield
            self._seconds[part] += time.perf_counter() - started_s

    def means(self, num_steps: int) -> dict[str, float]:
        """Return the seconds per step of each part, {"forward_s": ...}, over the `num_steps` steps since the last call.

        Waits for a GPU.
        """
        while self._pending:
            self._pending[0][2].synchronize()
            self._read()
        seconds, self._seconds = self._seconds, defaultdict(float)
        return {f"{part}_s": total / num_steps for part, total in seconds.items()}

    def _read(self) -> None:
        part, started, ended = self._pending.popleft()
        self._seconds[part] += started.elapsed_time(ended) / 1000
