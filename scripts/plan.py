"""Plan with a trained run: how often it reaches its goals in an environment, against chance and the true simulator.

python scripts/plan.py --run runs/two_rooms --env data_pipelines.worlds.two_rooms:worldmodel/TwoRooms-v0
python scripts/plan.py --run runs/two_rooms_latent --labels 100 1000 --env ...      # r as a latent action

Prints success with its 95 % interval over all episodes and the whole protocol, and writes both to planning.json in the
run's folder, a few episodes to planning.safetensors, and all of it into report.html. Keys of the config's section
planning can be overridden: planning.horizon=12.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
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
    check_run_writable,
    check_seed,
    report_errors,
    write_result,
)
from worldmodel.config import PlanningConfig, apply_override, to_dict, validate
from worldmodel.planning.imagination import LatentPolicy
from worldmodel.planning.latent_actions import ActionDecoder, fit_action_decoder
from worldmodel.planning.planned_episodes import planned_episodes
from worldmodel.planning.protocol import (
    Episodes,
    PlanningProtocol,
    Policy,
    PrivilegedPolicy,
    RandomPolicy,
    describe,
    evaluate_policy,
    offered,
    run_seeds,
    summary,
)
from worldmodel.report.illustrations_file import PLANNED_NAME, save_parts
from worldmodel.report.run_page import report_of_run
from worldmodel.runs.metrics import METRICS_NAME, PLANNING_NAME, read_metrics_file
from worldmodel.runs.trained_run import TrainedRun

CURVE_KEYS = ("success_rate", "ci95", "per_seed", "ms_per_decision")
CEILING_CANDIDATES, CEILING_HORIZON = 100, 12  # the true simulator is slow, and its distances see around corners


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
        help="for a passive run: labelled transitions to decode r by; of several counts the last is the run's own",
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=50, help="of each seed, planned together (50)")
    parser.add_argument("--budget", type=int, default=50, help="steps of an episode (50)")
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
        # Found out before hours of planning: the report is made of these, and everything is written there.
        read_metrics_file(args.run / METRICS_NAME)
        check_run_writable(args.run)
        config = planning_config(to_dict(run.config), args.overrides)
        protocol = PlanningProtocol(
            env=args.env,
            env_kwargs=parse_kwargs(args.env_kwargs),
            seeds=args.seeds,
            episodes=args.episodes,
            budget=args.budget,
            first_seed=args.first_seed,
        )

        def chance(seed: int, envs: Sequence[gymnasium.Env]) -> Policy:
            return RandomPolicy(envs, seed)

        def truth(seed: int, envs: Sequence[gymnasium.Env]) -> Policy:
            smaller = dataclasses.replace(config, candidates=CEILING_CANDIDATES, horizon=CEILING_HORIZON)
            return PrivilegedPolicy(envs, smaller, seed)

        counts = args.labels or [None]
        if len(set(counts)) < len(counts):
            raise UserError(f"--labels {' '.join(map(str, counts))}: a count is given twice")
        decoders = [None if count is None else fit_action_decoder(run, count, run.config.seed) for count in counts]
        curve: list[dict[str, Any]] = []
        for count, decoder in zip(counts, decoders, strict=True):
            label = "planning" if count is None else f"planning, {count} labels"
            policy, first, result = plan(run, config, protocol, decoder, label=label)
            curve.append({"labels": count} | {key: result[key] for key in CURVE_KEYS})
        result["random_floor"] = evaluate_policy(protocol, chance, label="random")
        result["oracle_ceiling"] = (
            evaluate_policy(protocol, truth, label="privileged") if offered(protocol, "privileged_cost") else None
        )
        result["protocol"] = describe(protocol, config) | {"step": run.state["step"], "labels": counts[-1]}
        if args.labels:
            result["curve"] = curve
        out = args.run / PLANNING_NAME
        (args.run / PLANNED_NAME).unlink(missing_ok=True)  # of earlier episodes
        write_result(out, result)
        print(f"\n{table(result)}\n\n{json.dumps(result['protocol'])}\n")
        save_parts(args.run / PLANNED_NAME, planned_episodes(run, policy, first, offered(protocol, "state_px")))
        print(f"{out}\n{report_of_run(args.run)}")
    return 0


def plan(
    run: TrainedRun, config: PlanningConfig, protocol: PlanningProtocol, decoder: ActionDecoder | None, *, label: str
) -> tuple[LatentPolicy, Episodes, dict[str, Any]]:
    """Plan the episodes of every seed -> the policy and the episodes of the first one, and the summary of all."""
    policies = [LatentPolicy(run, config, seed, decoder) for seed in range(protocol.seeds)]
    runs = run_seeds(protocol, lambda seed, envs: policies[seed], label=label, keep_frames=True)
    return policies[0], runs[0], summary(runs)


def planning_config(tree: dict[str, Any], overrides: Sequence[str]) -> PlanningConfig:
    """The section `planning` of a run's config, with overrides. Raises UserError: one is of another section, or bad."""
    for override in overrides:
        if not override.startswith("planning."):
            raise UserError(f"override {shown(override)}: only planning.KEY=VALUE can differ from the run's config")
        apply_override(tree, override)
    return validate(tree, source="the run's config").planning


def table(result: dict[str, Any]) -> str:
    lines = [f"{'policy':<19} {'success':>8} {'95 % interval':>16} {'steps':>6} {'path':>6} {'ms':>7}  per seed"]
    rows = [(f"{entry['labels']} labels", entry) for entry in result.get("curve", [])[:-1]]
    labels = result["protocol"]["labels"]
    rows.append(("model" if labels is None else f"{labels} labels", result))
    rows += [("random", result["random_floor"]), ("privileged", result["oracle_ceiling"])]
    for name, row in rows:
        if row is None:
            continue
        low, high = row["ci95"]
        steps = f"{row['steps']:.1f}" if "steps" in row else "-"
        path = "-" if row.get("path_ratio") is None else f"{row['path_ratio']:.2f}"
        seeds = " ".join(f"{value:.2f}" for value in row["per_seed"])
        lines.append(
            f"{name:<19} {row['success_rate']:>8.3f} {f'{low:.3f} - {high:.3f}':>16} {steps:>6} {path:>6} "
            f"{row['ms_per_decision']:>7.2f}  {seeds}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
