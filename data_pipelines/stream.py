"""Endless, shuffled, resumable batches of clips, decoded in order by worker processes.

    stream = open_videos("videos", num_frames=16, batch_size=8, size_px=64)
    for batch in stream:
        batch["video"]  # uint8 [8, 16, 3, 64, 64]

A batch is a pure function of (index, spec, seed, batch number). It does not depend on how many ranks and workers share
the decoding (see clips.py). Each group of clips is decoded once per epoch, in order. A group that crosses the border of
two lanes is opened by both.
"""

import hashlib
import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipelines.batches import Batch, BatchStream
from data_pipelines.clip_decoder import (
    Clip,
    ClipCache,
    ClipSet,
    labels_of,
    lane_clips,
    make_clip_set,
    shards_in_turn,
    stack_clips,
)
from data_pipelines.clips import ClipSpec, ClipTable, EpochOrder, Ints, check_lanes, epoch_order, lanes_of_worker
from data_pipelines.errors import UserError
from data_pipelines.index import VideoIndex
from data_pipelines.mixing import mixed_epoch_order
from data_pipelines.processes import environment_int
from data_pipelines.remote.cache import HeldShards
from data_pipelines.roots import WeightedRoot, load_roots
from data_pipelines.split_folders import REMOTE_CACHE_MB, load_split
from data_pipelines.splits import Split
from data_pipelines.workers import DECODE_TIMEOUT_S, OTHER_WORK_S, Failures, Faults, Part, run_workers

ORDER_VERSION = 1  # increase it with any change to the order of clips
PLAN_S_PER_CLIP = 1e-5  # far more than computing the order of an epoch takes
MAX_LANES = 32  # of open_videos


@dataclass(frozen=True)
class ReadSettings:
    """Settings of decoding and of batches.

    batch_size: clips in a batch, over all ranks of a stream.
    size_px: the short side is resized to it and the long side cropped; None: frames keep their size.
    channels: 1 for luma, 3 for RGB, of each camera.
    num_workers: decoding processes; 0: decode in this process.
    max_bad_fraction: share of videos that may fail before UserError is raised.
    decode_timeout_s: a worker that takes longer for one clip is replaced, and the frame at which it hung is left out.
        It has no effect with num_workers=0.
    """

    batch_size: int = 16
    size_px: int | None = None
    channels: int = 3
    decoder: str = "auto"
    num_workers: int = 0
    max_bad_fraction: float = 0.1
    decode_timeout_s: float = DECODE_TIMEOUT_S


@dataclass(frozen=True)
class StreamSettings(ReadSettings):
    """ReadSettings, and the order of clips in a stream.

    num_lanes: independent sequences of clips; it divides batch_size, and the number of ranks divides it.
    pool_clips: decoded clips that may wait in memory for shuffling, over all lanes.
    shuffle: False: the clips of each lane come in order of their ids, which ascend from lane to lane. It is the same
        order in each epoch.
    cache_mb: MiB of decoded clips that the workers of a rank keep together for later epochs: the first that fit.
    """

    num_lanes: int = 16
    pool_clips: int = 1024
    seed: int = 0
    shuffle: bool = True
    cache_mb: int = 0

    @property
    def order(self) -> "OrderSettings":
        return OrderSettings(self.seed, self.shuffle, self.batch_size, self.num_lanes, self.pool_clips)


@dataclass(frozen=True)
class OrderSettings:
    """Everything that fixes the order of clips besides the index and the spec. The fingerprint hashes it."""

    seed: int
    shuffle: bool
    batch_size: int
    num_lanes: int
    pool_clips: int

    def of_epoch(self, table: ClipTable, epoch: int) -> EpochOrder:
        """Return the order of the clips in one epoch."""
        if table.first_clip_of_root is not None:
            return mixed_epoch_order(table, epoch=epoch, **asdict(self))
        return epoch_order(
            table.first_clip_of_group, epoch=epoch, first_clip_of_shard=table.first_clip_of_shard, **asdict(self)
        )


