"""Conditions between keys, which the type of a single key cannot state."""

import math
from collections.abc import Iterator
from typing import get_args

from data_pipelines.text_files import shown
from worldmodel.config.data import ImagesConfig, SameImageConfig, VideosConfig, frame_channels, num_cameras
from worldmodel.config.model import (
    EditorConfig,
    External,
    GaussianConfig,
    LinearEditorConfig,
    NoLatentConfig,
    OracleConfig,
    PretrainedConfig,
    ResNetConfig,
    SumEditorConfig,
    VitConfig,
)
from worldmodel.config.objective import ResslConfig
from worldmodel.config.sections import CategoricalConfig, CemConfig, Config, IcemConfig, MeanRiskConfig

TAKING_CONDITIONS = " or ".join(
    kind.name for kind in get_args(EditorConfig) if getattr(kind, "takes_conditions", False)
)
"""The editors that take actions, a scene code and a history alongside r."""


def contradictions(config: Config) -> Iterator[str]:
    """Yield what is wrong with a config whose keys are valid one by one, as phrases that name keys and values."""
    yield from _of_data(config)
    yield from _of_augmentation(config)
    yield from _of_encoder(config)
    yield from _of_encoder_cache(config)
    yield from _of_latent_and_editor(config)
    yield from _of_history(config)
    yield from _of_steps(config)
    yield from _of_refinement(config)
    yield from _of_weights(config)
    yield from _of_planning(config)


def cautions(config: Config) -> Iterator[str]:
    """Yield what the descriptions of the keys advise against in a valid config, as sentences."""
    encoder, data, train = config.model.encoder, config.data, config.train
    if train.steps < train.warmup_steps:
        yield (
            f"train.warmup_steps={train.warmup_steps} is more than train.steps={train.steps}: the learning rate "
            f"ends at {train.steps / train.warmup_steps:.2g} of train.lr"
        )
    if isinstance(encoder, ResNetConfig) and data.size_px < encoder.least_px:
        yield (
            f"model.encoder={encoder.name} is meant for frames of {encoder.least_px} px and more, but "
            f"data.size_px={data.size_px}: conv3d suits small frames"
        )
    if isinstance(data, ImagesConfig) and data.num_segments == 3 and not data.augment.active:
        yield (
            "data.num_segments=3 without data.augment: the later image, which the posterior sees, is the target itself"
        )
    if isinstance(config.objective, ResslConfig) and 2 * config.model.embedding_dim > config.data.batch_size:
        yield (
            f"objective.name=ressl compares a prediction with the other {config.data.batch_size - 1} clips of a batch, "
            f"which do not determine {config.model.embedding_dim} dimensions well: set model.embedding_dim to at most "
            "half of data.batch_size"
        )


def _of_data(config: Config) -> Iterator[str]:
    data, accumulation = config.data, config.train.grad_accumulation
    if isinstance(data, VideosConfig):
        if isinstance(data.camera, tuple) and not (data.camera and all(data.camera)):
            yield "data.camera is empty, or has an empty name: give it the names of cameras, or null"
        if twice := [name for name in data.cameras if data.cameras.count(name) > 1]:
            yield f"data.camera={shown(list(data.cameras))} has {shown(twice[0])} twice: name each camera once"
    if isinstance(data, VideosConfig) and data.batch_size % data.num_lanes:
        yield f"data.batch_size={data.batch_size} must be a multiple of data.num_lanes={data.num_lanes}"
    if data.batch_size < 2 * accumulation:
        yield (
            f"data.batch_size={data.batch_size} is too small for train.grad_accumulation={accumulation} micro-batches "
            "of at least 2 clips"
        )


