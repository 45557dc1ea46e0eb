"""Turns of trainings: one computes at a time, one after the other, and none waits for ever."""

import math
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from worldmodel.training import turns
from worldmodel.training.turns import Turns, turns_here


@pytest.fixture
def one_step_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is as long as a turn."""
    monkeypatch.setattr(turns, "TURN_S", 0.0)


@pytest.mark.usefixtures("one_step_each")
def test_trainings_alternate_and_no_two_compute_at_once(tmp_path: Path) -> None:
    one, other = Turns(tmp_path / "turns"), Turns(tmp_path / "turns")
    order: list[str] = []

    def second() -> None:
        for _ in range(3):
            with other:
                order.append("other")

    with one:
        thread = threading.Thread(target=second)
        thread.start()
        while turns._locked(one._files["next"], 0.0):  # until the other is the next one
            turns.fcntl.flock(one._files["next"], turns.fcntl.LOCK_UN)
        assert not order
        order.append("one")
    with one:
        assert order[:2] == ["one", "other"]  # the one that waited has had its turn
    thread.join()
    assert order == ["one", *["other"] * 3]


def is_free(one: Turns) -> bool:
    """Return True if no training has its turn. `one` does not have it when it asks."""
    free = turns._locked(one._files["now"], -math.inf)
    if free:
        turns.fcntl.flock(one._files["now"], turns.fcntl.LOCK_UN)
    return free


def test_short_steps_share_a_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "IDLE_S", 3600.0)
    clock = [0.0]
    monkeypatch.setattr(turns.time, "monotonic", lambda: clock[0])
    one, other = Turns(tmp_path / "turns"), Turns(tmp_path / "turns")
    for now_s, ends in ((0.0, False), (0.1, False), (0.2, False), (0.3, True), (0.4, False)):
        with one:
            clock[0] = now_s
        assert is_free(other) == ends
    one._closed.set()
    with pytest.raises(KeyError), one:
        raise KeyError
    assert is_free(other)


def test_a_turn_ends_if_no_step_follows_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "TURN_S", 3600.0)
    one, other = Turns(tmp_path / "turns"), Turns(tmp_path / "turns")
    with one:
        pass
    with other:  # waits for it
        assert not is_free(one)
    other.close()
    assert is_free(one)
    with one:
        assert one._left_s is None
    one.close()
    with one:
        pass


def test_a_training_sleeps_through_half_of_a_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Turns(tmp_path / "turns"), Turns(tmp_path / "turns")
    clock, pauses = [0.0], []

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        pauses.append(seconds)
        if clock[0] >= 1.0:
            one._end_turn()

    monkeypatch.setattr(turns.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(turns.time, "sleep", sleep)
    one.__enter__()
    with other:
        assert len(pauses) >= 1.0 / turns.POLL_S - 1
    other._end_turn()
    clock[0] = 0.0
    pauses.clear()
    one.__enter__()
    with other:
        assert pauses[0] == pytest.approx(0.5, rel=0.01)
        assert len(pauses) == pytest.approx(0.5 / turns.POLL_S, rel=0.1)
    other._end_turn()


@pytest.mark.usefixtures("one_step_each")
def test_a_suspended_training_delays_another_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suspended, other = Turns(tmp_path / "turns"), Turns(tmp_path / "turns")
    waits: list[float] = []
    monkeypatch.setattr(turns.time, "sleep", waits.append)
    clock = iter(range(1000))
    monkeypatch.setattr(turns.time, "monotonic", lambda: float(next(clock)))
    suspended.__enter__()
    with other:
        assert waits
    waits.clear()
    with other:
        assert not waits
    suspended.__exit__(None, None, None)
    monkeypatch.setattr(turns.time, "monotonic", lambda: 1e6)  # much later
    with other, pytest.raises(BlockingIOError):
        turns.fcntl.flock(suspended._files["now"], turns.fcntl.LOCK_EX | turns.fcntl.LOCK_NB)


def test_an_error_ends_the_turn(tmp_path: Path) -> None:
    one, other = Turns(tmp_path / "turns"), Turns(tmp_path / "turns")
    with pytest.raises(KeyError), one:
        raise KeyError
    with other:
        assert not turns._locked(one._files["now"], 0.0)


def test_without_a_folder_there_are_no_turns(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with Turns(tmp_path / "file" / "turns"), Turns(tmp_path / "file" / "turns"):
        pass


def test_a_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "turns").mkdir()
    monkeypatch.setattr(turns.os, "getuid", lambda: (tmp_path / "turns").stat().st_uid + 1)
    with Turns(tmp_path / "turns"), Turns(tmp_path / "turns"):
        assert not list((tmp_path / "turns").iterdir())


@pytest.mark.parametrize(
    ("threads", "processes", "device", "takes_turns"),
    [(4, 1, "cpu", True), (3, 1, "cpu", True), (2, 1, "cpu", False), (4, 2, "cpu", False), (4, 1, "cuda", False)],
)
def test_only_a_training_that_takes_most_cores_takes_turns(
    threads: int, processes: int, device: str, takes_turns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "CORES", [0, 1, 2, 3])
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(turns.tempfile, "gettempdir", lambda: str(tmp_path))
    accelerator: Any = SimpleNamespace(device=torch.device(device), num_processes=processes)
    with turns_here(accelerator) as own:
        assert isinstance(own, Turns if takes_turns else nullcontext)
        with own:
            pass
    assert bool(list(tmp_path.iterdir())) == takes_turns
