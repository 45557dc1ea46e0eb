"""The steps of `worldmodel reproduce`: run commands one after another, and keep what they wrote.

OUT/data, OUT/runs      what the commands write
OUT/steps/STEP/         log.txt, the results of a step, and done.json when it has ended, or stopped.json
"""

import hashlib
import json
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from tqdm.auto import tqdm

import worldmodel
from worldmodel.commands.jobs import POLL_S, interrupt, reason_of, signal_group, start_logged
from worldmodel.commands.process import stop_signals
from worldmodel.commands.shared import write_result
from worldmodel.reproduction.records import read_record
from worldmodel.reproduction.tables import Step
from worldmodel.training.session import Interrupted

ROOT = Path(worldmodel.__file__).resolve().parents[1]
"""The folder of the repository, of which an installed package has only the packages."""
DONE, STOPPED = "done.json", "stopped.json"
CONFIGS = "{configs}"
"""In a command, the folder of the shipped configs."""


def missing_for(step: Step, out: Path) -> str:
    """Return what is missing for a step, "" if nothing is missing."""
    if step.command[0] == "python" and not (ROOT / step.command[1]).is_file():
        return f"{step.command[1]} is part of the repository, not of the installed package"
    for package in step.packages:
        if find_spec(package) is None:
            return f"the package {package} is not installed"
    for file in step.files:
        if not (out / file).exists():
            return f"there is no {out / file}, and no command makes it"
    return ""


def identity(steps: Mapping[str, Step], name: str) -> str:
    """Return a hash of a step's command and of all steps before it: a step that changed runs again."""
    step = steps[name]
    content = [step.command, step.folder, step.results, [identity(steps, before) for before in step.after]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def seconds_if_done(steps: Mapping[str, Step], name: str, out: Path) -> float | None:
    """Return how long a finished step took; None if it has not ended, or its command was another one.

    Raises:
        UserError: done.json is damaged.
    """
    return seconds_in(out / "steps" / name / DONE, identity(steps, name))


def seconds_in(path: Path, key: str) -> float | None:
    """Return the seconds in a file of a step with this identity; None if there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    record = read_record(path)
    seconds = record.get("seconds") if record and record.get("identity") == key else None
    return float(seconds) if isinstance(seconds, int | float) else None


def run_steps(steps: Mapping[str, Step], names: Sequence[str], out: Path, lock: int) -> dict[str, str]:
    """Run the steps that are not done yet, in order. Return the reason of each that failed, or could not start.

    lock: a descriptor that child processes inherit.

    Raises:
        Interrupted: SIGINT or SIGTERM arrived. Trainings have saved their checkpoints.
        UserError: a file cannot be written.
    """
    failed: dict[str, str] = {}
    todo = [name for name in names if seconds_if_done(steps, name, out) is None]
    with stop_signals() as stop, tqdm(total=len(names), initial=len(names) - len(todo), unit="step") as bar:
        for name in todo:
            step = steps[name]
            bar.set_postfix_str(f"{name}, about {step.minutes:g} min")
            if lost := [before for before in step.after if before in failed]:
                failed[name] = f"{lost[0]} failed"
            elif reason := run_step(name, step, identity(steps, name), out, lock, stop):
                failed[name] = reason
                bar.write(f"{name}: {reason}", file=sys.stderr)
            bar.update()
    return failed


def run_step(name: str, step: Step, key: str, out: Path, lock: int, stop: Callable[[], int]) -> str:
    """Run a step and keep its results. Return the reason of a failure, "" if there was none. key: its identity.

    Raises:
        Interrupted: SIGINT or SIGTERM arrived.
        UserError: a file cannot be written.
    """
    folder = out / "steps" / name
    folder.mkdir(parents=True, exist_ok=True)
    began_s = time.monotonic() - (seconds_in(folder / STOPPED, key) or 0.0)
    for path in [folder / DONE, *(path for pattern in step.results for path in folder.glob(pattern))]:
        path.unlink(missing_ok=True)  # of another command: a table must not show it if this one fails
    child = start_logged(shell_command(step), folder / "log.txt", lock, folder=out)
    try:
        while child.poll() is None:
            if number := stop():
                interrupt([child])
                write_result(folder / STOPPED, {"identity": key, "seconds": time.monotonic() - began_s})
                raise Interrupted(number)
            time.sleep(POLL_S)
    finally:
        if child.poll() is None:
            signal_group(child, signal.SIGKILL)
            child.wait()
    if child.returncode:
        return reason_of(folder / "log.txt", child.returncode)[1]
    reason = keep_results(step, key, out, folder, time.monotonic() - began_s)
    (folder / STOPPED).unlink(missing_ok=True)
    if number := stop():
        raise Interrupted(number)
    return reason


def shell_command(step: Step) -> str:
    """Return the command as a line of a shell, with this Python."""
    program, *arguments = (word.replace(CONFIGS, str(ROOT / "worldmodel" / "configs")) for word in step.command)
    if program == "worldmodel":
        return shlex.join([sys.executable, "-m", "worldmodel", *arguments])
    script, *rest = arguments
    return shlex.join([sys.executable, str(ROOT / script), *rest])


def keep_results(step: Step, key: str, out: Path, folder: Path, seconds: float) -> str:
    """Copy the results of a step into its folder and write done.json. Return "" or the pattern that fits no file."""
    for pattern in step.results:
        found = sorted((out / step.folder).glob(pattern))
        if not found:
            return f"it wrote no {Path(step.folder) / pattern}"
        for path in found:
            target = folder / path.relative_to(out / step.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    done = {"identity": key, "seconds": round(seconds, 1), "version": worldmodel.__version__, **asdict(step)}
    write_result(folder / DONE, done)
    return ""
