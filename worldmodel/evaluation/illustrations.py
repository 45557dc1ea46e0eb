"""Arrays of an evaluation for the pictures of the report, and the file that stores them.

The file holds dataclasses of arrays, as safetensors: the report can be written again without an evaluation.

Legend: Q queries, S samples, M draws of the law, N transitions, L horizon steps that are shown, P neighbours, K
dimensions of the quantity, R latent dimensions, T frames of a segment, C channels, H = W pixels.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise

from data_pipelines.errors import UserError, one_line
from data_pipelines.files import write_bytes
from worldmodel.evaluation.surprise import Timeline


@dataclass(frozen=True)
class Fans:
    """Forecasts of a physical quantity at the last frame of each future segment.

    samples [Q, S, horizon, K]; law [Q, M, horizon, K], draws of the true law, or None if it is not known; true
    [Q, horizon, K]; origin [Q, K], the quantity in the last context frame. `on_frames`: the first two
    dimensions are a position (x, y) in pixels of the frames, x right and y down, pixel centres at integers.
    """

    samples: np.ndarray
    law: np.ndarray | None
    true: np.ndarray
    origin: np.ndarray
    on_frames: bool


@dataclass(frozen=True)
class Latents:
    """Inferred r [N, R] of held-out transitions, and the true change [N, K] there, None without labels.

    `change_name` names the change, such as "velocity change, px/frame"; empty without labels.
    """

    r: np.ndarray
    change: np.ndarray | None
    change_name: str


@dataclass(frozen=True)
class Illustrations:
    """At most 6 queries to draw, and the arrays for the figures of the whole evaluation.

    frames uint8 [Q, (1 + horizon) * T, C, H, W], C 1 or 3: the context segment and those that followed; T is
    num_frames. neighbours uint8 [Q, L, P, T, C, H, W]: the real segments nearest to P sampled futures, at each of the
    horizon steps `neighbour_steps`, counted from 1.
    """

    frames: np.ndarray
    num_frames: int
    fans: Fans | None
    neighbours: np.ndarray
    neighbour_steps: tuple[int, ...]
    latents: Latents | None
    timeline: Timeline | None

    def __post_init__(self) -> None:
        """Raise ValueError for neighbours that do not fit frames and steps, as in a damaged file."""
        if self.neighbours.size and self.neighbours.shape[:2] != (len(self.frames), len(self.neighbour_steps)):
            raise ValueError(
                f"neighbours of {self.neighbours.shape[:2]} queries and steps, not of {len(self.frames)} and "
                f"{len(self.neighbour_steps)}"
            )


NO_ILLUSTRATIONS = Illustrations(
    frames=np.zeros((0, 2, 1, 1, 1), np.uint8),
    num_frames=1,
    fans=None,
    neighbours=np.zeros((0, 0, 0, 1, 1, 1, 1), np.uint8),
    neighbour_steps=(),
    latents=None,
    timeline=None,
)


# -------------------------------------------------------------------------------------------------------------- file

Record = TypeVar("Record")


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

    Raises:
        UserError: the file is damaged, or another version wrote it.
    """
    if not path.is_file():
        return []
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata()
            values = json.loads(metadata["others"]) | {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return [_restored(kind, str(number), values) for number in range(int(metadata["parts"]))]
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


def _restored(kind: Any, name: str, values: dict[str, Any]) -> Any:
    """Return the value of type `kind` that was gathered under `name`."""
    if name in values:
        value = values[name]
        return tuple(value) if isinstance(value, list) else value
    nested = next(option for option in (*get_args(kind), kind) if option is not NoneType)
    if not dataclasses.is_dataclass(nested):
        raise KeyError(name)
    hints = get_type_hints(nested)
    return nested(**{key: _restored(hint, f"{name}.{key}", values) for key, hint in hints.items()})  # type: ignore[operator]