def _of_augmentation(config: Config) -> Iterator[str]:
    data, model, augment = config.data, config.model, config.data.augment
    if isinstance(data, ImagesConfig) and isinstance(data.relation, SameImageConfig) and not augment.active:
        yield "data.relation=same_image needs data.augment: without it, both images of a pair are the same"
    if augment.changes_chroma and data.channels != 3:
        changes = " and ".join(f"data.augment.{key}" for key in ("saturation", "hue") if getattr(augment, key))
        yield f"{changes}: colour needs data.channels=3, not {data.channels}"
    for name, (left, right, top, bottom) in augment.position_labels.items():
        if left == right or top == bottom:
            yield (
                f"data.augment.position_labels: {shown(name)} has the same value at two opposite edges of the frame: "
                "give its values at the left, right, top and bottom edge"
            )
    listed = "list the label in data.augment.position_labels if it holds positions in the frame, otherwise"
    actions = data.action_label if isinstance(data, VideosConfig) and model.action_dim else None
    if actions and augment.flip != "none" and actions not in augment.position_labels:
        yield (
            f"data.augment.flip={augment.flip} mirrors the frames but not the actions, the label {shown(actions)}: "
            f"{listed} set data.augment.flip=none"
        )
    r = (model.latent.label or data.oracle_label) if isinstance(model.latent, OracleConfig) else None
    if r and augment.changes_geometry and r not in augment.position_labels:
        yield (
            f"data.augment moves pixels but not the r of model.latent=oracle, the label {shown(r)}: {listed} set "
            "data.augment.crop_min_scale=1 and data.augment.flip=none"
        )


def _of_encoder(config: Config) -> Iterator[str]:
    data, encoder = config.data, config.model.encoder
    name = f"model.encoder={encoder.name}"
    if isinstance(encoder, External):
        return
    if data.content is not None and encoder.content != data.content:
        yield f"{name} does not fit data.source={data.source}: mlp is for causal, and only for it"
    if isinstance(encoder, VitConfig) and data.size_px % encoder.patch_px:
        yield f"{name}: data.size_px={data.size_px} must be a multiple of model.encoder.patch_px={encoder.patch_px}"
    if isinstance(encoder, PretrainedConfig):
        if num_cameras(data) > 1 or frame_channels(data) not in (1, 3):
            cameras = f"{num_cameras(data)} cameras of " if num_cameras(data) > 1 else ""
            yield f"{name} takes frames of 1 or 3 channels, not {cameras}{data.channels}: choose another encoder"
        if not encoder.path:
            yield f"{name} needs model.encoder.path: a folder of safetensors, or a model's name on the Hugging Face hub"
        if encoder.checkpoint_activations and encoder.freeze:
            yield (
                "model.encoder.checkpoint_activations saves nothing with model.encoder.freeze, which stores no "
                "activations"
            )


def _of_encoder_cache(config: Config) -> Iterator[str]:
    data, encoder = config.data, config.model.encoder
    if config.train.encoder_cache is None:
        return
    key = "train.encoder_cache"
    if not (isinstance(encoder, PretrainedConfig) and encoder.freeze):
        yield f"{key} is for a frozen encoder: it needs model.encoder=pretrained and model.encoder.freeze=true"
    if not isinstance(data, VideosConfig):
        yield f"{key} needs data.source=videos: data.source={data.source} has no files whose segments come again"
    if active := ", ".join(f"data.augment.{name}={value}" for name, value in data.augment.active.items()):
        yield f"{key} stores segments as they are: leave out {active}, or this key"
    if config.train.start_from is not None:
        yield f"{key} holds the output of the encoder at model.encoder.path, not in train.start_from: set only one"


def _of_latent_and_editor(config: Config) -> Iterator[str]:
    model, data = config.model, config.data
    latent, editor = model.latent, model.editor
    if isinstance(latent, OracleConfig) and latent.label is None and data.oracle_label is None:
        yield f"model.latent=oracle needs model.latent.label, the label of data.source={data.source} that holds r"
    if model.action_dim and not (isinstance(data, VideosConfig) and data.fps is None):
        yield (
            f"model.action_dim={model.action_dim} needs the action at every frame: data.source=videos, without data.fps"
        )
    if isinstance(editor, External):
        return
    if model.action_dim and not editor.takes_conditions:
        yield f"model.editor={editor.name} takes no actions: with model.action_dim it must be {TAKING_CONDITIONS}"
    if model.scene_dim and not editor.takes_conditions:
        yield f"model.editor={editor.name} takes no scene code: with model.scene_dim it must be {TAKING_CONDITIONS}"
    dim = None if isinstance(latent, NoLatentConfig | External) else latent.dim
    if isinstance(editor, SumEditorConfig) and dim not in (None, model.embedding_dim):
        yield (
            f"model.editor=sum adds r to the embedding: model.latent.dim={dim} must equal "
            f"model.embedding_dim={model.embedding_dim}"
        )
    if isinstance(editor, LinearEditorConfig) and isinstance(latent, NoLatentConfig):
        yield "model.editor=linear changes the embedding by r alone: it needs a latent"


