"""Frames in the form that a model takes: on its device, float [B, T, C, H, W], split into segments."""

import torch
from einops import rearrange


def on_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a tensor to a device without waiting: to a GPU through pinned memory, as other copies synchronise."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def to_float(video: torch.Tensor) -> torch.Tensor:
    """Convert uint8 0..255 or floating point 0..1 of any shape to float32 in [0, 1], on the same device."""
    if video.dtype == torch.uint8:
        return video.to(torch.float32).div_(255)
    assert video.is_floating_point(), f"frames must be uint8 or floating point, not {video.dtype}"
    return video.to(torch.float32)


def split_segments(video: torch.Tensor, num_segments: int) -> torch.Tensor:
    """Split clips [B, S * T, ...] into S = num_segments consecutive segments, [B, S, T, ...]."""
    assert video.shape[1] % num_segments == 0, (
        f"{video.shape[1]} frames do not divide into {num_segments} equal segments"
    )
    return rearrange(video, "b (s t) ... -> b s t ...", s=num_segments)
