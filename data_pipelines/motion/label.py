"""Position labels for folders of videos: each video is tracked, and its metadata.jsonl gets the positions per frame."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from data_pipelines.contents import content_of
from data_pipelines.decoders import DecodeError
from data_pipelines.errors import UserError
from data_pipelines.facts import Video
from data_pipelines.formats.image_folders import ImageFolders
from data_pipelines.formats.registry import detect_format, load_videos
from data_pipelines.formats.video_folder import VideoFolder
from data_pipelines.index import VideoIndex
from data_pipelines.motion.follow import Motion, NothingMoves, follow
from data_pipelines.motion.metadata import CLASS, Metadata
from data_pipelines.motion.tracks import Positions
from data_pipelines.split_folders import split_folders
from data_pipelines.text_files import shown

VERSION = 1  # of the method: positions of another one are computed again
WRITE_EVERY_S, WRITE_TIME_SHARE = 20.0, 0.05
DECIMALS = 2


@dataclass(frozen=True)
class Labelled:
    """The result for a video.

    positions: float [F, N, 2], as the label states them; None: it has no label.
    motion: None if it was labelled before, or has no label.
    fault: why it has no label; "" if it has one.
    """

    root: Path
    video: Video
    positions: Positions | None
    motion: Motion | None = None
    fault: str = ""


def label_motion(
    root: Path, *, num_objects: int = 1, label: str = "position", overwrite: bool = False, progress: bool = True
) -> list[Labelled]:
    """Write the positions of what moves into the metadata of a folder of videos, or of its splits.

    The label has 2 * num_objects numbers per frame: x and y of each object, in pixels as Motion.positions. A second
    field, LABEL_source, is a text about the number of objects and the video's content. A video for which they still
    hold is skipped unless `overwrite`, so that an interrupted call can be repeated. A video in which fewer objects
    move has a null as its label.

    Raises:
        UserError: the folder cannot be used; it has another label of this name; a file cannot be written.
    """
    metadata, videos = Metadata(), []
    for index, is_split in _folders_of(root):
        metadata.add_folder(index.root, index.videos, is_split=is_split, defaults=_classes(index))
        videos += [(index.root, video) for video in index.videos]
    done: dict[Path, Labelled] = {}
    for folder, video in videos:
        path = folder / video.path
        fields = metadata.fields(path)
        if label in fields and not str(fields.get(f"{label}_source", "")).startswith(_source()):
            raise UserError(f"'{path}' has a label {shown(label)} that does not come from here: use another name")
        if not overwrite and (before := _labelled_before(folder, video, fields, label, num_objects)):
            done[path] = before
    total = sum(video.num_frames for folder, video in videos if folder / video.path not in done)
    written_s = time.monotonic()
    interval_s = WRITE_EVERY_S
    with tqdm(total=total, desc="tracking", unit="frame", disable=not progress or not total) as bar:
        try:
            for folder, video in videos:
                path = folder / video.path
                if path in done:
                    continue
                done[path], fields = _tracked(folder, video, label, num_objects, bar)
                if fields:
                    metadata.update(path, fields)
                if (start_s := time.monotonic()) - written_s > interval_s:
                    metadata.write()
                    written_s = time.monotonic()
                    interval_s = max(WRITE_EVERY_S, (written_s - start_s) / WRITE_TIME_SHARE)
        finally:  # after Ctrl-C too
            metadata.write()
    return [done[folder / video.path] for folder, video in videos]


def _folders_of(root: Path) -> Iterator[tuple[VideoIndex, bool]]:
    """Yield the index of each folder with videos, and whether it is one of several splits. Raises UserError."""
    splits = split_folders(root)
    folders = [root] if splits is None else list(dict.fromkeys(map(Path, splits.values())))
    for folder in folders:
        if not isinstance(format := detect_format(str(folder)), VideoFolder | ImageFolders):
            raise UserError(f"'{folder}' is {format.name}: only folders of video files or of images can be labelled")
        siblings = folders if splits is not None else ()
        yield load_videos(folder, siblings=siblings, max_bad_fraction=1.0), splits is not None


def _classes(index: VideoIndex) -> list[dict[str, Any]]:
    """Return the fields of new lines: the classes that folders stand for as long as there is no metadata."""
    labels = index.labels.get(CLASS)
    if labels is None:
        return [{} for _ in index.videos]
    return [{CLASS: number} for number in labels.tolist()]


def _source(video: Video | None = None, num_objects: int = 0) -> str:
    """Return the text that marks a label: the part for all videos, or the whole for one of them."""
    name = "worldmodel label-motion"
    return name if video is None else f"{name} {VERSION}, objects {num_objects}, content {content_of(video)}"


def _labelled_before(
    root: Path, video: Video, fields: Mapping[str, Any], label: str, num_objects: int
) -> Labelled | None:
    source, _, result = str(fields.get(f"{label}_source", "")).partition(": ")
    if source != _source(video, num_objects) or label not in fields:
        return None
    if fields[label] is None:
        return Labelled(root, video, None, fault=result)
    try:
        positions = np.array(fields[label], float).reshape(video.num_frames, num_objects, 2)
    except (ValueError, TypeError):  # someone has changed it
        return None
    return Labelled(root, video, positions)


def _tracked(
    root: Path, video: Video, label: str, num_objects: int, bar: "tqdm[Any]"
) -> tuple[Labelled, dict[str, Any]]:
    """Track a video; return the result and its fields in the metadata, none if it cannot be read to the end."""
    start, source = bar.n, _source(video, num_objects)
    try:
        for step in follow(root, video, num_objects):
            if isinstance(step, Motion):
                motion = step
            else:
                bar.update(start + step - bar.n)
    except NothingMoves as nothing:
        bar.update(start + video.num_frames - bar.n)
        return Labelled(root, video, None, fault=str(nothing)), {label: None, f"{label}_source": f"{source}: {nothing}"}
    except DecodeError as error:
        bar.update(start + video.num_frames - bar.n)
        return Labelled(root, video, None, fault=f"cannot be decoded: {error}"), {}
    positions = motion.positions.round(DECIMALS)
    fields = {
        label: positions.reshape(len(positions), -1).tolist(),
        f"{label}_source": f"{source}: {motion.interpolated:.2%} interpolated",
    }
    return Labelled(root, video, positions, motion), fields