def _of_history(config: Config) -> Iterator[str]:
    latent, editor = config.model.latent, config.model.editor
    if not config.data.history_segments:
        return
    key = f"data.history_segments={config.data.history_segments}"
    if not isinstance(editor, External) and not editor.takes_conditions:
        yield f"model.editor={editor.name} takes no history: with {key} it must be {TAKING_CONDITIONS}"
    if isinstance(latent, OracleConfig):
        yield f"model.latent=oracle knows the r of the first segment of a clip: with {key} that is not the context"
    if isinstance(latent, GaussianConfig) and latent.prior == "linear":
        yield f"model.latent.prior=linear is linear in one embedding: with {key} choose mixture or flow"


def _of_steps(config: Config) -> Iterator[str]:
    data, objective = config.data, config.objective
    trained = max(objective.rollout_steps, config.train.refine_horizon, config.train.refine_rollout_steps or 1)
    if data.max_steps is not None and max(trained, config.evaluation.horizon) > data.max_steps:
        yield (
            f"data.source={data.source} has one step: objective.rollout_steps, train.refine_horizon and "
            "evaluation.horizon must be 1"
        )
    if isinstance(config.model.latent, OracleConfig) and trained > 1:
        yield "model.latent=oracle knows the r of one step: objective.rollout_steps and train.refine_horizon must be 1"
    weights = objective.step_weights
    if weights is not None and not (len(weights) == objective.rollout_steps and 0 < sum(weights) < math.inf):
        yield (
            f"objective.step_weights={shown(list(weights))} needs a number for each of "
            f"objective.rollout_steps={objective.rollout_steps} steps, with a finite sum above 0"
        )


def _of_refinement(config: Config) -> Iterator[str]:
    model, train = config.model, config.train
    for key, dim in (("scene_dim", model.scene_dim), ("distance_dim", model.distance_dim)):
        if dim and not train.refine_steps:
            yield f"model.{key}={dim} is learned in refinement: it needs train.refine_steps"
    if train.refine_energy_of != "embedding" and not train.refine_energy_weight:
        score = f"train.refine_energy_of={train.refine_energy_of}"
        yield f"{score} is a choice of score: it needs train.refine_energy_weight"


def _of_weights(config: Config) -> Iterator[str]:
    model, objective = config.model, config.objective
    if objective.distance_error_weight and not model.distance_dim:
        yield "objective.distance_error_weight weighs errors by a distance: it needs model.distance_dim"
    if objective.inverse_dynamics_weight and not model.action_dim:
        yield "objective.inverse_dynamics_weight reads actions: it needs model.action_dim"
    if objective.needs_sphere and model.embedding_norm != "sphere":
        yield (
            f"objective.name={objective.name} compares directions only and leaves lengths undetermined: it needs "
            "model.embedding_norm=sphere"
        )


def _of_planning(config: Config) -> Iterator[str]:
    planning, planner = config.planning, config.planning.planner
    if planning.distance == "steps" and not config.model.distance_dim:
        yield "planning.distance=steps plans by a distance in steps: it needs model.distance_dim"
    if not isinstance(planning.risk, MeanRiskConfig) and not planning.num_samples:
        yield f"planning.risk={planning.risk.name} compares several futures: it needs planning.num_samples"
    if isinstance(planner, CemConfig | IcemConfig | CategoricalConfig) and planner.elites >= planning.candidates:
        yield (f"planning.planner.elites={planner.elites} must be below planning.candidates={planning.candidates}")
    discrete = isinstance(planner, CategoricalConfig)
    if not isinstance(planner, External) and discrete != (planning.action_set == "one_hot"):
        yield (
            f"planning.planner={planner.name} does not search planning.action_set={planning.action_set}: one_hot is "
            "for categorical, ball and box for the others"
        )
