"""Labels of videos and of their frames, from metadata in the layout of Hugging Face's `videofolder`."""

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

from data_pipelines.errors import UserError, one_line, one_line_logger
from data_pipelines.facts import Video
from data_pipelines.text_files import shown

log = one_line_logger(__name__)

METADATA_NAME = "metadata.jsonl"
"""The metadata that this project writes. metadata.csv and metadata.parquet are read, too."""

Row = tuple[str, dict[str, Any]]  # file_name and the other fields


class Labels(NamedTuple):
    """Labels of N videos and of their F frames.

    of_videos: per name, int64 or float32 [N] or [N, K].
    of_frames: per name, [F, K] for the frames of all videos, video after video.
    offsets: int64 [N]; frame f of video n has the row offsets[n] + f of of_frames. None: there are none.
    faults: names of labels that are left out, and the reasons.
    """

    of_videos: dict[str, torch.Tensor]
    of_frames: dict[str, torch.Tensor]
    offsets: torch.Tensor | None
    faults: dict[str, str]


def read_labels(root: Path, videos: Sequence[Video], class_names: Sequence[str], *, is_split: bool = False) -> Labels:
    """Read the labels of videos and of their frames.

    They come from metadata.jsonl, metadata.csv or metadata.parquet in root or in folders of videos, in which
    `file_name` is relative to the metadata's folder. A label is a field that every video has as a number or as a list
    of numbers. A field with one list of numbers per frame of its video labels the frames. Without metadata, "label" is
    the number of a video's subfolder among class_names, if all videos are in subfolders and these are several.

    is_split: root is one of several splits in a folder, whose metadata holds for all of them. A line that is closer to
        a video takes precedence.

    Raises UserError: broken metadata, several kinds of it in a folder, two different lines for a video, .parquet
    without pyarrow.
    """
    parents = {posixpath.dirname(video.path) for video in videos}  # few, where there are many videos
    folders = {folder for parent in parents for folder in (PurePosixPath(parent), *PurePosixPath(parent).parents)}
    metadata = [path for folder in sorted(folders) if (path := metadata_in(root / folder)) is not None]
    rows: dict[str, dict[str, Any]] = {}
    if is_split and (above := metadata_in(root.parent)) is not None:
        prefix = f"{root.name}/"
        for name, row in read_metadata(above).items():
            if name.startswith(prefix):
                rows[name.removeprefix(prefix)] = row
        if metadata:
            log.info("'%s' is closer to its videos than '%s' and takes precedence", metadata[0], above)
        metadata = [above, *metadata] if rows else metadata
    if not metadata:
        return Labels(labels_of_classes(videos, class_names), {}, None, {})
    for path in metadata:
        if path.parent == root.parent and is_split:
            continue
        prefix = path.parent.relative_to(root).as_posix()
        found = read_metadata(path)
        rows |= {posixpath.normpath(posixpath.join(prefix, name)): row for name, row in found.items()}
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
    """Stack one row of fields per video into labels: the fields that every row has as numbers. Others are faults."""
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
            log.warning("the label %s is left out: %s", shown(name), fault)
    lengths = torch.tensor([0, *(video.num_frames for video in videos[:-1])])
    return Labels(of_videos, of_frames, lengths.cumsum(0) if of_frames else None, faults)


