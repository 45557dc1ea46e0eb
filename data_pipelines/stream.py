"""Endless, shuffled, resumable batches of clips, decoded in order by worker processes.

What is delivered is a pure function of (index, spec, seed, batch number); how many ranks and workers share
the decoding does not change it (see clips.py). Each group of clips is decoded once an epoch, in order; one
that falls across the border of two lanes is opened by both.
"""

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch

from data_pipelines.clips import (
    ClipSpec,
    ClipTable,
    EpochOrder,
    Ints,
    check_lanes,
    epoch_order,
    frames_on_screen,
    lanes_of_worker,
    make_clip_table,
    resample,
    with_shards,
)
from data_pipelines.containers import video_url
from data_pipelines.contents import Stamp, shard_stamps, why_changed
from data_pipelines.decoders import DecodeError, Frame, VideoReader, open_video, resolve_decoder
from data_pipelines.errors import UserError
from data_pipelines.index import VideoIndex
from data_pipelines.processes import environment_int
from data_pipelines.remote.cache import HeldShards
from data_pipelines.workers import DECODE_TIMEOUT_S, OTHER_WORK_S, Failures, Faults, Part, run_workers

ORDER_VERSION = 1  # to be raised with any change to the order in which clips come

# "video" [B, T, C, H, W], "clip_id" int64 [B], "labels" dict of tensors [B, ...]; of streams also "row" int64 [B], the
# place of each clip in the global batch, which is the same for any number of ranks and workers.
Batch = dict[str, Any]
Clip = tuple[int, Sequence[Frame] | None]  # id and frames; None: its file does not decode
PLAN_S_PER_CLIP = 1e-5  # far more than the order of an epoch takes


@dataclass(frozen=True)
class ClipSource:
    """Where clips come from and what a frame looks like: all that decoding needs to know.

    shard_stamps: as contents.shard_stamps returned them when the source was made.
    """

    index: VideoIndex
    spec: ClipSpec
    table: ClipTable
    channels: int
    size_px: int | None
    decoder: str
    shard_stamps: Mapping[str, Stamp]

    def why_changed(self, video: int, faults: Faults) -> str:
        return why_changed(self.index, self.shard_stamps, video, faults)

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """T, C, H, W"""
        first = self.index.videos[0]
        height, width = (self.size_px, self.size_px) if self.size_px else (first.height, first.width)
        return self.spec.length, self.channels, height, width


def make_source(index: VideoIndex, spec: ClipSpec, *, size_px: int | None, channels: int, decoder: str) -> ClipSource:
    """Raises UserError: no such decoder, sizes differ with size_px=None, clips longer than every video, unknown fps."""
    if size_px is None:
        sizes = {(video.width, video.height): video.path for video in reversed(index.videos)}
        if len(sizes) > 1:
            (a, path_a), (b, path_b) = sorted(sizes.items(), key=lambda item: item[1])[:2]
            raise UserError(
                f"videos differ in size ('{path_a}' is {a[0]}x{a[1]}, '{path_b}' {b[0]}x{b[1]}): set size_px"
            )
    table = clips_of(index, spec)
    return ClipSource(index, spec, table, channels, size_px, resolve_decoder(decoder), shard_stamps(index))


def clips_of(index: VideoIndex, spec: ClipSpec) -> ClipTable:
    """Raises UserError: clips longer than every video, a video of unknown rate with spec.fps."""
    ranges: Sequence[tuple[int, int]] = index.frame_ranges
    keyframes: Sequence[Sequence[int]] = [video.keyframes for video in index.videos]
    if spec.fps is not None:
        ranges, keyframes = resample(index.videos, ranges, spec.fps)
    table = make_clip_table(ranges, keyframes, spec)
    return with_shards(table, [video.shard for video in index.videos]) if index.videos[0].shard else table


