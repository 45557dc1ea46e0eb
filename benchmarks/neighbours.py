"""Time a training step alone, alongside a busy loop, and alongside another training: ours and plain PyTorch.

python benchmarks/neighbours.py --config configs/objectives.yaml --out neighbours.json [key=value ...]

Three trainings are timed, each in fresh processes: ours as `worldmodel train` runs it, ours without taking turns with
other trainings, and the plain step (benchmarks/plain_step.py, fp32) with all defaults of torch. Each is timed on its
own, next to a Python process that never waits, and next to a second process of the same training. Each case has
--rounds rounds of --steps timed steps, on batches rendered beforehand. First, the cases alone and with two trainings
alternate; of two trainings, the slower one is reported. Then the trainings alternate next to the Python process. There
each is started again in each round, once that process counts in the load of the last minute: ours chooses its threads
when it starts.

A ratio is relative to the same training alone. With T threads per training alone, n threads of the neighbour and C
cores, the fair share is max(1, (T + n) / C) times the time alone. Defaults that differ from the config:
train.precision=auto, and data.source=moving_mnist, model.latent.prior_components=1 and train.warmup_steps=0, for which
the plain step is written.
"""

import argparse
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import psutil
import torch
from tqdm.auto import tqdm

from data_pipelines.errors import UserError
from worldmodel.commands.exits import report_errors
from worldmodel.commands.process import prepare_process
from worldmodel.commands.shared import add_overrides, check_counts, check_out_file, write_result
from worldmodel.config import Config, load_config
from worldmodel.training.machine import CORES, machine_description
from worldmodel.training.timing import synchronise
from worldmodel.training.turns import turns_here

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.train_step import check_plain, in_fp32, make_plain, make_trainer, timed_batches

DEFAULTS = (
    "train.precision=auto",
    "data.source=moving_mnist",
    "model.latent.prior_components=1",
    "train.warmup_steps=0",
)
ALONE, BUSY, TRAINING = NEIGHBOURS = ("alone", "busy loop", "training")
LAST_STEP = "last step"  # request to a second training


class Kind(NamedTuple):
    """A training to time: our step or the plain one, and whether it takes turns with other trainings."""

    name: str
    ours: bool
    takes_turns: bool


