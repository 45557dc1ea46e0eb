"""Clips of an index, decoded in order: each file is opened once per group of clips, and no frame is decoded twice."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from data_pipelines.clips import ClipSpec, ClipTable, Ints, frames_on_screen, make_clip_table, resample, with_shards
from data_pipelines.containers import video_url
from data_pipelines.contents import Stamp, are_as_seen, look_at_images, shard_stamps, why_changed
from data_pipelines.decoders import DecodeError, Frame, VideoReader, open_video, resolve_decoder
from data_pipelines.errors import UserError
from data_pipelines.facts import Video
from data_pipelines.index import VideoIndex
from data_pipelines.workers import Faults

SLOWEST_FRAMES_PER_S = 5.0  # of frames that are decoded on the way to a clip

Clip = tuple[int, Sequence[Frame] | None]  # id and frames; None: its file does not decode


@dataclass(frozen=True)
class ClipSet:
    """All clips of an index, and the form in which frames are delivered.

    channels: of each camera.
    shard_stamps: the result of contents.shard_stamps at the time when the set was made.
    """

    index: VideoIndex
    spec: ClipSpec
    table: ClipTable
    channels: int
    size_px: int | None
    decoder: str
    shard_stamps: Mapping[str, Stamp]

    def why_changed(self, video: int, faults: Faults) -> str:
        """Return how the file of a video has changed since it was indexed, as a predicate, or ""."""
        return why_changed(self.index, self.shard_stamps, video, faults)

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """T, C, H, W of a clip."""
        first = self.index.videos[0]
        height, width = (self.size_px, self.size_px) if self.size_px else (first.height, first.width)
        return self.spec.length, self.channels * self.index.num_cameras, height, width


def make_clip_set(index: VideoIndex, spec: ClipSpec, *, size_px: int | None, channels: int, decoder: str) -> ClipSet:
    """Return the clips of an index. channels: of each camera.

    Raises UserError: the decoder is not installed, videos differ in size and size_px is None, clips are longer than
    every video, or `spec.fps` is set and a video states no frame rate.
    """
    if size_px is None:
        sizes = {(video.width, video.height): video.path for video in reversed(index.all_videos)}
        if len(sizes) > 1:
            (a, path_a), (b, path_b) = sorted(sizes.items(), key=lambda item: item[1])[:2]
            raise UserError(
                f"videos differ in size ('{path_a}' is {a[0]}x{a[1]}, '{path_b}' {b[0]}x{b[1]}): set size_px"
            )
    table = clips_of(index, spec)
    return ClipSet(index, spec, table, channels, size_px, resolve_decoder(decoder), shard_stamps(index))


def clips_of(index: VideoIndex, spec: ClipSpec) -> ClipTable:
    """Return the table of all clips of an index.

    Raises UserError: clips are longer than every video, or `spec.fps` is set and a video states no frame rate.
    """
    ranges: Sequence[tuple[int, int]] = index.frame_ranges
    keyframes: Sequence[Sequence[int]] = [video.keyframes for video in index.videos]
    if spec.fps is not None:
        ranges, keyframes = resample(index.videos, ranges, spec.fps)
    table = make_clip_table(ranges, keyframes, spec)
    if index.parts:
        first_rows = [*(part.first_row for part in index.parts), len(index.videos)]
        weights = tuple(part.weight for part in index.parts)
        table = replace(table, first_clip_of_root=table.first_clip[first_rows], weights=weights)
    shards = [video.shard for video in index.videos]
    return with_shards(table, shards) if any(shards) else table


@dataclass
class _CameraVideo:
    """The video of one camera in the open group.

    number: that of the video in the index (VideoIndex.all_videos).
    shift: frame f of the clip's video is frame f + shift here.
    failed_frame: the last frame that did not decode.
    images: the result of contents.look_at_images when it was opened.
    """

    number: int
    facts: Video
    shift: int
    failed_frame: int = -1
    reader: VideoReader | None = None
    images: Sequence[tuple[str, Stamp | None]] = ()

    def is_known_to_fail(self, first: int, last: int, faults: Faults) -> bool:
        """Return whether decoding the frames `first` to `last` of the clip's video would fail at the same frame."""
        keyframe = self.keyframe_of(first)
        return keyframe <= self.failed_frame or faults.is_known_fatal(self.number, keyframe, last + self.shift + 1)

    def keyframe_of(self, frame: int) -> int:
        """Return the frame of this camera from which a frame of the clip's video is decoded."""
        keyframes = self.facts.keyframes
        return keyframes[bisect_right(keyframes, frame + self.shift) - 1]

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()
        self.reader = None


