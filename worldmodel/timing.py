"""How the benchmarks time things."""

import time
from collections.abc import Callable, Sequence

import torch
from tqdm.auto import tqdm


def seconds_in_turns(
    calls: Sequence[Callable[[], object]], repeats: int, name: str, device: torch.device | None = None
) -> list[list[float]]:
    """Times of each call, which take turns, so that a load that comes and goes hits all; after one round that is not
    counted. A GPU given as `device` has finished before a clock is read."""
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
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
