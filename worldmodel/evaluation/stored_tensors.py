"""Tensors of an evaluation in a run folder, with the step of the checkpoint that they belong to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from data_pipelines.errors import UserError, one_line
from data_pipelines.files import write_bytes


def save_tensors(path: Path, tensors: dict[str, Tensor], step: int) -> None:
    """Write tensors of the checkpoint at `step`."""
    write_bytes(path, serialise(tensors, {"step": str(step)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], int]:
    """Return the tensors of a file, by name, and the step of their checkpoint. Call it inside of `damage_reported`."""
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
        return {name: file.get_tensor(name) for name in file.keys()}, step  # noqa: SIM118


@contextmanager
def damage_reported(path: Path) -> Iterator[None]:
    """Turn the errors of reading and checking a damaged file into one line.

    Raises:
        UserError: the file cannot be read, or its content is not what it should be.
    """
    try:
        yield
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path} is damaged, evaluate the run again: {one_line(error)}") from error
