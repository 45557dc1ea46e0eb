"""Batch norm over the clips of all processes (the global batch of worldmodel/nets/parallel.py)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.nets.parallel import is_shared, stack_processes


class GlobalBatchNorm(nn.BatchNorm1d):
    """Batch norm over the clips of all processes, on devices that torch's SyncBatchNorm does not support."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # any number of dimensions

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


class SharedBatchNorm(nn.SyncBatchNorm):
    """torch's SyncBatchNorm inside a shared batch, and a plain batch norm outside of one.

    Refinement runs on one process: a SyncBatchNorm would wait for the others there.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, ...] -> [B, C, ...]"""
        if self.training and is_shared():
            return super().forward(input)
        return super(nn.SyncBatchNorm, self).forward(input)


def globalise_batch_norm(module: nn.Module, device: torch.device) -> None:
    """Replace each batch norm inside a module by one over all processes, with the same parameters and buffers.

    On CUDA it is torch's, otherwise `GlobalBatchNorm`.
    """
    kind = SharedBatchNorm if device.type == "cuda" else GlobalBatchNorm
    for name, child in module.named_children():
        if not isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            globalise_batch_norm(child, device)
            continue
        norm = kind(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
        for of_child in (child.named_parameters(), child.named_buffers()):
            for key, tensor in of_child:
                setattr(norm, key, tensor)
        setattr(module, name, norm.train(child.training))


class _Normalise(torch.autograd.Function):
    """Batch norm by statistics of all processes, combined as by Chan, Golub and LeVeque (1979).

    Passes over all values use the operators of torch's own batch norm: composed of plain ones they take three times as
    long. `native_batch_norm_backward` has no public name; it is used here only.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # The statistics get the type of `scratch`, which is not read otherwise: half precision would be too coarse.
        precise = torch.promote_types(values.dtype, torch.float)
        scratch = torch.zeros(2, values.shape[1], device=values.device, dtype=precise)
        mean, variance = torch.batch_norm_update_stats(values, scratch[0], scratch[1], 0.0)
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
        # For so few numbers, Gloo's all-reduce takes five times as long.
        everywhere = stack_processes(torch.stack([of_bias, of_weight])).sum(dim=0)
        # The gradient of centred values v with an output gradient g is factor * scale * g - slope * v - shift. The last
        # two terms come through the statistics.
        shift, slope = (everywhere * (factor * scale / total)).unbind()
        ones = torch.ones_like(variance)
        of_values = F.batch_norm(values, mean, ones, -slope * scale, -shift, False, 0.0, 0.0)
        of_values.addcmul_(gradients[0], (factor * scale).view([1, -1, *[1] * (values.ndim - 2)]).to(values))
        affine = weight is not None
        return of_values, of_weight if affine else None, of_bias if affine else None, None
