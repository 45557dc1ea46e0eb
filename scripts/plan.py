"""Plan with a trained run: its success rate in an environment, compared with chance and the true simulator.

python scripts/plan.py --run runs/two_rooms --env data_pipelines.worlds.two_rooms:worldmodel/TwoRooms-v0
python scripts/plan.py --run runs/two_rooms_latent --labels 100 1000 --env ...      # r as a latent action

Prints the success rate with its 95 % interval over all episodes, and the whole protocol. Writes both to planning.json
in the run folder, a few episodes to planning.safetensors, and all results to report.html. Keys of the config's section
planning can be overridden: planning.horizon=12.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_pipelines.errors import UserError
from data_pipelines.text_files import shown
from data_pipelines.worlds.recorder import parse_kwargs
from worldmodel import load
from worldmodel.commands.shared import (
    add_allow_remote,
    check_counts,
    check_device,
    check_remote,
    check_seed,
    report_errors,
)
from worldmodel.config import PlanningConfig, apply_override, to_dict, validate
from worldmodel.planning.plan import plan
from worldmodel.planning.protocol import PlanningProtocol
from worldmodel.report.run_page import report_of_run
from worldmodel.report.tables import success_table
from worldmodel.runs.folder import RunFolder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run that is conditioned on actions")
    parser.add_argument("--env", required=True, metavar="ID", help="the environment; MODULE:ID imports MODULE first")
    parser.add_argument("--env-kwargs", nargs="+", default=[], metavar="NAME=VALUE", help="for gymnasium.make")
    parser.add_argument(
        "--labels",
        type=int,
        nargs="+",
        metavar="N",
        help="for a passive run: labelled transitions to decode r with; the last number gives the run's result",
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=50, help="per seed, planned together (50)")
    parser.add_argument("--budget", type=int, default=50, help="steps per episode (50)")
    parser.add_argument("--first-seed", type=int, default=0, help="another number gives other episodes")
    parser.add_argument("--checkpoint", choices=["latest", "best"], default="latest")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("overrides", nargs="*", metavar="planning.KEY=VALUE")
    add_allow_remote(parser)
    args = parser.parse_args()
    with report_errors():
        check_counts(args, "seeds", "episodes", "budget")
        check_seed(args, "first_seed")
        run = load(args.run, which=args.checkpoint, device=check_device(args.device))
        if args.labels:
            check_remote(run.source.url, args.allow_remote)
        protocol = PlanningProtocol(
            env=args.env,
            env_kwargs=parse_kwargs(args.env_kwargs),
            seeds=args.seeds,
            episodes=args.episodes,
            budget=args.budget,
            first_seed=args.first_seed,
        )
        config = planning_config(to_dict(run.config), args.overrides)
        result = plan(run, protocol, config, labels=args.labels or ())
        print(f"\n{success_table(result)}\n\n{json.dumps(result['protocol'])}\n")
        print(f"{RunFolder(args.run).planning}\n{report_of_run(args.run)}")
    return 0


def planning_config(tree: dict[str, Any], overrides: Sequence[str]) -> PlanningConfig:
    """Return the section `planning` of a run's config, with overrides.

    Raises:
        UserError: an override belongs to another section or is not valid.
    """
    for override in overrides:
        if not override.startswith("planning."):
            raise UserError(f"override {shown(override)}: only planning.KEY=VALUE can differ from the run's config")
        apply_override(tree, override)
    return validate(tree, source="the run's config").planning


if __name__ == "__main__":
    sys.exit(main())
