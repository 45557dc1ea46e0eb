"""`worldmodel reproduce` with small steps in place of trainings: order, resumption, failures, figures."""

import json
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from worldmodel.commands import main, steps
from worldmodel.commands.jobs import only_writer
from worldmodel.reproduction import tables
from worldmodel.reproduction.tables import Step, read_reproduction

WRITE = "import pathlib, sys; pathlib.Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True); " + (
    "open(sys.argv[1], 'w').write(sys.argv[2]); open('order', 'a').write(sys.argv[3])"
)
STEPS = """
data: {{command: [python, write.py, data/x, videos, d], minutes: 1}}
one: {{command: [python, write.py, runs/a/planning.json, '{{"success_rate": 0.5}}', '1'], minutes: 2,
  folder: runs/a, results: [planning.json], after: [data]}}
two: {{command: [python, {program}, runs/a/planning.json, '{{"success_rate": 0.9}}', '2'], minutes: 3,
  folder: runs/a, results: [planning.json], after: [data]}}
"""
TABLE = """
title: Success
tables:
  - columns: [{name: success, path: success_rate}]
    rows:
      - {name: first, source: one/planning.json, values: ['0.52 (0.40 - 0.60)']}
      - {name: second, source: two/planning.json, values: ['0.52 (0.40 - 0.60)']}
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of a reproduction, and the programs of its steps."""
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "success.yaml").write_text(TABLE)
    (tmp_path / "tables" / "others.yaml").write_text("{title: Of others, not_reproduced: figures of others}")
    (tmp_path / "write.py").write_text(WRITE)
    (tmp_path / "fail.py").write_text("import sys; sys.exit('error: there is no disk')")
    set_steps(tmp_path, "write.py")
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "read_reproduction", lambda: read_reproduction(tmp_path))
    return tmp_path


def set_steps(folder: Path, program: str) -> None:
    (folder / "steps.yaml").write_text(STEPS.format(program=program))


def call(folder: Path, *arguments: str) -> int:
    return main.main(["reproduce", *arguments, "--out", str(folder / "out")])


