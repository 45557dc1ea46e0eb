"""LeRobot data sets of versions 2.0 and 2.1: a table and, per camera, a video file for each episode.

    meta/info.json                                   fps, features, splits, templates of the paths
    data/chunk-000/episode_000000.parquet            a row per frame: actions, states, ..., or encoded images
    videos/chunk-000/CAMERA/episode_000000.mp4       the frames

Version 3 is read as it is (formats/lerobot.py), and the labels get the same names here.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.convert.episodes import Clip, Frame, Keys
from data_pipelines.convert.pictures import decode_picture
from data_pipelines.decoders import read_facts, read_frames
from data_pipelines.errors import UserError, one_line, one_line_logger
from data_pipelines.facts import Video
from data_pipelines.files import check_regular, read_text
from data_pipelines.formats.lerobot import BOOKKEEPING, NUMERIC, path_of, to_array
from data_pipelines.split_folders import SPLIT_NAMES
from data_pipelines.splits import Split
from data_pipelines.text_files import shown

log = one_line_logger(__name__)

MAX_EPISODES = 10**7
PICTURES = ("video", "image")
OF_EPISODES = ("episode_index", "task_index")  # columns that are labels of whole episodes


class LeRobotV2:
    """A LeRobot data set of version 2.0 or 2.1; the frames of one camera. Keys.frames names the camera."""

    name = "a LeRobot data set of version 2"
    keys = frozenset({"frames"})

    def detect(self, source: Path) -> bool:
        path = source / "meta" / "info.json"
        return path.is_file() and str(_read_json(path).get("codebase_version")).startswith("v2.")

    def episodes(self, source: Path, keys: Keys, siblings: Sequence[Path]) -> "list[LeRobotEpisode]":
        info = _read_info(source)
        camera = _choose_camera(source, info, keys.frames)
        kinds = info["kinds"]
        labels = tuple(name for name, kind in kinds.items() if NUMERIC.fullmatch(kind) and name not in BOOKKEEPING)
        found = []
        for number in range(info["total_episodes"]):
            place = {"episode_chunk": number // info["chunks_size"], "episode_index": number}
            table = source / path_of(source, "data_path", info["data_path"], **place)
            video = None
            if kinds[camera] == "video":
                video = source / path_of(source, "video_path", info["video_path"], video_key=camera, **place)
            found.append(
                LeRobotEpisode(
                    f"episode {number}", f"episode_{number:06d}", info["splits"](number),
                    (table, video) if video else (table,), table, video, camera, labels, info["fps"],
                )
            )  # fmt: skip
        return found


@dataclass(frozen=True)
class LeRobotEpisode:
    """An episode. video: the file of its frames; None: they are encoded images in the column `camera` of the table."""

    place: str
    name: str
    split: Split | None
    files: tuple[Path, ...]
    table: Path
    video: Path | None
    camera: str
    labels: tuple[str, ...]
    fps: Fraction

    @contextmanager
    def open(self) -> Iterator[Clip]:
        columns = _read_table(self.table, [*self.labels, *OF_EPISODES], self.camera, self.video is None)
        frames: Callable[[], Iterator[Frame]]
        numbers: dict[str, Any] = {name: int(columns[name][0]) for name in OF_EPISODES if name in columns}
        num_frames = len(columns["episode_index"])
        if self.video is None:
            frames = partial(map, decode_picture, columns.pop(self.camera))
        else:
            facts = read_facts(self.video)
            if facts.num_frames != num_frames:
                raise UserError(f"'{self.video}' has {facts.num_frames} frames, and its table has {num_frames} rows")
            frames = partial(_frames, self.video, facts)
        of_frames = {name: columns[name] for name in self.labels if name in columns}
        yield Clip(num_frames, frames, of_frames, numbers, fps=self.fps, video=self.video)


def _frames(video: Path, facts: Video) -> Iterator[Frame]:
    for frame in read_frames(video, channels=3, size_px=None, decoder="pyav", video=facts):
        yield frame.transpose(1, 2, 0)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _read_info(root: Path) -> dict[str, Any]:
    """Return the needed parts of meta/info.json. Raises UserError: one is missing or not valid."""
    path = root / "meta" / "info.json"
    info = _read_json(path)
    try:
        rate, total, chunk = info["fps"], info["total_episodes"], info.get("chunks_size", 1000)
        if not (isinstance(rate, int | float) and 0 < rate < math.inf):
            raise ValueError(f"fps={rate!r} is not a positive number")
        if not all(type(number) is int for number in (total, chunk)) or not 0 < total <= MAX_EPISODES or chunk < 1:
            raise ValueError(
                f"total_episodes={shown(total)} and chunks_size={shown(chunk)} must be whole numbers from 1"
            )
        return {
            "fps": Fraction(rate).limit_denominator(100_000),
            "total_episodes": total,
            "chunks_size": chunk,
            "kinds": {str(name): str(feature["dtype"]) for name, feature in info["features"].items()},
            "data_path": str(info.get("data_path")),
            "video_path": str(info.get("video_path")),
            "splits": _splits(info.get("splits")),
        }
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"'{path}' is not the info.json of a LeRobot data set ({one_line(error)})") from None


def _splits(stated: Any) -> Any:
    """Return the function from the number of an episode to its split, from {"train": "0:40", "test": "40:50"}."""
    ranges: list[tuple[Split, range]] = []
    for name, text in stated.items() if isinstance(stated, dict) else ():
        split = next((split for split, usual in SPLIT_NAMES.items() if str(name).lower() in usual), None)
        if split and (bounds := re.fullmatch(r"(\d{1,9}):(\d{1,9})", str(text))):
            ranges.append((split, range(int(bounds[1]), int(bounds[2]))))
    return lambda number: next((split for split, rows in ranges if number in rows), None)


def _choose_camera(root: Path, info: Mapping[str, Any], key: str | None) -> str:
    cameras = sorted(name for name, kind in info["kinds"].items() if kind in PICTURES)
    if not cameras:
        raise UserError(f"LeRobot data set '{root}' has no frames: none of its features is of dtype video or image")
    if key is not None and key not in cameras:
        raise UserError(f"LeRobot data set '{root}' has no camera {shown(key)}: it has {', '.join(cameras)}")
    if key is None and len(cameras) > 1:
        log.info("LeRobot data set '%s' has the cameras %s: taking the first", root, ", ".join(cameras))
    return key or cameras[0]


def _read_table(path: Path, numbers: Sequence[str], camera: str, with_pictures: bool) -> dict[str, Any]:
    """Return the columns of numbers [T, ...] that the table has, and the encoded pictures. Raises UserError."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"'{path}' needs pyarrow, which is not installed: pip install 'worldmodel[lerobot]'") from None
    try:
        check_regular(path)
        file = parquet.ParquetFile(path)
        names = [name for name in dict.fromkeys(numbers) if name in file.schema_arrow.names]
        table = file.read(columns=[*names, *([camera] if with_pictures else [])])
        found: dict[str, Any] = {name: to_array(table[name], np.float32) for name in names}
        if "episode_index" not in found or not len(found["episode_index"]):
            raise ValueError("no rows, or no column episode_index")
        if with_pictures:
            rows = table[camera].to_pylist()
            found[camera] = [row.get("bytes") if isinstance(row, dict) else row for row in rows]
            if not all(isinstance(picture, bytes) for picture in found[camera]):
                raise ValueError(f"column {shown(camera)} does not hold encoded images")
        return found
    except (ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is not a table of a LeRobot data set: {one_line(error)}") from None
