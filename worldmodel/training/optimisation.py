"""Optimisation: schedules, parameter groups, and the random numbers of a step.

A schedule is a pure function of the step, the number of finished updates. It has no state, so a resume needs none.
"""

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

STEP = 0
"""A step's draws but for its augmentation."""
AUGMENT = 1
"""Separates the seeds of a step's augmentation from those of its other draws."""


def learning_rate(step: int, peak: float, warmup_steps: int, num_steps: int) -> float:
    """Return the learning rate: linear warm-up to `peak`, then a cosine that reaches zero at `num_steps`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * (math.cos(math.pi * progress) + 1) / 2


def warmed_up_beta(step: int, beta: float, warmup_steps: int) -> float:
    """Return the weight of the KL: linear warm-up from zero to `beta`."""
    return beta * (step / warmup_steps if step < warmup_steps else 1.0)


def ema_momentum(step: int, base: float, schedule: Literal["constant", "cosine"], num_steps: int) -> float:
    """Return the momentum of the teacher. "cosine" rises from `base` to 1 at `num_steps`."""
    if schedule == "constant":
        return base
    return 1 - (1 - base) * (math.cos(math.pi * step / num_steps) + 1) / 2


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups: matrices and kernels with weight decay, biases and norms without.

    Frozen parameters are in neither.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def step_generator(seed: int, step: int, device: torch.device, purpose: int = STEP) -> torch.Generator:
    """Return the random generator of one step for one purpose. It is the same on all processes.

    A batch has a seed and a number, too (data_pipelines/worlds/fresh.py). NumPy takes a purpose of 0 for nothing, so
    that both mix alike; the shift makes them different seeds.
    """
    mixed = np.random.SeedSequence([seed, step, purpose]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(mixed >> np.uint64(1)))
