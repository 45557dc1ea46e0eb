"""LeRobot data sets of version 3: which frames of which file each episode is, and what was recorded with each frame.

Several episodes share a video file, one after the other. Frame i of an episode that starts at `from_timestamp` of its
file is the file's frame from_timestamp * fps + i, and row dataset_from_index + i of the tables in data/.
"""

import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from string import Formatter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipelines.errors import UserError
from data_pipelines.probe import one_line

log = logging.getLogger(__name__)

NUMERIC = re.compile(r"bool|u?int\d+|float\d+")
BOOKKEEPING = ("index", "episode_index", "task_index")  # the latter two are labels of episodes


@dataclass(frozen=True)
class Episodes:
    """One camera's episodes in order of their index, E of them, and F frames of all.

    paths: the file of each episode, relative to the root.
    frames: the frames [start, stop) of its file that an episode consists of.
    labels: "episode_index", "task_index": int64 [E].
    frame_labels: "action", "observation.state" and whatever else was recorded as numbers, [F, ...].
    frame_label_offsets: int64 [E]; frame f of an episode's file has the frame label offset + f.
    """

    paths: Sequence[str]
    frames: Sequence[tuple[int, int]]
    labels: dict[str, torch.Tensor]
    frame_labels: dict[str, torch.Tensor]
    frame_label_offsets: torch.Tensor


def is_lerobot(root: Path) -> bool:
    return (root / "meta" / "info.json").is_file()


