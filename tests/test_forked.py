"""Programs in forks of one process end, write and see their surroundings as those in fresh processes do."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests import forked
from tests.conftest import REPO, run_python, script_environment

SEEN = """
import atexit, json, os, sys, threading, time
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.05), print("thread"))).start()
print(json.dumps([sys.argv, sys.path[:2], os.getcwd(), os.environ["COLOUR"], __name__, sys.stdin.read()]))
print("an error", file=sys.stderr)
"""


def _both(arguments: list[str], folder: Path) -> list[tuple[int, str, str]]:
    """Run a program in a fresh process and in a fork. Return exit codes, outputs and errors of the two."""
    environment = {**script_environment(), "COLOUR": "green"}
    fresh = subprocess.run(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )
    forks = forked.run(arguments, cwd=folder, environment=environment)
    return [(done.returncode, done.stdout, done.stderr) for done in (fresh, forks)]


def test_a_program_sees_and_writes_what_it_does_in_a_fresh_process(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SEEN)
    for arguments in (["-c", SEEN, "a", "b c"], ["-m", "program", "a"], ["program.py", "a"]):
        fresh, fork = _both(arguments, tmp_path)
        assert fork == fresh
        argv, path, *others = json.loads(fork[1].splitlines()[0])
        assert argv[-1] in ("a", "b c") and path[1] == str(REPO)
        assert others == [str(tmp_path), "green", "__main__", ""]
        assert fork[1].splitlines()[1:] == ["thread", "at exit"] and fork[2] == "an error\n"


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(3)",
        "import sys; sys.exit(256 + 7)",
        "import sys; sys.exit('one line')",
        "import sys; sys.exit()",
        "import os; os.kill(os.getpid(), 9)",
        "import os; os._exit(5)",
    ],
)
def test_exit_codes_are_those_of_a_fresh_process(code: str, tmp_path: Path) -> None:
    fresh, fork = _both(["-c", code], tmp_path)
    assert fork == fresh


def test_an_exception_ends_with_its_traceback(tmp_path: Path) -> None:
    fresh, fork = _both(["-c", "print('before'); 1 / 0"], tmp_path)
    assert fork[:2] == fresh[:2] == (1, "before\n")
    assert fork[2].startswith("Traceback") and fork[2].endswith(fresh[2].splitlines()[-1] + "\n")


def test_an_interrupt_ends_a_program_as_it_does_a_fresh_one() -> None:
    """As one started in the foreground: processes that a shell starts in the background ignore interrupts."""
    done = run_python("-c", "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('after')")
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "") and done.stderr.endswith("KeyboardInterrupt\n")


def test_no_module_of_ours_is_loaded_but_torch_is() -> None:
    code = "import sys; print(sorted({name.partition('.')[0] for name in sys.modules}), 'torch._C' in sys.modules)"
    names, torch = run_python("-c", code).stdout.rsplit(maxsplit=1)
    assert torch == "True"
    assert not {"worldmodel", "data_pipelines", "benchmarks", "scripts", "tests", "pytest"} & set(
        json.loads(names.replace("'", '"'))
    )


def test_random_numbers_of_forks_differ_as_those_of_processes_do() -> None:
    code = "import random, numpy; print(random.random(), numpy.random.rand())"
    ones, others = (run_python("-c", code).stdout.split() for _ in range(2))
    assert not set(ones) & set(others)


def test_a_program_beyond_its_time_is_killed(tmp_path: Path) -> None:
    code = "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)"
    with pytest.raises(subprocess.TimeoutExpired):
        run_python("-c", code, cwd=tmp_path, timeout_s=1.5)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_two_run_at_once_and_one_is_killed(tmp_path: Path) -> None:
    wait = "import pathlib, sys, time\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.01)\nprint('seen')"
    with tempfile.NamedTemporaryFile("r") as output:
        one, other = (
            forked.start(["-c", wait, str(tmp_path / "go")], output, output, cwd=REPO, environment=script_environment())
            for _ in range(2)
        )
        assert one.pid != other.pid and one.poll() is None and other.poll() is None
        one.kill()
        assert one.wait(30) == -signal.SIGKILL
        (tmp_path / "go").touch()
        assert other.wait(30) == 0
        assert output.read() == "seen\n"


def test_variables_that_are_read_when_packages_are_loaded_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"OMP_NUM_THREADS.* are read when packages are loaded"):
        run_python("-c", "", OMP_NUM_THREADS="2")


def test_options_of_the_interpreter_are_refused() -> None:
    done = run_python("-X", "importtime", "-c", "")
    assert done.returncode == 1 and "-X is for the interpreter" in done.stderr


def test_the_server_and_its_programs_end_with_their_client(tmp_path: Path) -> None:
    """The client is killed while a program runs."""
    client = f"""
import os, sys, time
from pathlib import Path
from tests import forked
forked.PACKAGES = ("numpy",)
with open({str(tmp_path / "output")!r}, "w") as output:
    code = "import time; time.sleep(60)"
    program = forked.start(["-c", code], output, output, cwd=Path.cwd(), environment=forked.ENVIRONMENT)
    print(program.pid, flush=True)
    os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", client], stdout=subprocess.PIPE, env=script_environment(), cwd=REPO)
    assert done.returncode == -signal.SIGKILL
    deadline_s = time.monotonic() + 30
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline_s:
            os.kill(int(done.stdout), 0)
            time.sleep(0.02)
