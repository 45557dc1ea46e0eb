"""Videos in files: a folder, tar shards, a LeRobot data set or a URL."""

import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipelines.batches import Batch, BatchStream
from data_pipelines.clip_decoder import ClipSet, clips_of, make_clip_set
from data_pipelines.clips import ClipSpec, frames_on_screen
from data_pipelines.contents import Contents, contents_of
from data_pipelines.errors import UserError
from data_pipelines.formats.base import Format
from data_pipelines.index import VideoIndex
from data_pipelines.remote.stores import is_url
from data_pipelines.roots import WeightedRoot, load_roots
from data_pipelines.split_folders import load_split
from data_pipelines.splits import Split
from data_pipelines.stream import ReadSettings, StreamSettings, VideoStream, read_all
from data_pipelines.worlds import kicked_mnist, moving_mnist, occlusion
from data_pipelines.worlds.game_law import GameLaw
from data_pipelines.worlds.games import GAMES, SIZE_PX, Recording
from data_pipelines.worlds.kicked_mnist import KickedMnistLaw
from data_pipelines.worlds.law import Law
from data_pipelines.worlds.moving_mnist import MovingMnistLaw
from data_pipelines.worlds.written import RECORDED, read_sprites, read_world
from worldmodel import parts
from worldmodel.config import VideosConfig, frame_channels, num_cameras
from worldmodel.sources.source import EVALUATION_BATCH, MIN_CLIPS, ClipPlaces, Content


