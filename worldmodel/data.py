"""From a config to clips: the training stream, batches for evaluation, and the law where it is known.

Three splits of disjoint identities: "train" fits, "selection" chooses, "test" reports.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_pipelines.clips import ClipSpec
from data_pipelines.contents import Contents, contents_of, read_contents
from data_pipelines.errors import UserError, one_line_logger
from data_pipelines.files import write_text
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.remote.stores import Store, is_url
from data_pipelines.shards.index_file import SHARDS_NAME
from data_pipelines.splits import SPLITS, Split, share_of_split, split_index
from data_pipelines.stream import Batch, VideoStream, clips_of, read_all, share_of_pass
from data_pipelines.transforms import on_device, split_segments, to_float
from data_pipelines.worlds import kicked_mnist, moving_mnist
from data_pipelines.worlds.causal import CausalStream, CausalWorld
from data_pipelines.worlds.digits import load_sprites
from data_pipelines.worlds.kicked_mnist import KickedMnistLaw
from data_pipelines.worlds.law import Law
from data_pipelines.worlds.moving_mnist import MovingMnistLaw, MovingMnistStream
from data_pipelines.worlds.written import RECORDED, read_sprites, read_world
from worldmodel.config import CausalConfig, Config, DataConfig, MovingMnistConfig, OracleConfig, VideosConfig

logger = one_line_logger(__name__)

EVALUATION_BATCH = 128
MIN_CLIPS = 2
"""Fewer clips of a split have no spread to compare with."""
CONTENTS_NAME = "videos.jsonl"  # in a run folder

Stream = VideoStream | MovingMnistStream | CausalStream


class TrainingInputs(NamedTuple):
    """A batch as the model takes it, for K steps of prediction.

    segments [B, L, T, C, H, W]; known_r [B, R], the true r of an oracle latent, [B, 0] for other latents; actions
    [B, K, A], [B, K, 0] for a model without actions.
    """

    segments: Tensor
    known_r: Tensor
    actions: Tensor


def training_inputs(batch: Batch, config: Config, steps: int, device: torch.device) -> TrainingInputs:
    """A batch on the device, for `steps` steps of prediction. Raises UserError: a label is missing or of
    another size."""
    return TrainingInputs(
        segments_of(batch, num_segments(config, steps), device),
        oracle_r(batch, config, device),
        actions_of(batch, config, steps, device),
    )


def segments_of(batch: Batch, num_segments: int, device: torch.device) -> Tensor:
    """A batch's clips on the device, in [0, 1], cut into segments: [B, num_segments, T, C, H, W]."""
    return split_segments(to_float(on_device(batch["video"], device)), num_segments)


def num_segments(config: Config, steps: int) -> int:
    """Segments of a clip in which `steps` steps of prediction are made."""
    return config.data.num_segments + steps - 1


def segment_span(data: DataConfig) -> int:
    """Frames from the start of a segment to that of the next."""
    return data.num_frames * data.frame_stride


