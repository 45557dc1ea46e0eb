"""What is written beside videos: labels, in the layout of Hugging Face's `videofolder`."""

import csv
import json
import math
import posixpath
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch

from data_pipelines.errors import UserError, one_line_logger
from data_pipelines.probe import Video, one_line

log = one_line_logger(__name__)

Row = tuple[str, dict[str, Any]]  # file_name and the other fields


class Labels(NamedTuple):
    """of_videos: int64 or float32 [N] or [N, K]; of_frames: [F, K] for the F frames of all videos, one after the other.

    Frame f of video n has the row offsets[n] + f of of_frames; offsets is None where there are none.
    faults: names of labels that are left out, and why: what asks for one of them is told.
    """

    of_videos: dict[str, torch.Tensor]
    of_frames: dict[str, torch.Tensor]
    offsets: torch.Tensor | None
    faults: dict[str, str]


def read_labels(root: Path, videos: Sequence[Video], class_names: Sequence[str], *, is_split: bool = False) -> Labels:
    """Labels of videos and of their frames.

    From metadata.jsonl, metadata.csv or metadata.parquet in root or in folders of videos: the numeric and
    list-of-number fields that every video has; `file_name` is relative to the metadata's folder. A list that holds one
    list of numbers for each frame of its video labels the frames. Without any, where all videos are in subfolders of
    root and those are several, "label" is the number of a video's subfolder among class_names.

    is_split: root is one of several splits in a folder, whose metadata holds for all of them. A line that is closer to
        a video counts.

    Raises UserError: broken metadata, two kinds of it in a folder, .parquet without pyarrow.
    """
    folders = {folder for video in videos for folder in PurePosixPath(video.path).parents}
    metadata = [path for folder in sorted(folders) if (path := _metadata_in(root / folder)) is not None]
    rows: dict[str, dict[str, Any]] = {}
    if is_split and (above := _metadata_in(root.parent)) is not None:
        prefix = f"{root.name}/"
        for name, row in _read_metadata(above):
            if (file_name := posixpath.normpath(name)).startswith(prefix):
                rows[file_name.removeprefix(prefix)] = row
        if metadata:
            log.info("'%s' is closer to its videos than '%s', and counts where both have a line", metadata[0], above)
        metadata = [above, *metadata] if rows else metadata
    if not metadata:
        return Labels(_labels_of_classes(videos, class_names), {}, None, {})
    for path in metadata:
        if path.parent == root.parent and is_split:
            continue
        prefix = path.parent.relative_to(root).as_posix()
        rows |= {posixpath.normpath(posixpath.join(prefix, name)): row for name, row in _read_metadata(path)}
    missing = [video.path for video in videos if video.path not in rows]
    if missing:
        log.warning(
            "'%s' has no line for %d of %d videos, '%s' for one: labels are left out",
            metadata[0], len(missing), len(videos), missing[0],
        )  # fmt: skip
        fault = f"'{metadata[0]}' has no line for '{missing[0]}'"
        return Labels({}, {}, None, {name: fault for row in rows.values() for name in row})
    return stack_labels([rows[video.path] for video in videos], videos)


def stack_labels(rows: Sequence[Mapping[str, Any]], videos: Sequence[Video]) -> Labels:
    """One row of labels per video -> the fields of numbers that every row has. The others are faults."""
    of_videos: dict[str, torch.Tensor] = {}
    of_frames: dict[str, torch.Tensor] = {}
    faults: dict[str, str] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values: list[Any] = [row.get(name) for row in rows]
        is_of_frames = all(
            _has_a_list_for_each(value, video.num_frames) for value, video in zip(values, videos, strict=True)
        )
        flat = [frame for value in values for frame in value] if is_of_frames else values
        tensor = _numbers_to_tensor(flat)
        if tensor is not None and bool(tensor.isfinite().all()):
            (of_frames if is_of_frames else of_videos)[name] = tensor
        else:
            faults[name] = _fault_of(name, values, videos)
    for name, fault in faults.items():
        if not all(isinstance(row.get(name), str) for row in rows):
            log.warning("the label %r is left out: %s", name, fault)
    lengths = torch.tensor([0, *(video.num_frames for video in videos[:-1])])
    return Labels(of_videos, of_frames, lengths.cumsum(0) if of_frames else None, faults)


