"""LeRobot data sets of versions 2.0 and 2.1: a table and, per camera, a video file for each episode.

    meta/info.json                                   fps, features, splits, templates of the paths
    data/chunk-000/episode_000000.parquet            a row per frame: actions, states, ..., or encoded images
    videos/chunk-000/CAMERA/episode_000000.mp4       the frames

formats/lerobot.py reads the videos without a conversion. The labels have the same names here, images can be converted,
and stated splits are kept.
"""

import re
from collections.abc import Callable, Iterator, Sequence
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
from data_pipelines.errors import UserError, one_line
from data_pipelines.facts import Video
from data_pipelines.files import check_regular
from data_pipelines.formats.lerobot import to_array
from data_pipelines.formats.lerobot_info import BOOKKEEPING, read_info, version_of
from data_pipelines.split_folders import SPLIT_NAMES
from data_pipelines.splits import Split
from data_pipelines.text_files import shown

PICTURES = ("video", "image")
OF_EPISODES = ("episode_index", "task_index")  # columns that are labels of whole episodes


class LeRobotV2:
    """A LeRobot data set of version 2.0 or 2.1; the frames of one camera. Keys.frames names it.

    A video has one picture per frame, so several cameras are several conversions. Several are read together from the
    data set itself (formats/lerobot.py).
    """

    name = "a LeRobot data set of version 2"
    keys = frozenset({"frames"})

    def detect(self, source: Path) -> bool:
        return version_of(source).startswith("v2.")

    def episodes(self, source: Path, keys: Keys, siblings: Sequence[Path]) -> "list[LeRobotEpisode]":
        info = read_info(source)
        total, per_folder = info.counts
        (camera,) = info.cameras([keys.frames] if keys.frames is not None else [], PICTURES)
        split_of = _splits(info.stated.get("splits"))
        labels = tuple(name for name in info.numeric if name not in BOOKKEEPING)
        fps = Fraction(info.fps).limit_denominator(100_000)
        found = []
        for number in range(total):
            place = {"episode_chunk": number // per_folder, "episode_index": number}
            table, video = source / info.path_of("data_path", **place), None
            if info.kinds[camera] == "video":
                video = source / info.path_of("video_path", video_key=camera, **place)
            found.append(
                LeRobotEpisode(
                    f"episode {number}", f"episode_{number:06d}", split_of(number),
                    (table, video) if video else (table,), table, video, camera, labels, fps,
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


def _splits(stated: Any) -> Any:
    """Return the function from the number of an episode to its split, from {"train": "0:40", "test": "40:50"}."""
    ranges: list[tuple[Split, range]] = []
    for name, text in stated.items() if isinstance(stated, dict) else ():
        split = next((split for split, usual in SPLIT_NAMES.items() if str(name).lower() in usual), None)
        if split and (bounds := re.fullmatch(r"(\d{1,9}):(\d{1,9})", str(text))):
            ranges.append((split, range(int(bounds[1]), int(bounds[2]))))
    return lambda number: next((split for split, rows in ranges if number in rows), None)


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