def oracle_r(batch: Batch, config: Config, device: torch.device) -> Tensor:
    """Return the true r [B, R] that an oracle latent takes from the labels; [B, 0] for other latents.

    Raises:
        UserError: the videos have no such label, or not of that size.
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
    """The actions between the first segments of each clip, for `steps` steps of prediction: float32 [B, steps, A].

    Those of a segment's last frame up to the next segment's last but one, which lead from one to the other.

    Raises:
        UserError: the videos have no such label of frames.
    """
    data, labels = config.data, batch["labels"]
    assert isinstance(data, VideosConfig), "the config is checked for this"
    name, num_frames = data.action_label, data.num_frames
    if name not in labels or labels[name].ndim != 3:
        has = ", ".join(sorted(key for key, values in labels.items() if values.ndim == 3)) or "none"
        raise UserError(f"data.action_label={name!r} is no label of frames: these videos have {has}")
    taken = labels[name][:, num_frames - 1 : (steps + 1) * num_frames - 1].float()
    return taken.unflatten(1, (steps, num_frames)).flatten(2)


def actions_of(batch: Batch, config: Config, steps: int, device: torch.device) -> Tensor:
    """Return the actions that the model is conditioned on, [B, steps, A]; [B, steps, 0] for a model without actions.

    Raises:
        UserError: the videos have no such label of frames, or not of that size.
    """
    if not config.model.action_dim:
        return torch.empty(len(batch["video"]), steps, 0, device=device)
    actions = labelled_actions(batch, config, steps)
    size = actions.shape[2] // config.data.num_frames
    if size != config.model.action_dim:
        assert isinstance(config.data, VideosConfig)
        raise UserError(f"the label {config.data.action_label!r} has {size} numbers: set model.action_dim={size}")
    return on_device(actions, device)


def training_stream(config: Config, steps: int, *, rank: int, world_size: int, device: torch.device) -> Stream:
    """The endless stream of one process's training batches, of clips for `steps` steps of prediction.

    Raises:
        UserError: the data cannot be read, or the number of processes does not divide a batch.
    """
    data = config.data
    if isinstance(data, CausalConfig):
        return CausalStream(
            causal_world(config), batch_size=data.batch_size, seed=config.seed, rank=rank, world_size=world_size
        )
    if isinstance(data, MovingMnistConfig):
        return MovingMnistStream(
            _sprites("train", data.mnist_dir),
            setting=data.setting,
            batch_size=data.batch_size,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
            device=device,
        )
    assert isinstance(data, VideosConfig), "the caller loads code from outside"
    return VideoStream(
        read_index(data, "train"),
        clip_spec(config, steps),
        size_px=data.size_px,
        channels=data.channels,
        batch_size=data.batch_size,
        num_lanes=data.num_lanes,
        pool_clips=data.pool_clips,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        num_workers=data.num_workers,
        decoder=data.decoder,
        max_bad_fraction=data.max_bad_fraction,
        decode_timeout_s=data.decode_timeout_s,
        cache_mb=data.cache_mb,
    )


def training_contents(config: Config) -> Contents | None:
    """What a run learns from, to be compared when it is resumed; None for worlds without files."""
    if not isinstance(config.data, VideosConfig):
        return None
    return contents_of(read_index(config.data, "train"), learned_labels(config))


def check_contents(config: Config, run: Path) -> None:
    """Compare the videos and labels with those that the checkpoints of a run have learned from; store them for later.

    A run that was begun without this file is compared from now on.

    Raises:
        UserError: a video or a label has changed, is new or is gone; the file is damaged or cannot be written.
    """
    now = training_contents(config)
    if now is None:
        return
    path = run / CONTENTS_NAME
    before = read_contents(path) if (run / "checkpoints" / "index.json").exists() else None
    if before is None:
        try:
            write_text(path, "".join(f"{line}\n" for line in now.lines()))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
    elif change := now.change_since(before):
        raise UserError(
            f"the videos of {run} have changed since its checkpoint: {change}: restore them, or start anew with "
            "--overwrite"
        )


def evaluation_batches(
    config: Config, split: Split, num_clips: int, horizon: int = 1, *, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """`num_clips` clips of a split, or all that there are, in a fixed order; each for `horizon` steps of prediction.

    Clips of videos are spread evenly over the split. A rank gets its share; rank after rank, the shares are the whole.
    """
    data = config.data
    if isinstance(data, MovingMnistConfig):
        batches = _fresh_batches(config, split, num_clips, share_of_pass(num_clips, rank, world_size))
    else:
        assert isinstance(data, VideosConfig), "the caller has batches of its own"
        batches = read_all(
            read_index(data, split),
            clip_spec(config, horizon),
            size_px=data.size_px,
            channels=data.channels,
            batch_size=EVALUATION_BATCH,
            decoder=data.decoder,
            num_workers=data.num_workers,
            max_clips=num_clips,
            decode_timeout_s=data.decode_timeout_s,
            rank=rank,
            world_size=world_size,
        )
    yield from (batch for batch in batches if len(batch["video"]))


def _fresh_batches(config: Config, split: Split, num_clips: int, share: slice) -> Iterator[Batch]:
    """The clips numbered `share` of the `num_clips` first ones that a world without files generates."""
    size = min(EVALUATION_BATCH, num_clips)
    seed = config.evaluation.seed + SPLITS.index(split)
    assert isinstance(config.data, MovingMnistConfig)
    sprites = _sprites(split, config.data.mnist_dir)
    stream = MovingMnistStream(sprites, setting=config.data.setting, batch_size=size, seed=seed)
    firsts = range(share.start // size * size, share.stop, size)
    for first, batch in zip(firsts, stream.batches(firsts.start // size), strict=False):
        yield _rows(batch, slice(max(0, share.start - first), share.stop - first))


def known_law(config: Config, split: Split) -> Law | None:
    """The true law behind a split's clips; None for videos from elsewhere, or cut otherwise than the labels say."""
    data = config.data
    if isinstance(data, MovingMnistConfig):
        return MovingMnistLaw(data.setting, _sprites(split, data.mnist_dir))
    if not isinstance(data, VideosConfig):
        return None
    if is_url(data.root) or (world := read_world(Path(data.root))) is None or world["world"] == RECORDED:
        return None
    sprites = read_sprites(Path(data.root) / split)
    law: Law
    if world["world"] == moving_mnist.WORLD:
        law = MovingMnistLaw(world["setting"], sprites)
    elif world["world"] == kicked_mnist.WORLD:
        law = KickedMnistLaw(world["borders"], sprites)
    else:
        raise UserError(f"{data.root} is a world that is not known here: {world['world']!r}")
    return law if _fits(config, law) else None


