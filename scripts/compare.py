"""Train a grid of objectives, latents and seeds from one config and compare them in one table and one figure.

python scripts/compare.py --config configs/demo.yaml --out runs/compare \\
    --objectives byol infonce --latents none gaussian --seeds 0 1 2 [key=value ...]

Run folders are OUT/OBJECTIVE-LATENT/seed_N, with what the run printed beside them in seed_N.log.txt. The same command
again goes on where it stopped; more seeds, objectives or latents add their runs only.

python scripts/compare.py --runs RUN RUN ... --out FOLDER compares runs that are evaluated and trains nothing.
"""

import argparse
import dataclasses
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, BinaryIO

from tqdm.auto import tqdm

from data_pipelines.errors import UserError
from data_pipelines.files import write_bytes, write_text
from data_pipelines.text_files import MAX_YAML_BYTES, read_small
from worldmodel.commands.process import stop_signals
from worldmodel.commands.shared import EXIT_USER_ERROR, make_out_folder, report_errors
from worldmodel.config import Config, changed_keys, choices, load_config, to_yaml
from worldmodel.report.comparison import (
    RunScores,
    comparison_figure,
    comparison_markdown,
    flat_numbers,
    png,
    summarise_groups,
)
from worldmodel.report.comparison_page import write_comparison_page
from worldmodel.runs.checkpoint import RESUMABLE_CHANGES, load_run_config
from worldmodel.runs.folder import RunFolder
from worldmodel.runs.metrics import Metrics, read_metrics, value_at
from worldmodel.runs.tracking import read_history
from worldmodel.training.machine import fair_share_of_cores
from worldmodel.training.session import Interrupted

SCRIPTS = Path(__file__).resolve().parent
OVERRIDE = re.compile(r"[\w.]+=.*", re.DOTALL)
ONE_VALUE = ("--config", "--out", "--jobs", "--launch")
# The keys that the grid sets, and what to use instead.
GRID_KEYS = {"objective.name": "--objectives", "model.latent": "--latents", "seed": "--seeds", "run_dir": "--out"}
POLL_S = 0.2
LAUNCHER_GRACE_S = 30.0  # a launcher may end before its processes have saved
LINES_SHOWN = 12


@dataclass(frozen=True)
class GridRun:
    """One run of the grid."""

    objective: str
    latent: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        return f"{self.objective}-{self.latent}/seed_{self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    def beside(self, suffix: str) -> Path:
        return self.folder.with_name(self.folder.name + suffix)


@dataclass(frozen=True)
class Failure:
    run: GridRun
    exit_code: int
    message: str


def main() -> int:
    argv = sys.argv[1:]
    with report_errors():
        try:
            return compare_folders(parse_folders(argv)) if "--runs" in argv else compare(parse(argv))
        except Interrupted as interrupted:
            print(f"stopped by {interrupted}; the same command goes on", file=sys.stderr)
            return interrupted.exit_code


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs, the table and the figure")
    parser.add_argument("--objectives", nargs="+", required=True, metavar="NAME")
    parser.add_argument("--latents", nargs="+", required=True, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, required=True, metavar="N")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the cores")
    parser.add_argument(
        "--launch", default="", help='what starts training, such as "accelerate launch --num_processes 2"'
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="OBJECTIVE[/LATENT]:key=value",
        help="an override for one objective, or for one objective with one latent",
    )
    parser.add_argument("--table-only", action="store_true", help="train nothing; compare the runs that are done")
    parser.add_argument("--skip-refused", action="store_true", help="leave out combinations that the config refuses")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all runs, such as train.steps=400")
    # An override may also follow an option that takes a list; what follows an option of one value is that value.
    is_override = [
        OVERRIDE.fullmatch(argument) is not None and before not in ONE_VALUE
        for before, argument in zip(["", *argv], argv, strict=False)
    ]
    overrides = list(compress(argv, is_override))
    return parser.parse_intermixed_args([*overrides, *compress(argv, [not is_one for is_one in is_override])])


def parse_folders(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", type=Path, required=True, help="folders of evaluated runs")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables, the figure and the page")
    return parser.parse_args(argv)


