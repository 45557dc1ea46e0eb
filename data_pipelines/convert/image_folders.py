"""Folders of images, one folder per clip, with the labels that training reads for them (formats/image_folders.py).

The frames are those that training would read from the folders: FFmpeg decodes them.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_pipelines.containers import image_names, open_container, video_stream
from data_pipelines.convert.episodes import Clip, Frame, Keys, checked_name
from data_pipelines.convert.pictures import is_gray_picture
from data_pipelines.decoders import read_facts, read_frames
from data_pipelines.errors import UserError
from data_pipelines.facts import Video
from data_pipelines.formats import image_folders
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.indexing.folder import video_paths
from data_pipelines.labels import metadata_in


class ImageFolders:
    """Folders of JPEG or PNG images below a folder, or one such folder."""

    name = "a folder of image folders"
    keys: frozenset[str] = frozenset()

    def detect(self, source: Path) -> bool:
        # Pictures next to videos, such as that of label-motion, are no clip.
        return image_folders.ImageFolders().detect(str(source)) or (_is_clip(source) and not any(video_paths(source)))

    def episodes(self, source: Path, keys: Keys, siblings: Sequence[Path]) -> "list[FolderEpisode]":
        if not image_folders.ImageFolders().detect(str(source)):
            name = source.absolute().name
            return [FolderEpisode(name, checked_name(name, str(source)), source, (source,), {}, {})]
        index = load_videos(source, siblings=siblings, max_bad_fraction=1.0)
        good = [_episode_of(source, index, row) for row in range(len(index.videos))]
        bad = [FolderEpisode(f.path, checked_name(f.path, f.path), source / f.path, (), {}, {}) for f in index.bad]
        return sorted([*good, *bad], key=lambda episode: episode.place)


def _is_clip(source: Path) -> bool:
    return source.is_dir() and bool(image_names(source))


def _episode_of(source: Path, index: VideoIndex, row: int) -> "FolderEpisode":
    video: Video = index.videos[row]
    frame_labels: dict[str, Any] = {}
    if index.frame_label_offsets is not None:
        first = int(index.frame_label_offsets[row])
        frame_labels = {name: v[first : first + video.num_frames].numpy() for name, v in index.frame_labels.items()}
    labels = {name: values[row].tolist() for name, values in index.labels.items()}
    path = source / video.path
    files = (path, *filter(None, map(metadata_in, dict.fromkeys((source, path.parent)))))
    return FolderEpisode(video.path, checked_name(video.path, video.path), path, files, labels, frame_labels)


@dataclass(frozen=True)
class FolderEpisode:
    """A folder of images, with its labels."""

    place: str
    name: str
    path: Path
    files: tuple[Path, ...]
    labels: Mapping[str, Any]
    frame_labels: Mapping[str, Any]
    split: None = None

    @contextmanager
    def open(self) -> Iterator[Clip]:
        facts = read_facts(self.path)
        frames = partial(_frames, self.path, facts, _channels(self.path))
        yield Clip(facts.num_frames, frames, frame_labels=self.frame_labels, labels=self.labels)


def _channels(path: Path) -> int:
    """Return 1 for gray images, 3 for others. Raises UserError: they have more than 8 bits."""
    with open_container(os.path.abspath(path)) as container:
        pixels = video_stream(container).codec_context.format
    if pixels is None:
        raise UserError("its images have no known format")
    if any(component.bits > 8 for component in pixels.components):
        raise UserError(f"images of format {pixels.name}, with more than 8 bits: convert them to 8 bits")
    if pixels.name != "gray":
        return 3
    names = image_names(path)
    return 1 if all(is_gray_picture(path / name) for name in names) else 3


def _frames(path: Path, facts: Video, channels: int) -> Iterator[Frame]:
    for frame in read_frames(path, channels=channels, size_px=None, video=facts, decoder="pyav"):
        yield frame[0] if channels == 1 else frame.transpose(1, 2, 0)