class ClipDecoder:
    """Decodes clips that come in order of time within each group. Opens the files of a group once.

    A clip is delivered if and only if decoding succeeds, in each camera, from the keyframe at or before it through its
    last frame. So the delivered clips do not depend on which clips were decoded before. No clip is delivered from a
    file whose content has changed since it was indexed.
    """

    def __init__(self, clip_set: ClipSet, faults: Faults, hold: Callable[[str], bool]) -> None:
        self._clip_set, self._faults, self._hold = clip_set, faults, hold
        self._group = -1
        self._cameras: list[_CameraVideo] = []
        self._source_frames = np.empty(0, dtype=np.int64)  # by number of the resampled frame
        self._recent: dict[int, Frame] = {}  # source frames that overlapping clips share
        self._last = -math.inf  # the last source frame that was read

    def close(self) -> None:
        for camera in self._cameras:
            camera.close()
        self._recent, self._last = {}, -math.inf

    def decode(self, video: int, group: int, start: int) -> list[Frame] | None:
        """Return the frames of the clip of `video` from (resampled) frame `start` on; None if they do not decode."""
        spec, index = self._clip_set.spec, self._clip_set.index
        if group != self._group:
            self.close()
            self._group = group
            self._cameras = [
                _CameraVideo(number, index.video(number), shift) for number, shift in index.cameras_of(video)
            ]
            self._source_frames = frames_on_screen(index.videos[video], spec.fps)
        shown = self._source_frames[start : start + spec.span]
        passed = shown[:: spec.grid].tolist()
        if any(camera.is_known_to_fail(passed[0], passed[-1], self._faults) for camera in self._cameras):
            return None
        progress = self._faults.progress
        if any(camera.reader is None for camera in self._cameras):
            self._hold_shard(video)
        progress.decode(video)
        camera = self._cameras[0]
        try:
            for camera in self._cameras:
                self._open(camera)
            progress.decode(video, extra_s=self._num_skipped(passed[0]) / SLOWEST_FRAMES_PER_S)
            recent = {frame: array for frame, array in self._recent.items() if frame >= passed[0]}
            for frame in passed:
                if frame not in recent:
                    pictures = []
                    for camera in self._cameras:
                        assert camera.reader is not None
                        progress.at_frame(camera.number, frame + camera.shift)
                        pictures.append(camera.reader.read(frame + camera.shift))
                    recent[frame] = pictures[0] if len(pictures) == 1 else np.concatenate(pictures)
            for camera in self._cameras:
                self._refuse_changed(camera, passed)  # it may have changed while it was read
        except DecodeError as error:
            if index.remote is not None and self._hold_shard(video):  # it was removed before it was opened
                self.close()
                return self.decode(video, group, start)
            reason = self._clip_set.why_changed(camera.number, self._faults) or f"does not decode ({error})"
            self._faults.found.setdefault(camera.number, reason)
            camera.failed_frame = error.frame
            self.close()
            return None
        finally:
            progress.work()
        self._recent, self._last = recent, passed[-1]
        return [recent[frame] for frame in shown[:: spec.frame_stride].tolist()]

    def _hold_shard(self, video: int) -> bool:
        """Keep the shard of a video, if it is in a remote one. Returns False if it is kept already."""
        self._faults.progress.work(math.inf)  # may wait for the network: this is not a hanging decoder
        return self._hold(self._clip_set.index.videos[video].shard)

    def _num_skipped(self, first: int) -> float:
        """Return about how many frames are decoded before source frame `first`.

        They are few in a stream that reads clip after clip, and can be thousands where it resumes in a long file.
        """
        begins = (max(camera.keyframe_of(first) - camera.shift, self._last) for camera in self._cameras)
        return max(0, *(first - begin for begin in begins))

    def _open(self, camera: _CameraVideo) -> None:
        """Open the file of a camera, unless it is open. Raises DecodeError."""
        if camera.reader is None:
            camera.images = look_at_images(self._clip_set.index.root, camera.facts)
            self._refuse_changed(camera)
            self._faults.progress.decode(camera.number)
            camera.reader = open_video(
                video_url(self._clip_set.index.root, camera.facts),
                camera.facts,
                channels=self._clip_set.channels,
                size_px=self._clip_set.size_px,
                decoder=self._clip_set.decoder,
            )

    def _refuse_changed(self, camera: _CameraVideo, frames: Sequence[int] = ()) -> None:
        """Raise DecodeError if the file of a camera has changed.

        frames: those of a clip that were read. Of a folder, which may hold many images, it is enough to look at theirs.
        """
        if frames and are_as_seen(camera.images, [frame + camera.shift for frame in frames]):
            return
        if reason := self._clip_set.why_changed(camera.number, self._faults):
            raise DecodeError(reason)


