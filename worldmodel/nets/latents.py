"""The latent variable r, which captures what the past does not determine.

A latent infers r in training (Gaussian, sparse, oracle) and has a prior p(r | f(x)), from which r is drawn afterwards.
`NoLatent` stands in for a model without a latent: its r has no dimensions.

Legend: B clips, D context dimensions, R latent dimensions, K components of a prior.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from data_pipelines.errors import UserError
from worldmodel.nets.distributions import (
    Certain,
    Distribution,
    Flow,
    Gaussian,
    Mixture,
    SpikeAndSlab,
    bernoulli_mask,
    kl_divergence,
)
from worldmodel.nets.encoders import mlp

PRIOR_NLL = "prior_nll_nats"

# -------------------------------------------------------------------------------------------------------- priors


class MixturePrior(nn.Module):
    """p(r | f(x)) as a mixture of K diagonal Gaussians. K = 1 is AdaSSL's prior (arXiv 2602.02381)."""

    def __init__(self, embedding_dim: int, hidden_dim: int, latent_dim: int, num_components: int) -> None:
        super().__init__()
        self.num_components = num_components
        self.num_weights = num_components if num_components > 1 else 0
        self.net = mlp([embedding_dim, hidden_dim, self.num_weights + 2 * latent_dim * num_components])

    def forward(self, context: Tensor) -> Mixture:
        """Return p(r | f(x)) for context [B, D]."""
        log_weights, rest = _split_weights(self.net(context).float(), self.num_weights)
        return Mixture(log_weights, _gaussian(rearrange(rest, "b (k r) -> b k r", k=self.num_components)))


