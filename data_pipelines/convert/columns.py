"""Tables of frames: arrays of N rows, one row per frame, and the bounds of the episodes within them.

The usual names, of which the first that is there counts; a user may name others:

    frames    pixels, frames, images, image, observations/images, ..., otherwise the only array of pictures
    labels    action, state and reward, from action or actions, state, states or observations, reward or rewards
    bounds    ep_len (with ep_offset)                     lengths
              episode_ends                                the row behind each episode
              episode_idx, ep_idx, episode_index, ...     the number of the episode of each row
              terminals or terminated, with timeouts or truncated; dones, done, is_last      true at the last row

A bounds column that a user names is read by its content: true and false (or 0 and 1) for each row mark last rows, other
whole numbers for each row number the episodes, a shorter column whose sum is N holds lengths, and a shorter one that
ascends to N holds ends. Two columns are lengths and offsets, in either order if the sum of the lengths is N, or two
kinds of marks. Numbers 0 and 1 that never decrease, with several 1, number two episodes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipelines.convert.episodes import Clip, Frame, Keys, checked_name, source_files
from data_pipelines.convert.pictures import decode_picture
from data_pipelines.errors import UserError, one_line_logger
from data_pipelines.facts import MAX_FRAMES
from data_pipelines.text_files import shown

log = one_line_logger(__name__)

FRAME_NAMES = ("pixels", "frames", "images", "image", "rgb", "observation.image", "observation/image", "obs/image",
               "observations/images", "observations", "obs", "video")  # fmt: skip
LABEL_NAMES = {
    "action": ("action", "actions"),
    "state": ("state", "states", "observations", "observation"),
    "reward": ("reward", "rewards"),
}
BOUNDS_NAMES = (
    ("ep_len", "ep_offset"), ("ep_len",), ("episode_ends",), ("episode_idx",), ("ep_idx",), ("episode_index",),
    ("episode_id",), ("terminals", "timeouts"), ("terminated", "truncated"), ("terminals",), ("terminated",),
    ("dones",), ("done",), ("is_last",),
)  # fmt: skip
LENGTHS_NAME = "ep_len"
NUMBER_NAMES = frozenset({"episode_idx", "ep_idx", "episode_index", "episode_id"})
MARK_NAMES = frozenset({"terminals", "timeouts", "terminated", "truncated", "dones", "done", "is_last"})
MIN_SIDE_PX = 8  # of pictures that are found without being named
READ_BYTES = 2**24
MAX_ROWS = 2**28
CHANNELS = (1, 3, 4)
OTHER = np.dtype("V1")  # the type of columns that hold neither numbers nor pictures

Bounds = list[tuple[int, int]]  # rows [start, stop) of each episode


class Column(NamedTuple):
    """An array: its shape, and its type. The type is object for encoded pictures, bytes in each row."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Columns(Protocol):
    """An open file of arrays."""

    def columns(self) -> Mapping[str, Column]:
        """Return the arrays with at least one dimension by name."""

    def read(self, name: str, start: int, stop: int) -> Any:
        """Return rows [start, stop): an array, or a list of bytes for encoded pictures. Raises UserError."""


OpenColumns = Callable[[Path], AbstractContextManager[Columns]]


@dataclass(frozen=True)
class Table:
    """A layout of files of arrays with N rows.

    open: opens one file.
    """

    name: str
    suffixes: tuple[str, ...]
    open: OpenColumns
    keys: frozenset[str] = frozenset(Keys.__dataclass_fields__)

    def detect(self, source: Path) -> bool:
        return bool(source_files(source, self.suffixes))

    def episodes(self, source: Path, keys: Keys, siblings: Sequence[Path]) -> "list[RowsEpisode]":
        found: list[RowsEpisode] = []
        for name, path in source_files(source, self.suffixes):
            with self.open(path) as table:
                found += table_episodes(table, self.open, name, path, keys, is_only=path == source)
        return found