class VideoStream(BatchStream):
    """Shuffled batches of clips without end, the same for any number of ranks and workers.

    The batch size is global: a rank gets batch_size / world_size clips of every batch. An epoch leaves out
    num_clips % batch_size clips: different ones in each epoch if clips are shuffled, otherwise the last ones. The clips
    of a file that does not decode are dropped and not replaced, so some batches are smaller.

    clip_set: the clips of the index.

    Raises UserError: sizes do not divide each other, there are fewer clips than one batch, clips are longer than every
    video, videos differ in size without size_px, a decoder is not installed.
    """

    def __init__(
        self, index: VideoIndex, spec: ClipSpec, settings: StreamSettings, *, rank: int = 0, world_size: int = 1
    ) -> None:
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        self.clip_set = _clip_set(index, spec, settings)
        num_clips, num_lanes = self.clip_set.table.num_clips, settings.num_lanes
        check_lanes(num_clips, batch_size=settings.batch_size, num_lanes=num_lanes, world_size=world_size)
        if self.clip_set.table.first_clip_of_root is not None:
            settings.order.of_epoch(self.clip_set.table, 0)  # it raises before workers are started
        self._settings, self._rank, self._world_size = settings, rank, world_size
        self._num_workers = min(settings.num_workers, num_lanes // world_size)
        self._failures = Failures(index, settings.max_bad_fraction)
        if index.remote is not None:
            shards_of_rank = num_lanes // world_size + max(1, self._num_workers)
            index.remote.check_room(_ranks_here(world_size) * shards_of_rank)
        self.batches_per_epoch = num_clips // settings.batch_size
        facts = [ORDER_VERSION, index.content_hash, asdict(spec), asdict(settings.order)]
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def batches(self, start_batch: int = 0) -> Generator[Batch, None, None]:
        """Yield batches from number start_batch (counted from the beginning of the run) on, without end.

        Closing the generator ends the workers at once. Raises UserError: too many videos do not decode.
        """
        assert start_batch >= 0, f"start_batch={start_batch}"
        make_parts = partial(_parts_of_stream, self.clip_set, self._settings, self._rank, self._world_size, start_batch)
        parts = run_workers(make_parts, self._num_workers, self._settings.decode_timeout_s, self._failures)
        with closing(parts):
            while True:
                yield _batch_of(self.clip_set, [next(parts) for _ in range(max(1, self._num_workers))], self._failures)

    def places(self, start_batch: int = 0) -> Iterator[tuple[Ints, Ints]]:
        """Yield the ids and rows of this rank's clips of each batch, from number start_batch on, decoded or not."""
        settings, table = self._settings, self.clip_set.table
        lanes = np.arange(settings.num_lanes)[self._rank :: self._world_size]
        per_lane = settings.batch_size // settings.num_lanes
        rows = (lanes[:, None] * per_lane + np.arange(per_lane)).ravel()
        epoch, first_batch = divmod(start_batch, self.batches_per_epoch)
        while True:
            order = settings.order.of_epoch(table, epoch)
            clips = np.take_along_axis(order.decoded[lanes], order.delivered[lanes], axis=1)
            for number in range(first_batch, self.batches_per_epoch):
                yield clips[:, number * per_lane : (number + 1) * per_lane].ravel(), rows
            epoch, first_batch = epoch + 1, 0


def open_videos(
    root: str | Path | Sequence[WeightedRoot],
    *,
    split: Split | None = None,
    num_frames: int = 16,
    frame_stride: int = 1,
    clip_step: int | None = None,
    fps: float | None = None,
    batch_size: int = 16,
    size_px: int | None = 64,
    channels: int = 3,
    shuffle: bool = True,
    seed: int = 0,
    num_workers: int = 1,
    rank: int = 0,
    world_size: int = 1,
    camera: str | Sequence[str] | None = None,
    remote_cache_dir: str | Path | None = None,
    remote_cache_mb: int = REMOTE_CACHE_MB,
) -> VideoStream:
    """Open a folder of videos as an endless stream of batches of clips.

        stream = open_videos("videos", num_frames=16, batch_size=8, size_px=64)
        for batch in islice(stream, 100):
            batch["video"]  # uint8 [8, 16, 3, 64, 64]
        state = stream.state_dict()  # load_state_dict(state) continues here, also in another process

    Decoding runs in `num_workers` processes of the stream. In a DataLoader the stream needs
    DataLoader(stream, batch_size=None, num_workers=0).

    root: a folder of videos (searched recursively) or of tar shards, a LeRobot data set, or the URL of shards. Several
        folders are given with weights: [WeightedRoot("a", 2), WeightedRoot("b", 1)].
    split: "train", "selection" or "test": the videos of that subfolder, or a share of all videos. None: all videos.
    num_frames: frames in a clip (T).
    frame_stride: source frames from one frame of a clip to the next.
    clip_step: source frames from the start of a clip to that of the next one; None: clips do not overlap.
    fps: frames per second to which videos are resampled first; None: frames as they are stored.
    batch_size: clips in a batch, over all ranks.
    size_px: side of the square frames; None: frames keep their size, which all videos must share.
    channels: 1 for luma, 3 for RGB, of each camera.
    shuffle: False: clips come in the same order in each epoch.
    rank, world_size: of a distributed job. A rank gets its batch_size / world_size clips of every batch. Batches are
        the same, and states continue, for every world_size that divides the number of lanes. That is the largest
        divisor of batch_size up to 32, 20 for a batch of 40. Another world_size has other lanes, in another order.
    camera: of a LeRobot data set; None: the first by name. Several names: the frames of all of them, with C channels
        for each camera, in this order.
    remote_cache_dir, remote_cache_mb: the folder for shards from a URL, and its size limit in MiB; None: in the user's
        cache.

    Raises:
        UserError: there are no readable videos, they have fewer clips than one batch, they are shorter than one clip,
            `world_size` does not divide `batch_size`, or another value is out of range.
    """
    _check_range("world_size", world_size, 1)
    _check_range("rank", rank, 0, world_size - 1)
    _check_range("num_workers", num_workers, 0)
    _check_range("seed", seed, 0)
    if size_px is not None:
        _check_range("size_px", size_px, 1)
    if channels not in (1, 3):
        raise UserError(f"channels={channels} must be 1 or 3")
    cache = Path(remote_cache_dir) if remote_cache_dir else None
    options: Any = {"camera": camera, "cache_dir": cache, "cache_mb": remote_cache_mb}
    several = None if isinstance(root, str | Path) else root
    index = load_split(str(root), split, **options) if several is None else load_roots(several, split, **options)
    spec = ClipSpec(1, num_frames, frame_stride, clip_step, fps)
    num_lanes = _lanes_for(batch_size, world_size)
    settings = StreamSettings(
        batch_size, size_px, channels, num_workers=num_workers, num_lanes=num_lanes, seed=seed, shuffle=shuffle
    )
    return VideoStream(index, spec, settings, rank=rank, world_size=world_size)


def _check_range(name: str, value: int, least: int, most: int | None = None) -> None:
    """Raise UserError unless a value is at least `least`, and at most `most`."""
    if value < least or (most is not None and value > most):
        raise UserError(f"{name}={value} must be at least {least}" + ("" if most is None else f" and at most {most}"))


def _lanes_for(batch_size: int, world_size: int) -> int:
    """Return the largest number of lanes, up to MAX_LANES, that divides a batch and that `world_size` divides."""
    if batch_size < 1 or batch_size % world_size:
        raise UserError(f"batch_size={batch_size} must be a positive multiple of the {world_size} processes")
    candidates = range(world_size, max(MAX_LANES, world_size) + 1, world_size)
    return max(lanes for lanes in candidates if batch_size % lanes == 0)


def read_all(
    index: VideoIndex,
    spec: ClipSpec,
    settings: ReadSettings,
    *,
    max_clips: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Yield every clip (or max_clips of them, spread evenly) once, in order of clip ids. The last batch may be short.

    A rank gets its share (share_of_pass); rank after rank, the shares are all clips. Errors: as VideoStream.batches.
    """
    clip_set = _clip_set(index, spec, settings)
    clips = clips_of_pass(clip_set.table.num_clips, max_clips, rank, world_size)
    yield from read_clips(clip_set, clips, settings, ranks=world_size)


def read_clips(
    clip_set: ClipSet, clips: Ints, settings: ReadSettings, *, ranks: int = 1, failures: Failures | None = None
) -> Generator[Batch]:
    """Yield the clips with these ids, which ascend. The last batch may be short. Errors: as VideoStream.batches.

    ranks: how many processes read clips at the same time.
    failures: counts the videos that fail; None: those of this call.
    """
    index = clip_set.index
    failures = failures or Failures(index, settings.max_bad_fraction)
    num_workers = min(settings.num_workers, -(-len(clips) // settings.batch_size))
    if index.remote is not None:
        index.remote.check_room(_ranks_here(ranks) * 2 * max(1, num_workers))
    make_parts = partial(_parts_of_pass, clip_set, settings.batch_size, clips)
    parts = run_workers(make_parts, num_workers, settings.decode_timeout_s, failures)
    with closing(parts):
        for part in parts:
            yield _batch_of(clip_set, [part], failures)


def clips_of_pass(total: int, max_clips: int | None, rank: int, world_size: int) -> Ints:
    """Return the ids of the clips that a rank takes in one pass over `total` clips, or over max_clips of them."""
    num_clips = total if max_clips is None else min(max_clips, total)
    clips = np.arange(num_clips) * total // max(1, num_clips)
    return clips[share_of_pass(num_clips, rank, world_size)]


def share_of_pass(num_clips: int, rank: int, world_size: int) -> slice:
    """Return the clips of one pass that a rank takes: consecutive ones, so that few videos are opened by two ranks."""
    return slice(num_clips * rank // world_size, num_clips * (rank + 1) // world_size)


def _clip_set(index: VideoIndex, spec: ClipSpec, settings: ReadSettings) -> ClipSet:
    return make_clip_set(index, spec, size_px=settings.size_px, channels=settings.channels, decoder=settings.decoder)


def _ranks_here(world_size: int) -> int:
    """Return how many of the ranks run on this machine."""
    return min(world_size, environment_int("LOCAL_WORLD_SIZE", world_size, least=1))


def _parts_of_stream(
    clip_set: ClipSet,
    settings: StreamSettings,
    rank: int,
    world_size: int,
    start_batch: int,
    worker: int,
    num_workers: int,
    first_part: int,
    faults: Faults,
) -> Iterator[Part]:
    """Yield the contribution of one worker of one rank to each batch, from start_batch + first_part on, without end."""
    table, order = clip_set.table, settings.order
    lanes = np.array(
        lanes_of_worker(
            num_lanes=order.num_lanes, rank=rank, world_size=world_size, worker=worker, num_workers=num_workers
        )
    )
    per_lane = order.batch_size // order.num_lanes
    rows = (lanes[:, None] * per_lane + np.arange(per_lane)).ravel()
    cache = ClipCache(settings.cache_mb * 2**20 // num_workers)
    num_batches = table.num_clips // order.batch_size
    epoch, first_batch = divmod(start_batch + first_part, num_batches)
    with closing(HeldShards(clip_set.index.remote)) as shards:
        while True:
            faults.progress.work(OTHER_WORK_S + PLAN_S_PER_CLIP * table.num_clips)
            clip_order = order.of_epoch(table, epoch)
            faults.progress.work()
            decoded, delivered = clip_order.decoded[lanes], clip_order.delivered[lanes]
            skip = first_batch * per_lane
            queues = [
                lane_clips(clip_set, in_order, due, skip, faults, cache, partial(shards.hold, lane))
                for lane, in_order, due in zip(lanes.tolist(), decoded, delivered, strict=True)
            ]
            if clip_set.index.remote is not None:
                due_clips = zip(lanes.tolist(), decoded, delivered[:, skip:], strict=True)
                shards.expect(shards_in_turn(clip_set, due_clips, cache))
            for _ in range(first_batch, num_batches):
                clips = [clip for queue in queues for clip in islice(queue, per_lane)]
                yield _part_of(clip_set, clips, rows, faults)
            epoch, first_batch = epoch + 1, 0


def _parts_of_pass(
    clip_set: ClipSet,
    batch_size: int,
    clips: Ints,
    worker: int,
    num_workers: int,
    first_part: int,
    faults: Faults,
) -> Iterator[Part]:
    """Yield whole batches in order of clips: worker w decodes the batches w, w + num_workers, ..."""
    no_cache = ClipCache(0)
    stride = batch_size * num_workers
    firsts = range(worker * batch_size + first_part * stride, len(clips), stride)
    batches = [clips[first : first + batch_size] for first in firsts]
    with closing(HeldShards(clip_set.index.remote)) as shards:
        if clip_set.index.remote is not None and batches:
            due = np.concatenate(batches)
            shards.expect(shards_in_turn(clip_set, [(0, due, np.arange(len(due)))], no_cache))
        for ids in batches:
            rows = np.arange(len(ids))
            found = lane_clips(clip_set, ids, rows, 0, faults, no_cache, partial(shards.hold, 0))
            yield _part_of(clip_set, list(found), rows, faults)


def _part_of(clip_set: ClipSet, clips: Sequence[Clip], rows: Ints, faults: Faults) -> Part:
    """Stack the clips that decode. rows: their places in the global batch, [len(clips)]."""
    is_good = np.array([frames is not None for _, frames in clips], dtype=bool)
    video, clip_id = stack_clips(clip_set, clips)
    return Part(video, clip_id, rows[is_good], faults.report())


def _batch_of(clip_set: ClipSet, parts: Sequence[Part], failures: Failures) -> Batch:
    """Merge the parts of one batch in the order of rows and add labels. Raises UserError: too many videos failed."""
    for part in parts:
        failures.add(part.failures)
    video, clip_id, row = parts[0].video, parts[0].clip_id, parts[0].row
    if len(parts) > 1:
        row = np.concatenate([part.row for part in parts])
        order = np.argsort(row)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        row = row[order]
        video, clip_id = np.empty((len(row), *video.shape[1:]), dtype=np.uint8), np.empty_like(row)
        first = 0
        for part in parts:
            places = place[first : first + len(part.row)]
            video[places], clip_id[places] = part.video, part.clip_id
            first += len(places)
    ids = torch.from_numpy(clip_id)
    return {
        "video": torch.from_numpy(video),
        "clip_id": ids,
        "row": torch.from_numpy(row),
        "labels": labels_of(clip_set, ids),
    }
