"""Run Python programs in forks of one process that has imported third-party packages.

A fresh process imports torch for two seconds of CPU. Here each worker of pytest starts one process, the server, which
imports `PACKAGES` and then forks a child for each program. The server imports nothing of this project, so a child
imports our modules afresh, with their state at import. It has its own arguments, folder, environment and streams, and
it ends as any Python process: exit code, traceback, atexit functions.

These differ from a fresh process, so a test of them starts one:

- which packages are loaded, and when
- variables that Python or `PACKAGES` read when they are loaded: `start` refuses other values of them
- the hash seed of strings: all children of a server have the same, and pytest has another
- the teardown of modules at the end, which is left out
- standard input is empty, standard output and errors are files
- the parent of a child is the server, which is in the process group of pytest
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

PACKAGES = (
    "accelerate",
    "av",
    "einops",
    "gymnasium",
    "jinja2",
    "matplotlib.pyplot",
    "numpy",
    "pydantic",
    "safetensors.torch",
    "scipy.optimize",
    "scipy.stats",
    "sklearn.linear_model",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "tqdm",
    "wandb",
    "yaml",
)

ENVIRONMENT = {
    **os.environ,
    "CUDA_VISIBLE_DEVICES": "",
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",  # the workers of pytest, whose threads would wait for each other
}
"""The variables of the server, and of programs unless a test changes them. Later changes of os.environ do not count:
torch and scikit-learn set some of their own, now and then."""

READ_EARLY = ("PYTHON", "OMP_", "GOMP_", "KMP_", "MKL_", "CUDA_", "TORCH", "LD_", "HF_", "MPL")
"""The beginnings of variables that Python and the packages read when they are loaded."""

POLL_S = 0.01


class Forked:
    """A running program. Of `subprocess.Popen` it has `pid`, `returncode`, `poll`, `wait` and `kill`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, minus the signal that ended the program, or None while it runs."""
        if self.returncode is None:
            self.returncode = _server().ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout_s: float) -> int:
        """Return the exit code once the program has ended.

        Raises:
            subprocess.TimeoutExpired: it has not ended after so many seconds.
        """
        deadline_s = time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            if time.monotonic() > deadline_s:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout_s)
            time.sleep(POLL_S)
        return code

    def kill(self) -> None:
        """Send SIGKILL, if the program still runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def start(
    arguments: Sequence[str], output: IO[Any], errors: IO[Any], *, cwd: Path, environment: Mapping[str, str]
) -> Forked:
    """Run what `python ARGUMENTS` runs: -c and code, -m and a module, or a script.

    output, errors: named files, to which the program appends. They may be the same.
    """
    changed = {name for name, _ in environment.items() ^ ENVIRONMENT.items()} - {"PYTHONPATH"}
    early = {name for name in changed if name.startswith(READ_EARLY)}
    assert not early, f"{sorted(early)} are read when packages are loaded: use a fresh process"
    job = {
        "arguments": list(arguments),
        "cwd": str(cwd),
        "environment": dict(environment),
        "streams": [output.name, errors.name],
    }
    return Forked(_server().ask(job))


def run(
    arguments: Sequence[str], *, cwd: Path, environment: Mapping[str, str], timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a program as `start` does, to its end, and return its exit code, output and errors.

    Raises:
        subprocess.TimeoutExpired: it has not ended after so many seconds. It is killed.
    """
    with tempfile.NamedTemporaryFile("r") as output, tempfile.NamedTemporaryFile("r") as errors:
        program = start(arguments, output, errors, cwd=cwd, environment=environment)
        try:
            code = program.wait(timeout_s)
        finally:
            program.kill()
            program.wait(timeout_s)
        return subprocess.CompletedProcess(list(arguments), code, output.read(), errors.read())


class _Server:
    """The server, as its client sees it. It ends with this process, which closes the server's standard input."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, *PACKAGES],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )

    def ask(self, request: Mapping[str, Any]) -> Any:
        """Send a request and return the answer, both one line of JSON."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


@functools.cache
def _server() -> _Server:
    return _Server()


def _serve() -> dict[str, Any]:
    """Answer requests until standard input ends. Return in each child, with the job that it is to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the programs and for pytest
    running: set[int] = set()
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            running.discard(pid)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return request
            running.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    sys.exit()


def _become(job: Mapping[str, Any]) -> None:
    """Give this process the folder, environment and streams of a job, and numpy a new seed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environment"])
    files = [os.open(os.devnull, os.O_RDONLY), *(os.open(path, os.O_WRONLY | os.O_APPEND) for path in job["streams"])]
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.modules["numpy"].random.seed()


def _execute(arguments: Sequence[str], imported_from: Sequence[str]) -> None:
    """Run a program in this process as its `__main__`. imported_from: the folders of installed packages."""
    first, *rest = arguments
    folder = {"-c": "", "-m": os.getcwd()}.get(first, str(Path(first).resolve().parent))
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [folder, *path, *imported_from]
    if first == "-c":
        code, *sys.argv[1:] = rest
        sys.argv[0] = first
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), main.__dict__)
    elif first == "-m":
        sys.argv[:] = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        assert not first.startswith("-"), f"{first} is for the interpreter: use a fresh process"
        sys.argv[:] = arguments
        runpy.run_path(first, run_name="__main__")


def _exit_code(end: BaseException) -> int | None:
    """Return the exit code of a program that ended with an exception. None: a signal, which the interpreter sends."""
    if isinstance(end, SystemExit):
        return end.code & 0xFF if isinstance(end.code, int) else int(end.code is not None)
    return None if isinstance(end, KeyboardInterrupt) else 1


def _end_without_teardown(codes: Sequence[int | None]) -> None:
    """End this process: deleting all that is loaded, as the interpreter would next, takes 0.3 s of CPU.

    Registered before all other functions of atexit, it runs after them, after all threads and the traceback.
    """
    if codes and codes[0] is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(codes[0])


def _main() -> None:
    """Import the packages that the arguments name, then serve. In a child: do its job."""
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    installed = [entry for entry in sys.path[1:] if entry not in path]
    sys.path[:] = installed
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.freeze()  # children share the memory of loaded packages, and garbage collection does not write to it
    codes: list[int | None] = []
    atexit.register(_end_without_teardown, codes)
    job = _serve()
    _become(job)
    try:
        _execute(job["arguments"], installed)
    except BaseException as end:
        codes.append(_exit_code(end))
        raise
    codes.append(0)


if __name__ == "__main__":
    _main()
