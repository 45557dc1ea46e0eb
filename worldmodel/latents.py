"""The latent variable r: what the past does not decide.

Legend: B clips, D embedding dimensions, R latent dimensions, K components of the prior.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from worldmodel.encoders import mlp


class Gaussian(NamedTuple):
    """Diagonal Gaussians: mean and scale, each float32 [..., R]."""

    mean: Tensor
    scale: Tensor

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """One reparameterised draw [..., R]."""
        return self.mean + self.scale * _noise_like(self.mean, generator)

    def log_density(self, r: Tensor) -> Tensor:
        """r [..., R] -> log density [...] in nats."""
        standard = (r - self.mean) / self.scale
        return -(0.5 * standard.square() + self.scale.log() + 0.5 * math.log(2 * math.pi)).sum(dim=-1)


class Mixture(NamedTuple):
    """Mixtures of K diagonal Gaussians: log_weights [B, K] (normalised), components of mean and scale [B, K, R]."""

    log_weights: Tensor
    components: Gaussian

    @property
    def mean(self) -> Tensor:
        """[B, R]"""
        return (self.log_weights.exp().unsqueeze(-1) * self.components.mean).sum(dim=1)

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw [B, R]; no gradient flows to the weights."""
        chosen = torch.multinomial(self.log_weights.detach().exp(), 1, generator=generator)
        index = chosen.unsqueeze(-1).expand(-1, -1, self.components.mean.shape[-1])
        mean, scale = (values.gather(1, index).squeeze(1) for values in self.components)
        return Gaussian(mean, scale).draw(generator)

    def log_density(self, r: Tensor) -> Tensor:
        """r [B, R] -> log density [B] in nats."""
        return torch.logsumexp(self.log_weights + self.components.log_density(r.unsqueeze(1)), dim=1)


class GaussianLatent(nn.Module):
    """AdaSSL-V (arXiv 2602.02381): posterior q(r | f(x), f(x++)), a learned diagonal Gaussian, and prior p(r | f(x)).

    The prior is a mixture of `num_components` diagonal Gaussians; the paper has one. Scales are softplus(.) + 1e-6.
    The posterior sees a segment that is not the target, so that r cannot copy it.
    """

    def __init__(self, embedding_dim: int, hidden_dim: int, latent_dim: int, num_components: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.num_components = num_components
        self.num_weights = num_components if num_components > 1 else 0
        self.prior_net = mlp([embedding_dim, hidden_dim, self.num_weights + 2 * latent_dim * num_components])
        self.posterior_net = mlp([2 * embedding_dim, hidden_dim, 2 * latent_dim])

    def prior(self, context: Tensor) -> Mixture:
        """context [B, D] -> p(r | f(x))."""
        output = self.prior_net(context).float()
        weights, rest = output[:, : self.num_weights], output[:, self.num_weights :]
        if not self.num_weights:
            weights = rest.new_zeros(len(rest), 1)
        components = _gaussian(rearrange(rest, "b (k r) -> b k r", k=self.num_components))
        return Mixture(weights.log_softmax(dim=-1), components)

    def posterior(self, context: Tensor, later: Tensor) -> Gaussian:
        """context, later [B, D] -> q(r | f(x), f(x++))."""
        return _gaussian(self.posterior_net(torch.cat([context, later], dim=-1)).float())


def kl_divergence(posterior: Gaussian, prior: Mixture, r: Tensor) -> Tensor:
    """KL(q || p) in nats: [B]. Closed form for one component, otherwise log q(r) - log p(r) at a draw r [B, R] of q."""
    if prior.log_weights.shape[1] == 1:
        return gaussian_kl(posterior, Gaussian(*(values.squeeze(1) for values in prior.components)))
    return posterior.log_density(r) - prior.log_density(r)


def gaussian_kl(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p) of diagonal Gaussians in nats, summed over coordinates, in closed form: [..., R] each -> [...]."""
    ratio = (q.scale / p.scale).square()
    shift = ((q.mean - p.mean) / p.scale).square()
    return 0.5 * (ratio + shift - 1 - ratio.log()).sum(dim=-1)


def _gaussian(output: Tensor) -> Gaussian:
    mean, raw = output.chunk(2, dim=-1)
    return Gaussian(mean, F.softplus(raw) + 1e-6)


def _noise_like(tensor: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=tensor.dtype)