@dataclass(frozen=True)
class RowsEpisode:
    """The rows [start, stop) of a file of arrays. columns: the column of each label."""

    place: str
    name: str
    path: Path
    files: tuple[Path, ...]
    open_columns: OpenColumns
    frames: str
    columns: Mapping[str, str]
    start: int
    stop: int
    split: None = None

    @contextmanager
    def open(self) -> Iterator[Clip]:
        with self.open_columns(self.path) as table:
            yield clip_of_rows(table, self.frames, self.columns, self.start, self.stop)


def table_episodes(
    table: Columns, opener: OpenColumns, name: str, path: Path, keys: Keys, *, is_only: bool,
    stamped: Path | None = None,
) -> list[RowsEpisode]:  # fmt: skip
    """List the episodes of an open file. Raises UserError: no frames, no such column, or impossible bounds.

    name: the file in messages and, without its extension, in the names of the videos unless it is the only file.
    stamped: the file whose time stamp shows a change; None: `path`.
    """
    try:
        columns = table.columns()
        frames = choose_frames(columns, keys.frames)
        labels = choose_labels(columns, keys, frames, path)
        bounds = find_bounds(table, columns, columns[frames].shape[0], keys.bounds)
    except UserError as error:
        raise UserError(f"'{path}': {error}") from None
    num_rows, stem = columns[frames].shape[0], name.rpartition(".")[0] or name
    if bounds is not None and (outside := num_rows - sum(stop - start for start, stop in bounds)) > 0:
        log.warning("'%s': %d of %d rows are in no episode, and left out", path, outside, num_rows)
    if bounds is None:
        log.info("'%s' has no bounds of episodes: it is one episode", path)
        named = [(stem, (0, num_rows))]
    else:
        digits = max(6, len(str(len(bounds))))
        prefix = "" if is_only else f"{stem}/"
        named = [(f"{prefix}{number:0{digits}d}", rows) for number, rows in enumerate(bounds)]
    return [
        RowsEpisode(
            f"{name}:{start}-{stop}", checked_name(video, name), path, (stamped or path,), opener, frames, labels,
            start, stop,
        )
        for video, (start, stop) in named
    ]  # fmt: skip


def clip_of_rows(table: Columns, frames: str, labels: Mapping[str, str], start: int, stop: int) -> Clip:
    """Return the clip of rows [start, stop) of an open file. labels: the column of each label. Raises UserError."""
    return Clip(
        num_frames=stop - start,
        frames=lambda: read_rows(table, frames, start, stop),
        frame_labels={label: np.asarray(table.read(name, start, stop)) for label, name in labels.items()},
    )


