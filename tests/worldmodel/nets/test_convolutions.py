"""The convolutions that stand in for oneDNN's where those are at fault; a processor with AMX is pretended."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import REPO, normal
from tests.worldmodel.config.test_mistakes import CONFIGS
from worldmodel.config import Conv3dConfig, load_config
from worldmodel.nets import convolutions
from worldmodel.nets.convolutions import Conv2d, Conv3d, bits_on_cpu, conv2d_of_centre, conv3d_by_conv2d, splits_rows
from worldmodel.nets.encoders import Conv3dEncoder

LAYERS = [
    (3, 8, (1, 3, 3), 2),
    (1, 4, (1, 3, 3), 2),
    (8, 16, (1, 3, 3), 1),
    (16, 24, (3, 1, 1), 1),
    (5, 7, (1, 1, 1), 1),
]


class DimsOfWeights(TorchDispatchMode):
    """Records the number of dimensions of each convolution's weights, of the forward and of the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.forward: list[int] = []
        self.backward: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.forward.append(args[1].ndim)
        if func is torch.ops.aten.convolution_backward.default:
            self.backward.insert(0, args[2].ndim)
        return func(*args, **kwargs or {})


@contextmanager
def amx(monkeypatch: pytest.MonkeyPatch, present: bool) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(convolutions, "has_amx", lambda: present)
        yield


def dims_of_weights(encoder: Conv3dEncoder, size_px: int, precision: torch.dtype) -> list[int]:
    """Dimensions of the five convolutions of a step: 4 of images, 5 of volumes."""
    with DimsOfWeights() as dims, torch.autocast("cpu", precision, enabled=precision != torch.float32):
        encoder(torch.zeros(2, 3, 3, size_px, size_px)).sum().backward()
    assert dims.forward == dims.backward
    return dims.forward