class ClipCache:
    """Decoded clips that one worker keeps for later epochs: the first ones that fit. It changes no pixel."""

    def __init__(self, max_bytes: int) -> None:
        self._free_bytes = max_bytes
        self._clips: dict[int, Sequence[Frame]] = {}

    def get(self, clip_id: int) -> Sequence[Frame] | None:
        return self._clips.get(clip_id)

    def add(self, clip_id: int, frames: Sequence[Frame]) -> None:
        """Keep a clip if there is room. Frames that overlapping clips share are counted for each clip."""
        num_bytes = sum(frame.nbytes for frame in frames)
        if num_bytes <= self._free_bytes:
            self._free_bytes -= num_bytes
            self._clips[clip_id] = frames


def lane_clips(
    clip_set: ClipSet,
    decoded: Ints,
    delivered: Ints,
    skip: int,
    faults: Faults,
    cache: ClipCache,
    hold: Callable[[str], bool],
) -> Iterator[Clip]:
    """Yield the clips of one lane in one epoch in order of delivery, from number `skip` on.

    Clips are decoded in order, no further than the clip that is due. The others wait in memory; epoch_order bounds
    their number. Clips that were delivered before `skip`, or are in the cache, are not decoded again.

    decoded, delivered: rows of an EpochOrder.
    hold: called with the name of a shard before a video in it is opened, and after it fails. Returns False if the shard
        is held already.
    """
    wanted = np.ones(len(decoded), dtype=bool)
    wanted[delivered[:skip]] = False
    videos = clip_set.table.videos_of(decoded)
    groups = clip_set.table.groups_of(decoded)
    starts = clip_set.table.starts_of(decoded)
    last_of_group = np.append(groups[1:] != groups[:-1], True)
    decoder = ClipDecoder(clip_set, faults, hold)
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
                    decoder.close()  # not at the next group: one open decoder per lane costs a third of the speed
                next_position += 1
            yield int(decoded[position]), waiting.pop(position)
    finally:
        decoder.close()


def shards_in_turn(
    clip_set: ClipSet, orders: Iterable[tuple[int, Ints, Ints]], cache: ClipCache
) -> list[tuple[int, str]]:
    """Return the shards that lanes will decode from, as (lane, shard), in the order in which they are needed.

    orders: for each lane its number, its clips in order of decoding, and the positions of the clips that are due.
    """
    turns = []
    for lane, decoded, due in orders:
        last = ""
        positions = np.sort(due)
        for position, video in zip(positions.tolist(), clip_set.table.videos_of(decoded[positions]), strict=True):
            shard = clip_set.index.videos[video].shard
            if shard != last and cache.get(int(decoded[position])) is None:
                turns.append((position, lane, shard))
                last = shard
    return [(lane, shard) for _, lane, shard in sorted(turns)]


def stack_clips(clip_set: ClipSet, clips: Sequence[Clip]) -> tuple[Frame, Ints]:
    """Stack the clips that decode: video uint8 [B, T, C, H, W] and clip ids int64 [B]."""
    good = [(clip_id, frames) for clip_id, frames in clips if frames is not None]
    video = np.empty((len(good), *clip_set.clip_shape), dtype=np.uint8)
    for row, (_, frames) in enumerate(good):
        np.concatenate(frames, out=video[row].reshape(-1, *video.shape[3:]))  # np.stack makes a view of each frame
    return video, np.array([clip_id for clip_id, _ in good], dtype=np.int64)


def labels_of(clip_set: ClipSet, clip_id: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the labels of clips: [B, ...] of a video or episode, [B, T, ...] of the frames that the clips show."""
    index = clip_set.index
    rows = torch.from_numpy(clip_set.table.videos_of(clip_id.numpy()))
    labels = {name: values[rows] for name, values in index.labels.items()}
    if index.frame_label_offsets is not None:
        at = index.frame_label_offsets[rows][:, None] + torch.from_numpy(frames_of(clip_set, clip_id.numpy()))
        labels |= {name: values[at] for name, values in index.frame_labels.items()}
    return labels


def frames_of(clip_set: ClipSet, clips: Ints) -> Ints:
    """Return the numbers [B, T] of the frames that clips show, by clip ids [B]. Frames are counted in the file."""
    frames = clip_set.table.starts_of(clips)[:, None] + np.arange(clip_set.spec.length) * clip_set.spec.frame_stride
    if clip_set.spec.fps is not None:
        rows = clip_set.table.videos_of(clips)
        for row in np.unique(rows).tolist():
            frames[rows == row] = frames_on_screen(clip_set.index.videos[row], clip_set.spec.fps)[frames[rows == row]]
    return frames