def read_episodes(root: Path, camera: str | None) -> Episodes:
    """Read a data set's tables. camera: a feature of dtype video; None: the first by name.

    Raises UserError: another version, no such camera, tables that are missing or contradict each other, a file name
    that leads out of the root, pyarrow is not installed.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UserError(
            f"the LeRobot data set '{root}' needs pyarrow, which is not installed: pip install 'worldmodel[lerobot]'"
        ) from None
    info = _read_info(root)
    camera = _choose_camera(root, info, camera)
    place = f"videos/{camera}"
    columns = ["episode_index", "dataset_from_index", "dataset_to_index"]
    columns += [f"{place}/chunk_index", f"{place}/file_index", f"{place}/from_timestamp"]
    table = _read_tables(root, "meta/episodes", columns, np.float64)
    order = np.argsort(table["episode_index"], kind="stable")
    episode, first, stop, chunk, file, from_s = (table[name][order] for name in columns)
    starts = np.rint(from_s * info["fps"]).astype(np.int64)
    if not len(episode) or (starts < 0).any():
        raise UserError(f"LeRobot data set '{root}': meta/episodes has no episodes, or one that starts before 0 s")

    names = [name for name, feature in info["features"].items() if NUMERIC.fullmatch(feature["dtype"])]
    data = _read_tables(root, "data", sorted({*names, "episode_index"}), np.float32)
    _check_rows(root, episode, first, stop, data["episode_index"])
    labels = {"episode_index": torch.from_numpy(episode)}
    if "task_index" in data and (stop > first).all():
        labels["task_index"] = torch.from_numpy(data["task_index"][first])
    files = zip(chunk.tolist(), file.tolist(), strict=True)
    return Episodes(
        paths=[_video_path(root, info["video_path"], camera, *numbers) for numbers in files],
        frames=list(zip(starts.tolist(), (starts + stop - first).tolist(), strict=True)),
        labels=labels,
        frame_labels={name: torch.from_numpy(data[name]) for name in names if name not in BOOKKEEPING},
        frame_label_offsets=torch.from_numpy(first - starts),
    )


def _read_info(root: Path) -> dict[str, Any]:
    """meta/info.json: its fps, features and video_path, checked."""
    path = root / "meta" / "info.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        version = str(info.get("codebase_version"))
        if not version.startswith("v3."):
            raise UserError(
                f"LeRobot data set '{root}' is of version {version!r}, and only v3.0 is read: convert it with "
                "LeRobot's convert_dataset_v21_to_v30"
            )
        fps, features = info["fps"], {name: {"dtype": str(entry["dtype"])} for name, entry in info["features"].items()}
        if not (isinstance(fps, int | float) and 0 < fps < math.inf):
            raise UserError(f"'{path}' has fps={fps!r}: it must be a positive number")
        return {"fps": fps, "features": features, "video_path": str(info.get("video_path"))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"'{path}' is not the info.json of a LeRobot data set ({one_line(error)})") from None


def _choose_camera(root: Path, info: dict[str, Any], camera: str | None) -> str:
    cameras = sorted(name for name, feature in info["features"].items() if feature["dtype"] == "video")
    if not cameras:
        raise UserError(f"LeRobot data set '{root}' has no videos: none of its features is of dtype video")
    if camera is not None and camera not in cameras:
        raise UserError(f"camera={camera!r} is unknown: LeRobot data set '{root}' has {', '.join(cameras)}")
    if camera is None and len(cameras) > 1:
        log.info("LeRobot data set '%s' has the cameras %s: taking the first", root, ", ".join(cameras))
    return camera or cameras[0]


def _video_path(root: Path, template: str, camera: str, chunk: int, file: int) -> str:
    """The template comes from strangers: it may name the three fields and nothing else, and stays in the root."""
    refusal = UserError(
        f"LeRobot data set '{root}': video_path={template[:200]!r} in meta/info.json is refused: it must be a path in "
        "the data set, of {video_key}, {chunk_index} and {file_index}"
    )
    values = {"video_key": camera, "chunk_index": chunk, "file_index": file}
    try:
        for _, name, spec, conversion in Formatter().parse(template):
            if name is not None and (name not in values or conversion or not re.fullmatch(r"(0?\d?d)?", spec or "")):
                raise refusal
        path = PurePosixPath(template.format(**values))
    except ValueError:
        raise refusal from None
    if path.is_absolute() or ".." in path.parts or "\\" in str(path):
        raise refusal
    return path.as_posix()


def _read_tables(
    root: Path, folder: str, columns: Sequence[str], float_type: type[np.floating[Any]]
) -> dict[str, NDArray[Any]]:
    """Columns of root/folder/chunk-*/file-*.parquet, one file after the other: int64 or float_type [rows, ...]."""
    from pyarrow import ArrowException, parquet

    paths = sorted((root / folder).glob("*/*.parquet"))
    if not paths:
        raise UserError(f"LeRobot data set '{root}' has no {folder}/*/*.parquet: download it whole")
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in columns}
    for path in paths:
        try:
            table = parquet.ParquetFile(path)
            missing = [name for name in columns if name not in table.schema_arrow.names]
            if missing:
                raise UserError(f"'{path}' has no column {missing[0]}")
            read = table.read(columns=list(columns))
            for name in columns:
                parts[name].append(_to_array(read[name], float_type))
        except (ArrowException, OSError, ValueError) as error:
            raise UserError(f"'{path}' is no table of a LeRobot data set: {one_line(error)}") from None
    try:
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}
    except ValueError as error:
        raise UserError(f"LeRobot data set '{root}': columns of {folder} differ in shape ({one_line(error)})") from None


def _to_array(column: Any, float_type: type[np.floating[Any]]) -> NDArray[Any]:
    """A column of numbers, or of equally long (nested) lists of numbers -> [rows, ...]. ValueError for others."""
    from pyarrow import compute

    values = column.combine_chunks()
    shape = [len(values)]
    while values.type.num_fields == 1:  # lists
        lengths = set(compute.unique(compute.list_value_length(values)).to_pylist()) or {0}
        if len(lengths) > 1 or None in lengths:
            raise ValueError("lists of different lengths")
        shape.append(lengths.pop())
        values = values.flatten()
    array = values.to_numpy(zero_copy_only=False)
    if values.null_count or array.dtype.kind not in "biuf":
        raise ValueError(f"{values.type} where numbers belong")
    return array.astype(float_type if array.dtype.kind == "f" else np.int64).reshape(shape)


def _check_rows(
    root: Path, episode: NDArray[Any], first: NDArray[Any], stop: NDArray[Any], of_row: NDArray[Any]
) -> None:
    """Raises UserError unless each episode's rows in data/ are its own."""
    for number, start, end in zip(episode.tolist(), first.tolist(), stop.tolist(), strict=True):
        if not (0 <= start <= end <= len(of_row) and (of_row[start:end] == number).all()):
            raise UserError(
                f"LeRobot data set '{root}': rows {start} to {end} of data/ are not those of episode {number}, as "
                "meta/episodes says: download it whole"
            )
