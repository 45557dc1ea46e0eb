from types import SimpleNamespace

import pytest
import torch

from worldmodel.training import timing
from worldmodel.training.timing import StepTimes

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Its `now_s` is what the processor's clock shows."""
    clock = SimpleNamespace(now_s=100.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now_s)
    return clock


def test_parts_are_told_per_step_and_forgotten(clock: SimpleNamespace) -> None:
    times = StepTimes(CPU)
    for step in range(2):
        with times("step"):
            for part_s in (1.0, 2.0):
                with times("forward"):
                    clock.now_s += part_s + step
            clock.now_s += 0.5
    assert times.means(2) == {"forward_s": 4.0, "step_s": 4.5}
    assert times.means(2) == {}


def test_a_block_that_raises_is_not_counted(clock: SimpleNamespace) -> None:
    times = StepTimes(CPU)
    with pytest.raises(ValueError, match="broken"), times("forward"):
        clock.now_s += 1
        raise ValueError("broken")
    assert times.means(1) == {}


def test_no_step_waits_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for CUDA's events: the device is done with one only once somebody waits for it."""
    waited: list[float] = []
    device = SimpleNamespace(now_ms=0.0, done_ms=-1.0)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at_ms = device.now_ms

        def query(self) -> bool:
            return self.at_ms <= device.done_ms

        def synchronize(self) -> None:
            waited.append(self.at_ms)
            device.done_ms = max(device.done_ms, self.at_ms)

        def elapsed_time(self, later: "Event") -> float:
            assert self.query() and later.query(), "read before it was done"
            return later.at_ms - self.at_ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    times = StepTimes(torch.device("cuda"))

    def step() -> None:
        with times("step"):
            with times("forward"):
                device.now_ms += 30
            device.now_ms += 10

    step()
    step()
    assert len(times._pending) == 4
    device.done_ms = device.now_ms
    step()
    assert not waited and len(times._pending) == 2
    assert times.means(3) == pytest.approx({"forward_s": 0.03, "step_s": 0.04})
    assert waited
