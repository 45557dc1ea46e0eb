"""Embed the clips of a split: the loop through which evaluations, surprise and planning see videos.

Legend: B clips of a batch, N clips, L segments of a clip, T frames of a segment, C channels, H = W pixels, F features
of the encoder, D embedding dimensions, Z numbers of scene code and history, R latent dimensions, A numbers of an
action, K dimensions of the quantity. Horizon steps are written out as `horizon`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm

from data_pipelines.batches import Batch
from data_pipelines.errors import UserError
from data_pipelines.splits import Split
from data_pipelines.worlds.law import Law
from worldmodel.data import ClipLayout, actions_of, oracle_r, segments_of, without_history
from worldmodel.nets.world_model import WorldModel
from worldmodel.sources.source import EVALUATION_BATCH, MIN_CLIPS, ClipPlaces, Source
from worldmodel.training.losses import TrainingModel


@dataclass(frozen=True)
class Networks:
    """A run's model, the network that embeds targets, the device of both, the source of its clips and their layout.

    Surprise and influence also need the losses that the model was trained with. Surprise also needs, for its
    stillness, the motion of ordinary segments in rising order, [N] (worldmodel.evaluation.surprise).
    """

    model: WorldModel
    target_encoder: nn.Module
    device: torch.device
    source: Source
    layout: ClipLayout
    training: TrainingModel | None = None
    ordinary_motion: Tensor | None = None

    @property
    def shares_encoder(self) -> bool:
        """True if the model's own encoder embeds the targets, so that no teacher exists."""
        return self.target_encoder is self.model.embedder


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Use modules in evaluation mode and without gradients; restore their modes afterwards."""
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)


# ----------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class EmbeddedBatch:
    """A batch of clips with the embedding of each clip's context, on the device of the networks.

    segments [B, L, T, C, H, W] in [0, 1], and the labels of frames in `batch`, begin with the context. features [B, F]
    of the encoder and state [B, D + Z], from which the model predicts, are those of the context. The state remembers
    the segments before it.
    """

    networks: Networks
    batch: Batch
    segments: Tensor
    features: Tensor
    state: Tensor

    def context_as_target(self) -> Tensor:
        """Return the context's embedding in the space of targets, [B, D]."""
        networks = self.networks
        if networks.shares_encoder:
            return networks.model.embedding_of(self.state)
        return networks.target_encoder(self.segments[:, 0])

    def targets(self, horizon: int) -> Tensor:
        """Return the embeddings of the next segments in the space of targets, [B, horizon, D]."""
        video = self.segments[:, 1 : horizon + 1].flatten(0, 1)
        return self.networks.target_encoder(video).unflatten(0, (-1, horizon))


def embed_batches(networks: Networks, batches: Iterable[Batch], steps: int) -> Iterator[EmbeddedBatch]:
    """Embed the contexts of clips for `steps` steps of prediction, batch after batch. Call it on `frozen` networks."""
    model, layout, device = networks.model, networks.layout, networks.device
    num_before = layout.history_segments
    for batch in batches:
        before, segments = segments_of(batch, layout.segments_for(steps), device).tensor_split([num_before], dim=1)
        features = model.embedder.features(segments[:, 0])
        state = model.state_of(features)
        if num_before:
            state = model.remember_segments(state, before, actions_of(batch, layout, num_before, device))
        yield EmbeddedBatch(networks, without_history(batch, layout), segments, features, state)


# ------------------------------------------------------------------------------------------------------------ splits


@dataclass(frozen=True)
class EmbeddedSplit:
    """N clips of one split after the encoders, on the CPU.

    state [N, D + Z] is the model's embedding of the context segment, followed by scene code and history. backbone
    [N, F] are the encoder's features of it. persistence [N, D] and targets [N, horizon, D] are the embeddings of the
    context and of each later segment in the space of targets. r [N, R] is inferred as in training; its penalty [N] is
    None if the latent has none. actions [N, horizon, A] condition the model; A is 0 for a passive one. frames uint8
    [<= N, (1 + horizon) * T, C, H, W] are the pixels of the first clips. extrapolated [N, horizon, K] continues the
    motion seen in the context; None without a law. places are those of the clips in their videos.
    """

    state: Tensor
    backbone: Tensor
    persistence: Tensor
    targets: Tensor
    r: Tensor
    penalty: Tensor | None
    actions: Tensor
    clip_id: Tensor
    places: ClipPlaces
    labels: dict[str, Tensor]
    frames: Tensor
    extrapolated: Tensor | None

    def __len__(self) -> int:
        return len(self.state)

    @property
    def horizon(self) -> int:
        """The number of later segments."""
        return self.targets.shape[1]

    @property
    def embedding(self) -> Tensor:
        """The model's embedding of the context, [N, D]."""
        return self.state[:, : self.targets.shape[-1]]


@dataclass(frozen=True)
class Share:
    """The share of one process among `world_size`."""

    rank: int = 0
    world_size: int = 1


ALONE = Share()
"""The share of a single process."""


