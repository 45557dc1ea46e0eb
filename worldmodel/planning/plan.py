"""Plan with a trained run by the whole protocol: the run, the floor, the ceiling, and the curve over labels."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import gymnasium
import numpy as np

from data_pipelines.errors import UserError, one_line_logger
from data_pipelines.files import write_errors
from worldmodel.build import clip_layout
from worldmodel.config import CategoricalConfig, CemConfig, GradientConfig, IcemConfig, PlanningConfig
from worldmodel.evaluation.records import save_records
from worldmodel.planning.controls import PrivilegedPolicy, RandomPolicy, ReplayPolicy
from worldmodel.planning.goal_conditioned import goal_conditioned_policy
from worldmodel.planning.imagination import LatentPolicy, check_run
from worldmodel.planning.latent_actions import fit_action_decoder
from worldmodel.planning.planned_episodes import planned_episodes
from worldmodel.planning.protocol import (
    EpisodeResults,
    GoalPolicy,
    PlanningProtocol,
    env_hook,
    evaluate_policy,
    run_seeds,
    summary,
)
from worldmodel.planning.recorded import RecordedStarts
from worldmodel.planning.vary import Factor, check_factors, success_by_factor
from worldmodel.runs.folder import RunFolder
from worldmodel.runs.metrics import read_decoder_facts, read_metrics, write_planning
from worldmodel.runs.planning_metrics import Planned, PlannedWithLabels, Planning, ProtocolFacts
from worldmodel.runs.trained_run import TrainedRun

log = one_line_logger(__name__)

PolicyName = Literal["search", "gc"]

CEILING_CANDIDATES, CEILING_HORIZON = 100, 12  # the true simulator is slow, and its distances see around corners


def plan(
    run: TrainedRun,
    protocol: PlanningProtocol,
    config: PlanningConfig | None = None,
    *,
    labels: Sequence[int] = (),
    policy: PolicyName = "search",
    vary: Sequence[Factor] = (),
) -> Planning:
    """Plan the episodes of the protocol; write planning.json and a few episodes for the report into the run folder.

    config replaces the run's section `planning`. labels are the numbers of labelled transitions to decode r with, for a
    passive run; the last of several numbers gives the run's own result. policy: "search" plans with planning.planner,
    "gc" acts by a goal-conditioned policy alone, which is learned from the training clips. The episodes are planned
    again with each value of the factors of variation `vary`, after planning.json has been written without them.

    Raises:
        UserError: the run folder is not writable, the run cannot plan, the environment has no goals, its actions are of
            another kind than those of plans, it has no such factor, labels repeat a number or ask for more transitions
            than there are, or a goal-conditioned policy is asked for with labels or has too few clips to learn from.
    """
    config = run.config.planning if config is None else config
    folder = RunFolder(run.folder)
    for read in (read_metrics, read_decoder_facts):
        read(run.folder)  # a damaged file would be found by the report, after hours of planning
    folder.check_writable()
    check_actions(protocol, config)
    check_factors(protocol, vary)
    if len(set(labels)) < len(labels):
        raise UserError(f"labels {' '.join(map(str, labels))}: a count is given twice")
    learns = needs_learned_policy(config, policy)
    if learns and labels:
        raise UserError(
            "a goal-conditioned policy learns from the actions of all clips: leave out labels, or policy=gc and "
            "planning.warm_start"
        )
    if learns:
        check_run(run, config)
    learned = goal_conditioned_policy(run, config) if learns else None
    decoders = {count: fit_action_decoder(run, count, run.config.seed) for count in labels}
    counts: Sequence[int | None] = labels or [None]
    planned = []
    for count in counts:
        decoder = None if count is None else decoders[count]
        policies = [
            LatentPolicy(run, config, seed, decoder, learned=learned, searches=policy == "search")
            for seed in range(protocol.seeds)
        ]
        planned.append(_plan_once(policies, protocol, count))
    last = planned[-1]
    planning = Planning(**last.scores)
    planning["random_floor"] = evaluate_policy(protocol, _random, label="random")
    planning["oracle_ceiling"] = _ceiling(protocol, config)
    if isinstance(protocol.starts, RecordedStarts):
        planning["do_nothing"] = _replayed(protocol, protocol.starts, 0, label="doing nothing")
        planning["replay"] = _replayed(protocol, protocol.starts, protocol.starts.offset, label="recorded actions")
    planning["protocol"] = protocol_facts(protocol, config, run, labels, policy)
    if labels:
        planning["curve"] = [_with_labels(count, one.scores) for count, one in zip(labels, planned, strict=True)]
    with write_errors(run.folder):
        folder.planned_episodes.unlink(missing_ok=True)  # of earlier episodes
    write_planning(run.folder, planning)
    episodes = planned_episodes(run, last.policies[0], last.first, env_hook(protocol, "state_px"))
    with write_errors(run.folder):
        save_records(folder.planned_episodes, episodes)
    if vary:

        def plan_again(varied: PlanningProtocol, label: str) -> Planned:
            return evaluate_policy(varied, lambda seed, envs: last.policies[seed], label=label)

        planning["factors"] = success_by_factor(protocol, vary, last.scores, plan_again)
        write_planning(run.folder, planning)
    return planning


def needs_learned_policy(config: PlanningConfig, policy: str) -> bool:
    """Return whether decisions by `policy`, "search" or "gc", use a goal-conditioned policy."""
    return policy == "gc" or config.warm_start


def check_actions(protocol: PlanningProtocol, config: PlanningConfig) -> None:
    """Check that the actions of the environment are of the kind that plans have.

    Raises:
        UserError: they are discrete and plans are not, or the other way round, or they are neither discrete nor a Box.
    """
    env = protocol.make_env()
    env.close()
    if not hasattr(env.unwrapped, "goal_frame"):
        return  # run_episodes says so: such an environment has no goals, whatever its actions are
    space, key = env.action_space, f"planning.action_set={config.action_set}"
    if isinstance(space, gymnasium.spaces.Discrete) and config.action_set != "one_hot":
        raise UserError(
            f"{key}: the environment {protocol.env} has {space.n} discrete actions: set planning.planner=categorical "
            "and planning.action_set=one_hot"
        )
    if isinstance(space, gymnasium.spaces.Box) and config.action_set == "one_hot":
        raise UserError(
            f"{key}: the environment {protocol.env} has continuous actions: set planning.action_set to ball or box, "
            "and planning.planner to another one than categorical"
        )
    if not isinstance(space, gymnasium.spaces.Box | gymnasium.spaces.Discrete):
        raise UserError(f"the environment {protocol.env} has actions of {space}: planning needs Box or Discrete")
    if isinstance(space, gymnasium.spaces.Box) and not ((space.low == -1).all() and (space.high == 1).all()):
        log.warning(
            "the environment %s has actions of %s, and plans hold actions in [-1, 1] only: record and plan in one with "
            "gymnasium.wrappers.RescaleAction",
            protocol.env,
            space,
        )


@dataclass(frozen=True)
class _PlannedOnce:
    """The summary of all seeds, the policy of each, and the results of the first one."""

    scores: Planned
    policies: Sequence[LatentPolicy]
    first: EpisodeResults


def _plan_once(policies: Sequence[LatentPolicy], protocol: PlanningProtocol, count: int | None) -> _PlannedOnce:
    """Plan the episodes of every seed by its policy, with a decoder of `count` labels or the actions of the run."""
    label = "planning" if count is None else f"planning, {count} labels"
    results = run_seeds(protocol, lambda seed, envs: policies[seed], label=label, keep_frames=True)
    return _PlannedOnce(summary(results), policies, results[0])


def _random(seed: int, envs: Sequence[gymnasium.Env]) -> GoalPolicy:
    return RandomPolicy(envs, seed)


def _ceiling(protocol: PlanningProtocol, config: PlanningConfig) -> Planned | None:
    """Return the scores of planning on the true simulator; None if the environment has no privileged_cost.

    A simulator has no gradients. In place of gradient descent it is planned with by iCEM.
    """
    if not env_hook(protocol, "privileged_cost"):
        return None
    planner = IcemConfig() if isinstance(config.planner, GradientConfig) else config.planner
    if isinstance(planner, CemConfig | IcemConfig | CategoricalConfig):
        planner = dataclasses.replace(planner, elites=min(planner.elites, CEILING_CANDIDATES // 2))
    smaller = dataclasses.replace(config, planner=planner, candidates=CEILING_CANDIDATES, horizon=CEILING_HORIZON)

    def privileged(seed: int, envs: Sequence[gymnasium.Env]) -> GoalPolicy:
        return PrivilegedPolicy(envs, smaller, seed)

    return evaluate_policy(protocol, privileged, label="privileged")


def _replayed(protocol: PlanningProtocol, starts: RecordedStarts, num_steps: int, *, label: str) -> Planned:
    """Return the scores of the first recorded actions of each episode, and of none after them."""

    def replay(seed: int, envs: Sequence[gymnasium.Env]) -> GoalPolicy:
        return ReplayPolicy(np.stack([episode.actions[:num_steps] for episode in starts.episodes[seed]]))

    return evaluate_policy(protocol, replay, label=label)


def _with_labels(count: int, scores: Planned) -> PlannedWithLabels:
    rate, low, high = scores["success_rate"], *scores["ci95"]
    assert rate is not None and low is not None and high is not None
    return PlannedWithLabels(
        labels=count,
        success_rate=rate,
        ci95=(low, high),
        per_seed=scores["per_seed"],
        ms_per_decision=scores["ms_per_decision"],
    )


def protocol_facts(
    protocol: PlanningProtocol, config: PlanningConfig, run: TrainedRun, labels: Sequence[int], policy: PolicyName
) -> ProtocolFacts:
    """Return everything that a success rate depends on, besides the weights of the checkpoint."""
    return ProtocolFacts(
        **protocol.starts.facts,
        env=protocol.env,
        env_kwargs=dict(protocol.env_kwargs),
        seeds=protocol.seeds,
        episodes=protocol.episodes,
        budget=protocol.budget,
        block=clip_layout(run.config).span,
        first_seed=protocol.first_seed,
        planning=dataclasses.asdict(config),
        step=run.num_updates,
        labels=labels[-1] if labels else None,
        policy=policy,
    )
