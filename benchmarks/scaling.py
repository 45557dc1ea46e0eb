"""Time training steps on 1, 2, 4, ... processes and report the speedup.

python benchmarks/scaling.py --config configs/paper.yaml --processes 1 2 --out scaling.json [key=value ...]

Every number of processes trains on the same global batches of data.batch_size clips, including loading or rendering: on
CPUs with one thread each (train.num_threads), on GPUs with one GPU each. The numbers are interleaved, so that passing
load affects all of them. Speedup is clips per second relative to the first number, by the median of all steps, and by
the fastest decile, which is less affected by other load. Efficiency is the speedup per process. Defaults that differ
from the config: train.precision=auto, and data.mnist_dir=null, for digits that need no files.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm.auto import tqdm

from data_pipelines.errors import UserError
from data_pipelines.files import write_text
from data_pipelines.worlds.fresh import share_of_rank
from worldmodel.commands.exits import leave, report_errors
from worldmodel.commands.process import keep_freed_memory
from worldmodel.commands.shared import add_overrides, check_counts, check_out_file, write_result
from worldmodel.config import Config, MovingMnistConfig, load_config
from worldmodel.sources import make_source
from worldmodel.training.launch import make_accelerator
from worldmodel.training.machine import machine_description
from worldmodel.training.timing import synchronise
from worldmodel.training.trainer import Trainer

DEFAULTS = ("train.precision=auto", "train.num_threads=1")
WARMUP_STEPS = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/paper.yaml"))
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes, in order (default: 1 2)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each with fresh processes (default: 3)")
    parser.add_argument(
        "--steps", type=int, default=12, help=f"timed steps per round, after {WARMUP_STEPS} warm-up steps (default: 12)"
    )
    parser.add_argument("--out", type=Path, default=Path("scaling.json"), help="JSON file to write")
    parser.add_argument("--times", type=Path, help=argparse.SUPPRESS)  # in one of the processes: the file for its times
    add_overrides(parser, "values that replace the config's, such as data.batch_size=256")
    args = parser.parse_intermixed_args()
    with report_errors():
        overrides = [*DEFAULTS, *args.overrides]
        if isinstance(load_config(args.config, overrides).data, MovingMnistConfig):
            overrides = ["data.mnist_dir=null", *overrides]
        config = load_config(args.config, overrides)
        if args.times:
            run_steps(config, args.steps, args.times)
            return 0
        check_counts(args, "rounds", "steps")
        check_out_file(args.out, ".json")
        if min(args.processes) < 1:
            raise UserError(f"--processes must be at least 1, not {min(args.processes)}")
        for number in args.processes:
            share_of_rank(config.data.batch_size, 0, number)  # raises UserError if they cannot divide a batch
        arguments = ["--config", str(args.config), "--steps", str(args.steps), *args.overrides]
        result = bench(config, args.processes, args.rounds, arguments)
        write_result(args.out, result)
        print(f"{summary(result)}\n{args.out}")
    return 0


def bench(config: Config, numbers: list[int], rounds: int, arguments: list[str]) -> dict[str, Any]:
    """Return the content of scaling.json."""
    seconds: list[list[float]] = [[] for _ in numbers]
    turns = [pair for _ in range(rounds) for pair in zip(numbers, seconds, strict=True)]
    for number, of_number in tqdm(turns, unit="turn"):
        of_number += seconds_of(number, arguments)
    rows: list[dict[str, Any]] = []
    for number, of_number in zip(numbers, seconds, strict=True):
        step_s, quick_step_s = median(of_number), sorted(of_number)[len(of_number) // 10]
        first = rows[0] if rows else {"processes": number, "step_s": step_s, "quick_step_s": quick_step_s}
        speedup = first["step_s"] / step_s
        rows.append(
            {
                "processes": number,
                "step_s": step_s,
                "clips_per_s": config.data.batch_size / step_s,
                "speedup": speedup,
                "efficiency": speedup * first["processes"] / number,
                "quick_step_s": quick_step_s,
                "quick_speedup": first["quick_step_s"] / quick_step_s,
            }
        )
    return {"machine": machine_description(), "batch_size": config.data.batch_size, "rows": rows}


def seconds_of(num_processes: int, arguments: list[str]) -> list[float]:
    """Return the seconds of each step of several processes, measured by the first of them.

    Raises:
        UserError: they failed; their messages are on stderr.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    with tempfile.TemporaryDirectory(prefix="scaling_") as folder:
        times = Path(folder) / "times.json"
        command = [*launcher, str(Path(__file__).resolve()), "--times", str(times), *arguments]
        if subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}).returncode or not times.is_file():
            raise UserError(f"{num_processes} processes did not get through {arguments}: see above")
        return json.loads(times.read_text(encoding="utf-8"))


def run_steps(config: Config, steps: int, times: Path) -> None:
    """Train in one of the processes. The first process writes the seconds of its steps."""
    accelerator = make_accelerator(config.train.precision, config.train.timeout_s)
    torch.set_num_threads(config.train.num_threads or 1)
    keep_freed_memory()
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    source = make_source(config)
    steps_ahead = config.objective.rollout_steps
    stream = source.training_stream(steps_ahead, rank=rank, world_size=world_size, device=device)
    trainer = Trainer(config, accelerator)
    batches = stream.batches()
    seconds = []
    for _ in range(WARMUP_STEPS + steps):
        start_s = time.perf_counter()
        trainer.update(batches)
        synchronise(device)
        seconds.append(time.perf_counter() - start_s)
    batches.close()
    if accelerator.is_main_process:
        write_text(times, json.dumps(seconds[WARMUP_STEPS:]))
    accelerator.end_training()


def summary(result: dict[str, Any]) -> str:
    header = (
        f"{'processes':>9}  {'step, s':>8}  {'clips/s':>8}  {'speedup':>7}  {'efficiency':>10}  "
        f"{'quickest tenth, s':>17}  {'speedup':>7}"
    )
    return "\n".join(
        [
            header,
            *(
                f"{row['processes']:9}  {row['step_s']:8.3f}  {row['clips_per_s']:8.1f}  {row['speedup']:7.2f}  "
                f"{row['efficiency']:10.0%}  {row['quick_step_s']:17.3f}  {row['quick_speedup']:7.2f}"
                for row in result["rows"]
            ),
        ]
    )


if __name__ == "__main__":
    leave(main())
