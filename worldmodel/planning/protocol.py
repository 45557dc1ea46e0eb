"""Planning as a probe: how often a policy reaches its goals in an environment, against chance and against the truth.

Success rates of 50 episodes swing by many points from seed to seed: several seeds, an interval over all episodes, the
random policy's floor, the privileged planner's ceiling and the whole protocol are reported together.

Legend: E episodes, A numbers of an action, C channels, H = W pixels.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from data_pipelines.errors import UserError
from data_pipelines.worlds.recorder import make_env
from worldmodel.config import PlanningConfig
from worldmodel.evaluation.scores import wilson_interval
from worldmodel.planning.planners import Plan, improve, shift, start


class Policy(Protocol):
    """Acts in a batch of episodes that begin together and end one by one."""

    def begin(self, goals: Tensor) -> None:
        """Pictures of the goals, uint8 [E, C, H, W]."""

    def act(self, frames: Tensor) -> Tensor:
        """What is seen of the episodes that go on, uint8 [E, C, H, W] -> actions [E, A]."""

    def keep(self, going_on: Tensor) -> None:
        """Which of them still go on: bool [E]."""


@dataclass(frozen=True)
class PlanningProtocol:
    """What is asked of a policy: episodes of an environment, each of at most `budget` steps, seeded one by one."""

    env: str
    env_kwargs: Mapping[str, Any]
    seeds: int
    episodes: int
    budget: int
    first_seed: int

    def episode_seeds(self, seed: int) -> list[int]:
        """The environment's seed for each episode of one seed of the protocol."""
        root = np.random.SeedSequence([self.first_seed, seed])
        return [int(word) for word in root.generate_state(self.episodes)]


@dataclass(frozen=True)
class Episodes:
    """What became of E episodes: success [E]; steps [E], the budget where the goal was not reached; the length of the
    way [E] and of the shortest one [E], NaN where the environment does not tell; states of each, [steps + 1, 2].

    goals uint8 [E, C, H, W] are the pictures of the goals, and goal_states their states, None where the environment
    does not tell. frames holds what was seen of each, uint8 [steps + 1, C, H, W]; nothing where it was not kept."""

    success: np.ndarray
    steps: np.ndarray
    path: np.ndarray
    shortest: np.ndarray
    states: list[np.ndarray]
    goals: np.ndarray
    goal_states: list[np.ndarray | None]
    frames: list[np.ndarray]
    decision_s: float
    decisions: int


def run_episodes(
    protocol: PlanningProtocol,
    seed: int,
    make_policy: Callable[[Sequence[gymnasium.Env]], Policy],
    *,
    label: str = "",
    keep_frames: bool = False,
) -> Episodes:
    """The episodes of one seed under a policy, all at once.

    Raises:
        UserError: the environment shows no picture of its goals.
    """
    envs = [make_env(protocol.env, protocol.env_kwargs, num_steps=protocol.budget) for _ in range(protocol.episodes)]
    starts = [env.reset(seed=number) for env, number in zip(envs, protocol.episode_seeds(seed), strict=True)]
    if not all(hasattr(env.unwrapped, "goal_frame") for env in envs):
        raise UserError(f"the environment {protocol.env} has no goal_frame(): there is no goal to plan for")
    policy = make_policy(envs)
    goals = _pictures([env.unwrapped.goal_frame() for env in envs])  # type: ignore[attr-defined]
    policy.begin(goals)
    frames: list[Any] = [env.render() for env in envs]
    seen = [[np.array(frame)] for frame in frames]
    states = [[info["state"]] for _, info in starts]
    shortest = np.array([float(getattr(env.unwrapped, "shortest_path_px", lambda: np.nan)()) for env in envs])
    success, steps = np.zeros(len(envs), bool), np.full(len(envs), protocol.budget)
    alive = list(range(len(envs)))
    decision_s, decisions = 0.0, 0
    for step in tqdm(range(protocol.budget), desc=label, unit="step", leave=False):
        started_s = time.perf_counter()
        actions = policy.act(_pictures([frames[row] for row in alive])).numpy()
        decision_s += time.perf_counter() - started_s
        decisions += len(alive)
        ended = []
        for row, action in zip(alive, actions, strict=True):
            _, _, terminated, _, info = envs[row].step(action)
            frames[row] = envs[row].render()
            states[row].append(info["state"])
            if keep_frames:
                seen[row].append(np.array(frames[row]))
            ended.append(terminated)
            if terminated:
                success[row], steps[row] = True, step + 1
        policy.keep(~torch.tensor(ended))
        alive = [row for row, end in zip(alive, ended, strict=True) if not end]
        if not alive:
            break
    for env in envs:
        env.close()
    ways = [np.stack(way) for way in states]
    path = np.array([np.linalg.norm(np.diff(way, axis=0), axis=1).sum() for way in ways])
    return Episodes(
        success=success,
        steps=steps,
        path=path,
        shortest=shortest,
        states=ways,
        goals=goals.numpy(),
        goal_states=[info.get("goal") for _, info in starts],
        frames=[_pictures(pictures).numpy() for pictures in seen] if keep_frames else [],
        decision_s=decision_s,
        decisions=decisions,
    )


