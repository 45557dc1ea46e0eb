"""One case in a child process with bounds: memory, time, no writing outside of its folder, no network, no programs."""

import faulthandler
import json
import logging
import os
import random
import re
import resource
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from benchmarks.fuzz.kinds import Kind, WrongError
from data_pipelines.errors import UserError

PACKAGES = ("data_pipelines", "worldmodel")
MAX_REASON_CHARS = 10_000
MAX_PEAK_MIB = 1024  # resident, above what the process had before the case
MAX_ADDRESS_MIB = 4096  # virtual, likewise: what the case cannot go beyond
BUILD_S = 120.0
HANGS_AFTER = 4  # times the bound on CPU seconds, plus HANGS_S: the machine may be busy
HANGS_S = 30.0

Verdict = Literal["accepted", "refused", "finding", "skipped"]


@dataclass(frozen=True)
class Outcome:
    """The result of a case. reason: of a refusal or a finding, in one line; place: the innermost line of our code."""

    verdict: Verdict
    reason: str = ""
    place: str = ""
    cpu_s: float = 0.0
    peak_mib: float = 0.0


def is_clean(text: str) -> bool:
    """Return whether a message is one line without control characters and of acceptable length."""
    return len(text) <= MAX_REASON_CHARS and not any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in text)


def prepare_in_child(kind: Kind, seeds: Path) -> None:
    """Write a kind's seeds. Raises RuntimeError: this fails."""
    seeds.mkdir(parents=True)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _redirect(seeds.with_suffix(".log"))
            kind.prepare(seeds)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"the seeds of {kind.name} cannot be made:\n{seeds.with_suffix('.log').read_text()}")


def run_case(kind: Kind, seed: int, seeds: Path, folder: Path) -> Outcome:
    """Build the case `seed` of a kind in folder/input and attempt it in an isolated process."""
    for name in ("input", "home", "tmp"):
        (folder / name).mkdir(parents=True)
    incoming, outgoing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(incoming)
        _child(kind, seed, seeds, folder, outgoing)
    os.close(outgoing)
    with os.fdopen(incoming, "rb") as pipe:
        built = _receive(pipe, BUILD_S)
        wall_s = HANGS_AFTER * kind.cpu_s + HANGS_S
        result = _receive(pipe, wall_s) if built == {"built": True} else built
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    return _judge(kind, built, result, status, usage, wall_s, folder)


def _judge(
    kind: Kind, built: Any, result: Any, status: int, usage: resource.struct_rusage, wall_s: float, folder: Path
) -> Outcome:
    """Return the outcome from the child's messages (None: end of the pipe, "late": none in time) and its exit."""
    if built == "late":
        return Outcome("skipped", "the case is not built in time")
    if result is None and built is None:
        return Outcome("skipped", f"the case is not built: {_last_words(folder)}")
    if result is None:
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if number == signal.SIGXCPU:
            return Outcome("finding", f"more than {kind.cpu_s} s of CPU", cpu_s=kind.cpu_s)
        name = signal.Signals(number).name if number else f"exit code {os.waitstatus_to_exitcode(status)}"
        return Outcome("finding", f"ended by {name}: {_last_words(folder)}", place=_place_in(_output(folder)))
    if result == "late":
        return Outcome("finding", f"no end within {wall_s:.0f} s")
    peak_mib = max(0.0, usage.ru_maxrss / 1024 - result.pop("resident_mib", usage.ru_maxrss / 1024))
    outcome = Outcome(**result, peak_mib=peak_mib)
    if outcome.verdict != "finding" and peak_mib > MAX_PEAK_MIB:
        return Outcome("finding", f"{peak_mib:.0f} MiB of memory", cpu_s=outcome.cpu_s, peak_mib=peak_mib)
    return outcome


def _receive(pipe: Any, timeout_s: float) -> Any:
    """Return the next line of JSON, None at the end of the pipe, "late" if there is none in time."""
    ready, _, _ = select.select([pipe], [], [], timeout_s)
    if not ready:
        return "late"
    line = pipe.readline()
    return json.loads(line) if line.endswith(b"\n") else None


def _output(folder: Path) -> str:
    with suppress(OSError):
        return (folder / "output.txt").read_text(encoding="utf-8", errors="replace")
    return ""


def _last_words(folder: Path) -> str:
    lines = [line.strip() for line in _output(folder).splitlines() if line.strip()]
    return " | ".join(lines[-3:])[:500]


def _place_in(output: str) -> str:
    """Return the first line of our code in a traceback of faulthandler, whose innermost line comes first."""
    for file, line, name in re.findall(r'File "([^"]+)", line (\d+) in (\w+)', output):
        if _is_ours(file):
            return f"{_short(file)}:{line} {name}"
    return ""


def _short(file: str) -> str:
    parts = Path(file).parts
    start = max(i for i, part in enumerate(parts) if part in PACKAGES)
    return "/".join(parts[start:])


# ----------------------------------------------------------------------------------------------------- the child


