"""Which clip comes when: pure arithmetic, no I/O.

A *clip* is spec.length frames of one video. A *group* is a run of successive clips that one sequential pass
of the decoder reads, from the keyframe at or before its first clip. A *lane* is one of a fixed number of
independent sequences of clips; ranks and workers own whole lanes, so that the global batches do not depend on
how many of them there are.

The order of an epoch is a function of (seed, epoch) alone: the groups are permuted and their clips laid end
to end; the last N % batch_size of the N clips are left out (others in each epoch); the rest is cut into
num_lanes equal, contiguous parts. Where videos stand in shards, the shards are permuted, and the groups within
each of them, so that a lane walks through few shards, one after the other. Within a lane clips are *decoded*
in that order and *delivered* in another one, shuffled within a bounded distance. A global batch takes
batch_size / num_lanes clips from every lane, in lane order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import UserError
from data_pipelines.facts import Video

# Keyframe intervals are merged until a group has this many frames: short intervals would else make tiny
# groups, each of which costs a seek and the frames between its keyframe and its first clip.
GROUP_FRAMES = 128

MAX_FPS = 1000
# In a video resampled to a constant rate no frame is held longer: more is a hole in its timestamps, not a picture.
MAX_HOLD_S = 10.0
# A frame counts as on screen from this much before its time on, as timestamps are rounded; less at high rates.
EARLY_S = 0.002

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ClipSpec:
    """How a clip is cut from a video: num_segments consecutive segments of num_frames frames each.

    frame_stride: source frames from one delivered frame to the next.
    clip_step: source frames from the start of one clip to that of the next; None: clips do not overlap.
    fps: the rate that each video is first resampled to by its timestamps, so that "source frames" are resampled ones;
        None: frames are taken as they are stored, whatever their times.
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
        """Frames delivered."""
        return self.num_segments * self.num_frames

    @property
    def span(self) -> int:
        """Source frames from the first to the last delivered one, both counted."""
        return (self.length - 1) * self.frame_stride + 1

    @property
    def step(self) -> int:
        """Source frames from the start of one clip to that of the next."""
        return self.span if self.clip_step is None else self.clip_step

    @property
    def grid(self) -> int:
        """Every grid-th frame from a clip's start on is one that this or the next clips may deliver."""
        return self.frame_stride if self.step >= self.span else math.gcd(self.frame_stride, self.step)


@dataclass(frozen=True)
class ClipTable:
    """All clips of an index, numbered video by video in order of time; the number is the clip's id.

    first_frame: [videos], where each video's first clip starts.
    first_clip: [videos + 1], the id of each video's first clip, then the number of clips.
    first_clip_of_group: [groups + 1], likewise for the groups.
    first_clip_of_shard: [shards + 1], likewise for the shards that hold the videos; None for plain files.
    """

    step: int
    first_frame: Ints
    first_clip: Ints
    first_clip_of_group: Ints
    first_clip_of_shard: Ints | None = None

    @property
    def num_clips(self) -> int:
        return int(self.first_clip[-1])

    def videos_of(self, clips: Ints) -> Ints:
        """Clip ids -> the positions of their videos in the index."""
        return np.searchsorted(self.first_clip, clips, side="right") - 1

    def starts_of(self, clips: Ints) -> Ints:
        """Clip ids -> their first frames, counted from the start of the (resampled) video in order of presentation."""
        videos = self.videos_of(clips)
        return self.first_frame[videos] + (clips - self.first_clip[videos]) * self.step

    def groups_of(self, clips: Ints) -> Ints:
        return np.searchsorted(self.first_clip_of_group, clips, side="right") - 1


