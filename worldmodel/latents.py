"""The latent variable r: what the past does not decide.

Legend: B clips, D embedding dimensions, R latent dimensions, S samples.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.encoders import mlp


class GaussianLatent(nn.Module):
    """AdaSSL-V (arXiv 2602.02381): posterior q(r | f(x), f(x++)) and prior p(r | f(x)), learned diagonal Gaussians.

    Scales are softplus(.) + 1e-6. The posterior sees a segment that is not the target, so that r cannot copy it.
    """

    def __init__(self, embedding_dim: int, hidden_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.prior_net = mlp([embedding_dim, hidden_dim, 2 * latent_dim])
        self.posterior_net = mlp([2 * embedding_dim, hidden_dim, 2 * latent_dim])

    def prior(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context [B, D] -> mean, scale of p(r | f(x)), each float32 [B, R]."""
        return _mean_scale(self.prior_net(context))

    def posterior(self, context: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
        """context, later [B, D] -> mean, scale of q(r | f(x), f(x++)), each float32 [B, R]."""
        return _mean_scale(self.posterior_net(torch.cat([context, later], dim=-1)))


def draw_gaussian(mean: Tensor, scale: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One reparameterised draw, in the shape of `mean`."""
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return mean + scale * noise


def gaussian_kl(mean_q: Tensor, scale_q: Tensor, mean_p: Tensor, scale_p: Tensor) -> Tensor:
    """KL(q || p) of diagonal Gaussians in nats, summed over coordinates: four [B, R] -> [B]. Closed form."""
    ratio = (scale_q / scale_p).square()
    shift = ((mean_q - mean_p) / scale_p).square()
    return 0.5 * (ratio + shift - 1 - ratio.log()).sum(dim=-1)


def _mean_scale(output: Tensor) -> tuple[Tensor, Tensor]:
    mean, raw = output.float().chunk(2, dim=-1)
    return mean, F.softplus(raw) + 1e-6
