"""LeRobot data sets of version 3: the frames of each episode, and the labels that were recorded with each frame.

Several episodes share a video file, one after the other. An episode begins with the frame of its file whose time is
nearest to `from_timestamp`. Its frame i is the i-th from there, and row dataset_from_index + i of the tables in data/.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from string import Formatter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipelines.errors import UserError, one_line, one_line_logger
from data_pipelines.facts import BadFile, Video
from data_pipelines.files import check_regular, read_text
from data_pipelines.formats.base import LoadOptions
from data_pipelines.index import VideoIndex, check_bad_fraction
from data_pipelines.indexing.folder import index_folder
from data_pipelines.text_files import shown

log = one_line_logger(__name__)

NUMERIC = re.compile(r"bool|u?int\d+|float\d+")
FAR_FRAMES = 2**31  # behind the end of any file
BOOKKEEPING = ("index", "episode_index", "task_index")  # the latter two are labels of episodes


class LeRobot:
    """A LeRobot data set; the videos of one camera."""

    name = "a LeRobot data set"
    has_cameras = True

    def detect(self, root: str) -> bool:
        return (Path(root) / "meta" / "info.json").is_file()

    def load(self, root: str, options: LoadOptions) -> VideoIndex:
        folder = Path(root)
        episodes = _read_episodes(folder, options.camera)
        entries = index_folder(
            folder, num_workers=options.num_workers, progress=options.progress, max_frame_px=options.max_frame_px
        )
        return _make_index(folder, entries, episodes, options.max_bad_fraction)


@dataclass(frozen=True)
class _Episodes:
    """One camera's E episodes in order of their index, with F frames in all.

    paths: the file of each episode, relative to the root.
    fps: the frame rate that the data set states.
    starts_s: float64 [E], the time in its file, in seconds, at which an episode begins.
    lengths: int64 [E], frames.
    labels: "episode_index", "task_index": int64 [E].
    frame_labels: "action", "observation.state" and all else that was recorded as numbers, [F, ...] per name.
    first_rows: int64 [E]; frame i of an episode has the frame label first_row + i.
    label_faults: labels that are left out, and the reasons.
    """

    paths: Sequence[str]
    fps: float
    starts_s: NDArray[np.float64]
    lengths: NDArray[np.int64]
    labels: dict[str, torch.Tensor]
    frame_labels: dict[str, torch.Tensor]
    first_rows: NDArray[np.int64]
    label_faults: dict[str, str]


def _make_index(
    root: Path, entries: Iterable[Video | BadFile], episodes: _Episodes, max_bad_fraction: float
) -> VideoIndex:
    """Make the index of the episodes, from the entries of all cameras' files. Raises UserError: too many are bad."""
    entry_of = {entry.path: entry for entry in entries}
    videos: list[Video] = []
    rows: list[int] = []
    frames: list[tuple[int, int]] = []
    bad: dict[str, BadFile] = {}
    shown_s: dict[str, NDArray[np.float64]] = {}
    for row, (path, start_s, length) in enumerate(
        zip(episodes.paths, episodes.starts_s.tolist(), episodes.lengths.tolist(), strict=True)
    ):
        entry = entry_of.get(path, BadFile(path, 0, 0, "no such file"))
        if isinstance(entry, Video):
            if path not in shown_s:
                is_known = entry.fps or entry.frame_ms
                shown_s[path] = entry.shown_s() if is_known else np.arange(entry.num_frames) / episodes.fps
            start, stop = frames_of_episode(start_s, length, shown_s[path])
            if stop > entry.num_frames:
                reason = f"has {entry.num_frames} frames, but an episode in it ends at frame {stop}"
                entry = BadFile(path, entry.size_bytes, entry.mtime_ns, reason)
        if isinstance(entry, Video):
            videos.append(entry)
            rows.append(row)
            frames.append((start, stop))
        else:
            bad[path] = entry
    check_bad_fraction(root, list(bad.values()), len(set(episodes.paths)), max_bad_fraction)
    offsets = episodes.first_rows[rows] - np.array([start for start, _ in frames], dtype=np.int64)
    return VideoIndex(
        root=root,
        videos=videos,
        bad=list(bad.values()),
        labels={name: values[rows] for name, values in episodes.labels.items()},
        episodes=frames,
        frame_labels=episodes.frame_labels,
        frame_label_offsets=torch.from_numpy(offsets),
        label_faults=episodes.label_faults,
    )


