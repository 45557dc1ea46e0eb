"""Surprise of each transition of a video: its training loss, and the evidence that the scene changed or stood still.

A transition is three successive segments: the context x, the target x+ and, if the posterior sees it, x++.

    surprise = KL(q || p) + prediction error / beta + scene change + stillness, in nats

The first two terms are the training loss of the transition itself, divided by beta. Up to a constant they are the
negative ELBO, for a likelihood of the target that falls as exp(-prediction error / beta). The parts find different
things (docs/experiments.md):

- KL(q || p) in nats is "Bayesian surprise" (Itti and Baldi 2009): the change of belief about r when the target is seen.
  It is high for rare events of a kind that r encodes.
- The posterior's prediction error of t(f(x), r ~ q) against the target embedding of x+, in the units of the loss
  (Objective.prediction_error; BYOL: 1 - cosine), remains even with the best r. It is high for events that no r encodes;
  the KL may stay low there. It does not separate rare events from common ones.
- The scene change in nats, for models with a scene code (SceneCode.change_nats), is -log of the probability that x and
  x+ belong to one clip. It is high if one object turns into another, which an embedding trained by prediction hardly
  shows. Without a scene code it is 0.
- The stillness in nats (`still_nats`) is -log of the probability that the motion within x+ is ordinary. It is high if
  everything stops, where things always move. The first two parts compare velocities only as exactly as the embedding
  holds them, in which rest is near to slow motion. Without the motion of ordinary segments, which an evaluation
  measures on selection clips, and for segments of one frame, it is 0.

Of contrastive objectives only the attraction counts: a loss over the whole batch does not belong to one transition.
Without a latent, or with a beta of 0, the loss has no KL. Surprise is then the prediction error, in the units of the
loss.

Legend: N transitions, P peaks, B segments or transitions at once, D embedding dimensions, Z numbers of scene code
and history, J segments of a history, R latent dimensions, T frames, C channels, H = W pixels.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from data_pipelines.batches import Batch
from data_pipelines.clips import frames_on_screen
from data_pipelines.decoders import Frame, read_facts, read_frames
from data_pipelines.errors import UserError
from data_pipelines.transforms import split_segments, to_float
from worldmodel.config import DataConfig, VideosConfig
from worldmodel.data import check_one_camera
from worldmodel.evaluation.embed import Networks, embed_batches
from worldmodel.evaluation.records import Axes
from worldmodel.nets.distributions import kl_divergence
from worldmodel.nets.latents import GaussianLatent, NoLatent
from worldmodel.nets.scene import NoScene
from worldmodel.nets.world_model import WorldModel
from worldmodel.training.losses import TrainingModel

SEGMENTS_AT_ONCE = 64
TRANSITIONS_AT_ONCE = 512
NUM_DRAWS = 16  # of q, for the KL from a prior without a closed form and for the prediction error
SEED = 0
LEAST_MOTION = 1e-8  # less is rounding


class Transitions(NamedTuple):
    """start [N]: the first frame of each context segment; surprise and its parts, [N] each."""

    start: np.ndarray
    surprise: np.ndarray
    kl_nats: np.ndarray
    prediction_error: np.ndarray
    scene_nats: np.ndarray
    still_nats: np.ndarray


MEASURES = Transitions._fields[1:]
"""Surprise and its parts, by their names in every file."""


@dataclass(frozen=True)
class Timeline:
    """The surprise of every transition of one video.

    frame [N] is the first frame of each target segment, in source frames. time_s [N] is its time; None if the video
    states no frame rate. surprise [N] is in `unit`: "nats", or "units of the loss" if the loss has no KL. Its parts are
    kl_nats (None without a latent variable), prediction_error (in the units of the loss), scene_nats (None without a
    scene code) and still_nats (None without the motion of ordinary segments) [N]. peaks [P] are positions in `frame` of
    the most surprising transitions, highest first. peak_frames uint8 [P, T, C, H, W] are the context and target
    segments there. threshold is that of an alarm, in `unit`; None if no rate of false alarms was asked for.
    """

    video: str
    frame: Annotated[np.ndarray, Axes("i", "moment*")]
    time_s: Annotated[np.ndarray, Axes("f", "moment*")] | None
    unit: str
    surprise: Annotated[np.ndarray, Axes("f", "moment*")]
    kl_nats: Annotated[np.ndarray, Axes("f", "moment*")] | None
    prediction_error: Annotated[np.ndarray, Axes("f", "moment*")]
    scene_nats: Annotated[np.ndarray, Axes("f", "moment*")] | None
    peaks: Annotated[np.ndarray, Axes("i", "peak*")]
    peak_frames: Annotated[np.ndarray, Axes("u", "peak* peak_frame channel height width")]
    still_nats: Annotated[np.ndarray, Axes("f", "moment*")] | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for peaks at other moments, as in a damaged file."""
        if not ((self.peaks >= 0) & (self.peaks < len(self.frame))).all():
            raise ValueError(f"peaks {self.peaks} of {len(self.frame)} moments")

    @property
    def alarms(self) -> np.ndarray | None:
        """True for each transition that exceeds the threshold, bool [N]; None without a threshold."""
        return None if self.threshold is None else self.surprise > self.threshold

    @property
    def measures(self) -> dict[str, np.ndarray]:
        """Surprise and those of its parts that the model has, [N] each, by name."""
        found = {name: getattr(self, name) for name in MEASURES}
        return {name: values for name, values in found.items() if values is not None}


