"""Reach goal images in an environment by planning with a run, and compare with chance and the true simulator.

Prints success with its 95 % interval over all episodes, and the protocol. Writes both to planning.json in the run's
folder, some episodes to planning.safetensors, and all of it into report.html. key=value replaces a value of the
config's section planning.

examples:
  worldmodel plan --run runs/two_rooms --env data_pipelines.worlds.two_rooms:worldmodel/TwoRooms-v0 planning.horizon=12

starts and goals from recorded episodes:
  worldmodel plan --run runs/two_rooms --protocol recorded --offset 25 --env ...

success against factors of variation, one at a time:
  worldmodel plan --run runs/two_rooms --vary noise=10,20,40 contrast=0.5,0.75 background=navy --env ...

a run without actions, with r as a latent action:
  worldmodel plan --run runs/two_rooms_latent --labels 100 1000 --env ...
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from data_pipelines.errors import UserError
from data_pipelines.text_files import shown
from worldmodel.commands.shared import (
    add_data,
    add_env,
    add_env_kwargs,
    add_overrides,
    add_run,
    check_counts,
    check_remote,
    check_seed,
    load_run,
)

if TYPE_CHECKING:
    from worldmodel.config import PlanningConfig

OFFSET = 25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, "a run that is conditioned on actions, or of one with --labels")
    add_env(parser)
    add_env_kwargs(parser)
    parser.add_argument(
        "--labels",
        type=int,
        nargs="+",
        metavar="N",
        help="for a run without actions: labelled transitions that decode r into actions; of several numbers, all give "
        "a point of the curve and the last is the run's result",
    )
    parser.add_argument(
        "--protocol",
        choices=("drawn", "recorded"),
        default="drawn",
        help="starts and goals: drawn by the environment (default), or frames of episodes of the run's test split",
    )
    parser.add_argument(
        "--offset", type=int, metavar="N", help=f"recorded: frames from start to goal (default: {OFFSET})"
    )
    parser.add_argument(
        "--policy",
        choices=("search", "gc"),
        default="search",
        help="search: plan with planning.planner at every step (default). gc: take the action of a goal-conditioned "
        "policy, which is learned from the training clips first",
    )
    parser.add_argument(
        "--vary",
        nargs="+",
        metavar="FACTOR=VALUE,...",
        help="plan the same episodes again with each value of each factor of variation: noise (gray levels of 255), "
        "blur (px), contrast and brightness (factors) of all pictures, goals included, and the environment's own",
    )
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds of the planner (default: 5)")
    parser.add_argument(
        "--episodes", type=int, default=50, metavar="N", help="episodes per seed, planned in one batch (default: 50)"
    )
    parser.add_argument("--budget", type=int, default=50, metavar="N", help="steps per episode (default: 50)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N", help="seed of the first episode (default: 0)")
    add_overrides(parser, "values that replace the config's", metavar="planning.KEY=VALUE")
    add_data(parser)


def run(args: argparse.Namespace) -> None:
    from data_pipelines.worlds.recorder import parse_kwargs
    from worldmodel.config import to_dict
    from worldmodel.planning.plan import plan
    from worldmodel.planning.protocol import PlanningProtocol
    from worldmodel.planning.recorded import STATE_LABEL, recorded_starts
    from worldmodel.planning.vary import parse_factors
    from worldmodel.report.run_page import report_of_run
    from worldmodel.report.tables import success_table
    from worldmodel.runs.folder import RunFolder

    check_counts(args, "seeds", "episodes", "budget")
    check_seed(args, "first_seed")
    recorded = args.protocol == "recorded"
    if args.offset is not None:
        if not recorded:
            raise UserError(f"--offset={args.offset} is of --protocol recorded")
        check_counts(args, "offset")
    vary = parse_factors(args.vary or ())
    trained = load_run(args)
    config = planning_config(to_dict(trained.config), args.overrides, args.trust_code)
    draws_paths = trained.config.evaluation.label == STATE_LABEL  # with a readout of the state from real frames
    if args.labels or recorded or args.policy == "gc" or config.warm_start or draws_paths:
        check_remote(trained.source.url, args.allow_remote)
    protocol = PlanningProtocol(
        env=args.env,
        env_kwargs=parse_kwargs(args.env_kwargs or []),
        seeds=args.seeds,
        episodes=args.episodes,
        budget=args.budget,
        first_seed=args.first_seed,
    )
    if recorded:
        starts = recorded_starts(trained, protocol, OFFSET if args.offset is None else args.offset)
        protocol = dataclasses.replace(protocol, starts=starts)
    result = plan(trained, protocol, config, labels=args.labels or (), policy=args.policy, vary=vary)
    print(f"\n{success_table(result)}\n\n{json.dumps(result['protocol'])}\n")
    print(f"{RunFolder(args.run).planning}\n{report_of_run(args.run)}")


def planning_config(tree: dict[str, Any], overrides: Sequence[str], trust_code: bool) -> PlanningConfig:
    """Return the section `planning` of a run's config, with overrides.

    Raises:
        UserError: an override belongs to another section, is not valid, or names code from outside without
            `trust_code`.
    """
    from worldmodel.config import apply_override, check_trust, validate

    for override in overrides:
        if not override.startswith("planning."):
            raise UserError(f"override {shown(override)}: only planning.KEY=VALUE can differ from the run's config")
        apply_override(tree, override)
    config = validate(tree, source="the run's config", overrides=overrides)
    check_trust(config, trust_code, source="the command")
    return config.planning
