"""The file meta/info.json of a LeRobot data set of any version: rate, features, cameras, and templates of paths."""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from string import Formatter
from typing import Any

from data_pipelines.errors import UserError, one_line, one_line_logger
from data_pipelines.files import read_text
from data_pipelines.text_files import shown

log = one_line_logger(__name__)

NUMERIC = re.compile(r"bool|u?int\d+|float\d+")
BOOKKEEPING = ("index", "episode_index", "task_index")  # the latter two are labels of episodes
MAX_EPISODES = 10**7


@dataclass(frozen=True)
class Info:
    """The facts of a data set.

    root: its folder.
    version: "v2.1", "v3.0", ... as stated.
    fps: frames per second, positive and finite.
    kinds: the dtype of each feature by name: "video", "image", "float32", ...
    stated: everything that the file states.
    """

    root: Path
    version: str
    fps: float
    kinds: Mapping[str, str]
    stated: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The file itself."""
        return _path_of_info(self.root)

    @property
    def numeric(self) -> list[str]:
        """The names of the features that are numbers."""
        return [name for name, kind in self.kinds.items() if NUMERIC.fullmatch(kind)]

    @property
    def counts(self) -> tuple[int, int]:
        """The number of episodes, and of those in a folder, of version 2. Raises UserError: one is not valid."""
        total: Any = self.stated.get("total_episodes")
        per_folder: Any = self.stated.get("chunks_size", 1000)
        are_whole = all(type(number) is int for number in (total, per_folder))
        if not are_whole or not 0 < total <= MAX_EPISODES or per_folder < 1:
            raise UserError(
                f"'{self.path}' has total_episodes={shown(total)} and chunks_size={shown(per_folder)}: they must be "
                "whole numbers from 1"
            )
        return total, per_folder

    def cameras(self, named: Sequence[str], kinds: Collection[str]) -> tuple[str, ...]:
        """Return the features that a user names as cameras, in this order; for none the first by name.

        kinds: the dtypes that a camera may have.

        Raises UserError: there are no cameras, or one of the names is unknown or is given twice.
        """
        cameras = sorted(name for name, kind in self.kinds.items() if kind in kinds)
        if not cameras:
            wanted = " or ".join(kinds)
            raise UserError(f"LeRobot data set '{self.root}' has no camera: none of its features is of dtype {wanted}")
        for name in named:
            if name not in cameras:
                raise UserError(f"camera={name!r} is unknown: LeRobot data set '{self.root}' has {', '.join(cameras)}")
            if named.count(name) > 1:
                raise UserError(f"camera={name!r} is named twice: name each camera of '{self.root}' once")
        if not named and len(cameras) > 1:
            log.info("LeRobot data set '%s' has the cameras %s: taking the first", self.root, ", ".join(cameras))
        return tuple(named) or (cameras[0],)

    def path_of(self, key: str, **values: str | int) -> str:
        """Return the path of a file, relative to the root, by the template `key`: "video_path" or "data_path".

        The template comes from strangers. Raises UserError: it has other fields than `values`, or leads out of the
        root.
        """
        template = str(self.stated.get(key))
        fields = ", ".join(f"{{{name}}}" for name in values)
        refusal = UserError(
            f"LeRobot data set '{self.root}': {key}={template[:200]!r} in meta/info.json is refused: it must be a path "
            f"in the data set, of {fields}"
        )
        try:
            for _, name, spec, conversion in Formatter().parse(template):
                if name is not None and (
                    name not in values or conversion or not re.fullmatch(r"(0?\d?d)?", spec or "")
                ):
                    raise refusal
            path = PurePosixPath(template.format(**values))
        except ValueError:
            raise refusal from None
        if path.is_absolute() or ".." in path.parts or "\\" in str(path):
            raise refusal
        return path.as_posix()


def read_info(root: Path) -> Info:
    """Read meta/info.json. Raises UserError: it is missing or not valid."""
    path = _path_of_info(root)
    try:
        stated = json.loads(read_text(path))
        fps, kinds = stated["fps"], {str(name): str(feature["dtype"]) for name, feature in stated["features"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"'{path}' is not the info.json of a LeRobot data set ({one_line(error)})") from None
    if isinstance(fps, bool) or not (isinstance(fps, int | float) and 0 < fps < math.inf):
        raise UserError(f"'{path}' has fps={shown(fps)}: it must be a positive number")
    return Info(root, str(stated.get("codebase_version")), fps, kinds, stated)


def version_of(root: Path) -> str:
    """Return the version that meta/info.json states, or "" if the file is missing or cannot be read."""
    try:
        return str(json.loads(read_text(_path_of_info(root))).get("codebase_version", ""))
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""


def _path_of_info(root: Path) -> Path:
    return root / "meta" / "info.json"
