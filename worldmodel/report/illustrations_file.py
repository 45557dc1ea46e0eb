"""What a report draws, in files of a run folder for it to be built again: dataclasses of arrays, as safetensors."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise

from data_pipelines.errors import UserError, one_line
from data_pipelines.files import write_bytes

ILLUSTRATIONS_NAME = "illustrations.safetensors"
PLANNED_NAME = "planning.safetensors"

Part = TypeVar("Part")


def save_parts(path: Path, parts: Sequence[Any]) -> None:
    """Write instances of a dataclass, whose fields hold arrays, dataclasses of that kind, or what JSON can hold."""
    arrays: dict[str, np.ndarray] = {}
    others: dict[str, Any] = {}
    for number, part in enumerate(parts):
        _gather(part, str(number), arrays, others)
    metadata = {"parts": str(len(parts)), "others": json.dumps(others)}
    write_bytes(path, serialise({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata))


def load_parts(path: Path, kind: type[Part]) -> list[Part]:
    """The instances of `kind` that save_parts wrote; none where there is no such file.

    Raises:
        UserError: the file is damaged, or of another version.
    """
    if not path.is_file():
        return []
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata()
            values = json.loads(metadata["others"]) | {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return [_restored(kind, str(number), values) for number in range(int(metadata["parts"]))]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged, write it again by the script that did: {one_line(error)}") from error


def _gather(value: Any, name: str, arrays: dict[str, np.ndarray], others: dict[str, Any]) -> None:
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _gather(getattr(value, field.name), f"{name}.{field.name}", arrays, others)
    elif isinstance(value, np.ndarray):
        arrays[name] = value
    else:
        others[name] = value


def _restored(kind: Any, name: str, values: dict[str, Any]) -> Any:
    """The value of type `kind` that was gathered by `name`."""
    if name in values:
        value = values[name]
        return tuple(value) if isinstance(value, list) else value
    nested = next(option for option in (*get_args(kind), kind) if option is not NoneType)
    if not dataclasses.is_dataclass(nested):
        raise KeyError(name)
    hints = get_type_hints(nested)
    return nested(**{key: _restored(hint, f"{name}.{key}", values) for key, hint in hints.items()})  # type: ignore[operator]
