"""Ridge readouts from embeddings, and the file of the readout that an evaluation chose, for forecasts of new clips.

Legend: N clips, D embedding dimensions, K outputs.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from data_pipelines.errors import UserError
from data_pipelines.files import write_bytes
from data_pipelines.worlds.law import Quantity
from worldmodel.evaluation.stored_tensors import damage_reported
from worldmodel.runs.folder import RunFolder

RIDGE_STRENGTHS = (1e-6, 1e-4, 1e-2, 1.0, 100.0)
_TENSORS = ("centre", "scale", "weight", "bias")


@dataclass(frozen=True)
class Readout:
    """Ridge regression on standardised inputs: [..., D] -> [..., K]."""

    centre: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    strength: float

    def __call__(self, inputs: Tensor) -> Tensor:
        return (inputs - self.centre) / self.scale @ self.weight + self.bias

    def standardised_norm(self, inputs: Tensor) -> Tensor:
        """Return the norm of the standardised inputs, [..., D] -> [...]: their distance from the clips of the fit."""
        return ((inputs - self.centre) / self.scale).norm(dim=-1)


def choose_readout(
    fit_inputs: Tensor,
    fit_outputs: Tensor,
    selection_inputs: Tensor,
    selection_outputs: Tensor,
    strengths: Sequence[float] = RIDGE_STRENGTHS,
) -> Readout:
    """Return the ridge whose strength gives the smallest squared error on selection clips."""
    readouts = fit_ridges(fit_inputs, fit_outputs, strengths)
    return min(readouts, key=lambda readout: float((readout(selection_inputs) - selection_outputs).square().mean()))


def fit_ridges(inputs: Tensor, outputs: Tensor, strengths: Sequence[float]) -> list[Readout]:
    """Fit a ridge per strength to inputs [N, D] and outputs [N, K], in closed form and float64.

    Inputs are standardised, and the strength is added to the diagonal of X'X. Most of the cost, X'X, is computed once.
    """
    inputs, outputs = inputs.double(), outputs.double()
    centre, scale = inputs.mean(dim=0), inputs.std(dim=0).clamp(min=1e-6)
    bias = outputs.mean(dim=0)
    x = (inputs - centre) / scale
    gram, moment, eye = x.T @ x, x.T @ (outputs - bias), torch.eye(x.shape[1], dtype=x.dtype)
    weights = [torch.linalg.solve(gram + strength * eye, moment) for strength in strengths]
    return [
        Readout(centre.float(), scale.float(), weight.float(), bias.float(), strength)
        for weight, strength in zip(weights, strengths, strict=True)
    ]


# -------------------------------------------------------------------------------------------------------------- file


def save_readout(run: str | Path, readout: Readout, quantity: Quantity, step: int) -> None:
    """Write the readout of `quantity` from target embeddings of the checkpoint at `step` into the run folder."""
    metadata = {
        "name": quantity.name,
        "unit": quantity.unit,
        "dimensions": json.dumps(quantity.dimensions),
        "strength": repr(readout.strength),
        "step": str(step),
    }
    tensors = {name: getattr(readout, name).contiguous() for name in _TENSORS}
    write_bytes(RunFolder(run).readout, serialise(tensors, metadata))


def load_readout(run: str | Path, step: int, device: str | torch.device = "cpu") -> tuple[Readout, Quantity]:
    """Return the readout of an evaluated run and its quantity, for the checkpoint at `step`.

    Raises:
        UserError: the run was not evaluated, or was evaluated at another checkpoint, or its videos have no labels.
    """
    folder = RunFolder(run)
    path = folder.readout
    if not path.is_file():
        if folder.metrics.is_file():
            raise UserError(f"the videos of {run} have no labels of a known world: use rollout, which gives embeddings")
        raise UserError(f"the run {run} was not evaluated: evaluate it first")
    with damage_reported(path):
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
        readout = Readout(**tensors, strength=float(metadata["strength"]))
        quantity = Quantity(metadata["name"], metadata["unit"], tuple(json.loads(metadata["dimensions"])))
        _check_sizes(readout, len(quantity.dimensions))
        evaluated_step = int(metadata["step"])
    if evaluated_step != step:
        raise UserError(
            f"the run {run} was evaluated at step {evaluated_step}, but the loaded checkpoint is from step {step}: "
            "evaluate that checkpoint"
        )
    return readout, quantity


def _check_sizes(readout: Readout, num_outputs: int) -> None:
    """Raise ValueError for a stored readout [D] -> [K] whose tensors do not fit each other, or K outputs."""
    num_inputs = len(readout.centre)
    wanted = {"centre": (num_inputs,), "scale": (num_inputs,), "weight": (num_inputs, num_outputs)}
    for name, shape in (wanted | {"bias": (num_outputs,)}).items():
        tensor = getattr(readout, name)
        if tensor.shape != shape or not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not a float of {shape}")
