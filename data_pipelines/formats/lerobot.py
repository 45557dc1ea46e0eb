"""LeRobot data sets: the frames of each episode as one or several cameras show them, and what was recorded with them.

Version 3: several episodes share a video file, one after the other, and each camera may divide them among other files.
An episode begins with the frame of its file whose time is nearest to `from_timestamp`. Its frame i is the i-th from
there, and row dataset_from_index + i of the tables in data/.

Version 2: each episode has a file per camera, and a table in data/. Its frame i is row i of its table.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipelines.errors import UserError, one_line, one_line_logger
from data_pipelines.facts import BadFile, Video
from data_pipelines.files import check_regular
from data_pipelines.formats.base import LoadOptions
from data_pipelines.formats.lerobot_info import BOOKKEEPING, Info, read_info
from data_pipelines.index import VideoIndex, View, check_bad_fraction
from data_pipelines.indexing.folder import index_folder
from data_pipelines.text_files import shown

log = one_line_logger(__name__)

FAR_FRAMES = 2**31  # behind the end of any file


class LeRobot:
    """A LeRobot data set; the videos of one camera, or of several."""

    name = "a LeRobot data set"
    has_cameras = True

    def detect(self, root: str) -> bool:
        return (Path(root) / "meta" / "info.json").is_file()

    def load(self, root: str, options: LoadOptions) -> VideoIndex:
        folder = Path(root)
        episodes = _read_episodes(folder, options.cameras)
        entries = index_folder(
            folder, num_workers=options.num_workers, progress=options.progress, max_frame_px=options.max_frame_px
        )
        return _make_index(folder, entries, episodes, options.max_bad_fraction)


@dataclass(frozen=True)
class _Camera:
    """The videos of one camera for E episodes.

    paths: the file of each episode, relative to the root.
    starts_s: float64 [E], the time in its file, in seconds, at which an episode begins.
    """

    name: str
    paths: Sequence[str]
    starts_s: NDArray[np.float64]


@dataclass(frozen=True)
class _Episodes:
    """E episodes in order of their index, with F frames in all.

    numbers: int64 [E], the index of each episode.
    cameras: at least one.
    fps: the frame rate that the data set states.
    lengths: int64 [E], frames.
    labels: "episode_index", "task_index": int64 [E].
    frame_labels: "action", "observation.state" and all else that was recorded as numbers, [F, ...] per name.
    first_rows: int64 [E]; frame i of an episode has the frame label first_row + i.
    label_faults: labels that are left out, and the reasons.
    one_per_file: each file holds the frames of one episode, and no others.
    """

    numbers: NDArray[np.int64]
    cameras: Sequence[_Camera]
    fps: float
    lengths: NDArray[np.int64]
    labels: dict[str, torch.Tensor]
    frame_labels: dict[str, torch.Tensor]
    first_rows: NDArray[np.int64]
    label_faults: dict[str, str]
    one_per_file: bool


@dataclass(frozen=True)
class _Place:
    """The frames [start, stop) of a file that an episode consists of, and their times [stop - start] in seconds."""

    video: Video
    start: int
    stop: int
    times_s: NDArray[np.float64]


def _make_index(
    root: Path, entries: Iterable[Video | BadFile], episodes: _Episodes, max_bad_fraction: float
) -> VideoIndex:
    """Make the index of the episodes, from the entries of all cameras' files.

    Raises UserError: too many are bad, or an episode has other frames in one camera than in another.
    """
    place_of = _places(root, entries, episodes)
    rows: list[int] = []
    found: list[list[_Place]] = []
    bad: dict[str, BadFile] = {}
    for row in range(len(episodes.numbers)):
        places = [place_of(camera, row) for camera in episodes.cameras]
        bad |= {place.path: place for place in places if isinstance(place, BadFile)}
        good = [place for place in places if isinstance(place, _Place)]
        if len(good) == len(places):
            _check_alike(root, episodes, row, good)
            rows.append(row)
            found.append(good)
    num_files = len({path for camera in episodes.cameras for path in camera.paths})
    check_bad_fraction(root, list(bad.values()), num_files, max_bad_fraction)
    firsts = [places[0] for places in found]
    offsets = episodes.first_rows[rows] - np.array([place.start for place in firsts], dtype=np.int64)
    return VideoIndex(
        root=root,
        videos=[place.video for place in firsts],
        bad=list(bad.values()),
        labels={name: values[rows] for name, values in episodes.labels.items()},
        episodes=[(place.start, place.stop) for place in firsts],
        frame_labels=episodes.frame_labels,
        frame_label_offsets=torch.from_numpy(offsets),
        label_faults=episodes.label_faults,
        views=[
            View(
                videos=[places[number].video for places in found],
                shifts=[places[number].start - places[0].start for places in found],
            )
            for number in range(1, len(episodes.cameras))
        ],
    )


def _places(
    root: Path, entries: Iterable[Video | BadFile], episodes: _Episodes
) -> Callable[[_Camera, int], _Place | BadFile]:
    """Return a function from a camera and the row of an episode to its place in the camera's file.

    The function raises UserError: there are several cameras, and the file has fewer frames than its episodes.
    """
    entry_of = {entry.path: entry for entry in entries}
    shown_s: dict[str, NDArray[np.float64]] = {}
    needed = Counter[str]()
    for camera in episodes.cameras:
        for path, length in zip(camera.paths, episodes.lengths.tolist(), strict=True):
            needed[path] += length

    def place_of(camera: _Camera, row: int) -> _Place | BadFile:
        path, length = camera.paths[row], int(episodes.lengths[row])
        entry = entry_of.get(path, BadFile(path, 0, 0, "no such file"))
        if isinstance(entry, BadFile):
            return entry
        if path not in shown_s:
            is_known = entry.fps or entry.frame_ms
            shown_s[path] = entry.shown_s() if is_known else np.arange(entry.num_frames) / episodes.fps
        start, stop = frames_of_episode(float(camera.starts_s[row]), length, shown_s[path])
        reason = ""
        if episodes.one_per_file and entry.num_frames != length:
            reason = f"has {entry.num_frames} frames, but the table of its episode has {length} rows"
        elif stop > entry.num_frames:
            reason = f"has {entry.num_frames} frames, but an episode in it ends at frame {stop}"
        elif len(episodes.cameras) > 1 and entry.num_frames < needed[path]:
            reason = f"has {entry.num_frames} frames, but its episodes have {needed[path]}"
        if reason and len(episodes.cameras) > 1:
            raise _not_together(root, episodes, row, f"'{path}' {reason}")
        if reason:
            return BadFile(path, entry.size_bytes, entry.mtime_ns, reason)
        return _Place(entry, start, stop, shown_s[path][start:stop])

    return place_of


def _check_alike(root: Path, episodes: _Episodes, row: int, places: Sequence[_Place]) -> None:
    """Raise UserError if the frames of an episode come at other times in one camera than in the first."""
    first, *others = (place.times_s - place.times_s[:1] for place in places)
    for number, times_s in enumerate(others, start=1):
        apart_s = np.abs(times_s - first).max(initial=0)
        if apart_s > 0.5 / episodes.fps:
            pair = f"{episodes.cameras[0].name} and {episodes.cameras[number].name}"
            raise _not_together(
                root, episodes, row, f"its frames are up to {apart_s:.3g} s apart in {pair}, over half a frame"
            )


def _not_together(root: Path, episodes: _Episodes, row: int, fault: str) -> UserError:
    names = ", ".join(camera.name for camera in episodes.cameras)
    return UserError(
        f"LeRobot data set '{root}': the cameras {names} do not show the same frames of episode "
        f"{episodes.numbers[row]}: {fault}: name one camera, or repair or remove the episode"
    )


def _read_episodes(root: Path, named: Sequence[str]) -> _Episodes:
    """Read a data set's tables. named: features of dtype video; empty: the first by name.

    Raises UserError: another version, no such camera, tables that are missing or contradict each other, a file name
    that leads out of the root, or pyarrow is not installed.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UserError(
            f"the LeRobot data set '{root}' needs pyarrow, which is not installed: pip install 'worldmodel[lerobot]'"
        ) from None
    info = read_info(root)
    if not info.version.startswith(("v2.", "v3.")):
        raise UserError(
            f"LeRobot data set '{root}' is of version {shown(info.version)}, and only v2 and v3 are read: convert it "
            "by LeRobot's own scripts"
        )
    is_old = info.version.startswith("v2.")
    if is_old and "image" in info.kinds.values() and "video" not in info.kinds.values():
        raise UserError(
            f"LeRobot data set '{root}' of version {shown(info.version)} holds its frames as images: convert it with "
            "`worldmodel convert`"
        )
    cameras = info.cameras(named, ("video",))
    stated = None if is_old else _episodes_of_tables(info, cameras)
    faults: dict[str, str] = {}
    data = _read_tables(root, "data", sorted({*info.numeric, "episode_index"}), np.float32, faults)
    if "episode_index" not in data:
        raise UserError(f"LeRobot data set '{root}': {faults['episode_index']}")
    if data["episode_index"].ndim != 1:
        raise UserError(f"LeRobot data set '{root}': column 'episode_index' of data/ does not hold one number per row")
    for name, fault in faults.items():
        log.warning("LeRobot data set '%s': the label %s is left out: %s", root, shown(name), fault)
    episode, first, stop, files = stated or _episodes_of_rows(info, cameras, data["episode_index"])
    _check_rows(root, episode, first, stop, data["episode_index"])
    labels = {"episode_index": torch.from_numpy(episode)}
    if "task_index" in data and data["task_index"].ndim == 1 and (stop > first).all():
        labels["task_index"] = torch.from_numpy(data["task_index"][first])
    return _Episodes(
        numbers=episode,
        cameras=files,
        fps=info.fps,
        lengths=stop - first,
        labels=labels,
        frame_labels={
            name: torch.from_numpy(data[name]) for name in info.numeric if name in data and name not in BOOKKEEPING
        },
        first_rows=first,
        label_faults=faults,
        one_per_file=is_old,
    )


