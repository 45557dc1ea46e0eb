"""Start a training from the weights of another run."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from data_pipelines.errors import UserError
from worldmodel.runs.checkpoint import Checkpoint, latest_state, load_checkpoint, name_of
from worldmodel.training import full_state
from worldmodel.training.launch import raised_together
from worldmodel.training.trainer import Trainer

Weights = dict[str, Tensor]

ENCODER = "embedder"
NO_CHECKPOINT = "train.start_from={}: this is not a run with a checkpoint"


class Start(NamedTuple):
    """The weights of a student after its start, and the names of its networks by where they are from."""

    weights: Weights
    taken: list[str]
    new: list[str]


def start_from(trainer: Trainer, run: Path) -> None:
    """Load the weights of the latest checkpoint of a run, as `merged` does, with the teacher if both have one.

    A teacher without weights in that run is a copy of the student, as in every new training. The optimiser starts
    anew. All processes call it together; the first one reads the run.

    Raises:
        UserError: there is no such run or checkpoint, it is damaged, or its encoder does not fit. All raise it.
    """
    student: Weights = full_state.network_state(trainer.student)
    teacher: Weights = full_state.network_state(trainer.teacher) if trainer.teacher else {}
    with raised_together():
        if trainer.accelerator.is_main_process:
            checkpoint = read_start(run)
            start = merged(student, checkpoint.model, run)
            its_own = {name: tensor for name, tensor in start.weights.items() if name in teacher}
            student, teacher = start.weights, checkpoint.teacher if teacher and checkpoint.teacher else its_own
            new = f"; new: {', '.join(start.new)}" if start.new else ""
            trainer.accelerator.print(
                f"starting from {run}, {name_of(checkpoint.state)}: {', '.join(start.taken)}{new}"
            )
    full_state.load_network_state(trainer.student, student)
    if trainer.teacher:
        full_state.load_network_state(trainer.teacher, teacher)


def check_start(run: Path, new_run: Path) -> None:
    """Check, before the videos are read and a run is replaced, that weights can be taken from a run.

    Raises:
        UserError: it is the new run itself, or has no checkpoint.
    """
    if run.resolve() == new_run.resolve():
        raise UserError(f"train.start_from={run} is run_dir itself: name another run_dir")
    if latest_state(run) is None:
        raise UserError(NO_CHECKPOINT.format(run))


def read_start(run: Path) -> Checkpoint:
    """Return the latest checkpoint of a run.

    Raises:
        UserError: there is none, or it is damaged.
    """
    checkpoint = load_checkpoint(run, with_optimizer=False)
    if checkpoint is None:
        raise UserError(NO_CHECKPOINT.format(run))
    return checkpoint


def merged(own: Mapping[str, Tensor], stored: Mapping[str, Tensor], run: Path) -> Start:
    """Return the weights of another run where they fit, network by network, and one's own otherwise.

    A network fits if all of its weights have the same names and shapes in both. The encoder has to.

    Raises:
        UserError: the encoder does not fit.
    """
    networks = list(dict.fromkeys(name.split(".")[0] for name in own))
    differences = {network: _first_difference(network, own, stored) for network in networks}
    if difference := differences.get(ENCODER):
        raise UserError(
            f"the encoder of train.start_from={run} is another one: {difference}: give this run the data.channels and "
            "model.encoder, model.embedding_dim, model.embedding_norm and the like of its config.yaml"
        )
    taken = [network for network in networks if differences[network] is None]
    weights = {name: stored[name] if name.split(".")[0] in taken else tensor for name, tensor in own.items()}
    return Start(weights, taken, [network for network in networks if network not in taken])


def _first_difference(network: str, own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> str | None:
    """Return in words the first weight of a network that another run has with another shape or not at all, or None."""
    here, there = (
        {name: list(tensor.shape) for name, tensor in weights.items() if name.split(".")[0] == network}
        for weights in (own, stored)
    )
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            return f"{name} is {there.get(name, 'missing')} there, {here.get(name, 'missing')} here"
    return None