def _has_a_list_for_each(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(isinstance(part, list) for part in value)


def _fault_of(name: str, values: Sequence[Any], videos: Sequence[Video]) -> str:
    """Describe the first video, and frame, in which a label is not a number, or not of the size that others have."""
    of_frames = any(isinstance(value, list) and value and isinstance(value[0], list) for value in values)
    first = next((value for value in values if value is not None), None)
    width: int | None = None
    for value, video in zip(values, videos, strict=True):
        place = f"'{video.path}'"
        if value is None:
            return f"{place} has no {name!r}"
        if of_frames and isinstance(value, list) and len(value) != video.num_frames:
            return f"{place} has {video.num_frames} frames and {len(value)} values of {name!r}"
        parts = enumerate(value) if of_frames and isinstance(value, list) else [(-1, value)]
        for frame, part in parts:
            at = f"frame {frame} of {place}" if frame >= 0 else place
            numbers = part if isinstance(part, list) else [part]
            for number in numbers:
                if not _is_finite(number):
                    return f"{name!r} of {at} is {reprlib.repr(number)}, not a number"
            width = len(numbers) if width is None else width
            if len(numbers) != width or isinstance(part, list) != isinstance(first, list):
                return f"{name!r} of {at} has {len(numbers)} numbers, and others have {width}"
    return f"{name!r} has values of several kinds"


def _is_finite(number: Any) -> bool:
    try:
        return isinstance(number, int | float) and math.isfinite(
            torch.tensor(float(number), dtype=torch.float32).item()
        )
    except OverflowError:  # an integer that no float can hold
        return False


def _labels_of_classes(videos: Sequence[Video], class_names: Sequence[str]) -> dict[str, torch.Tensor]:
    number_of = {name: number for number, name in enumerate(class_names)}
    parents = [posixpath.dirname(video.path) for video in videos]
    if len(class_names) < 2 or not all(parent in number_of for parent in parents):
        return {}
    return {"label": torch.tensor([number_of[parent] for parent in parents])}


def _metadata_in(folder: Path) -> Path | None:
    found = [path for path in (folder / f"metadata{suffix}" for suffix in _READERS) if path.is_file()]
    if len(found) > 1:
        raise UserError(f"'{folder}' holds {' and '.join(path.name for path in found)}: keep one")
    return found[0] if found else None


def _read_metadata(path: Path) -> Iterator[Row]:
    try:
        yield from _READERS[path.suffix](path)
    except UnicodeDecodeError:
        raise UserError(f"'{path}' is not text in UTF-8: save it in that encoding") from None
    except OSError as error:
        raise UserError(f"'{path}' is unreadable: {one_line(error)}") from None


def _read_jsonl(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                file_name = row.pop("file_name")
                if not isinstance(file_name, str):
                    raise TypeError
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                # The line itself stays unsaid: a link may have led to another file.
                raise UserError(f"'{path}' line {number} is not a JSON object with a file_name") from None
            yield file_name, row


def _read_csv(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        _check_columns(path, reader.fieldnames or [])
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(f"'{path}' line {reader.line_num} has more or fewer cells than the header")
                yield row.pop("file_name"), {name: _number_or_text(cell) for name, cell in row.items()}
        except csv.Error as error:
            raise UserError(f"'{path}' line {reader.line_num} is no CSV: {error}") from None


def _number_or_text(cell: str) -> int | float | str:
    for number in (int, float):
        with suppress(ValueError):
            return number(cell)
    return cell


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"'{path}' needs pyarrow, which is not installed: pip install 'worldmodel[lerobot]'") from None
    try:
        table = parquet.read_table(path)
    except ArrowException as error:
        raise UserError(f"'{path}' is no Parquet file: {one_line(error)}") from None
    _check_columns(path, table.column_names)
    for row in table.to_pylist():
        yield str(row.pop("file_name")), row


_READERS = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}


def _check_columns(path: Path, names: Sequence[str]) -> None:
    if "file_name" not in names:
        raise UserError(f"'{path}' has no column file_name: its columns are {', '.join(names) or 'none'}")


def _numbers_to_tensor(values: Sequence[Any]) -> torch.Tensor | None:
    """Numbers or equally long lists of numbers -> int64 or float32 [N] or [N, K]; anything else -> None."""
    if isinstance(values[0], list):
        flat = [x for row in values if isinstance(row, list) and len(row) == len(values[0]) for x in row]
        shape: tuple[int, ...] = (len(values), len(values[0]))
    else:
        flat, shape = list(values), (len(values),)
    if len(flat) != math.prod(shape) or not all(isinstance(x, int | float) for x in flat):
        return None
    is_integer = all(isinstance(x, int) and abs(x) < 2**63 for x in flat)
    try:
        return torch.tensor(flat, dtype=torch.int64 if is_integer else torch.float32).reshape(shape)
    except (OverflowError, RuntimeError):  # an integer that no float can hold
        return None
