"""The latent variable r: what the past does not decide.

How r is inferred in training (Gaussian, sparse, oracle) and the priors p(r | f(x)) that it is drawn from afterwards.
A model without a latent has none of these.

Legend: B clips, D embedding dimensions, R latent dimensions, K components of a prior.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from data_pipelines.errors import UserError
from worldmodel.config import External, GaussianConfig, LatentConfig, NoLatentConfig, SparseConfig
from worldmodel.nets.encoders import mlp
from worldmodel.training.distributed import multinomial_rows, rand_rows, randn_rows

# ------------------------------------------------------------------------------------------------- distributions


class Distribution(Protocol):
    """One distribution of r for each of B clips."""

    @property
    def mean(self) -> Tensor:
        """[B, R]"""
        ...

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw for each clip: [B, R]."""
        ...

    def log_density(self, r: Tensor) -> Tensor:
        """r [B, R] -> [B] in nats."""
        ...


class Gaussian(NamedTuple):
    """Diagonal Gaussians: mean and scale, each float32 [..., R]."""

    mean: Tensor
    scale: Tensor

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """One reparameterised draw [..., R]."""
        return self.mean + self.scale * randn_rows(self.mean, generator)

    def log_density(self, r: Tensor) -> Tensor:
        """r [..., R] -> log density [...] in nats."""
        return self.log_densities(r).sum(dim=-1)

    def log_densities(self, r: Tensor) -> Tensor:
        """r [..., R] -> log density of each coordinate, [..., R] in nats."""
        standard = (r - self.mean) / self.scale
        return -(0.5 * standard.square() + self.scale.log() + 0.5 * math.log(2 * math.pi))


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
        return Gaussian(*_choose(self.log_weights, self.components, generator)).draw(generator)

    def log_density(self, r: Tensor) -> Tensor:
        """r [B, R] -> log density [B] in nats."""
        return torch.logsumexp(self.log_weights + self.components.log_density(r.unsqueeze(1)), dim=1)


class SpikeAndSlab(NamedTuple):
    """Mixtures of K distributions in which each coordinate is zero with some probability and Gaussian otherwise.

    log_weights [B, K]; on_logits, mean and scale [B, K, R]. Components let coordinates be zero together.
    """

    log_weights: Tensor
    on_logits: Tensor
    slab: Gaussian

    @property
    def mean(self) -> Tensor:
        """[B, R]"""
        return (self.log_weights.exp().unsqueeze(-1) * self.on_logits.sigmoid() * self.slab.mean).sum(dim=1)

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw [B, R]."""
        on_logits, mean, scale = _choose(self.log_weights, (self.on_logits, *self.slab), generator)
        return bernoulli_mask(on_logits, generator) * Gaussian(mean, scale).draw(generator)

    def log_density(self, r: Tensor) -> Tensor:
        """r [B, R] -> [B] in nats: log probability where a coordinate is exactly zero, log density elsewhere."""
        value = r.unsqueeze(1)
        on = F.logsigmoid(self.on_logits) + self.slab.log_densities(value)
        each = torch.where(value == 0, F.logsigmoid(-self.on_logits), on)
        return torch.logsumexp(self.log_weights + each.sum(dim=-1), dim=1)


@dataclass(frozen=True)
class Flow:
    """A normalising flow's distributions: `transform` takes r [B, R] to standard normal noise."""

    transform: Any
    like: Tensor
    """[B, R], for shape, device and type."""

    @property
    def mean(self) -> Tensor:
        """[B, R]: where the noise's mean goes. A flow has no mean in closed form."""
        return self._from_noise(torch.zeros_like(self.like))

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """One reparameterised draw [B, R]."""
        return self._from_noise(randn_rows(self.like, generator))

    def log_density(self, r: Tensor) -> Tensor:
        """r [B, R] -> log density [B] in nats."""
        with torch.autocast(self.like.device.type, enabled=False):
            noise, log_determinant = self.transform.call_and_ladj(r.float())
        return Gaussian(torch.zeros_like(noise), torch.ones_like(noise)).log_density(noise) + log_determinant

    def _from_noise(self, noise: Tensor) -> Tensor:
        # The flow's networks run here, not where it was made; in bf16 its density would be nats off.
        with torch.autocast(self.like.device.type, enabled=False):
            return self.transform.inv(noise)


# -------------------------------------------------------------------------------------------------------- priors


class MixturePrior(nn.Module):
    """p(r | f(x)) as a mixture of K diagonal Gaussians; with one it is AdaSSL's prior (arXiv 2602.02381)."""

    def __init__(self, embedding_dim: int, hidden_dim: int, latent_dim: int, num_components: int) -> None:
        super().__init__()
        self.num_components = num_components
        self.num_weights = num_components if num_components > 1 else 0
        self.net = mlp([embedding_dim, hidden_dim, self.num_weights + 2 * latent_dim * num_components])

    def forward(self, context: Tensor) -> Mixture:
        """context [B, D] -> p(r | f(x))."""
        log_weights, rest = _split_weights(self.net(context).float(), self.num_weights)
        return Mixture(log_weights, _gaussian(rearrange(rest, "b (k r) -> b k r", k=self.num_components)))


