"""readout.safetensors in a run folder: the readout that an evaluation chose, for forecasts of new clips."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise

from data_pipelines.errors import UserError, one_line
from data_pipelines.files import write_bytes
from data_pipelines.worlds.law import Quantity
from worldmodel.evaluation.readout import Readout

READOUT_NAME = "readout.safetensors"
_TENSORS = ("centre", "scale", "weight", "bias")


def save_readout(run: str | Path, readout: Readout, quantity: Quantity, step: int) -> None:
    """Write the readout of `quantity` from target embeddings of the checkpoint at `step`."""
    metadata = {
        "name": quantity.name,
        "unit": quantity.unit,
        "dimensions": json.dumps(quantity.dimensions),
        "strength": repr(readout.strength),
        "step": str(step),
    }
    tensors = {name: getattr(readout, name).contiguous() for name in _TENSORS}
    write_bytes(Path(run) / READOUT_NAME, serialise(tensors, metadata))


def load_readout(run: str | Path, step: int, device: str | torch.device = "cpu") -> tuple[Readout, Quantity]:
    """The readout of an evaluated run, and what it reads; `step` is that of the checkpoint it is wanted for.

    Raises:
        UserError: the run was not evaluated, or at another checkpoint, or its videos have no labels.
    """
    path = Path(run) / READOUT_NAME
    if not path.is_file():
        if (Path(run) / "metrics.json").is_file():
            raise UserError(f"the videos of {run} have no labels of a known world: use rollout, which gives embeddings")
        raise UserError(f"the run {run} was not evaluated: python scripts/evaluate.py --run {run}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
        readout = Readout(**tensors, strength=float(metadata["strength"]))
        quantity = Quantity(metadata["name"], metadata["unit"], tuple(json.loads(metadata["dimensions"])))
        evaluated_step = int(metadata["step"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged, evaluate the run again: {one_line(error)}") from error
    if evaluated_step != step:
        raise UserError(
            f"the run {run} was evaluated at step {evaluated_step}, and the checkpoint loaded is of step {step}: "
            "evaluate that one"
        )
    return readout, quantity