def _read_episodes(root: Path, camera: str | None) -> _Episodes:
    """Read a data set's tables. camera: a feature of dtype video; None: the first by name.

    Raises UserError: another version, no such camera, tables that are missing or contradict each other, a file name
    that leads out of the root, or pyarrow is not installed.
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
                f"LeRobot data set '{root}': column {shown(name)} of meta/episodes does not hold one "
                f"{'number' if is_time else 'whole number'} per episode"
            )
    order = np.argsort(table["episode_index"], kind="stable")
    episode, first, stop, chunk, file, from_s = (table[name][order] for name in columns)
    if not len(episode) or not (from_s >= -0.5 / info["fps"]).all():
        raise UserError(f"LeRobot data set '{root}': meta/episodes has no episodes, or one that starts before 0 s")
    if len(twice := episode[1:][np.diff(episode) == 0]):
        raise UserError(f"LeRobot data set '{root}': meta/episodes lists episode {twice[0]} twice: download it again")

    names = [name for name, feature in info["features"].items() if NUMERIC.fullmatch(feature["dtype"])]
    faults: dict[str, str] = {}
    data = _read_tables(root, "data", sorted({*names, "episode_index"}), np.float32, faults)
    if "episode_index" not in data:
        raise UserError(f"LeRobot data set '{root}': {faults['episode_index']}")
    if data["episode_index"].ndim != 1:
        raise UserError(f"LeRobot data set '{root}': column 'episode_index' of data/ does not hold one number per row")
    for name, fault in faults.items():
        log.warning("LeRobot data set '%s': the label %s is left out: %s", root, shown(name), fault)
    _check_rows(root, episode, first, stop, data["episode_index"])
    labels = {"episode_index": torch.from_numpy(episode)}
    if "task_index" in data and data["task_index"].ndim == 1 and (stop > first).all():
        labels["task_index"] = torch.from_numpy(data["task_index"][first])
    files = zip(chunk.tolist(), file.tolist(), strict=True)
    return _Episodes(
        paths=[
            path_of(root, "video_path", info["video_path"], video_key=camera, chunk_index=chunk, file_index=file)
            for chunk, file in files
        ],
        fps=info["fps"],
        starts_s=from_s,
        lengths=stop - first,
        labels=labels,
        frame_labels={name: torch.from_numpy(data[name]) for name in names if name in data and name not in BOOKKEEPING},
        first_rows=first,
        label_faults=faults,
    )


def frames_of_episode(start_s: float, length: int, shown_s: NDArray[np.float64]) -> tuple[int, int]:
    """Find the frames [start, stop) of an episode that begins at `start_s` of a file with frames at shown_s [F].

    Measured durations drift: an episode that would end one frame after the end of the file begins one frame earlier.
    """
    after = int(np.searchsorted(shown_s, start_s))
    near = [frame for frame in (after - 1, after) if 0 <= frame < len(shown_s)]
    start = min(near, key=lambda frame: abs(float(shown_s[frame]) - start_s))
    step_s = float(shown_s[-1]) / max(1, len(shown_s) - 1)
    if after == len(shown_s) and step_s:  # after the last frame, by this many
        start += round(min((start_s - float(shown_s[-1])) / step_s, FAR_FRAMES))
    if start + length == len(shown_s) + 1 and start:
        start -= 1
    return start, start + length


def _read_info(root: Path) -> dict[str, Any]:
    """Return fps, features and video_path of meta/info.json. Raises UserError: they are missing or not valid."""
    path = root / "meta" / "info.json"
    try:
        info = json.loads(read_text(path))
        version = str(info.get("codebase_version"))
        if not version.startswith("v3."):
            raise UserError(
                f"LeRobot data set '{root}' is of version {shown(version)}, and only v3.0 is read: convert it with "
                "`worldmodel convert`, or LeRobot's convert_dataset_v21_to_v30"
            )
        fps, features = info["fps"], {name: {"dtype": str(entry["dtype"])} for name, entry in info["features"].items()}
        if not (isinstance(fps, int | float) and 0 < fps < math.inf):
            raise UserError(f"'{path}' has fps={shown(fps)}: it must be a positive number")
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


def path_of(root: Path, key: str, template: str, **values: str | int) -> str:
    """Return the path of a file, relative to the root, by a template of meta/info.json.

    The template comes from strangers. Raises UserError: it has other fields than `values`, or leads out of the root.
    """
    fields = ", ".join(f"{{{name}}}" for name in values)
    refusal = UserError(
        f"LeRobot data set '{root}': {key}={template[:200]!r} in meta/info.json is refused: it must be a path in the "
        f"data set, of {fields}"
    )
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
    """Return columns of root/folder/chunk-*/file-*.parquet, file after file: int64 or float_type [rows, ...].

    faults: receives the columns that are left out of the result, with reasons; None: such a column is an error.

    Raises UserError: no tables, one that cannot be read, or one without a column.
    """
    from pyarrow import ArrowException, parquet

    paths = sorted((root / folder).glob("*/*.parquet"), key=lambda path: _numbers_in(path.relative_to(root)))
    if not paths:
        raise UserError(f"LeRobot data set '{root}' has no {folder}/*/*.parquet: download it whole")
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in columns}
    for path in paths:
        try:
            check_regular(path)
            table = parquet.ParquetFile(path)
            missing = [name for name in columns if name not in table.schema_arrow.names]
            if missing:
                raise UserError(f"'{path}' has no column {missing[0]}")
            read = table.read(columns=list(columns))
        except (ArrowException, OSError, ValueError) as error:
            raise UserError(f"'{path}' is not a table of a LeRobot data set: {one_line(error)}") from None
        for name in columns:
            try:
                parts[name].append(to_array(read[name], float_type))
            except (ArrowException, ValueError, KeyError) as error:  # KeyError: there are two columns of this name
                fault = f"column {shown(name)} of '{path.relative_to(root)}': {one_line(error)}"
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
            fault = f"column {shown(name)} of {folder} differs in shape between files ({one_line(error)})"
            if faults is None:
                raise UserError(f"LeRobot data set '{root}': {fault}") from None
            faults[name] = fault
    return found


def _numbers_in(path: Path) -> list[tuple[str, int]]:
    """Return a sort key that puts file-1000 after file-999."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", path.as_posix())]


