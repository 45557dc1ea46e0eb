"""The reference of benchmarks/train_step.py: AdaSSL-V's training step as a reader of the paper would write it.

Plain eager PyTorch in fp32, without code of worldmodel and without optimisations: tensors in the default layout, AdamW
with its default arguments, a loop over parameters for the moving average. Nothing slows it down either. It computes the
same losses as worldmodel with configs/paper.yaml from the same weights, batches and random numbers, up to rounding. One
choice follows worldmodel: x and x++ pass the encoder in one call, so that batch norm takes its statistics over both.

AdaSSL: arXiv 2602.02381, appendix D.5. Legend: B clips, T frames of a segment, C channels, H = W pixels, D embedding
dimensions, R latent dimensions.
"""

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedder(nn.Module):
    """Five convolutions over space and time, the mean over pixels, and a projector onto a sphere."""

    def __init__(self, in_channels: int, num_frames: int, width: float, hidden_dim: int, embedding_dim: int) -> None:
        super().__init__()
        c1, c2, c3, c4, c5 = (max(1, round(channels * width)) for channels in (32, 64, 128, 128, 256))
        self.encoder = nn.Sequential(
            nn.Conv3d(in_channels, c1, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), bias=False),
            nn.BatchNorm3d(c1),
            nn.ReLU(inplace=True),
            nn.Conv3d(c1, c2, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), bias=False),
            nn.BatchNorm3d(c2),
            nn.ReLU(inplace=True),
            nn.Conv3d(c2, c3, (3, 1, 1), padding=(1, 0, 0), bias=False),
            nn.BatchNorm3d(c3),
            nn.ReLU(inplace=True),
            nn.Conv3d(c3, c4, (3, 1, 1), padding=(1, 0, 0), bias=False),
            nn.BatchNorm3d(c4),
            nn.ReLU(inplace=True),
            nn.Conv3d(c4, c5, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), bias=False),
            nn.BatchNorm3d(c5),
            nn.ReLU(inplace=True),
        )
        self.projector = nn.Sequential(
            nn.Linear(c5 * num_frames, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim),
        )

    def forward(self, video: Tensor) -> Tensor:
        """Embed video [B, T, C, H, W] in [0, 1]: [B, D] of length sqrt(D)."""
        maps = self.encoder(video.transpose(1, 2).contiguous())
        return on_sphere(self.projector(maps.mean(dim=(3, 4)).flatten(1)))


class AdaSslV(nn.Module):
    """Encoder, prior, posterior and predictor."""

    def __init__(
        self, in_channels: int, num_frames: int, width: float, hidden_dim: int, embedding_dim: int, latent_dim: int
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.embedder = Embedder(in_channels, num_frames, width, hidden_dim, embedding_dim)
        self.prior = gaussian_net(embedding_dim, hidden_dim, latent_dim)
        self.posterior = gaussian_net(2 * embedding_dim, hidden_dim, latent_dim)
        self.predictor = nn.Sequential(
            nn.Linear(embedding_dim + latent_dim, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, embedding_dim),
        )

    def forward(self, x: Tensor, later: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return the predicted embedding of x+ [B, D] and KL(q || p) [B] in nats, from x, x++ [B, T, C, H, W]."""
        context, seen = self.embedder(torch.cat([x, later])).chunk(2)
        prior_mean, prior_raw = self.prior(context).chunk(2, dim=-1)
        mean, raw = self.posterior(torch.cat([context, seen], dim=-1)).chunk(2, dim=-1)
        prior_scale, scale = F.softplus(prior_raw) + 1e-6, F.softplus(raw) + 1e-6
        noise = torch.randn(len(x), self.latent_dim, generator=generator, device=x.device)
        r = mean + scale * noise
        predicted = on_sphere(self.predictor(torch.cat([context, r], dim=-1)))
        log_ratio = torch.log(prior_scale) - torch.log(scale)
        squares = (scale**2 + (mean - prior_mean) ** 2) / (2 * prior_scale**2)
        return predicted, (log_ratio + squares - 0.5).sum(dim=-1)


class PlainStep:
    """A model, its EMA teacher, and AdamW on a cosine to zero: `step` is one update."""

    def __init__(
        self, model: AdaSslV, *, beta: float, ema_momentum: float, lr: float, weight_decay: float, num_steps: int
    ) -> None:
        self.model = model
        self.teacher = copy.deepcopy(model.embedder).requires_grad_(False)
        self.beta = beta
        self.ema_momentum = ema_momentum
        matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=num_steps)

    def step(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Make one update and return the loss before it. video: [B, 3 * T, C, H, W] in [0, 1], of x, x+, x++."""
        x, target, later = video.chunk(3, dim=1)
        with torch.no_grad():
            wanted = self.teacher(target)
        predicted, kl = self.model(x, later, generator)
        loss = -F.cosine_similarity(predicted, wanted, dim=-1).mean() + self.beta * kl.mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            for own, followed in zip(self.teacher.parameters(), self.model.embedder.parameters(), strict=True):
                own.mul_(self.ema_momentum).add_(followed, alpha=1 - self.ema_momentum)
        return loss.detach()


def gaussian_net(in_dim: int, hidden_dim: int, latent_dim: int) -> nn.Sequential:
    """Make a network from [B, in_dim] to the mean and raw scale of a diagonal Gaussian, [B, 2 * R]."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim, bias=False),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, 2 * latent_dim),
    )


def on_sphere(values: Tensor) -> Tensor:
    """Scale vectors [B, D] to length sqrt(D)."""
    return F.normalize(values, dim=-1) * values.shape[-1] ** 0.5


NAMES_IN_WORLDMODEL = {
    "embedder.encoder.": "embedder.encoder.layers.",
    "embedder.projector.": "embedder.projector.",
    "prior.": "latent.prior.net.",
    "posterior.": "latent.posterior_net.",
    "predictor.": "editor.net.",
}
"""How the weights of each part begin here and there."""


def from_worldmodel(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state dict of a worldmodel.nets.world_model.WorldModel to that of an AdaSslV."""
    return {
        here + name.removeprefix(there): values
        for here, there in NAMES_IN_WORLDMODEL.items()
        for name, values in weights.items()
        if name.startswith(there)
    }
