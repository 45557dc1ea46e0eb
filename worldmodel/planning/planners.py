"""Planners over sequences of actions, for a batch of episodes at once: CEM, iCEM and MPPI.

All three draw candidates around a mean, ask what they cost, move the mean towards the cheap ones, and begin again:

- cem: the cross-entropy method (Rubinstein 1999; de Boer et al. 2005, with smoothed updating). Mean and standard
  deviation become those of the elites, the cheapest candidates. The plan is the mean.
- icem: sample-efficient CEM (Pinneri et al., arXiv 2008.06389). Noise is coloured, its power falling as f^-beta over
  the frequencies of time; a share of the elites stays among the candidates, in the next iteration and, shifted, in the
  next decision; the mean is a candidate of the last iteration. The plan is the cheapest candidate. The number of
  candidates does not decay.
- mppi: model predictive path integral control (Williams et al., arXiv 1509.01149, 1707.02342). The mean becomes that
  of all candidates under softmax weights of their costs; the standard deviation stays. The plan is the mean. What
  actions themselves cost is a matter of the cost, and no term of its own.

    plan = start(config, num_episodes, action_dim, device)
    while acting:
        plan, actions, costs = improve(config, plan, cost, generator)
        ...  # take actions[:, 0]
        plan = shift(plan)

Actions lie in the unit ball or in the box [-1, 1]^A; candidates outside are moved to its nearest point. All episodes
take the same random numbers: what is planned for one does not depend on which others are planned with it.

Legend: E episodes, N candidates, K elites, H steps of the horizon, A action dimensions.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from worldmodel.config import External, IcemConfig, MppiConfig, PlanningConfig

Cost = Callable[[Tensor], Tensor]
"""Actions [E, N, H, A], of any N, -> finite cost [E, N]; lower is better."""

KEPT_SHARE = 0.3  # of iCEM's elites, as in its paper
MOMENTUM = 0.1  # of mean and standard deviation from one iteration of CEM and iCEM to the next, as in iCEM's paper


class Plan(NamedTuple):
    """What one decision hands to the next: mean [E, H, A], and elites [E, K, H, A] that iCEM keeps, the best first.

    The standard deviation is no part of it: every decision begins at that of the config.
    """

    mean: Tensor
    elites: Tensor


def start(config: PlanningConfig, num_episodes: int, action_dim: int, device: torch.device) -> Plan:
    """A plan that knows nothing: actions of zero, no elites."""
    shape = (config.horizon, action_dim)
    return Plan(torch.zeros(num_episodes, *shape, device=device), torch.zeros(num_episodes, 0, *shape, device=device))


def shift(plan: Plan) -> Plan:
    """The plan one step later: without its first action, with an action of zero at the end."""
    return Plan(*(torch.cat([part[..., 1:, :], torch.zeros_like(part[..., :1, :])], dim=-2) for part in plan))


@torch.no_grad()
def improve(config: PlanningConfig, plan: Plan, cost: Cost, generator: torch.Generator) -> tuple[Plan, Tensor, Tensor]:
    """One decision: `iterations` times `candidates` sequences for each episode -> plan, actions [E, H, A], costs [E].

    The actions are the planner's answer and the costs theirs. `cost` is called once an iteration, and by cem and mppi
    once more for the answer alone. `generator` is of the CPU, whatever the device of the plan: a seed then means the
    same everywhere.
    """
    mean, kept = plan
    std = torch.full_like(mean, config.init_std)
    planner = config.planner
    assert not isinstance(planner, External), "the caller loads code from outside"
    for iteration in range(config.iterations):
        noise = draw_noise(config, mean.shape[-1], generator).to(mean)
        candidates = project_(torch.addcmul(mean[:, None], std[:, None], noise), config.action_set)
        if isinstance(planner, IcemConfig):
            candidates[:, : kept.shape[1]] = kept
            if iteration == config.iterations - 1:
                candidates[:, kept.shape[1]] = mean
        costs = _evaluate(cost, candidates)
        if isinstance(planner, MppiConfig):
            weights = path_integral_weights(costs, planner.temperature)
            mean = (weights[:, None] @ candidates.flatten(2)).unflatten(-1, mean.shape[1:]).squeeze(1)
            continue
        elite_costs, order = costs.topk(planner.elites, largest=False)
        elites = candidates[torch.arange(len(order), device=order.device)[:, None], order]
        elite_mean = elites.mean(dim=1)
        elite_std = (elites - elite_mean[:, None]).square_().mean(dim=1).sqrt_()  # torch.std takes ten times as long
        mean, std = elite_mean.lerp(mean, MOMENTUM), elite_std.lerp(std, MOMENTUM)
        if isinstance(planner, IcemConfig):
            kept = elites[:, : max(1, round(KEPT_SHARE * planner.elites))]
    if isinstance(planner, IcemConfig):
        return Plan(mean, kept), elites[:, 0], elite_costs[:, 0]
    return Plan(mean, kept), mean, _evaluate(cost, mean[:, None]).squeeze(1)


def draw_noise(config: PlanningConfig, action_dim: int, generator: torch.Generator) -> Tensor:
    """Standard normal numbers [N, H, A], white in time, or for iCEM of a power that falls as f^-noise_beta."""
    noise = torch.randn(config.candidates, action_dim, config.horizon, generator=generator)
    if isinstance(config.planner, IcemConfig):
        noise = noise @ colouring(config.horizon, config.planner.noise_beta)
    return noise.mT.contiguous()


def colouring(horizon: int, beta: float) -> Tensor:
    """The symmetric matrix [H, H] that makes white noise coloured: of power f^-beta, and of variance 1 at each step.

    A filter over the discrete frequencies f (Timmer and Koenig 1995), in which the constant counts as the lowest of the
    others, 1 / H.
    """
    frequencies = torch.fft.rfftfreq(horizon).clamp(min=1 / horizon)
    matrix = torch.fft.irfft(torch.fft.rfft(torch.eye(horizon)) * frequencies ** (-beta / 2), n=horizon)
    return matrix / matrix[0].norm()


def path_integral_weights(costs: Tensor, temperature: float) -> Tensor:
    """MPPI's weights of costs [E, N], for each episode of sum 1: softmax of -cost / (temperature * scale).

    The scale is the standard deviation of the episode's costs, so that weights do not depend on the unit of costs.
    """
    scale = costs.std(dim=1, keepdim=True, correction=0).clamp(min=torch.finfo(costs.dtype).tiny)
    return ((costs.amin(dim=1, keepdim=True) - costs) / scale / temperature).softmax(dim=1)


def project_(actions: Tensor, action_set: Literal["ball", "box"]) -> Tensor:
    """Move actions [..., A] in place to the nearest point of the unit ball or of the box [-1, 1]^A."""
    if action_set == "box":
        return actions.clamp_(-1, 1)
    return actions.div_(torch.linalg.vector_norm(actions, dim=-1, keepdim=True).clamp_(min=1))


def _evaluate(cost: Cost, candidates: Tensor) -> Tensor:
    costs = cost(candidates)
    assert costs.shape == candidates.shape[:2], f"costs {tuple(costs.shape)} of actions {tuple(candidates.shape)}"
    assert costs.isfinite().all(), "the cost of some actions is not finite"
    return costs