def test_steps_run_once_and_their_results_are_kept(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(files, "success") == 0
    out = files / "out"
    assert (out / "order").read_text() == "d12", "in order, and shared data once"
    text = capsys.readouterr().out
    assert "| first, success  | 0.52 (0.40 - 0.60) |  0.40 to 0.60 | 0.50 |      no |" in text
    assert "| second, success | 0.52 (0.40 - 0.60) |  0.40 to 0.60 | 0.90 |     yes |" in text
    assert "1 of 2 compared figures differ by more than their spread." in text and "3 of 3 steps took" in text
    assert (out / "tables" / "success" / "figures.md").read_text().strip() in text
    content = json.loads((out / "tables" / "success" / "figures.json").read_text())
    assert [figure["here"] for figure in content["figures"]] == [[0.5], [0.9]]
    assert set(content["seconds"]) == {"data", "one", "two"}
    assert "videos" in (out / "data" / "x").read_text()

    assert call(files, "success") == 0
    assert (out / "order").read_text() == "d12", "the same command runs nothing again"


def test_a_failure_is_reported_and_retried(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_steps(files, "fail.py")
    assert call(files, "success") == 1
    printed = capsys.readouterr()
    assert "two: there is no disk" in printed.err and "1 steps failed: two; the same command retries" in printed.err
    assert "missing" in printed.out and "1 are missing" in printed.out
    assert (files / "out" / "order").read_text() == "d1"
    set_steps(files, "write.py")
    assert call(files, "success") == 0
    assert (files / "out" / "order").read_text() == "d12"


def test_a_failed_step_does_not_leave_the_figures_of_an_earlier_command(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(files, "success") == 0
    capsys.readouterr()
    set_steps(files, "fail.py")
    assert call(files, "success") == 1
    assert "1 are missing" in capsys.readouterr().out


def test_what_follows_a_failure_is_not_run(files: Path) -> None:
    text = (files / "steps.yaml").read_text().replace("[python, write.py, data/x", "[python, fail.py, data/x")
    (files / "steps.yaml").write_text(text)
    all_steps = read_reproduction(files).steps
    (files / "out").mkdir()
    failed = run_all(files, all_steps)
    assert failed == {"data": "there is no disk", "one": "data failed", "two": "data failed"}


def test_a_step_that_writes_no_result_has_failed(files: Path) -> None:
    text = (files / "steps.yaml").read_text()
    (files / "steps.yaml").write_text(text.replace("write.py, runs/a/planning.json", "write.py, runs/b/x", 1))
    failed = run_all(files, read_reproduction(files).steps)
    assert failed == {"one": "it wrote no runs/a/planning.json"}


def run_all(files: Path, all_steps: Mapping[str, Step]) -> dict[str, str]:
    (files / "out").mkdir(exist_ok=True)
    with (files / "out" / "lock").open("w") as lock:
        return steps.run_steps(all_steps, list(all_steps), files / "out", lock.fileno())


def test_a_step_that_changed_runs_again_with_all_that_follow(files: Path) -> None:
    assert call(files, "success") == 0
    text = (files / "steps.yaml").read_text().replace("data/x, videos", "data/x, others")
    (files / "steps.yaml").write_text(text)
    assert call(files, "success") == 0
    assert (files / "out" / "order").read_text() == "d12d12"


def test_an_interruption_stops_the_step_and_the_same_command_continues(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "wait.py").write_text("import time; time.sleep(10)")
    set_steps(files, "wait.py")
    order = files / "out" / "order"

    def interrupt_once_the_second_step_waits() -> None:
        log = files / "out" / "steps" / "two" / "log.txt"
        while not log.exists():
            ended.wait(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    ended = threading.Event()
    thread = threading.Thread(target=interrupt_once_the_second_step_waits)
    thread.start()
    assert call(files, "success") == 130
    thread.join()
    assert "stopped by SIGINT: the same command continues" in capsys.readouterr().err
    assert order.read_text() == "d1"
    set_steps(files, "write.py")
    assert call(files, "success") == 0 and order.read_text() == "d12"


def test_the_time_of_a_step_counts_from_before_an_interruption(files: Path) -> None:
    all_steps = read_reproduction(files).steps
    folder = files / "out" / "steps" / "one"
    folder.mkdir(parents=True)
    stopped = {"identity": steps.identity(all_steps, "one"), "seconds": 600.0}
    (folder / steps.STOPPED).write_text(json.dumps(stopped))
    assert run_all(files, all_steps) == {}
    assert 600 < (steps.seconds_if_done(all_steps, "one", files / "out") or 0) < 660
    assert (steps.seconds_if_done(all_steps, "two", files / "out") or 0) < 60


def test_the_list_and_the_commands_start_nothing(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(files) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "   6 min success" in lines and "       - others (not reproducible: figures of others)" in lines
    assert call(files, "success", "--dry-run") == 0
    text = capsys.readouterr().out
    assert "# data, about 1 min\npython write.py data/x videos d\n# one, about 2 min" in text
    assert not (files / "out").exists()
    assert call(files, "success") == call(files, "success", "--dry-run") == 0
    assert "# one, done in 0.0 min" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("need", "reason"),
    [
        ("packages: [no_such_package]", "the package no_such_package is not installed"),
        ("files: [data/mouse]", "data/mouse, and no command makes it"),
    ],
)
def test_what_is_not_at_hand_is_one_line(
    files: Path, capsys: pytest.CaptureFixture[str], need: str, reason: str
) -> None:
    text = (files / "steps.yaml").read_text().replace("minutes: 1}", f"minutes: 1, {need}}}")
    (files / "steps.yaml").write_text(text)
    assert call(files) == 0 and reason in capsys.readouterr().out
    assert call(files, "success") == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("success is left out: ") and reason in printed.err.splitlines()[0]
    assert not (files / "out" / "order").exists()


def test_benchmarks_need_the_repository(files: Path) -> None:
    (files / "write.py").unlink()
    reason = steps.missing_for(read_reproduction(files).steps["data"], files)
    assert reason == "write.py is part of the repository, not of the installed package"


def test_mistakes_are_one_line(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, message in (("sucess", "did you mean"), ("others", "others cannot be reproduced: figures of others")):
        with pytest.raises(SystemExit, match="2"):
            call(files, name)
        assert message in capsys.readouterr().err
    (files / "out").mkdir()
    with only_writer(files / "out"), pytest.raises(SystemExit, match="2"):
        call(files, "success")
    assert "another process still writes" in capsys.readouterr().err