KINDS = (Kind("ours", True, True), Kind("ours, no turns", True, False), Kind("plain", False, False))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/objectives.yaml"))
    parser.add_argument("--out", type=Path, default=Path("neighbours.json"), help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all cases (default: 3)")
    parser.add_argument("--steps", type=int, default=30, help="timed steps per case and round (default: 30)")
    add_overrides(parser, "values that replace the config's, such as data.batch_size=256")
    args = parser.parse_intermixed_args()
    with report_errors():
        check_counts(args, "rounds", "steps")
        check_out_file(args.out, ".json")
        config = load_config(args.config, [*DEFAULTS, *args.overrides])
        check_plain(config)
        result = bench(config, args.rounds, args.steps)
        write_result(args.out, result)
        print(f"{summary(result)}\n{args.out}")
    return 0


def bench(config: Config, rounds: int, steps: int) -> dict[str, Any]:
    """Return the content of neighbours.json: times in seconds."""
    machine = machine_description()  # first, because later the load is our own
    times: dict[tuple[Kind, str], list[list[float]]] = {
        (kind, neighbour): [[], []] for kind in KINDS for neighbour in NEIGHBOURS
    }
    with tqdm(total=rounds * len(times), unit="case") as bar:

        def keep(kind: Kind, neighbour: str, more: tuple[list[float], list[float]]) -> None:
            for seconds, of_case in zip(times[kind, neighbour], more, strict=True):
                seconds += of_case
            bar.update()

        with ExitStack() as stack:
            trainings = {kind: [stack.enter_context(training(kind, config)) for _ in range(2)] for kind in KINDS}
            threads = {kind: dict.fromkeys(NEIGHBOURS, one.num_threads) for kind, (one, _) in trainings.items()}
            for kind, neighbour in list(product(KINDS, (ALONE, TRAINING))) * rounds:
                keep(kind, neighbour, timed(trainings[kind], neighbour, steps))
        for kind in KINDS * rounds:
            with busy_loop(), training(kind, config) as one:
                threads[kind][BUSY] = one.num_threads
                keep(kind, BUSY, (one.ask_and_wait(steps), []))
    rows = [
        row_of(kind, threads[kind], {neighbour: times[kind, neighbour] for neighbour in NEIGHBOURS}) for kind in KINDS
    ]
    return {"machine": machine, "cores": len(CORES), "batch_size": config.data.batch_size, "rows": rows}


def row_of(kind: Kind, num_threads: dict[str, int], times: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Return the mean times of a training with their ratios, by neighbour. A median would miss the waits for turns.

    num_threads: of a training, by neighbour.
    times: by neighbour, the seconds of the steps of the training, and those of the second training if it ran.
    """
    alone_s = mean(times[ALONE][0])
    cases = {}
    for neighbour, seconds in times.items():
        step_s = max(mean(of_one) for of_one in seconds if of_one)
        own = num_threads[ALONE]
        share = fair_share(own, {ALONE: 0, BUSY: 1, TRAINING: own}[neighbour], len(CORES))
        cases[neighbour] = {
            "num_threads": num_threads[neighbour],
            "step_s": step_s,
            "to_alone": step_s / alone_s,
            "fair_share": share,
            "to_fair_share": step_s / alone_s / share,
            "steps_s": seconds,
        }
    return {"training": kind.name, "cases": cases}


def fair_share(num_threads: int, num_others: int, num_cores: int) -> float:
    """Return the least time relative to that alone if all threads get the same share of the cores."""
    return max(1.0, (num_threads + num_others) / num_cores)


def timed(pair: "list[Training]", neighbour: str, steps: int) -> tuple[list[float], list[float]]:
    """Return the seconds of the steps of the first training with this neighbour, and of the second if it ran."""
    one, other = pair
    if neighbour == TRAINING:
        other.ask(None)
        seconds = one.ask_and_wait(steps)
        other.ask(LAST_STEP)
        return seconds, other.wait()
    return one.ask_and_wait(steps), []


@contextmanager
def busy_loop() -> Iterator[None]:
    """Run a process that never waits, from when it counts in the load of the last minute."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            while psutil.getloadavg()[0] < 1:
                time.sleep(1)
            yield
        finally:
            process.kill()


class Training:
    """A training in a process of its own, which waits for requests: `serve`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.num_threads: int = self.wait()

    def ask(self, request: Any) -> None:
        """Send a request: a number of steps, None for steps until LAST_STEP, or LAST_STEP."""
        self._connection.send(request)

    def wait(self) -> Any:
        """Return the answer to a request for steps: the seconds of each. Raises UserError: the process has failed."""
        answer = self._connection.recv()
        if isinstance(answer, UserError):
            raise answer
        return answer

    def ask_and_wait(self, steps: int) -> Any:
        self.ask(steps)
        return self.wait()


@contextmanager
def training(kind: Kind, config: Config) -> Iterator[Training]:
    """Start a training and wait until it is ready."""
    spawning = multiprocessing.get_context("spawn")
    here, there = spawning.Pipe()
    process = spawning.Process(target=serve, args=(kind, config, there), daemon=True)
    process.start()
    there.close()  # only the process holds it now: its end is seen
    try:
        with here:
            yield Training(here)
    finally:
        process.join()


def serve(kind: Kind, config: Config, requests: Connection) -> None:
    """Send the number of threads, and then answer the requests for steps of a training until there are no more."""
    with ExitStack() as stack, suppress(EOFError):  # which says that nothing more is asked
        try:
            step = make_step(kind, config, stack)
            requests.send(torch.get_num_threads())
            while True:
                wanted = requests.recv()
                step()  # caches are warm again, and the neighbour has started
                seconds: list[float] = []
                while len(seconds) < wanted if wanted else not (seconds and requests.poll()):
                    started_s = time.perf_counter()
                    step()
                    seconds.append(time.perf_counter() - started_s)
                if not wanted:
                    requests.recv()  # LAST_STEP
                requests.send(seconds)
        except UserError as error:
            requests.send(error)


def make_step(kind: Kind, config: Config, stack: ExitStack) -> Callable[[], None]:
    """Return a function that makes one update, with the preparations of `worldmodel train` if it is ours."""
    if kind.ours:
        prepare_process(config.train)
        trainer = make_trainer(config)
        device = trainer.accelerator.device
        if kind.takes_turns:
            trainer.turns = stack.enter_context(turns_here(trainer.accelerator))
    else:
        plain = make_plain(config, in_fp32(config))
        device = next(plain.model.parameters()).device
    batches = timed_batches(config, device)

    def step() -> None:
        if kind.ours:
            trainer.update(batches)
        else:
            plain.step(next(batches)["video"])
        synchronise(device)

    return step


def summary(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        f"{machine['cpu']}, {result['cores']} cores, load {machine['load_1min']} before, torch {machine['torch']}",
        f"{'training':<15} {'threads':>7}  {'neighbour':<10} {'step, s':>8} {'to alone':>9} {'fair':>5} {'to fair':>8}",
    ]
    for row in result["rows"]:
        for neighbour, case in row["cases"].items():
            lines.append(
                f"{row['training']:<15} {case['num_threads']:>7}  {neighbour:<10} {case['step_s']:>8.4f} "
                f"{case['to_alone']:>9.2f} {case['fair_share']:>5.2f} {case['to_fair_share']:>8.2f}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
