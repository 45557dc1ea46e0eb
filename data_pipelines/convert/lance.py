"""Lance tables: one row per frame, encoded pictures in a column of bytes, and the number of the episode of each row."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_pipelines.convert.columns import OTHER, Column, RowsEpisode, table_episodes
from data_pipelines.convert.episodes import ALL_KEYS, Keys
from data_pipelines.errors import UserError, one_line
from data_pipelines.formats.lerobot import to_array
from data_pipelines.text_files import shown

SUFFIX = ".lance"


class Lance:
    """A folder NAME.lance, or a folder that holds such folders."""

    name = "a Lance table"
    keys = ALL_KEYS

    def detect(self, source: Path) -> bool:
        return bool(_tables(source))

    def episodes(self, source: Path, keys: Keys, siblings: Sequence[Path]) -> list[RowsEpisode]:
        found: list[RowsEpisode] = []
        for path in _tables(source):
            with open_lance(path) as table:
                found += table_episodes(
                    table, open_lance, path.name, path, keys, is_only=path == source, stamped=_manifest(path)
                )
        return found


class LanceColumns:
    """An open table."""

    def __init__(self, data: Any) -> None:
        self._data = data
        self._num_rows = data.count_rows()

    def columns(self) -> Mapping[str, Column]:
        found = {}
        for field in self._data.schema:
            shape, kind = [self._num_rows], field.type
            while kind.num_fields == 1 and hasattr(kind, "list_size"):  # lists of a fixed size
                shape.append(kind.list_size)
                kind = kind.value_type
            found[field.name] = Column(tuple(shape), _dtype_of(kind))
        return found

    def read(self, name: str, start: int, stop: int) -> Any:
        try:
            values = self._data.to_table(columns=[name], offset=start, limit=stop - start)[name]
            column = self.columns()[name]
            if column.dtype == object:
                rows = values.to_pylist()
                if not all(isinstance(row, bytes) for row in rows):
                    raise ValueError("a row without a picture")
                return rows
            array = to_array(values, np.float32, finite=False)
            return array.astype(np.uint8) if column.dtype == np.uint8 else array  # of pixels, others are int64
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{shown(name)} cannot be read: {one_line(error)}") from None


@contextmanager
def open_lance(path: Path) -> Iterator[LanceColumns]:
    """Open a table. Raises UserError: it cannot be read, names files elsewhere, or pylance is not installed."""
    try:
        import lance
    except ImportError:
        raise UserError(f"'{path}' needs pylance, which is not installed: pip install 'worldmodel[lance]'") from None
    try:
        data = lance.dataset(str(path.absolute()))
        if data.base_paths():
            raise ValueError("it names files in other folders, which is refused")
        for fragment in data.get_fragments():
            for file in fragment.metadata.files:
                place = PurePosixPath(file.path)
                if place.is_absolute() or ".." in place.parts:
                    raise ValueError("it names files in other folders, which is refused")
        table = LanceColumns(data)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"'{path}' is not a readable Lance table: {one_line(error)}") from None
    yield table


def _tables(source: Path) -> list[Path]:
    if source.suffix.lower() == SUFFIX and source.is_dir():
        return [source]
    return sorted(path for path in source.glob(f"*{SUFFIX}") if path.is_dir()) if source.is_dir() else []


def _manifest(path: Path) -> Path:
    """Return the file that changes with every version of a table."""
    versions = sorted((path / "_versions").glob("*.manifest"), key=lambda file: file.stat().st_mtime_ns)
    return versions[-1] if versions else path


def _dtype_of(kind: Any) -> np.dtype[Any]:
    """Return object for bytes, and OTHER for a type that is not a number."""
    from pyarrow import types

    if types.is_binary(kind) or types.is_large_binary(kind):
        return np.dtype(object)
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    return np.dtype(kind.to_pandas_dtype()) if is_number else OTHER
