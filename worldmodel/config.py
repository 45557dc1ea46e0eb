"""A run's configuration: frozen dataclasses, read from YAML, changed by dotted overrides, validated first of all.

pydantic checks names, types and ranges; `load_config` turns its findings into one line that names the key, the value
and what is allowed.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from data_pipelines.clips import MAX_FPS
from data_pipelines.errors import UserError
from data_pipelines.text_files import is_optional, is_text, kind_of_key, parse_yaml, read_yaml, shown
from data_pipelines.worlds.causal import NUM_FACTORS, Change
from worldmodel.nets.encoders import SCALED_ENCODERS
from worldmodel.nets.vit import VIT_SIZES
from worldmodel.training.objectives import OBJECTIVES

_KNOWN_KEYS = ConfigDict(extra="forbid")
MAX_PROBLEMS = 5  # of a config, in a message


def _usable(text: Any) -> Any:
    """Refuse text that no file, label or model can have for a name."""
    if isinstance(text, str):
        if "\0" in text:
            raise ValueError("a name cannot hold a NUL character")
        try:
            parts = [part.encode() for part in text.split("/")]
        except UnicodeEncodeError:
            raise ValueError("a name must be UTF-8") from None
        if "://" not in text and max(map(len, parts)) > 255:
            raise ValueError("a part of a name has at most 255 bytes")
    return text


Text = Annotated[str, Field(max_length=2048), BeforeValidator(_usable)]
# Upper bounds lie far above what is of use, and below what an allocator or a clock refuses: a Count is as large as the
# data, Samples are drawn or batched together, a Size is one side of a matrix, and a Repeat happens within one step.
Count = Annotated[int, Field(strict=True, gt=0, le=10**9)]
CountFrom0 = Annotated[int, Field(strict=True, ge=0, le=10**9)]
CountFrom2 = Annotated[int, Field(strict=True, ge=2, le=10**9)]
Size = Annotated[int, Field(strict=True, gt=0, le=16_384)]
SizeFrom0 = Annotated[int, Field(strict=True, ge=0, le=16_384)]
Repeat = Annotated[int, Field(strict=True, gt=0, le=1_024)]
RepeatFrom0 = Annotated[int, Field(strict=True, ge=0, le=1_024)]
Samples = Annotated[int, Field(strict=True, gt=0, le=2**20)]
SamplesFrom0 = Annotated[int, Field(strict=True, ge=0, le=2**20)]
SamplesFrom2 = Annotated[int, Field(strict=True, ge=2, le=2**20)]
Seed = Annotated[int, Field(strict=True, ge=0, le=10**18)]
Seconds = Annotated[float, Field(strict=True, gt=0, le=1e7, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]


@dataclass(frozen=True, config=_KNOWN_KEYS)
class DataConfig:
    """Where clips come from and how they are cut.

    A clip is consecutive segments of `num_frames` frames, `frame_stride` source frames apart: the context x, the target
    x+ and the later x++, which the posterior sees. Of two segments the posterior sees the target.
    """

    source: Literal["videos", "moving_mnist", "causal"] = "videos"
    """videos: files. The others are worlds of known laws, drawn afresh (data_pipelines/worlds)."""
    root: Text = "data/videos"
    """videos: a folder of video files or of tar shards, a LeRobot data set, or the URL of shards (http, s3, ...). Its
    subfolders train/, selection/ (or validation/ or val/) and test/ are the splits where they exist."""
    camera: Text | None = None
    """The camera of a LeRobot data set whose videos are read; none: the first by name."""
    remote_cache_dir: Text | None = None
    """Folder that keeps shards from a URL; none: in the user's cache."""
    remote_cache_mb: Count = 16_384
    """How much of it they may take; those used least recently go."""
    size_px: Annotated[int, Field(strict=True, ge=8, le=4_096)] = 64
    """Short side resized, centre cropped to a square of this size."""
    channels: Repeat = 3
    """1 is luma, 3 is RGB; observations of the causal world have 6."""
    num_segments: Literal[2, 3] = 3
    """Segments that one step of prediction takes; further steps of a rollout take one more each."""
    num_frames: Repeat = 3
    frame_stride: Count = 1
    clip_step: Count | None = None
    """Source frames between the starts of successive clips of a video; none: clips do not overlap."""
    fps: Annotated[float, Field(strict=True, gt=0, le=MAX_FPS)] | None = None
    """videos: resampled to this rate by their timestamps first; `frame_stride` and `clip_step` then count resampled
    frames. None: frames as stored."""
    batch_size: SamplesFrom2 = 128
    """Clips in a global batch, over all processes."""
    num_lanes: Samples = 32
    """Independent sequential readers; divides batch_size, and the number of processes divides it."""
    pool_clips: Count = 1024
    """Decoded clips that may wait in memory for shuffling, over all lanes."""
    cache_mb: CountFrom0 = 0
    """Memory of a training process for decoded clips that later epochs reuse; what does not fit is decoded again."""
    num_workers: RepeatFrom0 = 1
    """Decoding processes a training process."""
    decoder: Literal["auto", "pyav", "decord", "torchcodec"] = "auto"
    decode_timeout_s: Seconds = 60.0
    """A decoding process that takes longer for one clip is replaced, and the frame it hung at left out."""
    max_bad_fraction: Fraction = 0.1
    """Share of unreadable videos above which a run stops."""
    max_frame_px: Count = 2**26
    """videos: most pixels of a frame; a file with more is left out before it is decoded, which could take all memory.
    8K video has 2**25."""
    action_label: Text = "action"
    """With model.action_dim: the label of frames that holds the action taken at each, which leads to the next frame."""
    mnist_dir: Text | None = None
    """moving_mnist: folder with MNIST's IDX files; none: scikit-learn's bundled digits."""
    setting: Literal["A", "B"] = "A"
    """moving_mnist: how the changed axis is drawn."""
    change: Change = "heteroscedastic"
    """causal: how the factors of a pair differ."""


