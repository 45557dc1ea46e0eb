"""The numbers of training steps between two rows of metrics.jsonl."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from worldmodel.evaluation.scores import effective_rank
from worldmodel.training.gradients import Losses
from worldmodel.training.machine import peak_flops_per_s
from worldmodel.training.profiling import FlopCounter
from worldmodel.training.timing import StepTimes


class StepLog:
    """Sums of losses, times and clips since the last row. They stay on the device: no step waits for a number.

    Args:
        dtype: The type that training computes in, for the utilisation.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.times = StepTimes(device)
        self._device, self._dtype = device, dtype
        self.step_flops: float | None = None  # of this process: counted in its first step, or of the checkpoint
        self.restart()

    def restart(self) -> None:
        """Forget the steps since the last row."""
        self.losses: dict[str, Tensor] = {}
        self._targets: Tensor | None = None
        self._num_batches = self._num_clips = 0
        self._started_s = time.monotonic()

    def add(self, batch: Losses) -> None:
        """Add a step."""
        if self.losses:
            torch._foreach_add_(list(self.losses.values()), [batch.losses[name] for name in self.losses])
        else:
            self.losses = {name: value.clone() for name, value in batch.losses.items()}
        self._targets = batch.targets
        self._num_batches += 1
        self._num_clips += batch.num_clips

    def means(self) -> dict[str, float]:
        """Return mean losses per global batch, the collapse diagnostics of the last targets, and clips per second."""
        assert self._targets is not None
        names = list(self.losses)
        stacked = torch.stack([self.losses[name].float() for name in names]) / self._num_batches
        values = dict(zip(names, stacked.tolist(), strict=True))
        elapsed_s = time.monotonic() - self._started_s
        return values | {
            "effective_rank": effective_rank(self._targets),
            "embedding_std": float(self._targets.std(dim=0).mean()),
            "clips_per_s": self._num_clips / elapsed_s,
        }

    def row(self) -> dict[str, float]:
        """Return means, times, FLOP/s and utilisation of the steps since the last row, and restart."""
        values = self.means()
        seconds = self.times.means(self._num_batches)
        assert self.step_flops is not None
        flops_per_s = self.step_flops / seconds["step_s"]
        values |= seconds | {"tflops": flops_per_s / 1e12, "mfu": flops_per_s / self._peak_flops_per_s}
        self.restart()
        return values

    @contextmanager
    def flops_counted(self) -> Iterator[None]:
        """Count the operations of the first step, on which utilisation is based.

        The step runs eagerly, because compiled code cannot be counted. A resumed training has the number from its
        checkpoint: after another eager step it would differ from one that was not interrupted. Recomputed activations
        count twice.
        """
        if self.step_flops is not None:
            yield
            return
        with FlopCounter() as counter, torch.compiler.set_stance("force_eager"):
            yield
        self.step_flops = counter.total

    @cached_property
    def _peak_flops_per_s(self) -> float:
        """The peak of this device. To measure it takes some tenths of a second, between steps."""
        return peak_flops_per_s(self._device, self._dtype)
