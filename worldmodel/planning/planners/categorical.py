"""The cross-entropy method for discrete actions (Rubinstein 1999; de Boer et al. 2005, with smoothed updating).

Legend: E episodes, N candidates, L elites, A actions to choose from.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel.config import PlanningConfig
from worldmodel.planning.planners import Cost, Plan, costs_of, project_
from worldmodel.planning.planners.cem import MOMENTUM, cheapest


class Categorical:
    """Each step of the horizon has probabilities of its A actions, which become the shares of the elites.

    The mean of a plan, [E, horizon, A], holds these probabilities. A decision begins with those of the last one, mixed
    with uniform ones. The plan is the cheapest candidate of all iterations.
    """

    def __init__(self, elites: int, uniform_share: float) -> None:
        self.num_elites, self.uniform_share = elites, uniform_share

    @torch.no_grad()
    def improve(
        self, config: PlanningConfig, plan: Plan, cost: Cost, generator: torch.Generator
    ) -> tuple[Plan, Tensor, Tensor]:
        """Make one decision (worldmodel.planning.planners.Planner). `cost` is called once per iteration."""
        num_actions = plan.mean.shape[-1]
        last = normalised(plan.mean)
        best = project_(last.clone(), "one_hot")
        probabilities = last.lerp(torch.full_like(last, 1 / num_actions), self.uniform_share)
        for _ in range(config.iterations):
            candidates = draw_sequences(probabilities, config.candidates, generator)
            candidates[:, 0] = best
            elites, costs = cheapest(candidates, costs_of(cost, candidates), self.num_elites)
            probabilities = elites.mean(dim=1).lerp(probabilities, MOMENTUM)
            best = elites[:, 0]
        return plan._replace(mean=probabilities), best, costs[:, 0]


def normalised(probabilities: Tensor) -> Tensor:
    """Return probabilities [..., A] that sum to 1; uniform ones where all are 0, as in a step that is new."""
    total = probabilities.sum(dim=-1, keepdim=True)
    uniform = torch.full_like(probabilities, 1 / probabilities.shape[-1])
    return torch.where(total > 0, probabilities / total.clamp(min=torch.finfo(total.dtype).tiny), uniform)


def draw_sequences(probabilities: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw one-hot sequences [E, N, horizon, A] from probabilities [E, horizon, A].

    All episodes use the same uniform numbers, by the inverse of the cumulative distribution.
    """
    horizon, num_actions = probabilities.shape[1:]
    drawn = torch.rand(count, horizon, generator=generator).to(probabilities)
    bounds = probabilities.cumsum(dim=-1)[:, None, :, :-1]
    return F.one_hot((drawn[..., None] >= bounds).sum(dim=-1), num_actions).to(probabilities)