class VideosSource:
    """Clips of video files (worldmodel.sources.source.Source).

    Each split is indexed when it is first needed. The same source sees the same videos from then on. A new one sees
    videos that were added since.
    """

    content: Content = "frames"
    factors = None

    def __init__(self, data: VideosConfig, *, seed: int, evaluation_seed: int) -> None:
        self._data, self._seed = data, seed
        self._indexes: dict[Split, VideoIndex] = {}

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        return frame_channels(self._data), self._data.size_px, self._data.size_px

    @property
    def url(self) -> str | None:
        root = self._data.root
        return root if isinstance(root, str) and is_url(root) else None

    def index(self, split: Split) -> VideoIndex:
        """Return the index of a split's videos: those of its folder, or a share of all videos.

        Raises:
            UserError: there are no videos, or too many cannot be read.
        """
        if split not in self._indexes:
            self._indexes[split] = load_index(self._data, split)
        return self._indexes[split]

    def clip_index(self, split: Split) -> VideoIndex:
        """Return the index of a split with actions as clips hold them: those of a delivered frame and of skipped ones.

        Raises:
            UserError: as `index`.
        """
        return self.index(split).with_blocks(self._data.action_label, self._data.frame_stride)

    def clip_spec(self, steps: int, clip_step: int | None = None) -> ClipSpec:
        """Return how clips for `steps` steps of prediction are cut."""
        data = self._data
        num_segments = data.history_segments + data.num_segments + steps - 1
        return ClipSpec(num_segments, data.num_frames, data.frame_stride, clip_step or data.clip_step, data.fps)

    def clip_set(self, split: Split, steps: int) -> ClipSet:
        """Return all clips of a split for `steps` steps of prediction."""
        data = self._data
        shown: Any = {"size_px": data.size_px, "channels": data.channels, "decoder": data.decoder}
        return make_clip_set(self.clip_index(split), self.clip_spec(steps), **shown)

    def training_stream(
        self, steps: int, *, rank: int, world_size: int, device: torch.device, clip_step: int | None = None
    ) -> BatchStream:
        return self.video_stream(steps, rank=rank, world_size=world_size, clip_step=clip_step)

    def video_stream(
        self, steps: int, *, rank: int = 0, world_size: int = 1, clip_step: int | None = None
    ) -> VideoStream:
        """Return the stream of one process's training batches, with pixels. Arguments as in `training_stream`."""
        data = self._data
        settings = StreamSettings(
            batch_size=data.batch_size,
            size_px=data.size_px,
            channels=data.channels,
            decoder=data.decoder,
            num_workers=data.num_workers,
            max_bad_fraction=data.max_bad_fraction,
            decode_timeout_s=data.decode_timeout_s,
            num_lanes=data.num_lanes,
            pool_clips=data.pool_clips,
            seed=self._seed,
            cache_mb=data.cache_mb,
        )
        spec = self.clip_spec(steps, clip_step)
        return VideoStream(self.clip_index("train"), spec, settings, rank=rank, world_size=world_size)

    def evaluation_batches(
        self, split: Split, num_clips: int, horizon: int = 1, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """Clips are spread evenly over the split: over all clips of several roots, whatever their weights."""
        settings = read_settings(self._data, EVALUATION_BATCH)
        spec = self.clip_spec(horizon)
        index = self.clip_index(split)
        batches = read_all(index, spec, settings, max_clips=num_clips, rank=rank, world_size=world_size)
        yield from (batch for batch in batches if len(batch["video"]))

    def clip_places(self, split: Split, clip_id: Tensor, horizon: int = 1) -> ClipPlaces:
        index, spec = self.index(split), self.clip_spec(horizon)
        table, clips = clips_of(index, spec), clip_id.numpy()
        rows = table.videos_of(clips)
        folder = index.root.name if self.url else os.path.relpath(index.root, self._data.base)
        numbers = np.zeros(len(index.videos), dtype=np.int64)
        for row in np.unique(rows).tolist():
            video = index.videos[row]
            episode = () if index.episodes is None else index.episodes[row]
            numbers[row] = video_number(os.path.normpath(os.path.join(folder, video.path)), video.shard, *episode)
        first_frame = torch.from_numpy(table.starts_of(clips))
        return ClipPlaces(torch.from_numpy(numbers[rows]), first_frame, spec.span)

    def known_law(self, split: Split, horizon: int) -> Law | None:
        """Return the law of a written world; None for other videos, or if clips are not cut as its labels require."""
        root = self._data.root
        if not isinstance(root, str) or self.url:
            return None
        if (world := read_world(Path(root))) is None or world["world"] in (RECORDED, occlusion.WORLD):
            return None
        if world["world"] in GAMES:
            return self._game_law(Path(root), Recording.of_world(world), split)
        sprites = read_sprites(Path(root) / split)
        law: Law
        if world["world"] == moving_mnist.WORLD:
            law = MovingMnistLaw(world["setting"], sprites)
        elif world["world"] == kicked_mnist.WORLD:
            law = KickedMnistLaw(world["borders"], sprites)
        else:
            raise UserError(f"{root} holds an unknown world: {world['world']!r}")
        return law if self._fits(law, horizon) else None

    def _game_law(self, root: Path, recording: Recording, split: Split) -> GameLaw | None:
        """Return the law of a recorded game; None if frames are shown in another size, or clips are cut by time."""
        data = self._data
        if data.size_px != SIZE_PX or data.fps is not None:
            return None
        return GameLaw(root, recording, split, data.num_frames, data.frame_stride, data.channels)

    def _fits(self, law: Law, horizon: int) -> bool:
        """Return whether clips are cut and shown as the labels of the law require."""
        data, cut = self._data, law.clip_format
        if (data.num_frames, data.size_px, data.channels) != (cut.num_frames, cut.size_px, 1):
            return False
        if (data.frame_stride, data.fps) != (1, None):
            return False
        if law.max_horizon is not None and horizon > law.max_horizon:
            return False
        if cut.whole_videos:
            return (data.num_segments, data.history_segments) == (3, 0)
        return self.clip_spec(horizon).step % cut.num_frames == 0

    def check_split(self, split: Split, steps: int, labels: Collection[str], keys: str) -> None:
        index, spec, root = self.index(split), self.clip_spec(steps), self._data.place
        for name in sorted(index.label_faults.keys() & labels):
            raise UserError(f"the label {name!r} cannot be used: {index.label_faults[name]}")
        try:
            num_clips = clips_of(index, spec).num_clips
        except UserError as error:
            data, more = self._data, steps - 1
            history = f" plus data.history_segments={data.history_segments}" if data.history_segments else ""
            own = f"data.num_segments={data.num_segments}{history}"
            why = f", and num_segments is {own} plus {more} for further steps" if more else ""
            raise UserError(f"the {split} split of {root}: {error} (here: {keys}{why})") from None
        if num_clips < MIN_CLIPS:
            raise UserError(
                f"the {split} split of {root} has fewer than {MIN_CLIPS} clips of {spec.num_segments} segments: add "
                f"videos, or lower data.clip_step, {keys}"
            )

    def contents(self, labels: Collection[str]) -> Contents:
        return contents_of(self.index("train"), set(labels))

    def video_files(self, split: Split, steps: int) -> Iterator[Path]:
        if num_cameras(self._data) > 1:
            return
        index, span = self.index(split), self.clip_spec(steps).span
        for video in index.videos:
            if not video.shard and len(frames_on_screen(video, self._data.fps)) >= span:
                yield index.root / video.path


def read_settings(data: VideosConfig, batch_size: int) -> ReadSettings:
    """Return how clips are decoded in one pass."""
    return ReadSettings(
        batch_size=batch_size,
        size_px=data.size_px,
        channels=data.channels,
        decoder=data.decoder,
        num_workers=data.num_workers,
        max_bad_fraction=data.max_bad_fraction,
        decode_timeout_s=data.decode_timeout_s,
    )


def load_index(data: VideosConfig, split: Split | None) -> VideoIndex:
    """Return the index of a split's videos; None: of all videos.

    Raises:
        UserError: there are no videos, or too many cannot be read.
    """
    options: dict[str, Any] = {
        "format": _format(data),
        "camera": data.camera,
        "max_bad_fraction": data.max_bad_fraction,
        "max_frame_px": data.max_frame_px,
        "cache_dir": Path(data.remote_cache_dir) if data.remote_cache_dir else None,
        "cache_mb": data.remote_cache_mb,
    }
    if isinstance(data.root, str):
        return load_split(data.root, split, **options)
    return load_roots([WeightedRoot(root.path, root.weight) for root in data.root], split, **options)


def _format(data: VideosConfig) -> Format | None:
    """Return the format that the config names; None if it is to be detected. Raises UserError: it cannot be loaded."""
    return None if data.format is None else parts.make("data.format", data.format, {}, Format)


def number_of_file(root: str, video: str | Path) -> int:
    """Return the number that a plain video file has in a data set with this root, if it is one of its videos."""
    return video_number(os.path.normpath(os.path.relpath(video, root)), "")


def video_number(name: str, *part: object) -> int:
    """Return a number of 63 bits for a video: a hash of its path below the root of the data, its shard and its episode.

    It is the same in all splits, and on all machines.
    """
    return int.from_bytes(hashlib.sha256(os.fsencode("\0".join(map(str, (name, *part))))).digest()[:8], "big") >> 1
