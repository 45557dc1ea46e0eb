"""Planning as a probe: how often a policy reaches its goals in an environment.

Success rates of 50 episodes vary by many points from seed to seed. Several seeds, an interval over all episodes, a
floor, a ceiling and the whole protocol are therefore reported together.

Legend: E episodes, A numbers of an action, K numbers of a state, C channels, H = W pixels.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from data_pipelines.errors import UserError
from data_pipelines.worlds.recorder import make_env
from worldmodel.evaluation.scores import wilson_interval
from worldmodel.runs.metrics import Planned


class GoalPolicy(Protocol):
    """Acts in a batch of episodes that start together and end one by one."""

    def begin(self, goals: Tensor) -> None:
        """Take the goal images of all episodes, uint8 [E, C, H, W]."""

    def act(self, frames: Tensor) -> Tensor:
        """Return actions [E, A] for the current frames of the running episodes, uint8 [E, C, H, W].

        Actions are flat, as they are recorded (gymnasium.spaces.flatten): discrete ones are one-hot.
        """

    def keep(self, is_running: Tensor) -> None:
        """Drop the episodes that have ended: bool [E]."""


@dataclass(frozen=True)
class PlanningProtocol:
    """Episodes of an environment, each of at most `budget` steps, with a seed for each episode."""

    env: str
    env_kwargs: Mapping[str, Any]
    seeds: int
    episodes: int
    budget: int
    first_seed: int

    def episode_seeds(self, seed: int) -> list[int]:
        """Return the environment's seed for each episode of one seed of the protocol."""
        root = np.random.SeedSequence([self.first_seed, seed])
        return [int(word) for word in root.generate_state(self.episodes)]

    def make_env(self) -> gymnasium.Env:
        """Make one environment."""
        return make_env(self.env, self.env_kwargs, num_steps=self.budget)


MakePolicy = Callable[[int, Sequence[gymnasium.Env]], GoalPolicy]
"""A function from a seed and the environments of its episodes to a policy."""


@dataclass(frozen=True)
class EpisodeResults:
    """Results of E episodes.

    success [E]; steps [E], the budget if the goal was not reached. path [E] is the length of the way, shortest [E] that
    of the shortest way, NaN if the environment does not state it. states holds [steps + 1, K] per episode.

    goals uint8 [E, C, H, W] are the goal images, and goal_states their states, None if the environment does not state
    them. frames holds the frames of each episode, uint8 [steps + 1, C, H, W]; it is empty if they were not kept.
    """

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


class _Episode:
    """One running episode and its record."""

    def __init__(self, env: gymnasium.Env, env_seed: int, *, keep_frames: bool) -> None:
        self.env, self.keep_frames = env, keep_frames
        _, self.first_info = env.reset(seed=env_seed)
        self.success = False

    def start(self) -> None:
        """Read the first state and render the first frame, once the environment is known to have a goal image."""
        self.goal_state = self.first_info.get("goal")
        self.states = [self.first_info["state"]]
        self.frame: Any = self.env.render()
        self.frames = [np.array(self.frame)]
        self.shortest = float(getattr(self.env.unwrapped, "shortest_path_px", lambda: np.nan)())

    def step(self, action: np.ndarray) -> None:
        """Take a flat action [A]."""
        _, _, self.success, _, info = self.env.step(gymnasium.spaces.unflatten(self.env.action_space, action))
        self.frame = self.env.render()
        self.states.append(info["state"])
        if self.keep_frames:
            self.frames.append(np.array(self.frame))


