"""Policies that bound a success rate.

Floors are random actions and none at all. Ceilings are planning on the true simulator, and the recorded actions.

Legend: E episodes, N candidates, A numbers of an action, C channels, H = W pixels.
"""

from collections.abc import Sequence

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import flatdim, flatten
from torch import Tensor

from worldmodel.config import PlanningConfig
from worldmodel.planning.planners import Plan, make_planner, shift, start


class RandomPolicy:
    """Draws each action uniformly from the action space: the floor."""

    def __init__(self, envs: Sequence[gymnasium.Env], seed: int) -> None:
        self.space = envs[0].action_space
        self.space.seed(seed)

    def begin(self, goals: Tensor) -> None:
        pass

    def act(self, frames: Tensor) -> Tensor:
        flat = [np.asarray(flatten(self.space, self.space.sample())) for _ in frames]
        return torch.from_numpy(np.stack(flat))[:, None]

    def keep(self, is_running: Tensor) -> None:
        pass


class ReplayPolicy:
    """Repeats recorded actions [E, T, A], then actions of zero: the ceiling if nothing is left to chance.

    Without recorded actions, T = 0, it does nothing: what a success rate owes to the start and to chance.
    """

    def __init__(self, actions: np.ndarray) -> None:
        self.actions = torch.from_numpy(actions)

    def begin(self, goals: Tensor) -> None:
        self.remaining = self.actions

    def act(self, frames: Tensor) -> Tensor:
        now, self.remaining = self.remaining[:, :1], self.remaining[:, 1:]
        return now if now.shape[1] else now.new_zeros(len(now), 1, now.shape[2])

    def keep(self, is_running: Tensor) -> None:
        self.remaining = self.remaining[is_running]


class PrivilegedPolicy:
    """Runs the same planner on the true simulator and the true remaining distance: the ceiling.

    The environment's class defines privileged_cost(envs), a function from actions [E, N, horizon, A] to costs [E, N].
    """

    def __init__(self, envs: Sequence[gymnasium.Env], config: PlanningConfig, seed: int) -> None:
        self.envs, self.config, self.planner = list(envs), config, make_planner(config.planner)
        self.generator = torch.Generator().manual_seed(seed)
        self.plan = start(config, len(envs), flatdim(envs[0].action_space), torch.device("cpu"))
        self.cost = type(envs[0].unwrapped).privileged_cost([env.unwrapped for env in envs])  # type: ignore[attr-defined]

    def begin(self, goals: Tensor) -> None:
        pass

    def act(self, frames: Tensor) -> Tensor:
        plan, actions, _ = self.planner.improve(self.config, self.plan, self.cost, self.generator)
        self.plan = shift(plan)
        return actions[:, :1]

    def keep(self, is_running: Tensor) -> None:
        self.plan = Plan(*(part[is_running] for part in self.plan))
        self.cost.keep(is_running)
