"""The cross-entropy method (Rubinstein 1999; de Boer et al. 2005, with smoothed updating).

Legend: E episodes, N candidates, L elites, A action dimensions.
"""

import torch
from torch import Tensor

from worldmodel.config import PlanningConfig
from worldmodel.planning.planners import Cost, Plan, costs_of, draw_candidates

MOMENTUM = 0.1  # of mean and standard deviation from one iteration to the next, as in iCEM's paper


class Cem:
    """Mean and standard deviation become those of the elites, the cheapest candidates. The plan is the mean."""

    def __init__(self, elites: int) -> None:
        self.num_elites = elites

    @torch.no_grad()
    def improve(
        self, config: PlanningConfig, plan: Plan, cost: Cost, generator: torch.Generator
    ) -> tuple[Plan, Tensor, Tensor]:
        """Make one decision (worldmodel.planning.planners.Planner).

        `cost` is called once per iteration, and once more for the costs of the mean.
        """
        mean, std = plan.mean, torch.full_like(plan.mean, config.init_std)
        for _ in range(config.iterations):
            candidates = draw_candidates(config, mean, std, generator)
            elites, _ = cheapest(candidates, costs_of(cost, candidates), self.num_elites)
            mean, std = refitted(mean, std, elites)
        return plan._replace(mean=mean), mean, costs_of(cost, mean[:, None]).squeeze(1)


def cheapest(candidates: Tensor, costs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the cheapest candidates, best first: [E, N, horizon, A], [E, N] -> [E, L, horizon, A], [E, L]."""
    elite_costs, order = costs.topk(count, largest=False)
    return candidates[torch.arange(len(order), device=order.device)[:, None], order], elite_costs


def refitted(mean: Tensor, std: Tensor, elites: Tensor) -> tuple[Tensor, Tensor]:
    """Move mean and standard deviation [E, horizon, A] to those of the elites [E, L, horizon, A]."""
    elite_mean = elites.mean(dim=1)
    elite_std = (elites - elite_mean[:, None]).square_().mean(dim=1).sqrt_()  # torch.std takes ten times as long
    return elite_mean.lerp(mean, MOMENTUM), elite_std.lerp(std, MOMENTUM)
