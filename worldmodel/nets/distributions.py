"""Distributions of the latent variable r: their means, draws, log densities and divergences.

Draws depend on the ambient `global_batch` (worldmodel/nets/parallel.py): the random numbers of a clip go with its place
there.

Legend: B clips, R latent dimensions, K components.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel.nets.parallel import multinomial_rows, rand_rows, randn_rows


class Distribution(Protocol):
    """One distribution of r for each of B clips."""

    @property
    def mean(self) -> Tensor:
        """The means [B, R]."""
        ...

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw once per clip: [B, R]."""
        ...

    def log_density(self, r: Tensor) -> Tensor:
        """Return the log density of r [B, R] in nats: [B]."""
        ...


@dataclass(frozen=True)
class Gaussian:
    """Diagonal Gaussians: mean and scale, each float32 [..., R]."""

    mean: Tensor
    scale: Tensor

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw once, reparameterised: [..., R]. Depends on the ambient `global_batch`."""
        return self.mean + self.scale * randn_rows(self.mean, generator)

    def log_density(self, r: Tensor) -> Tensor:
        """Return the log density of r [..., R] in nats: [...]."""
        return self.log_densities(r).sum(dim=-1)

    def log_densities(self, r: Tensor) -> Tensor:
        """Return the log density of each coordinate of r [..., R] in nats: [..., R]."""
        standard = (r - self.mean) / self.scale
        return -(0.5 * standard.square() + self.scale.log() + 0.5 * math.log(2 * math.pi))


@dataclass(frozen=True)
class Mixture:
    """Mixtures of K diagonal Gaussians: normalised log_weights [B, K]; components with mean and scale [B, K, R]."""

    log_weights: Tensor
    components: Gaussian

    @property
    def mean(self) -> Tensor:
        """The means [B, R]."""
        return (self.log_weights.exp().unsqueeze(-1) * self.components.mean).sum(dim=1)

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw once: [B, R]. No gradient flows to the weights. Depends on the ambient `global_batch`."""
        return self.draw_and_choice(generator)[0]

    def draw_and_choice(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw as `draw` does, and return the log probability [B] of the chosen component with it."""
        chosen = _choose(self.log_weights, generator)
        mean, scale = _selected(chosen, (self.components.mean, self.components.scale))
        return Gaussian(mean, scale).draw(generator), self.log_weights.gather(1, chosen).squeeze(1)

    def log_density(self, r: Tensor) -> Tensor:
        """Return the log density of r [B, R] in nats: [B]."""
        return torch.logsumexp(self.log_weights + self.components.log_density(r.unsqueeze(1)), dim=1)


@dataclass(frozen=True)
class SpikeAndSlab:
    """Mixtures of K distributions in which each coordinate is zero with some probability and Gaussian otherwise.

    log_weights [B, K]; on_logits [B, K, R]; slab with mean and scale [B, K, R]. Components let coordinates be zero
    together.
    """

    log_weights: Tensor
    on_logits: Tensor
    slab: Gaussian

    @property
    def mean(self) -> Tensor:
        """The means [B, R]."""
        return (self.log_weights.exp().unsqueeze(-1) * self.on_logits.sigmoid() * self.slab.mean).sum(dim=1)

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw once: [B, R]. No gradient flows to weights and probabilities. Depends on the ambient `global_batch`."""
        return self.draw_and_choice(generator)[0]

    def draw_and_choice(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw as `draw` does, and return the log probability [B] of the component and of the zeros with it."""
        chosen = _choose(self.log_weights, generator)
        on_logits, mean, scale = _selected(chosen, (self.on_logits, self.slab.mean, self.slab.scale))
        is_on = bernoulli_mask(on_logits.detach(), generator)
        r = is_on * Gaussian(mean, scale).draw(generator)
        of_zeros = torch.where(is_on > 0, F.logsigmoid(on_logits), F.logsigmoid(-on_logits)).sum(dim=-1)
        return r, self.log_weights.gather(1, chosen).squeeze(1) + of_zeros

    def log_density(self, r: Tensor) -> Tensor:
        """Return the log density of r [B, R] in nats: [B]. Coordinates that are exactly zero have a log probability."""
        value = r.unsqueeze(1)
        on = F.logsigmoid(self.on_logits) + self.slab.log_densities(value)
        each = torch.where(value == 0, F.logsigmoid(-self.on_logits), on)
        return torch.logsumexp(self.log_weights + each.sum(dim=-1), dim=1)


@dataclass(frozen=True)
class Flow:
    """Distributions of a normalising flow: `transform` maps r [B, R] to standard normal noise."""

    transform: Any
    like: Tensor
    """[B, R], for shape, device and type."""

    @property
    def mean(self) -> Tensor:
        """The image of the noise's mean, [B, R]. A flow's mean has no closed form."""
        return self._from_noise(torch.zeros_like(self.like))

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw once, reparameterised: [B, R]. Depends on the ambient `global_batch`."""
        return self._from_noise(randn_rows(self.like, generator))

    def log_density(self, r: Tensor) -> Tensor:
        """Return the log density of r [B, R] in nats: [B]."""
        with torch.autocast(self.like.device.type, enabled=False):
            noise, log_determinant = self.transform.call_and_ladj(r.float())
        return Gaussian(torch.zeros_like(noise), torch.ones_like(noise)).log_density(noise) + log_determinant

    def _from_noise(self, noise: Tensor) -> Tensor:
        # The flow's networks run here, not in `FlowPrior.forward`. In bf16 its density would be nats off.
        with torch.autocast(self.like.device.type, enabled=False):
            return self.transform.inv(noise)


@dataclass(frozen=True)
class Certain:
    """Distributions that always draw their mean [B, R]."""

    mean: Tensor

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """Return the mean [B, R]. No random number is drawn."""
        return self.mean

    def log_density(self, r: Tensor) -> Tensor:
        """Return zeros [B]: the log probability of the mean."""
        return self.mean.new_zeros(len(r))


def draw_and_choice(distribution: Distribution, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draw r [B, R] once per clip, with the log probability [B] of what no gradient passes: components and zeros.

    It is 0 for distributions without either.
    """
    if isinstance(distribution, Mixture | SpikeAndSlab):
        return distribution.draw_and_choice(generator)
    r = distribution.draw(generator)
    return r, r.new_zeros(len(r))


def kl_divergence(posterior: Gaussian, prior: Distribution, r: Tensor) -> Tensor:
    """Return KL(q || p) in nats: [B].

    The closed form is used for a single Gaussian as prior, otherwise log q(r) - log p(r) at a draw r [B, R] of q.
    """
    if isinstance(prior, Gaussian):
        return gaussian_kl(posterior, prior)
    if isinstance(prior, Mixture) and prior.log_weights.shape[1] == 1:
        return gaussian_kl(posterior, Gaussian(prior.components.mean.squeeze(1), prior.components.scale.squeeze(1)))
    return posterior.log_density(r) - prior.log_density(r)


def gaussian_kl(q: Gaussian, p: Gaussian) -> Tensor:
    """Return KL(q || p) of diagonal Gaussians [..., R] in nats, in closed form, summed over coordinates: [...]."""
    ratio = (q.scale / p.scale).square()
    shift = ((q.mean - p.mean) / p.scale).square()
    return 0.5 * (ratio + shift - 1 - ratio.log()).sum(dim=-1)


def bernoulli_mask(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw 0 or 1 with probability sigmoid(logits), of the same shape; the gradient is that of a sigmoid.

    Straight-through (AdaSSL-S, arXiv 2602.02381): the mask is 1 if logits plus logistic noise are positive. In the
    backward pass it counts as sigmoid(logits + noise), of temperature 1. Depends on the ambient `global_batch`.
    """
    noisy = logits + torch.logit(rand_rows(logits, generator), eps=1e-6)
    soft = noisy.sigmoid()
    return (noisy > 0).to(soft) + (soft - soft.detach())


def _choose(log_weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw a component by its weight: its index [B, 1]. Depends on the ambient `global_batch`."""
    return multinomial_rows(log_weights.detach().exp(), generator)


def _selected(chosen: Tensor, values: Sequence[Tensor]) -> list[Tensor]:
    """Select the components with index chosen [B, 1] from each of values [B, K, R]: [B, R] each."""
    return [v.gather(1, chosen.unsqueeze(-1).expand(-1, -1, v.shape[-1])).squeeze(1) for v in values]