@dataclass(frozen=True, config=_KNOWN_KEYS)
class ModelConfig:
    """The networks (AdaSSL, arXiv 2602.02381, appendix D.5)."""

    encoder: Literal["conv3d", "resnet", "mlp", "vit_tiny", "vit_small", "vit_base", "vit_large", "pretrained"] = (
        "conv3d"
    )
    """conv3d: the published one. resnet: for frames of 128 px and up. mlp: for data.source=causal. vit_*: a vision
    transformer (worldmodel/nets/vit.py). pretrained: an image model from elsewhere on each frame
    (worldmodel/nets/pretrained.py),
    which needs the package transformers."""
    width: Annotated[float, Field(strict=True, gt=0, le=64, allow_inf_nan=False)] = 1.0
    """conv3d, resnet, mlp: multiplies the encoder's channels."""
    pooling: Literal["mean", "moments"] = "mean"
    """conv3d, resnet: what is kept of the last feature maps: their means, as published, or also the first and second
    moments of their pixels' coordinates, weighed by the map, which say where things are. The others keep means."""
    patch_px: Annotated[int, Field(strict=True, gt=0, le=4_096)] = 16
    """vit_*: side of a patch; divides data.size_px."""
    pretrained: Text | None = None
    """pretrained: a folder with config.json and model.safetensors, or the name of a model on the Hugging Face hub. A
    run loads it from there whenever it is loaded itself."""
    freeze_encoder: Flag = False
    """pretrained: the encoder stays as it is, and what follows it learns from its features."""
    checkpoint_activations: Flag = False
    """vit_*, pretrained: layers are computed again in the backward pass instead of kept: a fraction of the memory for a
    forward pass more of the encoder."""
    embedding_dim: Size = 128
    embedding_norm: Literal["sphere", "standard", "white"] = "sphere"
    """sphere: every embedding has the length sqrt(embedding_dim). standard: each dimension has mean 0 and variance 1
    over a batch, and then, but for objectives with a teacher, a learned shift and scale. white: dimensions are also
    uncorrelated."""
    hidden_dim: Size = 1024
    """Hidden units of projector, editor, prior and posterior."""
    projector_layers: Annotated[int, Field(strict=True, ge=0, le=64)] = 2
    """Hidden layers of the projector; with none the embedding is linear in the encoder's features."""
    latent: Literal["gaussian", "sparse", "oracle", "none"] = "gaussian"
    """gaussian: AdaSSL-V. sparse: AdaSSL-S. oracle: the true r from the labels. none: one future for each past."""
    latent_dim: Size = 2
    posterior_sees: Literal["later", "target"] = "later"
    """The segment, besides x, that r is inferred from: x++ or the target x+ itself."""
    action_dim: SizeFrom0 = 0
    """Numbers of an action, the label data.action_label of frames, on which editor, prior and posterior are
    conditioned; 0: the model is passive, and learns from video alone."""
    scene_dim: SizeFrom0 = 0
    """Numbers of each part of a scene code, which is read from the context's features beside its embedding: one for the
    next step alone, one that is kept over a rollout, for what does not change in a clip. Editor, prior and posterior
    are conditioned on it. It is learned in refinement (train.refine_steps). 0: the embedding is all."""
    distance_dim: SizeFrom0 = 0
    """Numbers in each of the 8 groups of a temporal distance: how many steps lead from one state to another at the
    least (worldmodel/nets/distance.py). It is learned in refinement (train.refine_steps), and what
    planning.distance=steps
    plans by. 0: there is none."""
    oracle_label: Text = "velocity_change"
    """oracle: the label that is the true r."""
    prior: Literal["mixture", "flow"] = "mixture"
    """flow: a conditional normalising flow, for a Gaussian latent."""
    prior_components: Repeat = 1
    """mixture: components of the prior; the paper has one."""
    editor: Literal["mlp", "residual", "sum", "low_rank"] = "mlp"
    """t(z, r). mlp: of both. residual: z plus an mlp of both. sum: z + r. low_rank: z plus one low-rank module for each
    coordinate of r."""
    editor_norm: Literal["batch", "layer", "none"] = "batch"
    """Inside the editor's mlp, or its predictor: batch norm and ReLU, as published, layer norm and GELU, or ReLU alone,
    which learns sharp changes, such as contacts, from far fewer updates."""


