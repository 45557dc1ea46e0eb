"""Measures of several futures of a plan, from the mean of their costs to the probability of reaching the goal.

Legend: E episodes, I candidates, S futures.
"""

import torch
from torch import Tensor

from worldmodel.config import CvarRiskConfig, QuantileRiskConfig, ReachRiskConfig, RiskConfig


def reduced(risk: RiskConfig, costs: Tensor, nearest: Tensor) -> Tensor:
    """Return the cost of each candidate, [E, I], from those of its futures.

    Args:
        costs: [E, I, S], not negative.
        nearest: [E, I, S], the smallest distance of each future from the goal. Only `reach` uses it.
    """
    if isinstance(risk, QuantileRiskConfig):
        return costs.quantile(risk.level, dim=-1)
    if isinstance(risk, CvarRiskConfig):
        return mean_of_worst(costs, 1 - risk.level)
    if isinstance(risk, ReachRiskConfig):
        # The mean cost is mapped to [0, 1), so that it never outweighs a single future that reaches the goal.
        mean = costs.mean(dim=-1)
        return mean / (1 + mean) / costs.shape[-1] - (nearest <= risk.within).float().mean(dim=-1)
    return costs.mean(dim=-1)


def mean_of_worst(costs: Tensor, share: float) -> Tensor:
    """Return the mean of the highest `share` of costs [..., S], [...]. It is the highest cost if the share is smaller.

    A cost at the border counts with the part of it that is in the share, so that the mean is continuous in the share.
    """
    count = costs.shape[-1]
    worst = costs.sort(dim=-1, descending=True).values
    above = torch.arange(count, device=costs.device, dtype=costs.dtype)
    weights = (max(1.0, share * count) - above).clamp(0, 1)
    return (worst * weights).sum(dim=-1) / weights.sum()