def compare_folders(args: argparse.Namespace) -> int:
    """Compare evaluated runs, each a row under its folder's name, from where their paths part.

    Raises: UserError: a folder holds no evaluated run, or --out cannot be written.
    """
    made = []
    above = os.path.commonpath([folder.resolve().parent for folder in args.runs])
    for folder in args.runs:
        metrics = read_metrics(folder)
        if metrics is None:
            raise UserError(f"--runs {folder}: there is no metrics.json, evaluate the run first")
        config, name = load_run_config(folder), os.path.relpath(folder.resolve(), above)
        made.append(
            MadeRun(folder, RunScores(name, config.model.latent.name, config.seed, flat_numbers(metrics)), metrics)
        )
    make_out_folder(args.out)
    write_comparison(args.out, made, {"runs_given": [str(folder) for folder in args.runs]})
    return 0


def compare(args: argparse.Namespace) -> int:
    check_arguments(args)
    share = max(1, fair_share_of_cores() // args.jobs) if args.jobs > 1 else None
    grid, refused = make_grid(args)
    config_text = read_small(Path(args.config), MAX_YAML_BYTES)  # as it is now: it may change while runs are trained
    if refused:
        print(f"skipped, as the config refuses {refused}", file=sys.stderr)
    make_out_folder(args.out)
    with only_writer(args.out) as lock:
        grid = [keep_threads(run, share) for run in grid]
        check_same_configs(grid)
        todo = [] if args.table_only else [run for run in grid if not is_done(run)]
        failures = run_all(todo, len(grid), args.jobs, args.launch, lock)
        done = [run for run in grid if is_done(run)]
        if done:
            made = [MadeRun(run.folder, *scored(run)) for run in done]
            write_comparison(args.out, made, provenance(args, config_text, failures, refused))
    if not failures:
        return 0
    names = ", ".join(failure.run.name for failure in failures)
    print(f"{len(failures)} of {len(grid)} runs failed: {names}; the same command tries them again", file=sys.stderr)
    return EXIT_USER_ERROR if all(failure.exit_code == EXIT_USER_ERROR for failure in failures) else 1


# ---------------------------------------------------------------------------------------------------------- grid


def check_arguments(args: argparse.Namespace) -> None:
    """Raises: UserError: a name that the config does not know, a key that the grid sets, a launcher that is missing."""
    for option, names, allowed in (
        ("--objectives", args.objectives, choices("objective")),
        ("--latents", args.latents, choices("model.latent")),
    ):
        for name in names:
            if name not in allowed:
                raise UserError(f"{option} {name}: allowed are {', '.join(allowed)}")
    for setting in args.set:
        target, colon, override = setting.partition(":")
        objective, slash, latent = target.partition("/")
        if not colon or objective not in args.objectives or (slash and latent not in args.latents):
            raise UserError(
                f"--set {setting} must read OBJECTIVE[/LATENT]:key=value, with an objective and a latent of the grid"
            )
        check_not_of_grid(override)
    for override in args.overrides:
        check_not_of_grid(override)
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs} must be at least 1")
    try:
        program, *_ = shlex.split(args.launch) or [sys.executable]
    except ValueError as error:
        raise UserError(f"--launch {args.launch!r} cannot be split into words: {error}") from error
    if shutil.which(program) is None:
        raise UserError(f"--launch {args.launch!r}: there is no program {program!r}")


def check_not_of_grid(override: str) -> None:
    key = override.partition("=")[0]
    if key in GRID_KEYS:
        raise UserError(f"override {override!r}: the grid sets {key}, use {GRID_KEYS[key]}")


def make_grid(args: argparse.Namespace) -> tuple[list[GridRun], str]:
    """All runs in the order given, and a line on the combinations that the config refuses, empty for none.

    Raises:
        UserError: the config refuses a combination and --skip-refused is not given, or it refuses all.
    """
    grid: list[GridRun] = []
    reasons: dict[str, list[str]] = {}
    # A name given twice is one.
    for objective in dict.fromkeys(args.objectives):
        for latent in dict.fromkeys(args.latents):
            try:
                grid += [
                    GridRun(objective, latent, seed, run_config(args, objective, latent, seed))
                    for seed in dict.fromkeys(args.seeds)
                ]
            except UserError as error:
                reasons.setdefault(str(error), []).append(f"{objective}/{latent}")
    refused = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
    if not grid:
        raise UserError(next(iter(reasons)) if len(reasons) == 1 else refused)
    if refused and not args.skip_refused:
        raise UserError(f"{refused} (--skip-refused leaves such combinations out)")
    return grid, refused


def run_config(args: argparse.Namespace, objective: str, latent: str, seed: int) -> Config:
    """The base config with the overrides for all runs, then those for the objective, for both, and the grid's own."""
    own = [setting.partition(":") for setting in args.set]
    return load_config(
        args.config,
        [
            *args.overrides,
            *(override for target, _, override in own if target == objective),
            *(override for target, _, override in own if target == f"{objective}/{latent}"),
            f"objective.name={objective}",
            f"model.latent={latent}",
            f"seed={seed}",
            f"run_dir={args.out / f'{objective}-{latent}' / f'seed_{seed}'}",
        ],
    )


