"""The whole configuration of a run, and the sections that are not choices themselves."""

import dataclasses
from typing import Annotated, ClassVar, Literal, Self

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from worldmodel.config.data import DataConfig, VideosConfig
from worldmodel.config.kinds import (
    KEYS,
    Choice,
    Count,
    CountFrom0,
    CountFrom2,
    CountFrom10,
    Flag,
    Fraction,
    NonNegativeFloat,
    PathText,
    PositiveFloat,
    Repeat,
    Samples,
    SamplesFrom0,
    SamplesFrom2,
    Seconds,
    Seed,
    Text,
)
from worldmodel.config.model import External, ModelConfig
from worldmodel.config.objective import ByolConfig, ObjectiveConfig


@dataclass(frozen=True, config=KEYS)
class TrainConfig:
    """Optimisation, refinement, precision, and the intervals of a run's files."""

    steps: Count = 75_000
    """Updates."""
    lr: PositiveFloat = 1e-4
    """Largest learning rate of AdamW."""
    start_from: PathText | None = None
    """Folder of another run whose weights this one starts from, those of its latest checkpoint, or the name of a run on
    the Hub. The encoder must be the same. Another network, such as an editor with other actions, starts with new
    weights if it does not fit, and is named. null: all weights are new."""
    warmup_steps: CountFrom0 = 0
    """Updates over which the learning rate rises linearly from zero; fewer than `train.steps`."""
    weight_decay: NonNegativeFloat = 1e-4
    """Weight decay of matrices and kernels; one-dimensional parameters have none."""
    refine_steps: CountFrom0 = 0
    """Extra updates after training, with the encoder frozen, on embeddings of `refine_clips` clips, which are free of
    batch-norm noise (worldmodel/training/refine.py)."""
    refine_horizon: Repeat = 1
    """Maximum start offset, in steps, of a refinement example within its clip. Its scene code may come from any earlier
    segment: use more than 1 with `model.scene_dim`, so that a code still holds after many steps."""
    refine_clips: CountFrom2 = 65_536
    """Clips that are embedded for refinement."""
    refine_clip_step: Repeat | None = None
    """Frames from the start of one embedded clip to that of the next in the same video, in place of `data.clip_step`.
    null: each segment is embedded about once, so that many videos are seen. 1 for minutes of video: a clip starts at
    every frame."""
    refine_batch_size: SamplesFrom2 | None = None
    """Embedded clips per refinement update. null: `data.batch_size`."""
    refine_lr: PositiveFloat = 1e-3
    """Largest learning rate of refinement."""
    refine_rollout_steps: Repeat | None = None
    """Segments predicted in sequence in refinement, with equal weights in the loss. null: those of the objective."""
    refine_energy_weight: NonNegativeFloat = 0.0
    """Weight, in refinement, of the Energy Score of futures sampled from the prior. Editor and prior then learn from it
    alone, and the posterior from the other losses. 0: they all learn from the other losses."""
    refine_energy_of: Literal["embedding", "dimensions"] = "embedding"
    """Scope of this score. embedding: the embedding as a whole. dimensions: each dimension by itself, averaged (the
    CRPS), in which a sharp dimension is not lost among many uncertain ones; for embeddings without a projector, whose
    dimensions have a meaning."""
    refine_samples: SamplesFrom2 = 8
    """Sampled futures per clip for this score."""
    refine_noise: NonNegativeFloat = 0.0
    """Standard deviation of the noise that is added to contexts in refinement, relative to that of each dimension's
    change in a step. It keeps a forecast from memorising few clips."""
    refine_eval_every: CountFrom0 = 0
    """Updates of refinement from one score on the selection split to the next. The best weights are kept. 0: the last
    weights are kept."""
    clip_norm: NonNegativeFloat = 0.0
    """Limit of the norm of the gradient. 0: no limit."""
    grad_accumulation: Samples = 1
    """Micro-batches per batch, which save memory. The update is that of the whole batch for every objective
    (worldmodel/training/gradients.py); only batch norm sees one micro-batch at a time."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the networks; bf16 and fp16 are mixed. auto: bf16 if the processor or GPU computes it natively,
    otherwise fp32."""
    compile: Literal["auto", "none", "default", "max-autotune"] = "auto"
    """Mode of torch.compile for the encoder, which takes nearly all of the time. max-autotune is slow to start and
    replays CUDA graphs. auto: default on a single GPU, otherwise none."""
    encoder_cache: PathText | None = None
    """Folder that stores the output of a frozen pretrained encoder for each segment, for this and other runs: the mean
    of its tokens in fp32, for pooling by attention all tokens in fp16. It is computed once, before training;
    training, its evaluations and refinement then decode no video and run no backbone. Needs `model.encoder.freeze`.
    null: no cache."""
    encoder_cache_gb: Count = 64
    """Size limit of this folder, GB. A run that needs more ends before it computes."""
    num_threads: Repeat | None = None
    """CPU threads per process for tensor work. null: the cores of the machine, divided among its processes; a single
    process leaves out cores that other programs have kept busy for a minute when it starts. The rounding of sums
    depends on the number."""
    timeout_s: Seconds = 1800.0
    """Time that processes wait for each other before the connection counts as lost, seconds. Use more than any work of
    the first process alone takes: indexing videos, an evaluation, refinement."""
    log_every: Count = 50
    """Updates from one row of losses in metrics.jsonl to the next."""
    eval_every: Count = 1000
    """Updates from one evaluation to the next."""
    checkpoint_every: Count = 1000
    """Updates from one checkpoint to the next."""
    keep_checkpoints: Count = 2
    """Latest checkpoints that are kept, besides the best."""