def run_episodes(
    protocol: PlanningProtocol,
    seed: int,
    make_policy: Callable[[Sequence[gymnasium.Env]], GoalPolicy],
    *,
    label: str = "",
    keep_frames: bool = False,
) -> EpisodeResults:
    """Run the episodes of one seed under a policy, all at once.

    Raises:
        UserError: the environment renders no goal image.
    """
    envs = [protocol.make_env() for _ in range(protocol.episodes)]
    seeds = zip(envs, protocol.episode_seeds(seed), strict=True)
    episodes = [_Episode(env, number, keep_frames=keep_frames) for env, number in seeds]
    if not all(hasattr(env.unwrapped, "goal_frame") for env in envs):
        raise UserError(f"the environment {protocol.env} has no goal_frame(): there is no goal to plan for")
    policy = make_policy(envs)
    goals = _pictures([env.unwrapped.goal_frame() for env in envs])  # type: ignore[attr-defined]
    policy.begin(goals)
    for episode in episodes:
        episode.start()
    running = episodes
    decision_s, decisions = 0.0, 0
    for _ in tqdm(range(protocol.budget), desc=label, unit="step", leave=False):
        started_s = time.perf_counter()
        actions = policy.act(_pictures([episode.frame for episode in running])).numpy()
        decision_s += time.perf_counter() - started_s
        decisions += len(running)
        for episode, action in zip(running, actions, strict=True):
            episode.step(action)
        policy.keep(torch.tensor([not episode.success for episode in running]))
        running = [episode for episode in running if not episode.success]
        if not running:
            break
    for env in envs:
        env.close()
    ways = [np.stack(episode.states) for episode in episodes]
    return EpisodeResults(
        success=np.array([episode.success for episode in episodes], bool),
        steps=np.array([len(way) - 1 for way in ways]),
        path=np.array([np.linalg.norm(np.diff(way, axis=0), axis=1).sum() for way in ways]),
        shortest=np.array([episode.shortest for episode in episodes]),
        states=ways,
        goals=goals.numpy(),
        goal_states=[episode.goal_state for episode in episodes],
        frames=[_pictures(episode.frames).numpy() for episode in episodes] if keep_frames else [],
        decision_s=decision_s,
        decisions=decisions,
    )


def run_seeds(
    protocol: PlanningProtocol, make_policy: MakePolicy, *, label: str, keep_frames: bool = False
) -> list[EpisodeResults]:
    """Run the episodes of each seed of the protocol. Frames are kept for the first seed only, as they are large."""
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


def summary(results: Sequence[EpisodeResults]) -> Planned:
    """Summarise the episodes of all seeds.

    path_ratio is the mean of path / shortest over the successful episodes. ms_per_decision is the policy's own time
    divided by its decisions. The interval is Wilson's.
    """
    success = np.concatenate([one.success for one in results])
    ratio = np.concatenate([one.path / one.shortest for one in results])[success]
    return Planned(
        success_rate=float(success.mean()),
        ci95=list(wilson_interval(int(success.sum()), len(success))),
        per_seed=[float(one.success.mean()) for one in results],
        path_ratio=float(ratio.mean()) if len(ratio) and np.isfinite(ratio).all() else None,
        steps=float(np.concatenate([one.steps for one in results]).mean()),
        ms_per_decision=1000 * sum(one.decision_s for one in results) / sum(one.decisions for one in results),
    )


def evaluate_policy(protocol: PlanningProtocol, make_policy: MakePolicy, *, label: str) -> Planned:
    """Run the episodes of all seeds and summarise them."""
    return summary(run_seeds(protocol, make_policy, label=label))


def env_hook(protocol: PlanningProtocol, name: str) -> Any:
    """Return the attribute `name` of the environment's class, which Gymnasium does not define; None if it is missing.

    - privileged_cost(envs): see PrivilegedPolicy.
    - state_px(states): positions (x, y) in px of its frames, float [..., 2], x right and y down, pixel centres at
      integers, of states [..., K], which are in info["state"] and, for the goal, in info["goal"].
    """
    env = protocol.make_env()
    env.close()
    return getattr(type(env.unwrapped), name, None)


def _pictures(frames: Sequence[np.ndarray]) -> Tensor:
    """Stack uint8 [H, W, C] frames into uint8 [E, C, H, W]."""
    return torch.from_numpy(np.stack(frames)).movedim(-1, 1)