@dataclass(frozen=True)
class SurpriseOptions:
    """Options of a timeline: the number of peaks, and the frames from one transition to the next.

    With step_frames=None, segments tile the video and each is embedded once.
    """

    num_peaks: int = 5
    step_frames: int | None = None
    progress: bool = False


def video_surprise(
    networks: Networks, data: DataConfig, path: Path, options: SurpriseOptions | None = None
) -> Timeline:
    """Score every transition of a video file. The file is read in one pass and never held as a whole.

    step_frames counts frames after resampling with data.fps. Memory grows by 2 D numbers per segment.

    Raises:
        UserError: the model cannot score videos (`why_unsupported`), or sees several cameras; the video is missing,
            unreadable, or too short for one transition.
    """
    layout, options = networks.layout, options or SurpriseOptions()
    check_model(networks.model)
    if networks.source.content != "frames":
        raise UserError(f"surprise of a video file needs a run on videos: this one has data.source={data.source}")
    check_one_camera(data, path)
    fps, decoder = (data.fps, data.decoder) if isinstance(data, VideosConfig) else (None, "auto")
    video = read_facts(path)
    on_screen = frames_on_screen(video, fps)

    def read(start: int, stop: int) -> Iterator[Frame]:
        return read_frames(
            path, start, stop,
            channels=data.channels, size_px=data.size_px, decoder=decoder, fps=fps, video=video,
        )  # fmt: skip

    def frames_from(start: int) -> np.ndarray:
        stop = start + (2 * layout.num_frames - 1) * layout.frame_stride + 1  # a video may end with the transition
        return np.stack(list(islice(read(start, stop), 0, None, layout.frame_stride)))

    frames = read(0, len(on_screen))
    found = score_transitions(networks, frames, len(on_screen), name=f"video '{path}'", options=options)
    target_frame = on_screen[found.start + layout.span]
    peaks = find_peaks(found, layout.span, options.num_peaks)
    return Timeline(
        video=path.name,
        frame=target_frame,
        time_s=video.shown_s()[target_frame] if video.fps else None,
        unit=surprise_unit(training_of(networks)),
        peaks=peaks,
        peak_frames=np.stack([frames_from(start) for start in found.start[peaks].tolist()]),
        **_measures(networks, found),
    )


def clip_surprise(networks: Networks, clip: Tensor, options: SurpriseOptions | None = None) -> Timeline:
    """Score every transition of frames in memory: [T, C, H, W], uint8 or in [0, 1].

    Raises:
        UserError: the model cannot score videos, or the clip is too short for one transition.
    """
    layout, options = networks.layout, options or SurpriseOptions()
    check_model(networks.model)
    found = score_transitions(networks, clip.cpu().numpy(), len(clip), name="the clip", options=options)
    span = layout.span
    pixels = (to_float(clip.cpu()) * 255).round().byte().numpy()
    peaks = find_peaks(found, span, options.num_peaks)
    return Timeline(
        video="clip",
        frame=found.start + span,
        time_s=None,
        unit=surprise_unit(training_of(networks)),
        peaks=peaks,
        peak_frames=np.stack(
            [pixels[start : start + 2 * span : layout.frame_stride] for start in found.start[peaks].tolist()]
        ),
        **_measures(networks, found),
    )


