"""The gradient of a global batch's loss, computed in one piece or in parts that fit in memory.

A loss that is a mean over clips is the mean of its parts, whose gradients are added up. Where clips of a batch are
compared with each other, or their distribution counts, a first pass without gradients predicts for all parts, the loss
of the whole batch gives its gradient by these predictions, and a second pass carries each part's share on into the
networks (cached gradients: Gao et al., arXiv 2101.06983). Batch norm inside the networks sees a part at a time.

Legend: B clips of this process, N clips of the global batch.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from worldmodel.data import TrainingInputs
from worldmodel.nets.teacher import Teacher
from worldmodel.nets.world_model import PredictionGradient, Predictions, WorldModel
from worldmodel.training.distributed import global_batch, num_clips


class Part(NamedTuple):
    """Some of this process's clips and their rows [B] in the global batch."""

    inputs: TrainingInputs
    rows: Tensor


class Losses(NamedTuple):
    """The losses of the global batch, the targets [K * N, D], and N."""

    losses: dict[str, Tensor]
    targets: Tensor
    num_clips: int


def in_parts(inputs: TrainingInputs, rows: Tensor, num_parts: int) -> list[Part]:
    """Cut clips and their rows [B] into so many parts, of sizes that differ by one at most."""
    split = [[None] * num_parts if values is None else values.tensor_split(num_parts) for values in inputs]
    return [
        Part(TrainingInputs(*values), part_rows)
        for *values, part_rows in zip(*split, rows.tensor_split(num_parts), strict=True)
    ]


def compute_gradients(
    accelerator: Accelerator,
    model: nn.Module,
    teacher: Teacher | None,
    parts: Sequence[Part],
    batch_size: int,
    beta: float,
    make_generator: Callable[[], torch.Generator],
    timed: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> Losses:
    """Add the gradient of the loss of a global batch of `batch_size` places to the parameters of a prepared model.

    `make_generator` makes the random numbers of the step, the same each time. `timed("forward")` and
    `timed("backward")` are entered around these; a first pass is forward.

    Raises:
        UserError: a process has no clip in a part.
    """
    student = cast(WorldModel, getattr(model, "module", model))  # Accelerate's way takes a third of a millisecond
    whole: Losses | None = None
    targets: Sequence[Tensor | None] = [None] * len(parts)
    gradients: Sequence[PredictionGradient | None] = [None] * len(parts)
    done: list[tuple[float, dict[str, Tensor], Tensor]] = []
    rows = torch.cat([part.rows for part in parts])

    def among_all(part: Part) -> AbstractContextManager[None]:
        """The part's global batch, which is the whole one where there are no others."""
        return global_batch(part.rows, batch_size) if len(parts) > 1 else nullcontext()

    with global_batch(rows, batch_size):
        total = num_clips(len(rows))
        if len(parts) > 1 and student.compares_clips:
            with timed("forward"):
                whole, targets, gradients = _whole_batch(
                    accelerator, student, teacher, parts, among_all, beta, make_generator, total
                )
        for number, (part, of_teacher, gradient) in enumerate(zip(parts, targets, gradients, strict=True), start=1):
            exchange = nullcontext() if number == len(parts) else getattr(model, "no_sync", nullcontext)()
            with among_all(part), exchange:
                with timed("forward"):
                    if of_teacher is None:
                        of_teacher = _targets(accelerator, student, teacher, part)
                    segments, known_r, actions = part.inputs
                    losses, target = model(
                        segments, of_teacher, known_r, beta, make_generator(), actions=actions, gradient=gradient
                    )
                weight = 1.0 if whole else num_clips(len(part.rows)) / total
                with timed("backward"):
                    accelerator.backward(losses["loss"] * weight)
            done.append((weight, losses, target))
    if whole:
        return whole
    if len(done) == 1:
        return Losses({name: value.detach() for name, value in losses.items()}, target, total)
    summed = {
        name: torch.stack([weight * losses[name].detach() for weight, losses, _ in done]).sum() for name in losses
    }
    return Losses(summed, torch.cat([target for _, _, target in done]), total)


def _whole_batch(
    accelerator: Accelerator,
    student: WorldModel,
    teacher: Teacher | None,
    parts: Sequence[Part],
    among_all: Callable[[Part], AbstractContextManager[None]],
    beta: float,
    make_generator: Callable[[], torch.Generator],
    total: int,
) -> tuple[Losses, list[Tensor | None], list[PredictionGradient]]:
    """The first pass, in the whole global batch: losses, the teacher's targets of each part, and each part's share of
    the loss's gradient."""
    targets: list[Tensor | None] = []
    predicted: list[Predictions] = []
    put_back = kept_buffers(student)
    with torch.no_grad():
        for part in parts:
            generator = make_generator()
            with among_all(part), accelerator.autocast():
                targets.append(_targets(accelerator, student, teacher, part))
                segments, known_r, actions = part.inputs
                embedded = student.embed(segments, targets[-1])
                predicted.append(student.predict(embedded, known_r, generator, actions=actions)[0])
    put_back()
    columns = [None if column[0] is None else torch.cat(column) for column in zip(*predicted, strict=True)]
    own = Predictions(*columns).map(lambda values: values.requires_grad_())  # type: ignore[arg-type]
    everywhere = own.of_all_processes()
    losses = student.batch_losses(everywhere, beta, generator)
    present = [values for values in own if values is not None]
    parameters = [parameter for parameter in student.loss_parameters() if parameter.requires_grad]
    slopes = iter(torch.autograd.grad(losses["loss"], [*present, *parameters], allow_unused=True))
    sizes = [len(part.rows) for part in parts]
    shares = [
        [None] * len(parts) if slope is None else slope.split(sizes)
        for slope in (None if values is None else next(slopes) for values in own)
    ]
    gradients = [PredictionGradient(Predictions(*share), []) for share in zip(*shares, strict=True)]
    of_loss = [(parameter, slope) for parameter, slope in zip(parameters, slopes, strict=True) if slope is not None]
    gradients[-1] = gradients[-1]._replace(parameters=of_loss)
    detached = {name: value.detach() for name, value in losses.items()}
    return Losses(detached, everywhere.targets, total), targets, gradients


def _targets(accelerator: Accelerator, student: WorldModel, teacher: Teacher | None, part: Part) -> Tensor | None:
    """The teacher's embeddings of a part's targets [K * B, D]; None without a teacher."""
    if teacher is None:
        return None
    with accelerator.autocast():
        return teacher(student.targets_of(part.inputs.segments))


def kept_buffers(*modules: nn.Module) -> Callable[[], None]:
    """Keep running statistics as they are now; returns what puts them back."""
    buffers = [buffer for module in modules for buffer in module.buffers()]
    kept = [buffer.clone() for buffer in buffers]

    def put_back() -> None:
        for buffer, before in zip(buffers, kept, strict=True):
            buffer.copy_(before)

    return put_back
