"""FSDP2: weights, gradients and optimiser state in shards, one per process.

Accelerate's config file requests it (configs/accelerate/fsdp.yaml). The parameters of a layer are gathered for its
forward and backward pass and released afterwards. Student and teacher are sharded alike, so the teacher follows shard
by shard. Code that needs full weights, such as an evaluation, gets them in a temporary copy of the network.
"""

import copy
import os
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from data_pipelines.errors import UserError
from worldmodel.nets.parallel import is_sharded
from worldmodel.nets.vit import Block

Network = TypeVar("Network", bound=nn.Module)


def fsdp_requested(accelerator: Accelerator) -> bool:
    """Return True if Accelerate was launched with FSDP on more than one process.

    Raises:
        UserError: FSDP is configured in a way that is not supported.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("Accelerate is set to the first version of FSDP: set fsdp_version to 2 (docs/multi_node.md)")
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise UserError("offloading weights is not supported: set fsdp_offload_params to false (docs/multi_node.md)")
    return accelerator.num_processes > 1


def shard(network: nn.Module) -> None:
    """Shard a network in place: each layer of a transformer by itself, and all other parameters together."""
    from torch.distributed.fsdp import fully_shard

    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 does not support channels-last parameters
    for layer in layers(network):
        fully_shard(layer)
    fully_shard(network, reshard_after_forward=True)


def layers(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of a transformer, of this project or pretrained. Inner blocks come first."""
    names = {Block.__name__}
    for module in network.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    for module in reversed(list(network.modules())):
        if type(module).__name__ in names:
            yield module


def meta_copy(network: Network) -> Network:
    """Copy a network before it is sharded, with parameters on the meta device, for `materialise`."""
    copied = copy.deepcopy(network)
    for module in copied.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad))
    return copied


def materialise(blank: Network, network: nn.Module, device: torch.device) -> Network:
    """Return a copy of a `meta_copy` with the full weights of a sharded network. All processes call it together."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    copied = copy.deepcopy(blank)
    own = network.state_dict()
    full: dict[str, Any] = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True))
    weights = {name: value if is_sharded(own[name]) else value.clone() for name, value in full.items()}
    copied.load_state_dict(weights, assign=True)
    return copied.to(device)
