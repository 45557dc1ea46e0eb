"""Train and evaluate a grid of objectives, latents and seeds, and compare the runs in a table, a figure and a page.

Each run is in OUT/OBJECTIVE-LATENT/seed_N, with its log in seed_N.log.txt. The same command continues an interrupted
grid. Further objectives, latents or seeds train only the new runs.

example:
  worldmodel compare --config demo --out runs/compare --objectives byol infonce --latents none gaussian \\
      --seeds 0 1 2 train.steps=400

compare evaluated runs, without training:
  worldmodel compare --runs runs/demo runs/demo_byol --out runs/compare
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.errors import UserError
from data_pipelines.files import write_bytes, write_text
from data_pipelines.text_files import dump_yaml, shown
from worldmodel.commands.exits import EXIT_USER_ERROR
from worldmodel.commands.shared import add_config, add_out, add_overrides, make_out_folder

if TYPE_CHECKING:
    from worldmodel.commands.jobs import Failure
    from worldmodel.report.comparison import RunScores
    from worldmodel.runs.metrics import Metrics

OVERRIDE = re.compile(r"[\w.]+=.*", re.DOTALL)
LISTS = ("objectives", "latents", "seeds", "set")
OF_GRIDS = {"jobs": 1, "launch": "", "table_only": False, "skip_refused": False}
"""Further options of a grid, with their defaults."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs", nargs="+", type=Path, metavar="FOLDER", help="folders of evaluated runs to compare, without training"
    )
    add_config(parser, required=False)
    add_out(parser, "the folder of runs and results")
    parser.add_argument("--objectives", nargs="+", metavar="NAME", help="values of objective.name")
    parser.add_argument("--latents", nargs="+", metavar="NAME", help="values of model.latent")
    parser.add_argument("--seeds", nargs="+", metavar="N", help="values of seed")
    parser.add_argument(
        "--jobs",
        type=int,
        default=OF_GRIDS["jobs"],
        metavar="N",
        help="runs at a time, which share the cores (default: 1)",
    )
    parser.add_argument(
        "--launch",
        default=OF_GRIDS["launch"],
        metavar="COMMAND",
        help='launcher of training, such as "torchrun --nproc_per_node 2" (default: one process)',
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="OBJECTIVE[/LATENT]:key=value",
        help="an override for one objective, or for one objective with one latent",
    )
    parser.add_argument("--table-only", action="store_true", help="compare the finished runs, without training")
    parser.add_argument("--skip-refused", action="store_true", help="leave out combinations that the config rejects")
    add_overrides(parser, "values for all runs, such as train.steps=400")


def run(args: argparse.Namespace) -> int:
    from worldmodel.training.session import Interrupted

    split_lists(args)
    try:
        return compare_folders(args) if args.runs else compare(args)
    except Interrupted as interrupted:
        print(f"stopped by {interrupted}: the same command continues", file=sys.stderr)
        return interrupted.exit_code


def split_lists(args: argparse.Namespace) -> None:
    """Move the overrides that follow an option with several values to args.overrides, and parse the seeds.

    Raises:
        UserError: options of a grid are missing, given along with --runs, or a seed is not a number.
    """
    for name in LISTS:
        values = getattr(args, name)
        if values is not None:
            args.overrides += [value for value in values if OVERRIDE.fullmatch(value)]
            setattr(args, name, [value for value in values if not OVERRIDE.fullmatch(value)])
    given = [f"--{name}" for name in ("config", "objectives", "latents", "seeds", "set") if getattr(args, name)]
    if args.runs:
        given += [f"--{name.replace('_', '-')}" for name in OF_GRIDS if getattr(args, name) != OF_GRIDS[name]]
        if given or args.overrides:
            raise UserError(f"--runs takes --out only, not {(given + args.overrides)[0]}")
        return
    for name in ("config", "objectives", "latents", "seeds"):
        if not getattr(args, name):
            raise UserError(f"--{name} is missing: a grid has --config, --objectives, --latents and --seeds")
    try:
        args.seeds = [int(seed) for seed in args.seeds]
    except ValueError:
        raise UserError(f"--seeds {shown(' '.join(args.seeds))} must be whole numbers") from None


def compare_folders(args: argparse.Namespace) -> int:
    """Compare evaluated runs. Each is a row named by its path below the folder that all have in common.

    Raises:
        UserError: a folder holds no evaluated run or is given twice, or --out cannot be written.
    """
    from worldmodel.runs.metrics import read_metrics
    from worldmodel.runs.opening import load_run_config

    rows: list[Row] = []
    above = os.path.commonpath([folder.resolve().parent for folder in args.runs])
    for folder in args.runs:
        metrics = read_metrics(folder)
        if any(row.folder.resolve() == folder.resolve() for row in rows):
            raise UserError(f"--runs {folder}: this run is given twice")
        if metrics is None:
            raise UserError(f"--runs {folder}: there is no metrics.json, evaluate the run first")
        config, name = load_run_config(folder), os.path.relpath(folder.resolve(), above)
        rows.append(row_of(folder, name, config.model.latent.name, config.seed, metrics))
    make_out_folder(args.out)
    write_comparison(args.out, rows, {"runs_given": [str(folder) for folder in args.runs]})
    return 0


