"""Batch norm for training: over the clips of all processes, and quick for maps of few channels.

The clips of all processes are the global batch of worldmodel/nets/parallel.py.

torch's batch norm of channels-last maps on a CPU handles one pixel at a time, and its threads add to neighbouring
memory. Below 16 channels it takes ten times as long per number as for 32. Here several pixels are seen as one of more
channels, whose statistics are then pooled.

Legend: B clips, C channels, K pixels seen as one, P groups of K pixels.
"""

from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from worldmodel.nets.parallel import is_shared, stack_processes

VECTOR_BYTES = 64
"""A vector register of AVX-512, and a cache line."""
GROUP_CHANNELS = 256
"""Channels of a group of pixels, at most. Above 64 their number hardly matters."""
PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over the clips of all processes, on devices that torch's SyncBatchNorm does not support.

    With one process it is torch's own, except for maps whose pixels do not fill vector registers. Compiled code
    calls torch's, from which the compiler makes other kernels.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # any number of dimensions

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, ...] -> [B, C, ...]"""
        num_pixels = 1 if torch.compiler.is_compiling() else pixels_per_group(input)
        if not self.training or (num_pixels == 1 and not is_shared()):
            return super().forward(input)
        output, mean, variance, count = _Normalise.apply(input, num_pixels, self.weight, self.bias, self.eps)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * (count / (count - 1)), momentum)
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


def replace_batch_norm(module: nn.Module, device: torch.device) -> None:
    """Replace each of torch's batch norms inside a module by one for training, with the same parameters and buffers.

    On CUDA it is torch's SyncBatchNorm, otherwise `BatchNorm`. A class derived from torch's stays: it may do more.
    """
    kind = SharedBatchNorm if device.type == "cuda" else BatchNorm
    for name, child in module.named_children():
        if not isinstance(child, PLAIN) or type(child) not in PLAIN:
            replace_batch_norm(child, device)
            continue
        norm = kind(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
        for of_child in (child.named_parameters(), child.named_buffers()):
            for key, tensor in of_child:
                setattr(norm, key, tensor)
        setattr(module, name, norm.train(child.training))


def pixels_per_group(values: Tensor) -> int:
    """Return K for values [B, C, ...]: 1 unless they are channels-last maps on a CPU that do not fill registers."""
    num_channels = values.shape[1]
    is_map = values.device.type == "cpu" and values.ndim > 3
    if not is_map or not values.movedim(1, -1).is_contiguous() or num_channels * values.itemsize % VECTOR_BYTES == 0:
        return 1
    largest = 1 << (max(1, GROUP_CHANNELS // num_channels).bit_length() - 1)
    return gcd(largest, values.numel() // num_channels)


def grouped(values: Tensor, num_pixels: int) -> Tensor:
    """See K pixels of maps as one: [B, C, ...] -> [1, K * C, P, 1], in the same memory. Nothing changes for K = 1."""
    if num_pixels == 1:
        return values
    return values.movedim(1, -1).reshape(1, -1, 1, num_pixels * values.shape[1]).permute(0, 3, 1, 2)


def _pooled(means: Tensor, variances: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pool the statistics of I parts (Chan, Golub and LeVeque, 1979).

    Args:
        means, variances: [I, C].
        counts: [I, 1].

    Returns: the mean [C], the variance [C] and the count [1] of all.
    """
    count = counts.sum(dim=0)
    mean = (means * counts).sum(dim=0) / count
    variance = ((variances + (means - mean).square()) * counts).sum(dim=0) / count
    return mean, variance, count


class _Normalise(torch.autograd.Function):
    """Batch norm by the pooled statistics of groups of pixels, and of all processes if the batch is shared.

    Passes over all values use the operators of torch's own batch norm: composed of plain ones they take three times as
    long. `native_batch_norm_backward` has no public name; it is used here only.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, num_pixels: int, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        groups, num_channels = grouped(values, num_pixels), values.shape[1]
        # The statistics get the type of `scratch`, which is not read otherwise: half precision would be too coarse.
        precise = torch.promote_types(values.dtype, torch.float)
        scratch = torch.zeros(2, groups.shape[1], device=values.device, dtype=precise)
        means, variances = torch.batch_norm_update_stats(groups, scratch[0], scratch[1], 0.0)
        counts = torch.full_like(means[:num_pixels, None], groups.numel() / groups.shape[1])
        mean, variance, count = _pooled(means.view(num_pixels, -1), variances.view(num_pixels, -1), counts)
        if is_shared():
            everywhere = stack_processes(torch.cat([mean, variance, count]))
            mean, variance, count = _pooled(*everywhere.tensor_split([num_channels, 2 * num_channels], dim=1))
        ctx.save_for_backward(values, weight, mean, variance, count)
        ctx.num_pixels, ctx.eps = num_pixels, eps
        ctx.mark_non_differentiable(mean, variance, count)
        return _affine_map(values, num_pixels, mean, variance, weight, bias, eps), mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, mean, variance, count = ctx.saved_tensors
        num_pixels = ctx.num_pixels
        groups, gradient = grouped(values, num_pixels), grouped(gradients[0], num_pixels)
        scale = (variance + ctx.eps).rsqrt()
        factor = torch.ones_like(scale) if weight is None else weight
        repeated = [each.repeat(num_pixels) for each in (factor, mean, variance, mean, scale)]
        _, *sums = torch.ops.aten.native_batch_norm_backward(
            gradient, groups, *repeated, False, ctx.eps, [False, True, True]
        )
        of_weight, of_bias = (each.view(num_pixels, -1).sum(dim=0) for each in sums)
        everywhere = torch.stack([of_bias, of_weight])
        if is_shared():  # for so few numbers, Gloo's all-reduce takes five times as long
            everywhere = stack_processes(everywhere).sum(dim=0)
        # The gradient of centred values v with an output gradient g is factor * scale * g - slope * v - shift. The last
        # two terms come through the statistics.
        shift, slope = (everywhere * (factor * scale / count)).unbind()
        of_values = _affine_map(values, num_pixels, mean, torch.ones_like(variance), -slope * scale, -shift, 0.0)
        per_channel = [1, -1, *[1] * (groups.ndim - 2)]
        factors = (factor * scale).repeat(num_pixels).view(per_channel).to(values)
        grouped(of_values, num_pixels).addcmul_(gradient, factors)
        affine = weight is not None
        return of_values, None, of_weight if affine else None, of_bias if affine else None, None


def _affine_map(
    values: Tensor,
    num_pixels: int,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Return (values - mean) / sqrt(variance + eps) * weight + bias for values [B, C, ...] and parameters [C].

    The result is not a view of another tensor: an operation in place on a view would copy its gradient.
    """
    mapped, unused = torch.empty_like(values), mean.new_empty(0)
    weight, bias = (None if each is None else each.repeat(num_pixels) for each in (weight, bias))
    mean, variance = mean.repeat(num_pixels), variance.repeat(num_pixels)
    out = (grouped(mapped, num_pixels), unused, unused)
    torch.native_batch_norm(grouped(values, num_pixels), weight, bias, mean, variance, False, 0.0, eps, out=out)
    return mapped
