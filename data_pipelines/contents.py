"""Find changed videos: when a file is opened, by size and time stamp, and when a run is resumed, by content.

A file whose size or time stamp differs from the index is read again and compared by content. So a copy or a `touch`
changes nothing, and another video under the same name is never used in place of the one that was indexed.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipelines.containers import image_names
from data_pipelines.errors import UserError, one_line
from data_pipelines.facts import MAX_FRAME_PX, BadFile, Video
from data_pipelines.index import VideoIndex, difference_of
from data_pipelines.indexing.parallel import SLOWEST_BYTES_PER_S
from data_pipelines.indexing.probe import Stamp, index_file, index_member, stamp_of
from data_pipelines.shards.index_file import SHARDS_NAME
from data_pipelines.workers import Faults

CONTENTS_HEADER = {"format": "worldmodel-contents", "version": 1}
MAX_LINE_CHARACTERS = 2**16


# ------------------------------------------------------------------------------------------------- while streaming


def _stamp_of(path: str | Path) -> Stamp | None:
    """Return size and time stamp of a video; None if it cannot be found."""
    try:
        return stamp_of(path)
    except OSError:
        return None


def shard_stamps(index: VideoIndex) -> dict[str, Stamp]:
    """Return the stamps of local shards that are no newer than their index; a newer one may be another shard."""
    if index.remote is not None:
        return {}
    found = {name: _stamp_of(index.root / name) for name in {video.shard for video in index.videos} if name}
    folders = {name: (index.root / name).parent for name in found}
    written = {folder: _stamp_of(folder / SHARDS_NAME) for folder in set(folders.values())}
    times = {name: index_stamp[1] if (index_stamp := written[folder]) else 0 for name, folder in folders.items()}
    return {name: stamp for name, stamp in found.items() if stamp and stamp[1] <= times[name]}


def why_changed(index: VideoIndex, stamps: Mapping[str, Stamp], number: int, faults: Faults) -> str:
    """Return, as a predicate, why the file of a video is not the one that was indexed; "" if it is, or is missing.

    number: that of the video in the index (VideoIndex.all_videos).

    stamps: as shard_stamps returned them. Shards from a URL were compared with their checksums when they were fetched.
    """
    if index.remote is not None:
        return ""
    video = index.video(number)
    expected = stamps.get(video.shard) if video.shard else (video.size_bytes, video.mtime_ns)
    found = _stamp_of(f"{index.root}/{video.shard or video.path}")
    if found is None or found == expected:
        return ""
    judged = faults.judged.get(video.path)
    if judged is None or judged[0] != found:
        faults.progress.decode(number, extra_s=found[0] / SLOWEST_BYTES_PER_S)
        difference = difference_of(video, probe_again(index.root, video))
        reason = f"has changed since it was indexed ({difference})" if difference else ""
        judged = faults.judged[video.path] = found, reason
    return judged[1]


def look_at_images(root: str | Path, video: Video) -> list[tuple[str, Stamp | None]]:
    """Return path and stamp of a folder of images, and of each image in order of frames; none for another video."""
    folder = f"{root}/{video.path}"
    if video.shard or not os.path.isdir(folder):
        return []
    try:
        paths = [folder, *(f"{folder}/{name}" for name in image_names(folder))]
    except OSError:
        return []
    return [(path, _stamp_of_entry(path)) for path in paths]


def are_as_seen(images: Sequence[tuple[str, Stamp | None]], frames: Sequence[int]) -> bool:
    """Return whether a folder and the images of these frames are as look_at_images saw them; False without images."""
    seen = [images[number] for number in (0, *(frame + 1 for frame in frames))] if len(images) > max(frames) + 1 else []
    return bool(seen) and all(stamp == _stamp_of_entry(path) for path, stamp in seen)


def _stamp_of_entry(path: str) -> Stamp | None:
    """Return size and time stamp of a file or of a folder itself; None if it is missing."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def probe_again(root: str | Path, video: Video) -> Video | BadFile:
    """Return the facts of a file as it is now."""
    max_frame_px = max(MAX_FRAME_PX, video.width * video.height)
    if video.shard:
        folder, _, name = video.shard.rpartition("/")  # of one of several roots
        place = f"{root}/{folder}" if folder else root
        now = index_member(place, name, video.path, video.offset_bytes, video.size_bytes, max_frame_px)
        return replace(now, shard=video.shard) if isinstance(now, Video) else now
    return index_file(root, video.path, max_frame_px)


