"""Guard a refactoring: train small models with two checkouts and compare the results bit for bit.

python benchmarks/compare_runs.py OLD_CHECKOUT NEW_CHECKOUT [--cases NAME ...] [--out DIR]

Each case is one config file, which both checkouts read. Each checkout runs in separate processes, on the CPU, in fp32
and with one thread a process: training, then evaluation, then planning where the case plans. The old checkout writes
the videos, and each checkout trains on its own copy of them. Compared are:

    losses    the rows of metrics.jsonl, one for each step of training, each evaluation and each part of refinement
    weights   every tensor in the last checkpoint: model, teacher and optimiser
    metrics   metrics.json, the scores of the evaluation
    planning  planning.json, the success of planning, and planning.safetensors, a few of the planned episodes

Left out of the comparison, because they differ between two runs of the same code:

    metrics.jsonl   keys that end in _s, tflops and mfu: measured times, and speeds that are derived from them
    metrics.json    seconds and run: the time of training, and the name of the run's folder
    planning.json   ms_per_decision: a measured time

Also left out is `protocol` in planning.json: it repeats the config, whose form may change while the results do not.

Prints a table and the first difference of each kind. The exit code is 1 if anything differs or fails. --out keeps the
configs, the runs and the output of each process. Takes about five minutes on one core.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from tqdm.auto import tqdm

TIMEOUT_S = 300.0  # of one process
COLUMNS = ("losses", "weights", "metrics", "planning")
EQUAL, DIFFERS, FAILED, NONE = "equal", "DIFFERS", "FAILED", "-"
SPEEDS = frozenset({"tflops", "mfu"})
IGNORED = {"metrics.json": frozenset({"seconds", "run"}), "planning.json": frozenset({"ms_per_decision", "protocol"})}
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "WANDB_MODE": "disabled",
}

TWO_ROOMS = "{two_rooms}"  # stands for the environment, whose module has moved
DATA: dict[str, tuple[str, ...]] = {
    "single": ("make_moving_mnist", "--train", "32", "--selection", "16", "--test", "12"),
    "kicked": (
        *("make_moving_mnist", "--world", "kicked", "--num-frames", "24"),
        *("--train", "8", "--selection", "4", "--test", "4"),
    ),
    "rooms": (
        *("record_env", "--env", TWO_ROOMS, "--past-end", "--size-px", "32", "--steps", "16"),
        *("--train", "16", "--selection", "6", "--test", "6"),
    ),
}
"""The command that writes each folder of videos."""


@dataclass(frozen=True)
class Case:
    """A config: key=value words, which replace those of BASE. `data` names an entry of DATA, "" for no videos."""

    keys: str
    data: str = "single"
    num_processes: int = 1
    plan: tuple[str, ...] = ()
    """Arguments of planning; without any the case does not plan."""


BASE = """
    seed=3 data.source=videos data.size_px=32 data.channels=1 data.clip_step=3 data.batch_size=8 data.num_lanes=4
    data.num_workers=0 model.encoder=conv3d model.width=0.125 model.embedding_dim=16 model.hidden_dim=32 train.steps=5
    train.lr=0.003 train.warmup_steps=2 train.precision=fp32 train.num_threads=1 train.log_every=1 train.eval_every=5
    train.checkpoint_every=5 evaluation.queries=12 evaluation.num_samples=8 evaluation.law_samples=8
    evaluation.fit_clips=32 evaluation.selection_clips=16 tracking.wandb=disabled
"""
CAUSAL = """
    data.source=causal data.channels=6 data.num_frames=1 data.clip_step=null data.batch_size=32 model.encoder=mlp
    model.embedding_dim=6 model.latent_dim=6 model.oracle_label=change evaluation.queries=128
"""
ROOMS = """
    data.channels=3 data.num_segments=2 data.num_frames=1 data.clip_step=4 model.pooling=moments
    model.embedding_norm=standard model.projector_layers=1 model.editor=residual objective.name=vicreg
    objective.vicreg_weights=[1,16,8] objective.rollout_steps=2 evaluation.horizon=3 evaluation.label=state
    planning.horizon=4 planning.candidates=16 planning.elites=4 planning.iterations=2
