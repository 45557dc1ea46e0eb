"""Full state dicts of networks and optimisers, whether sharded or not, by torch.distributed.checkpoint.

The first process gathers and has them, in CPU memory, and it is the first process that they are loaded from. Tensors
are sent one by one as tensors, so no process but the first holds more than its shard and one tensor.
Optimiser state has the keys "parameter name/state name", which do not depend on the order of parameter groups.

torch.distributed.checkpoint is imported by the functions: it takes most of a second, and only training needs it.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from worldmodel.nets.parallel import is_sharded


def network_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the full state dict on the first process, and an empty one on others. All of a sharded one call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    tensors: dict[str, Any] = get_model_state_dict(
        network, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return tensors


def load_network_state(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load the full state dict `tensors` of the first process. All processes call it; those of others are not read."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
    set_model_state_dict(network, {name: _sent(tensor) for name, tensor in tensors.items()}, options=options)


def optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer, *, full: bool = True) -> dict[str, Tensor]:
    """Return the full optimiser state on the first process, and an empty one on others.

    With full=False, return this process's shards instead, without communication.
    """
    if not optimizer.state:  # torch would take a step without gradients to fill it
        return {}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=full, cpu_offload=full)
    nested: dict[str, Any] = get_optimizer_state_dict(network, optimizer, options=options).get("state", {})  # type: ignore[assignment]
    return {f"{name}/{key}": value for name, state in nested.items() for key, value in state.items()}


def load_optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load the full optimiser state of the first process. All processes call it; `tensors` of others are not read.

    Learning rates and the like stay as the optimiser has them. A single process does not copy the tensors.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    nested: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter_name, key = name.rsplit("/", 1)
        nested.setdefault(parameter_name, {})[key] = _sent(tensor)
    [stored] = broadcast_object_list([set(nested)])
    groups = get_optimizer_state_dict(network, optimizer)["param_groups"]
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    # Not strict: a parameter that never had a gradient has no state.
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized(), strict=False)
    state_dict: dict[str, Any] = {"state": nested, "param_groups": groups} if is_first else {}
    set_optimizer_state_dict(network, optimizer, state_dict, options=options)
    for name, parameter in network.named_parameters():
        if name not in stored:
            optimizer.state.pop(parameter, None)
        for key, value in optimizer.state.get(parameter, {}).items():
            # Fused kernels step through a parameter and its moments together: their memory has to have the same layout.
            if value.shape == parameter.shape and not is_sharded(value) and value.stride() != parameter.stride():
                optimizer.state[parameter][key] = torch.empty_like(parameter).copy_(value)


def _sent(tensor: Tensor) -> Tensor:
    """Return the tensor in contiguous memory. torch sends memory as it is, and receives it as contiguous."""
    return tensor.detach().contiguous()