# -------------------------------------------------------------------------------------------------- between sessions


@dataclass(frozen=True)
class Contents:
    """The videos and labels in files that a run learns from.

    videos: path -> hash of the content.
    labels: name -> hash of all values.
    bad: path -> reason why a file is left out.
    """

    videos: Mapping[str, str]
    labels: Mapping[str, str]
    bad: Mapping[str, str]

    def lines(self) -> Iterator[str]:
        """Yield lines of JSON: a header with the labels, then the path and the hash of each video."""
        yield json.dumps(CONTENTS_HEADER | {"labels": dict(self.labels)})
        yield from map(json.dumps, self.videos.items())

    def hash(self) -> str:
        """Return a hash of the lines."""
        digest = hashlib.sha256()
        for line in self.lines():
            digest.update(f"{line}\n".encode())
        return digest.hexdigest()[:16]

    def change_since(self, earlier: "Contents") -> str:
        """Return the first difference from earlier contents and the number of others; "" if there is none."""
        changes = [_change_of(path, earlier.videos, self) for path in sorted({*self.videos, *earlier.videos})]
        changes = list(filter(None, changes))
        changes += [f"label {name!r} has other values" for name in _differing(earlier.labels, self.labels)]
        more = f" (and {len(changes) - 1:,} more)" if len(changes) > 1 else ""
        return changes[0] + more if changes else ""


def _change_of(path: str, earlier: Mapping[str, str], now: Contents) -> str:
    if path not in now.videos:
        return f"'{path}' is left out now ({now.bad[path]})" if path in now.bad else f"'{path}' is gone"
    if path not in earlier:
        return f"'{path}' is new"
    return "" if earlier[path] == now.videos[path] else f"'{path}' has other content"


def _differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return sorted(name for name in before.keys() & now.keys() if before[name] != now[name])


def contents_of(index: VideoIndex, labels: Collection[str]) -> Contents:
    """Return the contents of an index. labels: the names of those that the run uses; unknown ones are ignored."""
    found = index.labels | index.frame_labels
    return Contents(
        videos={name: content_of(video) for name, video in zip(index.names, index.all_videos, strict=True)},
        labels={name: _hash_of_tensor(found[name]) for name in sorted(found.keys() & set(labels))},
        bad={entry.path: entry.reason for entry in index.bad},
    )


def content_of(video: Video) -> str:
    """Return a hash of a video's content; without a digest, of its facts."""
    facts = (video.size_bytes, video.num_frames, video.keyframes, video.keyframe_pts, video.frame_ms)
    return video.digest or hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _hash_of_tensor(values: Tensor) -> str:
    digest = hashlib.sha256(f"{values.dtype} {list(values.shape)}".encode())
    digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_contents(path: Path) -> Contents | None:
    """Read what Contents.lines() wrote to a file; None if there is none. Raises UserError: it is damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = iter(lambda: file.readline(MAX_LINE_CHARACTERS), "")
            header = json.loads(next(lines, "null"))
            if {name: header[name] for name in CONTENTS_HEADER} != CONTENTS_HEADER:
                raise ValueError("another format or version")
            labels = {name: _text(value) for name, value in header["labels"].items()}
            videos = {_text(name): _text(value) for name, value in map(json.loads, lines)}
            return Contents(videos, labels, {})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"'{path}' is damaged ({one_line(error)}): restore it; or delete it, and changed videos are not noticed"
        ) from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"not a text: {value!r:.50}")
    return value
