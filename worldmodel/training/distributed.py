"""Several processes: what a launcher must have set, and batch norm over the clips of all of them.

Each process computes the loss of the whole global batch (worldmodel/nets/parallel.py). The gradients of its copies come
back and are summed, so the mean that DistributedDataParallel takes is the gradient of the loss.
"""

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data_pipelines.errors import UserError
from data_pipelines.processes import environment_int
from worldmodel.nets.parallel import is_shared, stack_processes

_LAUNCHERS = ("PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")
_FLAGS = (
    "ACCELERATE_USE_CPU",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_DEBUG_MODE",
    "ACCELERATE_CPU_AFFINITY",
    "FORK_LAUNCHED",
)
_FLAG_VALUES = frozenset(["y", "yes", "t", "true", "on", "1", "n", "no", "f", "false", "off", "0"])


def check_launch_environment() -> int:
    """The number of processes that a launcher started, from the environment.

    Raises:
        UserError: one of the variables that launchers set, and that Accelerate reads, is not a valid number or flag;
            they contradict each other.
    """
    world_size = environment_int("WORLD_SIZE", 1, least=1)
    environment_int("LOCAL_WORLD_SIZE", world_size, least=1)
    for name in [prefix + suffix for prefix in _LAUNCHERS for suffix in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")]:
        environment_int(name, 0)
    for name in ("RANK", "LOCAL_RANK"):
        if os.environ.get(name, "").strip() == "-1":
            continue  # Accelerate's and torchrun's own word for a process that is alone
        if (rank := environment_int(name, 0)) >= world_size:
            raise UserError(f"the environment says {name}={rank}, but WORLD_SIZE={world_size}: {name} must be less")
    if environment_int("MASTER_PORT", 1, least=0) > 65535:
        raise UserError(f"the environment variable MASTER_PORT={os.environ['MASTER_PORT']} is not a port below 65536")
    if world_size > 1:
        environment_int("OMP_NUM_THREADS", 0)
        if "RANK" not in os.environ and not any(prefix + "RANK" in os.environ for prefix in _LAUNCHERS):
            raise UserError(
                f"the environment says WORLD_SIZE={world_size} but not RANK: start the processes with "
                "accelerate launch or torchrun, or unset WORLD_SIZE for one process"
            )
    for name in _FLAGS:
        if os.environ.get(name, "0").lower() not in _FLAG_VALUES:
            raise UserError(f"the environment variable {name}={os.environ[name][:40]!r} must be true or false")
    return world_size


class GlobalBatchNorm(_BatchNorm):
    """Batch norm by the clips of all processes, on any device; torch's SyncBatchNorm wants GPUs."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # of any number of dimensions

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, ...] -> [B, C, ...]"""
        if not (self.training and is_shared()):
            return super().forward(input)
        output, mean, variance, count = _Normalise.apply(input, self.weight, self.bias, self.eps)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return output


def globalise_batch_norm(module: nn.Module) -> None:
    """Put a GlobalBatchNorm with the same parameters in the place of each batch norm of a module."""
    for name, child in module.named_children():
        if not isinstance(child, _BatchNorm):
            globalise_batch_norm(child)
            continue
        norm = GlobalBatchNorm(child.num_features, child.eps, child.momentum, child.affine)
        norm._parameters, norm._buffers = child._parameters, child._buffers
        setattr(module, name, norm.train(child.training))


class _Normalise(torch.autograd.Function):
    """Batch norm by statistics of all processes, which are put together as Chan, Golub and LeVeque (1979) have it.

    torch's own kernels do what goes over all values: of plain operations this would take three times as long.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Statistics have the type of these, which are not read else: in half precision they would be too coarse.
        precise = torch.promote_types(values.dtype, torch.float)
        scratch = torch.zeros(2, values.shape[1], device=values.device, dtype=precise)
        mean, variance = torch.ops.aten.batch_norm_update_stats(values, *scratch, 0.0)
        count = torch.full_like(mean[:1], values.numel() / len(mean))
        statistics = stack_processes(torch.cat([mean, variance, count]))
        means, variances, counts = statistics.tensor_split([len(mean), 2 * len(mean)], dim=1)
        total = counts.sum()
        mean = (means * counts).sum(dim=0) / total
        variance = ((variances + (means - mean).square()) * counts).sum(dim=0) / total
        output = F.batch_norm(values, mean, variance, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(values, weight, mean, variance, total)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, total)
        return output, mean, variance, total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        values, weight, mean, variance, total = ctx.saved_tensors
        scale = (variance + ctx.eps).rsqrt()
        factor = torch.ones_like(scale) if weight is None else weight
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradients[0], values, factor, mean, variance, mean, scale, False, ctx.eps, [False, True, True]
        )
        # Of so few numbers Gloo's own sum takes five times as long.
        everywhere = stack_processes(torch.stack([of_bias, of_weight])).sum(dim=0)
        # What the values do through the statistics, and then as if those were constants: of their centred values v and
        # what comes back g it is factor * scale * g - slope * v - shift.
        shift, slope = (everywhere * (factor * scale / total)).unbind()
        ones = torch.ones_like(variance)
        of_values = F.batch_norm(values, mean, ones, -slope * scale, -shift, False, 0.0, 0.0)
        of_values.addcmul_(gradients[0], (factor * scale).view([1, -1, *[1] * (values.ndim - 2)]).to(values))
        affine = weight is not None
        return of_values, of_weight if affine else None, of_bias if affine else None, None
