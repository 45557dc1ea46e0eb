"""The order of clips: pure arithmetic, no I/O.

A *clip* is spec.length frames of one video. A *group* is a run of successive clips that one sequential pass of the
decoder reads, from the keyframe at or before its first clip. A *lane* is one of a fixed number of independent sequences
of clips. Ranks and workers own whole lanes, so global batches do not depend on the number of ranks and workers.

The order of an epoch is a function of (seed, epoch) alone:

1. The groups are permuted and their clips are concatenated. If videos are in shards, the shards are permuted, and the
   groups within each shard. A lane then reads few shards, one after the other.
2. The last N % batch_size of the N clips are left out. They differ between epochs.
3. The rest is divided into num_lanes equal, contiguous parts: the lanes.
4. A lane *decodes* its clips in that order and *delivers* them in another order, shuffled within a bounded distance.
5. A global batch takes batch_size / num_lanes clips from every lane, in lane order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import UserError
from data_pipelines.facts import Video

# Keyframe intervals are merged until a group has this many frames. Short intervals would otherwise make tiny groups.
# Each group costs a seek and the frames between its keyframe and its first clip.
GROUP_FRAMES = 128

MAX_FPS = 1000
# Longest time for which a frame is shown in a resampled video. A longer gap is a hole in the timestamps.
MAX_HOLD_S = 10.0
# A frame counts as on screen this much before its time, because timestamps are rounded. Less at high rates.
EARLY_S = 0.002

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ClipSpec:
    """The clips of a video: num_segments consecutive segments of num_frames frames each.

    With num_segments=2, num_frames=2 and frame_stride=3, where "f" is a delivered frame and "x" one that is skipped:

        clip     = f x x f x x f x x f                        length = 4, span = 10
        segments = |--0--|     |--1--|

    clip_step is the distance from the start of a clip to that of the next. By default it is the span: clips tile the
    video. With clip_step=6 clips overlap and share frames:

        clip 0   = f x x f x x f x x f
        clip 1   =             f x x f x x f x x f
        clip 2   =                         f x x f x x f x x f
        grid     = f . . f . . f . . f . . f . . f . . f . . f    grid = 3: no other frame is delivered

    frame_stride: source frames from one delivered frame to the next.
    clip_step: source frames from the start of one clip to that of the next; None: clips do not overlap.
    fps: the rate to which each video is resampled first, by its timestamps; "source frames" are then resampled ones.
        None: frames are taken as they are stored, whatever their times.

    Raises:
        UserError: a value is out of range.
    """

    num_segments: int = 3
    num_frames: int = 3
    frame_stride: int = 1
    clip_step: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_segments", "num_frames", "frame_stride", "clip_step"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        if self.fps is not None and not 0 < self.fps <= MAX_FPS:
            raise UserError(f"fps={self.fps:g} must be above 0 and at most {MAX_FPS}")

    @property
    def length(self) -> int:
        """Frames that a clip delivers."""
        return self.num_segments * self.num_frames

    @property
    def span(self) -> int:
        """Source frames from the first to the last delivered frame, inclusive."""
        return (self.length - 1) * self.frame_stride + 1

    @property
    def step(self) -> int:
        """Source frames from the start of one clip to that of the next."""
        return self.span if self.clip_step is None else self.clip_step

    @property
    def grid(self) -> int:
        """Distance of the source frames that clips of a video deliver: a divisor of frame_stride and of clip_step."""
        return self.frame_stride if self.step >= self.span else math.gcd(self.frame_stride, self.step)


@dataclass(frozen=True)
class ClipTable:
    """All clips of an index, numbered video by video in order of time. The number is the id of a clip.

    first_frame: [videos], the first frame of each video's first clip.
    first_clip: [videos + 1], the id of each video's first clip, then the number of clips.
    first_clip_of_group: [groups + 1], the same for groups.
    first_clip_of_shard: [shards + 1], the same for the shards that hold the videos; None for plain files.
    first_clip_of_root: [roots + 1], the same for several roots, with their weights; None for one root.
    """

    step: int
    first_frame: Ints
    first_clip: Ints
    first_clip_of_group: Ints
    first_clip_of_shard: Ints | None = None
    first_clip_of_root: Ints | None = None
    weights: tuple[float, ...] = ()

    @property
    def num_clips(self) -> int:
        return int(self.first_clip[-1])

    def videos_of(self, clips: Ints) -> Ints:
        """Return the positions in the index of the videos of clips, by clip ids."""
        return np.searchsorted(self.first_clip, clips, side="right") - 1

    def starts_of(self, clips: Ints) -> Ints:
        """Return the first frames of clips, counted in order of presentation in the (resampled) video."""
        videos = self.videos_of(clips)
        return self.first_frame[videos] + (clips - self.first_clip[videos]) * self.step

    def groups_of(self, clips: Ints) -> Ints:
        """Return the groups of clips, by clip ids."""
        return np.searchsorted(self.first_clip_of_group, clips, side="right") - 1


def frames_on_screen(video: Video, fps: float | None) -> Ints:
    """Return the number of the source frame that each frame of the video resampled to fps shows, ascending.

    Resampled frame k shows the last frame that comes at most k / fps seconds after the first. With fps=None each frame
    shows itself.

    Raises:
        UserError: the video states neither a frame rate nor times.
    """
    if fps is None:
        return np.arange(video.num_frames)
    if not video.fps and video.num_frames > 1:
        raise UserError(f"fps={fps:g} needs videos of known times: '{video.path}' states no frame rate; remove it")
    if video.num_frames == 1:
        return np.zeros(1, dtype=np.int64)
    shown_s = np.concatenate([[0], np.cumsum(np.minimum(np.diff(video.shown_s()), MAX_HOLD_S))])
    mean_s = shown_s[-1] / (video.num_frames - 1)  # the last frame is on screen for this time
    early_s = min(EARLY_S, mean_s / 4)
    count = max(1, math.ceil((shown_s[-1] + mean_s - early_s) * fps))
    # 1e-9: rounding must not decide whether a frame that comes exactly in time is on screen.
    return np.searchsorted(shown_s, np.arange(count) / fps + early_s + 1e-9, side="right") - 1


def resample(
    videos: Sequence[Video], frame_ranges: Sequence[tuple[int, int]], fps: float
) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """Return frame ranges [start, stop) and the keyframes of each video in numbers of resampled frames.

    frame_ranges: the frames of each video that clips may come from.
    Raises UserError as frames_on_screen does.
    """
    ranges, keyframes = [], []
    for video, (start, stop) in zip(videos, frame_ranges, strict=True):
        source = frames_on_screen(video, fps)
        first, end = np.searchsorted(source, (start, stop)).tolist()
        ranges.append((first, end))
        keyframes.append(np.searchsorted(source, video.keyframes).tolist())
    return ranges, keyframes


def make_clip_table(
    frame_ranges: Sequence[tuple[int, int]], keyframes: Sequence[Sequence[int]], spec: ClipSpec
) -> ClipTable:
    """Return all clips that fit into the frames [start, stop) of each video, and their groups.

    keyframes: of each video, the first one 0.

    Raises:
        UserError: no video is as long as one clip.
    """
    first_frame, stop_frame = np.asarray(frame_ranges, dtype=np.int64).reshape(-1, 2).T
    frames = stop_frame - first_frame
    counts = np.maximum((frames - spec.span) // spec.step + 1, 0)
    if not counts.any():
        settings = f"num_segments={spec.num_segments}, num_frames={spec.num_frames}, frame_stride={spec.frame_stride}"
        if spec.fps is not None:
            settings += f", fps={spec.fps:g}"
        longest = frames.max(initial=0)
        raise UserError(f"clips span {spec.span} frames ({settings}) but the longest video has {longest}: lower them")
    first_clip = np.concatenate([[0], np.cumsum(counts)])
    boundaries = [first_clip[:-1][counts > 0]]
    for video in np.flatnonzero((counts > 1) & (frames > GROUP_FRAMES)).tolist():
        starts = np.asarray(group_starts(keyframes[video]), dtype=np.int64)
        clips = -((first_frame[video] - starts) // spec.step)  # the first clip that starts at or after the keyframe
        boundaries.append(first_clip[video] + clips[(clips > 0) & (clips < counts[video])])
    first_clip_of_group = np.append(np.unique(np.concatenate(boundaries)), first_clip[-1])
    return ClipTable(spec.step, first_frame, first_clip, first_clip_of_group)


def with_shards(table: ClipTable, shards: Sequence[str]) -> ClipTable:
    """Add the shard of each video to a table. The videos of one shard must be neighbours."""
    starts = [video for video, shard in enumerate(shards) if video == 0 or shard != shards[video - 1]]
    return replace(table, first_clip_of_shard=table.first_clip[[*starts, len(shards)]])


def group_starts(keyframes: Sequence[int]) -> list[int]:
    """Return the keyframes at which groups start: the first, then each that is GROUP_FRAMES or more after the last."""
    taken = [keyframes[0]]
    for keyframe in keyframes:
        if keyframe - taken[-1] >= GROUP_FRAMES:
            taken.append(keyframe)
    return taken


def check_lanes(num_clips: int, *, batch_size: int, num_lanes: int, world_size: int) -> None:
    """Check that lanes divide the batch, ranks divide the lanes, and the clips fill a batch. Raises UserError."""
    if num_lanes < 1 or batch_size < 1 or batch_size % num_lanes:
        raise UserError(f"batch_size={batch_size} is not a multiple of num_lanes={num_lanes}: change one")
    if num_lanes % world_size:
        raise UserError(
            f"num_lanes={num_lanes} is not a multiple of the {world_size} processes: start another number of "
            "processes or change num_lanes (which changes the order of clips)"
        )
    if num_clips < batch_size:
        raise UserError(
            f"the data holds {num_clips} clips, fewer than one batch: lower batch_size={batch_size} to at "
            f"most {num_clips} (and num_lanes={num_lanes} to divide it), or lower clip_step for more clips"
        )


@dataclass(frozen=True)
class EpochOrder:
    """The clips of one epoch by lane. Both fields are [num_lanes, clips per lane].

    decoded: clip ids in order of decoding.
    delivered: positions in that order: lane l first delivers decoded[l, delivered[l, 0]].
    """

    decoded: Ints
    delivered: Ints


def epoch_order(
    first_clip_of_group: Ints,
    *,
    seed: int,
    epoch: int,
    shuffle: bool,
    batch_size: int,
    num_lanes: int,
    pool_clips: int,
    first_clip_of_shard: Ints | None = None,
) -> EpochOrder:
    """Return the order of one epoch.

    pool_clips: limit of the decoded clips that wait at any time, over all lanes.
    first_clip_of_shard: keeps the groups of a shard together. They are still permuted within it: a shard is read from a
        local disk, so any order is as fast, and neighbours differ between epochs.
    """
    num_batches = int(first_clip_of_group[-1]) // batch_size
    lane_clips = num_batches * batch_size // num_lanes
    if not shuffle:
        decoded = np.arange(num_lanes * lane_clips).reshape(num_lanes, lane_clips)
        return EpochOrder(decoded, np.tile(np.arange(lane_clips), (num_lanes, 1)))
    # Only raw uniform numbers are drawn, and sorted: that stream has been the same in every NumPy version.
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    keys = rng.random(len(first_clip_of_group) - 1)
    if first_clip_of_shard is None:
        groups = np.argsort(keys, kind="stable")
    else:
        shards = np.searchsorted(first_clip_of_shard, first_clip_of_group[:-1], side="right") - 1
        groups = np.lexsort((keys, rng.random(len(first_clip_of_shard) - 1)[shards]))
    clips = concatenate_ranges(first_clip_of_group[:-1][groups], np.diff(first_clip_of_group)[groups])
    decoded = clips[: num_lanes * lane_clips].reshape(num_lanes, lane_clips)
    noise = rng.random((num_lanes, lane_clips))
    return EpochOrder(decoded, pool_shuffle(noise, max(1, pool_clips // num_lanes)))


def pool_shuffle(noise: NDArray[np.float64], pool: int) -> Ints:
    """Return a permutation of 0..n-1 for each lane, in which at most `pool` items wait. noise: uniform, [lanes, n].

    Items are delivered in the order of their keys i + pool * noise_i. When an item with key k is due, decoded items lie
    at or before k, and delivered items have a smaller key. So items that are decoded and not yet delivered lie in
    (k - pool, k]. A lane that fits into its pool is permuted uniformly.
    """
    num_items = noise.shape[1]
    keys = noise if num_items <= pool else np.arange(num_items) + pool * noise
    return np.argsort(keys, axis=1, kind="stable")


def concatenate_ranges(starts: Ints, counts: Ints) -> Ints:
    """Return [s0, s0 + 1, ..., s0 + c0 - 1, s1, ...]."""
    before = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(starts - before, counts)


def lanes_of_worker(*, num_lanes: int, rank: int, world_size: int, worker: int, num_workers: int) -> range:
    """Return every num_workers-th of the rank's lanes, which are the lanes l with l % world_size == rank."""
    return range(num_lanes)[rank::world_size][worker::num_workers]
