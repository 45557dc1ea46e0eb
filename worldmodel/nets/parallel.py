"""The global batch that several processes share, as the networks see it.

Inside the context `global_batch`, networks behave as if one process had the whole batch:

- `all_gather` collects the clips of all processes,
- `randn_rows`, `rand_rows` and `multinomial_rows` draw the numbers that belong to a clip's place in the global batch,
- batch statistics are those of all clips (`Whitening`, worldmodel/training/batch_norm.py).

Outside the context, and with one process, each function sees the values that it is given. The context is ambient,
because layers deep inside a network depend on it; each function that does says so.

Each process computes the loss of the whole batch from its own clips and the gathered clips of the others. The backward
pass adds up the gradients of all copies. Each process then has the world size times the gradient of its share, and the
mean that DistributedDataParallel takes is the gradient of the loss.

Legend: B clips of this process, N clips of the global batch, W processes, K categories.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.errors import UserError

# Importing DTensor takes half a second, which only runs with sharded weights need to spend.
if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class GlobalBatch:
    """The global batch of which this process has a share.

    rows: [B], the place of each clip of this process.
    size: the number of places.
    counts: the number of clips of each process. Their sum is below `size` if clips could not be decoded.
    """

    rows: Tensor
    size: int
    counts: tuple[int, ...]


# A plain global: the autograd engine's own threads, which recompute checkpointed layers, would not see a ContextVar.
_current: GlobalBatch | None = None


@contextmanager
def global_batch(rows: Tensor, size: int) -> Iterator[None]:
    """Make this process's clips, at `rows` [B] of `size` places, part of one global batch.

    All processes enter the context together. The backward pass communicates as well and belongs inside.

    Raises:
        UserError: a process has no clip, or all processes together have fewer than two. All processes raise it.
    """
    global _current
    counts = _counts(len(rows))
    if min(counts) < 1 or sum(counts) < 2:
        raise UserError("too few clips of a batch could be decoded: see the log for the files")
    previous, _current = _current, GlobalBatch(rows, size, counts)
    try:
        yield
    finally:
        _current = previous


def num_clips(local: int) -> int:
    """Return the number of clips of the current `global_batch`, of which this process has `local`."""
    return sum(_current.counts) if _current else local


def is_shared() -> bool:
    """Return True if the current `global_batch` has clips of other processes."""
    return _current is not None and len(_current.counts) > 1


def all_gather(values: Tensor) -> Tensor:
    """Collect [B, ...] of all processes of the current `global_batch`, in process order: [N, ...]. Differentiable.

    With L segments per clip, [L * B, ...] becomes [L * N, ...].
    """
    return _Gather.apply(values, _current.counts) if _current and is_shared() else values


# ---------------------------------------------------------------------------------------------------- random numbers


def randn_rows(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw standard normal numbers of the shape [B, ...] of `like`, for its rows of the current `global_batch`."""
    return _rows(Tensor.normal_, like, generator)


def rand_rows(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw uniform numbers in [0, 1) of the shape [B, ...] of `like`, for its rows of the current `global_batch`."""
    return _rows(Tensor.uniform_, like, generator)


def multinomial_rows(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw one category per row by its weights [B, K], for its rows of the current `global_batch`: [B, 1].

    The result is that of torch.multinomial on the whole global batch.
    """
    return (weights / _rows(Tensor.exponential_, weights, generator)).argmax(dim=-1, keepdim=True)


def _rows(fill: Callable[..., Tensor], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw for all places of the global batch, by a method that fills a tensor, and keep those of this process."""
    shape = like.shape if _current is None else (_current.size, *like.shape[1:])
    # Unlike torch.randn with a generator, this can be exported with a dynamic batch size.
    drawn = fill(torch.empty(shape, device=like.device, dtype=like.dtype), generator=generator)
    return drawn if _current is None else drawn[_current.rows]


# ----------------------------------------------------------------------------------------------------- communication


class _Gather(torch.autograd.Function):
    """Clips of all processes, [B, ...] -> [N, ...]. The backward pass sums the gradients of all copies."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, counts: Sequence[int]) -> Tensor:
        segments = len(values) // counts[dist.get_rank()]
        counts = [segments * count for count in counts]
        ctx.first = list(accumulate(counts, initial=0))[dist.get_rank()]
        ctx.count = len(values)
        padded = F.pad(values.reshape(len(values), -1), (0, 0, 0, max(counts) - len(values)))
        parts = stack_processes(padded)
        rows = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        return rows.reshape(-1, *values.shape[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous(memory_format=torch.contiguous_format).clone()
        dist.all_reduce(gradient)
        return gradient[ctx.first : ctx.first + ctx.count], None


def stack_processes(values: Tensor) -> Tensor:
    """Stack the tensors of all processes, which have one shape: [...] -> [W, ...]."""
    stacked = values.new_empty(dist.get_world_size(), *values.shape)
    dist.all_gather(list(stacked.unbind()), values.contiguous())
    return stacked


def max_over_processes(number: int) -> int:
    """Return the largest of the whole numbers that all processes give. No GPU is waited for."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return number
    largest = torch.tensor([number])
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_host_group())
    return int(largest)


def _counts(count: int) -> tuple[int, ...]:
    """Return the count of each process. No GPU is waited for."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return (count,)
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([count]), group=_host_group())
    return tuple(int(each) for each in counts)


_host_groups: dict[str, Any] = {}


def _host_group() -> Any:
    """Return the process group that communicates between processors, and make it where it is missing."""
    world = dist.group.WORLD
    if _host_groups.get("world") is not world:
        _host_groups["world"] = world
        _host_groups["host"] = world if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    return _host_groups["host"]


# ------------------------------------------------------------------------------------------------------------ shards


def is_sharded(tensor: Tensor | None) -> "TypeGuard[DTensor]":
    """Return True if this process holds a shard of the tensor (FSDP2's DTensor)."""
    return hasattr(tensor, "full_tensor")


def local_shard(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, or the tensor itself if it is not sharded. Memory is shared."""
    return tensor.to_local() if is_sharded(tensor) else tensor