def run_seeds(
    protocol: PlanningProtocol,
    make_policy: Callable[[int, Sequence[gymnasium.Env]], Policy],
    *,
    label: str,
    keep_frames: bool = False,
) -> list[Episodes]:
    """The episodes of each seed of the protocol; frames are kept of the first alone, as they are many."""
    return [
        run_episodes(
            protocol,
            seed,
            partial(make_policy, seed),
            label=f"{label}, seed {seed}",
            keep_frames=keep_frames and seed == 0,
        )
        for seed in range(protocol.seeds)
    ]


def summary(runs: Sequence[Episodes]) -> dict[str, Any]:
    """Success over the episodes of all seeds -> success_rate, ci95 (Wilson), per_seed, path_ratio, steps,
    ms_per_decision.

    path_ratio is the mean length of ways that reached the goal over that of the shortest; ms_per_decision the policy's
    own time, divided by decisions.
    """
    success = np.concatenate([run.success for run in runs])
    ratio = np.concatenate([run.path / run.shortest for run in runs])[success]
    return {
        "success_rate": float(success.mean()),
        "ci95": list(wilson_interval(int(success.sum()), len(success))),
        "per_seed": [float(run.success.mean()) for run in runs],
        "path_ratio": float(ratio.mean()) if len(ratio) and np.isfinite(ratio).all() else None,
        "steps": float(np.concatenate([run.steps for run in runs]).mean()),
        "ms_per_decision": 1000 * sum(run.decision_s for run in runs) / sum(run.decisions for run in runs),
    }


def evaluate_policy(
    protocol: PlanningProtocol, make_policy: Callable[[int, Sequence[gymnasium.Env]], Policy], *, label: str
) -> dict[str, Any]:
    """The summary of the episodes of all seeds."""
    return summary(run_seeds(protocol, make_policy, label=label))


# ------------------------------------------------------------------------------------------------------ controls


class RandomPolicy:
    """Each action uniform over the action space: the floor."""

    def __init__(self, envs: Sequence[gymnasium.Env], seed: int) -> None:
        self.space = envs[0].action_space
        self.space.seed(seed)

    def begin(self, goals: Tensor) -> None:
        pass

    def act(self, frames: Tensor) -> Tensor:
        return torch.from_numpy(np.stack([self.space.sample() for _ in frames]))

    def keep(self, going_on: Tensor) -> None:
        pass


class PrivilegedPolicy:
    """The same planners on the true simulator and the true distance left: the ceiling.

    The environment's class offers privileged_cost(envs): a function of actions [E, N, H, A] to costs [E, N].
    """

    def __init__(self, envs: Sequence[gymnasium.Env], config: PlanningConfig, seed: int) -> None:
        self.envs, self.config = list(envs), config
        self.generator = torch.Generator().manual_seed(seed)
        shape = envs[0].action_space.shape
        assert shape is not None
        self.plan = start(config, len(envs), shape[0], torch.device("cpu"))
        self.cost = type(envs[0].unwrapped).privileged_cost([env.unwrapped for env in envs])  # type: ignore[attr-defined]

    def begin(self, goals: Tensor) -> None:
        pass

    def act(self, frames: Tensor) -> Tensor:
        plan, actions, _ = improve(self.config, self.plan, self.cost, self.generator)
        self.plan = shift(plan)
        return actions[:, 0]

    def keep(self, going_on: Tensor) -> None:
        self.plan = Plan(*(part[going_on] for part in self.plan))
        self.cost.keep(going_on)


def offered(protocol: PlanningProtocol, name: str) -> Any:
    """What the environment's class offers beyond Gymnasium by this name, or None.

    - privileged_cost(envs): see PrivilegedPolicy.
    - state_px(states): positions (x, y) in px of its pictures, float [..., 2], x right and y down, pixel centres at
      integers, of states [..., K], which info["state"] holds and, of the goal, info["goal"].
    """
    env = make_env(protocol.env, protocol.env_kwargs, num_steps=protocol.budget)
    env.close()
    return getattr(type(env.unwrapped), name, None)


def describe(protocol: PlanningProtocol, config: PlanningConfig) -> dict[str, Any]:
    """All that a success rate depends on besides the model."""
    return asdict(protocol) | {"planning": asdict(config)}


def _pictures(frames: Sequence[np.ndarray]) -> Tensor:
    """uint8 [H, W, C] each -> uint8 [E, C, H, W]."""
    return torch.from_numpy(np.stack(frames)).movedim(-1, 1)
