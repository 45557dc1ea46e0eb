"""benchmarks/kill_runs.py, and that it sees what it looks for."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import kill_runs
from benchmarks.kill_runs import Session, differences, faults_of, main, untimed_rows
from tests.conftest import REPO
from worldmodel.config import Config
from worldmodel.training.loop import train


@pytest.mark.slow
def test_killed_runs_end_as_the_uninterrupted_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--kills", "6", "--seed", "1"]) == 0
    assert "\n6 kills, " in capsys.readouterr().out


@pytest.mark.slow
def test_faults_of_a_finished_run_are_seen(tiny_config: Callable[..., Config]) -> None:
    run = train(tiny_config())
    copy = Path(shutil.copytree(run, f"{run}_copy"))
    assert faults_of(copy, run) == []
    path = copy / "checkpoints" / "step_00000006" / "teacher.safetensors"
    weights = load_file(path)
    name = next(name for name, value in weights.items() if value.is_floating_point())
    weights[name].view(-1)[0] += 1e-6
    save_file(weights, path)
    rows = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join(rows[1:]))
    second = next(row for row in untimed_rows(run) if row["step"] == 2)
    (copy / ".lock").touch()
    (copy / "checkpoints" / "step_00000005").mkdir()
    assert faults_of(copy, run) == [
        f"step_00000006: 1 tensors of the teacher differ, first {name}",
        f"metrics.jsonl: {len(rows) - 1} rows, not {len(rows)}, the first that differs is {second}",
        "left: step_00000005",
        "left: .lock",
    ]


def test_tensors_are_compared_bit_for_bit() -> None:
    tensors = {"a": torch.tensor([0.0, float("nan")]), "b": torch.ones(2), "c": torch.ones(1)}
    assert differences(tensors, {name: value.clone() for name, value in tensors.items()}) == []
    assert differences(tensors, {"a": torch.tensor([-0.0, float("nan")]), "b": torch.ones(2).int()}) == ["a", "b", "c"]


def test_processes_that_are_left_are_seen_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, time\npid = os.fork()\nif pid: print(pid, flush=True)\ntime.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True, cwd=REPO)
    assert process.stdout is not None
    forked = int(process.stdout.readline())
    session = object.__new__(Session)
    session.process, session.shared = process, set(os.listdir("/dev/shm"))
    monkeypatch.setattr("benchmarks.kill_runs.LEFT_S", 0.2)
    session.kill("main", None)  # type: ignore[arg-type]
    assert f"process {forked}" in session.left()
    assert f"process {forked}" not in session.left()


def test_an_interrupted_program_leaves_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Endless(Session):
        def __init__(self, videos: Path, run: Path) -> None:
            command = [sys.executable, "-c", "import time; time.sleep(60)"]
            self.run, self.started_s, self.shared = run, time.time(), set(os.listdir("/dev/shm"))
            self.process = subprocess.Popen(command, start_new_session=True)
            started.append(self.process)
            if run.name == "reference":  # ends at once, well
                self.process.kill()
                self.process.wait()
                self.process.returncode = 0

        def wait(self, when: str, chance: random.Random) -> bool:
            raise KeyboardInterrupt

    monkeypatch.setattr(kill_runs, "Session", Endless)
    monkeypatch.setattr(kill_runs, "write_moving_mnist", lambda *_, **__: None)
    with pytest.raises(SystemExit) as end:
        main(["--kills", "1"])
    assert end.value.code == 130 and "interrupted" in capsys.readouterr().err
    assert [process.returncode for process in started] == [0, -signal.SIGKILL]


def test_a_number_of_kills_below_one_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--kills", "-3"])
    assert end.value.code == 2 and capsys.readouterr().err == "error: --kills must be at least 1, not -3\n"
