"""The index of a data set: its videos with their facts and labels, and the files that cannot be used."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from data_pipelines.errors import UserError, one_line_logger
from data_pipelines.facts import BadFile, Video

if TYPE_CHECKING:
    from data_pipelines.remote.cache import RemoteShards

log = one_line_logger(__name__)

LIMIT_KEY = "data.max_frame_px"


@dataclass(frozen=True)
class IndexPart:
    """One of several roots in an index: its first row, its folder below the index's root ("" or "a/b/"), its weight."""

    first_row: int
    prefix: str
    weight: float
    content_hash: str


@dataclass(frozen=True)
class View:
    """The rows of an index as a further camera shows them.

    videos: the camera's video of each row.
    shifts: frame f of a row's video shows the same moment as frame f + shift of this camera's video.
    """

    videos: Sequence[Video]
    shifts: Sequence[int]


@dataclass(frozen=True)
class VideoIndex:
    """The rows of a data set, N of them. Each is a video, or an episode within a video.

    videos: the video of each row. Those of a plain folder are sorted by path, those in shards by shard and offset.
        A file with several episodes is in several rows.
    bad: files that cannot be used.
    labels: [N, ...] per name.
    share: the part of each row's length that clips may come from, as fractions [start, stop) of its frames.
    episodes: the frames [start, stop) of its video that each row consists of; None: all.
    frame_labels: labels of single frames per name, [F, ...].
    frame_label_offsets: int64 [N]; frame f of a row's video has the row offset + f of frame_labels.
    remote: fetches the shards that hold the videos into root; None: they are there.
    label_faults: labels that are left out, and the reasons.
    parts: the roots, if they are several (roots.py); root is then a folder above all of them.
    views: the same rows in further cameras. The channels of their frames follow those of `videos`, camera by camera.
    """

    root: Path
    videos: Sequence[Video]
    bad: Sequence[BadFile] = ()
    labels: dict[str, torch.Tensor] = field(default_factory=dict)
    share: tuple[float, float] = (0.0, 1.0)
    episodes: Sequence[tuple[int, int]] | None = None
    frame_labels: dict[str, torch.Tensor] = field(default_factory=dict)
    frame_label_offsets: torch.Tensor | None = None
    remote: "RemoteShards | None" = None
    label_faults: Mapping[str, str] = field(default_factory=dict)
    parts: Sequence[IndexPart] = ()
    views: Sequence[View] = ()

    @property
    def num_cameras(self) -> int:
        """The number of cameras whose frames lie side by side in the channels of a clip."""
        return 1 + len(self.views)

    @property
    def all_videos(self) -> list[Video]:
        """The videos of all rows, camera after camera: row r of camera c has the number c * N + r."""
        return [*self.videos, *(video for view in self.views for video in view.videos)]

    def cameras_of(self, row: int) -> list[tuple[int, int]]:
        """Return the number of a row's video in each camera, and the shift of its frames."""
        shifts = [0, *(view.shifts[row] for view in self.views)]
        return [(camera * len(self.videos) + row, shift) for camera, shift in enumerate(shifts)]

    def video(self, number: int) -> Video:
        """Return the video with a number, counted as in `all_videos`."""
        camera, row = divmod(number, len(self.videos))
        return (self.views[camera - 1] if camera else self).videos[row]

    @property
    def names(self) -> list[str]:
        """The name of each of `all_videos`: its path, for several roots "1:path", counted from the first root."""
        names = [video.path for video in self.all_videos]
        num_rows = len(self.videos)
        stops = [part.first_row for part in self.parts[1:]] + [num_rows]
        for number, (part, stop) in enumerate(zip(self.parts, stops, strict=False), start=1):
            for first in range(0, len(names), max(1, num_rows)):
                for place in range(first + part.first_row, first + stop):
                    names[place] = f"{number}:{names[place].removeprefix(part.prefix)}"
        return names

    @property
    def frame_ranges(self) -> list[tuple[int, int]]:
        """The frames [start, stop) of each row's video that clips may come from."""
        rows = [(0, video.num_frames) for video in self.videos] if self.episodes is None else self.episodes
        first, last = self.share
        return [(a + round(first * (b - a)), a + round(last * (b - a))) for a, b in rows]

    @cached_property
    def content_hash(self) -> str:
        """A hash that changes if a video or episode is added, removed, renamed or has another size or frame count."""
        if self.parts:
            facts = [(part.content_hash, part.weight) for part in self.parts]
            return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        digest = hashlib.sha256(repr(self.share).encode())
        for video in self.videos:
            digest.update(f"{video.path}\0{video.size_bytes}\0{video.num_frames}\n".encode("utf-8", "surrogateescape"))
            if video.shard:  # the order of clips depends on it
                digest.update(f"{video.shard}\0{video.offset_bytes}\n".encode())
        if self.episodes is not None:
            digest.update(repr(list(self.episodes)).encode())
        for view in self.views:
            files = [(video.path, video.size_bytes, video.num_frames) for video in view.videos]
            digest.update(repr((files, list(view.shifts))).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]

    def with_blocks(self, name: str, length: int) -> "VideoIndex":
        """Return the index with a label of frames [F, K] in blocks of successive frames, [F, length * K].

        A frame has the values of itself and of the frames after it. The last length - 1 frames of a video have no block
        of their own: theirs runs into the next video. An index without the label is returned as it is.
        """
        if length == 1 or name not in self.frame_labels:
            return self
        values = self.frame_labels[name]
        following = (torch.arange(len(values))[:, None] + torch.arange(length)).clamp(max=len(values) - 1)
        return replace(self, frame_labels=self.frame_labels | {name: values[following].flatten(1)})

    def rows(self, rows: Sequence[int]) -> "VideoIndex":
        """Return an index of these rows only."""
        assert not self.parts, "the rows of one root"
        offsets = self.frame_label_offsets
        return replace(
            self,
            videos=[self.videos[row] for row in rows],
            labels={name: values[rows] for name, values in self.labels.items()},
            episodes=None if self.episodes is None else [self.episodes[row] for row in rows],
            frame_label_offsets=None if offsets is None else offsets[rows],
            views=[View([view.videos[row] for row in rows], [view.shifts[row] for row in rows]) for view in self.views],
        )