@dataclass(frozen=True, config=_KNOWN_KEYS)
class ObjectiveConfig:
    """The loss between edited and target embeddings (worldmodel/training/objectives.py), and beta times the latent's
    penalty."""

    name: Literal["byol", "jepa", "infonce", "aninfonce", "hinfonce", "vicreg", "sigreg", "ressl", "ssl_hsic"] = "byol"
    beta: NonNegativeFloat | None = None
    """Weight of KL(posterior || prior) in nats, or of the expected L0 of a sparse r; none: the objective's default."""
    beta_warmup_steps: CountFrom0 = 0
    """Steps over which beta grows linearly from zero."""
    temperature: PositiveFloat = 0.1
    """infonce, aninfonce, hinfonce: what similarities are divided by."""
    sigreg_weight: NonNegativeFloat = 0.1
    """sigreg: weight of the test of normality."""
    vicreg_weights: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (25.0, 25.0, 1.0)
    """vicreg: weights of invariance, variance and covariance."""
    smoothness_weight: NonNegativeFloat = 0.0
    """Weight of the squared distance between successive embeddings: near in time becomes near in space."""
    inverse_dynamics_weight: NonNegativeFloat = 0.0
    """Weight of the squared error of the action that is read from two successive embeddings; needs model.action_dim."""
    time_variance_weight: NonNegativeFloat = 0.0
    """Weight of a hinge that keeps each clip's embeddings apart over time, so that what is constant in a clip is not
    all that is kept."""
    distance_error_weight: NonNegativeFloat = 0.0
    """With model.distance_dim, in refinement: weight of how far predicted states are from the true ones by the temporal
    distance, so that the editor learns what matters for the way, such as walls."""
    rollout_steps: Repeat = 1
    """Segments predicted one after the other in training, each from the prediction before it; the paper has one."""
    step_weights: tuple[NonNegativeFloat, ...] | None = None
    """Weight of each of these steps in the loss, relative to the others; none: the same for all."""
    ema_momentum: Fraction = 0.996
    """byol, jepa, ressl, ssl_hsic: the teacher keeps this share of itself at each step."""
    ema_schedule: Literal["constant", "cosine"] = "constant"
    """cosine: the momentum rises to 1 over the run (BYOL)."""


