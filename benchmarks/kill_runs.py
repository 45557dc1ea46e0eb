"""Kill trainings at random moments, resume them, and compare them with an uninterrupted one.

python benchmarks/kill_runs.py [--kills N] [--seed S]

Writes small videos and trains on them, with evaluations, a checkpoint every few steps, and refinement. SIGKILL is sent
at a random time, which may be before the first step or during the write of a checkpoint. Its target is the main
process, all processes, or one worker; after the death of a worker the training must continue. After each kill, no
process and no shared memory may be left after LEFT_S seconds. Then the training is resumed. When it has ended, the
next one begins, until --kills is reached.

Each training must end with the same model, teacher and optimiser as the uninterrupted one, bit for bit, in the latest
and the best checkpoint, and with the same rows of metrics.jsonl except for times. Its folder may hold no lock, no
temporary file, and no checkpoint that the index does not name.

The exit code is 1 if anything differs or is left. Linux only.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from tqdm.auto import tqdm

from data_pipelines.errors import UserError
from data_pipelines.worlds.moving_mnist import write_moving_mnist
from worldmodel.commands.exits import report_errors
from worldmodel.commands.jobs import signal_group
from worldmodel.commands.shared import check_counts
from worldmodel.training.machine import child_processes

REPO = Path(__file__).resolve().parents[1]
LEFT_S = 2.0
LONGEST_S = 300.0  # of a session; then it counts as hanging
LATEST_S = 7.0  # of a kill after the start of a session
POLL_S = 0.001
WHOM = ("main", "group", "worker")
WHEN = ("any time", "any time", "in a save")
WEIGHT_FILES = ("model", "teacher", "optimizer")
TIMES = ("clips_per_s", "tflops", "mfu")
CONFIG = (
    *("seed=3", "data.size_px=32", "data.batch_size=16", "data.num_lanes=4", "data.num_workers=2"),
    *("model.encoder.width=0.125", "model.hidden_dim=32", "model.embedding_dim=16"),
    *("train.steps=150", "train.warmup_steps=5", "train.precision=fp32", "train.num_threads=1", "train.log_every=1"),
    *("train.eval_every=50", "train.checkpoint_every=5", "train.refine_steps=200", "train.refine_clips=32"),
    *("evaluation.queries=24", "evaluation.num_samples=8", "evaluation.law_samples=8", "evaluation.fit_clips=64"),
    *("evaluation.selection_clips=32", "tracking.wandb=disabled"),
)


class Session:
    """A training process and its child processes. As a context manager, it ends them with its block."""

    def __init__(self, videos: Path, run: Path) -> None:
        self.run = run
        self.output = run.with_suffix(".txt")
        self.shared = set(os.listdir("/dev/shm"))
        self.started_s = time.time()
        script = [
            sys.executable,
            str(REPO / "scripts" / "train.py"),
            "--config",
            str(REPO / "configs" / "objectives.yaml"),
        ]
        environment = {"PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*script, *CONFIG, f"data.root={videos}", f"run_dir={run}", "--resume"],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=REPO,
                env=os.environ | environment,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            signal_group(self.process, signal.SIGKILL)
            self.process.wait()

    def seconds(self) -> float:
        return time.time() - self.started_s

    def phase(self) -> str:
        """Return the phase of the training, judged by its folder."""
        if self.is_saving():
            return "saving"
        with suppress(FileNotFoundError):
            if (self.run / "metrics.jsonl").stat().st_mtime > self.started_s:
                rows = (self.run / "metrics.jsonl").read_bytes().splitlines()
                return "refining" if rows and b'"refinement"' in rows[-1] else "training"
        return "starting"

    def is_saving(self) -> bool:
        return any((self.run / "checkpoints").glob(".step_*.partial"))

    def wait(self, when: str, chance: random.Random) -> bool:
        """Wait for the moment to kill. Return False if the training ends earlier."""
        due_s = self.seconds() + chance.uniform(0.0, LATEST_S)
        delay_s = chance.uniform(0.0, 0.02)
        while self.process.poll() is None and self.seconds() < LONGEST_S:
            if (when == "in a save" and self.is_saving()) or (when == "any time" and self.seconds() > due_s):
                time.sleep(delay_s if when == "in a save" else 0.0)
                return self.process.poll() is None
            time.sleep(POLL_S)
        return False

    def kill(self, whom: str, chance: random.Random) -> str:
        """Kill the main process, all processes or a worker (the main process if there is none). Return the target."""
        workers = child_processes(self.process.pid) if whom == "worker" else []
        if workers:
            with suppress(ProcessLookupError):
                os.kill(chance.choice(workers), signal.SIGKILL)
            return "worker"
        if whom == "group":
            os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self.process.kill()
        self.process.wait()
        return "group" if whom == "group" else "main"

    def left(self) -> list[str]:
        """Return the processes and shared memory that are left after LEFT_S seconds."""
        deadline_s = time.monotonic() + LEFT_S
        while (found := [*self._processes(), *self._shared_memory()]) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        for pid in self._processes():
            with suppress(ProcessLookupError):
                os.kill(int(pid.split()[1]), signal.SIGKILL)
        return found

    def _processes(self) -> list[str]:
        return [f"process {pid}" for pid, state, session in processes() if session == self.process.pid and state != "Z"]

    def _shared_memory(self) -> list[str]:
        """Return new names in /dev/shm that no process has mapped or open."""
        new = set(os.listdir("/dev/shm")) - self.shared
        return [f"/dev/shm/{name}" for name in sorted(new) if name not in in_use()] if new else []


def processes() -> Iterator[tuple[int, str, int]]:
    """Return the number, state and session of each process."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
                yield int(entry.name), fields[0], int(fields[3])