@pytest.mark.parametrize(
    ("size_px", "width", "dims"),
    [
        (64, 1.0, [5, 5, 5, 5, 5]),
        (64, 0.25, [5, 5, 5, 5, 5]),
        (144, 0.25, [4, 5, 5, 5, 5]),
        (160, 0.125, [4, 5, 5, 5, 5]),
        (160, 0.5, [4, 4, 4, 4, 4]),
        (224, 0.25, [4, 4, 4, 4, 5]),
    ],
)
def test_layers_that_amx_would_split_are_convolutions_of_images(
    size_px: int, width: float, dims: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with amx(monkeypatch, present=True):
        encoder = Conv3dEncoder(3, 3, width)
    assert dims_of_weights(encoder, size_px, torch.bfloat16) == dims


@pytest.mark.parametrize(
    ("present", "precision", "dims"),
    [
        (True, torch.float32, [5, 5, 5, 5, 5]),
        (False, torch.float32, [5, 5, 5, 5, 5]),
        (False, torch.bfloat16, [5, 5, 4, 4, 5]),  # kernels over time are quicker so
    ],
)
def test_without_amx_and_in_fp32_no_layer_is_faulty(
    present: bool, precision: torch.dtype, dims: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with amx(monkeypatch, present):
        encoder = Conv3dEncoder(3, 3, 0.25)
    assert dims_of_weights(encoder, 224, precision) == dims


@pytest.mark.parametrize("width", [0.125, 0.25, 0.5, 1.0])
def test_every_first_layer_above_144_px_is_avoided(width: float) -> None:
    """Those are reported to crash at quarter width; wider ones split sooner."""
    first = Conv3dEncoder(3, 1, width).layers[0]
    assert all(splits_rows(first, size_px, size_px) for size_px in range(145, 257))


def test_more_channels_and_more_pixels_split_no_later() -> None:
    narrow, wide = Conv3d(64, 64, (3, 1, 1), 1), Conv3d(128, 128, (3, 1, 1), 1)
    splits = [(splits_rows(narrow, size_px, size_px), splits_rows(wide, size_px, size_px)) for size_px in range(8, 257)]
    assert splits[0] == (False, False) and splits[-1] == (True, True)
    assert all(by_wide >= by_narrow for by_narrow, by_wide in splits)


def test_no_layer_of_the_shipped_configs_is_replaced() -> None:
    """Their weights stay bit for bit what they are."""
    checked = 0
    for path in CONFIGS:
        config = load_config(REPO / "configs" / path)
        if not isinstance(config.model.encoder, Conv3dConfig):
            continue
        encoder = Conv3dEncoder(config.data.channels, config.data.num_frames, config.model.encoder.width)
        size_px = config.data.size_px
        for layer in encoder.layers:
            if isinstance(layer, Conv3d):
                assert not splits_rows(layer, size_px, size_px), (path, layer)
                size_px = (size_px - 1) // layer.stride[1] + 1
                checked += 1
    assert checked >= 50


def gradients(conv: nn.Conv3d, volume: Tensor, images: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the gradients of weights and input."""
    conv.weight.grad = None
    volume = volume.clone().requires_grad_()
    out = conv3d_by_conv2d(conv, volume) if images else nn.Conv3d.forward(conv, volume)
    (out * normal(2, *out.shape).to(out.dtype)).sum().backward()
    assert conv.weight.grad is not None and volume.grad is not None
    assert not images or out.is_contiguous(memory_format=torch.channels_last_3d)
    return out.detach(), conv.weight.grad, volume.grad


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 33, 30), (1, 1, 8, 9)], ids=str)
def test_both_ways_compute_the_same(
    layer: tuple[int, int, tuple[int, int, int], int],
    precision: torch.dtype,
    tolerance: float,
    shape: tuple[int, int, int, int],
) -> None:
    torch.manual_seed(0)
    conv = Conv3d(*layer).to(precision, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    volume = normal(1, shape[0], layer[0], *shape[1:]).to(precision).contiguous(memory_format=torch.channels_last_3d)
    for ours, theirs in zip(gradients(conv, volume, images=True), gradients(conv, volume, images=False), strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, atol=tolerance * scale, rtol=0)


def test_weights_are_those_of_a_plain_conv3d() -> None:
    torch.manual_seed(0)
    ours = Conv3d(3, 8, (1, 3, 3), 2).state_dict()
    torch.manual_seed(0)
    theirs = nn.Conv3d(3, 8, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False).state_dict()
    assert ours.keys() == theirs.keys() == {"weight"} and torch.equal(ours["weight"], theirs["weight"])


def test_bits_on_the_cpu_are_those_of_autocast() -> None:
    values = torch.zeros(1)
    assert (bits_on_cpu(values), bits_on_cpu(values.bfloat16()), bits_on_cpu(values.half())) == (32, 16, 16)
    assert bits_on_cpu(values.to("meta")) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert bits_on_cpu(values) == 16
        with torch.autocast("cpu", enabled=False):
            assert bits_on_cpu(values) == 32


def output_and_gradients(layer: nn.Module, values: Tensor, in_bf16: bool) -> list[Tensor]:
    layer.zero_grad()
    values = values.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
        out = layer(values)
    (out.float() * normal(2, *out.shape)).sum().backward()
    return [tensor.detach().float() for tensor in (out, *(w.grad for w in layer.parameters()), values.grad)]


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4])
def test_gradients_over_time_in_bf16_are_those_in_fp32(num_frames: int) -> None:
    """Of two frames, oneDNN's is off by as much as it is long, or NaN, by what is in memory behind the clip."""
    torch.manual_seed(0)
    conv = Conv3d(16, 32, (3, 1, 1), 1).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    volume = normal(1, 4, 16, num_frames, 8, 8).contiguous(memory_format=torch.channels_last_3d)
    assert_close(output_and_gradients(conv, volume, in_bf16=True), output_and_gradients(conv, volume, in_bf16=False))


@pytest.mark.parametrize("size_px", [1, 2, 3])
def test_strided_gradients_of_a_few_pixels_in_bf16_are_those_in_fp32(size_px: int) -> None:
    """Of one pixel, oneDNN's is NaN or far off, by what was in memory before."""
    torch.manual_seed(0)
    conv = Conv2d(16, 32, 3, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = normal(1, 4, 16, size_px, size_px).contiguous(memory_format=torch.channels_last)
    assert_close(output_and_gradients(conv, images, in_bf16=True), output_and_gradients(conv, images, in_bf16=False))


@pytest.mark.parametrize("size_px", [7, 8])
@pytest.mark.parametrize(("channels", "strided"), [(8, False), (15, False), (16, True)])
def test_strided_kernels_of_a_pixel_over_few_channels_lose_their_stride(
    size_px: int, channels: int, strided: bool
) -> None:
    """With one, oneDNN's gradient in fp32 writes behind its buffer, which may go unnoticed for long."""
    conv = Conv2d(channels, 32, 1, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = normal(1, 4, channels, size_px, size_px).contiguous(memory_format=torch.channels_last)
    strides: list[list[int]] = []

    class Strides(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.convolution.default:
                strides.append(args[3])
            return func(*args, **kwargs or {})

    with Strides():
        out = conv(images)
    assert strides == [[2, 2] if strided else [1, 1]]
    expected = torch.einsum("bihw,oi->bohw", images[:, :, ::2, ::2], conv.weight[:, :, 0, 0])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(conv2d_of_centre(conv, images), expected, atol=1e-5, rtol=1e-5)


def assert_close(in_bf16: list[Tensor], in_fp32: list[Tensor]) -> None:
    for ours, theirs in zip(in_bf16, in_fp32, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.02 * theirs.abs().max().item(), rtol=0)