@dataclass(frozen=True, config=_KNOWN_KEYS)
class TrainConfig:
    steps: Count = 75_000
    lr: PositiveFloat = 1e-4
    warmup_steps: CountFrom0 = 0
    weight_decay: NonNegativeFloat = 1e-4
    """For matrices and kernels only; one-dimensional parameters have none."""
    refine_steps: CountFrom0 = 0
    """Updates after these in which the encoder stands still and editor and latent go on learning from its embeddings of
    refine_clips clips, which are free of the noise of batch statistics (worldmodel/training/refine.py)."""
    refine_horizon: Repeat = 1
    """Steps from which a refined clip's step is drawn, with the scene code from any segment up to there; above 1 for
    model.scene_dim, so that a code still holds when it is many steps old."""
    refine_clips: CountFrom2 = 65_536
    refine_batch_size: SamplesFrom2 | None = None
    """Embedded clips in an update; none: data.batch_size."""
    refine_lr: PositiveFloat = 1e-3
    clip_norm: NonNegativeFloat = 0.0
    """Largest norm of the gradient; 0 leaves it as it is."""
    grad_accumulation: Samples = 1
    """Parts that a batch goes through the networks in, one after the other, to save memory. The update is that of the
    whole batch, whatever the objective (worldmodel/training/gradients.py), but for batch norm, which sees a part at a
    time."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """bf16 and fp16 are mixed; auto is bf16 where the processor or GPU computes it natively, otherwise fp32."""
    compile: Literal["auto", "none", "default", "max-autotune"] = "auto"
    """The encoder, which does nearly all of the work, by torch.compile in this mode; max-autotune is slow to start
    and replays CUDA graphs. auto: default on a GPU of one process, none elsewhere: on a CPU it is no faster."""
    num_threads: Repeat | None = None
    """CPU threads of a process for tensor work; none: the machine's cores, shared among its processes."""
    timeout_s: Seconds = 1800.0
    """How long processes wait for each other before the connection counts as lost. Longer than anything that the first
    one does alone: indexing videos, an evaluation, refinement."""
    log_every: Count = 50
    eval_every: Count = 1000
    checkpoint_every: Count = 1000
    keep_checkpoints: Count = 2
    """Latest checkpoints kept, besides the best."""


@dataclass(frozen=True, config=_KNOWN_KEYS)
class EvaluationConfig:
    """The Energy Score protocol: numbers of clips, all of disjoint identities."""

    horizon: Repeat = 1
    """Segments that are forecast."""
    label: Text | None = None
    """Label of frames, a list of numbers each, that is forecast where no law is known; none: embeddings only."""
    queries: SamplesFrom2 = 1024
    num_samples: SamplesFrom2 = 64
    """Sampled futures a query."""
    law_samples: SamplesFrom2 = 128
    """Draws of the true law a query, where it is known."""
    fit_clips: CountFrom2 = 8192
    """Training clips that the readout is fitted on."""
    selection_clips: CountFrom2 = 2048
    """Clips that the readout's strength of regularisation is chosen on."""
    seed: Seed = 20_000
    """Fixes the queries, the draws of the law and the sampled futures."""