def _fits(config: Config, law: Law) -> bool:
    """Whether clips are cut and shown as the law's labels say."""
    data, cut = config.data, law.clip_format
    assert isinstance(data, VideosConfig)
    if (data.num_frames, data.size_px, data.channels) != (cut.num_frames, cut.size_px, 1):
        return False
    if (data.frame_stride, data.fps) != (1, None):
        return False
    if law.max_horizon is not None and config.evaluation.horizon > law.max_horizon:
        return False
    if cut.whole_videos:
        return data.num_segments == 3
    return clip_spec(config, config.evaluation.horizon).step % cut.num_frames == 0


def causal_world(config: Config) -> CausalWorld:
    """The mixing network and the law of a run's seed."""
    assert isinstance(config.data, CausalConfig)
    return CausalWorld(config.data.change, config.seed)


def clip_spec(config: Config, steps: int) -> ClipSpec:
    """How clips for `steps` steps of prediction are cut."""
    data = config.data
    assert isinstance(data, VideosConfig)
    return ClipSpec(num_segments(config, steps), data.num_frames, data.frame_stride, data.clip_step, data.fps)


def _rows(batch: Batch, rows: slice) -> Batch:
    return {
        "video": batch["video"][rows],
        "clip_id": batch["clip_id"][rows],
        "labels": {name: values[rows] for name, values in batch["labels"].items()},
    }


@lru_cache(maxsize=4)
def _sprites(split: Split, mnist_dir: str | None) -> Any:
    return load_sprites(split, Path(mnist_dir) if mnist_dir else None)


@lru_cache(maxsize=4)
def read_index(data: VideosConfig, split: Split) -> VideoIndex:
    """A split's videos: those of its folder, where splits have folders, otherwise a share of all videos."""
    root = data.root.rstrip("/")
    folders = split_folders(root)
    index = load_videos(
        folders[split] if folders else root,
        camera=data.camera,
        siblings=[Path(folder) for folder in dict.fromkeys(folders.values())] if folders else [],
        max_bad_fraction=data.max_bad_fraction,
        max_frame_px=data.max_frame_px,
        cache_dir=Path(data.remote_cache_dir) if data.remote_cache_dir else None,
        cache_mb=data.remote_cache_mb,
    )
    if folders is None:
        return split_index(index, split)
    sharing = [other for other in SPLITS if folders[other] == folders[split]]
    if len(sharing) == 1:
        return index
    if split == sharing[0]:
        logger.info("'%s' has no folder for %s: %s share '%s'", root, sharing[1], " and ".join(sharing), folders[split])
    return share_of_split(index, sharing.index(split), PARTS[sharing[0]])


