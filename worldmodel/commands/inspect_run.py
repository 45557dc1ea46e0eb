"""The descriptions of runs for `worldmodel inspect`: of one in full, of the runs in a folder in a line each."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.errors import UserError, printable
from worldmodel.config import Config, flatten, to_dict
from worldmodel.report.numbers import digits_for, number
from worldmodel.runs.checkpoint import latest_state, load_checkpoint
from worldmodel.runs.folder import RunFolder
from worldmodel.runs.metrics import read_metrics, value_at
from worldmodel.runs.opening import load_run_config
from worldmodel.runs.tracking import read_history

MAX_DEPTH = 3  # of runs below a folder: those of `worldmodel compare` are in OUT/OBJECTIVE-LATENT/seed_N
SCORES = {
    "energy score of the first step": "forecasts.model.energy_score.0",
    "ratio to the simulator's": "forecasts.model.ratio_to_oracle.0",
}


def is_run(folder: Path) -> bool:
    """Return True for the folder of a run, which may be damaged."""
    files = RunFolder(folder)
    if files.history.is_file() or files.checkpoint_index.is_file():
        return True
    try:
        load_run_config(folder)
    except UserError:
        return False  # there is no config, or it is that of another program
    return True


def runs_below(folder: Path) -> list[Path]:
    """Return the folders below `folder` that have a config, sorted, if any of them is a run. Links are not followed.

    Configs of other programs may be anywhere next to videos.
    """
    found = _with_config(folder, MAX_DEPTH)
    return found if any(map(is_run, found)) else []


def _with_config(folder: Path, depth: int) -> list[Path]:
    if not folder.is_dir() or not depth:
        return []
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    below = (folder / name for name in names)
    return [
        run for path in below for run in ([path] if RunFolder(path).config.is_file() else _with_config(path, depth - 1))
    ]


def describe_runs(folder: Path, runs: Sequence[Path]) -> str:
    """Return a line for each run of a folder: its name, its steps and its main scores."""
    names = [printable(run.relative_to(folder)) for run in runs]
    width = max(map(len, names))
    lines = [f"  {name:<{width}}  {', '.join(_or_fault(summary, run))}" for name, run in zip(names, runs, strict=True)]
    title = "1 run, which" if len(runs) == 1 else f"{len(runs):,} runs, each of which"
    return "\n".join([f"{printable(folder)}: {title} `worldmodel inspect RUN` describes", *lines])


def summary(run: Path) -> list[str]:
    """Return the steps that a run has done, and its main scores."""
    config = load_run_config(run)
    step = max((row["step"] for row in read_history(run) if row.get("split", "train") == "train"), default=None)
    if step is None:  # an exported run has no history
        state = latest_state(run)
        step = 0 if state is None else state["step"]
    scores = ["not evaluated"] if read_metrics(run) is None else describe_scores(run)
    return [f"step {step:,} of {config.train.steps:,}", *scores]


def describe_run(run: Path) -> str:
    """Describe a run: config, steps, checkpoints, last metrics and files. A damaged part is named in its place."""
    sections = {
        "config": describe_config,
        "training": describe_training,
        "checkpoints": describe_checkpoints,
        "scores": describe_scores,
        "files": describe_files,
    }
    lines = [printable(run)]
    for name, describe in sections.items():
        lines += [f"  {name}", *(f"    {line}" for line in _or_fault(describe, run))]
    return "\n".join(lines)


def _or_fault(describe: Callable[[Path], list[str]], run: Path) -> list[str]:
    try:
        return describe(run)
    except UserError as error:
        return [f"error: {error}"]


def describe_config(run: Path) -> list[str]:
    """List the keys that differ from the defaults."""
    config = load_run_config(run)
    values, defaults = flatten(to_dict(config)), flatten(to_dict(Config(run_dir=config.run_dir)))
    return [f"{key}={value}" for key, value in values.items() if key not in defaults or value != defaults[key]]


def describe_training(run: Path) -> list[str]:
    """Show the last row of each split in metrics.jsonl."""
    last: dict[str, dict[str, Any]] = {row.get("split", "train"): row for row in read_history(run)}
    lines = []
    for split, row in last.items():
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in row.items() if key not in ("step", "split"))
        lines.append(f"{split}, step {row['step']:,}: {numbers}")
    return lines or ["no metrics yet"]


def describe_checkpoints(run: Path) -> list[str]:
    """List the checkpoints that can be loaded, with their steps."""
    lines = []
    for which in ("latest", "best"):
        checkpoint = load_checkpoint(run, which, with_optimizer=False)
        if checkpoint is not None:
            parameters = sum(tensor.numel() for tensor in checkpoint.model.values())
            lines.append(f"{which}: step {checkpoint.state['step']:,}, {parameters:,} numbers in the model")
    return lines or ["none"]


def describe_scores(run: Path) -> list[str]:
    """Show the main scores of metrics.json."""
    metrics = read_metrics(run)
    if metrics is None:
        return ["not evaluated: worldmodel evaluate --run " + printable(run)]
    found = {name: value_at(metrics, path) for name, path in SCORES.items()}
    texts = {name: number(value, digits_for([value])) for name, value in found.items() if value is not None}
    return [f"{name}: {text}" for name, text in texts.items()] or ["see metrics.json"]


def describe_files(run: Path) -> list[str]:
    """List the files at the top level with their sizes."""
    with os.scandir(run) as entries:
        sizes = {entry.name: entry.stat(follow_symlinks=False).st_size for entry in entries if not entry.is_dir()}
    return [f"{printable(name)} ({sizes[name] / 1024:,.1f} KiB)" for name in sorted(sizes)]
