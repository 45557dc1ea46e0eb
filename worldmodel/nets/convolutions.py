"""Convolutions that avoid wrong weight gradients of oneDNN, which PyTorch calls on CPUs.

oneDNN 3.12 (PyTorch 2.13) has four faults, listed by the name that ONEDNN_VERBOSE=1 prints.
benchmarks/probe_conv3d.py tries every shape.

- `brgconv_bwd_w:*amx*`, 16 bits, volumes. It copies the rows of a frame in blocks into a buffer that holds one block
  per frame, but places each block as if the buffer held the whole height. If a frame takes more than one block, it
  writes past the end of the buffer: a segmentation fault, or wrong gradients.
- `jit_bf16:avx512_core_bf16`, volumes of two frames, a kernel of three over time. It reads past the last frame.
- `jit_bf16:avx512_core_bf16`, images of one pixel, a larger kernel with a stride. It reads uninitialised memory.
- `jit_1x1:avx512_core` and `jit_1x1:avx2`, fp32, channels-last, a kernel of one pixel with a stride, fewer than 16 (8)
  channels. It writes past the end of its buffer.

Legend: B clips or images, C channels, T frames, H = W pixels.
"""

from math import ceil

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from worldmodel.nets.cpu import has_amx

CACHE_BYTES = 0.8 * 0.75 * 2**20
"""Part of the L2 cache that oneDNN fills with a block of rows, of 1 MiB. Processors with AMX have 2 MiB per core."""


class Conv3d(nn.Conv3d):
    """nn.Conv3d whose kernel extends over space, (1, k, k), or over time, (k, 1, 1), padded by k // 2, without bias.

    Shapes with a faulty oneDNN gradient are computed as a convolution of images, with the same products. So is a kernel
    over time in 16 bits without AMX, because oneDNN takes two thirds of the time for it there (docs/experiments.md).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: tuple[int, int, int], stride_px: int) -> None:
        assert kernel_size[0] == 1 or (*kernel_size[1:], stride_px) == (1, 1, 1), "over space or over time"
        padding = (kernel_size[0] // 2, kernel_size[1] // 2, kernel_size[2] // 2)
        stride = (1, stride_px, stride_px)
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.has_amx = has_amx()

    def forward(self, volume: Tensor) -> Tensor:
        """volume [B, C, T, H, W] -> [B, C', T, H', W']."""
        num_frames, height_px, width_px = volume.shape[2:]
        if self.has_amx:
            by_images = skips_a_frame(self, num_frames) or splits_rows(self, height_px, width_px)
        else:
            by_images = self.kernel_size[0] > 1
        return conv3d_by_conv2d(self, volume) if by_images and bits_on_cpu(volume) == 16 else super().forward(volume)


class Conv2d(nn.Conv2d):
    """nn.Conv2d with a square kernel, padded by k // 2, without bias.

    Shapes with a faulty oneDNN gradient are computed by a kernel of one pixel without a stride, with the same products.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_px: int, stride_px: int) -> None:
        super().__init__(in_channels, out_channels, kernel_px, stride_px, kernel_px // 2, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] -> [B, C', H', W']."""
        faults = {16: has_one_strided_pixel(self, *images.shape[2:]), 32: has_few_strided_channels(self)}
        return conv2d_of_centre(self, images) if faults.get(bits_on_cpu(images)) else super().forward(images)


def bits_on_cpu(values: Tensor) -> int:
    """Return the bits per number in which a convolution of `values` runs on the CPU; 0 on other devices."""
    if values.device.type != "cpu":
        return 0
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else values.dtype
    return 8 * dtype.itemsize


def skips_a_frame(conv: nn.Conv3d, num_frames: int) -> bool:
    """Return True if a kernel over time is longer than the clip, of two frames or more."""
    return 1 < num_frames < conv.kernel_size[0]


def splits_rows(conv: nn.Conv3d, height_px: int, width_px: int) -> bool:
    """Return True if oneDNN's AMX weight gradient may split the rows of a frame into blocks.

    The estimate follows oneDNN's choice (`init_conf_bwd_w`) and errs on the safe side: one thread and a small cache.
    """
    kernel_px, stride_px = conv.kernel_size[1], conv.stride[1]
    if kernel_px == stride_px == 1 and width_px <= 28:
        return False  # oneDNN treats the frame as one row
    out_height_px, out_width_px = ((px - 1) // stride_px + 1 for px in (height_px, width_px))
    in_width_px = ceil((width_px + 2 * (kernel_px // 2)) / stride_px)
    # Two bytes per value and 16 channels per block, stored twice: as they come, and in the order of AMX.
    in_row_bytes = 64 * ceil(conv.in_channels / 16) * 32 * ceil(in_width_px / 32) * stride_px
    out_row_bytes = 64 * ceil(conv.out_channels / 16) * 32 * ceil(out_width_px / 32)
    rows = (CACHE_BYTES - kernel_px * in_row_bytes) / (in_row_bytes + out_row_bytes)
    return rows < out_height_px


def conv3d_by_conv2d(conv: nn.Conv3d, volume: Tensor) -> Tensor:
    """Compute `conv` by a convolution of images: [B, C, T, H, W] -> [B, C', T, H', W'].

    A kernel over space sees B * T frames, a kernel over time B images of T rows and H * W columns. A channels-last
    `volume` is not copied.
    """
    (kernel_frames, kernel_px, _), stride_px = conv.kernel_size, conv.stride[1]
    if kernel_frames == 1:
        frames = rearrange(volume, "b c t h w -> (b t) c h w")
        out = F.conv2d(frames, conv.weight.squeeze(2), stride=stride_px, padding=kernel_px // 2)
        return rearrange(out, "(b t) c h w -> b c t h w", b=volume.shape[0])
    out = F.conv2d(volume.flatten(3), conv.weight.squeeze(4), padding=(kernel_frames // 2, 0))
    return out.unflatten(3, volume.shape[3:])


def has_one_strided_pixel(conv: nn.Conv2d, height_px: int, width_px: int) -> bool:
    """Return True if a kernel of more than one pixel strides over an image of one pixel."""
    return (height_px, width_px) == (1, 1) and conv.kernel_size[0] > 1 and conv.stride[0] > 1


def has_few_strided_channels(conv: nn.Conv2d) -> bool:
    """Return True if a kernel of one pixel strides over fewer channels than a register holds."""
    return conv.kernel_size[0] == 1 and conv.stride[0] > 1 and conv.in_channels < 16


def conv2d_of_centre(conv: nn.Conv2d, images: Tensor) -> Tensor:
    """Compute `conv` if only the kernel's centre meets a pixel: [B, C, H, W] -> [B, C', H', W']."""
    centre_px, stride_px = conv.kernel_size[0] // 2, conv.stride[0]
    centre = conv.weight[:, :, centre_px : centre_px + 1, centre_px : centre_px + 1]
    met = images[:, :, ::stride_px, ::stride_px].contiguous(memory_format=torch.channels_last)
    return F.conv2d(met, centre)
