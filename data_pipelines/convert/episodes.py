"""Episodes, which a layout yields: each opens as a clip of frames and labels. Also the row of labels of a clip.

Legend: T frames of a clip, K numbers of a label of one frame.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import UserError
from data_pipelines.facts import MAX_FRAME_PX, MAX_FRAMES
from data_pipelines.splits import Split
from data_pipelines.text_files import shown

Frame = NDArray[np.uint8]  # gray [H, W] or RGB [H, W, 3]

MAX_LABEL_NUMBERS = 4_000_000  # of a clip: a line of metadata.jsonl stays below MAX_LINE_BYTES
MAX_NAME_BYTES = 200
PROVENANCE = ("source", "source_stamp", "source_digest", "video_bytes", "psnr_db")
"""Fields of metadata.jsonl that describe the conversion. They are text, so they are not labels."""


@dataclass(frozen=True)
class Keys:
    """The names that a user gives to the parts of a data set; None or empty: the layout looks for the usual names.

    bounds: one column or two from which the bounds of the episodes follow (columns.py).
    labels: further columns to keep as labels of the frames.
    """

    frames: str | None = None
    actions: str | None = None
    states: str | None = None
    rewards: str | None = None
    bounds: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Clip:
    """An open episode.

    frames: returns the T frames in order; it can be called again.
    frame_labels: [T, ...] per name; also [T - 1, ...], to which a row of zeros is appended, as for actions.
    labels: numbers of the whole clip.
    fps: frames per second; None: unknown.
    frame_ms: milliseconds from each frame to the next, if they vary: [T - 1].
    video: a file that holds exactly these frames, which can be copied; None: there is none.
    """

    num_frames: int
    frames: Callable[[], Iterator[Frame]]
    frame_labels: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    labels: Mapping[str, Any] = field(default_factory=dict)
    fps: Fraction | None = None
    frame_ms: Sequence[int] = ()
    video: Path | None = None


class Episode(Protocol):
    """One episode of a data set. It is pickled, and opened in another process.

    place: where it is in the source, for messages: "demos.hdf5:data/demo_3".
    name: the path of its video below the output or the split, without extension.
    split: the split that the source states; None: it states none.
    files: the files it is read from; their sizes and time stamps show a change.
    """

    @property
    def place(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def split(self) -> Split | None: ...

    @property
    def files(self) -> tuple[Path, ...]: ...

    def open(self) -> AbstractContextManager[Clip]:
        """Open the episode. Raises UserError: it cannot be read, also while the frames are."""


class Layout(Protocol):
    """A layout of data sets.

    name: a noun phrase with its article, such as "a robomimic data set".
    keys: the fields of Keys that the layout reads.
    """

    @property
    def name(self) -> str: ...

    @property
    def keys(self) -> frozenset[str]: ...

    def detect(self, source: Path) -> bool:
        """Return whether a file or folder is of this layout. Cheap: decodes nothing."""

    def episodes(self, source: Path, keys: Keys, siblings: Sequence[Path]) -> Sequence[Episode]:
        """List the episodes without reading frames, in an order that does not change. Raises UserError.

        siblings: the folders of all splits, if `source` is one of them.
        """


ALL_KEYS = frozenset(Keys.__dataclass_fields__)


def source_files(source: Path, suffixes: Sequence[str]) -> list[tuple[str, Path]]:
    """Return the files of a source with these extensions, sorted, each with its relative path as a name.

    The name of a source that is a file itself is the file's. Hidden files are skipped.
    """
    if source.is_file():
        return [(source.name, source)] if source.suffix.lower() in suffixes else []
    found = [path for path in source.rglob("*") if path.suffix.lower() in suffixes and path.is_file()]
    named = ((path.relative_to(source), path) for path in found)
    return sorted((name.as_posix(), path) for name, path in named if not any(part[0] == "." for part in name.parts))


def checked_name(name: str, place: str) -> str:
    """Return the name of a video, which may come from strangers.

    Raises UserError: it would lead out of the folder, be hidden, or is not a usable name of a file.
    """
    parts = name.split("/")
    is_safe = all(
        part and part[0] != "." and part.isprintable() and not re.search(r"[\\:]", part) and _fits(part)
        for part in parts
    )
    if not is_safe:
        raise UserError(f"the name {shown(name)} of '{place[:300]}' is refused: it cannot be the path of a video")
    return name


def _fits(part: str) -> bool:
    try:
        return len(part.encode()) <= MAX_NAME_BYTES
    except UnicodeEncodeError:
        return False


def checked_frames(clip: Clip) -> Iterator[Frame]:
    """Yield the frames of a clip, all of one size. Gray frames among frames in colour become colour.

    Raises UserError: another size, colour among gray frames, too large, none, or another number than the clip states.
    """
    count, shape = 0, None
    for number, frame in enumerate(clip.frames()):
        if shape is None:
            shape = frame.shape
            if not 0 < shape[0] * shape[1] <= MAX_FRAME_PX:
                raise UserError(f"frames of {shape[1]}x{shape[0]} pixels: at most {MAX_FRAME_PX:,} are accepted")
        if frame.ndim == 2 and len(shape) == 3:
            frame = np.repeat(frame[:, :, None], 3, axis=2)
        if frame.shape != shape:
            raise UserError(f"frame {number} is {_described(frame.shape)}, and frame 0 is {_described(shape)}")
        if number == MAX_FRAMES:
            raise UserError(f"more than {MAX_FRAMES:,} frames")
        yield np.ascontiguousarray(frame)
        count = number + 1
    if not count and not clip.num_frames:
        raise UserError("it has no frames")
    if count != clip.num_frames:
        raise UserError(f"{count} frames, and {clip.num_frames} are expected")


def _described(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]} {'gray' if len(shape) == 2 else 'colour'}"


def label_fields(clip: Clip) -> dict[str, Any]:
    """Return the labels of a clip as fields of metadata.jsonl: numbers, and one list of numbers per frame.

    Floating-point numbers are stored as float32, the type as which they are read. If the last frame has no number
    (NaN) in a whole row, as the action after the last step, its row becomes zeros.

    Raises UserError: a label has another length than the clip, or numbers that JSON cannot represent, or too many.
    """
    fields: dict[str, Any] = {}
    for name, value in clip.labels.items():
        fields[_checked_label(name)] = value
    num_numbers = 0
    for name, array in clip.frame_labels.items():
        if len(array) == clip.num_frames - 1:
            array = np.concatenate([array, np.zeros_like(array, shape=(1, *array.shape[1:]))])
        if len(array) != clip.num_frames:
            raise UserError(f"{clip.num_frames} frames and {len(array)} rows of {shown(name)}")
        rows = array.reshape(clip.num_frames, math.prod(array.shape[1:]))
        num_numbers += rows.size
        if num_numbers > MAX_LABEL_NUMBERS:
            raise UserError(f"more than {MAX_LABEL_NUMBERS:,} numbers of labels with {shown(name)}: keep fewer labels")
        fields[_checked_label(name)] = _lists_of_numbers(name, rows)
    return fields


def _checked_label(name: str) -> str:
    if name in ("file_name", *PROVENANCE):
        raise UserError(f"a label cannot be called {name!r}: rename it in the source, or do not keep it")
    return name


def _lists_of_numbers(name: str, rows: NDArray[Any]) -> list[list[int | float]]:
    if rows.dtype.kind not in "biuf":
        raise UserError(f"{shown(name)} holds {rows.dtype}, not numbers")
    if rows.dtype.kind != "f":
        if rows.dtype == np.uint64 and rows.size and rows.max() > np.iinfo(np.int64).max:
            raise UserError(f"{shown(name)} holds {rows.max()}, which needs more than 63 bits")
        return rows.astype(np.int64).tolist()
    with np.errstate(over="ignore"):  # the next test finds it
        single = rows.astype(np.float32)
    if len(single) and np.isnan(single[-1]).all():
        single[-1] = 0
    if not np.isfinite(single).all():
        frame = int(np.flatnonzero(~np.isfinite(single).all(axis=1))[0])
        raise UserError(f"{shown(name)} of frame {frame} is not a finite number")
    # The shortest decimals that are the same float32.
    return [[float(str(number)) for number in row] for row in single]
