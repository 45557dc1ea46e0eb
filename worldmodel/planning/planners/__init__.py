"""Planners over sequences of actions, for a batch of episodes at once: one file each.

Planners draw candidates around a mean, compute their costs, move the mean towards cheap candidates, and repeat;
`gradient` moves every candidate down the gradient of its cost instead.

    planner = make_planner(config.planner)
    plan = start(config, num_episodes, action_dim, device)
    while acting:
        plan, actions, costs = planner.improve(config, plan, cost, generator)
        ...  # take actions[:, 0]
        plan = shift(plan)

Actions lie in the unit ball or in the box [-1, 1]^A, or they are one-hot; candidates outside are moved to the nearest
point. All episodes use the same random numbers, so that the plan of one does not depend on the others in its batch,
unless futures are sampled (planning.num_samples): each episode's are drawn in turn from one generator.

Legend: E episodes, N candidates, L elites, A action dimensions. Steps of the horizon are written out as `horizon`.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel import parts
from worldmodel.config import PlannerConfig, PlanningConfig

Cost = Callable[[Tensor], Tensor]
"""A function from actions [E, N, horizon, A] to finite costs [E, N]; lower is better.

A planner is called without gradients. Under torch.enable_grad(), the costs of imagined futures have gradients with
respect to the actions.
"""


class Plan(NamedTuple):
    """The state between decisions: mean [E, horizon, A], and the elites [E, L, horizon, A] of iCEM, best first.

    It has no standard deviation: every decision starts with that of the config. The mean of discrete actions holds
    their probabilities.
    """

    mean: Tensor
    elites: Tensor


class Planner(Protocol):
    """A search over sequences of actions, for a batch of episodes at once.

    To add one to the project, write its class in a file of this folder, and its entry in `PlannerConfig`
    (worldmodel/config/sections.py). Nothing but the keys is offered to a class (worldmodel/parts.py).
    """

    def improve(
        self, config: PlanningConfig, plan: Plan, cost: Cost, generator: torch.Generator
    ) -> tuple[Plan, Tensor, Tensor]:
        """Make one decision, from the plan of the last decision, shifted by a step.

        Args:
            cost: is called with any number of candidates, [E, N, horizon, A] in the set of allowed actions.
            generator: on the CPU for any device of the plan, so that a seed has the same effect everywhere.

        Returns: the plan, the chosen actions [E, horizon, A] and their costs [E].
        """


def make_planner(config: PlannerConfig) -> Planner:
    """Return the planner of a config.

    Raises:
        UserError: a class from outside cannot be loaded.
    """
    planner: Planner = parts.build("planning.planner.name", config, Planner)
    return planner


def start(config: PlanningConfig, num_episodes: int, action_dim: int, device: torch.device) -> Plan:
    """Return an initial plan: actions of zero, no elites."""
    shape = (config.horizon, action_dim)
    return Plan(torch.zeros(num_episodes, *shape, device=device), torch.zeros(num_episodes, 0, *shape, device=device))


def shift(plan: Plan) -> Plan:
    """Return the plan one step later: without its first action, with an action of zero at the end."""
    return Plan(*(torch.cat([part[..., 1:, :], torch.zeros_like(part[..., :1, :])], dim=-2) for part in plan))


def draw_candidates(
    config: PlanningConfig, mean: Tensor, std: Tensor, generator: torch.Generator, colouring: Tensor | None = None
) -> Tensor:
    """Draw candidates [E, N, horizon, A] around a mean [E, horizon, A], in the set of allowed actions.

    Args:
        colouring: matrix [horizon, horizon] that correlates the noise in time; without it the noise is white.
    """
    noise = draw_noise(config, mean.shape[-1], generator, colouring).to(mean)
    return project_(torch.addcmul(mean[:, None], std[:, None], noise), config.action_set)


def draw_noise(
    config: PlanningConfig, action_dim: int, generator: torch.Generator, colouring: Tensor | None = None
) -> Tensor:
    """Draw normal noise [N, horizon, A], white in time or coloured by a matrix [horizon, horizon]."""
    noise = torch.randn(config.candidates, action_dim, config.horizon, generator=generator)
    return (noise if colouring is None else noise @ colouring).mT.contiguous()


def project_(actions: Tensor, action_set: Literal["ball", "box", "one_hot"]) -> Tensor:
    """Move actions [..., A] in place to the nearest point of the ball, the box [-1, 1]^A or the one-hot vectors."""
    if action_set == "box":
        return actions.clamp_(-1, 1)
    if action_set == "one_hot":
        return actions.copy_(F.one_hot(actions.argmax(dim=-1), actions.shape[-1]))
    return actions.div_(torch.linalg.vector_norm(actions, dim=-1, keepdim=True).clamp_(min=1))


def costs_of(cost: Cost, candidates: Tensor) -> Tensor:
    """Return the costs [E, N] of candidates [E, N, horizon, A]."""
    costs = cost(candidates)
    assert costs.shape == candidates.shape[:2], f"costs {tuple(costs.shape)} of actions {tuple(candidates.shape)}"
    assert costs.isfinite().all(), "the cost of some actions is not finite"
    return costs
