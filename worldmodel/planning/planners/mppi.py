"""Model predictive path integral control (MPPI, Williams et al., arXiv 1509.01149, 1707.02342).

Legend: E episodes, N candidates, A action dimensions.
"""

import torch
from torch import Tensor

from worldmodel.config import PlanningConfig
from worldmodel.planning.planners import Cost, Plan, costs_of, draw_candidates


class Mppi:
    """The mean becomes that of all candidates under softmax weights of their costs; the standard deviation is constant.

    The plan is the mean. The cost function alone decides whether actions themselves have a cost.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

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
            weights = path_integral_weights(costs_of(cost, candidates), self.temperature)
            mean = (weights[:, None] @ candidates.flatten(2)).unflatten(-1, mean.shape[1:]).squeeze(1)
        return plan._replace(mean=mean), mean, costs_of(cost, mean[:, None]).squeeze(1)


def path_integral_weights(costs: Tensor, temperature: float) -> Tensor:
    """Return MPPI's weights for costs [E, N], softmax of -cost / (temperature * scale), with sum 1 per episode.

    The scale is the standard deviation of the episode's costs, so that weights do not depend on the unit of costs.
    """
    scale = costs.std(dim=1, keepdim=True, correction=0).clamp(min=torch.finfo(costs.dtype).tiny)
    return ((costs.amin(dim=1, keepdim=True) - costs) / scale / temperature).softmax(dim=1)
