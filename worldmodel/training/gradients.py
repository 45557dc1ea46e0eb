"""The gradient of a global batch's loss, computed at once or in micro-batches that fit in memory.

If the loss is a mean over clips, the gradients of its micro-batches are summed. If it compares clips or depends on
their distribution, gradients are cached (Gao et al., arXiv 2101.06983). A first pass without gradients predicts for all
micro-batches, and the loss of the whole batch gives its gradient by these predictions. A second pass backpropagates
each micro-batch's share through the networks. Batch norm inside the networks sees one micro-batch at a time.

Legend: B clips of a micro-batch, N clips of the global batch, K steps of prediction, D embedding dimensions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from worldmodel.data import TrainingInputs
from worldmodel.nets.parallel import global_batch, num_clips
from worldmodel.nets.teacher import Teacher
from worldmodel.nets.world_model import Predictions
from worldmodel.training.losses import CachedGradient, TrainingModel, gather_predictions


@dataclass(frozen=True)
class MicroBatch:
    """Some of this process's clips and their rows [B] in the global batch."""

    inputs: TrainingInputs
    rows: Tensor


@dataclass(frozen=True)
class Losses:
    """The losses of the global batch by name, the targets [K * N, D], and N."""

    losses: dict[str, Tensor]
    targets: Tensor
    num_clips: int


def micro_batches(inputs: TrainingInputs, rows: Tensor, count: int) -> list[MicroBatch]:
    """Split clips and their rows [B] into `count` micro-batches, whose sizes differ by one at most."""
    columns = (values.tensor_split(count) for values in inputs)
    return [
        MicroBatch(TrainingInputs(*values), of_rows)
        for *values, of_rows in zip(*columns, rows.tensor_split(count), strict=True)
    ]


