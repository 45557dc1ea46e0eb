"""The fuzzer on a few files and in a few rounds: nothing is lost without a word, and every kind of fault is seen."""

import os
import random
import signal
import socket
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

from benchmarks.fuzz import sandbox
from benchmarks.fuzz.kinds import Case, Kind, WrongError
from benchmarks.fuzz.rounds import KINDS, Workplace
from data_pipelines.errors import UserError
from tests.conftest import run_python

REPO = Path(__file__).parents[2]
SLOW_KINDS = {"run", "times", "videos"}  # a run must be trained first; the others take seconds each


def run_fuzzer(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "benchmarks.fuzz", *arguments, timeout_s=300)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.slow
def test_damaged_files_are_survived_and_accounted_for() -> None:
    num_files = 300
    done = run_fuzzer("--files", str(num_files), "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{num_files + num_files // 5:>7,} files\n" in done.stdout
    assert "every file and every clip is accounted for" in done.stdout
    counts = {
        name: int(number.replace(",", ""))
        for number, _, name in (line.strip().partition(" ") for line in done.stdout.partition("\n\n")[0].splitlines())
    }
    assert counts["delivered"] > 0 and counts["dropped, as they do not decode"] > 0


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_KINDS)) for name in KINDS]
)
def test_every_kind_builds_cases_and_the_same_seed_repeats_them(workplace: Workplace, name: str) -> None:
    """Nearly all cases are built, and a case that is built again holds the same bytes."""
    outcomes = [workplace.run(KINDS[name], seed) for seed in range(6)]
    assert [outcome.verdict for outcome in outcomes].count("skipped") == 0, outcomes
    again = workplace.run(KINDS[name], 0)
    assert (again.verdict, again.reason) == (outcomes[0].verdict, outcomes[0].reason)


# ------------------------------------------------------------------------------------------- what counts as a finding


def _raise(error: Exception) -> str:
    raise error


def _spin() -> str:
    while True:
        pass


def _fill_memory() -> str:
    return "" if np.ones(2**27, dtype=np.uint8).any() else "x"  # 128 MiB


def _write_elsewhere(path: Path) -> str:
    path.write_text("x")
    return ""


def _follow_link(folder: Path, victim: Path) -> str:
    (folder / "link").symlink_to(victim)
    (folder / "link").write_text("x")
    return ""


def _remove_elsewhere(path: Path) -> str:
    path.unlink(missing_ok=True)
    return ""


def _connect() -> str:
    socket.create_connection(("127.0.0.1", 9))
    return ""


def _start_program() -> str:
    os.system("true")
    return ""


def _crash() -> str:
    os.kill(os.getpid(), signal.SIGSEGV)
    return ""


def _hold_the_lock_of_bars() -> str:
    tqdm.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)
    return ""


def verdict_of(tmp_path: Path, attempt: Callable[[], str], *, is_good: bool = False) -> tuple[str, str]:
    """The verdict and the reason of one attempt in the sandbox."""
    kind = Kind("made up", lambda seeds: None, lambda rng, seeds, folder: Case(attempt, is_good), cpu_s=1)
    outcome = sandbox.run_case(kind, 0, tmp_path, tmp_path / "round")
    return outcome.verdict, outcome.reason


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (partial(_raise, KeyError("no such field")), "KeyError: 'no such field'"),
        (partial(_raise, WrongError("frame 3 is missing")), "wrong: frame 3 is missing"),
        (lambda: "x" * 20_000, "20,000 characters"),
        (_spin, "more than 1 s of CPU"),
        (_crash, "ended by SIGSEGV"),
        (lambda: os._exit(3), "ended by exit code 3"),
        (_connect, "socket.getaddrinfo"),
        (_start_program, "os.system"),
    ],
)
def test_a_fault_is_a_finding(tmp_path: Path, attempt: Callable[[], str], reason: str) -> None:
    verdict, found = verdict_of(tmp_path, attempt)
    assert verdict == "finding" and reason in found


def test_a_child_that_is_killed_while_it_draws_a_bar_does_not_block_the_bar_of_the_parent(tmp_path: Path) -> None:
    tqdm.get_lock()  # the lock exists before the child does
    assert verdict_of(tmp_path, _hold_the_lock_of_bars)[0] == "finding"
    lock = tqdm.get_lock().mp_lock
    assert lock.acquire(timeout=1), "the child has taken the lock with it"
    lock.release()


def test_much_memory_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict_of(tmp_path / "a", _fill_memory) == ("accepted", "")
    monkeypatch.setattr(sandbox, "MAX_PEAK_MIB", 64)
    verdict, reason = verdict_of(tmp_path / "b", _fill_memory)
    assert verdict == "finding" and "MiB of memory" in reason


@pytest.mark.parametrize("change", [_write_elsewhere, _remove_elsewhere])
def test_a_change_outside_of_the_folder_is_refused_and_a_finding(tmp_path: Path, change: Callable[[Path], str]) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    assert verdict_of(tmp_path, partial(change, victim))[0] == "finding"
    assert victim.read_text() == "mine"


def test_writing_through_a_link_is_a_finding(tmp_path: Path) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    verdict, reason = verdict_of(tmp_path, partial(_follow_link, tmp_path / "round" / "input", victim))
    assert verdict == "finding" and "open outside of the folder" in reason and victim.read_text() == "mine"


def test_a_refusal_in_one_line_is_fine_but_not_of_a_good_input(tmp_path: Path) -> None:
    refuse = partial(_raise, UserError("frames=-1 must be at least 1"))
    assert verdict_of(tmp_path / "a", refuse) == ("refused", "frames=-1 must be at least 1")
    assert verdict_of(tmp_path / "b", refuse, is_good=True)[0] == "finding"
    assert verdict_of(tmp_path / "c", lambda: "") == ("accepted", "")


def test_a_case_that_cannot_be_built_is_skipped(tmp_path: Path) -> None:
    def build(rng: random.Random, seeds: Path, folder: Path) -> Case:
        raise ValueError("no such container")

    outcome = sandbox.run_case(Kind("made up", lambda seeds: None, build), 0, tmp_path, tmp_path / "round")
    assert outcome.verdict == "skipped" and "no such container" in outcome.reason


# ----------------------------------------------------------------------------------------------------------- command


@pytest.mark.slow
def test_rounds_end_in_a_table_and_name_the_next_seed(tmp_path: Path) -> None:
    done = run_fuzzer("--minutes", "0.02", "--kinds", "tar", "--seed", "2", "--out", str(tmp_path))
    assert done.returncode in (0, 1), done.stderr
    head, _, row, *_, last = done.stdout[done.stdout.index("| kind") :].splitlines()
    assert [cell.strip() for cell in head.split("|")][1:4] == ["kind", "rounds", "refused"]
    assert row.split()[1] == "tar" and int(row.split()[3]) > 0
    assert last == f"to continue: --seed {2 + int(row.split()[3])}"


@pytest.mark.slow
def test_one_round_is_repeated_and_saved(tmp_path: Path) -> None:
    done = run_fuzzer("--kind", "tar", "--seed", "3", "--repeat", "--out", str(tmp_path))
    assert done.stdout.split()[1:3] == ["tar", "3:"], done.stderr
    assert any((tmp_path / "tar_3" / "input").iterdir())


def test_a_round_to_repeat_needs_its_kind() -> None:
    done = run_fuzzer("--repeat")
    assert done.returncode == 2 and "--repeat needs the kind" in done.stderr.splitlines()[-1], done.stderr
