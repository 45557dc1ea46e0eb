"""Policies that bound a success rate: random actions as the floor, planning on the true simulator as the ceiling.

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
        return torch.from_numpy(np.stack(flat))

    def keep(self, is_running: Tensor) -> None:
        pass


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
        return actions[:, 0]

    def keep(self, is_running: Tensor) -> None:
        self.plan = Plan(*(part[is_running] for part in self.plan))
        self.cost.keep(is_running)
