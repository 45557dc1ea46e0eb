"""The scene code: what the encoder's features of one segment tell beside the embedding.

An embedding that is trained by prediction lets two things go that the features before the projector still tell:

- What never changes within a clip, such as what an object looks like, need not be predicted. It is read along the
  directions in which clips differ most for how much each changes within itself (Fisher's linear discriminant with clips
  as classes; no label is read), by a small network, and kept over a rollout. From all features a code learns clips by
  heart.
- What the next step alone depends on, such as the exact velocity, is told less exactly by what is also a target. It is
  read from all features, and forgotten after one step.

Legend: N clips of L segments, B of them, F features, K directions, Z numbers of a code, S of its kept part.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.config import Norm
from worldmodel.nets.encoders import mlp

MAX_DIRECTIONS = 64
RIDGE = 1e-3  # of the mean variance of a feature within clips
CLIPS_AT_ONCE = 256


class SceneCode(nn.Module):
    """The code of one segment: scene_dim numbers for the next step alone, as many that are kept, and the code's age.

    The age is n / (n + 1) where it was read n steps ago. The code is learned in refinement alone, and before it all
    zeros: the embedding would leave to it what it should hold itself.
    """

    learned: Tensor
    mean: Tensor
    spread: Tensor
    directions: Tensor
    correlation: Tensor

    def __init__(self, num_features: int, hidden_dim: int, scene_dim: int, norm: Norm) -> None:
        super().__init__()
        self.scene_dim, self.num_values = scene_dim, 2 * scene_dim + 1
        num_directions = min(MAX_DIRECTIONS, num_features)
        self.register_buffer("learned", torch.tensor(0.0))
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("spread", torch.ones(num_features))
        self.register_buffer("directions", torch.zeros(num_features, num_directions))
        self.register_buffer("correlation", torch.zeros(num_directions))
        self.passing_net = mlp([num_features, hidden_dim, scene_dim], norm=norm)
        self.kept_net = mlp([num_directions, hidden_dim, scene_dim], norm=norm)
        self.requires_grad_(False)

    def learn(self, features: Tensor) -> None:
        """Choose the directions by the features [N, L, F] of successive segments, L of at least 2. From here on the
        code is read, and its networks have gradients."""
        mean, directions, ratio = discriminant(features, len(self.correlation))
        self.mean.copy_(mean)
        self.spread.copy_(features.float().std(dim=(0, 1)).clamp(min=1e-6))
        self.directions.copy_(directions)
        kept = self.kept(features)
        scale = kept.square().mean(dim=(0, 1)).sqrt().clamp(min=1e-6)
        kept = kept / scale
        correlation = (kept[:, 1:] * kept[:, :-1]).mean(dim=(0, 1)).clamp(0, 0.999)
        self.directions.div_(scale)
        self.correlation.copy_(torch.where(ratio > 1, correlation, 0))
        self.requires_grad_(True)
        self.learned.fill_(1)

    def kept(self, features: Tensor) -> Tensor:
        """features [..., F] -> along the directions, with unit variance over clips: float32 [..., K]."""
        with torch.autocast(features.device.type, enabled=False):
            return (features.float() - self.mean) @ self.directions

    def forward(self, features: Tensor, age: Tensor | None = None) -> Tensor:
        """features [B, F], age [B] in steps, 0 without it -> the code, float32 [B, Z]."""
        passing = self.passing_net((features.float() - self.mean) / self.spread).float()
        kept = self.kept_net(self.kept(features)).float()
        steps = kept.new_zeros(len(kept)) if age is None else age.to(kept)
        return self.learned * torch.cat([passing * (steps == 0)[:, None], kept, (steps / (steps + 1))[:, None]], dim=1)

    def aged(self, code: Tensor) -> Tensor:
        """code [B, Z], one step later."""
        passing, kept, age = code.split([self.scene_dim, self.scene_dim, 1], dim=1)
        return torch.cat([torch.zeros_like(passing), kept, self.learned / (2 - age)], dim=1)

    def lasting(self, code: Tensor) -> Tensor:
        """code [..., Z] -> the part of it that is kept, [..., S]."""
        return code[..., self.scene_dim : 2 * self.scene_dim]

    def lasting_of(self, features: Tensor) -> Tensor:
        """features [..., F] -> the part of their code that is kept, without the rest of it: float32 [..., S]."""
        kept = self.kept_net(self.kept(features.flatten(0, -2))).float()  # batch norm takes rows
        return self.learned * kept.unflatten(0, features.shape[:-1])

    def change_nats(self, before: Tensor, after: Tensor) -> Tensor:
        """How surprising it is that two successive segments are of one clip, [B, K] each, as `kept` returned them: [B].

        -log P(one clip), where pairs of one clip and of two are equally frequent. Along each direction segments of one
        clip are two standard normals of that correlation, those of two clips independent ones (probabilistic linear
        discriminant analysis, Ioffe 2006). Directions in which clips differ less than they change do not count.
        """
        rho = self.correlation
        unlike = (rho * before - after).square() / (1 - rho.square()) - after.square() + torch.log1p(-rho.square())
        return F.softplus(0.5 * unlike.sum(dim=-1))


def discriminant(features: Tensor, num_directions: int) -> tuple[Tensor, Tensor, Tensor]:
    """The directions in which clips differ most for how much they change within, from features [N, L, F].

    Returns: the mean [F], the directions [F, K], and for each the variance between clips over that within [K], falling.
    """
    num_clips, length, num_features = features.shape
    centres = features.float().mean(dim=1)
    mean = centres.mean(dim=0)
    within = features.new_zeros(num_features, num_features, dtype=torch.float32)
    for part, centre in zip(features.split(CLIPS_AT_ONCE), centres.split(CLIPS_AT_ONCE), strict=True):
        rest = (part.float() - centre[:, None]).flatten(0, 1)
        within += rest.T @ rest
    within /= num_clips * (length - 1)
    between = (centres - mean).T @ (centres - mean) / num_clips - within / length
    ridge = RIDGE * within.diagonal().mean() + 1e-12
    values, vectors = torch.linalg.eigh(within + ridge * torch.eye(num_features, device=within.device))
    whiten = vectors * values.rsqrt()
    ratio, rotation = torch.linalg.eigh(whiten.T @ between @ whiten)
    chosen = slice(-num_directions, None)
    return mean, (whiten @ rotation[:, chosen]).flip(1), ratio[chosen].flip(0)
