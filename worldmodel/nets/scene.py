"""The scene code: what the encoder's features of one segment hold beyond the embedding.

An embedding that is trained by prediction drops two things that the features before the projector still hold:

- Constants of a clip, such as an object's appearance, need not be predicted. The persistent part of the code reads them
  along the directions in which clips differ most relative to their change within a clip (Fisher's linear discriminant
  with clips as classes; no label is read). Given all features, the code would memorise individual clips.
- Variables that matter for the next step alone, such as the exact velocity, are less precise in an embedding that is
  also a target. The transient part reads them from all features and is dropped after one step.

Legend: N clips of L segments, B of them, F features, Q directions, Z numbers of a code, P of its persistent part.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.config import Norm
from worldmodel.nets.encoders import mlp

MAX_DIRECTIONS = 64
RIDGE = 1e-3  # relative to the mean variance of a feature within clips
CLIPS_AT_ONCE = 256


class NoScene(nn.Module):
    """The scene code of a model without one: a code of no numbers."""

    scene_dim = num_values = 0

    def select(self, features: Tensor) -> Tensor:
        """Return the part of features [..., F] that a code is read from: [..., 0]."""
        return features.new_empty(*features.shape[:-1], 0)

    def learn(self, features: Tensor) -> None:
        """Do nothing: there is no code to learn."""

    def project(self, features: Tensor) -> Tensor:
        """Return no coordinates for features [..., F]: [..., 0]."""
        return features[..., :0]

    def forward(self, features: Tensor, age: Tensor) -> Tensor:
        """Return an empty code for features [B, F]: float32 [B, 0]."""
        return features.new_zeros(features.shape[0], 0, dtype=torch.float32)

    def advance(self, code: Tensor) -> Tensor:
        """Return code [B, 0] unchanged."""
        return code

    def persistent(self, code: Tensor) -> Tensor:
        """Return code [..., 0] unchanged."""
        return code

    def persistent_from(self, features: Tensor) -> Tensor:
        """Return no numbers for features [..., F]: float32 [..., 0]."""
        return features[..., :0].float()

    def change_nats(self, before: Tensor, after: Tensor) -> Tensor:
        """Return zeros [B]: without a code, no change is surprising."""
        return before.new_zeros(len(before))


class SceneCode(nn.Module):
    """The code of one segment: scene_dim transient numbers, scene_dim persistent numbers, and the code's age.

    The age is n / (n + 1) for a code that was read n steps ago. The code is learned in refinement alone and is zero
    before it. Otherwise the embedding would leave to the code what it should hold itself.
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
        # Named as in existing checkpoints: "passing" is the transient part, "kept" the persistent one.
        self.passing_net = mlp([num_features, hidden_dim, scene_dim], norm=norm)
        self.kept_net = mlp([num_directions, hidden_dim, scene_dim], norm=norm)
        self.requires_grad_(False)

    def select(self, features: Tensor) -> Tensor:
        """Return the part of features [..., F] that a code is read from: all of them."""
        return features

    def learn(self, features: Tensor) -> None:
        """Choose the directions by the features [N, L, F] of successive segments, L >= 2, and switch the code on.

        From then on the code is not zero and its networks have gradients.
        """
        mean, directions, ratio = discriminant(features, len(self.correlation))
        self.mean.copy_(mean)
        self.spread.copy_(features.float().std(dim=(0, 1)).clamp(min=1e-6))
        self.directions.copy_(directions)
        projected = self.project(features)
        scale = projected.square().mean(dim=(0, 1)).sqrt().clamp(min=1e-6)
        projected = projected / scale
        correlation = (projected[:, 1:] * projected[:, :-1]).mean(dim=(0, 1)).clamp(0, 0.999)
        self.directions.div_(scale)
        self.correlation.copy_(torch.where(ratio > 1, correlation, 0))
        self.requires_grad_(True)
        self.learned.fill_(1)

    def project(self, features: Tensor) -> Tensor:
        """Project features [..., F] onto the directions, with unit variance over clips: float32 [..., Q]."""
        with torch.autocast(features.device.type, enabled=False):
            return (features.float() - self.mean) @ self.directions

    def forward(self, features: Tensor, age: Tensor) -> Tensor:
        """Read the code from features [B, F] of a segment that is age [B] steps old: float32 [B, Z]."""
        transient = self.passing_net((features.float() - self.mean) / self.spread).float()
        persistent = self.kept_net(self.project(features)).float()
        steps = age.to(persistent)
        parts = [transient * (steps == 0)[:, None], persistent, (steps / (steps + 1))[:, None]]
        return self.learned * torch.cat(parts, dim=1)

    def advance(self, code: Tensor) -> Tensor:
        """Advance code [B, Z] by one step: the transient part is dropped and the age grows."""
        transient, persistent, age = code.split([self.scene_dim, self.scene_dim, 1], dim=1)
        return torch.cat([torch.zeros_like(transient), persistent, self.learned / (2 - age)], dim=1)

    def persistent(self, code: Tensor) -> Tensor:
        """Return the persistent part of code [..., Z]: [..., P]."""
        return code[..., self.scene_dim : 2 * self.scene_dim]

    def persistent_from(self, features: Tensor) -> Tensor:
        """Read only the persistent part of the code from features [..., F]: float32 [..., P]."""
        read = self.kept_net(self.project(features.flatten(0, -2))).float()  # batch norm takes rows
        return self.learned * read.unflatten(0, features.shape[:-1])

    def change_nats(self, before: Tensor, after: Tensor) -> Tensor:
        """Return how surprising it is that two successive segments are of one clip: [B], in nats.

        `before` and `after` [B, Q] come from `project`. The result is -log P(one clip), where pairs of one clip and of
        two are equally frequent. Along each direction, segments of one clip are two standard normals with the measured
        correlation, and those of two clips are independent (probabilistic linear discriminant analysis, Ioffe 2006).
        Directions in which clips differ less than they change do not count.
        """
        rho = self.correlation
        unlike = (rho * before - after).square() / (1 - rho.square()) - after.square() + torch.log1p(-rho.square())
        return F.softplus(0.5 * unlike.sum(dim=-1))


Scene = NoScene | SceneCode


def discriminant(features: Tensor, num_directions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the directions in which clips differ most relative to their change within a clip.

    Args:
        features: [N, L, F].

    Returns: the mean [F], the directions [F, Q], and their ratios of the variance between clips to that within them
    [Q], in falling order.
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
