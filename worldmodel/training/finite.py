"""Infinite values and NaN: kept out of the weights, found, and named."""

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
    """The loss or a gradient of this step is not finite. The first step is 1."""

    def __init__(self, step: int, what: str = "the loss or its gradient is not finite") -> None:
        super().__init__(f"at step {step} {what}: {ADVICE}")
        self.step, self.what = step, what


class Guard:
    """Keeps the weights as they are from the first step on that has a loss or a gradient which is not finite.

    Its state stays on the device, so no step waits for it. A fused optimiser does nothing while its `found_inf` is 1.

    Args:
        scaled: the gradients are those of a GradScaler, which itself leaves out steps whose gradients overflow. Then
            only the loss counts.
        in_shards: each process has its share of the gradients. Then all processes call `watch` together.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, device: torch.device, *, scaled: bool = False, in_shards: bool = False
    ) -> None:
        self._optimizer, self._scaled, self._in_shards = optimizer, scaled, in_shards
        self._one = torch.ones((), dtype=torch.float32, device=device)
        self._found = torch.zeros((), dtype=torch.float32, device=device)
        self._num_steps = torch.zeros((), dtype=torch.float32, device=device)
        if not scaled:
            optimizer.found_inf = self._found  # type: ignore[attr-defined]

    @torch.no_grad()
    def watch(self, loss: Tensor) -> None:
        """Look at the loss and the gradients of a step, between its backward pass and the optimiser's step."""
        values = [loss.detach().float()]
        if not self._scaled:
            parameters = (parameter for group in self._optimizer.param_groups for parameter in group["params"])
            values += [local_shard(parameter.grad) for parameter in parameters if parameter.grad is not None]
        # One pass over all values. It multiplies them by one, and leaves `found` as it is where all are finite.
        torch._amp_foreach_non_finite_check_and_unscale_(values, self._found, self._one)
        if self._in_shards:
            dist.all_reduce(self._found, dist.ReduceOp.MAX)
        self._num_steps += self._found

    def num_steps(self) -> int:
        """Return the number of steps since the first one that was not finite, which counts, or 0. Waits for a GPU."""
        return int(self._num_steps.item())


@contextmanager
def first_overflow(*networks: nn.Module) -> Iterator[list[str]]:
    """Note the first module of `networks` whose output is not finite; it waits for each of them.

    Yields a list that then holds its name and class, such as "embedder.encoder.stem (Conv2d)". Inner modules come
    first.
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
    """Names of the parameters whose gradient is not finite, the last first: the order of a backward pass."""
    gradients = [(name, parameter.grad) for name, parameter in network.named_parameters()]
    return [
        name for name, gradient in reversed(gradients) if gradient is not None and not is_finite(local_shard(gradient))
    ]


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds an infinite value or NaN; None where all are finite."""
    return next((name for name, tensor in tensors.items() if not is_finite(local_shard(tensor))), None)


def is_finite(tensor: Tensor) -> bool:
    """True if all values are finite. Waits for a GPU."""
    return not (tensor.is_floating_point() or tensor.is_complex()) or bool(tensor.isfinite().all())