class ClipDecoder:
    """Decodes clips that come in order of time within each group, opening each group's file once.

    A clip is delivered if and only if decoding from the keyframe at or before it through its last frame
    succeeds, so that what is delivered does not depend on which clips were decoded before it. No clip is delivered
    from a file that has other content than when it was indexed.
    """

    def __init__(self, source: ClipSource, faults: Faults, hold: Callable[[str], None]) -> None:
        self._source, self._faults, self._hold = source, faults, hold
        self._group = -1
        self._reader: VideoReader | None = None
        self._source_frames = np.empty(0, dtype=np.int64)  # by number of the resampled frame
        self._recent: dict[int, Frame] = {}  # source frames that overlapping clips share
        self._failed_frame = -1

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader, self._recent = None, {}

    def decode(self, video: int, group: int, start: int) -> list[Frame] | None:
        """The frames of the clip of `video` that starts at (resampled) frame `start`, or None if they do not decode."""
        spec = self._source.spec
        facts = self._source.index.videos[video]
        if group != self._group:
            self.close()
            self._group, self._failed_frame = group, -1
            self._source_frames = frames_on_screen(facts, spec.fps)
        shown = self._source_frames[start : start + spec.span]
        passed = shown[:: spec.grid].tolist()
        keyframe = facts.keyframes[bisect_right(facts.keyframes, passed[0]) - 1]
        if keyframe <= self._failed_frame or self._faults.prevent(video, keyframe, passed[-1] + 1):
            return None  # it would meet the damage again
        progress = self._faults.progress
        if self._reader is None:
            progress.work(math.inf)  # may wait for the network, which nobody should take for a decoder that hangs
            self._hold(facts.shard)
        progress.decode(video)
        try:
            if self._reader is None:
                self._refuse_changed(video)
                progress.decode(video)
                self._reader = open_video(
                    video_url(self._source.index.root, facts),
                    facts,
                    channels=self._source.channels,
                    size_px=self._source.size_px,
                    decoder=self._source.decoder,
                )
            recent = {frame: array for frame, array in self._recent.items() if frame >= passed[0]}
            for frame in passed:
                if frame not in recent:
                    progress.at_frame(frame)
                    recent[frame] = self._reader.read(frame)
            self._refuse_changed(video)  # while it was being read
        except DecodeError as error:
            reason = self._source.why_changed(video, self._faults) or f"does not decode ({error})"
            self._faults.found.setdefault(video, reason)
            self._failed_frame = error.frame
            self.close()
            return None
        finally:
            progress.work()
        self._recent = recent
        return [recent[frame] for frame in shown[:: spec.frame_stride].tolist()]

    def _refuse_changed(self, video: int) -> None:
        if reason := self._source.why_changed(video, self._faults):
            raise DecodeError(reason)


class ClipCache:
    """Decoded clips that one worker keeps for later epochs, the first ones that fit; it changes no pixel."""

    def __init__(self, max_bytes: int) -> None:
        self._free_bytes = max_bytes
        self._clips: dict[int, Sequence[Frame]] = {}

    def get(self, clip_id: int) -> Sequence[Frame] | None:
        return self._clips.get(clip_id)

    def add(self, clip_id: int, frames: Sequence[Frame]) -> None:
        """Frames that overlapping clips share count for each of them."""
        num_bytes = sum(frame.nbytes for frame in frames)
        if num_bytes <= self._free_bytes:
            self._free_bytes -= num_bytes
            self._clips[clip_id] = frames


def lane_clips(
    source: ClipSource,
    decoded: Ints,
    delivered: Ints,
    skip: int,
    faults: Faults,
    cache: ClipCache,
    hold: Callable[[str], None],
) -> Iterator[Clip]:
    """One lane's clips of one epoch in order of delivery, from number `skip` on.

    Clips are decoded in order, no further than the one that is due, and wait in memory for their turn;
    epoch_order bounds how many. Those delivered before `skip`, or in the cache, are not decoded again.
    hold: called with a shard's name before a video in it is opened.
    """
    wanted = np.ones(len(decoded), dtype=bool)
    wanted[delivered[:skip]] = False
    videos = source.table.videos_of(decoded)
    groups = source.table.groups_of(decoded)
    starts = source.table.starts_of(decoded)
    last_of_group = np.append(groups[1:] != groups[:-1], True)
    decoder = ClipDecoder(source, faults, hold)
    waiting: dict[int, Sequence[Frame] | None] = {}
    next_position = 0
    try:
        for position in delivered[skip:].tolist():
            while next_position <= position:
                if wanted[next_position]:
                    at, clip_id = next_position, int(decoded[next_position])
                    frames = cache.get(clip_id)
                    if frames is None:
                        frames = decoder.decode(int(videos[at]), int(groups[at]), int(starts[at]))
                        if frames is not None:
                            cache.add(clip_id, frames)
                    waiting[at] = frames
                if last_of_group[next_position]:
                    decoder.close()  # now, not at the next group: a decoder a lane would cost a third of the speed
                next_position += 1
            yield int(decoded[position]), waiting.pop(position)
    finally:
        decoder.close()