def within_limit(entry: Video | BadFile, max_frame_px: int) -> Video | BadFile:
    """Return the entry, or a bad file in place of a video with larger frames, which another limit accepted."""
    if isinstance(entry, BadFile) or entry.width * entry.height <= max_frame_px:
        return entry
    reason = f"frames of {entry.width}x{entry.height}, more than {LIMIT_KEY}={max_frame_px}"
    return BadFile(entry.path, entry.size_bytes, entry.mtime_ns, reason)


def difference_of(before: Video, now: Video | BadFile) -> str:
    """Describe the first difference between two sets of facts about a file, time stamps aside; "" if there is none."""
    if isinstance(now, BadFile):
        return now.reason
    for name, unit in (("size_bytes", "bytes"), ("num_frames", "frames")):
        was, has = getattr(before, name), getattr(now, name)
        if was != has:
            return f"{has:,} {unit}, {was:,} before"
    as_before = replace(now, mtime_ns=before.mtime_ns, digest=before.digest)  # an older index may have no digest
    if as_before != before or (before.digest and before.digest != now.digest):
        return "its content differs"
    return ""


def check_bad_fraction(root: str | Path, bad: Sequence[BadFile], num_files: int, max_bad_fraction: float) -> None:
    """Name the bad files in a warning.

    Raises UserError: all files are bad, or more than the fraction `max_bad_fraction` of them.
    """
    if not bad:
        return
    first = f"the first is '{bad[0].path}' ({bad[0].reason})"
    if len(bad) == num_files:
        raise UserError(f"data root '{root}': none of {num_files} video files is readable; {first}")
    if len(bad) > max_bad_fraction * num_files:
        raise UserError(
            f"data root '{root}': {len(bad)} of {num_files} video files are bad, more than max_bad_fraction="
            f"{max_bad_fraction:g} allows; {first}: remove or repair them, or raise the limit"
        )
    named = ", ".join(f"'{entry.path}' ({entry.reason})" for entry in bad[:10])
    more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
    log.warning("%d of %d video files are bad and left out: %s%s", len(bad), num_files, named, more)
