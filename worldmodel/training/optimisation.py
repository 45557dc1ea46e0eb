"""What the loops of training share: the schedule of learning rates, which weights decay, a step's random numbers."""

import math
from typing import Any

import numpy as np
import torch
from torch import nn

STEP = 0
"""Keeps them apart from those of a batch that is drawn afresh, which have a seed and a number as well."""


def learning_rate(step: int, peak: float, warmup_steps: int, num_steps: int) -> float:
    """Linear warm-up to `peak`, then a cosine to zero at `num_steps`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * (math.cos(math.pi * progress) + 1) / 2


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels, none for biases and norms; what has no gradient is left out."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """The random numbers of one step, the same on all processes."""
    mixed = np.random.SeedSequence([seed, step, STEP]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(mixed >> np.uint64(1)))