class SpikeAndSlabPrior(nn.Module):
    """p(r | f(x)) for an r with zeros in it, as a mixture of K spike-and-slab distributions."""

    def __init__(self, embedding_dim: int, hidden_dim: int, latent_dim: int, num_components: int) -> None:
        super().__init__()
        self.num_components = num_components
        self.num_weights = num_components if num_components > 1 else 0
        self.net = mlp([embedding_dim, hidden_dim, self.num_weights + 3 * latent_dim * num_components])

    def forward(self, context: Tensor) -> SpikeAndSlab:
        """context [B, D] -> p(r | f(x))."""
        log_weights, rest = _split_weights(self.net(context).float(), self.num_weights)
        on_logits, mean, raw = rearrange(rest, "b (k r) -> b k r", k=self.num_components).chunk(3, dim=-1)
        # r is a function of the two segments: without a floor, a slab could shrink on one clip's value.
        return SpikeAndSlab(log_weights, on_logits, Gaussian(mean, F.softplus(raw) + 1e-2))


class FlowPrior(nn.Module):
    """p(r | f(x)) as a conditional neural spline flow of coupling layers (Durkan et al., arXiv 1906.04032), by zuko.

    Raises:
        UserError: zuko is not installed.
    """

    NUM_TRANSFORMS = 3
    NUM_BINS = 8

    def __init__(self, embedding_dim: int, hidden_dim: int, latent_dim: int) -> None:
        super().__init__()
        try:
            import zuko
        except ImportError as error:
            raise UserError("model.latent.prior=flow needs the package zuko: pip install 'worldmodel[flow]'") from error
        self.latent_dim = latent_dim
        self.flow = zuko.flows.NSF(
            features=latent_dim,
            context=embedding_dim,
            bins=self.NUM_BINS,
            transforms=self.NUM_TRANSFORMS,
            passes=min(2, latent_dim),
            hidden_features=[hidden_dim // 4] * 2,
        )

    def forward(self, context: Tensor) -> Flow:
        """context [B, D] -> p(r | f(x))."""
        return Flow(
            self.flow(context.float()).transform, context.new_zeros(len(context), self.latent_dim, dtype=torch.float32)
        )


# ------------------------------------------------------------------------------------------------------- latents


class Inference(NamedTuple):
    """r [B, R] as the editor gets it in training, and what it costs, each [B] or None.

    penalty is the regulariser that beta weighs. nll, in nats, trains a prior that takes no other part in training: it
    carries gradient to that prior alone.
    """

    r: Tensor
    penalty: Tensor | None
    nll: Tensor | None


class GaussianLatent(nn.Module):
    """AdaSSL-V (arXiv 2602.02381): r ~ q(r | f(x), f(x++)), a learned diagonal Gaussian; the penalty is KL(q || p).

    Scales are softplus(.) + 1e-6, r is one reparameterised draw. The posterior sees a segment that is not the target,
    so that r cannot copy it.
    """

    penalty_name = "kl_nats"
    sees_later = True

    def __init__(
        self,
        context_dim: int,
        embedding_dim: int,
        hidden_dim: int,
        latent_dim: int,
        prior: MixturePrior | FlowPrior,
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.prior = prior
        self.posterior_net = mlp([context_dim + embedding_dim, hidden_dim, 2 * latent_dim])

    def posterior(self, context: Tensor, later: Tensor) -> Gaussian:
        """context, later [B, D] -> q(r | f(x), f(x++))."""
        return _gaussian(self.posterior_net(torch.cat([context, later], dim=-1)).float())

    def infer(
        self, context: Tensor, later: Tensor | None, known: Tensor | None, generator: torch.Generator | None = None
    ) -> Inference:
        """context, later [B, D] -> a draw of the posterior, its KL from the prior in nats."""
        assert later is not None
        posterior = self.posterior(context, later)
        r = posterior.draw(generator)
        return Inference(r, kl_divergence(posterior, self.prior(context), r), None)


class SparseLatent(nn.Module):
    """AdaSSL-S (arXiv 2602.02381): r = m(f(x), f(x++)) times a Bernoulli mask; the penalty is the expected L0 of r.

    The method has no prior: this one is fitted to r beside the training, by maximum likelihood and with no gradient
    into anything else, so that r can be drawn at every checkpoint.
    """

    penalty_name = "expected_l0"
    sees_later = True

    def __init__(
        self, context_dim: int, embedding_dim: int, hidden_dim: int, latent_dim: int, prior: SpikeAndSlabPrior
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.prior = prior
        self.net = mlp([context_dim + embedding_dim, hidden_dim, 2 * latent_dim])

    def infer(
        self, context: Tensor, later: Tensor | None, known: Tensor | None, generator: torch.Generator | None = None
    ) -> Inference:
        """context, later [B, D] -> masked content, the expected number of coordinates that are not zero."""
        assert later is not None
        content, logits = self.net(torch.cat([context, later], dim=-1)).float().chunk(2, dim=-1)
        r = content * bernoulli_mask(logits, generator)
        return Inference(r, logits.sigmoid().sum(dim=-1), _fit(self.prior, context, r))


class OracleLatent(nn.Module):
    """The true r from the labels ("GT" in AdaSSL, arXiv 2602.02381): an upper reference. Its prior is fitted beside."""

    penalty_name = None
    sees_later = False

    def __init__(self, latent_dim: int, prior: SpikeAndSlabPrior) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.prior = prior

    def infer(
        self, context: Tensor, later: Tensor | None, known: Tensor | None, generator: torch.Generator | None = None
    ) -> Inference:
        """context [B, D], known [B, R] -> known."""
        assert known is not None
        return Inference(known, None, _fit(self.prior, context, known))


Latent = GaussianLatent | SparseLatent | OracleLatent


def make_latent(config: LatentConfig, *, context_dim: int, embedding_dim: int, hidden_dim: int) -> Latent | None:
    """Build the latent of a config; None for "none".

    Args:
        context_dim: the size of the prior's input: an embedding, and a scene code and an action if there are any.

    Raises:
        UserError: the prior needs a package that is not installed.
    """
    if isinstance(config, NoLatentConfig):
        return None
    assert not isinstance(config, External), "the caller loads code from outside"
    if isinstance(config, GaussianConfig):
        smooth = (
            FlowPrior(context_dim, hidden_dim, config.dim)
            if config.prior == "flow"
            else MixturePrior(context_dim, hidden_dim, config.dim, config.prior_components)
        )
        return GaussianLatent(context_dim, embedding_dim, hidden_dim, config.dim, smooth)
    # A sparse r is sometimes exactly zero. So is a true r, for an axis that does not change.
    spiked = SpikeAndSlabPrior(context_dim, hidden_dim, config.dim, config.prior_components)
    if isinstance(config, SparseConfig):
        return SparseLatent(context_dim, embedding_dim, hidden_dim, config.dim, spiked)
    return OracleLatent(config.dim, spiked)


# ------------------------------------------------------------------------------------------------- pure functions


def kl_divergence(posterior: Gaussian, prior: Distribution, r: Tensor) -> Tensor:
    """KL(q || p) in nats: [B]. Closed form for one Gaussian, otherwise log q(r) - log p(r) at a draw r [B, R] of q."""
    if isinstance(prior, Mixture) and prior.log_weights.shape[1] == 1:
        return gaussian_kl(posterior, Gaussian(*(values.squeeze(1) for values in prior.components)))
    return posterior.log_density(r) - prior.log_density(r)


def gaussian_kl(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p) of diagonal Gaussians in nats, summed over coordinates, in closed form: [..., R] each -> [...]."""
    ratio = (q.scale / p.scale).square()
    shift = ((q.mean - p.mean) / p.scale).square()
    return 0.5 * (ratio + shift - 1 - ratio.log()).sum(dim=-1)


def bernoulli_mask(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """0 or 1 with probability sigmoid(logits), same shape; the gradient is that of a sigmoid at temperature 1.

    Straight-through (AdaSSL-S, arXiv 2602.02381): the mask is 1 where logits plus logistic noise are positive;
    backward, it counts as sigmoid(logits + noise).
    """
    noisy = logits + torch.logit(rand_rows(logits, generator), eps=1e-6)
    soft = noisy.sigmoid()
    return (noisy > 0).to(soft) + (soft - soft.detach())


def _fit(prior: nn.Module, context: Tensor, r: Tensor) -> Tensor:
    """Negative log likelihood [B] in nats, with gradient to the prior alone."""
    return -prior(context.detach()).log_density(r.detach())


def _choose(log_weights: Tensor, values: Any, generator: torch.Generator | None) -> list[Tensor]:
    """Draw a component [B] by its weight and take each of values [B, K, R] there: [B, R] each."""
    chosen = multinomial_rows(log_weights.detach().exp(), generator)
    return [v.gather(1, chosen.unsqueeze(-1).expand(-1, -1, v.shape[-1])).squeeze(1) for v in values]


def _split_weights(output: Tensor, num_weights: int) -> tuple[Tensor, Tensor]:
    """The first columns as normalised log weights, 0 for a single component; and the others."""
    weights, rest = output[:, :num_weights], output[:, num_weights:]
    if not num_weights:
        weights = rest.new_zeros(len(rest), 1)
    return weights.log_softmax(dim=-1), rest


def _gaussian(output: Tensor) -> Gaussian:
    mean, raw = output.chunk(2, dim=-1)
    return Gaussian(mean, F.softplus(raw) + 1e-6)
