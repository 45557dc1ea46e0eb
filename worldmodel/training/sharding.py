"""Weights, gradients and the optimiser's moments in shards, one on each process, by torch's FSDP2.

Accelerate's own config files ask for it (configs/accelerate/fsdp.yaml). A module's parameters are brought together when
its forward or backward pass begins and let go of at its end. Student and teacher are cut alike, so that the teacher
follows shard by shard. What else needs whole weights has them in a copy of the network, for as long as it takes.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from data_pipelines.errors import UserError
from worldmodel.nets.parallel import is_sharded
from worldmodel.nets.vit import Block

Network = TypeVar("Network", bound=nn.Module)


def is_asked_for(accelerator: Accelerator) -> bool:
    """Whether Accelerate was launched with FSDP, and there are processes to share among.

    Raises:
        UserError: with something of it that is not done here.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("Accelerate is set to the first version of FSDP: set fsdp_version to 2 (docs/multi_node.md)")
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise UserError("weights are not offloaded here: set fsdp_offload_params to false (docs/multi_node.md)")
    return accelerator.num_processes > 1


def shard(network: nn.Module) -> None:
    """Keep this process's share of the parameters of each layer of a large encoder, and of all the rest together, on
    its device."""
    from torch.distributed.fsdp import fully_shard

    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 takes no channels-last ones
    for layer in layers(network):
        fully_shard(layer)
    fully_shard(network, reshard_after_forward=True)


def layers(network: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a transformer, ours or a pretrained one; inner ones first."""
    names = {Block.__name__}
    for module in network.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    for module in reversed(list(network.modules())):
        if type(module).__name__ in names:
            yield module


def without_weights(network: Network) -> Network:
    """A copy of a network that is yet to be sharded, for `filled`: its parameters take no memory."""
    copied = copy.deepcopy(network)
    for module in copied.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return copied


def filled(blank: Network, network: nn.Module, device: torch.device) -> Network:
    """A copy with the weights of a sharded network, whole. All processes call it together."""
    copied, own = copy.deepcopy(blank), network.state_dict()
    weights = {name: tensor if is_sharded(own[name]) else tensor.clone() for name, tensor in whole(own).items()}
    copied.load_state_dict(weights, assign=True)
    return copied.to(device)


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with none in shards, those in the processor's memory. All processes call it together."""
    return {name: tensor.full_tensor().cpu() if is_sharded(tensor) else tensor for name, tensor in tensors.items()}


@torch.no_grad()
def load_whole(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a state dict that is whole, each process its share."""
    own = network.state_dict()
    network.load_state_dict({name: shared_like(tensor, own.get(name)) for name, tensor in tensors.items()})


def shared_like(tensor: Tensor, like: Tensor | None) -> Tensor:
    """A whole tensor, cut as another is. All processes call it together."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
