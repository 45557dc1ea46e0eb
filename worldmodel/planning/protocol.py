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
from data_pipelines.worlds.camera import PLAIN, Camera, ThroughCamera
from data_pipelines.worlds.recorder import make_env
from worldmodel.evaluation.scores import wilson_interval
from worldmodel.runs.planning_metrics import Planned, ProtocolFacts


class GoalPolicy(Protocol):
    """Acts in a batch of episodes that start together and end one by one.

    A decision is for K steps of the environment, which are taken without looking at their frames.
    """

    def begin(self, goals: Tensor) -> None:
        """Take the goal images of all episodes, uint8 [E, C, H, W]."""

    def act(self, frames: Tensor) -> Tensor:
        """Return the next actions [E, K, A], K of them in a row, for new frames, uint8 [E, T, C, H, W].

        The frames are those since the last decision: at first the one of the start, then one after each action. Frames
        and actions are those of the running episodes. Actions are flat, as they are recorded
        (gymnasium.spaces.flatten): discrete ones are one-hot.
        """

    def keep(self, is_running: Tensor) -> None:
        """Drop the episodes that have ended: bool [E]."""


class Starts(Protocol):
    """The starts of a protocol's episodes: DrawnStarts, or RecordedStarts of recorded.py."""

    def begin(self, env: gymnasium.Env, seed: int, number: int, env_seed: int) -> Mapping[str, Any]:
        """Reset an environment for an episode of a seed, and return its info. env_seed is that of its own chance."""

    @property
    def facts(self) -> ProtocolFacts:
        """Facts about the starts, for the result."""


@dataclass(frozen=True)
class DrawnStarts:
    """The environment draws starts and goals."""

    def begin(self, env: gymnasium.Env, seed: int, number: int, env_seed: int) -> Mapping[str, Any]:
        return env.reset(seed=env_seed)[1]

    @property
    def facts(self) -> ProtocolFacts:
        return ProtocolFacts(protocol="drawn")


@dataclass(frozen=True)
class PlanningProtocol:
    """Episodes of an environment, seen through a camera, of at most `budget` steps, with a seed for each episode."""

    env: str
    env_kwargs: Mapping[str, Any]
    seeds: int
    episodes: int
    budget: int
    first_seed: int
    starts: Starts = DrawnStarts()
    camera: Camera = PLAIN

    def episode_seeds(self, seed: int) -> list[int]:
        """Return the environment's seed for each episode of one seed of the protocol."""
        root = np.random.SeedSequence([self.first_seed, seed])
        return [int(word) for word in root.generate_state(self.episodes)]

    def make_env(self) -> gymnasium.Env:
        """Make one environment."""
        env = make_env(self.env, self.env_kwargs, num_steps=self.budget)
        return env if self.camera == PLAIN else ThroughCamera(env, self.camera)


MakePolicy = Callable[[int, Sequence[gymnasium.Env]], GoalPolicy]
"""A function from a seed and the environments of its episodes to a policy."""


