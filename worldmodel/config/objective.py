"""The training loss: the section `objective`, a choice by `objective.name` (worldmodel/training/objectives.py).

The loss of a choice is between edited and target embeddings; beta times the penalty of the latent is added.
"""

import dataclasses
from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass

from worldmodel.config.kinds import (
    KEYS,
    CountFrom0,
    EmbeddingNorm,
    Fraction,
    NonNegativeFloat,
    Options,
    OutsideName,
    PositiveFloat,
    Repeat,
)


@dataclass(frozen=True, config=KEYS)
class AnyObjective:
    """Keys of every objective."""

    needs_sphere: ClassVar[bool] = False
    """Embeddings are compared by direction only; their length would be undetermined."""
    default_norm: ClassVar[EmbeddingNorm] = "sphere"
    """Normalisation of embeddings if `model.embedding_norm` is null."""

    name: str
    """Name of the objective."""
    beta: NonNegativeFloat | None = None
    """Weight of KL(posterior || prior) in nats, or of the expected L0 of a sparse r. null: the default of the
    objective."""
    beta_warmup_steps: CountFrom0 = 0
    """Steps over which beta grows linearly from zero."""
    smoothness_weight: NonNegativeFloat = 0.0
    """Weight of the squared distance between successive embeddings, so that near in time becomes near in space."""
    inverse_dynamics_weight: NonNegativeFloat = 0.0
    """Weight of the squared error of the action predicted from two successive embeddings. Needs `model.action_dim`."""
    time_variance_weight: NonNegativeFloat = 0.0
    """Weight of a hinge that keeps the embeddings of a clip apart over time, so that they hold more than the constant
    content of the clip."""
    distance_error_weight: NonNegativeFloat = 0.0
    """Weight, in refinement, of the temporal distance from predicted to true states, so that the editor learns what
    matters for the path, such as walls. Needs `model.distance_dim`."""
    rollout_steps: Repeat = 1
    """Segments predicted in sequence in training, each from the previous prediction; the paper has one."""
    step_weights: tuple[NonNegativeFloat, ...] | None = None
    """Relative weight of each of these steps in the loss. null: equal weights."""


@dataclass(frozen=True, config=KEYS)
class TeacherObjective(AnyObjective):
    """Keys of objectives whose targets come from a teacher, an exponential moving average of the encoder."""

    ema_momentum: Fraction = 0.996
    """Fraction of the teacher that remains at each step."""
    ema_schedule: Literal["constant", "cosine"] = "constant"
    """cosine: the momentum rises to 1 over the run (BYOL)."""


@dataclass(frozen=True, config=KEYS)
class ByolConfig(TeacherObjective):
    """Negative cosine to a teacher (arXiv 2006.07733)."""

    built_by: ClassVar[str] = "worldmodel.training.objectives:Byol"
    needs_sphere: ClassVar[bool] = True

    name: Literal["byol"] = "byol"
    """Name of the objective."""


@dataclass(frozen=True, config=KEYS)
class JepaConfig(TeacherObjective):
    """Squared error to a teacher's standardised embeddings (arXiv 2301.08243)."""

    built_by: ClassVar[str] = "worldmodel.training.objectives:Jepa"
    default_norm: ClassVar[EmbeddingNorm] = "standard"

    name: Literal["jepa"] = "jepa"
    """Name of the objective."""


@dataclass(frozen=True, config=KEYS)
class ResslConfig(TeacherObjective):
    """Relational consistency with a teacher (arXiv 2107.09282)."""

    built_by: ClassVar[str] = "worldmodel.training.objectives:Ressl"
    needs_sphere: ClassVar[bool] = True

    name: Literal["ressl"] = "ressl"
    """Name of the objective."""


@dataclass(frozen=True, config=KEYS)
class SslHsicConfig(TeacherObjective):
    """Kernel dependence on the identity of the clip, with a teacher (arXiv 2106.08320)."""

    built_by: ClassVar[str] = "worldmodel.training.objectives:SslHsic"
    needs_sphere: ClassVar[bool] = True

    name: Literal["ssl_hsic"] = "ssl_hsic"
    """Name of the objective."""


@dataclass(frozen=True, config=KEYS)
class ContrastiveObjective(AnyObjective):
    """Keys of objectives that contrast a clip with the others of its batch."""

    temperature: PositiveFloat = 0.1
    """Divisor of the similarities. The quotients are limited to 20: below 0.05, similar pairs become
    indistinguishable."""


@dataclass(frozen=True, config=KEYS)
class InfoNceConfig(ContrastiveObjective):
    """Contrast with the other clips of a batch: InfoNCE (arXiv 2002.05709)."""

    built_by: ClassVar[str] = "worldmodel.training.objectives:InfoNce"

    name: Literal["infonce"] = "infonce"
    """Name of the objective."""


@dataclass(frozen=True, config=KEYS)
class AnInfoNceConfig(ContrastiveObjective):
    """InfoNCE with a learned diagonal metric: AnInfoNCE (arXiv 2407.00143)."""

    built_by: ClassVar[str] = "worldmodel.training.objectives:AnInfoNce"

    name: Literal["aninfonce"] = "aninfonce"
    """Name of the objective."""


@dataclass(frozen=True, config=KEYS)
class HInfoNceConfig(ContrastiveObjective):
    """InfoNCE with a metric predicted from the context: H-InfoNCE (arXiv 2602.02381)."""

    built_by: ClassVar[str] = "worldmodel.training.objectives:HInfoNce"

    name: Literal["hinfonce"] = "hinfonce"
    """Name of the objective."""


@dataclass(frozen=True, config=KEYS)
class VicregConfig(AnyObjective):
    """Squared error with variance and covariance terms (arXiv 2105.04906)."""

    built_by: ClassVar[str] = "worldmodel.training.objectives:Vicreg"

    name: Literal["vicreg"] = "vicreg"
    """Name of the objective."""
    vicreg_weights: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (25.0, 25.0, 1.0)
    """Weights of invariance, variance and covariance."""


@dataclass(frozen=True, config=KEYS)
class SigregConfig(AnyObjective):
    """Squared error with a test of normality in random directions (LeJEPA, arXiv 2511.08544)."""

    built_by: ClassVar[str] = "worldmodel.training.objectives:SigReg"

    name: Literal["sigreg"] = "sigreg"
    """Name of the objective."""
    sigreg_weight: NonNegativeFloat = 0.3
    """Weight of the test of normality."""


@dataclass(frozen=True, config=KEYS)
class ExternalObjective(TeacherObjective):
    """A class in the user's own code, outside of the project. `ema_*` count if it needs a teacher."""

    name: OutsideName
    """`package.module:Class`."""
    options: Options = dataclasses.field(default_factory=dict)
    """Arguments of the class, alongside those that the project gives it."""

    @property
    def built_by(self) -> str:
        """The class."""
        return self.name


ObjectiveConfig = (
    ByolConfig
    | JepaConfig
    | InfoNceConfig
    | AnInfoNceConfig
    | HInfoNceConfig
    | VicregConfig
    | SigregConfig
    | ResslConfig
    | SslHsicConfig
    | ExternalObjective
)
