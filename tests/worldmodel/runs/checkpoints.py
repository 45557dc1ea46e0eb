"""Small checkpoints for tests."""

from pathlib import Path
from typing import Any

import torch

from worldmodel.runs.checkpoint import Checkpoint


def make(step: int) -> Checkpoint:
    weights = {"w": torch.full((3,), float(step))}
    return Checkpoint(weights, weights, {"w/step": torch.tensor(step)}, make_state(step))


def make_state(step: int) -> dict[str, Any]:
    return {"step": step, "train_seconds": 1.5, "best_score": float("inf"), "stream": "0123456789abcdef"}


def saved_steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))