def read_rows(table: Columns, name: str, start: int, stop: int) -> Iterator[Frame]:
    """Yield the frames in rows [start, stop), some at a time. Raises UserError."""
    column = table.columns()[name]
    row_bytes = 2**18 if column.dtype == object else math.prod(column.shape[1:]) * column.dtype.itemsize
    step = max(1, READ_BYTES // max(1, row_bytes))
    for first in range(start, stop, step):
        for row in table.read(name, first, min(stop, first + step)):
            yield decode_picture(row) if column.dtype == object else _as_frame(row)


def _as_frame(row: Frame) -> Frame:
    """Return [H, W] or [H, W, 3], without alpha, from one of these, [H, W, 1 or 4] or [1, 3 or 4, H, W]."""
    if row.ndim == 3:
        if row.shape[0] in CHANNELS and row.shape[2] not in CHANNELS:
            row = row.transpose(1, 2, 0)
        row = row[:, :, 0] if row.shape[2] == 1 else row[:, :, :3]
    return row


def choose_frames(columns: Mapping[str, Column], key: str | None) -> str:
    """Return the name of the column of pictures. Raises UserError: there is none, or several without a usual name."""
    if key is not None:
        if key not in columns:
            raise UserError(f"it has no array {shown(key)}: {_listed(columns)}")
        if not _are_pictures(columns[key], least_px=1):
            raise UserError(_not_pictures(key, columns[key]))
        return key
    found = [name for name, column in columns.items() if _are_pictures(column, least_px=MIN_SIDE_PX)]
    if named := [name for name in FRAME_NAMES if name in found]:
        return named[0]
    if len(found) != 1:
        for name in () if found else FRAME_NAMES:
            if name in columns and len(columns[name].shape) >= 3 and not _are_pictures(columns[name], least_px=1):
                raise UserError(_not_pictures(name, columns[name]))
        what = f"several arrays of pictures ({', '.join(map(shown, found[:20]))})" if found else "no array of pictures"
        raise UserError(f"it has {what}: name the array of the frames. {_listed(columns)}")
    return found[0]


def _not_pictures(name: str, column: Column) -> str:
    """Return a message that a column with the name of frames does not hold pictures."""
    return (
        f"{shown(name)} is {_described(column)}: frames are uint8 [N, H, W], [N, H, W, 1, 3 or 4] or "
        "[N, 1, 3 or 4, H, W], or encoded pictures"
    )


def _are_pictures(column: Column, least_px: int) -> bool:
    if column.dtype == object:
        return len(column.shape) == 1
    if column.dtype != np.uint8 or len(column.shape) not in (3, 4):
        return False
    sides = column.shape[1:]
    if len(sides) == 3:
        if sides[2] in CHANNELS:
            sides = sides[:2]
        elif sides[0] in CHANNELS:
            sides = sides[1:]
        else:
            return False
    return min(sides) >= least_px


def choose_labels(columns: Mapping[str, Column], keys: Keys, frames: str, path: Path) -> dict[str, str]:
    """Return the column of each label: action, state and reward, and those that keys.labels names.

    Pictures are a label only if they are named. A warning names the columns with usual names that are left out; `path`
    is the file in it.

    Raises UserError: a named column is missing, or does not hold one number or array of numbers per frame.
    """
    given = {"action": keys.actions, "state": keys.states, "reward": keys.rewards}
    num_rows = columns[frames].shape[0]
    labels: dict[str, str] = {}
    for label, key in [*given.items(), *((name.rpartition("/")[2], name) for name in keys.labels)]:
        names = (key,) if key is not None else LABEL_NAMES[label]
        present = [name for name in names if name in columns and name != frames]
        usable = [name for name in present if _is_label(columns[name], num_rows)]
        if key is None:
            usable = [name for name in usable if not _are_pictures(columns[name], least_px=MIN_SIDE_PX)]
        if usable and labels.get(label, usable[0]) != usable[0]:
            both = f"{shown(labels[label])} and {shown(usable[0])}"
            raise UserError(f"{both} would both be the label {shown(label)}: keep one of them")
        if usable:
            labels[label] = usable[0]
        elif key is not None:
            fault = _described(columns[key]) if key in columns else "not there"
            raise UserError(f"{shown(key)} is {fault}: a label has numbers for each of the {num_rows} rows of frames")
        elif present:
            log.warning(
                "'%s': the label %s is left out, as %s is %s: labels are numbers for each of the %d rows of frames, "
                "and pictures only if they are named",
                path, shown(label), shown(present[0]), _described(columns[present[0]]), num_rows,
            )  # fmt: skip
    return labels


def _is_label(column: Column, num_rows: int) -> bool:
    return column.dtype.kind in "biuf" and column.shape[0] in (num_rows, num_rows - 1)


def find_bounds(table: Columns, columns: Mapping[str, Column], num_rows: int, keys: Sequence[str]) -> Bounds | None:
    """Return the rows of each episode; None if nothing states them. Raises UserError: they are impossible."""
    if num_rows > MAX_ROWS:
        raise UserError(f"{num_rows:,} rows: at most {MAX_ROWS:,} are accepted")
    names = tuple(keys) or next((names for names in BOUNDS_NAMES if set(names) <= columns.keys()), ())
    if not names:
        return None
    if missing := [name for name in names if name not in columns]:
        raise UserError(f"it has no array {shown(missing[0])} of bounds: {_listed(columns)}")
    arrays = [_bounds_column(table, columns[name], name) for name in names]
    usual = names[0].rpartition("/")[2]
    are_marks = usual in MARK_NAMES or columns[names[0]].dtype == bool
    bounds = _bounds_of(
        arrays, num_rows, are_numbers=usual in NUMBER_NAMES, are_marks=are_marks, are_lengths=usual == LENGTHS_NAME
    )
    stated = " and ".join(map(shown, names))
    if bounds is None:
        raise UserError(f"{stated} does not state the bounds of episodes in {num_rows} rows")
    if any(not 0 <= start <= stop <= num_rows or stop - start > MAX_FRAMES for start, stop in bounds):
        raise UserError(f"{stated} states an episode that leads beyond the {num_rows} rows, or is too long")
    return bounds


def _bounds_column(table: Columns, column: Column, name: str) -> NDArray[np.int64]:
    if len(column.shape) == 2 and column.shape[1] == 1:
        pass
    elif len(column.shape) != 1:
        raise UserError(f"{shown(name)} is {_described(column)}: bounds are one number per row or episode")
    if column.dtype.kind not in "biuf" or column.shape[0] > MAX_ROWS:
        raise UserError(f"{shown(name)} is {_described(column)}: bounds are whole numbers, or true and false")
    values = np.asarray(table.read(name, 0, column.shape[0])).reshape(-1)
    with np.errstate(invalid="ignore"):
        whole = values.astype(np.int64)
    if not (whole == values).all():
        raise UserError(f"{shown(name)} holds other numbers than whole ones")
    return whole


def _bounds_of(
    arrays: list[NDArray[np.int64]], num_rows: int, *, are_numbers: bool, are_marks: bool, are_lengths: bool
) -> Bounds | None:
    """Recognise the kind of bounds of the arrays by their content (module docstring); None if it is none of them.

    are_numbers, are_marks, are_lengths: what the usual name of a column says. Lengths of as many episodes as rows look
    like numbers, so their content alone does not decide.
    """
    first, *others = arrays
    is_per_row = all(len(array) == num_rows for array in arrays) and not are_lengths
    seem_numbers = first.max(initial=0) > 1 or (first.sum() > 1 and bool((np.diff(first) >= 0).all()))
    if is_per_row and not others and (are_numbers or (seem_numbers and not are_marks)):
        stops = np.flatnonzero(np.diff(first)) + 1
    elif is_per_row:
        stops = np.flatnonzero(np.any(arrays, axis=0)) + 1
    elif len(arrays) == 2 and len(first) == len(others[0]):
        offsets_first = first.sum() != num_rows and others[0].sum() == num_rows
        offsets, lengths = arrays if offsets_first else reversed(arrays)
        return [(start, start + length) for start, length in zip(offsets.tolist(), lengths.tolist(), strict=True)]
    elif others:
        return None
    elif first.sum() == num_rows and (first >= 0).all():
        return _between(np.cumsum(first))
    elif len(first) and (np.diff(first) >= 0).all() and first[0] >= 0 and first[-1] == num_rows:
        return _between(first)
    else:
        return None
    return _between(np.union1d(stops, [num_rows]))


def _between(ends: NDArray[np.int64]) -> Bounds:
    """Return the rows of episodes that follow each other, from their ends. Equal ends: an episode without rows."""
    return list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))


def _described(column: Column) -> str:
    kind = {"O": "bytes", "V": "no numbers"}.get(column.dtype.kind, str(column.dtype))
    return f"{kind} [{', '.join(map(str, column.shape))}]"


def _listed(columns: Mapping[str, Column]) -> str:
    listed = ", ".join(f"{name[:60]} {_described(column)}" for name, column in list(columns.items())[:20])
    return f"it has {listed or 'no arrays'}"
