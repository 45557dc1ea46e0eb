"""Sample-efficient CEM (iCEM, Pinneri et al., arXiv 2008.06389).

Legend: E episodes, L elites, A action dimensions.
"""

import torch
from torch import Tensor

from worldmodel.config import PlanningConfig
from worldmodel.planning.planners import Cost, Plan, costs_of, draw_candidates
from worldmodel.planning.planners.cem import cheapest, refitted

KEPT_SHARE = 0.3  # of the elites, as in the paper


class Icem:
    """CEM with noise that is coloured over time, with a power that falls as f^-noise_beta.

    A share of the elites is reused in the next iteration and, shifted, in the next decision. The mean is a candidate of
    the last iteration. The plan is the cheapest candidate. The number of candidates does not decay.
    """

    def __init__(self, elites: int, noise_beta: float) -> None:
        self.num_elites, self.noise_beta = elites, noise_beta

    @torch.no_grad()
    def improve(
        self, config: PlanningConfig, plan: Plan, cost: Cost, generator: torch.Generator
    ) -> tuple[Plan, Tensor, Tensor]:
        """Make one decision (worldmodel.planning.planners.Planner). `cost` is called once per iteration."""
        mean, kept = plan
        std, colour = torch.full_like(mean, config.init_std), colouring(config.horizon, self.noise_beta)
        for iteration in range(config.iterations):
            candidates = draw_candidates(config, mean, std, generator, colour)
            candidates[:, : kept.shape[1]] = kept
            if iteration == config.iterations - 1:
                candidates[:, kept.shape[1]] = mean
            elites, costs = cheapest(candidates, costs_of(cost, candidates), self.num_elites)
            mean, std = refitted(mean, std, elites)
            kept = elites[:, : max(1, round(KEPT_SHARE * self.num_elites))]
        return Plan(mean, kept), elites[:, 0], costs[:, 0]


def colouring(horizon: int, beta: float) -> Tensor:
    """Return the symmetric matrix [horizon, horizon] that colours white noise to power f^-beta and variance 1 per step.

    It filters the discrete frequencies f (Timmer and Koenig 1995). The constant is treated as the lowest other
    frequency, 1 / horizon.
    """
    frequencies = torch.fft.rfftfreq(horizon).clamp(min=1 / horizon)
    matrix = torch.fft.irfft(torch.fft.rfft(torch.eye(horizon)) * frequencies ** (-beta / 2), n=horizon)
    return matrix / matrix[0].norm()
