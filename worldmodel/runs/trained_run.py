"""A trained run in Python: load it, then encode, roll out, forecast and score clips and videos.

Legend: B clips, T frames of a segment, L segments of a clip, C channels, H = W pixels, D embedding dimensions, S
samples, A numbers of an action, K dimensions of a quantity.
"""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from data_pipelines.errors import UserError, one_line
from data_pipelines.text_files import shown
from data_pipelines.transforms import split_segments, to_float
from worldmodel.build import build_training_model, clip_layout
from worldmodel.config import (
    Config,
    GaussianConfig,
    ImagesConfig,
    PretrainedConfig,
    VideosConfig,
    check_trust,
    outside_names,
    to_dict,
    validate,
)
from worldmodel.evaluation.decoded import decode_paths, load_decoder
from worldmodel.evaluation.embed import Networks
from worldmodel.evaluation.futures import num_futures
from worldmodel.evaluation.influence import Influence, InfluenceOptions, video_influence
from worldmodel.evaluation.ordinary import load_ordinary, threshold_of
from worldmodel.evaluation.readout import load_readout
from worldmodel.evaluation.recalibration import load_recalibrations
from worldmodel.evaluation.surprise import SurpriseOptions, Timeline, check_model, clip_surprise, video_surprise
from worldmodel.nets.teacher import Teacher
from worldmodel.nets.world_model import WorldModel
from worldmodel.runs.checkpoint import Checkpoint, check_shapes, checkpoint_name, load_checkpoint, updates_of
from worldmodel.runs.folder import RunFolder
from worldmodel.runs.hub import folder_of
from worldmodel.runs.opening import load_run_config
from worldmodel.sources import make_source
from worldmodel.sources.source import ClipPlaces, Source
from worldmodel.sources.videos import number_of_file
from worldmodel.training.decoding import resized
from worldmodel.training.losses import TrainingModel