def keep_threads(run: GridRun, share: int | None) -> GridRun:
    """The run with its share of the cores where the config has no number of threads.

    One that is begun keeps the number that it has, so that --jobs may change in between.
    """
    if run.config.train.num_threads is not None:
        return run
    saved = saved_config(run)
    num_threads = share if saved is None else saved.train.num_threads
    train = dataclasses.replace(run.config.train, num_threads=num_threads)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, train=train))


def saved_config(run: GridRun) -> Config | None:
    return load_run_config(run.folder) if RunFolder(run.folder).config.is_file() else None


def changes_of(run: GridRun) -> list[str]:
    """What keeps a run from being resumed with the grid's config, each as 'key=before, now after'."""
    saved = saved_config(run)
    if saved is None:
        return []
    return [
        f"{key}={before!r}, now {now!r}"
        for key, (before, now) in changed_keys(saved, run.config).items()
        if key not in RESUMABLE_CHANGES
    ]


def check_same_configs(grid: Sequence[GridRun]) -> None:
    """Raises: UserError: a folder of the grid holds a run of another config."""
    stale = {run.name: changes for run in grid if (changes := changes_of(run))}
    if stale:
        name, changes = next(iter(stale.items()))
        others = f" (so do {len(stale) - 1} more runs)" if len(stale) > 1 else ""
        raise UserError(
            f"{name} holds a run of another config: {'; '.join(changes)}{others}; "
            "ask for the same config, delete the run or choose another --out"
        )


def is_done(run: GridRun) -> bool:
    """Whether the run's metrics are those of this config, at its last step."""
    metrics = read_metrics(run.folder)
    return value_at(metrics, "train.steps") == run.config.train.steps and not changes_of(run)


# ------------------------------------------------------------------------------------------------------ children


@dataclass(frozen=True)
class Running:
    run: GridRun
    phase: str
    child: subprocess.Popen[bytes]


def open_own(path: Path, flags: int) -> BinaryIO:
    """Open a file of a comparison, made where there is none. Raises UserError: it cannot be written, or is a link."""
    try:
        # O_NONBLOCK: opening a FIFO would wait for a reader.
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}") from error
    return open(descriptor, "ab" if flags & os.O_APPEND else "wb", buffering=0)


@contextmanager
def only_writer(out: Path) -> Iterator[int]:
    """Hold the lock of a folder. Children inherit its descriptor, which is yielded, and hold it as long as they live.

    Raises:
        UserError: another comparison, or a child that one left behind, still writes there.
    """
    with open_own(out / ".lock", os.O_WRONLY) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another comparison still writes to {out}: wait for its end or choose another --out"
            ) from error
        yield file.fileno()


def run_all(todo: Sequence[GridRun], total: int, jobs: int, launch: str, lock: int) -> list[Failure]:
    """Train and evaluate, `jobs` runs at a time. A run that fails does not stop the others.

    Raises:
        Interrupted: SIGINT or SIGTERM came; children have saved their checkpoints.
    """
    waiting, running, failures = deque(todo), list[Running](), list[Failure]()
    bar = tqdm(total=total, initial=total - len(todo), unit="run")
    with stop_signals() as stop, bar:
        try:
            while waiting or running:
                if number := stop():
                    bar.set_postfix_str("stopping")
                    interrupt(running)
                    raise Interrupted(number)
                while waiting and len(running) < jobs:
                    running.append(start(waiting.popleft(), "train", launch, lock))
                    name_runs(bar, running)
                for job in [job for job in running if job.child.poll() is not None]:
                    running.remove(job)
                    if job.child.returncode:
                        failures.append(failure_of(job))
                        bar.write(failures[-1].message, file=sys.stderr)
                        bar.update()
                    elif job.phase == "train":
                        running.append(start(job.run, "evaluate", launch, lock))
                    else:
                        bar.update()
                    name_runs(bar, running)
                time.sleep(POLL_S)
                if sys.stderr.isatty():
                    bar.refresh()
        finally:
            for job in running:
                signal_group(job, signal.SIGKILL)
                job.child.wait()
    return failures


def name_runs(bar: tqdm, running: Sequence[Running]) -> None:
    bar.set_postfix_str(", ".join(f"{job.phase} {job.run.name}" for job in running))


