"""New fields in the metadata.jsonl files of videos. All other lines and fields stay as they are."""

import json
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipelines.errors import UserError, one_line
from data_pipelines.facts import Video
from data_pipelines.files import write_text
from data_pipelines.labels import METADATA_NAME, metadata_in, read_metadata

CLASS = "label"


class Metadata:
    """The metadata of the videos in one or several folders, of which the splits of a data set have one each.

    The fields of a video are in the line from which labels are read: that of the closest metadata file with a line for
    it, in its folder or above. Videos without a line get one in their root's metadata.jsonl.
    """

    def __init__(self) -> None:
        self._files: dict[Path, _MetadataFile] = {}
        self._place: dict[Path, tuple[Path, str]] = {}  # of each video: a metadata file, and the name in it
        self._changed: set[Path] = set()

    def add_folder(
        self, root: Path, videos: Sequence[Video], *, is_split: bool, defaults: Sequence[Mapping[str, Any]]
    ) -> None:
        """Read the metadata of a folder's videos.

        is_split: as for data_pipelines.labels.read_labels.
        defaults: per video, the fields of a new line. Without any, it has the class that all lines of its subfolder
            state: lines that were written for the classes of folders are taken for them when videos are added.

        Raises:
            UserError: a metadata file is broken, or is not a metadata.jsonl.
        """
        folders = {Path(folder) for video in videos for folder in PurePosixPath(video.path).parents} | {Path()}
        above = [root.parent] if is_split else []
        candidates = [*above, *sorted(root / folder for folder in folders)]
        paths = [path for folder in candidates if (path := _jsonl_in(folder)) is not None]
        for path in paths:
            self._files.setdefault(path, _MetadataFile.read(path))
        new: list[tuple[Video, Mapping[str, Any]]] = []
        for video, fields in zip(videos, defaults, strict=True):
            place = root / video.path
            names = {path: place.relative_to(path.parent).as_posix() for path in paths if path.parent in place.parents}
            known = [(path, name) for path, name in names.items() if self._files[path].holds(name)]
            if not known:
                new.append((video, fields))
                continue
            self._place[place] = known[-1]
        stated: dict[Path, list[Any]] = {}  # the classes in the lines of the videos of each subfolder
        for place in [root / video.path for video in videos] if new else []:
            if place in self._place and place.parent != root:
                stated.setdefault(place.parent, []).append(self.fields(place).get(CLASS))
        classes = classes_of_folders(stated)
        for video, fields in new:
            place, path = root / video.path, root / METADATA_NAME
            file = self._files.setdefault(path, _MetadataFile([]))
            file.update(video.path, fields or classes.get(place.parent, {}))
            self._place[place] = path, video.path

    def fields(self, video: Path) -> Mapping[str, Any]:
        """Return the fields of a video of these folders."""
        path, name = self._place[video]
        return self._files[path].fields(name)

    def update(self, video: Path, fields: Mapping[str, Any]) -> None:
        """Set fields of a video; `write` writes them."""
        path, name = self._place[video]
        self._files[path].update(name, fields)
        self._changed.add(path)

    def write(self) -> None:
        """Replace the files that have changed, each at once.

        Raises:
            UserError: a file cannot be written.
        """
        for path in sorted(self._changed):
            try:
                write_text(path, "".join(f"{line}\n" for line in self._files[path].lines))
            except OSError as error:
                raise UserError(f"cannot write '{path}': {one_line(error)}") from error
        self._changed.clear()


def classes_of_folders(stated: Mapping[Path, Sequence[Any]]) -> dict[Path, dict[str, int]]:
    """Return the field with the class of each folder, given the classes in the lines of its videos.

    Empty unless there are several folders, each of which has one class, different from those of the others.
    """
    found = {folder: values[0] for folder, values in stated.items() if all(value == values[0] for value in values)}
    numbers = [number for number in found.values() if isinstance(number, int)]
    are_classes = len(stated) == len(found) == len(set(numbers)) > 1
    return {folder: {CLASS: number} for folder, number in found.items()} if are_classes else {}


class _MetadataFile:
    """The lines of a metadata.jsonl."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = list(lines)
        self._numbers: dict[str, list[int]] = {}  # of the lines of each video; equal lines may repeat
        for number, line in enumerate(self.lines):
            self._numbers.setdefault(posixpath.normpath(json.loads(line)["file_name"]), []).append(number)

    @classmethod
    def read(cls, path: Path) -> "_MetadataFile":
        """Read a file that data_pipelines.labels accepts. Raises UserError."""
        read_metadata(path)
        with open(path, encoding="utf-8-sig") as lines:
            return cls([line.strip() for line in lines if line.strip()])

    def holds(self, name: str) -> bool:
        return posixpath.normpath(name) in self._numbers

    def fields(self, name: str) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads(self.lines[self._numbers[posixpath.normpath(name)][0]])
        return fields

    def update(self, name: str, fields: Mapping[str, Any]) -> None:
        numbers = self._numbers.setdefault(posixpath.normpath(name), [])
        if not numbers:
            numbers.append(len(self.lines))
            self.lines.append(json.dumps({"file_name": name}))
        for number in numbers:
            self.lines[number] = json.dumps(json.loads(self.lines[number]) | dict(fields))


def _jsonl_in(folder: Path) -> Path | None:
    """Return the metadata.jsonl of a folder; None: it has no metadata. Raises UserError: it has another kind."""
    path = metadata_in(folder)
    if path is not None and path.name != METADATA_NAME:
        raise UserError(f"'{path}' does not take labels of frames: convert it to {METADATA_NAME}, and remove it")
    return path