def to_array(column: Any, float_type: type[np.floating[Any]], *, finite: bool = True) -> NDArray[Any]:
    """Return a column of numbers, or of equally long (nested) lists of numbers, as int64 or float_type [rows, ...].

    Raises ValueError: other values, or one that is missing, too large or (if `finite`) not finite, with its row.
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
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"row {int(array.argmax()) // per_row} is {array.max()}, which needs more than 63 bits")
    with np.errstate(over="ignore"):  # the next test finds it
        array = array.astype(float_type if array.dtype.kind == "f" else np.int64)
    if finite and not np.isfinite(array).all():
        place = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"row {place // per_row} is {array[place]}, not a finite number")
    return array.reshape(shape)


def _check_rows(
    root: Path, episode: NDArray[Any], first: NDArray[Any], stop: NDArray[Any], of_row: NDArray[Any]
) -> None:
    """Raise UserError unless each episode's rows in data/ belong to it."""
    for number, start, end in zip(episode.tolist(), first.tolist(), stop.tolist(), strict=True):
        if not (0 <= start <= end <= len(of_row) and (of_row[start:end] == number).all()):
            raise UserError(
                f"LeRobot data set '{root}': rows {start} to {end} of data/ are not those of episode {number}, as "
                "meta/episodes says: download it whole"
            )
