"""HDF5 files of strangers, opened with care: links and raw data that lead to other files are refused.

A file may name other files in four ways, each of which would read whatever it names: external links, soft links through
one, raw data in external files, and virtual data sets. HDF5 itself is a large C library; see docs/security.md.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.convert.columns import OTHER, Column, Table
from data_pipelines.errors import UserError, one_line
from data_pipelines.files import check_regular
from data_pipelines.text_files import shown

SUFFIXES = (".h5", ".hdf5")
MAX_OBJECTS = 100_000
MAX_DEPTH = 8
MAX_SOFT_LINKS = 8
MAX_CHUNK_BYTES = 2**30  # HDF5 reads whole chunks
CACHE_BYTES = 2**26


class Group:
    """An open group. Its data sets are called by their paths below it, such as "obs/agentview_image"."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self._columns: dict[str, Column] | None = None

    def columns(self) -> Mapping[str, Column]:
        if self._columns is None:
            self._columns = {name: _column_of(data) for name, data in _walk(self._group, "", 0) if len(data.shape)}
        return self._columns

    def names(self) -> list[str]:
        """Return the names of the groups and data sets in this group."""
        return [_text(name) for name in self._group]

    def at(self, path: str) -> "Group":
        """Return the group at a path below this one. Raises UserError: there is none."""
        import h5py

        found = _resolve(self._group, path)
        if not isinstance(found, h5py.Group):
            raise UserError(f"it has no group {shown(path)}")
        return Group(found)

    def texts(self, path: str) -> list[str]:
        """Return a data set of texts. Raises UserError: there is none."""
        data = _resolve(self._group, path)
        is_list = bool(getattr(data, "shape", None))
        values = _checked(data, path)[:].ravel().tolist() if is_list else []
        if not is_list or not all(isinstance(value, bytes | str) for value in values):
            raise UserError(f"{shown(path)} does not hold texts")
        return [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values]

    def is_group(self, path: str) -> bool:
        """Return whether there is a group at a path. Raises UserError: it leads to another file."""
        import h5py

        return isinstance(_resolve(self._group, path), h5py.Group)

    def holds(self, path: str) -> bool:
        """Return whether there is anything at a path. Raises UserError: it leads to another file."""
        return _resolve(self._group, path) is not None

    def read(self, name: str, start: int, stop: int) -> Any:
        try:
            rows = _resolve(self._group, name)[start:stop]
        except (OSError, RuntimeError, ValueError, TypeError, MemoryError) as error:
            hint = ": pip install hdf5plugin" if "filter" in str(error) else ""
            raise UserError(f"{shown(name)} cannot be read: {one_line(error)}{hint}") from None
        return [bytes(memoryview(row)) for row in rows] if rows.dtype == object else rows


@contextmanager
def open_hdf5(path: Path) -> Iterator[Group]:
    """Open a file for reading. Raises UserError: it cannot be read, is no HDF5 file, or h5py is not installed."""
    try:
        import h5py
    except ImportError:
        raise UserError(f"'{path}' needs h5py, which is not installed: pip install 'worldmodel[convert]'") from None
    with suppress(ImportError):
        import hdf5plugin  # noqa: F401  # further compressions, if it is installed
    try:
        check_regular(path)
        file = h5py.File(path, "r", locking=False, rdcc_nbytes=CACHE_BYTES)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"'{path}' is not a readable HDF5 file: {one_line(error)}") from None
    try:
        yield Group(file)
    except (OSError, RuntimeError, KeyError, MemoryError) as error:
        raise UserError(f"'{path}' is damaged: {one_line(error)}") from None
    finally:
        file.close()


def _walk(group: Any, prefix: str, depth: int, seen: list[int] | None = None) -> Iterator[tuple[str, Any]]:
    """Yield the data sets below a group by their paths, without following soft links that lead nowhere.

    Raises UserError: a link or data that leads to another file, or too many objects.
    """
    import h5py

    seen = [0] if seen is None else seen
    for name in map(_text, group):
        seen[0] += 1
        if seen[0] > MAX_OBJECTS or depth > MAX_DEPTH:
            raise UserError(f"more than {MAX_OBJECTS:,} objects, or groups nested more than {MAX_DEPTH} deep")
        found = _resolve(group, name)
        if isinstance(found, h5py.Group):
            yield from _walk(found, f"{prefix}{name}/", depth + 1, seen)
        elif isinstance(found, h5py.Dataset) and found.shape is not None:
            yield f"{prefix}{name}", _checked(found, f"{prefix}{name}")


def _text(name: str | bytes) -> str:
    """Return the name of an object, which h5py gives as bytes if it is not UTF-8. Raises UserError for such a name."""
    if isinstance(name, bytes):
        raise UserError(f"the name {name!r} is not UTF-8: rename it")
    return name


def _resolve(group: Any, path: str) -> Any:
    """Return the object at a path below a group, or None. Each link is looked at before it is followed.

    Raises UserError: the path leads to another file, or through too many soft links.
    """
    import h5py

    parts, num_soft = deque(path.split("/")), 0
    while parts:
        part = parts.popleft()
        if part in ("", "."):
            continue
        if not isinstance(group, h5py.Group):
            return None
        links, name = group.id.links, part.encode("utf-8", "surrogateescape")
        if not links.exists(name):
            return None
        kind = links.get_info(name).type
        if kind == h5py.h5l.TYPE_SOFT:
            num_soft += 1
            if num_soft > MAX_SOFT_LINKS:
                raise UserError(f"{shown(path)} leads through more than {MAX_SOFT_LINKS} soft links")
            target = links.get_val(name).decode("utf-8", "surrogateescape")
            if target.startswith("/"):
                group = group.file["/"]
            parts.extendleft(reversed(target.split("/")))
        elif kind == h5py.h5l.TYPE_HARD:
            group = group[part]
        else:
            raise UserError(f"{shown(path)} is a link to another file, which is refused: copy the data into this file")
    return group


def _checked(data: Any, name: str) -> Any:
    """Return a data set. Raises UserError: its content is in other files, or its chunks are too large."""
    if data.external or data.is_virtual:
        raise UserError(f"{shown(name)} has its data in other files, which is refused: copy the data into this file")
    if data.chunks and np.prod(data.chunks, dtype=np.float64) * max(1, data.dtype.itemsize) > MAX_CHUNK_BYTES:
        raise UserError(f"{shown(name)} has chunks of more than {MAX_CHUNK_BYTES:,} bytes")
    return data


def _column_of(data: Any) -> Column:
    """Return shape and type; object for encoded pictures (bytes of any number), and OTHER for texts."""
    import h5py

    kind = data.dtype
    if kind.hasobject:
        inner = h5py.check_vlen_dtype(kind)
        kind = kind if inner in (np.dtype(np.uint8), np.dtype(np.int8)) else OTHER
    return Column(data.shape, kind)


HDF5_TABLE = Table("an HDF5 file of frames", SUFFIXES, open_hdf5)