@dataclass(frozen=True, config=_KNOWN_KEYS)
class PlanningConfig:
    """How actions are chosen (worldmodel/planning/planners.py); a decision compares iterations * candidates
    rollouts."""

    planner: Literal["cem", "icem", "mppi"] = "icem"
    horizon: Repeat = 20
    """Actions in a sequence."""
    candidates: Samples = 300
    """Sequences compared at a time."""
    iterations: Repeat = 5
    elites: Samples = 30
    """cem, icem: the cheapest candidates, which the next ones are drawn after."""
    init_std: PositiveFloat = 0.5
    """Standard deviation of a candidate's actions around the mean, in the first iteration; mppi: in all."""
    temperature: PositiveFloat = 0.3
    """mppi: what costs are divided by, in standard deviations of the costs of an episode's candidates."""
    cost: Literal["sum", "last"] = "sum"
    """The distance to the goal, summed over the steps of the horizon or of the last alone."""
    distance: Literal["embedding", "steps"] = "embedding"
    """How far a state is from the goal. embedding: the squared distance of embeddings, over their dimensions. steps:
    the temporal distance of a model with model.distance_dim."""
    num_samples: SamplesFrom0 = 0
    """Futures that are imagined for each candidate, by draws from the prior; 0: one, at the prior's mean."""
    risk_quantile: Fraction | None = None
    """The quantile of these futures' costs that counts; none: their mean."""
    noise_beta: NonNegativeFloat = 2.0
    """icem: noise of frequency f has the power f^-noise_beta; 0 is white, and larger is smoother in time."""
    action_set: Literal["ball", "box"] = "ball"
    """Where actions lie. ball: their norm is at most 1. box: so is each coordinate."""


@dataclass(frozen=True, config=_KNOWN_KEYS)
class TrackingConfig:
    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: Text = "worldmodel"


@dataclass(frozen=True, config=_KNOWN_KEYS)
class Config:
    run_dir: Text
    seed: Seed = 0
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    planning: PlanningConfig = dataclasses.field(default_factory=PlanningConfig)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)


# The one way of cutting and showing clips to which that world's labels belong.
FORMATS: dict[str, dict[str, int]] = {
    "videos": {},
    "moving_mnist": {"size_px": 64, "channels": 1, "num_segments": 3, "num_frames": 3, "frame_stride": 1},
    "causal": {"channels": NUM_FACTORS, "num_segments": 3, "num_frames": 1},
}


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, apply overrides such as "train.lr=1e-3", validate.

    Raises:
        UserError: no such file, broken YAML, an unknown key, a wrong type, a value out of range.
    """
    path = Path(path)
    tree = read_tree(path)
    for override in overrides:
        apply_override(tree, override)
    return validate(tree, source=str(path))


def read_tree(path: Path) -> dict[str, Any]:
    """Return the nested dicts of a config file, not yet validated.

    Raises:
        UserError: no such file, or it does not hold keys and values in YAML.
    """
    tree = read_yaml(path, Config)
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold keys and values, not {type(tree).__name__}")
    return tree


def validate(tree: Mapping[str, Any], source: str) -> Config:
    """Turn nested dicts into a Config; `source` names them in errors."""
    try:
        config = TypeAdapter(Config).validate_python(tree)
    except ValidationError as error:
        problems = [_explain(entry) for entry in error.errors(include_url=False)]
        more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        raise UserError(f"{source}: " + "; ".join([*problems[:MAX_PROBLEMS], *more])) from error
    _check_together(config, source)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dicts of what YAML and JSON know: tuples become lists."""
    return _with_lists(dataclasses.asdict(config))


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def _with_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_lists(part) for key, part in value.items()}
    return list(value) if isinstance(value, tuple) else value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one key of nested dicts from "a.b=value".

    The value of a key that holds text is that text as it is, whatever it would be in YAML; for one that may be null,
    `null` and nothing at all are null. Any other value is YAML.

    Raises:
        UserError: the override has another form, or the value is not valid YAML.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {shown(override)} must read key=value, such as train.steps=100")
    *parents, leaf = key.split(".")
    node, kind = tree, Config
    for parent in parents:
        node, kind = node.setdefault(parent, {}), kind_of_key(kind, parent)
        if not isinstance(node, dict):
            raise UserError(f"override {shown(override)}: {shown(parent)} is a value, not a group of keys")
    node[leaf] = _override_value(override, text, kind_of_key(kind, leaf))


