"""Infinite values and NaN: keep them out of the weights, and name the place where they arise."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from data_pipelines.errors import UserError
from worldmodel.nets.parallel import local_shard

ADVICE = "lower train.lr or set train.clip_norm, and train into another run_dir"


class NotFiniteStep(UserError):
    """The loss or a gradient of a step is not finite. The first step is 1."""

    def __init__(self, step: int, what: str = "the loss or its gradient is not finite") -> None:
        super().__init__(f"at step {step} {what}: {ADVICE}")
        self.step, self.what = step, what


class Guard:
    """Freezes the weights from the first step that has a loss or a gradient which is not finite.

    Its state stays on the device, so no step waits for it. A fused optimiser does nothing while its `found_inf` is 1.

    Args:
        scaled: A GradScaler scales the gradients, and itself skips steps whose gradients overflow. Only the loss is
            checked then.
        sharded: Each process has a shard of the gradients. All processes then call `watch` together.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, device: torch.device, *, scaled: bool = False, sharded: bool = False
    ) -> None:
        self._optimizer, self._scaled, self._sharded = optimizer, scaled, sharded
        self._one = torch.ones((), dtype=torch.float32, device=device)
        self._found = torch.zeros((), dtype=torch.float32, device=device)
        self._num_steps = torch.zeros((), dtype=torch.float32, device=device)
        if not scaled:
            optimizer.found_inf = self._found  # type: ignore[attr-defined]

    @torch.no_grad()
    def watch(self, loss: Tensor) -> None:
        """Check the loss and the gradients of a step, between its backward pass and the optimiser's step."""
        values = [loss.detach().float()]
        if not self._scaled:
            parameters = (parameter for group in self._optimizer.param_groups for parameter in group["params"])
            values += [local_shard(parameter.grad) for parameter in parameters if parameter.grad is not None]
        # The operator of torch's GradScaler has no public name. It passes once over all values, multiplies them by one
        # in place, and sets `found` unless all are finite.
        torch._amp_foreach_non_finite_check_and_unscale_(values, self._found, self._one)
        if self._sharded:
            dist.all_reduce(self._found, dist.ReduceOp.MAX)
        self._num_steps += self._found

    def num_steps(self) -> int:
        """Return the number of steps from the first one that was not finite, inclusive, or 0. Waits for a GPU."""
        return int(self._num_steps.item())


@contextmanager
def first_overflow(*networks: nn.Module) -> Iterator[list[str]]:
    """Record the first module of `networks` whose output is not finite. Waits for the device after each module.

    Yields a list, to which the module's name and class are added, such as "embedder.encoder.stem (Conv2d)". Inner
    modules come first.
    """
    found: list[str] = []

    def look(name: str, module: nn.Module, output: object) -> None:
        if not found and not all(is_finite(value) for value in tree_leaves(output) if isinstance(value, Tensor)):
            found.append(f"{name} ({type(module).__name__})")

    hooks = [
        module.register_forward_hook(lambda module, _, output, name=name: look(name, module, output))
        for network in networks
        for name, module in network.named_modules()
        if name
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def overflowed_gradients(network: nn.Module) -> list[str]:
    """Return the names of the parameters whose gradient is not finite, in the order of a backward pass: last first."""
    gradients = [(name, parameter.grad) for name, parameter in network.named_parameters()]
    return [
        name for name, gradient in reversed(gradients) if gradient is not None and not is_finite(local_shard(gradient))
    ]


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds an infinite value or NaN, or None if all are finite."""
    return next((name for name, tensor in tensors.items() if not is_finite(local_shard(tensor))), None)


def is_finite(tensor: Tensor) -> bool:
    """Return True if all values are finite. Waits for a GPU."""
    return not (tensor.is_floating_point() or tensor.is_complex()) or bool(tensor.isfinite().all())