@dataclass(frozen=True, config=KEYS)
class EvaluationConfig:
    """The Energy Score protocol: numbers of clips, all of disjoint identities."""

    horizon: Repeat = 1
    """Segments that are forecast."""
    label: Text | None = None
    """Per-frame label, a list of numbers, that is forecast if no law is known. null: only embeddings are forecast."""
    queries: SamplesFrom2 = 1024
    """Test clips that are forecast."""
    num_samples: SamplesFrom2 = 64
    """Sampled futures per query."""
    law_samples: SamplesFrom2 = 128
    """Draws of the true law per query, if it is known."""
    fit_clips: CountFrom2 = 8192
    """Training clips on which the readout is fitted."""
    selection_clips: CountFrom2 = 2048
    """Clips on which the regularisation of the readout is selected."""
    recalibrate: bool = False
    """Fit the spread of forecasts, and their pool with the climatology of training clips, to the selection clips, and
    score the recalibrated forecasts too."""
    seed: Seed = 20_000
    """Seed of the queries, the draws of the law and the sampled futures."""


@dataclass(frozen=True, config=KEYS)
class CemConfig:
    """The cross-entropy method."""

    built_by: ClassVar[str] = "worldmodel.planning.planners.cem:Cem"

    name: Literal["cem"] = "cem"
    """Name of the planner."""
    elites: Samples = 30
    """Cheapest candidates, to which the next distribution of candidates is fitted."""


@dataclass(frozen=True, config=KEYS)
class IcemConfig:
    """Sample-efficient CEM (iCEM, arXiv 2008.06389): coloured noise, elites kept between decisions."""

    built_by: ClassVar[str] = "worldmodel.planning.planners.icem:Icem"

    name: Literal["icem"] = "icem"
    """Name of the planner."""
    elites: Samples = 30
    """Cheapest candidates, to which the next distribution of candidates is fitted."""
    noise_beta: NonNegativeFloat = 2.0
    """Noise of frequency f has the power f^-noise_beta. 0 is white; larger values are smoother in time."""


@dataclass(frozen=True, config=KEYS)
class MppiConfig:
    """Model predictive path integral control (arXiv 1707.02342)."""

    built_by: ClassVar[str] = "worldmodel.planning.planners.mppi:Mppi"

    name: Literal["mppi"] = "mppi"
    """Name of the planner."""
    temperature: PositiveFloat = 0.3
    """Divisor of the costs, in standard deviations of the costs of an episode's candidates."""


@dataclass(frozen=True, config=KEYS)
class GradientConfig:
    """Gradient descent through the imagined future by Adam, from `planning.candidates` starts, for
    `planning.iterations` steps."""

    built_by: ClassVar[str] = "worldmodel.planning.planners.gradient:Gradient"

    name: Literal["gradient"] = "gradient"
    """Name of the planner."""
    lr: PositiveFloat = 0.1
    """Learning rate of Adam: about the largest change of a coordinate of an action in one iteration."""


@dataclass(frozen=True, config=KEYS)
class CategoricalConfig:
    """The cross-entropy method for discrete actions, with `planning.action_set=one_hot`."""

    built_by: ClassVar[str] = "worldmodel.planning.planners.categorical:Categorical"

    name: Literal["categorical"] = "categorical"
    """Name of the planner."""
    elites: Samples = 30
    """Cheapest candidates, to which the next probabilities of actions are fitted."""
    uniform_share: Fraction = 0.3
    """Share of uniform probabilities in the first iteration of a decision; the others are those of the last plan."""


PlannerConfig = CemConfig | IcemConfig | MppiConfig | GradientConfig | CategoricalConfig | External


@dataclass(frozen=True, config=KEYS)
class MeanRiskConfig:
    """The mean of the costs of futures."""

    name: Literal["mean"] = "mean"
    """Name of the measure."""


@dataclass(frozen=True, config=KEYS)
class QuantileRiskConfig:
    """A quantile of the costs of futures."""

    name: Literal["quantile"] = "quantile"
    """Name of the measure."""
    level: Fraction = 0.9
    """Level of the quantile. 1: the worst future."""


