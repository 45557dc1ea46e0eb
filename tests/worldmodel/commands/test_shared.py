"""The end of a process, its output, and the checks before its work."""

import argparse
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipelines.errors import UserError
from tests.conftest import REPO, script_environment
from worldmodel.commands.shared import (
    check_counts,
    check_device,
    check_out_file,
    check_seed,
    check_video,
    make_out_folder,
    warn_if_unfinished,
)
from worldmodel.commands.terminal import Terminal

# The function is called when the interpreter shuts down.
ENDS = """
import atexit, logging, sys
from data_pipelines.errors import UserError
from worldmodel.commands.exits import leave, report_errors
atexit.register(lambda: print("the interpreter ends"))
logging.basicConfig(level=logging.INFO)
logging.info("told")
print("written", end="")
print("mistake", end="", file=sys.stderr)
with report_errors():
    if sys.argv[1:]:
        raise UserError("what to mend")
leave(7)
"""


@pytest.mark.parametrize(("processes", "own_end"), [("1", True), ("2", False)])
def test_one_of_several_processes_ends_at_once_with_all_written(processes: str, own_end: bool) -> None:
    environment = {**script_environment(), "WORLD_SIZE": processes}
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, cwd=REPO, env=environment)
    assert done.returncode == 7
    assert done.stdout == "written" + own_end * "the interpreter ends\n"
    assert "told" in done.stderr and done.stderr.endswith("mistake")


@pytest.mark.parametrize(("processes", "own_end"), [("1", True), ("2", False)])
def test_so_does_one_that_ends_by_a_users_mistake(processes: str, own_end: bool) -> None:
    environment = {**script_environment(), "WORLD_SIZE": processes}
    command = [sys.executable, "-c", ENDS, "mistaken"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=environment)
    assert done.returncode == 2
    assert done.stdout == "written" + own_end * "the interpreter ends\n"
    assert done.stderr.endswith("error: what to mend\n")


HOSTILE = "bad\x1b[2J\x9b1m\u202e\x7f\rname\nerror: forged"
PRINTS = f"""
import logging, sys
from tqdm import tqdm
from data_pipelines.errors import UserError
from worldmodel.commands.exits import report_errors
name = {HOSTILE!r}
with report_errors():
    print(name, "caf\\udce9", "ü ± →")
    print(name, file=sys.stderr)
    logging.getLogger("x").warning("left out %s", name)
    for _ in tqdm(range(2), desc=name):
        with tqdm(range(2), desc=name, position=1, leave=False) as bar:
            bar.set_postfix_str(name)
    tqdm.write(name)
    raise UserError(f"cannot read {{name}}")
"""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_nothing_that_is_printed_acts_on_the_terminal(encoding: str) -> None:
    environment = {**script_environment(), "PYTHONIOENCODING": f"{encoding}:strict"}
    done = subprocess.run([sys.executable, "-c", PRINTS], capture_output=True, cwd=REPO, env=environment)
    out, errors = done.stdout.decode(encoding), done.stderr.decode(encoding)
    assert done.returncode == 2, errors
    # Progress bars return the carriage and move up: nothing else may act.
    assert all(c.isprintable() or c == "\n" for c in out + errors.replace("\r", "").replace("\x1b[A", ""))
    assert r"bad\x1b[2J\x9b1m\u202e\x7f\rname" in out and r"caf\udce9" in out
    assert ("ü ± →" in out) == (encoding == "utf-8")
    lines = errors.replace("\r", "\n").split("\n")
    escaped = r"bad\x1b[2J\x9b1m\u202e\x7f\rname\nerror: forged"
    assert f"WARNING x: left out {escaped}" in lines and f"error: cannot read {escaped}" in lines
    assert "2/2" in errors


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("plain ü\n", "plain ü\n"),
        ("\r 50%|█  ", "\r 50%|█  "),
        ("\n\n", "\n\n"),
        ("\x1b[A\x1b[A", "\x1b[A\x1b[A"),
        ("\x1b[A\x1b[2J", "\\x1b[A\\x1b[2J"),
        ("\x1b[Aname", "\\x1b[Aname"),
        ("\ra\x1b[Ab\r", "\ra\\x1b[Ab\r"),
        ("a\rb", "a\\rb"),
        ("\ttab\xa0", "\\ttab\\xa0"),
        ("", ""),
    ],
)
def test_bars_move_and_names_do_not(text: str, written: str) -> None:
    stream = io.StringIO()
    assert Terminal(stream).write(text) >= 0 and stream.getvalue() == written


def test_outputs_are_checked_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "fifo")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("x" * 300), Path("a\0b"), Path("/proc/x")):
        with pytest.raises(UserError, match="cannot write to --out"):
            make_out_folder(folder)
    for file in (tmp_path, tmp_path / "fifo", tmp_path / "file" / "below", Path("/dev/null")):
        with pytest.raises(UserError, match="cannot write to --out"):
            check_out_file(file, ".npz")
    make_out_folder(tmp_path / "new" / "folder")
    check_out_file(tmp_path / "other" / "file.NPZ", ".npz")
    assert (tmp_path / "file").read_text() == "mine" and not any((tmp_path / "new" / "folder").iterdir())
    for video in (tmp_path, tmp_path / "fifo", tmp_path / "no.mp4", Path("/dev/zero"), Path("x" * 300), Path("a\0b")):
        with pytest.raises(UserError, match="--video"):
            check_video(video)
    (tmp_path / "take:1.mp4").write_bytes(b"")
    check_video(tmp_path / "take:1.mp4")


def test_devices_and_numbers() -> None:
    assert check_device("cpu").type == "cpu"
    for name in ("gpu", "cuda:99", "", "cpu:x", "xla", "meta"):
        with pytest.raises(UserError, match=f"--device {name} cannot be used here"):
            check_device(name)
    for value in (0, -1, 2**20 + 1, 10**400):
        with pytest.raises(UserError, match="--num-samples must be at"):
            check_counts(argparse.Namespace(num_samples=value), "num_samples")
    for value in (-1, 2**64):
        with pytest.raises(UserError, match="--seed must be from 0"):
            check_seed(argparse.Namespace(seed=value))


@pytest.mark.parametrize(
    ("state", "refine_steps", "left"),
    [
        ({"step": 3}, 0, "7 of 10 steps"),
        ({"step": 3}, 5, "7 of 10 steps and the refinement"),
        ({"step": 10, "refined": False}, 5, "the refinement"),
        ({"step": 10}, 0, ""),
        ({"step": 10, "refined": True}, 5, ""),
    ],
)
def test_a_run_whose_training_has_not_ended_is_reported(
    state: dict[str, Any], refine_steps: int, left: str, caplog: pytest.LogCaptureFixture
) -> None:
    train = SimpleNamespace(steps=10, refine_steps=refine_steps)
    run: Any = SimpleNamespace(config=SimpleNamespace(train=train), state=state)
    warn_if_unfinished(argparse.Namespace(run=Path("mine"), checkpoint="best"), run)
    assert not caplog.messages
    warn_if_unfinished(argparse.Namespace(run=Path("mine"), checkpoint="latest"), run)
    expected = f"the training of mine has not ended: worldmodel train --resume continues it, with {left}"
    assert caplog.messages == ([expected] if left else [])
