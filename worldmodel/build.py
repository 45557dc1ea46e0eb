"""From a config to networks and losses, and to the layout of their clips. Only this module takes the config apart.

The weights are drawn in the order in which the parts are built here, which is therefore fixed.
"""

from typing import Any

from data_pipelines.errors import UserError
from worldmodel import parts
from worldmodel.config import (
    Config,
    GaussianConfig,
    ImagesConfig,
    Norm,
    OracleConfig,
    SparseConfig,
    VideosConfig,
    frame_channels,
    num_cameras,
)
from worldmodel.data import ClipLayout
from worldmodel.nets.distance import Distance, NoDistance, TemporalDistance
from worldmodel.nets.editors import Editor
from worldmodel.nets.encoders import Embedder, Encoder
from worldmodel.nets.history import History, NoHistory, SegmentHistory
from worldmodel.nets.latents import Latent
from worldmodel.nets.scene import NoScene, Scene, SceneCode
from worldmodel.nets.world_model import WorldModel
from worldmodel.training.losses import SequenceTerms, TrainingModel
from worldmodel.training.objectives import Objective


def build_model(config: Config) -> WorldModel:
    """Build the networks of a config with random weights.

    Raises:
        UserError: as `build_training_model`.

    Examples:
        >>> model = worldmodel.build_model(worldmodel.load_config("demo"))
        >>> model.eval().encode(torch.rand(2, 3, 1, 64, 64)).shape  # [B, T, C, H, W] -> [B, D]
    """
    return build_training_model(config).model


def build_training_model(config: Config) -> TrainingModel:
    """Build the networks and the losses of a config with random weights.

    Raises:
        UserError: a package or a file that the config needs is missing; a class from outside cannot be loaded.
    """
    model, objective = config.model, config.objective
    kind: Any = parts.load("objective.name", objective.built_by)
    parts.check_members("objective.name", objective.built_by, kind, parts.members_of(Objective))
    if kind.needs_sphere and model.embedding_norm != "sphere":
        raise UserError(f"objective.name={objective.name} needs model.embedding_norm=sphere")
    # With a teacher, a learned scale could shrink the targets along with the predictions.
    embedder = _embedder(config, learned_scale=model.embedding_norm == "sphere" or not kind.needs_teacher)
    scene: Scene = NoScene()
    if model.scene_dim:
        norm: Norm = getattr(model.editor, "norm", "batch")
        scene = SceneCode(embedder.num_features, model.hidden_dim, model.scene_dim, norm)
    action_dim = model.action_dim * config.data.num_frames * config.data.frame_stride
    history: History = NoHistory()
    if config.data.history_segments:
        history = SegmentHistory(model.embedding_dim, action_dim, config.data.history_segments)
    latent: Any = parts.build_module(
        "model.latent.name",
        model.latent,
        Latent,
        context_dim=model.embedding_dim + scene.num_values + history.summary_dim + action_dim,
        embedding_dim=model.embedding_dim,
        hidden_dim=model.hidden_dim,
    )
    sizes = {"embedding_dim": model.embedding_dim, "hidden_dim": model.hidden_dim}
    loss: Any = parts.build_module("objective.name", objective, Objective, **sizes)
    sequence_terms = SequenceTerms(
        {
            "smoothness": objective.smoothness_weight,
            "inverse_dynamics": objective.inverse_dynamics_weight,
            "time_variance": objective.time_variance_weight,
        },
        model.embedding_dim,
        model.hidden_dim,
        action_dim,
    )
    editor = parts.build_module(
        "model.editor.name",
        model.editor,
        Editor,
        **sizes,
        latent_dim=latent.latent_dim + scene.num_values + history.summary_dim + action_dim,
        predictor=loss.needs_predictor,
    )
    distance: Distance = NoDistance()
    if model.distance_dim:
        distance = TemporalDistance(model.embedding_dim + model.scene_dim, model.hidden_dim, model.distance_dim)
    networks = WorldModel(
        embedder,
        latent,
        editor,
        scene,
        distance,
        history=history,
        action_dim=action_dim,
        seen_at=2 if _sees_beyond(config, latent) else 1,
    )
    return TrainingModel(
        networks,
        loss,
        sequence_terms,
        step_weights=objective.step_weights or (1.0,) * objective.rollout_steps,
        beta=objective.beta,
        distance_error_weight=objective.distance_error_weight,
        energy_weight=config.train.refine_energy_weight,
        energy_by_dimension=config.train.refine_energy_of == "dimensions",
        energy_samples=config.train.refine_samples,
    )


def _embedder(config: Config, *, learned_scale: bool) -> Embedder:
    model, data = config.model, config.data
    shape = {"channels": frame_channels(data), "num_frames": data.num_frames, "size_px": data.size_px}
    encoder = parts.build_module("model.encoder.name", model.encoder, Encoder, **shape)
    hidden = None if model.projector_layers is None else [model.hidden_dim] * model.projector_layers
    if hidden is None and model.embedding_dim != encoder.num_features:
        raise UserError(
            f"model.projector_layers=null: model.embedding_dim={model.embedding_dim} must be the number of features of "
            f"model.encoder={model.encoder.name}, {encoder.num_features}"
        )
    assert model.embedding_norm  # Config replaces null
    return Embedder(encoder, hidden, model.embedding_dim, model.embedding_norm, learned_scale=learned_scale)


def _sees_beyond(config: Config, latent: Latent) -> bool:
    """Return True if the posterior sees the segment after the target, so that a transition has three segments."""
    choice = config.model.latent
    sees_target = isinstance(choice, GaussianConfig | SparseConfig) and choice.posterior_sees == "target"
    return latent.sees_later and not sees_target and config.data.num_segments > 2


def clip_layout(config: Config) -> ClipLayout:
    """Return how the clips of a run are cut, and the labels that its model takes."""
    data, latent = config.data, config.model.latent
    oracle = latent if isinstance(latent, OracleConfig) else None
    return ClipLayout(
        num_segments=data.num_segments,
        history_segments=data.history_segments,
        num_frames=data.num_frames,
        frame_stride=data.frame_stride,
        r_label=(oracle.label or data.oracle_label) if oracle else None,
        r_dim=oracle.dim if oracle else 0,
        action_label=data.action_label if isinstance(data, VideosConfig) else None,
        action_dim=config.model.action_dim,
        num_cameras=num_cameras(data),
        of_images=isinstance(data, ImagesConfig),
    )
