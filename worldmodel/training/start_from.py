"""Start a training from the weights of another run."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from data_pipelines.errors import UserError
from worldmodel.runs.checkpoint import first_difference, latest_state, load_checkpoint, name_of
from worldmodel.runs.hub import folder_of
from worldmodel.training import full_state
from worldmodel.training.launch import raised_together
from worldmodel.training.trainer import Trainer

Weights = dict[str, Tensor]

ENCODER = "embedder"
NO_CHECKPOINT = "train.start_from={}: this is not a run with a checkpoint"


class Start(NamedTuple):
    """The weights of a student after its start, and its networks that were taken and those with new weights."""

    weights: Weights
    taken: list[str]
    new: list[str]


def start_from(trainer: Trainer, run: str) -> None:
    """Load the weights of the latest checkpoint of a run, as `merged` does, with its teacher if that fits.

    run: a folder, or the name of a run on the Hub.

    A teacher that has no weights there is a copy of the student, as in every new training. The optimiser has no state
    yet. All processes call this together, and the first one reads the run.

    Raises:
        UserError: the run has no checkpoint, the checkpoint is damaged, or its encoder does not fit. All processes
            raise it.
    """
    student: Weights = full_state.network_state(trainer.student)
    teacher: Weights = full_state.network_state(trainer.teacher) if trainer.teacher else {}
    with raised_together():
        if trainer.accelerator.is_main_process:
            checkpoint = load_checkpoint(folder_of(run), with_optimizer=False)
            if checkpoint is None:
                raise UserError(NO_CHECKPOINT.format(run))
            start = merged(student, checkpoint.model, run)
            fits = first_difference(teacher, checkpoint.teacher) is None
            copied = {name: tensor for name, tensor in start.weights.items() if name in teacher}
            student, teacher = start.weights, checkpoint.teacher if fits else copied
            new = f"; new: {', '.join(start.new)}" if start.new else ""
            trainer.accelerator.print(
                f"starting from {run}, {name_of(checkpoint.state)}: {', '.join(start.taken)}{new}"
            )
    full_state.load_network_state(trainer.student, student)
    if trainer.teacher:
        full_state.load_network_state(trainer.teacher, teacher)


def check_start(run: str, new_run: Path) -> None:
    """Check, before another run in run_dir is replaced, that weights can be taken from a run.

    Raises:
        UserError: it is the new run itself, has no checkpoint, or cannot be downloaded.
    """
    folder = folder_of(run)
    if folder.resolve() == new_run.resolve():
        raise UserError(f"train.start_from={run} is run_dir itself: name another run_dir")
    if latest_state(folder) is None:
        raise UserError(NO_CHECKPOINT.format(run))


def merged(own: Mapping[str, Tensor], stored: Mapping[str, Tensor], run: str) -> Start:
    """Return the weights of another run where they fit, network by network, and otherwise one's own.

    A network fits if all of its weights have the same names and shapes in both. The encoder has to fit.

    Raises:
        UserError: the encoder does not fit.
    """
    here, there = _by_network(own), _by_network(stored)
    if difference := first_difference(here.get(ENCODER, {}), there.get(ENCODER, {})):
        name, *shapes = difference
        ours, theirs = ("missing" if shape is None else shape for shape in shapes)
        raise UserError(
            f"the encoder of train.start_from={run} is another one: {name} is {theirs} there, {ours} here: give this "
            "run the data.channels and model.encoder, model.embedding_dim, model.embedding_norm and the like of its "
            "config.yaml"
        )
    taken = [network for network in here if first_difference(here[network], there.get(network, {})) is None]
    weights = dict(own) | {name: tensor for network in taken for name, tensor in there[network].items()}
    return Start(weights, taken, [network for network in here if network not in taken])


def _by_network(weights: Mapping[str, Tensor]) -> dict[str, Weights]:
    """Return the weights of each network, whose name is the first part of theirs."""
    networks: dict[str, Weights] = {}
    for name, tensor in weights.items():
        networks.setdefault(name.split(".")[0], {})[name] = tensor
    return networks