@dataclass(frozen=True, config=KEYS)
class CvarRiskConfig:
    """The mean cost of the worst futures, conditional value at risk (Rockafellar and Uryasev 2000)."""

    name: Literal["cvar"] = "cvar"
    """Name of the measure."""
    level: Fraction = 0.9
    """Share of the futures that are left out, the cheapest."""


@dataclass(frozen=True, config=KEYS)
class ReachRiskConfig:
    """The probability that a future comes near the goal within the horizon. Among equal ones, the mean cost decides."""

    name: Literal["reach"] = "reach"
    """Name of the measure."""
    within: PositiveFloat = 1.0
    """Distance from the goal that counts as reached, in the unit of `planning.distance`."""


RiskConfig = MeanRiskConfig | QuantileRiskConfig | CvarRiskConfig | ReachRiskConfig


@dataclass(frozen=True, config=KEYS)
class PlanningConfig:
    """How actions are chosen (worldmodel/planning/planners/). A decision compares iterations * candidates
    rollouts."""

    planner: Annotated[PlannerConfig, Choice("icem")] = IcemConfig()
    """Search over sequences of actions."""
    horizon: Repeat = 20
    """Steps of the model in a sequence. A step has `data.frame_stride` actions."""
    replan_every: Repeat = 1
    """Steps of the model that are executed before the next decision, at most `planning.horizon`."""
    candidates: Samples = 300
    """Sequences that are compared in one iteration."""
    iterations: Repeat = 5
    """Iterations per decision."""
    init_std: PositiveFloat = 0.5
    """Standard deviation of the actions of candidates around the mean, in the first iteration; for mppi in all, for
    gradient that of the starts. categorical has none."""
    cost: Literal["sum", "last"] = "sum"
    """Distance to the goal, summed over the steps of the horizon, or of the last step alone."""
    distance: Literal["embedding", "steps"] = "embedding"
    """Distance of a state to the goal. embedding: mean squared difference of the embeddings. steps: temporal distance
    of a model with `model.distance_dim`."""
    num_samples: SamplesFrom0 = 0
    """Imagined futures per candidate, by draws from the prior. 0: one, at the mean of the prior."""
    risk: Annotated[RiskConfig, Choice("mean")] = MeanRiskConfig()
    """Measure of the costs of these futures, by which candidates are compared."""
    action_set: Literal["ball", "box", "one_hot"] = "ball"
    """Set of allowed actions. ball: of norm 1 at most. box: each coordinate is in [-1, 1]. one_hot: one coordinate is 1
    and the others are 0, as discrete actions are recorded."""
    warm_start: Flag = False
    """Start each search from the actions of a goal-conditioned policy, rolled out in imagination, in place of the last
    plan. The policy is learned from the training clips when planning starts
    (worldmodel/planning/goal_conditioned.py)."""
    goal_steps: Repeat = 32
    """Steps of the clips that this policy learns from, and so from a state to its goal at most."""
    policy_clips: CountFrom10 = 4_000
    """Clips that it learns from, spread over the training split."""
    policy_updates: Count = 3_000
    """Updates of this policy."""
    policy_hidden_dim: Count = 256
    """Units of each of its three hidden layers."""


@dataclass(frozen=True, config=KEYS)
class TrackingConfig:
    """Logging with Weights & Biases."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Mode of wandb."""
    project: Text = "worldmodel"
    """Project of wandb."""


@dataclass(frozen=True, config=KEYS)
class Config:
    """The configuration of a run."""

    run_dir: PathText
    """Folder of the run."""
    seed: Seed = 0
    """Seed of the weights, the order of clips and all draws of training."""
    data: Annotated[DataConfig, Choice("videos", tag="source")] = VideosConfig()
    """Source of clips."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """The networks."""
    objective: Annotated[ObjectiveConfig, Choice("byol")] = ByolConfig()
    """Training loss."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """Training."""
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    """Forecasts that are scored."""
    planning: PlanningConfig = dataclasses.field(default_factory=PlanningConfig)
    """Choice of actions."""
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)
    """Experiment tracking."""

    @model_validator(mode="after")
    def _with_norm_of_objective(self) -> Self:
        """Replace a null `model.embedding_norm`, so that the config of a run says what it was trained with."""
        if self.model.embedding_norm is None:
            model = dataclasses.replace(self.model, embedding_norm=self.objective.default_norm)
            object.__setattr__(self, "model", model)
        return self


def outside_names(config: Config) -> dict[str, str]:
    """Return the names of code outside of the project that a config selects, by their dotted keys."""
    choices: dict[str, object] = {
        "model.encoder.name": config.model.encoder,
        "model.latent.name": config.model.latent,
        "model.editor.name": config.model.editor,
        "objective.name": config.objective,
        "planning.planner.name": config.planning.planner,
        "data.source": config.data,
        "data.format": config.data,
    }
    names = {key: getattr(choice, key.rpartition(".")[2], None) for key, choice in choices.items()}
    return {key: name for key, name in names.items() if name is not None and ":" in name}