def _override_value(override: str, text: str, kind: Any) -> Any:
    if is_text(kind):
        return None if is_optional(kind) and text in ("", "null") else text
    try:
        return parse_yaml(text, kind)
    except yaml.YAMLError as error:
        raise UserError(f"override {shown(override)}: the value is not valid YAML") from error


def _explain(entry: Any) -> str:
    """One pydantic error as a phrase: key, value, what is allowed."""
    location = [str(part) for part in entry["loc"]]
    key = _words(".".join(location))
    if entry["type"] == "unexpected_keyword_argument":
        allowed = ", ".join(_keys_at(location[:-1]))
        return f"unknown key {key}={shown(entry['input'])}; allowed here: {allowed}"
    if entry["type"] in ("missing", "missing_argument"):
        return f"missing key {key}"
    message = entry["msg"].removeprefix("Value error, ")
    return f"{key}={shown(entry['input'])}: {message[0].lower()}{message[1:]}"


def _words(key: str) -> str:
    """The key, as Python would write it where it has characters that no key has."""
    return key if re.fullmatch(r"[\w.]{1,80}", key) else shown(key)


def _keys_at(parents: list[str]) -> list[str]:
    node: Any = Config
    for parent in parents:
        node = next(field.type for field in dataclasses.fields(node) if field.name == parent)
    return [field.name for field in dataclasses.fields(node)]


def _check_together(config: Config, source: str) -> None:
    """Conditions between keys, which no single key's type can state."""
    for problem in _contradictions(config):
        raise UserError(f"{source}: {problem}")


def _encoder_contradictions(config: Config) -> Iterator[str]:
    data, model = config.data, config.model
    name = f"model.encoder={model.encoder}"
    is_vit, is_pretrained = model.encoder in VIT_SIZES, model.encoder == "pretrained"
    if model.pooling == "moments" and model.encoder not in ("conv3d", "resnet"):
        yield f"model.pooling=moments is for model.encoder=conv3d and resnet: {name} needs mean"
    if model.width != 1 and model.encoder not in SCALED_ENCODERS:
        yield f"model.width={model.width:g} multiplies the channels of {', '.join(SCALED_ENCODERS)}: {name} needs 1"
    if is_vit and data.size_px % model.patch_px:
        yield f"{name}: data.size_px={data.size_px} must be a multiple of model.patch_px={model.patch_px}"
    if is_pretrained and not model.pretrained:
        yield f"{name} needs model.pretrained: a folder of safetensors, or a model's name on the Hugging Face hub"
    if model.pretrained and not is_pretrained:
        yield f"model.pretrained={model.pretrained} is for model.encoder=pretrained, not {model.encoder}"
    if model.freeze_encoder and not is_pretrained:
        yield f"model.freeze_encoder would keep random weights: {name} must be pretrained"
    if model.checkpoint_activations and not (is_vit or is_pretrained):
        yield f"model.checkpoint_activations is for model.encoder=vit_* and pretrained, not {model.encoder}"
    if model.checkpoint_activations and model.freeze_encoder:
        yield "model.checkpoint_activations saves nothing with model.freeze_encoder, which keeps no activations"


