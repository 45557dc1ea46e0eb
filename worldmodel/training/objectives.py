"""Objectives: they bring the edited embedding t(f(x), r) near to that of the target x+ and prevent collapse.

Every objective takes three embeddings, float32 [B, D], and returns scalars by name. "prediction_loss" is the one to
minimise; the others are its parts or are logged alongside.

    edited   t(f(x), r), the prediction
    target   the embedding of x+: the teacher's, without gradient, or the shared encoder's, with gradient
    context  f(x) of the shared encoder

Legend: B clips (of the global batch), D embedding dimensions, I rows, J columns, Q random directions.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.nets.encoders import mlp

MAX_LOGIT = 20.0


class Objective(nn.Module, ABC):
    """A loss between embeddings, and its requirements on the model and the trainer.

    To add one to the project, write its class in a file of this folder, and its entry in `ObjectiveConfig`
    (worldmodel/config/objective.py). Classes are offered embedding_dim=D and hidden_dim (worldmodel/parts.py).
    """

    needs_teacher: ClassVar[bool] = False
    """The target comes from an EMA teacher. Otherwise it comes from the encoder itself, with gradient."""
    needs_negatives: ClassVar[bool] = False
    """The loss contrasts clips within a batch, so it is not the mean of its micro-batch losses."""
    needs_batch_statistics: ClassVar[bool] = False
    """The loss depends on the distribution of a batch, so it is not the mean of its micro-batch losses."""
    needs_predictor: ClassVar[bool] = False
    """Collapse is prevented by an asymmetry between the two sides: the editor must end in an MLP."""
    needs_sphere: ClassVar[bool] = False
    """Of a class from outside: embeddings are compared by direction only, so `model.embedding_norm` must be sphere.
    For the objectives of the project, the config has this fact."""
    default_beta: ClassVar[float] = 0.001
    """Weight of the latent's penalty. It suits the slope of the loss in the squared error of an embedding."""

    @abstractmethod
    def forward(
        self, edited: Tensor, target: Tensor, context: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return {"prediction_loss": scalar, ...} for edited, target and context [B, D]."""

    @abstractmethod
    def prediction_error(self, edited: Tensor, target: Tensor, context: Tensor) -> Tensor:
        """Return the prediction error of each clip, [B], for embeddings [B, D]; 0 if prediction and target agree.

        It is in the loss's units and has its weight in the loss. Batch-level terms are excluded: the error of a clip
        does not depend on the others.
        """


# --------------------------------------------------------------------------------------------------- distillation


class Byol(Objective):
    """Negative cosine to an EMA teacher (Grill et al., arXiv 2006.07733, eq. 2, up to scale and shift)."""

    needs_teacher = True
    needs_predictor = True

    def forward(
        self, edited: Tensor, target: Tensor, context: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return "prediction_loss" in [-1, 1] for edited and target [B, D]."""
        return {"prediction_loss": -F.cosine_similarity(edited, target, dim=-1).mean()}

    def prediction_error(self, edited: Tensor, target: Tensor, context: Tensor) -> Tensor:
        """Return 1 - cosine, from 0 to 2: [B]."""
        return 1 - F.cosine_similarity(edited, target, dim=-1)


class Jepa(Objective):
    """Half the mean squared error to an EMA teacher's embedding, whose dimensions have variance 1 over a batch.

    Joint-embedding prediction by squared error (I-JEPA, Assran et al., arXiv 2301.08243, section 3), with targets
    standardised as in data2vec (Baevski et al., arXiv 2202.03555, section 3.3). On the sphere it is 1 - cosine, BYOL's
    loss. Off the sphere, the embedding is not distorted by a length that differs between clips.
    """

    needs_teacher = True
    needs_predictor = True

    def forward(
        self, edited: Tensor, target: Tensor, context: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return "prediction_loss" >= 0 for edited and target [B, D]."""
        return {"prediction_loss": F.mse_loss(edited, target) / 2}

    def prediction_error(self, edited: Tensor, target: Tensor, context: Tensor) -> Tensor:
        """Return half the mean squared difference: [B]."""
        return (edited - target).square().mean(dim=-1) / 2


class Ressl(Objective):
    """Relational consistency (Zheng et al., arXiv 2107.09282).

    The prediction's similarities to the other targets of the batch follow the teacher's, by cross-entropy. The
    teacher's distribution is sharper, with a temperature of 0.07 against 0.1; at the paper's 0.04, the few most similar
    targets alone count, which places a prediction less precisely (docs/experiments.md). The batch replaces the paper's
    memory of past targets.
    """

    STUDENT_TEMPERATURE = 0.1
    TEACHER_TEMPERATURE = 0.07

    needs_teacher = True
    needs_negatives = True
    default_beta = 0.01

    def forward(
        self, edited: Tensor, target: Tensor, context: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return "prediction_loss" >= 0 for edited and target [B, D]."""
        edited, target = F.normalize(edited, dim=-1), F.normalize(target, dim=-1)
        student = _without_diagonal(edited @ target.T) / self.STUDENT_TEMPERATURE
        teacher = _without_diagonal(target @ target.T) / self.TEACHER_TEMPERATURE
        return {"prediction_loss": F.cross_entropy(student, teacher.softmax(dim=-1))}

    def prediction_error(self, edited: Tensor, target: Tensor, context: Tensor) -> Tensor:
        """Return 1 - cosine, [B], as a substitute: this loss never compares a clip with its own target."""
        return 1 - F.cosine_similarity(edited, target, dim=-1)


class SslHsic(Objective):
    """Kernel dependence on the clip's identity (Li et al., arXiv 2106.08320): -HSIC(Z, Y) + gamma sqrt(HSIC(Z, Z)).

    Z holds the predictions and the teacher's targets, Y the clip that each belongs to. Inverse multiquadric kernel on
    the unit sphere, gamma = 3. The kernel is computed exactly; the paper approximates it by random features.
    """

    GAMMA = 3.0

    needs_teacher = True
    needs_negatives = True
    needs_batch_statistics = True
    needs_predictor = True

    def forward(
        self, edited: Tensor, target: Tensor, context: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return "prediction_loss" and its parts "hsic_identity" and "hsic_self" for edited and target [B, D]."""
        both = F.normalize(torch.cat([edited, target]), dim=-1)
        kernel = inverse_multiquadric_kernel(both, both)
        num_clips = len(edited)
        # HSIC(Z, Y) for one-hot Y, times the number of clips: the kernel within a clip minus its overall mean.
        identity = kernel.diagonal(num_clips).mean() - kernel.mean()
        own = hsic(kernel, kernel)
        return {
            "prediction_loss": -identity + self.GAMMA * own.clamp(min=1e-12).sqrt(),
            "hsic_identity": identity.detach(),
            "hsic_self": own.detach(),
        }

    def prediction_error(self, edited: Tensor, target: Tensor, context: Tensor) -> Tensor:
        """Return 1 - kernel, [B], for the part of the loss that is the mean kernel within a clip."""
        difference = F.normalize(edited, dim=-1) - F.normalize(target, dim=-1)
        return 1 - (1 + difference.square().sum(dim=-1)).rsqrt()


def inverse_multiquadric_kernel(a: Tensor, b: Tensor) -> Tensor:
    """Return k(a, b) = 1 / sqrt(1 + |a - b|^2): [I, D], [J, D] -> [I, J]."""
    return (1 + squared_distances(a, b)).rsqrt()


def hsic(kernel: Tensor, other: Tensor) -> Tensor:
    """Return the biased estimate trace(K H L H) / (I - 1)^2 for kernel matrices [I, I] (Gretton et al. 2005, eq. 9)."""
    centred = kernel - kernel.mean(dim=0) - kernel.mean(dim=1, keepdim=True) + kernel.mean()
    return (centred * other.T).sum() / (len(kernel) - 1) ** 2


# ---------------------------------------------------------------------------------------------------- contrastive


class InfoNce(Objective):
    """NT-Xent in both directions with negatives from both views (Chen et al., arXiv 2002.05709, eq. 1).

    Logits are -w |a - b|^2 / (2 D temperature) + 1 / temperature. On the sphere of radius sqrt(D) that is the cosine
    over the temperature. Without normalisation it is a Gaussian's log density. The weight w = softplus(lambda) is
    learned and starts at 1 (AdaSSL, arXiv 2602.02381, appendix). Logits are clamped to +-20.

    "information_nats" is the lower bound on the information between prediction and target: log B minus the
    cross-entropy among the B targets of a batch (van den Oord et al., arXiv 1807.03748, section 2.3).
    """

    needs_negatives = True
    default_beta = 0.01

    def __init__(self, embedding_dim: int, hidden_dim: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.make_metric(embedding_dim, hidden_dim)

    def make_metric(self, embedding_dim: int, hidden_dim: int) -> None:
        """Create the parameters of `metric`."""
        self.raw_weight = nn.Parameter(torch.full((1,), SOFTPLUS_ONE))

    def metric(self, context: Tensor) -> Tensor:
        """Return the weights of the squared differences for context [B, D]: [1 or B, 1 or D]."""
        return F.softplus(self.raw_weight)[None]

    def forward(
        self, edited: Tensor, target: Tensor, context: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return "prediction_loss" in nats and "information_nats" for edited, target and context [B, D]."""
        metric = self.metric(context)
        # Each row uses the metric of its clip. In across.T, each column does.
        across = self.logits(edited, target, metric)
        within_edited = self.logits(edited, edited, metric)
        within_target = self.logits(target, target, metric)
        forward = torch.cat([across, _without_diagonal(within_edited)], dim=1)
        backward = torch.cat([across.T, _without_diagonal(within_target)], dim=1)
        positive = torch.arange(len(edited), device=edited.device)
        loss = (F.cross_entropy(forward, positive) + F.cross_entropy(backward, positive)) / 2
        information = math.log(len(edited)) - F.cross_entropy(across.detach(), positive)
        return {"prediction_loss": loss, "information_nats": information}

    def logits(self, rows: Tensor, columns: Tensor, metric: Tensor) -> Tensor:
        """Return the logits of rows [I, D] and columns [J, D] by metric [1 or I, 1 or D]: [I, J]."""
        distances = squared_distances(rows, columns, metric.expand(len(rows), rows.shape[1]))
        scale = 2 * rows.shape[1] * self.temperature
        return (1 / self.temperature - distances / scale).clamp(-MAX_LOGIT, MAX_LOGIT)

    def prediction_error(self, edited: Tensor, target: Tensor, context: Tensor) -> Tensor:
        """Return how far each pair's logit is below its largest value, in nats, before clamping: [B].

        That is the attraction. The repulsion, a log sum over the batch, is excluded.
        """
        distance = (self.metric(context) * (edited - target).square()).sum(dim=-1)
        return distance / (2 * edited.shape[1] * self.temperature)


class AnInfoNce(InfoNce):
    """InfoNCE with a learned constant diagonal metric (AnInfoNCE, Rusak et al., arXiv 2407.00143)."""

    def make_metric(self, embedding_dim: int, hidden_dim: int) -> None:
        self.raw_weight = nn.Parameter(torch.full((embedding_dim,), SOFTPLUS_ONE))


class HInfoNce(InfoNce):
    """InfoNCE with a diagonal metric predicted from the context (H-InfoNCE, a baseline of AdaSSL, arXiv 2602.02381)."""

    def make_metric(self, embedding_dim: int, hidden_dim: int) -> None:
        self.metric_net = mlp([embedding_dim, hidden_dim, embedding_dim])

    def metric(self, context: Tensor) -> Tensor:
        return F.softplus(self.metric_net(context) + SOFTPLUS_ONE)


SOFTPLUS_ONE = math.log(math.e - 1)
"""softplus(SOFTPLUS_ONE) = 1"""


def squared_distances(rows: Tensor, columns: Tensor, metric: Tensor | None = None) -> Tensor:
    """Return sum_d metric[i, d] (rows[i, d] - columns[j, d])^2: [I, D], [J, D], [I, D] or ones -> [I, J]."""
    weighted = rows if metric is None else rows * metric
    column_part = columns.square().sum(dim=-1) if metric is None else metric @ columns.square().T
    return ((weighted * rows).sum(dim=-1, keepdim=True) - 2 * weighted @ columns.T + column_part).clamp(min=0)


def _without_diagonal(square: Tensor) -> Tensor:
    """Drop the diagonal: [I, I] -> [I, I - 1]."""
    n = len(square)
    return square.flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)


# ------------------------------------------------------------------------------------------- regularised, no teacher


class Vicreg(Objective):
    """Variance, invariance, covariance (Bardes et al., arXiv 2105.04906; the paper's weights are 25, 25, 1).

    Invariance is the mean over clips and dimensions. The two variance terms are averaged, the covariances summed. The
    regularisers act on f(x) and f(x+), not on the prediction, whose spread may need to be smaller.
    """

    needs_batch_statistics = True
    default_beta = 0.05

    def __init__(self, vicreg_weights: Sequence[float]) -> None:
        super().__init__()
        self.weights = vicreg_weights

    def forward(
        self, edited: Tensor, target: Tensor, context: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return "prediction_loss" and its parts "invariance", "variance" and "covariance" for embeddings [B, D]."""
        invariance = F.mse_loss(edited, target)
        variance = (variance_hinge(context) + variance_hinge(target)) / 2
        covariance = covariance_penalty(context) + covariance_penalty(target)
        of_invariance, of_variance, of_covariance = self.weights
        return {
            "prediction_loss": of_invariance * invariance + of_variance * variance + of_covariance * covariance,
            "invariance": invariance.detach(),
            "variance": variance.detach(),
            "covariance": covariance.detach(),
        }

    def prediction_error(self, edited: Tensor, target: Tensor, context: Tensor) -> Tensor:
        """Return the mean squared difference times the weight of invariance: [B]."""
        return self.weights[0] * (edited - target).square().mean(dim=-1)


def variance_hinge(embeddings: Tensor) -> Tensor:
    """Return the mean over dimensions of max(0, 1 - standard deviation): [B, D] -> []."""
    return F.relu(1 - (embeddings.var(dim=0) + 1e-4).sqrt()).mean()


def covariance_penalty(embeddings: Tensor) -> Tensor:
    """Return the sum of squared covariances between dimensions, divided by D: [B, D] -> []."""
    centred = embeddings - embeddings.mean(dim=0)
    covariance = centred.T @ centred / (len(embeddings) - 1)  # torch.cov synchronises a GPU
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / embeddings.shape[1]


class SigReg(Objective):
    """Squared error plus a test of normality in random directions (LeJEPA, Balestriero & LeCun, arXiv 2511.08544).

    The regulariser acts on f(x) and f(x+) of the shared encoder.
    """

    NUM_DIRECTIONS = 256

    needs_batch_statistics = True
    default_beta = 0.002

    def __init__(self, sigreg_weight: float) -> None:
        super().__init__()
        self.weight = sigreg_weight

    def forward(
        self, edited: Tensor, target: Tensor, context: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return "prediction_loss" and its parts "invariance" and "normality" for embeddings [B, D]."""
        invariance = F.mse_loss(edited, target)
        directions = torch.randn(
            self.NUM_DIRECTIONS, target.shape[1], generator=generator, device=target.device, dtype=target.dtype
        )
        directions = F.normalize(directions, dim=-1)
        normality = (epps_pulley(context @ directions.T) + epps_pulley(target @ directions.T)).mean() / 2
        return {
            "prediction_loss": invariance + self.weight * normality,
            "invariance": invariance.detach(),
            "normality": normality.detach(),
        }

    def prediction_error(self, edited: Tensor, target: Tensor, context: Tensor) -> Tensor:
        """Return the mean squared difference: [B]."""
        return (edited - target).square().mean(dim=-1)


def epps_pulley(samples: Tensor) -> Tensor:
    """Return the distance of samples from N(0, 1) per column: [B, Q] -> [Q].

    It is B times the integral over t of |mean exp(i t x) - exp(-t^2 / 2)|^2 exp(-t^2 / 2), by the trapezoid rule (Epps
    and Pulley 1983; LeJEPA, arXiv 2511.08544, section 4). The integrand is even, so half the axis is enough.
    """
    t = torch.linspace(0, 5, 17, device=samples.device, dtype=samples.dtype)
    step = 5 / 16
    weight = torch.full_like(t, 2 * step)
    weight[0] = weight[-1] = step
    normal = torch.exp(-t.square() / 2)
    angles = samples.unsqueeze(-1) * t
    real, imaginary = angles.cos().mean(dim=0), angles.sin().mean(dim=0)
    return len(samples) * ((real - normal).square() + imaginary.square()) @ (weight * normal)