def _measures(networks: Networks, found: Transitions) -> dict[str, Any]:
    parts = found._asdict()
    del parts["start"]
    if isinstance(networks.model.latent, NoLatent):
        parts["kl_nats"] = None
    if isinstance(networks.model.scene, NoScene):
        parts["scene_nats"] = None
    if networks.ordinary_motion is None:
        parts["still_nats"] = None
    return parts


def why_unsupported(model: WorldModel, measure: str = "surprise") -> str | None:
    """Return the reason why the model cannot score videos by this measure; None if it can."""
    if not isinstance(model.latent, NoLatent | GaussianLatent):
        return f"{measure} needs a run with a gaussian latent or none: other latents have no KL(q || p)"
    if model.action_dim:
        return f"{measure} of a video needs a passive run: this one is conditioned on actions (model.action_dim)"
    return None


def check_model(model: WorldModel, measure: str = "surprise") -> None:
    """Raise UserError if the model cannot score videos by this measure."""
    reason = why_unsupported(model, measure)
    if reason:
        raise UserError(reason)


def training_of(networks: Networks) -> TrainingModel:
    """Return the losses that the model was trained with."""
    assert networks.training is not None, "surprise and influence are made of the losses of training"
    return networks.training


def weighs_kl(training: TrainingModel) -> bool:
    """True if the training loss has a KL, so that beta converts an error into nats."""
    return training.model.latent.latent_dim > 0 and training.beta > 0


def surprise_unit(training: TrainingModel) -> str:
    """Return the unit of the surprise, as in Timeline.unit."""
    return "nats" if weighs_kl(training) else "units of the loss"


# ---------------------------------------------------------------------------------------------------- transitions


@torch.no_grad()
def score_transitions(
    networks: Networks,
    frames: Iterable[Frame],
    num_frames: int,
    *,
    name: str,
    options: SurpriseOptions | None = None,
) -> Transitions:
    """Score the transitions of `num_frames` frames [C, H, W], uint8 or in [0, 1]; errors call the video `name`.

    Raises:
        UserError: step_frames is below 1, or the video is too short for one transition.
    """
    layout, model = networks.layout, networks.model
    options = options or SurpriseOptions()
    step = layout.span if options.step_frames is None else options.step_frames
    if step < 1:
        raise UserError(f"step_frames={step} must be at least 1")
    span, num_segments = layout.span, model.seen_at + 1
    length = (num_segments * layout.num_frames - 1) * layout.frame_stride + 1
    starts = np.arange(0, num_frames - length + 1, step)
    if not len(starts):
        raise UserError(f"{name} has {num_frames} frames, but one transition takes {length}: give a longer video")
    before = starts[:, None] - span * np.arange(layout.history_segments, 0, -1)
    needed = [before[before >= 0], (starts[:, None] + span * np.arange(num_segments)).ravel()]
    segments = np.unique(np.concatenate(needed))
    cut = cut_segments(frames, segments.tolist(), layout.num_frames, layout.frame_stride)
    with_motion = networks.ordinary_motion is not None
    shown = tqdm(cut, total=len(segments), desc="surprise", unit="segment", disable=not options.progress)
    embedded = _embed_segments(networks, shown, with_motion=with_motion)
    places = (np.searchsorted(segments, starts + span * at) for at in (0, 1, model.seen_at))
    history = np.where(before >= 0, np.searchsorted(segments, before), -1)
    return Transitions(starts, *_score_embedded(networks, embedded, history, *places))


class Ordinary(NamedTuple):
    """surprise [N] of ordinary transitions and motion [N] within their targets, each in rising order.

    motion is None for segments of one frame.
    """

    surprise: np.ndarray
    motion: Tensor | None


