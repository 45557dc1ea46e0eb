"""How surprising each transition of a video is: what it costs by the training loss, and by what a scene keeps.

A transition is three successive segments: the context x, the target x+ and, where the posterior sees it, x++.

    surprise = KL(q || p) + prediction error / beta + scene change, in nats

The first two are the training loss over beta, as far as it is a clip's own: up to a constant the negative ELBO, for a
likelihood of the target that falls as exp(-prediction error / beta). The three parts find different things
(docs/experiments.md):

- KL(q || p) in nats, "Bayesian surprise" (Itti and Baldi 2009): how far seeing what came moves the belief about r from
  what x led to expect. It is high where something rare happened of a kind that r encodes.
- The posterior's prediction error of t(f(x), r ~ q) against the target embedding of x+, in the units of the loss
  (Objective.prediction_error; BYOL: 1 - cosine): what even the best r does not explain. It is high where something
  happened that no r stands for; there the KL may stay low. It does not tell the rare from the usual.
- The scene change in nats, for models with a scene code (SceneCode.change_nats): -log of the probability that x and x+
  are of one clip. It is high where one object turns into another, of which an embedding trained by prediction tells
  little. Without a scene code it is 0.

Of contrastive objectives the attraction alone counts: what a loss makes of a batch as a whole is no clip's own.
Without a latent, where the KL is 0, or with a beta of 0, the loss weighs no KL: surprise is then the prediction error
itself, in the units of the loss.

Legend: N transitions, B of them at once, D embedding dimensions, Z numbers of a scene code, R latent dimensions, C
channels, H = W pixels.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from data_pipelines.clips import frames_on_screen
from data_pipelines.decoders import Frame, read_facts, read_frames
from data_pipelines.errors import UserError
from data_pipelines.transforms import to_float
from worldmodel.config import Config, DataConfig, VideosConfig
from worldmodel.data import segment_span
from worldmodel.nets.distributions import kl_divergence
from worldmodel.nets.latents import GaussianLatent, NoLatent
from worldmodel.nets.world_model import WorldModel
from worldmodel.report.illustrations import Timeline
from worldmodel.sources import make_source
from worldmodel.training.losses import TrainingModel

SEGMENTS_AT_ONCE = 64
TRANSITIONS_AT_ONCE = 512
NUM_DRAWS = 16  # of q, for the KL from a prior without a closed form and for the prediction error
SEED = 0


class Transitions(NamedTuple):
    """start [N]: the first frame of each context segment; surprise, kl_nats, prediction_error, scene_nats [N]."""

    start: np.ndarray
    surprise: np.ndarray
    kl_nats: np.ndarray
    prediction_error: np.ndarray
    scene_nats: np.ndarray


MEASURES = Transitions._fields[1:]
"""Surprise and its parts, by the names that they have in every file."""


def video_surprise(
    config: Config,
    training: TrainingModel,
    target_encoder: nn.Module,
    path: Path,
    *,
    num_peaks: int = 5,
    step_frames: int | None = None,
    progress: bool = False,
) -> Timeline:
    """The surprise of every transition of a video file, which is read in one pass and never held as a whole.

    step_frames: frames from the start of one transition to that of the next, resampled ones with data.fps; None: those
    of a segment, so that segments tile the video and each is embedded once. Memory grows by 2 D numbers a segment.

    Raises:
        UserError: the model is none of those that score videos (`obstacle`); the video is missing, unreadable, or too
            short for one transition.
    """
    data = config.data
    check_model(training.model)
    if make_source(config).content != "frames":
        raise UserError(f"surprise of a video file needs a run on videos: this one has data.source={data.source}")
    fps, decoder = (data.fps, data.decoder) if isinstance(data, VideosConfig) else (None, "auto")
    video = read_facts(path)
    shown = frames_on_screen(video, fps)

    def read(start: int, stop: int) -> Iterator[Frame]:
        return read_frames(
            path, start, stop,
            channels=data.channels, size_px=data.size_px, decoder=decoder, fps=fps, video=video,
        )  # fmt: skip

    found = score_transitions(
        config, training, target_encoder, read(0, len(shown)), len(shown),
        name=f"video '{path}'", step_frames=step_frames, progress=progress,
    )  # fmt: skip
    peaks = find_peaks(found, data, num_peaks)
    target_frame = shown[found.start + segment_span(data)]
    return Timeline(
        video=path.name,
        frame=target_frame,
        time_s=video.shown_s()[target_frame] if video.fps else None,
        unit=surprise_unit(training),
        surprise=found.surprise,
        kl_nats=found.kl_nats,
        prediction_error=found.prediction_error,
        scene_nats=found.scene_nats,
        peaks=peaks,
        peak_frames=np.stack(
            [
                np.stack(list(islice(read(start, start + 2 * segment_span(data)), 0, None, data.frame_stride)))
                for start in found.start[peaks].tolist()
            ]
        ),
    )


def clip_surprise(
    config: Config,
    training: TrainingModel,
    target_encoder: nn.Module,
    clip: Tensor,
    *,
    num_peaks: int = 5,
    step_frames: int | None = None,
    progress: bool = False,
) -> Timeline:
    """As `video_surprise`, of frames in memory: [T, C, H, W], uint8 or in [0, 1], of any T that holds a transition."""
    check_model(training.model)
    found = score_transitions(
        config, training, target_encoder, clip.cpu().numpy(), len(clip),
        name="the clip", step_frames=step_frames, progress=progress,
    )  # fmt: skip
    span = segment_span(config.data)
    peaks = find_peaks(found, config.data, num_peaks)
    pixels = (to_float(clip.cpu()) * 255).round().byte().numpy()
    return Timeline(
        video="clip",
        frame=found.start + span,
        time_s=None,
        unit=surprise_unit(training),
        surprise=found.surprise,
        kl_nats=found.kl_nats,
        prediction_error=found.prediction_error,
        scene_nats=found.scene_nats,
        peaks=peaks,
        peak_frames=np.stack(
            [pixels[start : start + 2 * span : config.data.frame_stride] for start in found.start[peaks].tolist()]
        ),
    )


def obstacle(model: WorldModel) -> str | None:
    """Why the model cannot score videos, in a sentence; None where it can."""
    if not isinstance(model.latent, NoLatent | GaussianLatent):
        return "surprise needs a run with model.latent=gaussian or none: an r of another kind has no KL(q || p)"
    if model.action_dim:
        return "surprise of a video needs a passive run: this one is conditioned on actions (model.action_dim)"
    return None


def check_model(model: WorldModel) -> None:
    """Raises UserError: the model cannot score videos."""
    reason = obstacle(model)
    if reason:
        raise UserError(reason)


def weighs_kl(training: TrainingModel) -> bool:
    """Whether there is a KL in the training loss, so that beta says what an error is worth in nats."""
    return training.model.latent.latent_dim > 0 and training.beta > 0


def surprise_unit(training: TrainingModel) -> str:
    """As Timeline.unit has it."""
    return "nats" if weighs_kl(training) else "units of the loss"


# ---------------------------------------------------------------------------------------------------- transitions


@torch.no_grad()
def score_transitions(
    config: Config,
    training: TrainingModel,
    target_encoder: nn.Module,
    frames: Iterable[Frame],
    num_frames: int,
    *,
    name: str,
    step_frames: int | None = None,
    progress: bool = False,
) -> Transitions:
    """Score the transitions of `num_frames` frames, uint8 or in [0, 1], each [C, H, W]; `name` names them in errors."""
    model, data, device = training.model, config.data, next(training.parameters()).device
    step = segment_span(data) if step_frames is None else step_frames
    if step < 1:
        raise UserError(f"step_frames={step} must be at least 1")
    span, num_segments = segment_span(data), model.seen_at + 1
    length = (num_segments * data.num_frames - 1) * data.frame_stride + 1
    starts = np.arange(0, num_frames - length + 1, step)
    if not len(starts):
        raise UserError(f"{name} has {num_frames} frames, and one transition takes {length}: give a longer one")
    segments = np.unique(starts[:, None] + span * np.arange(num_segments))
    cut = cut_segments(frames, segments.tolist(), data.num_frames, data.frame_stride)
    own, as_target, kept = [], [], []
    with tqdm(total=len(segments), desc="surprise", unit="segment", disable=not progress) as bar:
        while batch := list(islice(cut, SEGMENTS_AT_ONCE)):
            video = to_float(torch.from_numpy(np.stack(batch)).to(device))
            features = model.embedder.features(video)
            own.append(model.state_of(features))
            kept.append(model.scene.project(features))
            shared = target_encoder is model.embedder
            as_target.append(model.embedding_of(own[-1]) if shared else target_encoder(video))
            bar.update(len(batch))
    own_of, target_of, kept_of = torch.cat(own), torch.cat(as_target), torch.cat(kept)
    scores = []
    for part in np.split(starts, range(TRANSITIONS_AT_ONCE, len(starts), TRANSITIONS_AT_ONCE)):
        context, target, seen = (np.searchsorted(segments, part + span * at) for at in (0, 1, model.seen_at))
        kl, error = measure(training, own_of[context], target_of[target], model.embedding_of(own_of[seen]))
        scene = model.scene.change_nats(kept_of[context], kept_of[target])
        surprise = kl + error / training.beta + scene if weighs_kl(training) else error
        scores.append(torch.stack([surprise, kl, error, scene]).cpu())
    return Transitions(starts, *torch.cat(scores, dim=1).numpy())


def measure(training: TrainingModel, state: Tensor, target: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p) in nats and the posterior's prediction error, both [B], from states [B, D + Z] to embeddings [B, D].

    The KL is in closed form for a single Gaussian as prior; otherwise, and the error always, a mean over NUM_DRAWS
    draws of q. All transitions take the same standard normal numbers, so that none depends on which others are scored
    with it. Without a latent the KL is 0.
    """
    model = training.model
    if isinstance(model.latent, NoLatent):
        kl, draws = state.new_zeros(len(state)), [state[:, :0]]
    else:
        assert isinstance(model.latent, GaussianLatent)
        posterior, prior = model.latent.posterior(state, seen), model.latent.prior(state)
        generator = torch.Generator().manual_seed(SEED)
        noise = torch.randn(NUM_DRAWS, model.latent.latent_dim, generator=generator).to(state.device)
        draws = [posterior.mean + posterior.scale * row for row in noise]
        kl = torch.stack([kl_divergence(posterior, prior, r) for r in draws]).mean(dim=0)
    context = model.embedding_of(state)
    edited = (model.embedding_of(model.edit(state, r)) for r in draws)
    errors = [training.objective.prediction_error(embedding, target, context) for embedding in edited]
    return kl, torch.stack(errors).mean(dim=0)