SPLIT_NAMES: dict[Split, Sequence[str]] = {
    "train": ("train",), "selection": ("selection", "validation", "val", "valid", "dev"), "test": ("test",),
}  # fmt: skip
PARTS: dict[Split, tuple[float, float]] = {"train": (0.9, 0.1), "selection": (0.5, 0.5)}
"""How two splits share a folder, by the first of them: without one for selection a tenth of train/ selects, without
one for test half of the held-out videos test."""


def split_folders(root: str | Path) -> dict[Split, str] | None:
    """The subfolders that are the splits, in small letters, Capitalised or in CAPITALS.

    Where there is one for training and one other, that split which has none shares the folder of another. None: videos
    are not in folders of splits.
    """
    folders: dict[Split, str] = {}
    for split, names in SPLIT_NAMES.items():
        spelt = (f"{root}/{spell(name)}" for name in names for spell in (str.lower, str.capitalize, str.upper))
        if (found := next(filter(_is_folder, spelt), None)) is not None:
            folders[split] = found
    if "train" not in folders or len(folders) < 2:
        return None
    if "test" not in folders:
        folders["test"] = folders["selection"]
    if "selection" not in folders:
        folders["selection"] = folders["train"]
    return folders


def used_labels(config: Config) -> set[str]:
    """The labels that a config asks for."""
    return learned_labels(config) | ({config.evaluation.label} if config.evaluation.label else set())


def learned_labels(config: Config) -> set[str]:
    """Return the labels that training reads."""
    label = oracle_label(config)
    used = set() if label is None else {label}
    if config.model.action_dim:
        assert isinstance(config.data, VideosConfig)
        used.add(config.data.action_label)
    return used


def check_splits(config: Config, uses: Mapping[tuple[Split, int], str]) -> None:
    """Find out before any work whether every split holds the clips and labels that will be asked of it.

    uses: for a split and a number of steps of prediction, the keys to lower where its videos are too short for them.

    Raises:
        UserError: no video of a split is long enough, or a label is faulty. The message names both.
    """
    if not isinstance(config.data, VideosConfig):
        return
    for (split, steps), keys in uses.items():
        index, spec = read_index(config.data, split), clip_spec(config, steps)
        for name in sorted(used_labels(config) & index.label_faults.keys()):
            raise UserError(f"the label {name!r} cannot be used: {index.label_faults[name]}")
        try:
            num_clips = clips_of(index, spec).num_clips
        except UserError as error:
            raise UserError(f"the {split} split of {config.data.root}: {error} (here: {keys})") from None
        if num_clips < MIN_CLIPS:
            raise UserError(
                f"the {split} split of {config.data.root} has fewer than {MIN_CLIPS} clips of "
                f"{num_segments(config, steps)} segments: add videos, or lower data.clip_step, {keys}"
            )


CUT_KEYS = "data.num_segments, data.num_frames or data.frame_stride"


def training_uses(config: Config) -> dict[tuple[Split, int], str]:
    """What training asks of the splits, for check_splits: rollouts, and those of refinement."""
    uses: dict[tuple[Split, int], str] = {
        ("train", config.objective.rollout_steps): f"objective.rollout_steps, {CUT_KEYS}"
    }
    if config.train.refine_steps:
        uses["train", config.train.refine_horizon] = f"train.refine_horizon, {CUT_KEYS}"
    return uses


def evaluation_uses(config: Config) -> dict[tuple[Split, int], str]:
    """What evaluations ask of the splits, for check_splits: forecasts over a horizon, and fits of one step."""
    horizon = f"evaluation.horizon, {CUT_KEYS}"
    return {
        ("train", 1): CUT_KEYS,
        ("selection", config.evaluation.horizon): horizon,
        ("test", config.evaluation.horizon): horizon,
    }


def _is_folder(path: str) -> bool:
    """Whether there is such a folder; behind a URL, such a folder of shards."""
    return Store(path).holds(SHARDS_NAME) if is_url(path) else Path(path).is_dir()
