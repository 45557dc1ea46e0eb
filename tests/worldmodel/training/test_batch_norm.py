"""Batch norm for training by one process; tests/worldmodel/training/test_distributed.py has two."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import normal
from worldmodel.training import batch_norm
from worldmodel.training.batch_norm import BatchNorm, SharedBatchNorm, grouped, pixels_per_group, replace_batch_norm

CPU = torch.device("cpu")
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
NORMS: dict[int, type[nn.BatchNorm2d] | type[nn.BatchNorm3d]] = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def maps(num_channels: int, *size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Channels-last maps [5, C, *size] whose mean and spread are not 0 and 1."""
    values = (2 * normal(num_channels, 5, num_channels, *size) + 1).to(dtype)
    return values.contiguous(memory_format=LAYOUTS[values.ndim])


def layers(norm: nn.Module) -> nn.Sequential:
    """As in encoders: ReLU works in place."""
    return nn.Sequential(norm, nn.ReLU(inplace=True))


def outputs(network: nn.Module, values: Tensor, slope: Tensor) -> dict[str, Tensor]:
    """The output, the gradients for an output gradient `slope`, and the buffers."""
    values = values.clone().requires_grad_()
    result = network(values)
    result.backward(slope)
    assert values.grad is not None
    gradients = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    return {"output": result.detach(), "input": values.grad, **gradients, **dict(network.named_buffers())}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("size", [(4, 8), (3, 4, 4), (1, 3, 5)])
@pytest.mark.parametrize("num_channels", [1, 2, 3, 4, 12, 20, 300])
def test_few_channels_give_the_values_and_gradients_of_torch(
    num_channels: int, size: tuple[int, ...], affine: bool
) -> None:
    values = maps(num_channels, *size)
    kind = NORMS[values.ndim]
    plain, ours = (layers(kind(num_channels, 1e-3, 0.2, affine).double()) for _ in range(2))
    if affine:
        for network in (plain, ours):
            network.load_state_dict(
                {"0.weight": normal(1, num_channels), "0.bias": normal(2, num_channels)}, strict=False
            )
    replace_batch_norm(ours, CPU)
    slope = torch.randn_like(values, memory_format=torch.preserve_format)
    for _ in range(2):  # the running statistics move twice
        expected, found = outputs(plain, values, slope), outputs(ours, values, slope)
    assert expected.keys() == found.keys() and len(found) == (7 if affine else 5)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-10, rtol=1e-10, msg=name)
    assert found["output"].is_contiguous(memory_format=LAYOUTS[values.ndim])
    torch.testing.assert_close(ours.eval()(values), plain.eval()(values))


@pytest.mark.parametrize("settings", [{"momentum": None}, {"track_running_stats": False}], ids=str)
def test_running_statistics_are_those_of_torch(settings: dict[str, Any]) -> None:
    plain, ours = (layers(nn.BatchNorm2d(3, **settings).double()) for _ in range(2))
    replace_batch_norm(ours, CPU)
    for seed in range(3):
        values = maps(3, 4, 8) + seed
        torch.testing.assert_close(ours(values.clone()), plain(values.clone()))
    assert plain.state_dict().keys() == ours.state_dict().keys()
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())
    torch.testing.assert_close(ours.eval()(values), plain.eval()(values))


def test_a_derived_class_stays_as_it_is() -> None:
    class WithMore(nn.BatchNorm2d):
        pass

    network = layers(WithMore(3))
    replace_batch_norm(network, CPU)
    assert type(network[0]) is WithMore


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_few_channels_are_as_exact_as_torch(dtype: torch.dtype) -> None:
    values = maps(8, 3, 16, 16, dtype=dtype)
    slope = torch.randn_like(values)
    exact = outputs(layers(nn.BatchNorm3d(8).double()), values.double(), slope.double())
    ours = layers(nn.BatchNorm3d(8))
    replace_batch_norm(ours, CPU)

    def errors(network: nn.Module) -> dict[str, float]:
        found = outputs(network, values, slope)
        return {name: float((found[name] - value).norm() / value.norm()) for name, value in exact.items() if value.ndim}

    of_plain, of_ours = errors(layers(nn.BatchNorm3d(8))), errors(ours)
    for name, error in of_ours.items():
        assert error <= 1.5 * of_plain[name] + 1e-5, name


def test_pixels_are_grouped_where_a_pixel_does_not_fill_registers() -> None:
    def number(values: Tensor) -> int:
        return pixels_per_group(values)

    assert [number(maps(c, 8, 8, dtype=torch.bfloat16)) for c in (8, 16, 24, 32, 48, 64)] == [32, 16, 8, 1, 4, 1]
    assert [number(maps(c, 8, 8, dtype=torch.float32)) for c in (8, 16, 24, 32)] == [32, 1, 8, 1]
    assert number(maps(3, 1, 7)) == 1  # 35 pixels have no factor of two
    assert number(maps(3, 1, 7).contiguous()) == number(maps(3, 4, 8).contiguous()) == 1
    assert number(normal(0, 64, 3)) == 1
    assert number(maps(8, 8, 8, dtype=torch.bfloat16).to("meta")) == 1


def test_a_group_has_the_channels_of_successive_pixels() -> None:
    values = maps(3, 2, 4)
    groups = grouped(values, 4)
    assert groups.shape == (1, 12, 10, 1) and groups.is_contiguous(memory_format=torch.channels_last)
    assert groups.data_ptr() == values.data_ptr()
    assert torch.equal(groups[0, :, 1, 0].view(4, 3), values[0, :, 1].T)


@pytest.mark.parametrize(("device", "kind"), [("cuda", SharedBatchNorm), ("cpu", BatchNorm), ("xpu", BatchNorm)])
def test_the_device_selects_the_batch_norm(device: str, kind: type[nn.Module]) -> None:
    """A device that exists is not needed: its type alone counts."""
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.BatchNorm2d(2, eps=1e-3, momentum=0.2))).eval()
    before = plain.state_dict(keep_vars=True)
    replace_batch_norm(plain, torch.device(device))
    [norm] = plain.get_submodule("1").children()
    assert type(norm) is kind and (norm.eps, norm.momentum, norm.training) == (1e-3, 0.2, False)
    after = plain.state_dict(keep_vars=True)
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)


def test_a_shared_batch_norm_waits_for_nobody_outside_of_a_shared_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside of one, torch's SyncBatchNorm computes it."""
    values = normal(0, 4, 3)
    calls: list[torch.Tensor] = []
    plain, ours = nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3))
    replace_batch_norm(ours, torch.device("cuda"))

    def spy(_self: nn.Module, input: torch.Tensor) -> torch.Tensor:
        calls.append(input)
        return input

    monkeypatch.setattr(nn.SyncBatchNorm, "forward", spy)
    assert torch.equal(ours(values), plain(values)) and not calls
    monkeypatch.setattr(batch_norm, "is_shared", lambda: True)
    assert ours(values) is values and len(calls) == 1
    assert torch.equal(ours.eval()(values), plain.eval()(values)) and len(calls) == 1
