"""From batches of clips to the inputs of a model, and the checks of a run's data.

Legend: B clips, L segments, T frames of a segment, J segments of a history, R numbers of r, K steps of prediction, A
numbers of an action.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipelines.batches import Batch
from data_pipelines.contents import read_contents
from data_pipelines.errors import UserError
from data_pipelines.files import write_text
from data_pipelines.splits import Split
from data_pipelines.transforms import on_device, split_segments, to_float
from worldmodel.config import DataConfig, num_cameras
from worldmodel.runs.checkpoint import VideosChangedError
from worldmodel.runs.folder import RunFolder
from worldmodel.sources.source import Source

Uses = dict[tuple[Split, int], str]
"""For a split and a number of steps of prediction, the keys of the config to lower if its videos are too short."""


# ------------------------------------------------------------------------------------------------- inputs of a model


@dataclass(frozen=True)
class ClipLayout:
    """How the clips of a run are cut into segments, and the labels that its model takes.

    Attributes:
        num_segments: segments of a clip for one step of prediction, from the context on.
        history_segments: segments of a clip before the context, which the model remembers.
        num_frames: frames of a segment.
        frame_stride: source frames from one frame of a segment to the next.
        r_label: label that holds the true r of an oracle latent; None for other latents.
        r_dim: size of this label.
        action_label: per-frame label with the actions; None for a source that has none. Of a delivered frame, a batch
            has the actions up to the next delivered one, one after the other.
        action_dim: size of the action of one source frame; 0 for a passive model. The model takes `span` of them.
        num_cameras: cameras whose frames are the channels of a frame, one after the other.
        of_images: segments are related images, not successive parts of a video. Per-frame labels are measures of them.
    """

    num_segments: int
    num_frames: int
    frame_stride: int = 1
    r_label: str | None = None
    r_dim: int = 0
    action_label: str | None = None
    action_dim: int = 0
    num_cameras: int = 1
    of_images: bool = False
    history_segments: int = 0

    def segments_for(self, steps: int) -> int:
        """Return the number of segments in a clip for `steps` steps of prediction."""
        return self.history_segments + self.num_segments + steps - 1

    @property
    def span(self) -> int:
        """Source frames from the start of a segment to that of the next."""
        return self.num_frames * self.frame_stride

    @property
    def labels(self) -> set[str]:
        """The names of the labels that a run learns from."""
        names = self.r_label, self.action_label if self.action_dim else None
        return {name for name in names if name is not None}


class TrainingInputs(NamedTuple):
    """A batch as the model takes it, for K steps of prediction.

    segments [B, L, T, C, H, W], first those of the history; known_r [B, R], the true r of an oracle latent, [B, 0] for
    other latents; actions [B, J + K, A] between all of them, first those of a history of J segments. A is 0 for a model
    without actions.
    """

    segments: Tensor
    known_r: Tensor
    actions: Tensor


def training_inputs(batch: Batch, layout: ClipLayout, steps: int, device: torch.device) -> TrainingInputs:
    """Return the inputs from a batch for `steps` steps of prediction, on the device.

    Raises:
        UserError: a label is missing or has another size.
    """
    return TrainingInputs(
        segments_of(batch, layout.segments_for(steps), device),
        oracle_r(batch, layout, device),
        actions_of(batch, layout, layout.history_segments + steps, device),
    )


def without_history(batch: Batch, layout: ClipLayout) -> Batch:
    """Return a batch whose labels of frames begin with those of the context, as if clips had no history."""
    first = layout.history_segments * layout.num_frames
    labels = {name: values[:, first:] if values.ndim == 3 else values for name, values in batch["labels"].items()}
    return {**batch, "labels": labels} if first else batch


def segments_of(batch: Batch, num_segments: int, device: torch.device) -> Tensor:
    """Return the clips of a batch on the device, in [0, 1], split into segments [B, num_segments, T, C, H, W]."""
    return split_segments(to_float(on_device(batch["video"], device)), num_segments)


def oracle_r(batch: Batch, layout: ClipLayout, device: torch.device) -> Tensor:
    """Return the true r [B, R] that an oracle latent takes from the labels; [B, 0] for other latents.

    Raises:
        UserError: the videos have no such label, or one of another size.
    """
    name, labels = layout.r_label, batch["labels"]
    if name is None:
        return torch.empty(len(batch["video"]), 0, device=device)
    if name not in labels:
        has = f"they have {', '.join(sorted(labels))}" if labels else "they have none"
        raise UserError(f"model.latent=oracle needs the label model.latent.label={name!r} of each video: {has}")
    r = labels[name].float().flatten(1) if labels[name].ndim > 1 else labels[name].float()[:, None]
    if r.shape[1] != layout.r_dim:
        raise UserError(f"the label {name!r} has {r.shape[1]} numbers: set model.latent.dim={r.shape[1]}")
    return on_device(r, device)


def labelled_actions(batch: Batch, layout: ClipLayout, steps: int) -> Tensor:
    """Return the actions between the first segments of each clip, float32 [B, steps, A].

    The actions of a step are those of all source frames from a segment's last frame up to, but without, the next
    segment's last one. They lead from one segment to the next.

    Raises:
        UserError: the videos have no such label of frames.
    """
    name, num_frames, labels = layout.action_label, layout.num_frames, batch["labels"]
    if name not in labels or labels[name].ndim != 3:
        has = ", ".join(sorted(key for key, values in labels.items() if values.ndim == 3)) or "none"
        raise UserError(f"data.action_label={name!r} is not a per-frame label: these videos have {has}")
    taken = labels[name][:, num_frames - 1 : (steps + 1) * num_frames - 1].float()
    return taken.unflatten(1, (steps, num_frames)).flatten(2)


def actions_of(batch: Batch, layout: ClipLayout, steps: int, device: torch.device) -> Tensor:
    """Return the actions that the model is conditioned on, [B, steps, A]; [B, steps, 0] for a model without actions.

    Raises:
        UserError: the videos have no such label of frames, or one of another size.
    """
    if not layout.action_dim:
        return torch.empty(len(batch["video"]), steps, 0, device=device)
    actions = labelled_actions(batch, layout, steps)
    size = actions.shape[2] // layout.span
    if size != layout.action_dim:
        raise UserError(f"the label {layout.action_label!r} has {size} numbers: set model.action_dim={size}")
    return on_device(actions, device)


# ------------------------------------------------------------------------------------------------- checks of a run


def check_one_camera(data: DataConfig, video: str | Path) -> None:
    """Check that a video file can show the frames of a run.

    Raises:
        UserError: the run sees several cameras.
    """
    if (count := num_cameras(data)) > 1:
        raise UserError(
            f"video '{video}' shows one camera, and the run sees {count} (data.camera): give clips with the channels "
            "of all of them, in Python"
        )


def check_contents(source: Source, labels: Collection[str], run: Path) -> None:
    """Compare the videos and labels with those that the checkpoints of a run have learned from, and store their hashes.

    A run without stored hashes is compared from now on.

    Raises:
        VideosChangedError: a video or a label has changed, is new or is missing.
        UserError: the file of hashes is damaged or cannot be written.
    """
    now = source.contents(labels)
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


def check_splits(source: Source, labels: Collection[str], uses: Mapping[tuple[Split, int], str]) -> None:
    """Check, before any work, that every split holds the clips and labels that a run needs.

    Raises:
        UserError: no video of a split is long enough, or a label is faulty. The message names both.
    """
    for (split, steps), keys in uses.items():
        source.check_split(split, steps, labels, keys)


CUT_KEYS = "data.num_segments, data.num_frames or data.frame_stride"


def training_uses(rollout_steps: int, refine_steps: int | None) -> Uses:
    """Return the splits and steps of prediction that training and refinement need; None: without refinement."""
    uses: Uses = {("train", rollout_steps): f"objective.rollout_steps, {CUT_KEYS}"}
    if refine_steps is not None:
        uses["train", refine_steps] = f"train.refine_horizon, train.refine_rollout_steps, {CUT_KEYS}"
    return uses


def evaluation_uses(horizon: int, recalibrate: bool) -> Uses:
    """Return the splits and steps that evaluations need, for check_splits: of forecasts, and of fits.

    Fits need one step of training clips, a recalibration all.
    """
    keys = f"evaluation.horizon, {CUT_KEYS}"
    past: Uses = {("train", horizon): keys} if recalibrate else {}
    return past | {("train", 1): CUT_KEYS, ("selection", horizon): keys, ("test", horizon): keys}