@dataclass(frozen=True)
class EpisodeResults:
    """Results of E episodes.

    success [E]; steps [E], the budget if the goal was not reached. path [E] is the length of the way, shortest [E] that
    of the shortest way, NaN if the environment does not state it. Both are in px if the environment has state_px.
    states holds [steps + 1, K] per episode.

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

    def __init__(self, env: gymnasium.Env, first_info: Mapping[str, Any], *, keep_frames: bool) -> None:
        self.env, self.first_info, self.keep_frames = env, first_info, keep_frames
        self.success = self.ended = False

    def start(self) -> None:
        """Read the first state and render the first frame, once the environment is known to have a goal image."""
        self.goal_state = self.first_info.get("goal")
        self.states = [state_in(self.first_info)]
        self.new_frames = [self._rendered()]
        self.frames = list(self.new_frames)
        self.shortest = float(getattr(self.env.unwrapped, "shortest_path_px", lambda: np.nan)())

    @property
    def path(self) -> float:
        """The length of the way, in px if the environment maps its states to pixels."""
        state_px = getattr(self.env.unwrapped, "state_px", lambda states: states)
        return float(np.linalg.norm(np.diff(state_px(np.stack(self.states)), axis=0), axis=1).sum())

    def run(self, actions: np.ndarray) -> None:
        """Execute flat actions [K, A] one after the other, until the goal is reached or the environment ends."""
        self.new_frames = []
        for action in actions:
            _, _, terminated, truncated, info = self.env.step(unflatten_action(self.env.action_space, action))
            self.new_frames.append(self._rendered())
            self.states.append(state_in(info))
            self.success = bool(info.get("is_success", terminated))
            self.ended = self.success or terminated or truncated
            if self.ended:
                break
        if self.keep_frames:
            self.frames += self.new_frames

    def _rendered(self) -> np.ndarray:
        return np.array(self.env.render())


def run_episodes(
    protocol: PlanningProtocol,
    seed: int,
    make_policy: Callable[[Sequence[gymnasium.Env]], GoalPolicy],
    *,
    label: str = "",
    keep_frames: bool = False,
) -> EpisodeResults:
    """Run the episodes of one seed under a policy, all at once.

    The goal is reached when info["is_success"] is true or, in an environment without it, when an episode terminates.

    Raises:
        UserError: the environment renders no goal image, or does not state its state.
    """
    envs = [protocol.make_env() for _ in range(protocol.episodes)]
    if not all(hasattr(env.unwrapped, "goal_frame") for env in envs):
        raise UserError(f"the environment {protocol.env} has no goal_frame(): there is no goal to plan for")
    seeds = enumerate(zip(envs, protocol.episode_seeds(seed), strict=True))
    infos = [protocol.starts.begin(env, seed, number, env_seed) for number, (env, env_seed) in seeds]
    episodes = [_Episode(env, info, keep_frames=keep_frames) for env, info in zip(envs, infos, strict=True)]
    policy = make_policy(envs)
    goals = _pictures([env.get_wrapper_attr("goal_frame")() for env in envs])
    policy.begin(goals)
    for episode in episodes:
        episode.start()
    running = episodes
    decision_s, decisions, steps_left = 0.0, 0, protocol.budget
    with tqdm(total=protocol.budget, desc=label, unit="step", leave=False) as bar:
        while running and steps_left:
            frames = torch.stack([_pictures(episode.new_frames) for episode in running])
            started_s = time.perf_counter()
            actions = policy.act(frames).numpy()[:, :steps_left]
            decision_s += time.perf_counter() - started_s
            decisions += len(running)
            for episode, block in zip(running, actions, strict=True):
                episode.run(block)
            policy.keep(torch.tensor([not episode.ended for episode in running]))
            running = [episode for episode in running if not episode.ended]
            steps_left -= actions.shape[1]
            bar.update(actions.shape[1])
    for env in envs:
        env.close()
    ways = [np.stack(episode.states) for episode in episodes]
    return EpisodeResults(
        success=np.array([episode.success for episode in episodes], bool),
        steps=np.array([len(one.states) - 1 if one.success else protocol.budget for one in episodes]),
        path=np.array([episode.path for episode in episodes]),
        shortest=np.array([episode.shortest for episode in episodes]),
        states=ways,
        goals=goals.numpy(),
        goal_states=[episode.goal_state for episode in episodes],
        frames=[_pictures(episode.frames).numpy() for episode in episodes] if keep_frames else [],
        decision_s=decision_s,
        decisions=decisions,
    )


def state_in(info: Mapping[str, Any]) -> np.ndarray:
    """Return info["state"], the state of an environment [K]. Raises UserError: there is none."""
    if "state" not in info:
        raise UserError('the environment does not state its state: planning needs info["state"] from reset and step')
    state: np.ndarray = info["state"]
    return state


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
    """Return the attribute `name` of the environment, which Gymnasium does not define; None if it is missing.

    - privileged_cost(envs): see PrivilegedPolicy.
    - state_px(states): positions (x, y) in px of its frames, float [..., 2], x right and y down, pixel centres at
      integers, of states [..., K], which are in info["state"] and, for the goal, in info["goal"].
    """
    env = protocol.make_env()
    env.close()
    return getattr(env.unwrapped, name, None)


def unflatten_action(space: gymnasium.Space, action: np.ndarray) -> Any:
    """Return the action of a space for a flat one [A]. Zeros are the first of discrete actions, as none is zero."""
    if isinstance(space, gymnasium.spaces.Discrete) and not action.any():
        return space.start
    return gymnasium.spaces.unflatten(space, action)


def _pictures(frames: Sequence[np.ndarray]) -> Tensor:
    """Stack uint8 [H, W, C] frames into uint8 [E, C, H, W]."""
    return torch.from_numpy(np.stack(frames)).movedim(-1, 1)