Bounds = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], list[_Camera]]
"""The numbers, first rows and last rows plus one of the episodes, [E] each, and their files."""


def _episodes_of_tables(info: Info, cameras: Sequence[str]) -> Bounds:
    """Read the episodes of version 3 from meta/episodes. Raises UserError."""
    root, wanted = info.root, ["episode_index", "dataset_from_index", "dataset_to_index"]
    of_camera = {name: [f"videos/{name}/{key}" for key in ("chunk_index", "file_index")] for name in cameras}
    starts = {name: f"videos/{name}/from_timestamp" for name in cameras}
    columns = [*wanted, *(column for names in of_camera.values() for column in names), *starts.values()]
    table = _read_tables(root, "meta/episodes", columns, np.float64)
    for name in columns:
        is_time = name.endswith("from_timestamp")
        if table[name].ndim != 1 or (table[name].dtype.kind != "i" and not is_time):
            raise UserError(
                f"LeRobot data set '{root}': column {shown(name)} of meta/episodes does not hold one "
                f"{'number' if is_time else 'whole number'} per episode"
            )
    order = np.argsort(table["episode_index"], kind="stable")
    table = {name: values[order] for name, values in table.items()}
    episode, first, stop = (table[name] for name in wanted)
    if not len(episode) or not all((table[name] >= -0.5 / info.fps).all() for name in starts.values()):
        raise UserError(f"LeRobot data set '{root}': meta/episodes has no episodes, or one that starts before 0 s")
    if len(twice := episode[1:][np.diff(episode) == 0]):
        raise UserError(f"LeRobot data set '{root}': meta/episodes lists episode {twice[0]} twice: download it again")
    files = []
    for name in cameras:
        places = zip(*(table[column].tolist() for column in of_camera[name]), strict=True)
        paths = [
            info.path_of("video_path", video_key=name, chunk_index=chunk, file_index=file) for chunk, file in places
        ]
        files.append(_Camera(name, paths, table[starts[name]]))
    return episode, first, stop, files