@torch.no_grad()
def score_clips(networks: Networks, batches: Iterable[Batch]) -> Ordinary:
    """Score the first transition of each clip of batches, whose own motion is taken as the ordinary one."""
    layout, moves = networks.layout, networks.layout.num_frames > 1
    num_before = layout.history_segments
    num_segments = num_before + networks.model.seen_at + 1

    def segments() -> Iterator[np.ndarray]:
        for batch in batches:
            clips = split_segments(batch["video"], layout.segments_for(1))[:, :num_segments]
            yield from clips.flatten(0, 1).numpy()

    embedded = _embed_segments(networks, segments(), with_motion=moves)
    context = np.arange(num_before, len(embedded.state), num_segments)
    history = context[:, None] - np.arange(num_before, 0, -1)
    motion = embedded.motion[context + 1].sort().values if moves else None
    networks = replace(networks, ordinary_motion=motion)
    places = (context, context + 1, context + networks.model.seen_at)
    surprise = _score_embedded(networks, embedded, history, *places, are_ordinary=True)[0]
    return Ordinary(np.sort(surprise), motion)


class _EmbeddedSegments(NamedTuple):
    """N segments: state [N, D + Z], target [N, D] in the space of targets, the scene's kept part, and motion [N].

    motion is 0 if it was not asked for.
    """

    state: Tensor
    target: Tensor
    kept: Tensor
    motion: Tensor


