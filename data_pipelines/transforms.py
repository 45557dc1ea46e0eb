"""Frames as the model wants them: on its device, float [B, T, C, H, W], cut into segments."""

import torch
from einops import rearrange


def on_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Without a wait: to a GPU by way of pinned memory, as a copy from other memory waits for all that it has to do."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def to_float(video: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 or floating point 0..1, any shape -> float32 in [0, 1], same shape and device."""
    if video.dtype == torch.uint8:
        return video.to(torch.float32).div_(255)
    assert video.is_floating_point(), f"frames are uint8 or floating point, not {video.dtype}"
    return video.to(torch.float32)


def split_segments(video: torch.Tensor, num_segments: int) -> torch.Tensor:
    """[B, S * T, C, H, W] -> consecutive segments in order of time, [B, S, T, C, H, W] with S = num_segments."""
    assert video.shape[1] % num_segments == 0, f"{video.shape[1]} frames are no {num_segments} equal segments"
    return rearrange(video, "b (s t) c h w -> b s t c h w", s=num_segments)
