"""Planners over sequences of actions, for a batch of episodes at once: CEM, iCEM and MPPI.

All three draw candidates around a mean, compute their costs, move the mean towards cheap candidates, and repeat:

- cem: the cross-entropy method (Rubinstein 1999; de Boer et al. 2005, with smoothed updating). Mean and standard
  deviation become those of the elites, the cheapest candidates. The plan is the mean.
- icem: sample-efficient CEM (Pinneri et al., arXiv 2008.06389). Noise is coloured over time, with a power that falls
  as f^-beta. A share of the elites is reused in the next iteration and, shifted, in the next decision. The mean is a
  candidate of the last iteration. The plan is the cheapest candidate. The number of candidates does not decay.
- mppi: model predictive path integral control (Williams et al., arXiv 1509.01149, 1707.02342). The mean becomes that
  of all candidates under softmax weights of their costs; the standard deviation is constant. The plan is the mean. The
  cost function alone decides whether actions themselves have a cost.

    decide = make_planner(config.planner).improve
    plan = start(config, num_episodes, action_dim, device)
    while acting:
        plan, actions, costs = decide(config, plan, cost, generator)
        ...  # take actions[:, 0]
        plan = shift(plan)

Actions lie in the unit ball or in the box [-1, 1]^A; candidates outside are moved to the nearest point. All episodes
use the same random numbers, so that the plan of one does not depend on the others in its batch.

Legend: E episodes, N candidates, L elites, A action dimensions. Steps of the horizon are written out as `horizon`.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from worldmodel import outside
from worldmodel.config import External, IcemConfig, MppiConfig, PlannerConfig, PlanningConfig

Cost = Callable[[Tensor], Tensor]
"""A function from actions [E, N, horizon, A] to finite costs [E, N]; lower is better."""

KEPT_SHARE = 0.3  # of iCEM's elites, as in its paper
MOMENTUM = 0.1  # of mean and standard deviation from one iteration of CEM and iCEM to the next, as in iCEM's paper


class Plan(NamedTuple):
    """The state between decisions: mean [E, horizon, A], and the elites [E, L, horizon, A] of iCEM, best first.

    It has no standard deviation: every decision starts with that of the config.
    """

    mean: Tensor
    elites: Tensor


class Planner(Protocol):
    """A search over sequences of actions, for a batch of episodes at once.

    To add one to the project, write its class in a file of this folder, its keys as a dataclass in
    worldmodel/config/sections.py, and a line in `make_planner`. A class from outside is built as Class(**options).
    """

    def improve(
        self, config: PlanningConfig, plan: Plan, cost: Cost, generator: torch.Generator
    ) -> tuple[Plan, Tensor, Tensor]:
        """Make one decision, from the plan of the last decision, shifted by a step.

        Args:
            cost: is called with any number of candidates, [E, N, horizon, A] in the set of allowed actions.
            generator: on the CPU.

        Returns: the plan, the chosen actions [E, horizon, A] and their costs [E].
        """


def make_planner(config: PlannerConfig) -> Planner:
    """Return the planner of a config.

    Raises:
        UserError: a class from outside cannot be loaded.
    """
    if isinstance(config, External):
        planner: Planner = outside.make("planning.planner.name", config.name, config.options, Planner)
        return planner
    return Sampling()


def start(config: PlanningConfig, num_episodes: int, action_dim: int, device: torch.device) -> Plan:
    """Return an initial plan: actions of zero, no elites."""
    shape = (config.horizon, action_dim)
    return Plan(torch.zeros(num_episodes, *shape, device=device), torch.zeros(num_episodes, 0, *shape, device=device))


def shift(plan: Plan) -> Plan:
    """Return the plan one step later: without its first action, with an action of zero at the end."""
    return Plan(*(torch.cat([part[..., 1:, :], torch.zeros_like(part[..., :1, :])], dim=-2) for part in plan))


@torch.no_grad()
def improve(config: PlanningConfig, plan: Plan, cost: Cost, generator: torch.Generator) -> tuple[Plan, Tensor, Tensor]:
    """Make one decision, with `iterations` times `candidates` sequences for each episode.

    `cost` is called once per iteration, and by cem and mppi once more for the answer alone. `generator` is on the CPU
    for any device of the plan, so that a seed has the same effect everywhere.

    Returns: the plan, the chosen actions [E, horizon, A] and their costs [E].
    """
    mean, kept = plan
    std = torch.full_like(mean, config.init_std)
    planner = config.planner
    assert not isinstance(planner, External), "make_planner returns another planner"
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


class Sampling:
    """CEM, iCEM or MPPI, as the config says."""

    improve = staticmethod(improve)


def draw_noise(config: PlanningConfig, action_dim: int, generator: torch.Generator) -> Tensor:
    """Draw normal noise [N, horizon, A], white in time, or for iCEM with a power that falls as f^-noise_beta."""
    noise = torch.randn(config.candidates, action_dim, config.horizon, generator=generator)
    if isinstance(config.planner, IcemConfig):
        noise = noise @ colouring(config.horizon, config.planner.noise_beta)
    return noise.mT.contiguous()


def colouring(horizon: int, beta: float) -> Tensor:
    """Return the symmetric matrix [horizon, horizon] that colours white noise to power f^-beta and variance 1 per step.

    It filters the discrete frequencies f (Timmer and Koenig 1995). The constant is treated as the lowest other
    frequency, 1 / horizon.
    """
    frequencies = torch.fft.rfftfreq(horizon).clamp(min=1 / horizon)
    matrix = torch.fft.irfft(torch.fft.rfft(torch.eye(horizon)) * frequencies ** (-beta / 2), n=horizon)
    return matrix / matrix[0].norm()


def path_integral_weights(costs: Tensor, temperature: float) -> Tensor:
    """Return MPPI's weights for costs [E, N], softmax of -cost / (temperature * scale), with sum 1 per episode.

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
