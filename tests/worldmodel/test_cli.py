"""How a process ends."""

import subprocess
import sys

import pytest

from tests.conftest import REPO, script_environment

# It ends beside a function that the interpreter's own end calls.
ENDS = """
import atexit, logging, sys
from data_pipelines.errors import UserError
from worldmodel.cli import leave, report_errors
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