def compare(args: argparse.Namespace) -> int:
    """Train and evaluate the grid, compare its finished runs, and return an exit code.

    Raises:
        UserError: an argument is wrong, --out cannot be written or holds other runs, or it holds no finished ones and
            none may be trained.
        Interrupted: SIGINT or SIGTERM arrived.
    """
    from worldmodel.commands.grid import check_same_configs, is_done, keep_threads, make_grid
    from worldmodel.commands.jobs import check_launcher, only_writer, run_all
    from worldmodel.config.reading import read_with_bases
    from worldmodel.config.shipped import find_config
    from worldmodel.runs.metrics import Metrics, read_metrics
    from worldmodel.training.machine import fair_share_of_cores

    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs} must be at least 1")
    check_launcher(args.launch)
    grid, refused = make_grid(args)
    config_text = dump_yaml(read_with_bases(find_config(args.config)))  # it may change later
    if refused:
        print(f"skipped, as the config rejects {refused}", file=sys.stderr)
    share = max(1, fair_share_of_cores() // args.jobs) if args.jobs > 1 else None
    make_out_folder(args.out)
    with only_writer(args.out) as lock:
        grid = [keep_threads(run, share) for run in grid]
        check_same_configs(grid)
        if args.table_only and not any(map(is_done, grid)):
            raise UserError(f"{args.out} holds no finished run of this grid: leave out --table-only to train them")
        todo = [] if args.table_only else [run for run in grid if not is_done(run)]
        failures = run_all(todo, len(grid), args.jobs, args.launch, lock)
        rows = []
        for run in filter(is_done, grid):
            metrics = read_metrics(run.folder) or Metrics()
            rows.append(row_of(run.folder, run.objective, run.latent, run.seed, metrics))
        if rows:
            write_comparison(args.out, rows, provenance(args, config_text, failures, refused))
    if not failures:
        return 0
    names = ", ".join(failure.run.name for failure in failures)
    print(f"{len(failures)} of {len(grid)} runs failed: {names}; the same command retries them", file=sys.stderr)
    return EXIT_USER_ERROR if all(failure.exit_code == EXIT_USER_ERROR for failure in failures) else 1


@dataclass(frozen=True)
class Row:
    """An evaluated run. metrics: the content of its metrics.json."""

    folder: Path
    run: RunScores
    metrics: Metrics


def row_of(folder: Path, objective: str, latent: str, seed: int, metrics: Metrics) -> Row:
    """Return the row of an evaluated run, given the content of its metrics.json."""
    from worldmodel.report.comparison import RunScores, dimensions_of, flat_numbers

    return Row(folder, RunScores(objective, latent, seed, flat_numbers(metrics), dimensions_of(metrics)), metrics)


def provenance(args: argparse.Namespace, config_text: str, failures: Sequence[Failure], refused: str) -> dict[str, Any]:
    """Return the entries of comparison.json that describe the grid."""
    grid = {name: value for name, value in vars(args).items() if name not in ("config", "out", "runs")}
    return {
        "grid": grid,
        "config": args.config,
        "config_text": config_text,
        "failed": {failure.run.name: failure.message for failure in failures},
        "refused": refused,
    }


def why_not_comparable(metrics: Sequence[Metrics]) -> str:
    """Return a sentence about why Energy Scores of these evaluations cannot be compared, "" if they can."""
    scored = [each for each in metrics if each.get("forecasts")]
    if len(scored) < 2:
        return ""
    if len({each.get("queries_sha256") for each in scored}) > 1:
        return "These runs were scored on different queries: their Energy Scores cannot be compared."
    quantities = [each.get("quantity") for each in scored]
    if None in quantities:
        return (
            "Without a law or evaluation.label, each run is scored in its own embedding space: Energy Scores of "
            "different runs cannot be compared."
        )
    if any(quantity != quantities[0] for quantity in quantities):
        return "These runs were scored by different quantities: their Energy Scores cannot be compared."
    return ""


def write_comparison(out: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """Write comparison.json, comparison.md, comparison.png and compare.html, and print the table and their paths.

    Raises:
        UserError: they cannot be written.
    """
    from worldmodel.report.comparison import comparison_figure, comparison_markdown, png, summarise_groups
    from worldmodel.report.comparison_page import write_comparison_page
    from worldmodel.runs.tracking import read_history

    runs = [row.run for row in rows]
    if caution := why_not_comparable([row.metrics for row in rows]):
        print(f"warning: {caution}", file=sys.stderr)
    content = {
        **about,
        "runs": [{"folder": os.path.relpath(row.folder, out), **dataclasses.asdict(row.run)} for row in rows],
        "cells": [dataclasses.asdict(cell) for cell in summarise_groups(runs)],
    }
    markdown, figure = comparison_markdown(runs), comparison_figure(runs)
    paths = [out / name for name in ("comparison.json", "comparison.md", "compare.html", "comparison.png")]
    histories = [read_history(row.folder) for row in rows]
    try:
        write_text(paths[0], json.dumps(content, indent=1) + "\n")
        write_text(paths[1], markdown + "\n")
        write_comparison_page(paths[2], title=out.resolve().name, runs=runs, histories=histories, caution=caution)
        if figure is None:
            paths.pop().unlink(missing_ok=True)
        else:
            write_bytes(paths[3], png(figure))
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}") from error
    print("\n".join(["", markdown, "", *map(str, paths)]))
