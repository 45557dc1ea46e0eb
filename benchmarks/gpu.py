"""Run the single-GPU benchmark suite and print a table. On a CPU, with overrides that make it small, a rehearsal.

python benchmarks/gpu.py --out runs/bench_gpu data.mnist_dir=data/mnist [key=value ...]

    step-MODE      a training step of configs/paper.yaml against a plain one, for each train.compile of --compile
    paper          configs/paper.yaml, trained to its end in the device's fast precision and scored
    best_gpu-SEED  configs/best_gpu.yaml, trained and scored for each seed

Each part runs in separate processes that write to OUT/PART.log. OUT/gpu.json is written after each part, with the
machine that it ran on, and the same command continues an interrupted suite. A part that fails does not stop the others.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from tqdm.auto import tqdm

from data_pipelines.errors import UserError
from worldmodel.commands.exits import report_errors
from worldmodel.commands.shared import add_overrides, make_out_folder, write_result
from worldmodel.config import TrainConfig
from worldmodel.training.machine import machine_description

REPO = Path(__file__).resolve().parents[1]
CONFIGS = REPO / "configs"
PARTS = "step", "paper", "best_gpu"
MODES = get_args(get_type_hints(TrainConfig)["compile"])


@dataclass(frozen=True)
class Part:
    """Commands, each a script with its arguments, and a function that reads the result from their files."""

    name: str
    commands: list[list[str]]
    result: Callable[[], dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/bench_gpu"),
        help="folder of results, runs and logs (default: runs/bench_gpu)",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (default: all)")
    parser.add_argument(
        "--compile", nargs="+", choices=MODES, default=["auto"], help="modes of the timed steps (default: auto)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds of best_gpu (default: 0)")
    add_overrides(parser, "values for every part, such as train.steps=100")
    args = parser.parse_intermixed_args()
    with report_errors():
        make_out_folder(args.out)
        parts = make_parts(args)
        results = run_parts(parts, args.out)
        print(f"\n{summary(results)}\n{args.out / 'gpu.json'}")
        failed = [part.name for part in parts if "failed" in results["parts"][part.name]]
        if failed:
            raise UserError(f"{', '.join(failed)} failed: see {args.out / failed[0]}.log")
    return 0


def make_parts(args: argparse.Namespace) -> list[Part]:
    parts: list[Part] = []
    if "step" in args.parts:
        parts += [step_part(args.out, mode, args.overrides) for mode in args.compile]
    if "paper" in args.parts:
        parts.append(trained_part("paper", "paper.yaml", args.out, ["train.precision=auto", *args.overrides]))
    if "best_gpu" in args.parts:
        for seed in args.seeds:
            overrides = [*args.overrides, f"seed={seed}"]
            parts.append(trained_part(f"best_gpu-{seed}", "best_gpu.yaml", args.out, overrides))
    return parts


def step_part(out: Path, mode: str, overrides: list[str]) -> Part:
    written = out / f"bench_train-{mode}.json"
    settings = [f"train.compile={mode}", *overrides]
    command = ["benchmarks/train_step.py", "--config", str(CONFIGS / "paper.yaml"), "--out", str(written), *settings]

    def result() -> dict[str, Any]:
        timed = json.loads(written.read_text(encoding="utf-8"))
        names = "precision", "baseline_step_s", "step_s", "speedup", "render_batch_s", "loss_max_diff"
        return {name: timed[name] for name in names}

    return Part(f"step-{mode}", [command], result)


def trained_part(name: str, config: str, out: Path, overrides: list[str]) -> Part:
    run = out / name
    last = f"run_dir={run}", "tracking.wandb=disabled"
    train = ["scripts/train.py", "--resume", "--config", str(CONFIGS / config), *overrides, *last]

    def result() -> dict[str, Any]:
        metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        model, oracle = (metrics["forecasts"][forecast] for forecast in ("model", "simulator_oracle"))
        return {
            "updates": metrics["train"]["steps"],
            "seconds": metrics["train"]["seconds"],
            "energy_score": model["energy_score"][0],
            "oracle_energy_score": oracle["energy_score"][0],
            "x_oracle": model["ratio_to_oracle"][0],
        }

    return Part(name, [train, ["scripts/evaluate.py", "--run", str(run)]], result)


def run_parts(parts: list[Part], out: Path) -> dict[str, Any]:
    """Run the parts that are not done and return the content of gpu.json, including earlier calls."""
    path = out / "gpu.json"
    found = read_parts(path)
    results, machine = {"parts": found}, machine_description()
    with tqdm(parts, unit="part") as bar:
        for part in bar:
            bar.set_postfix_str(part.name)
            commands = [shlex.join(command) for command in part.commands]
            earlier = found.get(part.name, {})
            if earlier.get("commands") != commands or "failed" in earlier:
                of_part = outcome(part, out / f"{part.name}.log")
                found[part.name] = {"machine": machine, "commands": commands, **of_part}
                write_result(path, results)
    return results


def read_parts(path: Path) -> dict[str, dict[str, Any]]:
    """Return the parts of earlier calls by name, from gpu.json.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
        return {name: dict(part) for name, part in parts.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: remove it, or choose another --out") from error


def outcome(part: Part, log: Path) -> dict[str, Any]:
    """Run a part and return its result, or the reason why it failed."""
    with log.open("w", encoding="utf-8") as written:
        for script, *arguments in part.commands:
            command = [sys.executable, str(REPO / script), *arguments]
            if code := subprocess.run(command, stdout=written, stderr=subprocess.STDOUT).returncode:
                return {"failed": f"{script} ended with {code}"}
    return part.result()


def summary(results: dict[str, Any]) -> str:
    """Return a line for each part, below one for its machine."""
    lines: list[str] = []
    title = ""
    for name, result in results["parts"].items():
        if (of_part := title_of(result.get("machine"))) != title:
            lines.append(title := of_part)
        if "failed" in result:
            found = f"failed: {result['failed']}"
        elif "speedup" in result:
            found = (
                f"{result['speedup']:.2f} x: {1000 * result['step_s']:.2f} ms in {result['precision']}, plain "
                f"{1000 * result['baseline_step_s']:.2f} ms; rendering {1000 * result['render_batch_s']:.2f} ms"
            )
        else:
            found = (
                f"{result['updates']:,} updates in {result['seconds']:.0f} s; Energy Score "
                f"{result['energy_score']:.3f}, {result['x_oracle']:.3f} x the oracle's"
            )
        lines.append(f"{name:<18} {found}")
    return "\n".join(lines)


def title_of(machine: Mapping[str, Any] | None) -> str:
    """Return the line of a machine. None: of an earlier version, which did not store it."""
    return f"{machine['gpu'] or machine['cpu']}, torch {machine['torch']}" if machine else "on an unknown machine"


if __name__ == "__main__":
    sys.exit(main())
