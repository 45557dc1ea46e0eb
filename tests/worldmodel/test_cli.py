"""How a process ends."""

import subprocess
import sys

import pytest

from tests.conftest import REPO, script_environment

# It ends beside a function that the interpreter's own end calls.
ENDS = """
import atexit, logging, sys
from worldmodel.cli import leave
atexit.register(lambda: print("the interpreter ends"))
logging.basicConfig(level=logging.INFO)
logging.info("told")
print("written", end="")
print("mistake", end="", file=sys.stderr)
leave(7)
"""


@pytest.mark.parametrize(("processes", "own_end"), [("1", True), ("2", False)])
def test_one_of_several_processes_ends_at_once_with_all_written(processes: str, own_end: bool) -> None:
    environment = {**script_environment(), "WORLD_SIZE": processes}
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, cwd=REPO, env=environment)
    assert done.returncode == 7
    assert done.stdout == "written" + own_end * "the interpreter ends\n"
    assert "told" in done.stderr and done.stderr.endswith("mistake")