def in_use() -> set[str]:
    """Return the names in /dev/shm that a process has mapped or open."""
    names = set()
    for pid, _, _ in processes():
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
            names |= {Path(line.split()[-1]).name for line in lines if "/dev/shm/" in line}
        with suppress(OSError):
            links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
            names |= {Path(link).name for link in links if link.startswith("/dev/shm/")}
    return names


def faults_of(run: Path, reference: Path) -> list[str]:
    """Return the differences of a finished training from the uninterrupted one, and the files left in its folder."""
    index, expected = (json.loads((folder / "checkpoints" / "index.json").read_text()) for folder in (run, reference))
    if index != expected:
        return [f"index.json is {index}, not {expected}"]
    faults = []
    for name in dict.fromkeys([index["latest"], index["best"]]):
        folder, other = run / "checkpoints" / name, reference / "checkpoints" / name
        for part in WEIGHT_FILES:
            differing = differences(load_file(folder / f"{part}.safetensors"), load_file(other / f"{part}.safetensors"))
            faults += (
                [f"{name}: {len(differing)} tensors of the {part} differ, first {differing[0]}"] if differing else []
            )
        states = [json.loads((path / "state.json").read_text()) | {"train_seconds": 0} for path in (folder, other)]
        faults += [f"{name}: state.json is {states[0]}, not {states[1]}"] if states[0] != states[1] else []
    rows, others = untimed_rows(run), untimed_rows(reference)
    if rows != others:
        first = next((row for row, other in zip(rows, others, strict=False) if row != other), None)
        faults.append(f"metrics.jsonl: {len(rows)} rows, not {len(others)}, the first that differs is {first}")
    names = {"index.json", *index["kept"], index["best"]}
    faults += [f"left: {path.name}" for path in (run / "checkpoints").iterdir() if path.name not in names]
    faults += [f"left: {path.name}" for path in run.iterdir() if path.name == ".lock" or path.suffix == ".partial"]
    return faults


def differences(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that differ in any bit or exist only once."""

    def same(name: str) -> bool:
        one, other = tensors.get(name), expected.get(name)
        if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
            return False
        return one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes()

    return [name for name in sorted(tensors.keys() | expected.keys()) if not same(name)]


def untimed_rows(run: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without times and values that depend on them."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in TIMES and not key.endswith("_s")} for row in rows]


def kill_runs(folder: Path, num_kills: int, seed: int) -> tuple[Counter[tuple[str, str]], int, list[str]]:
    """Return the number of kills by target and phase, the number of trainings, and the faults."""
    chance = random.Random(seed)
    videos, reference = folder / "videos", folder / "reference"
    write_moving_mnist(videos, {"train": 64, "selection": 32, "test": 24}, num_processes=1)
    with Session(videos, reference) as session:
        if session.process.wait():
            raise UserError(f"the uninterrupted training failed: {session.output.read_text()[-2000:]}")
    kills: Counter[tuple[str, str]] = Counter()
    faults: list[str] = []
    num_runs = 0
    with tqdm(total=num_kills, unit="kill") as bar:
        while kills.total() < num_kills:
            run = folder / f"run_{num_runs}"
            for index in videos.rglob(".worldmodel_index*"):  # to be made again, so that kills fall into that as well
                index.unlink()
            while True:
                with Session(videos, run) as session:
                    while kills.total() < num_kills and session.wait(chance.choice(WHEN), chance):
                        phase = session.phase()
                        whom = session.kill(chance.choice(WHOM), chance)
                        kills[whom, phase] += 1
                        bar.update()
                        if whom != "worker":
                            break
                    with suppress(subprocess.TimeoutExpired):
                        session.process.wait(timeout=LONGEST_S)
                    code = session.process.poll()
                    faults += [f"run_{num_runs}: {left} is left after the end or a kill" for left in session.left()]
                    if code not in (0, -signal.SIGKILL):
                        faults.append(f"run_{num_runs}: exit code {code}: {session.output.read_text()[-500:]}")
                if code != -signal.SIGKILL:
                    break
            if code == 0:
                faults += [f"run_{num_runs}: {fault}" for fault in faults_of(run, reference)]
            faults += [f"left: {path}" for path in videos.rglob("*.partial")]
            num_runs += 1
    return kills, num_runs, faults


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="number of SIGKILLs (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments and targets (default: 0)")
    args = parser.parse_args(arguments)
    started_s = time.monotonic()
    with report_errors():
        check_counts(args, "kills")
        with tempfile.TemporaryDirectory() as folder:
            kills, num_runs, faults = kill_runs(Path(folder), args.kills, args.seed)
        phases = ("starting", "training", "saving", "refining")
        print("| killed | " + " | ".join(phases) + " | all |\n|" + " --- |" * (len(phases) + 2))
        for whom in WHOM:
            counts = [kills[whom, phase] for phase in phases]
            print(f"| {whom} | " + " | ".join(map(str, counts)) + f" | {sum(counts)} |")
        print(
            f"{kills.total()} kills, {num_runs} trainings, {len(faults)} faults, {time.monotonic() - started_s:.0f} s"
        )
        for fault in faults:
            print(f"- {fault}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
