"""Archives of NumPy arrays (.npz), read as a stream: nothing is unpickled, and nothing is unpacked whole."""

import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_pipelines.convert.columns import OTHER, READ_BYTES, Column, Table
from data_pipelines.errors import UserError, one_line
from data_pipelines.files import check_regular
from data_pipelines.text_files import shown

MAX_ARRAYS = 10_000
MAX_READ_BYTES = 2**31  # of the rows that are asked for at once, and of an array in Fortran order
ERRORS = (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)


class Arrays:
    """An open archive. Rows that are read in ascending order are decompressed once.

    The rows of an array in Fortran order, as of a transpose, are spread over all of it: it is read and kept whole.
    """

    def __init__(self, path: Path) -> None:
        check_regular(path)
        self._zip = zipfile.ZipFile(path)
        members = [name for name in self._zip.namelist() if name.endswith(".npy")]
        if len(members) > MAX_ARRAYS:
            raise ValueError(f"more than {MAX_ARRAYS:,} arrays")
        headers = {name.removesuffix(".npy"): _read_header(self._zip, name) for name in members}
        self._columns = {name: column for name, (column, _) in headers.items()}
        self._fortran = {name for name, (_, is_fortran) in headers.items() if is_fortran}
        self._whole: dict[str, np.ndarray[Any, Any]] = {}  # arrays in Fortran order
        self._open: dict[str, tuple[IO[bytes], int]] = {}  # the file of an array, and the row it is at

    def columns(self) -> Mapping[str, Column]:
        return {
            name: Column(column.shape, OTHER if column.dtype.hasobject else column.dtype)
            for name, column in self._columns.items()
            if column.shape
        }

    def read(self, name: str, start: int, stop: int) -> Any:
        column = self._columns[name]
        row_bytes = math.prod(column.shape[1:]) * column.dtype.itemsize
        if column.dtype.hasobject:
            raise UserError(f"{shown(name)} holds Python objects, which are not unpickled")
        stop = min(stop, column.shape[0])
        if (stop - start) * row_bytes > MAX_READ_BYTES:
            raise UserError(f"{shown(name)} is refused: {stop - start:,} rows of {row_bytes:,} bytes")
        if name in self._fortran:
            return self._read_whole(name)[start:stop]
        try:
            file, row = self._open.pop(name, (None, 0))
            if file is None or row > start:
                file, row = self._zip.open(f"{name}.npy"), 0
                _read_npy_header(file)
            _skip(file, (start - row) * row_bytes)
            content = _read_exactly(file, (stop - start) * row_bytes)
        except ERRORS as error:
            raise UserError(f"{shown(name)} cannot be read: {one_line(error)}") from None
        self._open[name] = file, stop
        return np.frombuffer(content, column.dtype).reshape(stop - start, *column.shape[1:])

    def _read_whole(self, name: str) -> np.ndarray[Any, Any]:
        if name not in self._whole:
            column = self._columns[name]
            num_bytes = math.prod(column.shape) * column.dtype.itemsize
            if num_bytes > MAX_READ_BYTES:
                raise UserError(
                    f"{shown(name)} is refused: {num_bytes:,} bytes in Fortran order: save np.ascontiguousarray of it"
                )
            try:
                with self._zip.open(f"{name}.npy") as file:
                    _read_npy_header(file)
                    content = _read_exactly(file, num_bytes)
            except ERRORS as error:
                raise UserError(f"{shown(name)} cannot be read: {one_line(error)}") from None
            self._whole[name] = np.frombuffer(content, column.dtype).reshape(column.shape, order="F")
        return self._whole[name]


@contextmanager
def open_npz(path: Path) -> Iterator[Arrays]:
    """Open an archive; the last one stays open. Raises UserError: it cannot be read."""
    try:
        status = path.stat()
        arrays = _opened(path, status.st_size, status.st_mtime_ns)
    except ERRORS as error:
        raise UserError(f"'{path}' is not a readable .npz archive: {one_line(error)}") from None
    yield arrays


@lru_cache(maxsize=1)
def _opened(path: Path, size_bytes: int, mtime_ns: int) -> Arrays:
    return Arrays(path)


def _read_header(archive: zipfile.ZipFile, name: str) -> tuple[Column, bool]:
    """Return the column of an array, and whether its rows are spread over all of it."""
    with archive.open(name) as file:
        shape, is_fortran, dtype = _read_npy_header(file)
    return Column(shape, dtype), is_fortran and len(shape) > 1


def _read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _skip(file: IO[bytes], count: int) -> None:
    while count:
        skipped = len(file.read(min(count, READ_BYTES)))
        if not skipped:
            raise EOFError("it ends early")
        count -= skipped


def _read_exactly(file: IO[bytes], count: int) -> bytes:
    content = file.read(count)
    if len(content) != count:
        raise EOFError("it ends early")
    return content


NPZ_TABLE = Table("an .npz archive of frames", (".npz",), open_npz)