def start(run: GridRun, phase: str, launch: str, lock: int) -> Running:
    """Start a phase of a run in a process group of its own: Ctrl-C in a terminal reaches it through us, once."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    config_path = run.beside(".yaml")
    if phase == "train":
        # As resolved at the start: a config file that is edited meanwhile changes nothing.
        write_text(config_path, to_yaml(run.config))
        launcher = shlex.split(launch) or [sys.executable]
        command = [*launcher, str(SCRIPTS / "train.py"), "--config", str(config_path), "--resume"]
    else:
        command = [sys.executable, str(SCRIPTS / "evaluate.py"), "--run", str(run.folder), "--allow-remote"]
    environment = {"PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "10", **os.environ}
    if run.config.train.num_threads:
        environment["OMP_NUM_THREADS"] = str(run.config.train.num_threads)
    with open_own(run.beside(".log.txt"), os.O_WRONLY | os.O_APPEND) as log:
        log.write(f"\n$ {shlex.join(command)}\n".encode())
        log.flush()
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            process_group=0,
            pass_fds=(lock,),
        )
    return Running(run, phase, child)


def interrupt(running: Sequence[Running]) -> None:
    """Ask all children to save and stop, and wait for them, and a while for what a launcher leaves behind."""
    for job in running:
        signal_group(job, signal.SIGINT)
    for job in running:
        job.child.wait()
    deadline_s = time.monotonic() + LAUNCHER_GRACE_S
    while any(signal_group(job, 0) for job in running) and time.monotonic() < deadline_s:
        time.sleep(POLL_S)


def signal_group(job: Running, number: int) -> bool:
    """Send a signal to a child and its own children; False where none is left."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(job.child.pid, number)
        return True
    return False


def failure_of(job: Running) -> Failure:
    """What a child that failed said: its one line for a user's mistake, or else its last lines."""
    path, code = job.run.beside(".log.txt"), job.child.returncode
    _, _, last = path.read_text(encoding="utf-8", errors="replace").rpartition("\n$ ")
    lines = [line.rstrip() for line in last.splitlines()[1:] if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:  # a launcher has an exit code of its own
        return Failure(job.run, EXIT_USER_ERROR, f"{job.run.name}: {errors[-1]}")
    shown = "".join(f"\n    {line}" for line in lines[-LINES_SHOWN:])
    return Failure(job.run, code, f"{job.run.name}: {job.phase}.py failed with exit code {code}, see {path}{shown}")


# ------------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class MadeRun:
    """An evaluated run in its folder; `metrics` is the content of metrics.json."""

    folder: Path
    run: RunScores
    metrics: Metrics


def scored(run: GridRun) -> tuple[RunScores, Metrics]:
    metrics = read_metrics(run.folder) or Metrics()
    return RunScores(run.objective, run.latent, run.seed, flat_numbers(metrics)), metrics


def provenance(args: argparse.Namespace, config_text: str, failures: list[Failure], refused: str) -> dict[str, Any]:
    """What comparison.json says of the grid that the runs are of."""
    return {
        "grid": {name: value for name, value in vars(args).items() if name not in ("config", "out")},
        "config": args.config,
        "config_text": config_text,
        "failed": {failure.run.name: failure.message for failure in failures},
        "refused": refused,
    }


def write_comparison(out: Path, made: Sequence[MadeRun], about: dict[str, Any]) -> None:
    """comparison.json, comparison.md, comparison.png and compare.html of evaluated runs."""
    runs = [one.run for one in made]
    if len({one.metrics.get("queries_sha256") for one in made}) > 1:
        print("warning: these runs were scored on different queries", file=sys.stderr)
    content = {
        **about,
        "runs": [{"folder": os.path.relpath(one.folder, out), **dataclasses.asdict(one.run)} for one in made],
        "cells": [dataclasses.asdict(cell) for cell in summarise_groups(runs)],
    }
    markdown, figure = comparison_markdown(runs), comparison_figure(runs)
    paths = [out / name for name in ("comparison.json", "comparison.md", "compare.html", "comparison.png")]
    histories = [read_history(one.folder) for one in made]
    try:
        write_text(paths[0], json.dumps(content, indent=1) + "\n")
        write_text(paths[1], markdown + "\n")
        write_comparison_page(paths[2], title=out.name, runs=runs, histories=histories)
        if figure is None:
            paths.pop().unlink(missing_ok=True)
        else:
            write_bytes(paths[3], png(figure))
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}") from error
    print("\n".join(["", markdown, "", *map(str, paths)]))


if __name__ == "__main__":
    sys.exit(main())
