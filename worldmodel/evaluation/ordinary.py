"""The surprise and the motion of ordinary transitions: those of the run's selection clips, stored by an evaluation.

They are the reference of stillness (worldmodel.evaluation.surprise.still_nats), and of thresholds at a stated rate of
false alarms. The threshold at a rate a is the k-th lowest surprise of N transitions, k = ceil((N + 1) (1 - a)). A
further transition that is exchangeable with them exceeds it with probability at most a, and at least a - 1 / (N + 1)
without ties, whatever the model is (split conformal prediction: Vovk, Gammerman and Shafer 2005, "Algorithmic Learning
in a Random World"; Angelopoulos and Bates, arXiv 2107.07511). Those of other cameras, places or frame rates are not.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipelines.errors import UserError
from worldmodel.evaluation.embed import Networks, counted, frozen
from worldmodel.evaluation.stored_tensors import damage_reported, read_tensors, save_tensors
from worldmodel.evaluation.surprise import Ordinary, score_clips
from worldmodel.runs.folder import RunFolder


def ordinary_transitions(networks: Networks, num_clips: int) -> Ordinary:
    """Score the first transition of up to num_clips selection clips."""
    batches = networks.source.evaluation_batches("selection", num_clips)
    with frozen(networks.model, networks.target_encoder):
        return score_clips(networks, counted(batches, num_clips, "surprise"))


def check_rate(rate: float) -> None:
    """Raise UserError if a rate of false alarms is not between 0 and 1."""
    if not 0 < rate < 1:
        raise UserError(f"a false alarm rate of {rate:g} is not between 0 and 1")


def threshold_at(rate: float, surprise: np.ndarray) -> float:
    """Return the threshold at a rate of false alarms, for the surprise of N transitions in rising order.

    Raises:
        UserError: the rate is not between 0 and 1, or too low for N transitions: N must be at least 1 / rate - 1.
    """
    check_rate(rate)
    count = len(surprise)
    # Rounded, as (N + 1) (1 - rate) may be a whole number that floating point misses by a little.
    rank = math.ceil(round((count + 1) * (1 - rate), 6))
    if rank > count:
        needed = math.ceil(round(1 / rate, 6)) - 1
        raise UserError(
            f"a false alarm rate of {rate:g} needs {needed:,} selection transitions, but the run was evaluated with "
            f"{count:,}: ask for a higher rate, or evaluate with more videos or evaluation.selection_clips"
        )
    return float(surprise[rank - 1])


# -------------------------------------------------------------------------------------------------------------- file


def save_ordinary(run: str | Path, ordinary: Ordinary, step: int) -> None:
    """Write the surprise and the motion of selection transitions, of the checkpoint at `step`, into the run folder."""
    tensors = {"surprise": torch.from_numpy(ordinary.surprise)}
    if ordinary.motion is not None:
        tensors["motion"] = ordinary.motion.cpu()
    save_tensors(RunFolder(run).surprise, tensors, step)


def load_ordinary(run: str | Path, step: int) -> Ordinary | None:
    """Return the surprise and the motion of selection transitions; None if the checkpoint at `step` was not evaluated.

    Raises:
        UserError: the file is damaged.
    """
    path = RunFolder(run).surprise
    if not path.is_file():
        return None
    with damage_reported(path):
        tensors, evaluated_step = read_tensors(path)
        surprise, motion = tensors["surprise"], tensors.get("motion")
        _check_rising(surprise)
        if motion is not None:
            _check_rising(motion)
    return Ordinary(surprise.numpy(), motion) if evaluated_step == step else None


def _check_rising(values: Tensor) -> None:
    """Raise ValueError for other than [N] in rising order."""
    if values.ndim != 1 or values.dtype != torch.float32 or not len(values) or not (values.diff() >= 0).all():
        raise ValueError("its numbers are not in rising order")


def threshold_of(ordinary: Ordinary | None, rate: float, run: str | Path) -> float:
    """Return the threshold at a rate of false alarms for the run from which `ordinary` was loaded.

    Raises:
        UserError: as `threshold_at`, or there is nothing ordinary, because the checkpoint was not evaluated.
    """
    check_rate(rate)
    if ordinary is None:
        raise UserError(
            f"a threshold follows from the surprise of selection clips, which the run {run} does not have for this "
            "checkpoint: evaluate it"
        )
    return threshold_at(rate, ordinary.surprise)