class LinearPrior(nn.Module):
    """p(r | f(x)) = N(A x + b + m(x), diag s(x)^2), with log-linear scales and a small MLP m, s that starts at zero.

    x is the context, standardised by `centre` and `spread`, which are 0 and 1 until `start` sets them.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, context_dim: int, hidden_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.register_buffer("centre", torch.zeros(context_dim))
        self.register_buffer("spread", torch.ones(context_dim))
        self.linear = nn.Linear(context_dim, 2 * latent_dim)
        self.hidden = nn.Linear(context_dim, hidden_dim)
        self.out = nn.Linear(hidden_dim, 2 * latent_dim, bias=False)
        for weight in (self.linear.weight, self.linear.bias, self.out.weight):
            nn.init.zeros_(weight)

    def forward(self, context: Tensor) -> Gaussian:
        """Return p(r | f(x)) for context [B, D]."""
        x = (context - self.centre) / self.spread
        return _gaussian((self.linear(x) + self.out(F.gelu(self.hidden(x)))).float())

    @torch.no_grad()
    def start(self, centre: Tensor, spread: Tensor, weight: Tensor, bias: Tensor, scale: float) -> None:
        """Become N(weight x + bias, scale^2), where x is the context standardised by centre and spread [D].

        weight [R, D]; bias [R].
        """
        self.centre.copy_(centre)
        self.spread.copy_(spread)
        self.linear.weight.zero_()[: self.latent_dim] = weight
        raw = math.log(math.expm1(scale))  # softplus of which is scale
        self.linear.bias.copy_(torch.cat([bias, torch.full_like(bias, raw)]))
        self.out.weight.zero_()


class SpikeAndSlabPrior(nn.Module):
    """p(r | f(x)) for an r with exact zeros, as a mixture of K spike-and-slab distributions."""

    def __init__(self, embedding_dim: int, hidden_dim: int, latent_dim: int, num_components: int) -> None:
        super().__init__()
        self.num_components = num_components
        self.num_weights = num_components if num_components > 1 else 0
        self.net = mlp([embedding_dim, hidden_dim, self.num_weights + 3 * latent_dim * num_components])

    def forward(self, context: Tensor) -> SpikeAndSlab:
        """Return p(r | f(x)) for context [B, D]."""
        log_weights, rest = _split_weights(self.net(context).float(), self.num_weights)
        on_logits, mean, raw = rearrange(rest, "b (k r) -> b k r", k=self.num_components).chunk(3, dim=-1)
        # r is a function of the two segments. Without a floor, a slab could shrink to the value of one clip.
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
            hidden_features=[max(1, hidden_dim // 4)] * 2,
        )

    def forward(self, context: Tensor) -> Flow:
        """Return p(r | f(x)) for context [B, D]."""
        return Flow(
            self.flow(context.float()).transform,
            context.new_zeros(context.shape[0], self.latent_dim, dtype=torch.float32),
        )


# ------------------------------------------------------------------------------------------------------- latents


@dataclass(frozen=True)
class Inference:
    """r [B, R] as the editor gets it in training, and its costs [B] by name.

    The cost PRIOR_NLL, in nats, fits a prior that training uses in no other way; its gradient reaches that prior alone.
    Any other cost is the penalty, which beta weights.
    """

    r: Tensor
    costs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def penalty(self) -> Tensor | None:
        """The penalty [B], or None if the latent has none."""
        return next((cost for name, cost in self.costs.items() if name != PRIOR_NLL), None)


class NoLatent(nn.Module):
    """The latent of a model without one: r [B, 0] at no cost."""

    latent_dim = 0
    penalty_name = None
    sees_later = False

    def prior(self, context: Tensor) -> Certain:
        """Return the only distribution of an r [B, 0], for context [B, D]."""
        return Certain(context[:, :0])

    def infer(
        self, context: Tensor, later: Tensor, known: Tensor, generator: torch.Generator | None = None
    ) -> Inference:
        """Return r [B, 0] for context [B, D]; `later` and `known` are ignored."""
        return Inference(context[:, :0])


class GaussianLatent(nn.Module):
    """AdaSSL-V (arXiv 2602.02381): r ~ q(r | f(x), f(x++)), a learned diagonal Gaussian, with the penalty KL(q || p).

    Scales are softplus(.) + 1e-6, and r is one reparameterised draw. The posterior sees a segment that is not the
    target, so that r cannot copy the target.
    """

    penalty_name = "kl_nats"
    sees_later = True

    def __init__(
        self,
        context_dim: int,
        embedding_dim: int,
        hidden_dim: int,
        dim: int,
        prior: Literal["mixture", "flow", "linear"] = "mixture",
        prior_components: int = 1,
    ) -> None:
        super().__init__()
        self.latent_dim = dim
        self.prior: nn.Module
        if prior == "flow":
            self.prior = FlowPrior(context_dim, hidden_dim, dim)
        elif prior == "linear":
            self.prior = LinearPrior(context_dim, hidden_dim, dim)
        else:
            self.prior = MixturePrior(context_dim, hidden_dim, dim, prior_components)
        self.posterior_net = mlp([context_dim + embedding_dim, hidden_dim, 2 * dim])

    def posterior(self, context: Tensor, later: Tensor) -> Gaussian:
        """Return q(r | f(x), f(x++)) for context and later [B, D]."""
        return _gaussian(self.posterior_net(torch.cat([context, later], dim=-1)).float())

    def infer(
        self, context: Tensor, later: Tensor, known: Tensor, generator: torch.Generator | None = None
    ) -> Inference:
        """Draw r from the posterior for context and later [B, D], at its KL from the prior. `known` is ignored."""
        posterior = self.posterior(context, later)
        r = posterior.draw(generator)
        return Inference(r, {self.penalty_name: kl_divergence(posterior, self.prior(context), r)})


class SparseLatent(nn.Module):
    """AdaSSL-S (arXiv 2602.02381): r = m(f(x), f(x++)) times a Bernoulli mask, with the expected L0 of r as penalty.

    The method has no prior. This one is fitted to r alongside training, by maximum likelihood and without gradient to
    other networks, so that r can be drawn at every checkpoint.
    """

    penalty_name = "expected_l0"
    sees_later = True

    def __init__(
        self, context_dim: int, embedding_dim: int, hidden_dim: int, dim: int, prior_components: int = 1
    ) -> None:
        super().__init__()
        self.latent_dim = dim
        self.prior = SpikeAndSlabPrior(context_dim, hidden_dim, dim, prior_components)
        self.net = mlp([context_dim + embedding_dim, hidden_dim, 2 * dim])

    def infer(
        self, context: Tensor, later: Tensor, known: Tensor, generator: torch.Generator | None = None
    ) -> Inference:
        """Return masked content for context and later [B, D], at its expected number of nonzero coordinates.

        `known` is ignored.
        """
        content, logits = self.net(torch.cat([context, later], dim=-1)).float().chunk(2, dim=-1)
        r = content * bernoulli_mask(logits, generator)
        expected_l0 = logits.sigmoid().sum(dim=-1)
        return Inference(
            r, {self.penalty_name: expected_l0, PRIOR_NLL: _negative_log_likelihood(self.prior, context, r)}
        )


class OracleLatent(nn.Module):
    """The true r from the labels ("GT" in AdaSSL, arXiv 2602.02381): an upper reference.

    Its prior is fitted alongside training, as that of `SparseLatent`: a true r is exactly zero, too, for an axis that
    does not change.
    """

    penalty_name = None
    sees_later = False

    def __init__(self, context_dim: int, hidden_dim: int, dim: int, prior_components: int = 1) -> None:
        super().__init__()
        self.latent_dim = dim
        self.prior = SpikeAndSlabPrior(context_dim, hidden_dim, dim, prior_components)

    def infer(
        self, context: Tensor, later: Tensor, known: Tensor, generator: torch.Generator | None = None
    ) -> Inference:
        """Return known [B, R] as r for context [B, D]; `later` is ignored."""
        assert known.shape[1] == self.latent_dim, "the labels are checked for this"
        return Inference(known, {PRIOR_NLL: _negative_log_likelihood(self.prior, context, known)})


class Latent(Protocol):
    """A latent variable r: an nn.Module with these members.

    To add one to the project, write its class in a file of this folder, and its entry in `LatentConfig`
    (worldmodel/config/model.py). Classes are offered context_dim=D, embedding_dim=E and hidden_dim
    (worldmodel/parts.py). D is an embedding's size E, plus those of the scene code, the summary of the history and the
    action of a model with these.

    latent_dim: R.
    """

    latent_dim: int

    @property
    def penalty_name(self) -> str | None:
        """Name of the cost in `infer` that beta weights, such as "kl_nats"; None if there is none."""

    @property
    def sees_later(self) -> bool:
        """True if `infer` sees the embedding of a segment after the context.

        A class from outside sees x++ if clips have three segments, otherwise the target.
        """

    def prior(self, context: Tensor) -> Distribution:
        """Return p(r | f(x)) for context [B, D]; futures draw from it, or take its mean."""

    def infer(
        self, context: Tensor, later: Tensor, known: Tensor, generator: torch.Generator | None = None
    ) -> Inference:
        """Infer r [B, R] in training, with its costs.

        Args:
            context: [B, D].
            later: [B, E], the embedding of a later segment; [B, 0] without `sees_later`.
            known: [B, R], the true r of the oracle latent; [B, 0] for other latents.
        """


def _negative_log_likelihood(prior: nn.Module, context: Tensor, r: Tensor) -> Tensor:
    """Return -log p(r | f(x)) in nats, [B], with gradient to the prior alone."""
    return -prior(context.detach()).log_density(r.detach())


def _split_weights(output: Tensor, num_weights: int) -> tuple[Tensor, Tensor]:
    """Split off the first columns as normalised log weights; they are 0 for a single component."""
    weights, rest = output[:, :num_weights], output[:, num_weights:]
    if not num_weights:
        weights = rest.new_zeros(rest.shape[0], 1)
    return weights.log_softmax(dim=-1), rest


def _gaussian(output: Tensor) -> Gaussian:
    mean, raw = output.chunk(2, dim=-1)
    return Gaussian(mean, F.softplus(raw) + 1e-6)