def frames_on_screen(video: Video, fps: float | None) -> Ints:
    """For each frame of the video resampled to fps, the number of the source frame that it shows, ascending.

    Resampled frame k shows the last frame that comes at most k / fps seconds after the first. With fps=None each frame
    shows itself. Raises UserError: the video states neither a frame rate nor times.
    """
    if fps is None:
        return np.arange(video.num_frames)
    if not video.fps and video.num_frames > 1:
        raise UserError(f"fps={fps:g} needs videos of known times: '{video.path}' states no frame rate; remove it")
    if video.num_frames == 1:
        return np.zeros(1, dtype=np.int64)
    shown_s = np.concatenate([[0], np.cumsum(np.minimum(np.diff(video.shown_s()), MAX_HOLD_S))])
    mean_s = shown_s[-1] / (video.num_frames - 1)  # for which the last frame, too, is on screen
    early_s = min(EARLY_S, mean_s / 4)
    count = max(1, math.ceil((shown_s[-1] + mean_s - early_s) * fps))
    # Rounding must not decide whether a frame that comes just in time is on screen.
    return np.searchsorted(shown_s, np.arange(count) / fps + early_s + 1e-9, side="right") - 1


def resample(
    videos: Sequence[Video], frame_ranges: Sequence[tuple[int, int]], fps: float
) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """The frames [start, stop) of each video that clips may come from -> these ranges and the keyframes of each video,
    both in numbers of resampled frames. Raises UserError as frames_on_screen does.
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
    """The frames [start, stop) and the keyframes (first one 0) of each video -> all clips that fit, and their groups.

    Raises UserError when no video is as long as one clip.
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
    """The same clips, knowing which shard each video is in; the videos of one shard are neighbours."""
    starts = [video for video, shard in enumerate(shards) if video == 0 or shard != shards[video - 1]]
    return replace(table, first_clip_of_shard=table.first_clip[[*starts, len(shards)]])


def group_starts(keyframes: Sequence[int]) -> list[int]:
    """Keyframes at which groups start: the first, then each GROUP_FRAMES or more past the last one taken."""
    taken = [keyframes[0]]
    for keyframe in keyframes:
        if keyframe - taken[-1] >= GROUP_FRAMES:
            taken.append(keyframe)
    return taken


def check_lanes(num_clips: int, *, batch_size: int, num_lanes: int, world_size: int) -> None:
    """Raises UserError unless lanes divide the batch, ranks divide the lanes, and the clips fill a batch."""
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
    """One epoch's clips by lane; both fields are [num_lanes, clips per lane].

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
    """The order of one epoch. pool_clips bounds how many decoded clips wait at any time, over all lanes.

    first_clip_of_shard: keep the groups of a shard together. They are permuted within it all the same: a shard is
    read where it lies on a disk, so that the order within costs nothing, and neighbours differ from epoch to epoch.
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
    clips = _concatenate_ranges(first_clip_of_group[:-1][groups], np.diff(first_clip_of_group)[groups])
    decoded = clips[: num_lanes * lane_clips].reshape(num_lanes, lane_clips)
    noise = rng.random((num_lanes, lane_clips))
    return EpochOrder(decoded, pool_shuffle(noise, max(1, pool_clips // num_lanes)))


def pool_shuffle(noise: NDArray[np.float64], pool: int) -> Ints:
    """Uniform noise [lanes, n] -> for each lane a permutation of 0..n-1 for which at most `pool` items wait.

    Items are delivered in the order of their keys i + pool * noise_i. When an item with key k is due, what
    has been decoded lies at or before k and what has been delivered has a smaller key, so that those decoded
    and not yet delivered lie in (k - pool, k]. A lane that fits into its pool is permuted uniformly.
    """
    num_items = noise.shape[1]
    keys = noise if num_items <= pool else np.arange(num_items) + pool * noise
    return np.argsort(keys, axis=1, kind="stable")


def _concatenate_ranges(starts: Ints, counts: Ints) -> Ints:
    """[s0, s0 + 1, ..., s0 + c0 - 1, s1, ...]"""
    before = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(starts - before, counts)


def lanes_of_worker(*, num_lanes: int, rank: int, world_size: int, worker: int, num_workers: int) -> range:
    """A rank owns the lanes l with l % world_size == rank; a worker every num_workers-th of those."""
    return range(num_lanes)[rank::world_size][worker::num_workers]
