"""The number of threads of a training: that of its run, or of the cores that other programs leave free."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from data_pipelines.errors import UserError
from worldmodel.commands import process
from worldmodel.commands.process import threads_alongside_others, threads_of_run
from worldmodel.config import Config
from worldmodel.runs.checkpoint import latest_state
from worldmodel.training import machine, turns
from worldmodel.training.machine import busy_cores
from worldmodel.training.turns import Turns, another_takes_turns

NUM_CORES = len(machine.CORES)


class Times(NamedTuple):
    user: float
    system: float
    nice: float
    idle: float


def cores(*percent: tuple[float, float, float], total: float = 100) -> Callable[..., list[Times]]:
    """A psutil.cpu_times_percent that sees cores with so much user, system and low-priority time.

    total: the sum of the percentages that it reports for a core, below 100 for less than a second.
    """
    times = [Times(u, s, n, 100 - u - s - n) for u, s, n in percent]
    return lambda *_, **__: [Times(*(total / 100 * value for value in each)) for each in times]


@pytest.mark.parametrize("total", [100, 50, 10])
@pytest.mark.parametrize(
    ("load", "percent", "busy"),
    [
        (0.4, [(100, 0, 0)] * 4, 0),  # for less than half a minute
        (1.2, [(100, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0)], 1),
        (1.2, [(60, 30, 0), (4, 4, 0), (4, 4, 0), (4, 4, 0)], 1),
        (9.0, [(0, 0, 0)] * 4, 0),  # no longer
        (9.0, [(95, 5, 0)] * 4, 4),
        (1.7, [(95, 5, 0)] * 4, 2),
        (2.0, [(0, 0, 100)] * 4, 0),  # low priority
    ],
)
def test_busy_cores_are_busy_for_a_minute_and_now(
    load: float, percent: list[tuple[float, float, float]], busy: int, total: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "CORES", [0, 1, 2, 3])
    monkeypatch.setattr(machine.psutil, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(machine.psutil, "cpu_times_percent", cores(*percent, total=total))
    assert busy_cores() == busy


def test_the_cores_of_others_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CORES", [1, 7])  # the second one is not reported
    monkeypatch.setattr(machine.psutil, "getloadavg", lambda: (8.0, 0.0, 0.0))
    monkeypatch.setattr(machine.psutil, "cpu_times_percent", cores((100, 0, 0), (0, 0, 0), (100, 0, 0)))
    assert busy_cores() == 0


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], None]:
    """A function that makes so many of eight cores busy."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(machine, "fair_share_of_cores", lambda: 8)
    monkeypatch.setattr(machine, "uses_gpu", lambda: False)
    monkeypatch.setattr(turns.tempfile, "gettempdir", lambda: str(tmp_path))
    return lambda busy: monkeypatch.setattr(machine, "busy_cores", lambda: busy)


@pytest.mark.parametrize(("busy", "threads"), [(0, 8), (1, 7), (7, 1), (8, 1), (9, 1)])
def test_cores_that_others_keep_busy_are_left_to_them(
    busy: int, threads: int, eight_cores: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    eight_cores(busy)
    with caplog.at_level(logging.WARNING):
        assert threads_alongside_others() == threads
    said = f"other programs keep {8 - threads} of 8 cores busy: training with {threads} thread{'s' * (threads > 1)}; "
    assert caplog.messages == ([said + "train.num_threads sets another number"] if busy else [])


def test_trainings_that_take_turns_are_no_reason_for_fewer_threads(
    eight_cores: Callable[[int], None], tmp_path: Path
) -> None:
    eight_cores(8)
    assert not another_takes_turns()
    other = Turns(turns._folder())
    assert another_takes_turns() and threads_alongside_others() == 8
    third = Turns(turns._folder())
    other.close()
    assert another_takes_turns()
    third.close()
    assert not another_takes_turns() and threads_alongside_others() == 1


@pytest.mark.parametrize("case", ["processes", "gpu"])
def test_several_processes_and_gpus_do_not_look_at_the_load(
    case: str, eight_cores: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    eight_cores(8)
    if case == "processes":
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    else:
        monkeypatch.setattr(machine, "uses_gpu", lambda: True)
    assert threads_alongside_others() == 8


def test_a_run_continues_with_the_threads_that_it_had(
    trained_run: Path, tmp_path: Path, tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = latest_state(trained_run)
    assert state is not None and (state["num_threads"], state["num_cores"]) == (torch.get_num_threads(), NUM_CORES)
    assert threads_of_run(trained_run) == torch.get_num_threads()
    assert threads_of_run(tmp_path) is None

    threads: list[int | None] = []
    monkeypatch.setattr(process, "set_threads", threads.append)
    monkeypatch.setattr(process, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(process, "threads_alongside_others", lambda: 5)
    automatic = tiny_config("train.num_threads=null").train
    for train, run in ((tiny_config().train, trained_run), (automatic, trained_run), (automatic, tmp_path)):
        process.prepare_process(train, run)
    process.prepare_process(automatic)
    assert threads == [1, torch.get_num_threads(), 5, 5]


@pytest.mark.parametrize(
    "changed",
    [{"num_cores": NUM_CORES + 1}, {"num_threads": NUM_CORES + 1}, {"num_threads": 0}, {"num_threads": "1"}],
)
def test_threads_of_another_machine_are_not_taken_over(
    changed: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = {"num_threads": NUM_CORES, "num_cores": NUM_CORES}
    monkeypatch.setattr("worldmodel.runs.checkpoint.latest_state", lambda _: good)
    assert threads_of_run(tmp_path) == NUM_CORES
    monkeypatch.setattr("worldmodel.runs.checkpoint.latest_state", lambda _: good | changed)
    assert threads_of_run(tmp_path) is None
    monkeypatch.setattr("worldmodel.runs.checkpoint.latest_state", lambda _: {"step": 3})  # by an earlier version
    assert threads_of_run(tmp_path) is None


def test_several_processes_do_not_take_over_the_threads_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a share of the cores, which the threads of the one would exceed."""
    monkeypatch.setattr(machine, "CORES", [0, 1, 2, 3])
    monkeypatch.setattr("worldmodel.runs.checkpoint.latest_state", lambda _: {"num_threads": 2, "num_cores": 4})
    assert threads_of_run(tmp_path) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert threads_of_run(tmp_path) is None
    monkeypatch.setattr("worldmodel.runs.checkpoint.latest_state", lambda _: {"num_threads": 2, "num_cores": 2})
    assert threads_of_run(tmp_path) == 2


def test_a_damaged_state_is_named(trained_run: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step_00000006"
    checkpoint.mkdir(parents=True)
    index = json.loads((trained_run / "checkpoints" / "index.json").read_text())
    (tmp_path / "checkpoints" / "index.json").write_text(json.dumps(index))
    (checkpoint / "state.json").write_text("[]")
    with pytest.raises(UserError, match=r"is damaged: state\.json is not a JSON object"):
        latest_state(tmp_path)
