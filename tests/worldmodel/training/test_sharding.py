"""Sharding, as far as one process has it; tests/worldmodel/training/test_distributed.py has two."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from data_pipelines.errors import UserError
from tests.conftest import normal
from worldmodel.config import Config
from worldmodel.nets.parallel import local_shard
from worldmodel.nets.vit import VIT_SIZES, VitEncoder
from worldmodel.training import sharding
from worldmodel.training.loop import train
from worldmodel.training.sharding import fsdp_requested, layers, materialise, meta_copy


def accelerator(num_processes: int) -> Any:
    return SimpleNamespace(num_processes=num_processes)


def test_accelerate_asks_for_shards_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not fsdp_requested(accelerator(2))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="first version of FSDP: set fsdp_version to 2"):
        fsdp_requested(accelerator(2))
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert fsdp_requested(accelerator(2)) and not fsdp_requested(accelerator(1))
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(UserError, match="set fsdp_offload_params to false"):
        fsdp_requested(accelerator(2))


def test_parts_of_a_loss_that_compares_clips_are_refused(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "fsdp_requested", lambda _accelerator: True)
    with pytest.raises(UserError, match="a loss that compares clips cannot be accumulated"):
        train(tiny_config("train.grad_accumulation=2", "objective.name=infonce"))


def test_each_block_of_a_transformer_is_a_layer() -> None:
    vit = VitEncoder(VIT_SIZES["vit_tiny"], 1, 2, 32, 16)
    assert list(layers(nn.Sequential(vit))) == list(reversed(vit.blocks))
    assert not list(layers(nn.Sequential(nn.Conv2d(1, 2, 3))))


def test_layers_of_a_pretrained_transformer_are_the_ones_that_it_names() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 8}
    vit = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=8))
    found = list(layers(nn.ModuleDict({"backbone": vit})))
    assert [type(layer).__name__ for layer in found] == ["ViTLayer", "ViTLayer", "ViTEmbeddings"]


def test_a_meta_copy_gets_the_weights_of_another_network() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    network[0].weight.requires_grad_(False)
    blank = meta_copy(network)
    assert all(parameter.is_meta for parameter in blank.parameters())
    other = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    other(normal(1, 4, 3))  # which moves its running statistics
    values = normal(0, 4, 3)
    copied = materialise(blank, other, torch.device("cpu")).eval()
    assert torch.equal(copied(values), other.eval()(values))
    assert [parameter.requires_grad for parameter in copied.parameters()] == [False, True, True, True]
    assert all(parameter.is_meta for parameter in blank.parameters())


def test_tensors_without_shards_are_their_own_shard() -> None:
    weight = nn.Linear(3, 2).weight
    assert local_shard(weight) is weight