def compute_gradients(
    accelerator: Accelerator,
    model: nn.Module,
    teacher: Teacher | None,
    parts: Sequence[MicroBatch],
    batch_size: int,
    beta: float,
    make_generator: Callable[[], torch.Generator],
    timed: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> Losses:
    """Add the gradient of the loss of a global batch to the parameters of a prepared `TrainingModel`.

    Args:
        batch_size: the number of places of the global batch.
        make_generator: makes the random numbers of the step, the same in each call.
        timed: `timed("forward")` and `timed("backward")` are entered for these passes. The first of two passes counts
            as forward.

    Raises:
        UserError: a process has no clip in a micro-batch.
    """
    student = cast(TrainingModel, getattr(model, "module", model))  # Accelerate's unwrapping takes 0.3 ms
    step = _Step(accelerator, model, student, teacher, parts, batch_size, beta, make_generator, timed)
    with global_batch(torch.cat([part.rows for part in parts]), batch_size):
        return step.cached() if len(parts) > 1 and student.compares_clips else step.accumulated()


@dataclass(frozen=True)
class _Step:
    """One step's arguments. Its methods run inside the whole `global_batch`."""

    accelerator: Accelerator
    model: nn.Module
    student: TrainingModel
    teacher: Teacher | None
    parts: Sequence[MicroBatch]
    batch_size: int
    beta: float
    make_generator: Callable[[], torch.Generator]
    timed: Callable[[str], AbstractContextManager[object]]

    def accumulated(self) -> Losses:
        """Sum the gradients of micro-batches, each weighted by its share of the clips."""
        total = num_clips(sum(len(part.rows) for part in self.parts))
        weights, of_parts, targets = [], [], []
        for part in self.parts:
            with self.entered(part):
                with self.timed("forward"):
                    losses, target = self.model(part.inputs, self.teach(part), self.beta, self.make_generator())
                weights.append(num_clips(len(part.rows)) / total)
                with self.timed("backward"):
                    self.accelerator.backward(losses["loss"] * weights[-1])
            of_parts.append({name: value.detach() for name, value in losses.items()})
            targets.append(target)
        if len(of_parts) == 1:
            return Losses(of_parts[0], targets[0], total)
        summed = {
            name: torch.stack([weight * losses[name] for weight, losses in zip(weights, of_parts, strict=True)]).sum()
            for name in of_parts[0]
        }
        return Losses(summed, torch.cat(targets), total)

    def cached(self) -> Losses:
        """Compute the loss of the whole batch from a first pass, and replay its gradient through each micro-batch."""
        with self.timed("forward"):
            whole, teacher_targets, gradients = self.whole_batch()
        for part, of_teacher, gradient in zip(self.parts, teacher_targets, gradients, strict=True):
            with self.entered(part):
                with self.timed("forward"):
                    replayed, _ = self.model(part.inputs, of_teacher, self.beta, self.make_generator(), cached=gradient)
                with self.timed("backward"):
                    self.accelerator.backward(replayed["surrogate"])
        return whole

    def whole_batch(self) -> tuple[Losses, list[Tensor | None], list[CachedGradient]]:
        """Run the first pass.

        Returns: the losses, and for each micro-batch the teacher's targets and its share of the gradient.
        """
        teacher_targets: list[Tensor | None] = []
        of_parts: list[dict[str, Tensor]] = []
        restore = snapshot_buffers(self.student)
        with torch.no_grad():
            for part in self.parts:
                generator = self.make_generator()
                with self.of_part(part), self.accelerator.autocast():
                    teacher_targets.append(self.teach(part))
                    of_parts.append(self.student.predict(part.inputs, teacher_targets[-1], generator).tensors())
        restore()
        own = {name: torch.cat([tensors[name] for tensors in of_parts]).requires_grad_() for name in of_parts[0]}
        everywhere = gather_predictions(Predictions.from_tensors(own))
        losses = self.student.batch_losses(everywhere, self.beta, generator)
        parameters = [parameter for parameter in self.student.loss_parameters() if parameter.requires_grad]
        slopes = torch.autograd.grad(losses["loss"], [*own.values(), *parameters], allow_unused=True)
        sizes = [len(part.rows) for part in self.parts]
        split = {
            name: slope.split(sizes) for name, slope in zip(own, slopes[: len(own)], strict=True) if slope is not None
        }
        of_loss = [
            (parameter, slope)
            for parameter, slope in zip(parameters, slopes[len(own) :], strict=True)
            if slope is not None
        ]
        last = len(sizes) - 1
        gradients = [
            CachedGradient({name: shares[at] for name, shares in split.items()}, of_loss if at == last else [])
            for at in range(len(sizes))
        ]
        detached = {name: value.detach() for name, value in losses.items()}
        return Losses(detached, everywhere.targets, len(everywhere.real)), teacher_targets, gradients

    @contextmanager
    def entered(self, part: MicroBatch) -> Iterator[None]:
        """Enter the `global_batch` of a micro-batch. Processes exchange gradients in the last one alone."""
        exchange = nullcontext() if part is self.parts[-1] else getattr(self.model, "no_sync", nullcontext)()
        with self.of_part(part), exchange:
            yield

    def of_part(self, part: MicroBatch) -> AbstractContextManager[None]:
        """Enter the `global_batch` of a micro-batch. A single one is the whole batch, which is already entered."""
        return global_batch(part.rows, self.batch_size) if len(self.parts) > 1 else nullcontext()

    def teach(self, part: MicroBatch) -> Tensor | None:
        """Return the teacher's embeddings of a micro-batch's targets, [K * B, D]; None without a teacher."""
        if self.teacher is None:
            return None
        with self.accelerator.autocast():
            return self.teacher(self.student.targets_of(part.inputs.segments))


def snapshot_buffers(*modules: nn.Module) -> Callable[[], None]:
    """Copy running statistics. Returns a function that restores them."""
    buffers = [buffer for module in modules for buffer in module.buffers()]
    before = [buffer.clone() for buffer in buffers]

    def restore() -> None:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)

    return restore
