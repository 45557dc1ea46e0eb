"""Gradient descent through the imagined future, from many starts, by Adam (Kingma and Ba, arXiv 1412.6980).

All coordinates of an action have one second moment. With one each, as in Adam, the steps of a constant gradient would
point along a diagonal, and at the border of the unit ball actions would turn towards it.

Legend: E episodes, N starts, A action dimensions.
"""

import torch
from torch import Tensor

from worldmodel.config import PlanningConfig
from worldmodel.planning.planners import Cost, Plan, costs_of, draw_candidates, project_

FIRST_MOMENT, SECOND_MOMENT = 0.9, 0.999


class Gradient:
    """Every start follows the gradient of its own cost, and is moved into the action set after each step.

    The starts are candidates around the plan of the last decision, which is one of them. The plan is the cheapest
    sequence of any step of any start.
    """

    def __init__(self, lr: float) -> None:
        self.lr = lr

    @torch.no_grad()
    def improve(
        self, config: PlanningConfig, plan: Plan, cost: Cost, generator: torch.Generator
    ) -> tuple[Plan, Tensor, Tensor]:
        """Make one decision (worldmodel.planning.planners.Planner).

        `cost` is called with gradients once per iteration, and once more for the costs of the last step. Its costs must
        be differentiable in the actions.
        """
        std = torch.full_like(plan.mean, config.init_std)
        starts = draw_candidates(config, plan.mean, std, generator)
        starts[:, 0] = project_(plan.mean.clone(), config.action_set)
        actions, first, second = starts, torch.zeros_like(starts), torch.zeros_like(starts[..., :1])
        best, best_costs = plan.mean, torch.full_like(plan.mean[:, 0, 0], torch.inf)
        for step in range(1, config.iterations + 1):
            with torch.enable_grad():
                costs = costs_of(cost, actions.requires_grad_())
                (gradient,) = torch.autograd.grad(costs.sum(), actions)
            actions = actions.detach()
            best, best_costs = cheaper(best, best_costs, actions, costs.detach())
            first = gradient.lerp(first, FIRST_MOMENT)
            second = gradient.square().mean(dim=-1, keepdim=True).lerp(second, SECOND_MOMENT)
            scale = (second / (1 - SECOND_MOMENT**step)).sqrt().clamp(min=torch.finfo(second.dtype).tiny)
            moved = actions - self.lr * first / (1 - FIRST_MOMENT**step) / scale
            actions = project_(moved, config.action_set)
        best, best_costs = cheaper(best, best_costs, actions, costs_of(cost, actions))
        return plan._replace(mean=best), best, best_costs


def cheaper(best: Tensor, best_costs: Tensor, actions: Tensor, costs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cheapest of the best sequence so far and of the starts.

    best [E, horizon, A] and best_costs [E], actions [E, N, horizon, A] and costs [E, N].
    """
    least, start = costs.min(dim=1)
    found = actions[torch.arange(len(actions), device=actions.device), start]
    is_less = least < best_costs
    return torch.where(is_less[:, None, None], found, best), torch.where(is_less, least, best_costs)