def cut_segments(
    frames: Iterable[Frame], starts: Sequence[int], num_frames: int, frame_stride: int
) -> Iterator[np.ndarray]:
    """Segments [num_frames, C, H, W] that begin at ascending `starts`, each as soon as its last frame has come.

    No more frames are held than one segment spans.
    """
    length = (num_frames - 1) * frame_stride + 1
    held: deque[Frame] = deque(maxlen=length)
    due = deque(starts)
    for number, frame in enumerate(frames, start=1):
        held.append(frame)
        if due and number == due[0] + length:
            due.popleft()
            yield np.stack(list(held)[::frame_stride])


def find_peaks(found: Transitions, data: DataConfig, num_peaks: int) -> np.ndarray:
    """Positions of the highest local maxima of the surprise, the highest first, at most num_peaks.

    A maximum is as high as all transitions whose segments touch its own; no two peaks touch each other. Raises
    UserError: num_peaks is below 1.
    """
    if num_peaks < 1:
        raise UserError(f"num_peaks={num_peaks} must be at least 1")
    surprise, start = found.surprise, found.start
    peaks: list[int] = []
    for candidate in np.argsort(-surprise, kind="stable").tolist():
        near = np.abs(start - start[candidate]) <= segment_span(data)
        if surprise[candidate] >= surprise[near].max() and not near[peaks].any():
            peaks.append(candidate)
            if len(peaks) == num_peaks:
                break
    return np.array(peaks)