def embed_split(
    networks: Networks,
    split: Split,
    num_clips: int,
    *,
    seed: int,
    horizon: int = 1,
    law: Law | None = None,
    num_framed: int = 0,
    progress: bool = True,
    share: Share = ALONE,
) -> EmbeddedSplit:
    """Embed clips of a split with `horizon` segments to forecast, and keep the pixels of the first `num_framed` clips.

    With several processes, all of them call it. Each decodes and embeds its share, and all get all clips.

    Args:
        seed: of the draws of r.
        law: continues the motion of the context, for `extrapolated`.

    Raises:
        UserError: the split has fewer than two clips.
    """
    batches = networks.source.evaluation_batches(
        split, num_clips, horizon, rank=share.rank, world_size=share.world_size
    )
    most = -(-num_clips // share.world_size)
    shown = counted(batches, most, f"encoding {split}", progress=progress)
    own, own_labels = _parts_of(networks, shown, horizon, law, num_framed)
    parts, labels = (concat_processes(part, share.world_size) for part in (own, own_labels))
    if len(parts.get("clip_id", ())) < MIN_CLIPS:
        raise UserError(
            f"the {split} split has fewer than {MIN_CLIPS} clips of {networks.layout.segments_for(horizon)} segments: "
            "add videos, or lower data.clip_step or evaluation.horizon"
        )
    r, penalty = _infer(networks, parts, seed)
    return EmbeddedSplit(
        state=parts["state"],
        backbone=parts["backbone"],
        persistence=parts["persistence"],
        targets=parts["targets"],
        r=r,
        penalty=penalty,
        actions=parts["actions"],
        clip_id=parts["clip_id"],
        places=networks.source.clip_places(split, parts["clip_id"], horizon),
        labels=labels,
        frames=parts.get("frames", torch.empty(0))[:num_framed],
        extrapolated=parts.get("extrapolated"),
    )


def counted(batches: Iterable[Batch], most: int, title: str, *, progress: bool = True) -> Iterator[Batch]:
    """Yield batches of at most `most` clips together, with a progress bar. The bar ends full, also with fewer clips."""
    with tqdm(total=most, desc=title, unit="clip", disable=not progress) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch["clip_id"]))
        bar.total = bar.n
        bar.refresh()


Parts = dict[str, list[Tensor]]


def _parts_of(
    networks: Networks, batches: Iterable[Batch], horizon: int, law: Law | None, num_framed: int
) -> tuple[Parts, Parts]:
    """Return the tensors of each batch by name, on the CPU, and the labels of each batch by name."""
    layout, device = networks.layout, networks.device
    parts: Parts = {}
    labels: Parts = {}

    def add(name: str, values: Tensor) -> None:
        parts.setdefault(name, []).append(values.cpu())

    num_kept = 0
    for embedded in embed_batches(networks, batches, horizon):
        batch, segments = embedded.batch, embedded.segments
        add("state", embedded.state)
        add("backbone", embedded.features.float())
        add("seen", networks.model.seen(segments))
        add("actions", actions_of(batch, layout, horizon, device))
        add("known_r", oracle_r(batch, layout, device))
        add("persistence", embedded.context_as_target())
        add("targets", embedded.targets(horizon))
        add("clip_id", batch["clip_id"])
        if num_kept < num_framed:
            video = segments[: num_framed - num_kept, : horizon + 1].flatten(1, 2)
            add("frames", (video * 255).round().byte())
            num_kept += len(video)
        if law:
            add("extrapolated", law.extrapolate(batch["labels"], segments[:, 0], horizon))
        for name, values in batch["labels"].items():
            labels.setdefault(name, []).append(values)
    return parts, labels


def concat_processes(parts: Parts, world_size: int) -> dict[str, Tensor]:
    """Concatenate the parts of each name, process after process. A process without clips has no names."""
    of_each = gather_object([parts]) if world_size > 1 else [parts]
    names = dict.fromkeys(name for part in of_each for name in part)
    return {name: torch.cat([values for part in of_each for values in part.get(name, [])]) for name in names}


def _infer(networks: Networks, clips: dict[str, Tensor], seed: int) -> tuple[Tensor, Tensor | None]:
    """Return r [N, R] and its penalty [N] of all clips in order.

    A clip's random numbers do not depend on the process that embedded it.
    """
    device = networks.device
    generator = torch.Generator(device).manual_seed(seed)
    inferences = []
    for start in range(0, len(clips["state"]), EVALUATION_BATCH):
        rows = slice(start, start + EVALUATION_BATCH)
        state, seen, known_r, actions = (
            clips[name][rows].to(device) for name in ("state", "seen", "known_r", "actions")
        )
        inferences.append(networks.model.infer_from(state, seen, known_r, generator, action=actions[:, 0]))
    penalties = [inference.penalty.cpu() for inference in inferences if inference.penalty is not None]
    return torch.cat([inference.r.cpu() for inference in inferences]), torch.cat(penalties) if penalties else None


def mean_penalty(model: WorldModel, penalty: Tensor | None) -> Any:
    """Return the mean penalty of the latent by its name, such as {"kl_nats": 1.5}; {} if the latent has none.

    The keys are those of a Metrics record, or the name that a user's own latent gives.
    """
    if penalty is None:
        return {}
    assert model.latent.penalty_name is not None
    return {model.latent.penalty_name: float(penalty.mean())}