def shards_in_turn(
    source: ClipSource, orders: Iterable[tuple[int, Ints, Ints]], cache: ClipCache
) -> list[tuple[int, str]]:
    """The shards that lanes are going to decode from, as (lane, shard), the first needed first.

    orders: for each lane its number, its clips in order of decoding, and the positions among them that are due.
    """
    turns = []
    for lane, decoded, due in orders:
        last = ""
        positions = np.sort(due)
        for position, video in zip(positions.tolist(), source.table.videos_of(decoded[positions]), strict=True):
            shard = source.index.videos[video].shard
            if shard != last and cache.get(int(decoded[position])) is None:
                turns.append((position, lane, shard))
                last = shard
    return [(lane, shard) for _, lane, shard in sorted(turns)]


def stack_clips(source: ClipSource, clips: Sequence[Clip]) -> tuple[Frame, Ints]:
    """Clips that decoded -> video uint8 [B, T, C, H, W] and clip ids int64 [B]."""
    good = [(clip_id, frames) for clip_id, frames in clips if frames is not None]
    video = np.empty((len(good), *source.clip_shape), dtype=np.uint8)
    for row, (_, frames) in enumerate(good):
        np.stack(frames, out=video[row])
    return video, np.array([clip_id for clip_id, _ in good], dtype=np.int64)


