"""Files of records: dataclasses of arrays, as safetensors, from which pictures can be drawn again."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_origin

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise

from data_pipelines.errors import UserError, one_line
from data_pipelines.files import write_bytes
from data_pipelines.text_files import type_hints

Record = TypeVar("Record")


class Axes(NamedTuple):
    """Kind and axes of an array of a record, as the annotation of its field: `Annotated[np.ndarray, Axes(...)]`.

    kind: of its numbers, as in numpy: "u" for unsigned integers, "i" for integers, "f" for floating point.
    names: of its axes, separated by spaces. Axes of one name are equally long in all arrays of a record; those whose
        name ends in * may be empty. A number stands for an axis of that length.
    """

    kind: str
    names: str

    def check(self, array: np.ndarray, sizes: dict[str, int]) -> None:
        """Raise ValueError if the array is another one. New sizes of axes are added to `sizes`."""
        names = self.names.split()
        fits = array.dtype.kind == self.kind and array.ndim == len(names)
        for name, size in zip(names, array.shape, strict=False):
            fits &= size == (int(name) if name.isdecimal() else sizes.setdefault(name, size))
            fits &= size > 0 or name.endswith("*")
        if not fits:
            raise ValueError(f"numbers {array.dtype} of shape {array.shape}, not {self.kind} [{self.names}]")


def save_records(path: Path, records: Sequence[Any]) -> None:
    """Write instances of a dataclass whose fields hold arrays, such dataclasses, or values that JSON can hold."""
    arrays: dict[str, np.ndarray] = {}
    others: dict[str, Any] = {}
    for number, record in enumerate(records):
        _gather(record, str(number), arrays, others)
    metadata = {"parts": str(len(records)), "others": json.dumps(others)}
    write_bytes(path, serialise({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata))


def load_records(path: Path, kind: type[Record]) -> list[Record]:
    """Return the instances of `kind` that save_records wrote; an empty list if there is no such file.

    Every array of `kind` is annotated with its `Axes`. Arrays and other values are checked against the annotations.

    Raises:
        UserError: the file is damaged, or another version wrote it.
    """
    if not path.is_file():
        return []
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata()
            values = json.loads(metadata["others"]) | {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return [_restored(kind, str(number), values, {}) for number in range(int(metadata["parts"]))]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged, write it again by the command that wrote it: {one_line(error)}") from error


def _gather(value: Any, name: str, arrays: dict[str, np.ndarray], others: dict[str, Any]) -> None:
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _gather(getattr(value, field.name), f"{name}.{field.name}", arrays, others)
    elif isinstance(value, np.ndarray):
        arrays[name] = value
    else:
        others[name] = value


def _restored(hint: Any, name: str, values: dict[str, Any], sizes: dict[str, int]) -> Any:
    """Return the value that was gathered under `name`, for a field with this annotation."""
    options = [hint] if get_origin(hint) in (None, Annotated, tuple) else get_args(hint)
    kind = next(option for option in options if option is not NoneType)
    if name in values:
        value = values[name]
        if value is None and NoneType in options:
            return None
        try:
            return _checked(kind, value, sizes)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if NoneType in options and not any(stored.startswith(f"{name}.") for stored in values):
        return None  # written before the field was added
    if not dataclasses.is_dataclass(kind):
        raise KeyError(name)
    hints = type_hints(kind)
    parts = {key: _restored(part, f"{name}.{key}", values, sizes) for key, part in hints.items()}
    return kind(**parts)  # type: ignore[operator]


def _checked(kind: Any, value: Any, sizes: dict[str, int]) -> Any:
    """Return a stored value as one of `kind`: an array with `Axes`, a tuple of values of one kind, or a plain value."""
    if get_origin(kind) is Annotated:
        array_kind, axes = get_args(kind)
        assert array_kind is np.ndarray
        if not isinstance(value, np.ndarray):
            raise ValueError("no array")
        axes.check(value, sizes)
        return value
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_checked(get_args(kind)[0], each, sizes) for each in value)
    if type(value) is not kind:
        raise ValueError(f"a value of type {type(value).__name__}")
    return value