def _has_a_list_for_each(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(isinstance(part, list) for part in value)


def _fault_of(name: str, values: Sequence[Any], videos: Sequence[Video]) -> str:
    """Describe the first video, and frame, with a label that is not a number or has another size than the others."""
    of_frames = any(isinstance(value, list) and value and isinstance(value[0], list) for value in values)
    first = next((value for value in values if value is not None), None)
    width: int | None = None
    for value, video in zip(values, videos, strict=True):
        place = f"'{video.path}'"
        if value is None:
            return f"{place} has no {shown(name)}"
        if of_frames and isinstance(value, list) and len(value) != video.num_frames:
            return f"{place} has {video.num_frames} frames and {len(value)} values of {shown(name)}"
        parts = enumerate(value) if of_frames and isinstance(value, list) else [(-1, value)]
        for frame, part in parts:
            at = f"frame {frame} of {place}" if frame >= 0 else place
            numbers = part if isinstance(part, list) else [part]
            for number in numbers:
                if not _is_finite(number):
                    return f"{shown(name)} of {at} is {reprlib.repr(number)}, not a number"
            width = len(numbers) if width is None else width
            if len(numbers) != width or isinstance(part, list) != isinstance(first, list):
                return f"{shown(name)} of {at} has {len(numbers)} numbers, and others have {width}"
    return f"{shown(name)} has values of several kinds"


def _is_finite(number: Any) -> bool:
    try:
        return isinstance(number, int | float) and math.isfinite(
            torch.tensor(float(number), dtype=torch.float32).item()
        )
    except OverflowError:  # an integer that no float can hold
        return False


def labels_of_classes(videos: Sequence[Video], class_names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return "label", the number of each video's folder among class_names, int64 [N].

    There is none unless all videos are in such folders, and these are several.
    """
    number_of = {name: number for number, name in enumerate(class_names)}
    parents = [posixpath.dirname(video.path) for video in videos]
    if len(class_names) < 2 or not all(parent in number_of for parent in parents):
        return {}
    return {"label": torch.tensor([number_of[parent] for parent in parents])}


def metadata_in(folder: Path) -> Path | None:
    """Return the metadata file in a folder; None if there is none. Raises UserError: there are several."""
    found = [path for path in (folder / f"metadata{suffix}" for suffix in _READERS) if path.is_file()]
    if len(found) > 1:
        raise UserError(f"'{folder}' holds {' and '.join(path.name for path in found)}: keep one")
    return found[0] if found else None


def read_metadata(path: Path) -> dict[str, dict[str, Any]]:
    """Return the fields of each line of a metadata file by its normalised file_name. Raises UserError: it is broken."""
    rows: dict[str, dict[str, Any]] = {}
    try:
        for name, row in _READERS[path.suffix](path):
            file_name = posixpath.normpath(name)
            if rows.setdefault(file_name, row) is not row and repr(rows[file_name]) != repr(row):  # NaN equals itself
                raise UserError(f"'{path}' has different lines for '{file_name}': keep one")
        return rows
    except UnicodeDecodeError:
        raise UserError(f"'{path}' is not UTF-8 text: save it as UTF-8") from None
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
                # The message does not quote the line: a link may have led to another file.
                raise UserError(f"'{path}' line {number} is not a JSON object with a file_name") from None
            yield file_name, row


def _read_csv(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            _check_columns(path, reader.fieldnames or [])
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(f"'{path}' line {reader.line_num} has more or fewer cells than the header")
                yield row.pop("file_name"), {name: _number_or_text(cell) for name, cell in row.items()}
        except csv.Error as error:
            raise UserError(f"'{path}' line {reader.line_num} is not valid CSV: {error}") from None


def _number_or_text(cell: str) -> int | float | str:
    if "_" not in cell:  # Python reads 1_2 as 12
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
        table = parquet.ParquetFile(path).read()  # read_table would add columns from the names of folders
        _check_columns(path, table.column_names)
        rows = table.to_pylist()
    except (ArrowException, ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise UserError(f"'{path}' is not a readable Parquet file: {one_line(error)}") from None
    for number, row in enumerate(rows, start=1):
        file_name = row.pop("file_name")
        if not isinstance(file_name, str):
            raise UserError(f"'{path}' row {number} has a file_name that is not text")
        yield file_name, row


_READERS = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}


def _check_columns(path: Path, names: Sequence[str]) -> None:
    if "file_name" not in names:
        raise UserError(f"'{path}' has no column file_name: its columns are {shown(names) if names else 'none'}")
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"'{path}' has the column {shown(twice[0])} twice: rename one")


def _numbers_to_tensor(values: Sequence[Any]) -> torch.Tensor | None:
    """Return numbers, or equally long lists of numbers, as int64 or float32 [N] or [N, K]; None for other values."""
    if isinstance(values[0], list):
        if not all(isinstance(row, list) and len(row) == len(values[0]) for row in values):
            return None
        flat = [x for row in values for x in row]
        shape: tuple[int, ...] = (len(values), len(values[0]))
    else:
        flat, shape = list(values), (len(values),)
    if not all(isinstance(x, int | float) for x in flat):
        return None
    is_integer = all(isinstance(x, int) and abs(x) < 2**63 for x in flat)
    try:
        return torch.tensor(flat, dtype=torch.int64 if is_integer else torch.float32).reshape(shape)
    except (OverflowError, RuntimeError):  # an integer that no float can hold
        return None
