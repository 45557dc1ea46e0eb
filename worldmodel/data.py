"""From batches of clips to the inputs of a model, and the checks of a run's data.

Legend: B clips, S segments, T frames of a segment, R numbers of r, K steps of prediction, A numbers of an action.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipelines.batches import Batch
from data_pipelines.contents import Contents, read_contents
from data_pipelines.errors import UserError
from data_pipelines.files import write_text
from data_pipelines.splits import Split
from data_pipelines.transforms import on_device, split_segments, to_float
from worldmodel.config import Config, DataConfig, OracleConfig, VideosConfig
from worldmodel.runs.checkpoint import VideosChangedError
from worldmodel.runs.folder import RunFolder
from worldmodel.sources.source import Source

Uses = dict[tuple[Split, int], str]
"""For a split and a number of steps of prediction, the keys of the config to lower if its videos are too short."""


# ------------------------------------------------------------------------------------------------- inputs of a model


class TrainingInputs(NamedTuple):
    """A batch as the model takes it, for K steps of prediction.

    segments [B, L, T, C, H, W]; known_r [B, R], the true r of an oracle latent, [B, 0] for other latents; actions
    [B, K, A], [B, K, 0] for a model without actions.
    """

    segments: Tensor
    known_r: Tensor
    actions: Tensor


def training_inputs(batch: Batch, config: Config, steps: int, device: torch.device) -> TrainingInputs:
    """Return the inputs from a batch for `steps` steps of prediction, on the device.

    Raises:
        UserError: a label is missing or has another size.
    """
    return TrainingInputs(
        segments_of(batch, num_segments(config, steps), device),
        oracle_r(batch, config, device),
        actions_of(batch, config, steps, device),
    )


def segments_of(batch: Batch, num_segments: int, device: torch.device) -> Tensor:
    """Return the clips of a batch on the device, in [0, 1], split into segments [B, num_segments, T, C, H, W]."""
    return split_segments(to_float(on_device(batch["video"], device)), num_segments)


def num_segments(config: Config, steps: int) -> int:
    """Return the number of segments in a clip for `steps` steps of prediction."""
    return config.data.num_segments + steps - 1


def segment_span(data: DataConfig) -> int:
    """Return the number of source frames from the start of a segment to that of the next."""
    return data.num_frames * data.frame_stride


def oracle_r(batch: Batch, config: Config, device: torch.device) -> Tensor:
    """Return the true r [B, R] that an oracle latent takes from the labels; [B, 0] for other latents.

    Raises:
        UserError: the videos have no such label, or one of another size.
    """
    name, labels = oracle_label(config), batch["labels"]
    if name is None:
        return torch.empty(len(batch["video"]), 0, device=device)
    if name not in labels:
        has = f"they have {', '.join(sorted(labels))}" if labels else "they have none"
        raise UserError(f"model.latent=oracle needs the label model.latent.label={name!r} of each video: {has}")
    r = labels[name].float().flatten(1) if labels[name].ndim > 1 else labels[name].float()[:, None]
    assert isinstance(config.model.latent, OracleConfig)
    if r.shape[1] != config.model.latent.dim:
        raise UserError(f"the label {name!r} has {r.shape[1]} numbers: set model.latent.dim={r.shape[1]}")
    return on_device(r, device)


def oracle_label(config: Config) -> str | None:
    """Return the label that holds the true r of an oracle latent; None for other latents."""
    latent = config.model.latent
    return (latent.label or config.data.oracle_label) if isinstance(latent, OracleConfig) else None


def labelled_actions(batch: Batch, config: Config, steps: int) -> Tensor:
    """Return the actions between the first segments of each clip, float32 [B, steps, A].

    The actions of a step are those of a segment's last frame up to the next segment's last but one. They lead from one
    segment to the next.

    Raises:
        UserError: the videos have no such label of frames.
    """
    data, labels = config.data, batch["labels"]
    assert isinstance(data, VideosConfig), "the config is checked for this"
    name, num_frames = data.action_label, data.num_frames
    if name not in labels or labels[name].ndim != 3:
        has = ", ".join(sorted(key for key, values in labels.items() if values.ndim == 3)) or "none"
        raise UserError(f"data.action_label={name!r} is not a per-frame label: these videos have {has}")
    taken = labels[name][:, num_frames - 1 : (steps + 1) * num_frames - 1].float()
    return taken.unflatten(1, (steps, num_frames)).flatten(2)


def actions_of(batch: Batch, config: Config, steps: int, device: torch.device) -> Tensor:
    """Return the actions that the model is conditioned on, [B, steps, A]; [B, steps, 0] for a model without actions.

    Raises:
        UserError: the videos have no such label of frames, or one of another size.
    """
    if not config.model.action_dim:
        return torch.empty(len(batch["video"]), steps, 0, device=device)
    actions = labelled_actions(batch, config, steps)
    size = actions.shape[2] // config.data.num_frames
    if size != config.model.action_dim:
        assert isinstance(config.data, VideosConfig)
        raise UserError(f"the label {config.data.action_label!r} has {size} numbers: set model.action_dim={size}")
    return on_device(actions, device)


# ------------------------------------------------------------------------------------------------- checks of a run


def training_labels(config: Config) -> set[str]:
    """Return the names of the labels that a run learns from."""
    label = oracle_label(config)
    labels = set() if label is None else {label}
    if config.model.action_dim:
        assert isinstance(config.data, VideosConfig)
        labels.add(config.data.action_label)
    return labels


def training_contents(source: Source, config: Config) -> Contents | None:
    """Return hashes of the videos and labels that a run learns from; None for worlds without files."""
    return source.contents(training_labels(config))


def check_contents(source: Source, config: Config, run: Path) -> None:
    """Compare the videos and labels with those that the checkpoints of a run have learned from, and store their hashes.

    A run without stored hashes is compared from now on.

    Raises:
        VideosChangedError: a video or a label has changed, is new or is missing.
        UserError: the file of hashes is damaged or cannot be written.
    """
    now = training_contents(source, config)
    if now is None:
        return
    folder = RunFolder(run)
    path = folder.contents
    before = read_contents(path) if folder.checkpoint_index.exists() else None
    if before is None:
        try:
            write_text(path, "".join(f"{line}\n" for line in now.lines()))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
    elif change := now.change_since(before):
        raise VideosChangedError(f"the videos of {run} have changed since its checkpoint: {change}")


def check_splits(source: Source, config: Config, uses: Mapping[tuple[Split, int], str]) -> None:
    """Check, before any work, that every split holds the clips and labels that a run needs.

    Raises:
        UserError: no video of a split is long enough, or a label is faulty. The message names both.
    """
    labels = training_labels(config) | ({config.evaluation.label} if config.evaluation.label else set())
    for (split, steps), keys in uses.items():
        source.check_split(split, steps, labels, keys)


CUT_KEYS = "data.num_segments, data.num_frames or data.frame_stride"


def training_uses(config: Config) -> Uses:
    """Return the splits and steps that training and refinement need, for check_splits."""
    uses: Uses = {("train", config.objective.rollout_steps): f"objective.rollout_steps, {CUT_KEYS}"}
    if config.train.refine_steps:
        uses["train", config.train.refine_horizon] = f"train.refine_horizon, {CUT_KEYS}"
    return uses


def evaluation_uses(config: Config) -> Uses:
    """Return the splits and steps that evaluations need, for check_splits: of forecasts, and of fits of one step."""
    horizon = f"evaluation.horizon, {CUT_KEYS}"
    return {
        ("train", 1): CUT_KEYS,
        ("selection", config.evaluation.horizon): horizon,
        ("test", config.evaluation.horizon): horizon,
    }