"""
PLAN = ("--env", TWO_ROOMS, "--seeds", "2", "--episodes", "1", "--budget", "3")

CASES: dict[str, Case] = {
    "byol_gaussian": Case(
        """objective.name=byol objective.beta=0.001 objective.beta_warmup_steps=3 objective.ema_momentum=0.9
        objective.ema_schedule=cosine model.latent_dim=3 model.prior_components=3"""
    ),
    "infonce_flow": Case(
        """objective.name=infonce objective.temperature=0.3 model.prior=flow model.editor=residual
        model.editor_norm=layer model.pooling=moments"""
    ),
    "hinfonce_sparse_resnet": Case(
        """objective.name=hinfonce model.encoder=resnet model.latent=sparse model.latent_dim=4 model.editor=low_rank
        model.posterior_sees=target"""
    ),
    "aninfonce_oracle": Case("objective.name=aninfonce model.latent=oracle model.latent_dim=2"),
    "vicreg_sum_in_parts": Case(
        """objective.name=vicreg objective.time_variance_weight=1.0 model.embedding_norm=white model.editor=sum
        model.embedding_dim=6 model.latent_dim=6 train.grad_accumulation=2 train.clip_norm=1.0 data.batch_size=32"""
    ),
    "sigreg_none_vit": Case(
        """objective.name=sigreg model.encoder=vit_tiny model.width=1.0 model.checkpoint_activations=true
        model.embedding_norm=standard model.latent=none data.channels=3"""
    ),
    "ssl_hsic_moving_mnist": Case(
        """objective.name=ssl_hsic data.source=moving_mnist data.size_px=64 data.setting=B data.clip_step=null""",
        data="",
    ),
    "ressl_two_processes": Case("objective.name=ressl model.editor_norm=none", num_processes=2),
    "infonce_two_processes_in_parts": Case(
        "objective.name=infonce train.grad_accumulation=2 data.batch_size=16", num_processes=2
    ),
    "causal_infonce": Case(
        f"""{CAUSAL} objective.name=infonce objective.beta=0.1 model.embedding_norm=white model.projector_layers=0
        train.weight_decay=0.0""",
        data="",
    ),
    "causal_byol_oracle": Case(
        f"{CAUSAL} data.change=multimodal objective.name=byol model.latent=oracle model.editor=low_rank", data=""
    ),
    "kicked_jepa_scene": Case(
        """data.num_segments=2 objective.name=jepa objective.beta=0.003 objective.rollout_steps=2
        objective.step_weights=[2,1] model.embedding_norm=standard model.editor_norm=layer model.scene_dim=4
        model.latent_dim=4 model.prior_components=2 train.refine_steps=6 train.refine_horizon=3 train.refine_clips=24
        evaluation.horizon=3""",
        data="kicked",
    ),
    "rooms_actions_distance": Case(
        f"""{ROOMS} model.latent=gaussian model.action_dim=2 model.scene_dim=3 model.distance_dim=4
        objective.smoothness_weight=12.0 objective.inverse_dynamics_weight=1.0 objective.distance_error_weight=0.5
        train.refine_steps=6 train.refine_horizon=2 train.refine_clips=24 planning.distance=steps
        planning.num_samples=3 planning.risk_quantile=0.75""",
        data="rooms",
        plan=PLAN,
    ),
    "rooms_latent_actions": Case(
        f"{ROOMS} model.latent=gaussian model.latent_dim=3 planning.planner=mppi",
        data="rooms",
        plan=(*PLAN, "--labels", "24", "40"),
    ),
}


# ------------------------------------------------------------------------------------------------------ running


class CommandError(Exception):
    """A process that failed, with the last line of its stderr."""


@dataclass(frozen=True)
class Side:
    """A checkout, and the folder in which it works."""

    name: str
    checkout: Path
    folder: Path

    def run(self, name: str, *arguments: str, log: str, num_processes: int = 1) -> None:
        """Run a command of the checkout: scripts/NAME.py, or `python -m worldmodel NAME` where there is no such file.

        Raises:
            CommandError: the exit code is not 0, or the process takes longer than TIMEOUT_S.
        """
        folder = "worlds" if (self.checkout / "data_pipelines" / "worlds").is_dir() else "sources"
        environment = f"data_pipelines.{folder}.two_rooms:worldmodel/TwoRooms-v0"
        arguments = tuple(environment if word == TWO_ROOMS else word for word in arguments)
        script = self.checkout / "scripts" / f"{name}.py"
        command = [str(script)] if script.is_file() else ["-m", "worldmodel", name]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
        try:
            done = subprocess.run(
                [sys.executable, *(launcher if num_processes > 1 else []), *command, *arguments],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_S,
                cwd=self.folder,
                env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(self.checkout)},
            )
        except subprocess.TimeoutExpired:
            raise CommandError(f"{name} takes longer than {TIMEOUT_S:g} s") from None
        with (self.folder / f"{log}.log").open("a") as file:
            file.write(f"$ {name} {' '.join(arguments)}\n{done.stdout}{done.stderr}")
        if done.returncode:
            raise CommandError(f"{name}: exit code {done.returncode}: {last_line(done.stderr)}")


def last_line(stderr: str) -> str:
    """Return the last line that is not empty, of what precedes the messages of torchrun."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    launcher = [number for number, line in enumerate(lines) if "torch/distributed/elastic" in line]
    own = lines[: launcher[0]] if launcher else lines
    return (own or lines or ["no output"])[-1]


