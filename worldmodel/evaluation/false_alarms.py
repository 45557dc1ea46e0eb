"""Thresholds of surprise at a stated rate of false alarms, fitted to the run's selection clips.

The threshold at a rate a is the k-th lowest surprise of N transitions of selection clips, k = ceil((N + 1) (1 - a)). A
further transition of the same kind exceeds it with probability at most a, and at least a - 1 / (N + 1) without ties,
whatever the model is (split conformal prediction: Vovk, Gammerman and Shafer 2005, "Algorithmic Learning in a Random
World"; Angelopoulos and Bates, arXiv 2107.07511). Other cameras, places or frame rates are another kind.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise

from data_pipelines.errors import UserError, one_line
from data_pipelines.files import write_bytes
from worldmodel.evaluation.embed import Networks, frozen
from worldmodel.evaluation.surprise import score_clips
from worldmodel.runs.folder import RunFolder


def selection_surprise(networks: Networks, num_clips: int) -> np.ndarray:
    """Return the surprise of the first transition of up to num_clips selection clips, in rising order: [N]."""
    batches = networks.source.evaluation_batches("selection", num_clips)
    with frozen(networks.model, networks.target_encoder):
        return np.sort(score_clips(networks, batches, progress=True).surprise)


def check_rate(rate: float) -> None:
    """Raise UserError if a rate of false alarms is not between 0 and 1."""
    if not 0 < rate < 1:
        raise UserError(f"a false alarm rate of {rate:g} is not between 0 and 1")


def threshold_at(rate: float, ordered: Sequence[float] | np.ndarray) -> float:
    """Return the threshold at a rate of false alarms, for the surprise of N transitions in rising order.

    Raises:
        UserError: the rate is not between 0 and 1, or too low for N transitions: N must be at least 1 / rate - 1.
    """
    check_rate(rate)
    count = len(ordered)
    # Rounded, as (N + 1) (1 - rate) may be a whole number that floating point misses by a little.
    rank = math.ceil(round((count + 1) * (1 - rate), 6))
    if rank > count:
        needed = math.ceil(round(1 / rate, 6)) - 1
        raise UserError(
            f"a false alarm rate of {rate:g} needs {needed:,} selection transitions, but the run was evaluated with "
            f"{count:,}: ask for a higher rate, or evaluate with more evaluation.selection_clips"
        )
    return float(ordered[rank - 1])


# -------------------------------------------------------------------------------------------------------------- file


def save_selection_surprise(run: str | Path, ordered: np.ndarray, step: int) -> None:
    """Write the surprise of selection transitions [N] of the checkpoint at `step` into the run folder."""
    write_bytes(RunFolder(run).surprise, serialise({"selection": ordered.astype(np.float32)}, {"step": str(step)}))


def load_selection_surprise(run: str | Path, step: int) -> np.ndarray | None:
    """Return the surprise of selection transitions [N] of the checkpoint at `step`; None if there is no such file.

    Raises:
        UserError: the file is damaged, or belongs to another checkpoint.
    """
    path = RunFolder(run).surprise
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            fitted_step = int(file.metadata()["step"])
            ordered: np.ndarray = file.get_tensor("selection")
        if ordered.ndim != 1 or ordered.dtype != np.float32 or not (np.diff(ordered) >= 0).all():
            raise ValueError("its numbers are not in rising order")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged, evaluate the run again: {one_line(error)}") from error
    if fitted_step != step:
        raise UserError(
            f"the run {run} was evaluated at step {fitted_step}, but the loaded checkpoint is from step {step}: "
            "evaluate that checkpoint"
        )
    return ordered


def threshold_of_run(run: str | Path, step: int, rate: float) -> float:
    """Return the threshold at a rate of false alarms of an evaluated run, for the checkpoint at `step`.

    Raises:
        UserError: as `threshold_at` and `load_selection_surprise`, or the run was not evaluated since thresholds exist.
    """
    check_rate(rate)
    ordered = load_selection_surprise(run, step)
    if ordered is None:
        raise UserError(f"the run {run} has no surprise of selection clips, from which thresholds follow: evaluate it")
    return threshold_at(rate, ordered)