def _contradictions(config: Config) -> Iterator[str]:
    data, model, objective = config.data, config.model, OBJECTIVES[config.objective.name]
    name = f"objective.name={config.objective.name}"
    for key, value in flatten(to_dict(config)).items():
        if value == "":
            yield f"{key} is empty: give it a value"
    if data.batch_size % data.num_lanes:
        yield f"data.batch_size={data.batch_size} must be a multiple of data.num_lanes={data.num_lanes}"
    for key, value in FORMATS[data.source].items():
        if getattr(data, key) != value:
            yield f"data.source={data.source} needs data.{key}={value}, not {getattr(data, key)}"
    if data.source == "videos" and data.channels not in (1, 3):
        yield f"data.channels={data.channels}: a video has 1 (luma) or 3 (RGB)"
    if (model.encoder == "mlp") != (data.source == "causal"):
        yield f"model.encoder={model.encoder} does not fit data.source={data.source}: mlp is for causal, and only it"
    yield from _encoder_contradictions(config)
    horizons = config.objective.rollout_steps, config.train.refine_horizon, config.evaluation.horizon
    if data.source != "videos" and max(horizons) > 1:
        yield (
            f"data.source={data.source} has one step: objective.rollout_steps, train.refine_horizon and "
            "evaluation.horizon must be 1"
        )
    if model.action_dim and (data.source != "videos" or data.frame_stride != 1 or data.fps is not None):
        yield (
            f"model.action_dim={model.action_dim} needs the action at every frame: data.source=videos with "
            "data.frame_stride=1 and no data.fps"
        )
    if model.action_dim and model.editor not in ("mlp", "residual"):
        yield f"model.editor={model.editor} takes no actions: with model.action_dim it must be mlp or residual"
    if model.scene_dim and model.editor not in ("mlp", "residual"):
        yield f"model.editor={model.editor} takes no scene code: with model.scene_dim it must be mlp or residual"
    for key, dim in (("scene_dim", model.scene_dim), ("distance_dim", model.distance_dim)):
        if dim and not config.train.refine_steps:
            yield f"model.{key}={dim} is learned in refinement: it needs train.refine_steps"
    if config.objective.distance_error_weight and not model.distance_dim:
        yield "objective.distance_error_weight weighs errors by a distance: it needs model.distance_dim"
    if config.planning.distance == "steps" and not model.distance_dim:
        yield "planning.distance=steps plans by a distance in steps: it needs model.distance_dim"
    if config.objective.inverse_dynamics_weight and not model.action_dim:
        yield "objective.inverse_dynamics_weight reads actions: it needs model.action_dim"
    if model.latent == "oracle" and max(config.objective.rollout_steps, config.train.refine_horizon) > 1:
        yield "model.latent=oracle knows the r of one step: objective.rollout_steps and train.refine_horizon must be 1"
    weights = config.objective.step_weights
    if weights is not None and (len(weights) != config.objective.rollout_steps or not sum(weights)):
        yield (
            f"objective.step_weights={list(weights)} needs a number for each of "
            f"objective.rollout_steps={config.objective.rollout_steps} steps, not all of them 0"
        )
    if model.editor == "sum" and model.latent != "none" and model.latent_dim != model.embedding_dim:
        yield (
            f"model.editor=sum adds r to the embedding: model.latent_dim={model.latent_dim} must equal "
            f"model.embedding_dim={model.embedding_dim}"
        )
    if model.prior == "flow" and model.latent in ("sparse", "oracle"):
        yield (
            f"model.prior=flow is for model.latent=gaussian: with model.latent={model.latent} r is exactly zero at "
            "times, and a flow has no density for that"
        )
    if config.planning.elites >= config.planning.candidates:
        yield f"planning.elites={config.planning.elites} must be below planning.candidates={config.planning.candidates}"
    if objective.needs_sphere and model.embedding_norm != "sphere":
        yield f"{name} compares directions only and leaves lengths undetermined: it needs model.embedding_norm=sphere"
    if config.data.batch_size < 2 * config.train.grad_accumulation:
        yield (
            f"data.batch_size={config.data.batch_size} is too small for train.grad_accumulation="
            f"{config.train.grad_accumulation} parts of at least 2 clips"
        )
