"""Objectives: how near the edited embedding t(f(x), r) is to that of the target x+, and what keeps embeddings apart.

Every objective takes the same three embeddings, float32 [B, D], and returns named scalars; "prediction_loss" is the one
to minimise, the others are its parts or what is worth logging beside it.

    edited   t(f(x), r), the prediction
    target   the embedding of x+: the teacher's, without gradient, or the shared encoder's, with gradient
    context  f(x) of the shared encoder

Legend: B clips, D embedding dimensions.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.config import InfoNceConfig, ObjectiveConfig, SigregConfig, VicregConfig
from worldmodel.nets.encoders import mlp

MAX_LOGIT = 20.0


class Objective(nn.Module, ABC):
    """What an objective asks of the model and of the trainer; `forward` is its loss."""

    needs_teacher: ClassVar[bool] = False
    """The target comes from an EMA teacher; otherwise from the encoder itself, with gradient."""
    needs_negatives: ClassVar[bool] = False
    """Clips of a batch are told apart: the loss of a batch is not the mean of the losses of its parts."""
    needs_batch_statistics: ClassVar[bool] = False
    """The distribution of a batch enters the loss: it is not the mean of the losses of its parts."""
    needs_predictor: ClassVar[bool] = False
    """An asymmetry between the two sides is what prevents collapse: the editor must end in an MLP."""
    default_beta: ClassVar[float] = 0.001
    """Weight of the latent's regulariser. It goes with how steep the loss is in the squared error of an embedding."""

    @abstractmethod
    def forward(
        self, edited: Tensor, target: Tensor, context: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """edited, target, context [B, D] -> {"prediction_loss": scalar, ...}."""

    @abstractmethod
    def prediction_error(self, edited: Tensor, target: Tensor, context: Tensor) -> Tensor:
        """What each clip's own distance from its target adds to the loss, 0 where there is none: [B, D] each -> [B].

        In the units of the loss and with its weight there. What the loss makes of the clips of a batch together is left
        out: the error of a clip does not depend on the others.
        """


# --------------------------------------------------------------------------------------------------- distillation


class Byol(Objective):
    """Negative cosine to an EMA teacher (Grill et al., arXiv 2006.07733, eq. 2, up to scale and shift)."""

    needs_teacher = True
    needs_predictor = True

    def forward(
        self, edited: Tensor, target: Tensor, context: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """edited, target [B, D] -> "prediction_loss" in [-1, 1]."""
        return {"prediction_loss": -F.cosine_similarity(edited, target, dim=-1).mean()}

    def prediction_error(self, edited: Tensor, target: Tensor, context: Tensor) -> Tensor:
        """1 - cosine, 0 to 2."""
        return 1 - F.cosine_similarity(edited, target, dim=-1)


class Jepa(Objective):
    """Half the mean squared error to an EMA teacher's embedding, each dimension of which has variance 1 over a batch.

    Joint-embedding prediction by squared error (I-JEPA, Assran et al., arXiv 2301.08243, section 3), with targets
    standardised as in data2vec (Baevski et al., arXiv 2202.03555, section 3.3). Between two points of the sphere it is
    1 - cosine, BYOL's loss; without the sphere the embedding is not bent by a length that differs from clip to clip.
    """

    needs_teacher = True
    needs_predictor = True

    def forward(
        self, edited: Tensor, target: Tensor, context: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """edited, target [B, D] -> "prediction_loss" >= 0."""
        return {"prediction_loss": F.mse_loss(edited, target) / 2}

    def prediction_error(self, edited: Tensor, target: Tensor, context: Tensor) -> Tensor:
        """Half the mean squared difference."""
        return (edited - target).square().mean(dim=-1) / 2


class Ressl(Objective):
    """Relational consistency (Zheng et al., arXiv 2107.09282).

    The prediction's similarities to the other targets of the batch follow the teacher's, by cross-entropy. The
    teacher's distribution is sharper (temperature 0.04 against 0.1). The batch stands where the paper has a memory of
    past targets.
    """

    STUDENT_TEMPERATURE = 0.1
    TEACHER_TEMPERATURE = 0.04

    needs_teacher = True
    needs_negatives = True
    default_beta = 0.01

    def forward(
        self, edited: Tensor, target: Tensor, context: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """edited, target [B, D] -> "prediction_loss" >= 0."""
        edited, target = F.normalize(edited, dim=-1), F.normalize(target, dim=-1)
        student = _without_diagonal(edited @ target.T) / self.STUDENT_TEMPERATURE
        teacher = _without_diagonal(target @ target.T) / self.TEACHER_TEMPERATURE
        return {"prediction_loss": F.cross_entropy(student, teacher.softmax(dim=-1))}

    def prediction_error(self, edited: Tensor, target: Tensor, context: Tensor) -> Tensor:
        """1 - cosine, 0 to 2, which stands in: this loss compares a clip with others alone, never with its target."""
        return 1 - F.cosine_similarity(edited, target, dim=-1)


class SslHsic(Objective):
    """Kernel dependence on the clip's identity (Li et al., arXiv 2106.08320): -HSIC(Z, Y) + gamma sqrt(HSIC(Z, Z)).

    Z holds the predictions and the teacher's targets, Y says which clip each belongs to. Inverse multiquadric kernel on
    the unit sphere, gamma = 3. The kernel is computed as it is; the paper approximates it by random features.
    """

    GAMMA = 3.0

    needs_teacher = True
    needs_negatives = True
    needs_batch_statistics = True
    needs_predictor = True

    def forward(
        self, edited: Tensor, target: Tensor, context: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """edited, target [B, D] -> "prediction_loss", and its parts "hsic_identity" and "hsic_self"."""
        both = F.normalize(torch.cat([edited, target]), dim=-1)
        kernel = inverse_multiquadric_kernel(both, both)
        num_clips = len(edited)
        # HSIC(Z, Y) for one-hot Y times the number of clips: kernel within a clip minus kernel at large.
        identity = kernel.diagonal(num_clips).mean() - kernel.mean()
        own = hsic(kernel, kernel)
        return {
            "prediction_loss": -identity + self.GAMMA * own.clamp(min=1e-12).sqrt(),
            "hsic_identity": identity.detach(),
            "hsic_self": own.detach(),
        }

    def prediction_error(self, edited: Tensor, target: Tensor, context: Tensor) -> Tensor:
        """1 - kernel, of the part of the loss that is the mean kernel within a clip."""
        difference = F.normalize(edited, dim=-1) - F.normalize(target, dim=-1)
        return 1 - (1 + difference.square().sum(dim=-1)).rsqrt()


def inverse_multiquadric_kernel(a: Tensor, b: Tensor) -> Tensor:
    """k(a, b) = 1 / sqrt(1 + |a - b|^2): [N, D], [M, D] -> [N, M]."""
    return (1 + squared_distances(a, b)).rsqrt()


def hsic(kernel: Tensor, other: Tensor) -> Tensor:
    """The biased estimate trace(K H L H) / (N - 1)^2 of two kernel matrices [N, N] (Gretton et al. 2005, eq. 9)."""
    centred = kernel - kernel.mean(dim=0) - kernel.mean(dim=1, keepdim=True) + kernel.mean()
    return (centred * other.T).sum() / (len(kernel) - 1) ** 2


# ---------------------------------------------------------------------------------------------------- contrastive


class InfoNce(Objective):
    """NT-Xent in both directions with negatives from both views (Chen et al., arXiv 2002.05709, eq. 1).

    Logits are -w |a - b|^2 / (2 D temperature) + 1 / temperature. On the sphere of radius sqrt(D) that is the cosine
    over the temperature; without normalisation it is a Gaussian's log density. The weight w = softplus(lambda) is
    learned and starts at 1 (AdaSSL, arXiv 2602.02381, appendix); logits are kept within +-20.

    "information_nats" is the lower bound on the information between prediction and target, log B minus the
    cross-entropy among the B targets of a batch (van den Oord et al., arXiv 1807.03748, section 2.3).
    """

    needs_negatives = True
    default_beta = 0.01

    def __init__(self, embedding_dim: int, hidden_dim: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.make_metric(embedding_dim, hidden_dim)

    def make_metric(self, embedding_dim: int, hidden_dim: int) -> None:
        self.raw_weight = nn.Parameter(torch.full((1,), SOFTPLUS_ONE))

    def metric(self, context: Tensor) -> Tensor:
        """context [B, D] -> weights of the squared differences, [1 or B, 1 or D]."""
        return F.softplus(self.raw_weight)[None]

    def forward(
        self, edited: Tensor, target: Tensor, context: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """edited, target, context [B, D] -> "prediction_loss" in nats and "information_nats"."""
        metric = self.metric(context)
        # A row takes the metric of its clip. In across.T, so does a column.
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
        """rows [N, D], columns [M, D], metric [1 or N, 1 or D] -> [N, M]."""
        distances = squared_distances(rows, columns, metric.expand(len(rows), rows.shape[1]))
        scale = 2 * rows.shape[1] * self.temperature
        return (1 / self.temperature - distances / scale).clamp(-MAX_LOGIT, MAX_LOGIT)

    def prediction_error(self, edited: Tensor, target: Tensor, context: Tensor) -> Tensor:
        """How far the logit of the pair is below its largest value, in nats, before logits are clamped.

        That is the attraction. The repulsion, a log sum over the batch, is left out.
        """
        distance = (self.metric(context) * (edited - target).square()).sum(dim=-1)
        return distance / (2 * edited.shape[1] * self.temperature)


class AnInfoNce(InfoNce):
    """InfoNCE with a learned constant diagonal metric (AnInfoNCE, Rusak et al., arXiv 2407.00143)."""

    def make_metric(self, embedding_dim: int, hidden_dim: int) -> None:
        self.raw_weight = nn.Parameter(torch.full((embedding_dim,), SOFTPLUS_ONE))


class HInfoNce(InfoNce):
    """InfoNCE whose diagonal metric is predicted from the context (H-InfoNCE, baseline of AdaSSL, arXiv 2602.02381)."""

    def make_metric(self, embedding_dim: int, hidden_dim: int) -> None:
        self.metric_net = mlp([embedding_dim, hidden_dim, embedding_dim])

    def metric(self, context: Tensor) -> Tensor:
        return F.softplus(self.metric_net(context) + SOFTPLUS_ONE)


SOFTPLUS_ONE = math.log(math.e - 1)
"""softplus(SOFTPLUS_ONE) = 1"""


def squared_distances(rows: Tensor, columns: Tensor, metric: Tensor | None = None) -> Tensor:
    """sum_k metric[i, k] (rows[i, k] - columns[j, k])^2: [N, D], [M, D], [N, D] or ones -> [N, M]."""
    weighted = rows if metric is None else rows * metric
    column_part = columns.square().sum(dim=-1) if metric is None else metric @ columns.square().T
    return ((weighted * rows).sum(dim=-1, keepdim=True) - 2 * weighted @ columns.T + column_part).clamp(min=0)


def _without_diagonal(square: Tensor) -> Tensor:
    """[N, N] -> [N, N - 1]"""
    n = len(square)
    return square.flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)


# ------------------------------------------------------------------------------------------- regularised, no teacher


class Vicreg(Objective):
    """Variance, invariance, covariance (Bardes et al., arXiv 2105.04906; the paper's weights are 25, 25, 1).

    Invariance is the mean over clips and dimensions; the two variance terms are averaged, the covariances summed. The
    regularisers act on f(x) and f(x+), not on the prediction, whose spread must be free to be smaller.
    """

    needs_batch_statistics = True
    default_beta = 0.05

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.weights = weights

    def forward(
        self, edited: Tensor, target: Tensor, context: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """edited, target, context [B, D] -> "prediction_loss" and its parts "invariance", "variance", "covariance"."""
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
        """The mean squared difference times the weight of invariance."""
        return self.weights[0] * (edited - target).square().mean(dim=-1)


def variance_hinge(embeddings: Tensor) -> Tensor:
    """Mean over dimensions of max(0, 1 - standard deviation): [B, D] -> scalar."""
    return F.relu(1 - (embeddings.var(dim=0) + 1e-4).sqrt()).mean()


def covariance_penalty(embeddings: Tensor) -> Tensor:
    """Sum of squared covariances between dimensions, over D: [B, D] -> scalar."""
    centred = embeddings - embeddings.mean(dim=0)
    covariance = centred.T @ centred / (len(embeddings) - 1)  # torch.cov asks a GPU for a number
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / embeddings.shape[1]


class SigReg(Objective):
    """Squared error plus a test of normality in random directions (LeJEPA, Balestriero & LeCun, arXiv 2511.08544).

    The regulariser acts on f(x) and f(x+) of the shared encoder.
    """

    NUM_DIRECTIONS = 256

    needs_batch_statistics = True
    default_beta = 0.002

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(
        self, edited: Tensor, target: Tensor, context: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """edited, target, context [B, D] -> "prediction_loss" and its parts "invariance", "normality"."""
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
        """The mean squared difference."""
        return (edited - target).square().mean(dim=-1)


def epps_pulley(samples: Tensor) -> Tensor:
    """Distance of samples from N(0, 1), one number a column: [N, K] -> [K].

    N times the integral over t of |mean exp(i t x) - exp(-t^2 / 2)|^2 exp(-t^2 / 2), by the trapezoid rule (Epps and
    Pulley 1983; LeJEPA, arXiv 2511.08544, section 4). The integrand is even: half the axis is enough.
    """
    t = torch.linspace(0, 5, 17, device=samples.device, dtype=samples.dtype)
    step = 5 / 16
    weight = torch.full_like(t, 2 * step)
    weight[0] = weight[-1] = step
    normal = torch.exp(-t.square() / 2)
    angles = samples.unsqueeze(-1) * t
    real, imaginary = angles.cos().mean(dim=0), angles.sin().mean(dim=0)
    return len(samples) * ((real - normal).square() + imaginary.square()) @ (weight * normal)


# ------------------------------------------------------------------------------------ terms of successive embeddings


class SequenceTerms(nn.Module):
    """What shapes distances between embeddings of one clip, so that they can be planned in; each with a weight.

    smoothness: mean squared difference of successive embeddings. With a variance that is kept up, what is few steps
    away is near, walls counted in (slow features: Wiskott and Sejnowski 2002). inverse_dynamics: mean squared error of
    the action, read by an MLP from the two embeddings around it; what an agent controls stays in the embedding.
    time_variance: the variance hinge, of embeddings less their clip's mean; what does not change in a clip cannot be
    all that they hold.
    """

    def __init__(self, weights: Mapping[str, float], embedding_dim: int, hidden_dim: int, action_dim: int) -> None:
        super().__init__()
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.action_net = (
            mlp([2 * embedding_dim, hidden_dim, action_dim]) if "inverse_dynamics" in self.weights else None
        )

    @property
    def needs_batch_statistics(self) -> bool:
        """As an objective's: the action is read by a network with batch norm."""
        return "time_variance" in self.weights or "inverse_dynamics" in self.weights

    def forward(self, embeddings: Tensor, actions: Tensor | None) -> dict[str, Tensor]:
        """embeddings [B, K + 1, D] of successive segments, actions [B, K, A] between them -> the terms, unweighted."""
        terms: dict[str, Tensor] = {}
        if "smoothness" in self.weights:
            terms["smoothness"] = F.mse_loss(embeddings[:, 1:], embeddings[:, :-1])
        if "time_variance" in self.weights:
            terms["time_variance"] = variance_hinge((embeddings - embeddings.mean(dim=1, keepdim=True)).flatten(0, 1))
        if self.action_net is not None:
            assert actions is not None
            pairs = torch.cat([embeddings[:, :-1], embeddings[:, 1:]], dim=-1).flatten(0, 1)
            terms["inverse_dynamics"] = F.mse_loss(self.action_net(pairs).float(), actions.flatten(0, 1))
        return terms

    def total(self, terms: Mapping[str, Tensor]) -> Tensor | float:
        """The weighted sum."""
        return sum(self.weights[name] * value for name, value in terms.items())


OBJECTIVES: dict[str, type[Objective]] = {
    "byol": Byol,
    "jepa": Jepa,
    "infonce": InfoNce,
    "aninfonce": AnInfoNce,
    "hinfonce": HInfoNce,
    "vicreg": Vicreg,
    "sigreg": SigReg,
    "ressl": Ressl,
    "ssl_hsic": SslHsic,
}


def make_objective(config: ObjectiveConfig, *, embedding_dim: int, hidden_dim: int) -> Objective:
    """Build the objective of a config."""
    kind = OBJECTIVES[config.name]
    if isinstance(config, InfoNceConfig):
        assert issubclass(kind, InfoNce)
        return kind(embedding_dim, hidden_dim, config.temperature)
    if isinstance(config, VicregConfig):
        return Vicreg(config.vicreg_weights)
    return SigReg(config.sigreg_weight) if isinstance(config, SigregConfig) else kind()