def _embed_segments(networks: Networks, segments: Iterable[np.ndarray], *, with_motion: bool) -> _EmbeddedSegments:
    """Embed segments [T, C, H, W] one by one, without a history, a few at once."""
    remaining = iter(segments)

    def batches() -> Iterator[Batch]:
        while batch := list(islice(remaining, SEGMENTS_AT_ONCE)):
            number = torch.arange(len(batch))
            yield Batch(video=torch.from_numpy(np.stack(batch)), clip_id=number, row=number, labels={})

    parts = []
    model = networks.model
    alone = replace(networks, layout=replace(networks.layout, num_segments=1, history_segments=0))
    for embedded in embed_batches(alone, batches(), steps=1):
        kept, video = model.scene.project(embedded.features), embedded.segments[:, 0]
        motion = segment_motion(model, video, embedded.state) if with_motion else video.new_zeros(len(video))
        parts.append(_EmbeddedSegments(embedded.state, embedded.context_as_target(), kept, motion))
    return _EmbeddedSegments(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _score_embedded(
    networks: Networks,
    embedded: _EmbeddedSegments,
    history: np.ndarray,
    context: np.ndarray,
    target: np.ndarray,
    seen: np.ndarray,
    *,
    are_ordinary: bool = False,
) -> np.ndarray:
    """Return surprise and its parts, [len(MEASURES), N], of transitions whose segments are at these positions [N].

    history [N, J] are the positions of the J segments before each context, -1 for those that the video does not have.
    are_ordinary: as for `still_nats`.
    """
    model, training = networks.model, training_of(networks)
    scores = []
    for rows in np.split(np.arange(len(context)), range(TRANSITIONS_AT_ONCE, len(context), TRANSITIONS_AT_ONCE)):
        before, after = context[rows], target[rows]
        is_present = torch.from_numpy(history[rows] >= 0).to(embedded.state.device)
        earlier = model.embedding_of(embedded.state[history[rows]])
        state = model.remember(embedded.state[before], earlier, earlier[..., :0], is_present)
        kl, error = measure(training, state, embedded.target[after], model.embedding_of(embedded.state[seen[rows]]))
        scene = model.scene.change_nats(embedded.kept[before], embedded.kept[after])
        still = torch.zeros_like(kl)
        if networks.ordinary_motion is not None:
            ordinary = networks.ordinary_motion.to(kl)
            still = still_nats(embedded.motion[after], ordinary, are_ordinary=are_ordinary)
        surprise = kl + error / training.beta + scene + still if weighs_kl(training) else error
        scores.append(torch.stack([surprise, kl, error, scene, still]).cpu())
    return torch.cat(scores, dim=1).numpy()


def measure(training: TrainingModel, state: Tensor, target: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(q || p) in nats and the posterior's prediction error, both [B].

    state [B, D + Z] of the context, target and seen [B, D]. The KL has a closed form for a single Gaussian as prior.
    Otherwise it is a mean over NUM_DRAWS draws of q, as the error always is. All transitions take the same standard
    normal numbers, so that a score does not depend on the other transitions. Without a latent the KL is 0.
    """
    model = training.model
    read = model.context(state)
    if isinstance(model.latent, NoLatent):
        kl, draws = state.new_zeros(len(state)), [state[:, :0]]
    else:
        assert isinstance(model.latent, GaussianLatent)
        posterior, prior = model.latent.posterior(read, seen), model.latent.prior(read)
        generator = torch.Generator().manual_seed(SEED)
        noise = torch.randn(NUM_DRAWS, model.latent.latent_dim, generator=generator).to(state.device)
        draws = [posterior.mean + posterior.scale * row for row in noise]
        kl = torch.stack([kl_divergence(posterior, prior, r) for r in draws]).mean(dim=0)
    context = model.embedding_of(state)
    edited = (model.embedding_of(model.edit(state, r)) for r in draws)
    errors = [training.objective.prediction_error(embedding, target, context) for embedding in edited]
    return kl, torch.stack(errors).mean(dim=0)


def segment_motion(model: WorldModel, video: Tensor, state: Tensor) -> Tensor:
    """Return the motion within segments [B, T, C, H, W] of these states [B, D + Z], as the embedding shows it: [B].

    That is the mean squared difference of its embedding from that of its last frame, repeated.
    """
    at_rest = model.encode(video[:, -1:].expand_as(video))
    return (model.embedding_of(state) - at_rest).square().mean(dim=1).float()


def still_nats(motion: Tensor, ordinary: Tensor, *, are_ordinary: bool = False) -> Tensor:
    """Return -log P(ordinary), in nats, for the motion [B] of segments and that of ordinary ones [N] in rising order.

    P holds if ordinary and unusually still segments are equally frequent, and likelihoods are in the ratio 1 : B. p is
    the share of ordinary segments with at most this motion, and B = 1 / (-e p log p) for p < 1 / e, otherwise 1: the
    largest ratio that is compatible with p as a p-value (Sellke, Bayarri and Berger 2001, "Calibration of p values for
    testing precise null hypotheses"). With N = 2,048, a segment at rest has 4.6 nats, half of all segments log 2.

    are_ordinary: the segments are among the ordinary ones, and each is compared with the others. Otherwise the stillest
    of them would seem less still than a new segment of the same kind.
    """
    ordinary, motion = (values.clamp(min=LEAST_MOTION) for values in (ordinary, motion))
    itself = int(are_ordinary)
    rank = torch.searchsorted(ordinary, motion, right=True) - itself
    nats = -((rank + 1) / (len(ordinary) - itself + 1)).log()
    log_ratio = torch.where(nats > 1, nats - 1 - nats.clamp(min=1).log(), 0)
    return F.softplus(log_ratio)


def cut_segments(
    frames: Iterable[Frame], starts: Sequence[int], num_frames: int, frame_stride: int
) -> Iterator[np.ndarray]:
    """Yield the segments [num_frames, C, H, W] that begin at ascending `starts`, each after its last frame arrived.

    At most the frames that one segment spans are held.
    """
    length = (num_frames - 1) * frame_stride + 1
    held: deque[Frame] = deque(maxlen=length)
    due = deque(starts)
    for number, frame in enumerate(frames, start=1):
        held.append(frame)
        if due and number == due[0] + length:
            due.popleft()
            yield np.stack(list(held)[::frame_stride])


def find_peaks(found: Transitions, span: int, num_peaks: int) -> np.ndarray:
    """Return the positions of the highest local maxima of the surprise, highest first, at most num_peaks.

    A maximum is at least as high as all transitions whose segments touch its own. No two peaks touch each other. `span`
    is the number of source frames from a segment to the next.

    Raises:
        UserError: num_peaks is below 1.
    """
    if num_peaks < 1:
        raise UserError(f"num_peaks={num_peaks} must be at least 1")
    surprise, start = found.surprise, found.start
    peaks: list[int] = []
    for candidate in np.argsort(-surprise, kind="stable").tolist():
        near = np.abs(start - start[candidate]) <= span
        if surprise[candidate] >= surprise[near].max() and not near[peaks].any():
            peaks.append(candidate)
            if len(peaks) == num_peaks:
                break
    return np.array(peaks)