def _episodes_of_rows(info: Info, cameras: Sequence[str], of_row: NDArray[Any]) -> Bounds:
    """Find the episodes of version 2. of_row: the episode of each row of data/. Raises UserError."""
    root, total, per_chunk = info.root, *info.counts
    first = np.flatnonzero(np.diff(of_row, prepend=-1))
    episode, stop = of_row[first], np.append(first[1:], len(of_row))
    if not np.array_equal(episode, np.arange(total)):
        raise UserError(
            f"LeRobot data set '{root}': data/ does not hold the episodes 0 to {total - 1} one after the other, as "
            "meta/info.json says: download it whole"
        )
    files = []
    for name in cameras:
        places = ({"episode_chunk": number // per_chunk, "episode_index": number} for number in range(total))
        paths = [info.path_of("video_path", video_key=name, **place) for place in places]
        files.append(_Camera(name, paths, np.zeros(total)))
    return episode.astype(np.int64), first, stop, files


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
    from pyarrow import compute, types

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
    per_row = max(1, math.prod(shape[1:]))
    if values.null_count:
        raise ValueError(f"row {values.is_null().to_pylist().index(True) // per_row} holds a null")
    if types.is_boolean(values.type):
        values = values.cast("int8")
    if not types.is_integer(values.type) and not types.is_floating(values.type):
        raise ValueError(f"{values.type} where numbers belong")
    array = np.from_dlpack(values)  # `to_numpy` would import pandas
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