@dataclass(frozen=True)
class PartsOfStream:
    """What one worker of one rank contributes to each batch, from start_batch on, without end."""

    source: ClipSource
    order: "OrderSettings"
    rank: int
    world_size: int
    start_batch: int
    cache_bytes: int

    def __call__(self, worker: int, num_workers: int, first_part: int, faults: Faults) -> Iterator[Part]:
        with closing(HeldShards(self.source.index.remote)) as shards:
            yield from self._parts(worker, num_workers, first_part, faults, shards)

    def _parts(
        self, worker: int, num_workers: int, first_part: int, faults: Faults, shards: HeldShards
    ) -> Iterator[Part]:
        lanes = lanes_of_worker(
            num_lanes=self.order.num_lanes,
            rank=self.rank,
            world_size=self.world_size,
            worker=worker,
            num_workers=num_workers,
        )
        per_lane = self.order.batch_size // self.order.num_lanes
        cache = ClipCache(self.cache_bytes // num_workers)
        num_batches = self.source.table.num_clips // self.order.batch_size
        epoch, first_batch = divmod(self.start_batch + first_part, num_batches)
        while True:
            faults.progress.work(OTHER_WORK_S + PLAN_S_PER_CLIP * self.source.table.num_clips)
            order = self.order.of_epoch(self.source.table, epoch)
            faults.progress.work()
            queues = [
                lane_clips(
                    self.source,
                    order.decoded[lane],
                    order.delivered[lane],
                    first_batch * per_lane,
                    faults,
                    cache,
                    partial(shards.hold, lane),
                )
                for lane in lanes
            ]
            if self.source.index.remote is not None:
                due = ((lane, order.decoded[lane], order.delivered[lane][first_batch * per_lane :]) for lane in lanes)
                shards.expect(shards_in_turn(self.source, due, cache))
            for _ in range(first_batch, num_batches):
                clips: list[Clip] = []
                rows: list[int] = []
                for lane, queue in zip(lanes, queues, strict=True):
                    clips.extend(islice(queue, per_lane))
                    rows.extend(range(lane * per_lane, (lane + 1) * per_lane))
                good = [row for row, clip in zip(rows, clips, strict=True) if clip[1] is not None]
                video, clip_id = stack_clips(self.source, clips)
                yield {
                    "video": video,
                    "clip_id": clip_id,
                    "row": np.array(good, dtype=np.int64),
                    "failures": faults.report(),
                }
            epoch, first_batch = epoch + 1, 0


@dataclass(frozen=True)
class PartsOfPass:
    """Whole batches in order of clips: worker w decodes the batches w, w + num_workers, ..."""

    source: ClipSource
    batch_size: int
    clips: Ints

    def __call__(self, worker: int, num_workers: int, first_part: int, faults: Faults) -> Iterator[Part]:
        with closing(HeldShards(self.source.index.remote)) as shards:
            yield from self._parts(worker, num_workers, first_part, faults, shards)

    def _parts(
        self, worker: int, num_workers: int, first_part: int, faults: Faults, shards: HeldShards
    ) -> Iterator[Part]:
        no_cache = ClipCache(0)
        hold = partial(shards.hold, 0)
        stride = self.batch_size * num_workers
        firsts = range(worker * self.batch_size + first_part * stride, len(self.clips), stride)
        batches = [self.clips[first : first + self.batch_size] for first in firsts]
        if self.source.index.remote is not None and batches:
            due = np.concatenate(batches)
            shards.expect(shards_in_turn(self.source, [(0, due, np.arange(len(due)))], no_cache))
        for ids in batches:
            clips = list(lane_clips(self.source, ids, np.arange(len(ids)), 0, faults, no_cache, hold))
            video, clip_id = stack_clips(self.source, clips)
            yield {"video": video, "clip_id": clip_id, "failures": faults.report()}


@dataclass(frozen=True)
class OrderSettings:
    """All that fixes the order of clips besides the index and the spec."""

    seed: int
    shuffle: bool
    batch_size: int
    num_lanes: int
    pool_clips: int

    def of_epoch(self, table: ClipTable, epoch: int) -> EpochOrder:
        return epoch_order(
            table.first_clip_of_group, epoch=epoch, first_clip_of_shard=table.first_clip_of_shard, **asdict(self)
        )


def _labels_of(source: ClipSource, clip_id: torch.Tensor) -> dict[str, torch.Tensor]:
    """Labels of a video or episode are [B, ...], those of frames [B, T, ...] for just the frames that are shown."""
    index = source.index
    rows = torch.from_numpy(source.table.videos_of(clip_id.numpy()))
    labels = {name: values[rows] for name, values in index.labels.items()}
    if index.frame_label_offsets is not None:
        at = index.frame_label_offsets[rows][:, None] + torch.from_numpy(_frames_of(source, clip_id.numpy()))
        labels |= {name: values[at] for name, values in index.frame_labels.items()}
    return labels


def _frames_of(source: ClipSource, clips: Ints) -> Ints:
    """Clip ids [B] -> the frames of their files that they show, [B, T]."""
    frames = source.table.starts_of(clips)[:, None] + np.arange(source.spec.length) * source.spec.frame_stride
    if source.spec.fps is not None:
        rows = source.table.videos_of(clips)
        for row in np.unique(rows).tolist():
            frames[rows == row] = frames_on_screen(source.index.videos[row], source.spec.fps)[frames[rows == row]]
    return frames


def _merge(parts: Sequence[Part]) -> Batch:
    """The workers' parts of one batch -> video, clip ids and rows, in the order of rows."""
    row = np.concatenate([part["row"] for part in parts])
    video, clip_id = parts[0]["video"], parts[0]["clip_id"]
    if len(parts) > 1:
        order = np.argsort(row)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        row = row[order]
        video, clip_id = np.empty((len(row), *video.shape[1:]), dtype=np.uint8), np.empty_like(row)
        first = 0
        for part in parts:
            places = place[first : first + len(part["row"])]
            video[places], clip_id[places] = part["video"], part["clip_id"]
            first += len(places)
    return {name: torch.from_numpy(values) for name, values in (("video", video), ("clip_id", clip_id), ("row", row))}


class VideoStream:
    """Shuffled batches of clips without end, the same for any number of ranks and workers.

    batch_size is global: a rank gets batch_size / world_size clips of every batch. An epoch leaves out
    num_clips % batch_size clips, others each time. A file that turns out not to decode has its clips dropped,
    never replaced: its batches are smaller.

    decode_timeout_s: a worker that takes longer for one clip is replaced, and the frame it hung at left out. With
        num_workers=0 nobody watches.
    cache_mb: MiB of decoded clips that this rank's workers keep together for later epochs, the first that fit.
    batches_per_epoch: batches in one pass over the clips.
    fingerprint: hash of all that fixes the order of clips; where it is equal, start_batch means the same.

    Raises UserError: sizes that do not divide each other, fewer clips than one batch, clips longer than every
    video, videos of different sizes without size_px, a decoder that is not installed.
    """

    def __init__(
        self,
        index: VideoIndex,
        spec: ClipSpec,
        *,
        size_px: int | None,
        channels: int,
        batch_size: int,
        num_lanes: int,
        pool_clips: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        decoder: str = "auto",
        max_bad_fraction: float = 0.1,
        cache_mb: int = 0,
        decode_timeout_s: float = DECODE_TIMEOUT_S,
    ) -> None:
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        self._source = make_source(index, spec, size_px=size_px, channels=channels, decoder=decoder)
        num_clips = self._source.table.num_clips
        check_lanes(num_clips, batch_size=batch_size, num_lanes=num_lanes, world_size=world_size)
        self._order = OrderSettings(seed, shuffle, batch_size, num_lanes, pool_clips)
        self._rank, self._world_size = rank, world_size
        self._num_workers = min(num_workers, num_lanes // world_size)
        self._cache_bytes = cache_mb * 2**20
        self._decode_timeout_s = decode_timeout_s
        self._failures = Failures(index, max_bad_fraction)
        if index.remote is not None:
            shards_of_rank = num_lanes // world_size + max(1, self._num_workers)
            index.remote.check_room(_ranks_here(world_size) * shards_of_rank)
        self.batches_per_epoch = num_clips // batch_size
        facts = [ORDER_VERSION, index.content_hash, asdict(spec), asdict(self._order)]
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def batches(self, start_batch: int = 0) -> Generator[Batch, None, None]:
        """Batches from number start_batch (counted from the beginning of the run) on, without end.

        Each is {"video": uint8 [B, T, C, H, W], "clip_id": int64 [B], "row": int64 [B], "labels": dict of tensors
        [B, ...]}.
        Close the iterator to end the workers at once. Raises UserError when too many videos do not decode.
        """
        assert start_batch >= 0, f"start_batch={start_batch}"
        make_parts = PartsOfStream(
            self._source, self._order, self._rank, self._world_size, start_batch, self._cache_bytes
        )
        parts = run_workers(make_parts, self._num_workers, self._decode_timeout_s, self._failures)
        try:
            while True:
                batch_parts = [next(parts) for _ in range(max(1, self._num_workers))]
                for part in batch_parts:
                    self._failures.add(part["failures"])
                batch = _merge(batch_parts)
                yield batch | {"labels": _labels_of(self._source, batch["clip_id"])}
        finally:
            parts.close()


def _ranks_here(world_size: int) -> int:
    """How many of them run on this machine."""
    return min(world_size, environment_int("LOCAL_WORLD_SIZE", world_size, least=1))


def share_of_pass(num_clips: int, rank: int, world_size: int) -> slice:
    """The clips of one pass that a rank takes: a run of neighbours, so that few videos are opened by two ranks."""
    return slice(num_clips * rank // world_size, num_clips * (rank + 1) // world_size)


def read_all(
    index: VideoIndex,
    spec: ClipSpec,
    *,
    size_px: int | None,
    channels: int,
    batch_size: int,
    decoder: str = "auto",
    num_workers: int = 0,
    max_clips: int | None = None,
    max_bad_fraction: float = 0.1,
    decode_timeout_s: float = DECODE_TIMEOUT_S,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Every clip (or max_clips of them, spread evenly) once, in order of clip ids; the last batch may be short.

    A rank gets its share (share_of_pass); rank after rank, the shares are the whole. Batches, but for "row", and errors
    as in VideoStream.batches.
    """
    source = make_source(index, spec, size_px=size_px, channels=channels, decoder=decoder)
    num_clips = source.table.num_clips if max_clips is None else min(max_clips, source.table.num_clips)
    clips = np.arange(num_clips) * source.table.num_clips // max(1, num_clips)
    clips = clips[share_of_pass(num_clips, rank, world_size)]
    failures = Failures(index, max_bad_fraction)
    num_workers = min(num_workers, -(-len(clips) // batch_size))
    if index.remote is not None:
        index.remote.check_room(_ranks_here(world_size) * 2 * max(1, num_workers))
    parts = run_workers(PartsOfPass(source, batch_size, clips), num_workers, decode_timeout_s, failures)
    try:
        for part in parts:
            failures.add(part["failures"])
            video, clip_id = torch.from_numpy(part["video"]), torch.from_numpy(part["clip_id"])
            yield {"video": video, "clip_id": clip_id, "labels": _labels_of(source, clip_id)}
    finally:
        parts.close()