@dataclass(frozen=True)
class TrainedRun:
    """The config of a run, its networks in evaluation mode, and the state of their checkpoint.

    The methods take clips as floating point in [0, 1] or as uint8, on any device. They compute without gradients, on
    the device of the run. All of them raise UserError if a clip differs from the training data in shape or range.
    """

    folder: Path
    config: Config
    training: TrainingModel
    """The networks, with the losses that they were trained by."""
    teacher: Teacher | None
    """None if the objective has no teacher."""
    state: dict[str, Any]

    @cached_property
    def source(self) -> Source:
        """The source of the run's clips, which holds what it has read."""
        return make_source(self.config)

    @property
    def refine_steps(self) -> int:
        """The updates of refinement that the weights have seen."""
        return self.config.train.refine_steps if self.state.get("refined", False) else 0

    @property
    def num_updates(self) -> int:
        """The updates of training and refinement. In the files of a run they identify the weights."""
        return updates_of(self.state)

    @property
    def model(self) -> WorldModel:
        """The networks."""
        return self.training.model

    @property
    def target_encoder(self) -> nn.Module:
        """The encoder of targets: clip [B, T, C, H, W] -> [B, D]."""
        return self.teacher or self.model.embedder

    @property
    def networks(self) -> Networks:
        """The model, its target encoder, its device and its clips, as evaluations take them."""
        layout = clip_layout(self.config)
        return Networks(self.model, self.target_encoder, self.device, self.source, layout, self.training)

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        return next(self.model.parameters()).device

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """C, H, W of the frames that the run was trained on."""
        return self.source.frame_shape

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Segments [B, T, C, H, W] -> embeddings [B, D]."""
        return self.model.encode(self._segments(video))

    @torch.no_grad()
    def rollout(
        self,
        clip: Tensor,
        horizon: int,
        num_samples: int,
        seed: int = 0,
        *,
        actions: Tensor | None = None,
        recalibrate: bool = False,
        video: str | Path | None = None,
    ) -> Tensor:
        """Sampled futures of clips: [B, L * T, C, H, W] -> embeddings [B, S, horizon, D].

        A clip is the context segment, L = 1. With data.history_segments, up to that many segments may come before it.

        Args:
            actions: [B, L - 1 + horizon, A], given if and only if the run is conditioned on actions: first those
                between the segments of the clip.
            recalibrate: change the spread of the samples, and replace some of them by futures of training clips, as an
                evaluation with evaluation.recalibrate has fitted it. The other samples are those without it.
            video: the file that all clips are from. If the run was trained on its earlier part, the futures for
                `recalibrate` are of this video.

        Raises:
            UserError: horizon or num_samples is below 1, or actions are missing, unexpected or of another shape; with
                `recalibrate`, the run has no recalibration for this checkpoint or horizon.
        """
        futures = self._rollout(clip, horizon, num_samples, seed, actions)
        if not recalibrate:
            return futures
        others = self._other_futures(clip, horizon, num_samples, seed, actions)
        return self._recalibrated("embedding", futures, others, seed, video)

    def _rollout(self, clip: Tensor, horizon: int, num_samples: int, seed: int, actions: Tensor | None) -> Tensor:
        for name, value in (("horizon", horizon), ("num_samples", num_samples)):
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        segments = self._clip(clip)
        num_before = segments.shape[1] - 1
        wanted = (len(clip), num_before + horizon, self.model.action_dim) if self.model.action_dim else None
        given = None if actions is None else tuple(actions.shape)
        if given != wanted:
            takes = f"it takes {wanted}, as it is conditioned on actions" if wanted else "it takes none"
            raise UserError(f"actions of shape {given} do not fit the run {self.folder}: {takes}")
        generator = torch.Generator(self.device).manual_seed(seed)
        taken = segments.new_empty(len(clip), num_before, 0) if actions is None else actions.float().to(self.device)
        state = self.model.observe(segments[:, -1])
        if num_before:
            state = self.model.remember_segments(state, segments[:, :-1], taken[:, :num_before])
        ahead = None if actions is None else taken[:, num_before:]
        return self.model.rollout_embedding(state, horizon, num_samples, generator, actions=ahead)

    def _other_futures(self, clip: Tensor, horizon: int, num_samples: int, seed: int, actions: Tensor | None) -> Tensor:
        """Draw futures besides num_samples ones, to as many as a recalibration was fitted to: [B, S, horizon, D].

        A spread is fitted around the mean of that many. Around that of fewer, their deviations are too small.
        """
        missing = num_futures(self.model, self.config.evaluation.num_samples) - num_samples
        if missing > 0:
            return self._rollout(clip, horizon, missing, _seed_apart(seed, 0), actions)
        return torch.empty(len(clip), 0, horizon, self.model.embedding_dim, device=self.device)

    def _recalibrated(self, space: str, samples: Tensor, others: Tensor, seed: int, video: str | Path | None) -> Tensor:
        """Recalibrate samples [B, S, horizon, K] in a space, around the mean of these and of others.

        Raises UserError: there is no recalibration for them.
        """
        spaces = load_recalibrations(self.folder, self.num_updates)
        if space not in spaces:
            raise UserError(
                f"the run {self.folder} has no recalibration: set evaluation.recalibrate to true in its config.yaml, "
                "and evaluate it"
            )
        largest = len(spaces[space].fitted.spread)
        if samples.shape[2] > largest:
            raise UserError(f"horizon={samples.shape[2]}: the recalibration of {self.folder} reaches to {largest}")
        if spaces[space].past.shape[2] != samples.shape[3]:
            raise UserError(f"the recalibration of {self.folder} is damaged: evaluate the run again")
        data = self.config.data
        number = number_of_file(data.base, video) if video is not None and isinstance(data, VideosConfig) else -1
        places = ClipPlaces(torch.full((len(samples),), number), torch.zeros(len(samples), dtype=torch.int64), 1)
        generator = torch.Generator().manual_seed(_seed_apart(seed, 1))
        mean = torch.cat([samples, others], dim=1).mean(dim=1, keepdim=True)
        return spaces[space](samples.cpu(), mean.cpu(), places, generator).to(samples.device)

    @torch.no_grad()
    def forecast(
        self,
        clip: Tensor,
        horizon: int,
        num_samples: int,
        seed: int = 0,
        *,
        actions: Tensor | None = None,
        recalibrate: bool = False,
        video: str | Path | None = None,
    ) -> Tensor:
        """Sampled futures of the labelled quantity: [B, L * T, C, H, W] -> [B, S, horizon, K], in its unit.

        The samples are those of `rollout` with the same seed, read by the ridge readout that the evaluation fitted.
        With `recalibrate` they are recalibrated after they are read; the arguments are those of `rollout`.

        Raises:
            UserError: as `rollout`, or the run was not evaluated at this checkpoint, or its videos have no labels.
        """
        readout, _ = load_readout(self.folder, self.num_updates, self.device)
        if len(readout.centre) != self.model.embedding_dim:
            raise UserError(f"the readout of {self.folder} is of another model: evaluate the run again")
        values = readout(self._rollout(clip, horizon, num_samples, seed, actions))
        if not recalibrate:
            return values
        others = readout(self._other_futures(clip, horizon, num_samples, seed, actions))
        return self._recalibrated("quantity", values, others, seed, video)

    def decode(self, clip: Tensor, futures: Tensor) -> Tensor:
        """Show futures of clips [B, L * T, C, H, W] as pictures, by the decoder of `worldmodel decode`.

        futures [B, S, horizon, D] are embeddings from `rollout` of the same clips.

        Returns: frames [B, S, horizon, T, C, H, W] in [0, 1], on the CPU. Frames above 64 px are decoded at 64 px and
            enlarged.

        Raises:
            UserError: futures of another shape, or the run has no decoder for this checkpoint.
        """
        context = self._clip(clip)[:, -1]
        dim = self.model.embedding_dim
        if futures.ndim != 4 or len(futures) != len(clip) or futures.shape[-1] != dim or not futures.numel():
            raise UserError(
                f"futures of shape {list(futures.shape)} do not fit {len(clip)} clips of the run {self.folder}: it "
                f"takes [{len(clip)}, S, horizon, {dim}]"
            )
        decoder = load_decoder(self.folder, self.config, self.num_updates, self.device)
        before = resized(context[:, -1:], decoder.side_px)[:, 0]
        frames = decode_paths(decoder, futures.float(), before)
        return resized(frames.flatten(0, 2), context.shape[-1]).unflatten(0, frames.shape[:3])

    def surprise(
        self,
        video: str | Path | Tensor,
        *,
        num_peaks: int = 5,
        step_frames: int | None = None,
        false_alarms: float | None = None,
        progress: bool = False,
    ) -> Timeline:
        """Score every transition of a video file, or of a clip [T, C, H, W] of any number of frames.

        The score is the transition's training loss in nats, KL(q || p) + prediction error / beta. With a scene code it
        also has the negative log probability of the same scene, and of an evaluated run that of ordinary motion.
        Without a latent variable it is the prediction error (worldmodel.evaluation.surprise).

        Args:
            step_frames: the distance between transitions in source frames. By default segments tile the video.
            false_alarms: a share of transitions, between 0 and 1. The timeline has the threshold that this share of the
                transitions of selection clips exceeds (worldmodel.evaluation.ordinary).

        Raises:
            UserError: the latent is sparse or an oracle, the run is conditioned on actions, or the video cannot be read
                or is too short for one transition; with `false_alarms`, the run was not evaluated at this checkpoint,
                or with too few selection clips for this rate.
        """
        options = SurpriseOptions(num_peaks, step_frames, progress)
        check_model(self.model)
        ordinary = load_ordinary(self.folder, self.num_updates)
        threshold = None if false_alarms is None else threshold_of(ordinary, false_alarms, self.folder)
        networks = dataclasses.replace(self.networks, ordinary_motion=ordinary and ordinary.motion)
        if isinstance(video, Tensor):
            timeline = clip_surprise(networks, self._checked(video, ("T", *self.frame_shape)), options)
        else:
            timeline = video_surprise(networks, self.config.data, Path(video), options)
        return dataclasses.replace(timeline, threshold=threshold)

    def influence(
        self,
        video: str | Path,
        *,
        start_frame: int = 0,
        num_shown: int = 8,
        num_clips: int = 2**14,
        progress: bool = False,
    ) -> Influence:
        """Rank training clips by how much they lowered the loss of the forecast of a clip of a video file.

        The clip is its context and what followed. The gradients of the training clips are stored in the run folder
        (worldmodel.evaluation.influence).

        Args:
            start_frame: the first frame of the clip, after resampling with data.fps.
            num_shown: training clips at each end whose frames are returned.
            num_clips: training clips to compare, at most, spread evenly over all.

        Raises:
            UserError: the run is not on video files, the latent is sparse or an oracle, the run is conditioned on
                actions, the video cannot be read or is too short, or the run folder cannot be written.
        """
        options = InfluenceOptions(start_frame, num_shown, num_clips, progress)
        place = RunFolder(self.folder), self.num_updates
        return video_influence(self.networks, self.config.data, *place, Path(video), options)

    def _segments(self, video: Tensor) -> Tensor:
        """Check segments [B, T, C, H, W], and convert them to the input of the networks."""
        checked = self._checked(video, ("B", self.config.data.num_frames, *self.frame_shape))
        return to_float(checked.to(self.device))

    def _clip(self, clip: Tensor) -> Tensor:
        """Check clips [B, L * T, C, H, W] of a context and what the model remembers before it: [B, L, T, C, H, W]."""
        data = self.config.data
        most, given = data.history_segments + 1, clip.shape[1] if clip.ndim == 5 else 0
        num_segments = max(1, min(most, given // data.num_frames))
        checked = self._checked(clip, ("B", num_segments * data.num_frames, *self.frame_shape))
        return split_segments(to_float(checked.to(self.device)), num_segments)

    def _checked(self, video: Tensor, expected: tuple[int | str, ...]) -> Tensor:
        """Return the video if it has the expected shape, whose first size is free. Raises UserError."""
        if video.ndim != len(expected) or tuple(video.shape[1:]) != expected[1:] or not len(video):
            wanted = ", ".join(str(size) for size in expected)
            raise UserError(
                f"a clip of shape {list(video.shape)} does not fit the run {self.folder}: it takes [{wanted}] "
                f"({'[B, T, C, H, W]' if len(expected) == 5 else '[T, C, H, W]'})"
            )
        if video.dtype != torch.uint8 and not video.is_floating_point():
            raise UserError(f"a clip of {video.dtype}: give uint8, or floating point in [0, 1]")
        # Causal observations have values of any size.
        if self.source.content == "frames" and video.is_floating_point() and not 0 <= video.min() <= video.max() <= 1:
            raise UserError(
                f"a clip of values {video.min():g} to {video.max():g}: give uint8, or floating point in [0, 1]"
            )
        return video


def load(
    run: str | Path,
    *,
    which: Literal["latest", "best"] = "latest",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    trust_code: bool = False,
    data_root: str | Path | None = None,
) -> TrainedRun:
    """Load a run folder, an exported run, or a run of the Hugging Face Hub.

    Args:
        run: a folder. If there is no folder of this name, a text of the form "owner/name" is a repository on the Hub,
            whose run is downloaded into the user's cache. A `Path` is always a folder.
        which: the checkpoint to load.
        device: the device of the networks.
        revision: a branch, a tag or a commit of the repository; by default the main branch.
        trust_code: import the code from outside of the project that the run's config names.
        data_root: the folder or URL of the run's data, if it is no longer the data.root of its config.

    Raises:
        UserError: there is no such run, it has no checkpoint, the checkpoint is damaged, the download fails, the config
            names code from outside without `trust_code`, the run has no data.root, or `data_root` is not a name.

    Examples:
        >>> run = worldmodel.load("runs/demo")
        >>> run = worldmodel.load("owner/name", revision="v1.0")
        >>> futures = run.rollout(clip, horizon=4, num_samples=64)  # [B, S, horizon, D]
    """
    folder = folder_of(run, which, revision)
    config = load_run_config(folder)
    check_trust(config, trust_code, source=f"{folder}/config.yaml")
    if data_root is not None:
        config = _with_data_root(config, str(data_root))
    checkpoint = load_checkpoint(folder, which, with_optimizer=False)
    if checkpoint is None:
        if checkpoint_name(folder) is None:
            raise UserError(f"the run {run} has no checkpoint yet: train it first")
        raise UserError(
            f"the run {run} has no best checkpoint yet, as its training has not been evaluated: continue it, or load "
            "the latest one"
        )
    _check_before_building(config, checkpoint, folder)
    training = build_training_model(config)
    check_shapes(training.state_dict(), checkpoint.model, folder)
    training.load_state_dict(checkpoint.model)
    teacher = None
    if training.objective.needs_teacher:
        teacher = Teacher(training.embedder)
        check_shapes(teacher.state_dict(), checkpoint.teacher, folder)
        teacher.load_state_dict(checkpoint.teacher)
        teacher = teacher.to(device).eval()
    return TrainedRun(folder, config, training.to(device).eval(), teacher, checkpoint.state)


def _with_data_root(config: Config, root: str) -> Config:
    data = config.data
    if not isinstance(data, VideosConfig | ImagesConfig):
        raise UserError(f"the clips of data.source={data.source} are not in a folder: leave out the data root {root!r}")
    tree = to_dict(config)
    tree["data"]["root"] = root
    return validate(tree, source=f"the data root {shown(root)}")


def _check_before_building(config: Config, checkpoint: Checkpoint, run: str | Path) -> None:
    """Compare the shapes of the weights with those of the config's networks, before these are allocated.

    Raises:
        UserError: shapes differ, or the networks of the config cannot be built.
    """
    # Files determine the sizes of a pretrained encoder. Trusted code may do what the meta device cannot.
    if isinstance(config.model.encoder, PretrainedConfig) or outside_names(config):
        return
    # A flow cannot be built on the meta device. Its sizes follow from the others.
    latent = config.model.latent
    is_flow = isinstance(latent, GaussianConfig) and latent.prior == "flow"
    if isinstance(latent, GaussianConfig) and is_flow:
        latent = dataclasses.replace(latent, prior="mixture")
    model = dataclasses.replace(config.model, latent=latent)
    try:
        with torch.device("meta"):
            network = build_training_model(dataclasses.replace(config, model=model))
    except (RuntimeError, OverflowError, MemoryError, ValueError) as error:
        raise UserError(f"{run}/config.yaml describes networks that cannot be built: {one_line(error)}") from None
    check_shapes(network.state_dict(), checkpoint.model, run, without="latent.prior." if is_flow else None)


def _seed_apart(seed: int, use: int) -> int:
    """Return a seed for other random numbers than those that `seed` itself is for. use: 0 or 1."""
    return int(torch.randint(2**62, (2,), generator=torch.Generator().manual_seed(seed))[use])
