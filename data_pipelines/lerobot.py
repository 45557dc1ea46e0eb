"""LeRobot data sets of version 3: which frames of which file each episode is, and what was recorded with each frame.

Several episodes share a video file, one after the other. An episode begins with the frame of its file whose time is
nearest to `from_timestamp`; its frame i is the i-th from there, and row dataset_from_index + i of the tables in data/.
"""

import json
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

from data_pipelines.errors import UserError, one_line_logger
from data_pipelines.files import read_text
from data_pipelines.probe import one_line

log = one_line_logger(__name__)

NUMERIC = re.compile(r"bool|u?int\d+|float\d+")
BOOKKEEPING = ("index", "episode_index", "task_index")  # the latter two are labels of episodes


@dataclass(frozen=True)
class Episodes:
    """One camera's episodes in order of their index, E of them, and F frames of all.

    paths: the file of each episode, relative to the root.
    starts_s: float64 [E], the time in its file at which an episode begins.
    lengths: int64 [E], frames.
    labels: "episode_index", "task_index": int64 [E].
    frame_labels: "action", "observation.state" and whatever else was recorded as numbers, [F, ...].
    first_rows: int64 [E]; frame i of an episode has the frame label first_row + i.
    label_faults: labels that are left out, and why.
    """

    paths: Sequence[str]
    starts_s: NDArray[np.float64]
    lengths: NDArray[np.int64]
    labels: dict[str, torch.Tensor]
    frame_labels: dict[str, torch.Tensor]
    first_rows: NDArray[np.int64]
    label_faults: dict[str, str]


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
    for name in columns:
        is_time = name.endswith("from_timestamp")
        if table[name].ndim != 1 or (table[name].dtype.kind != "i" and not is_time):
            raise UserError(
                f"LeRobot data set '{root}': column {name!r} of meta/episodes does not hold one "
                f"{'number' if is_time else 'whole number'} per episode"
            )
    order = np.argsort(table["episode_index"], kind="stable")
    episode, first, stop, chunk, file, from_s = (table[name][order] for name in columns)
    if not len(episode) or not (from_s >= -0.5 / info["fps"]).all():
        raise UserError(f"LeRobot data set '{root}': meta/episodes has no episodes, or one that starts before 0 s")

    names = [name for name, feature in info["features"].items() if NUMERIC.fullmatch(feature["dtype"])]
    faults: dict[str, str] = {}
    data = _read_tables(root, "data", sorted({*names, "episode_index"}), np.float32, faults)
    if "episode_index" not in data:
        raise UserError(f"LeRobot data set '{root}': {faults['episode_index']}")
    if data["episode_index"].ndim != 1:
        raise UserError(f"LeRobot data set '{root}': column 'episode_index' of data/ does not hold one number per row")
    for name, fault in faults.items():
        log.warning("LeRobot data set '%s': the label %r is left out: %s", root, name, fault)
    _check_rows(root, episode, first, stop, data["episode_index"])
    labels = {"episode_index": torch.from_numpy(episode)}
    if "task_index" in data and data["task_index"].ndim == 1 and (stop > first).all():
        labels["task_index"] = torch.from_numpy(data["task_index"][first])
    files = zip(chunk.tolist(), file.tolist(), strict=True)
    return Episodes(
        paths=[_video_path(root, info["video_path"], camera, *numbers) for numbers in files],
        starts_s=from_s,
        lengths=stop - first,
        labels=labels,
        frame_labels={name: torch.from_numpy(data[name]) for name in names if name in data and name not in BOOKKEEPING},
        first_rows=first,
        label_faults=faults,
    )


def frames_of_episode(start_s: float, length: int, shown_s: NDArray[np.float64]) -> tuple[int, int]:
    """Find the frames [start, stop) of an episode that begins at `start_s` of a file with frames at shown_s [F].

    Measured durations drift: an episode that would end one frame behind the file begins one frame earlier.
    """
    after = int(np.searchsorted(shown_s, start_s))
    near = [frame for frame in (after - 1, after) if 0 <= frame < len(shown_s)]
    start = min(near, key=lambda frame: abs(float(shown_s[frame]) - start_s))
    step_s = float(shown_s[-1]) / max(1, len(shown_s) - 1)
    if after == len(shown_s) and step_s:  # behind the last frame, by so many
        start += round((start_s - float(shown_s[-1])) / step_s)
    if start + length == len(shown_s) + 1 and start:
        start -= 1
    return start, start + length


def _read_info(root: Path) -> dict[str, Any]:
    """meta/info.json: its fps, features and video_path, checked."""
    path = root / "meta" / "info.json"
    try:
        info = json.loads(read_text(path))
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
    root: Path,
    folder: str,
    columns: Sequence[str],
    float_type: type[np.floating[Any]],
    faults: dict[str, str] | None = None,
) -> dict[str, NDArray[Any]]:
    """Columns of root/folder/chunk-*/file-*.parquet, one file after the other: int64 or float_type [rows, ...].

    faults: takes why a column is left out of the result; None: such a column is an error.
    """
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
        except (ArrowException, OSError, ValueError) as error:
            raise UserError(f"'{path}' is not a table of a LeRobot data set: {one_line(error)}") from None
        for name in columns:
            try:
                parts[name].append(_to_array(read[name], float_type))
            except (ArrowException, ValueError) as error:
                fault = f"column {name!r} of '{path.relative_to(root)}': {one_line(error)}"
                if faults is None:
                    raise UserError(f"LeRobot data set '{root}': {fault}") from None
                faults.setdefault(name, fault)
    found: dict[str, NDArray[Any]] = {}
    for name in columns:
        if faults is not None and name in faults:
            continue
        try:
            found[name] = np.concatenate(parts[name])
        except ValueError as error:
            fault = f"column {name!r} of {folder} differs in shape between files ({one_line(error)})"
            if faults is None:
                raise UserError(f"LeRobot data set '{root}': {fault}") from None
            faults[name] = fault
    return found


def _to_array(column: Any, float_type: type[np.floating[Any]]) -> NDArray[Any]:
    """A column of numbers, or of equally long (nested) lists of numbers -> [rows, ...].

    ValueError for others, and for what is missing or not finite, with its row.
    """
    from pyarrow import compute

    values = column.combine_chunks()
    if values.null_count:
        raise ValueError(f"row {values.is_null().to_pylist().index(True)} is null")
    shape = [len(values)]
    while values.type.num_fields == 1:  # lists
        lengths = set(compute.unique(compute.list_value_length(values)).to_pylist()) or {0}
        if len(lengths) > 1 or None in lengths:
            raise ValueError("lists of different lengths")
        shape.append(lengths.pop())
        values = values.flatten()
    array = values.to_numpy(zero_copy_only=False)
    per_row = max(1, math.prod(shape[1:]))
    if values.null_count:
        raise ValueError(f"row {values.is_null().to_pylist().index(True) // per_row} holds a null")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{values.type} where numbers belong")
    array = array.astype(float_type if array.dtype.kind == "f" else np.int64)
    if not np.isfinite(array).all():
        place = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"row {place // per_row} is {array[place]}, not a finite number")
    return array.reshape(shape)


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
