"""Ridge readouts from embeddings: N clips, D embedding dimensions, K outputs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE_STRENGTHS = (1e-6, 1e-4, 1e-2, 1.0, 100.0)


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
        """Length of the standardised inputs, [..., D] -> [...]: how far they lie from the clips of the fit."""
        return ((inputs - self.centre) / self.scale).norm(dim=-1)


def fit_ridge(inputs: Tensor, outputs: Tensor, strength: float) -> Readout:
    """Ridge in closed form, in float64: inputs [N, D], outputs [N, K]; standardised inputs, `strength` added to X'X."""
    return _fit_ridges(inputs, outputs, (strength,))[0]


def choose_readout(
    fit_inputs: Tensor,
    fit_outputs: Tensor,
    selection_inputs: Tensor,
    selection_outputs: Tensor,
    strengths: Sequence[float] = RIDGE_STRENGTHS,
) -> Readout:
    """The ridge whose strength gives the least squared error on selection clips."""
    readouts = _fit_ridges(fit_inputs, fit_outputs, strengths)
    return min(readouts, key=lambda readout: float((readout(selection_inputs) - selection_outputs).square().mean()))


def _fit_ridges(inputs: Tensor, outputs: Tensor, strengths: Sequence[float]) -> list[Readout]:
    """One ridge for each strength; X'X, most of the cost, is taken once."""
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