def _child(kind: Kind, seed: int, seeds: Path, folder: Path, outgoing: int) -> None:
    """Run the case and end this process."""
    try:
        os.setsid()
        tqdm.set_lock(threading.RLock())  # killed with the lock that processes share, it would block the parent's bar
        _redirect(folder / "output.txt")
        faulthandler.enable(2)
        os.environ.update(HOME=str(folder / "home"), TMPDIR=str(folder / "tmp"))
        tempfile.tempdir = None
        sys.dont_write_bytecode = True
        os.chdir(folder / "tmp")
        messages = _catch_log()
        case = kind.build(random.Random(f"{kind.name} {seed}"), seeds, folder / "input")
        resident_mib = _limit(kind.cpu_s)
        violations = _watch(folder)
        _send(outgoing, {"built": True})
        before_s = time.process_time()
        result = _attempt(case.attempt, case.is_good)
        if violations:
            result = {"verdict": "finding", "reason": f"{violations[0]}", "place": result.get("place", "")}
        dirty = next((entry for entry in messages if not is_clean(entry[0])), None)
        if dirty is not None and result["verdict"] != "finding":
            message, place = dirty
            result = {"verdict": "finding", "reason": f"logged: {_flaw(message)}", "place": place}
        result["reason"] = result["reason"].replace(str(folder), "FOLDER")
        _send(outgoing, result | {"cpu_s": time.process_time() - before_s, "resident_mib": resident_mib})
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _attempt(attempt: Callable[[], str], is_good: bool) -> dict[str, Any]:
    reason, place = "", ""
    try:
        reason = attempt()
    except UserError as error:
        reason, place = str(error) or "without a reason", _place_of(error)
    except WrongError as error:
        return {"verdict": "finding", "reason": f"wrong: {error}"[:500]}
    except Exception as error:
        traceback.print_exc()
        return {"verdict": "finding", "reason": f"{type(error).__name__}: {error}"[:500], "place": _place_of(error)}
    if reason and not is_clean(reason):
        return {"verdict": "finding", "reason": _flaw(reason), "place": place}
    if reason and is_good:
        return {"verdict": "finding", "reason": f"a good input is refused: {reason}"[:500], "place": place}
    return {"verdict": "refused" if reason else "accepted", "reason": reason}


def _flaw(message: str) -> str:
    """Describe a message that is not one clean line."""
    length = f", {len(message):,} characters" if len(message) > MAX_REASON_CHARS else ""
    return f"not one clean line{length}: {message[:400]!r}"


def _place_of(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_ours(frame.filename)]
    return f"{_short(frames[-1].filename)}:{frames[-1].lineno} {frames[-1].name}" if frames else ""


def _is_ours(file: str) -> bool:
    return any(package in Path(file).parts for package in PACKAGES) and "site-packages" not in file


def _send(outgoing: int, message: dict[str, Any]) -> None:
    os.write(outgoing, json.dumps(message).encode() + b"\n")


def _redirect(path: Path) -> None:
    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    with open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
    # Python's own, which may lead elsewhere: in a test to a file of pytest.
    sys.stdout = sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)


def _catch_log() -> list[tuple[str, str]]:
    """Collect the packages' log from INFO on: messages and their places."""
    messages: list[tuple[str, str]] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append((record.getMessage(), f"{_short(record.pathname)}:{record.lineno} {record.funcName}"))

    logging.disable(logging.NOTSET)
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers, logger.propagate = [Collect()], False
    return messages


def _limit(cpu_s: int) -> float:
    """Limit this process's time and memory from here on. Return the resident MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    size_mib, resident_mib = (int(status[key].split()[0]) / 1024 for key in ("VmSize", "VmRSS"))
    address = int((size_mib + MAX_ADDRESS_MIB) * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (address, address))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used_s = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (int(used_s) + 1 + cpu_s, int(used_s) + 3 + cpu_s))
    return resident_mib


_CHANGES_PATHS = {  # event -> the positions of paths in its arguments, and of the descriptors that they are relative to
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.chmod": ((0, 2),),
    "os.truncate": ((0, None),),
    "os.utime": ((0, 3),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
}
_PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "socket.getaddrinfo")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _watch(folder: Path) -> list[str]:
    """Reject and list forbidden actions from here on: changes outside of folder, programs, network."""
    allowed = (os.path.realpath(folder), "/dev/null", "/dev/shm", "/proc/self")
    violations: list[str] = []

    def refuse(what: str) -> None:
        violations.append(what[:500])
        raise PermissionError(1, "not within the folder of the case", what)

    def check(event: str, path: Any, descriptor: Any, follow: bool) -> None:
        if isinstance(path, int) or path is None:
            return
        path = os.fsdecode(path)
        if isinstance(descriptor, int) and descriptor >= 0 and not os.path.isabs(path):
            path = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), path)
        parent, name = os.path.split(os.path.abspath(path))
        real = os.path.realpath(path) if follow else os.path.join(os.path.realpath(parent), name)
        if not any(real == place or real.startswith(place + "/") for place in allowed):
            refuse(f"{event} outside of the folder: {real!r}")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & _WRITING:
                check(event, path, None, follow=not flags & os.O_NOFOLLOW)
        elif event in _CHANGES_PATHS:
            for path_at, descriptor_at in _CHANGES_PATHS[event]:
                descriptor = None if descriptor_at is None else arguments[descriptor_at]
                check(event, arguments[path_at], descriptor, follow=event == "os.truncate")
        elif event in _PROGRAMS:
            refuse(f"{event} {arguments!r}")

    sys.addaudithook(hook)
    return violations