def write_config(name: str, case: Case, folder: Path) -> Path:
    """Write the config file of a case. Its paths are relative to the folder of each side."""
    root = f"data.root=data/{case.data}" if case.data else ""
    tree: dict[str, Any] = {}
    for word in f"run_dir={name} {BASE} {root} {case.keys}".split():
        key, _, value = word.partition("=")
        group, dot, leaf = key.partition(".")
        node = tree.setdefault(group, {}) if dot else tree
        node[leaf or group] = yaml.safe_load(value)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


# ---------------------------------------------------------------------------------------------------- comparing


def as_text(value: Any, ignored: frozenset[str] = frozenset(), place: str = "") -> dict[str, str]:
    """Return the numbers and texts in parsed JSON by their place, as JSON, without the ignored keys.

    The JSON of two floats is the same exactly if their bits are, but for the payload of NaN.
    """
    if isinstance(value, dict) and value:
        entries = [(f"{place}.{key}" if place else key, part) for key, part in value.items() if key not in ignored]
    elif isinstance(value, list) and value:
        entries = [(f"{place}[{index}]", part) for index, part in enumerate(value)]
    else:
        return {place: json.dumps(value)}
    return {key: text for where, part in entries for key, text in as_text(part, ignored, where).items()}


def difference_of_values(old: dict[str, str], new: dict[str, str]) -> str:
    """Return the first place where two results of `as_text` differ, "" if they are equal."""
    differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if not differing:
        return ""
    first = differing[0]
    more = f", and {len(differing) - 1} more of {len({**old, **new})}" if len(differing) > 1 else ""
    return f"{first}: old {old.get(first, 'missing')}, new {new.get(first, 'missing')}{more}"


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of metrics.jsonl without times and speeds."""
    return {key: value for key, value in row.items() if key not in SPEEDS and not key.endswith("_s")}


def difference_of_losses(old: Path, new: Path) -> str:
    """Return the first difference of the rows in metrics.jsonl of two runs, "" if they are equal."""
    rows, others = (
        [untimed(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (old, new)
    )
    if not rows or len(rows) != len(others):
        return f"old has {len(rows)} rows, new has {len(others)}"
    texts = [difference_of_values(as_text(row), as_text(other)) for row, other in zip(rows, others, strict=True)]
    first = next((number for number, text in enumerate(texts) if text), None)
    if first is None:
        return ""
    count = sum(map(bool, texts))
    return f"{count} of {len(rows)} rows, first step {rows[first]['step']} ({rows[first]['split']}): {texts[first]}"


def last_checkpoint(run: Path) -> dict[str, torch.Tensor]:
    """Return the tensors in the last checkpoint, by file and name."""
    folders = sorted(path for path in (run / "checkpoints").glob("step_*") if path.is_dir())
    files = sorted(folders[-1].glob("*.safetensors")) if folders else []
    return {f"{path.stem}/{name}": tensor for path in files for name, tensor in load_file(path).items()}


def difference_of_tensors(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> str:
    """Return the names, shapes and values that differ between old and new, "" if none does."""
    if not tensors:
        return "old has no tensors"
    parts = []
    for side, some, rest in (("old", tensors, others), ("new", others, tensors)):
        if alone := [name for name in some if name not in rest]:
            parts.append(f"{len(alone)} names only in {side}, first {alone[0]}")
    distances, num_comparable = {}, 0
    for name in [name for name in tensors if name in others]:
        one, other = tensors[name], others[name]
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            parts.append(f"{name} is {one.dtype} {list(one.shape)} in old, {other.dtype} {list(other.shape)} in new")
            continue
        num_comparable += 1
        if bits(one) != bits(other):
            distances[name] = float((one.double() - other.double()).abs().max())
    if distances:
        largest = max(distances, key=lambda name: (math.isnan(distances[name]), distances[name]))
        parts.append(
            f"{len(distances)} of {num_comparable} tensors, first {next(iter(distances))}, largest absolute difference "
            f"{distances[largest]:.3g} in {largest}"
        )
    return "; ".join(parts)


def episodes(run: Path) -> dict[str, torch.Tensor]:
    """Return the planned episodes that a run keeps, whose paths show a change that leaves the success as it was."""
    path = run / "planning.safetensors"
    return load_file(path) if path.exists() else {}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def difference_of_files(old: Path, new: Path) -> str:
    """Return the first difference of two metrics.json or planning.json, "" if they are equal."""
    values, others = (as_text(json.loads(path.read_text()), IGNORED[path.name]) for path in (old, new))
    return difference_of_values(values, others)


# ------------------------------------------------------------------------------------------------------- report


@dataclass
class Result:
    """The outcome of a case: a word for each column, details of what is not equal, seconds of old and new."""

    name: str
    cells: dict[str, str] = field(default_factory=lambda: dict.fromkeys(COLUMNS, NONE))
    details: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"old": 0.0, "new": 0.0})

    def is_equal(self) -> bool:
        return not self.details

    def set(self, column: str, difference: str) -> None:
        self.cells[column] = DIFFERS if difference else EQUAL
        if difference:
            self.details.append(f"{self.name}, {column}: {difference}")

    def fail(self, column: str, message: str) -> None:
        self.cells[column] = FAILED
        self.details.append(f"{self.name}, {column}: {message}")


def compare_case(name: str, case: Case, config: Path, sides: Sequence[Side], bar: tqdm) -> Result:
    """Train, evaluate and plan on both sides, as far as both succeed, and compare what they wrote."""
    result = Result(name)
    old, new = (side.folder / name for side in sides)

    def both_run(column: str, command: str, *arguments: str, num_processes: int = 1) -> bool:
        failures = []
        for side in sides:
            bar.set_description(f"{name}: {command}, {side.name}")
            started_s = time.monotonic()
            try:
                side.run(command, *arguments, log=name, num_processes=num_processes)
            except CommandError as error:
                failures.append(f"{side.name} failed: {error}")
            result.seconds[side.name] += time.monotonic() - started_s
            bar.update()
        if failures:
            result.fail(column, "; ".join(failures))
        return not failures

    if not both_run("losses", "train", "--config", str(config), num_processes=case.num_processes):
        return result
    result.set("losses", difference_of_losses(old, new))
    result.set("weights", difference_of_tensors(last_checkpoint(old), last_checkpoint(new)))
    if both_run("metrics", "evaluate", "--run", name):
        result.set("metrics", difference_of_files(old / "metrics.json", new / "metrics.json"))
    if case.plan and both_run("planning", "plan", "--run", name, *case.plan):
        scores = difference_of_files(old / "planning.json", new / "planning.json")
        result.set("planning", scores or difference_of_tensors(episodes(old), episodes(new)))
    return result


def compare(old: Path, new: Path, names: Sequence[str], folder: Path) -> list[Result]:
    """Compare two checkouts in these cases, in an empty folder.

    Raises:
        CommandError: the old checkout cannot write the videos.
    """
    sides = [Side("old", old, folder / "old"), Side("new", new, folder / "new")]
    for path in (*(side.folder for side in sides), folder / "configs"):
        path.mkdir(parents=True)
    cases = {name: CASES[name] for name in names}
    needed = [name for name in DATA if name in {case.data for case in cases.values()}]
    total = len(needed) + sum(2 * (3 if case.plan else 2) for case in cases.values())
    results = []
    with tqdm(total=total, unit="process") as bar:
        for name in needed:
            bar.set_description(f"videos: {name}")
            command, *arguments = DATA[name]
            sides[0].run(command, *arguments, "--out", f"data/{name}", "--num-processes", "1", log="data")
            bar.update()
        if needed:
            shutil.copytree(sides[0].folder / "data", sides[1].folder / "data")
        for name, case in cases.items():
            config = write_config(name, case, folder / "configs")
            results.append(compare_case(name, case, config, sides, bar))
    return results


def table(results: Sequence[Result]) -> str:
    lines = [f"{'case':<32}" + "".join(f"{column:<10}" for column in COLUMNS) + f"{'old s':>6}{'new s':>7}"]
    for result in results:
        cells = "".join(f"{result.cells[column]:<10}" for column in COLUMNS)
        lines.append(f"{result.name:<32}{cells}{result.seconds['old']:>6.1f}{result.seconds['new']:>7.1f}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD_CHECKOUT", help="a checkout before the change")
    parser.add_argument("new", type=Path, metavar="NEW_CHECKOUT", help="a checkout after it")
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="NAME", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new folder, which keeps the runs")
    args = parser.parse_args(arguments)
    for checkout in (args.old, args.new):
        if not (checkout / "worldmodel").is_dir():
            parser.error(f"{checkout} is not a checkout: it has no folder worldmodel")
    if args.out and args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"--out {args.out} exists and is not an empty folder: choose another one")
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.out or Path(temporary)).resolve()
        try:
            results = compare(args.old.resolve(), args.new.resolve(), list(dict.fromkeys(args.cases)), folder)
        except CommandError as error:
            print(f"error: the old checkout cannot write the videos: {error}", file=sys.stderr)
            return 1
    print(table(results))
    for result in results:
        for detail in result.details:
            print(f"- {detail}")
    num_equal = sum(result.is_equal() for result in results)
    print(f"{num_equal} of {len(results)} cases equal, {time.monotonic() - started_s:.0f} s")
    return int(num_equal < len(results))


if __name__ == "__main__":
    sys.exit(main())
