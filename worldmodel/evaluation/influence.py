"""Influence of training clips on the forecast of a clip: which of them lower its loss, and which raise it.

The loss of a transition is that of training, beta * KL(q || p) + prediction error, so that no label is needed (as
arXiv 2412.17170 for losses of self-supervised images). By how much a training clip has lowered the loss of a query is
estimated to first order in the clip's weight, by an influence function (Koh and Liang, arXiv 1703.04730, eq. 2):

    influence = g_query . (F + damping)^-1 g_clip / N

g is the gradient of the loss of one transition by the weights of editor, latent and history. The weights of the encoder
are taken as fixed. F is the mean of g g^T over the training clips, the Fisher matrix in place of the Hessian. Gradients
are projected at random to a few hundred numbers before F is computed (TRAK, arXiv 2303.14186).

Legend: N training clips, P clips that are shown, B clips of a batch, Q queries, G numbers of a projected gradient, W
weights, L segments of a clip, D embedding dimensions, Z numbers of scene code and history, R latent dimensions, T
frames of a segment, C channels, H = W pixels.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from data_pipelines.batches import Batch
from data_pipelines.clip_decoder import ClipSet, frames_of
from data_pipelines.decoders import read_frames
from data_pipelines.errors import UserError, one_line_logger
from data_pipelines.stream import read_clips
from worldmodel.config import DataConfig, VideosConfig
from worldmodel.data import check_one_camera
from worldmodel.evaluation.embed import Networks, counted, embed_batches, frozen
from worldmodel.evaluation.records import Axes, load_records, save_records
from worldmodel.evaluation.surprise import check_model, training_of
from worldmodel.nets.distributions import kl_divergence
from worldmodel.nets.latents import GaussianLatent
from worldmodel.runs.folder import RunFolder
from worldmodel.sources.source import EVALUATION_BATCH
from worldmodel.sources.videos import VideosSource, read_settings
from worldmodel.training.losses import TrainingModel

log = one_line_logger(__name__)

NUM_DIMS = 512
NUM_DRAWS = 8  # of q, as in the loss of a transition
DAMPING = 1.0
"""Added to the diagonal of F, relative to its mean."""
NUMBERS_AT_ONCE = 2**24
SEED = 0


# ------------------------------------------------------------------------------------------------------- gradients


class TransitionLoss(nn.Module):
    """The training loss of one transition. Its only parameters are the weights of editor, latent and history.

    r is drawn NUM_DRAWS times from the posterior, with the same standard normal numbers for all transitions.
    """

    noise: Tensor
    training_model: TrainingModel

    def __init__(self, training: TrainingModel) -> None:
        super().__init__()
        self.latent, self.editor, self.history = training.latent, training.editor, training.history
        object.__setattr__(self, "training_model", training)  # its other parts are not submodules
        num_draws = NUM_DRAWS if isinstance(training.latent, GaussianLatent) else 1
        generator = torch.Generator().manual_seed(SEED)
        self.register_buffer("noise", torch.randn(num_draws, training.latent.latent_dim, generator=generator))

    def forward(self, state: Tensor, target: Tensor, seen: Tensor) -> Tensor:
        """Return the loss, a scalar, for state [D + Z] of the context, target [D] and seen [D] (`WorldModel.seen`)."""
        training, num_draws = self.training_model, len(self.noise)
        model = training.model
        states = state.expand(num_draws, -1)
        context = model.context(states)
        r, kl = self.noise, states.new_zeros(num_draws)
        if isinstance(self.latent, GaussianLatent):
            posterior = self.latent.posterior(context, seen.expand(num_draws, -1))
            r = posterior.mean + posterior.scale * self.noise
            kl = kl_divergence(posterior, self.latent.prior(context), r)
        edited = model.embedding_of(model.edit(states, r))
        error = training.objective.prediction_error(edited, target.expand(num_draws, -1), model.embedding_of(states))
        return (error + training.beta * kl).mean()


class Projection:
    """A fixed random projection [B, W] -> [B, G] that keeps inner products on average.

    Each number gets a random sign, and every G-th number is added: a count sketch (Charikar et al. 2002) whose groups
    are not drawn. Drawn groups need a gather of W numbers per clip, which takes several times as long as the gradients.
    """

    def __init__(self, num_weights: int, num_dims: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self.num_dims = num_dims
        self.signs = (torch.randint(2, (num_weights,), generator=generator) * 2.0 - 1).to(device)

    def __call__(self, values: Tensor) -> Tensor:
        """Project values [B, W]: [B, G]."""
        signed = F.pad(values * self.signs, (0, -len(self.signs) % self.num_dims))
        return signed.unflatten(1, (-1, self.num_dims)).sum(dim=1)


class EmbeddedTransitions(NamedTuple):
    """B transitions after the encoders: clip_id [B], state [B, D + Z], target [B, D], and seen [B, D] or [B, 0]."""

    clip_id: Tensor
    state: Tensor
    target: Tensor
    seen: Tensor


def embed_transitions(networks: Networks, batches: Iterable[Batch]) -> Iterator[EmbeddedTransitions]:
    """Embed the first transition of each clip, batch after batch."""
    model = networks.model
    with frozen(model, networks.target_encoder):
        for embedded in embed_batches(networks, batches, steps=1):
            target, seen = embedded.targets(1)[:, 0], model.seen(embedded.segments)
            yield EmbeddedTransitions(embedded.batch["clip_id"], embedded.state, target, seen)


class TransitionGradients:
    """The projected gradient of the loss of each transition, for networks in evaluation mode."""

    def __init__(self, training: TrainingModel, num_dims: int = NUM_DIMS) -> None:
        device = next(training.parameters()).device
        loss = TransitionLoss(training).to(device)
        self.weights = {name: weight.detach() for name, weight in loss.named_parameters()}
        num_weights = sum(weight.numel() for weight in self.weights.values())
        self.at_once = max(1, NUMBERS_AT_ONCE // num_weights)
        self.project = Projection(num_weights, num_dims, device)

        def loss_of(weights: dict[str, Tensor], *transition: Tensor) -> Tensor:
            return functional_call(loss, weights, transition)

        self.of_each = vmap(grad(loss_of), in_dims=(None, 0, 0, 0))

    def __call__(self, transitions: EmbeddedTransitions) -> Tensor:
        """Return the projected gradients [B, G]."""
        chunks = (values.split(self.at_once) for values in transitions[1:])
        parts = []
        for chunk in zip(*chunks, strict=True):
            with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the others
                gradients = self.of_each(self.weights, *chunk)
            parts.append(self.project(torch.cat([each.flatten(1) for each in gradients.values()], dim=1)))
        return torch.cat(parts)


def precondition(gradients: Tensor, queries: Tensor, damping: float = DAMPING) -> Tensor:
    """Return (F + damping)^-1 g of queries [Q, G], with the Fisher matrix F of gradients [N, G]: [Q, G]."""
    fisher = gradients.T @ gradients / len(gradients)
    fisher.diagonal().add_(damping * fisher.diagonal().mean())
    return torch.linalg.solve(fisher, queries.T).T


# ---------------------------------------------------------------------------------------------------- training clips


@dataclass(frozen=True)
class ClipGradients:
    """The projected gradients of training clips, as a run folder stores them.

    step: the checkpoint's. clips: identifies the videos, how clips are cut from them, and how many there are.
    clip_id [N], gradients float32 [N, G].
    """

    step: int
    clips: str
    clip_id: Annotated[np.ndarray, Axes("i", "clip")]
    gradients: Annotated[np.ndarray, Axes("f", "clip number")]


def stored_gradients(
    networks: Networks, data: DataConfig, run: RunFolder, step: int, num_clips: int, *, progress: bool = False
) -> ClipGradients:
    """Return the gradients of at most num_clips training clips, spread evenly over all.

    They are stored in the run folder, and read from it the next time, for the same step of training and the same clips.

    Raises:
        UserError: the clips cannot be read, or the file in the folder cannot be written.
    """
    path, clip_set = run.influence, training_clips(networks, data)
    total = min(num_clips, clip_set.table.num_clips)
    clips = json.dumps([clip_set.index.content_hash, asdict(clip_set.spec), total, NUM_DIMS])
    try:
        stored = load_records(path, ClipGradients)
    except UserError as error:
        log.warning("computing the gradients again: %s", error)
        stored = []
    for found in stored:
        if (found.step, found.clips) == (step, clips):
            return found
    gradients_of = TransitionGradients(training_of(networks))
    batches = counted(networks.source.evaluation_batches("train", total), total, "gradients", progress=progress)
    parts = [(each.clip_id, gradients_of(each).cpu()) for each in embed_transitions(networks, batches)]
    clip_id, gradients = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    made = ClipGradients(step, clips, clip_id, gradients)
    try:
        save_records(path, [made])
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return made


def training_clips(networks: Networks, data: DataConfig) -> ClipSet:
    """Return the clips that a run was trained on. Raises UserError: they are generated, so that none can be shown."""
    if not isinstance(networks.source, VideosSource):
        raise UserError(f"influence needs a run on video files: this one has data.source={data.source}")
    return networks.source.clip_set("train", 1)


# ---------------------------------------------------------------------------------------------------------- a query


@dataclass(frozen=True)
class Influence:
    """The influence of N training clips on the forecast of a clip, the largest first.

    video, start_frame: of the clip. frames uint8 [L * T, C, H, W] are its pixels, num_frames those of a segment, T.
    clip_id [N], influence [N] in units of the loss: above 0 if the clip lowered the loss of the forecast. names [N] are
    the paths of the videos, and first_frame [N] the numbers of the clips' first frames in them.
    largest and smallest [P, L * T, C, H, W]: the pixels of the first and of the last P clips, from each end inwards.
    """

    video: str
    start_frame: int
    num_frames: int
    frames: np.ndarray
    clip_id: np.ndarray
    influence: np.ndarray
    names: list[str]
    first_frame: np.ndarray
    largest: np.ndarray
    smallest: np.ndarray


@dataclass(frozen=True)
class InfluenceOptions:
    """start_frame: the first frame of the clip, after resampling with data.fps. num_shown: P. num_clips: at most N."""

    start_frame: int = 0
    num_shown: int = 8
    num_clips: int = 2**14
    progress: bool = False


def video_influence(
    networks: Networks, data: DataConfig, run: RunFolder, step: int, path: Path, options: InfluenceOptions | None = None
) -> Influence:
    """Return the influence of the training clips of a run on its forecast of a clip of a video file.

    The clip is as long as those of training: a context, its target and, if clips have a third segment, what follows.

    Args:
        run: the folder in which the gradients of training clips are stored.
        step: the updates that the weights have seen, which identify them.

    Raises:
        UserError: the model or its clips are of a kind that has no influence, the video cannot be read or is too short,
            or as `stored_gradients`.
    """
    options = options or InfluenceOptions()
    check_model(networks.model, "influence")
    clip_set = training_clips(networks, data)
    check_one_camera(data, path)
    frames = read_clip(clip_set, path, options.start_frame)
    number = torch.zeros(1, dtype=torch.int64)
    batch = Batch(video=torch.from_numpy(frames)[None], clip_id=number, row=number, labels={})
    [query] = embed_transitions(networks, [batch])
    stored = stored_gradients(networks, data, run, step, options.num_clips, progress=options.progress)
    query_gradient = TransitionGradients(training_of(networks))(query).cpu()
    influence = influences(torch.from_numpy(stored.gradients), query_gradient)[0].numpy()
    order = np.argsort(-influence, kind="stable")
    clip_id, names = stored.clip_id[order], clip_set.index.names
    return Influence(
        video=path.name,
        start_frame=options.start_frame,
        num_frames=data.num_frames,
        frames=frames,
        clip_id=clip_id,
        influence=influence[order],
        names=[names[row] for row in clip_set.table.videos_of(clip_id).tolist()],
        first_frame=frames_of(clip_set, clip_id)[:, 0],
        largest=read_chosen(data, clip_set, clip_id[: options.num_shown]),
        smallest=read_chosen(data, clip_set, clip_id[::-1][: options.num_shown]),
    )


def read_clip(clip_set: ClipSet, path: Path, start_frame: int) -> np.ndarray:
    """Read a clip of a video file as those of a set are cut: uint8 [L * T, C, H, W].

    Raises:
        UserError: the file cannot be read, or is too short.
    """
    spec = clip_set.spec
    frames = read_frames(
        path,
        start_frame,
        start_frame + spec.span,
        channels=clip_set.channels,
        size_px=clip_set.size_px,
        decoder=clip_set.decoder,
        fps=spec.fps,
    )
    return np.stack(list(frames)[:: spec.frame_stride])


def read_chosen(data: DataConfig, clip_set: ClipSet, clip_id: np.ndarray) -> np.ndarray:
    """Read the training clips with these ids [P], in this order: uint8 [P, L * T, C, H, W].

    Raises:
        UserError: one of them does not decode any more.
    """
    assert isinstance(data, VideosConfig)
    batches = read_clips(clip_set, np.sort(clip_id), read_settings(data, EVALUATION_BATCH))
    found: dict[int, Tensor] = {}
    for batch in batches:
        found |= zip(batch["clip_id"].tolist(), batch["video"], strict=True)
    if lost := [number for number in clip_id.tolist() if number not in found]:
        row = int(clip_set.table.videos_of(np.array(lost[:1]))[0])
        raise UserError(f"video '{clip_set.index.names[row]}' does not decode any more: its training clip {lost[0]}")
    return np.stack([found[number].numpy() for number in clip_id.tolist()])


def influences(gradients: Tensor, queries: Tensor, damping: float = DAMPING) -> Tensor:
    """Return the influence [Q, N] of clips with gradients [N, G] on the losses of queries with gradients [Q, G]."""
    return precondition(gradients, queries, damping) @ gradients.T / len(gradients)
