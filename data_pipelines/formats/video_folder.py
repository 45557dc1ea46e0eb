"""Folders of video files, with labels from metadata files or from the names of subfolders."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from data_pipelines.errors import UserError, one_line
from data_pipelines.facts import BadFile, Video
from data_pipelines.formats.base import LoadOptions
from data_pipelines.index import VideoIndex, check_bad_fraction
from data_pipelines.indexing.folder import index_folder, is_video_name
from data_pipelines.labels import read_labels


class VideoFolder:
    """A folder of video files, in it or in its subfolders."""

    name = "a folder of video files"
    has_cameras = False

    def detect(self, root: str) -> bool:
        return True

    def load(self, root: str, options: LoadOptions) -> VideoIndex:
        return load_labelled(Path(root), _class_names([Path(root), *options.siblings]), options)


def load_labelled(root: Path, class_names: Sequence[str], options: LoadOptions) -> VideoIndex:
    """Index a folder and read its labels. Raises UserError.

    class_names: the subfolders that are classes, for labels without metadata.
    """
    entries = index_folder(
        root, num_workers=options.num_workers, progress=options.progress, max_frame_px=options.max_frame_px
    )
    return labelled_index(root, entries, class_names, options)


def labelled_index(
    root: Path, entries: Sequence[Video | BadFile], class_names: Sequence[str], options: LoadOptions
) -> VideoIndex:
    """Return the index of a folder's entries, with their labels. Arguments and errors as for load_labelled."""
    videos = [entry for entry in entries if isinstance(entry, Video)]
    bad = [entry for entry in entries if isinstance(entry, BadFile)]
    check_bad_fraction(root, bad, len(entries), options.max_bad_fraction)
    labels = read_labels(root, videos, class_names, is_split=bool(options.siblings))
    return VideoIndex(
        root=root,
        videos=videos,
        bad=bad,
        labels=labels.of_videos,
        frame_labels=labels.of_frames,
        frame_label_offsets=labels.offsets,
        label_faults=labels.faults,
    )


def _class_names(folders: Iterable[Path]) -> list[str]:
    """Return the sorted names of subfolders that hold videos."""
    return names_of_classes(folders, is_video_name)


def names_of_classes(folders: Iterable[Path], is_content: Callable[[str], bool]) -> list[str]:
    """Return the sorted names of subfolders with a file whose name is one of a content, such as a video."""
    return sorted({path.name for path in subfolders(folders) if _holds(path, is_content)})


def subfolders(folders: Iterable[Path]) -> list[Path]:
    """Return the subfolders of folders, without hidden ones. Raises UserError: a folder cannot be read."""
    found: list[Path] = []
    for folder in folders:
        try:
            with os.scandir(folder) as entries:  # it knows folders without asking for each file
                found += [Path(entry.path) for entry in entries if entry.name[0] != "." and entry.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            continue  # index_folder reports it
        except OSError as error:
            raise UserError(f"folder '{folder}' cannot be read: {one_line(error)}") from None
    return found


def _holds(folder: Path, is_content: Callable[[str], bool]) -> bool:
    try:
        return any(map(is_content, os.listdir(folder)))
    except OSError:  # the indexing of the folder skips it too
        return False
