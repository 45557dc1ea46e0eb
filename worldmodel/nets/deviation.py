"""An encoder for videos of a fixed camera: where, and how widely spread, frames differ from the mean frame.

Legend: B clips, T frames, C channels, H = W pixels, I = B * T images, F features.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from worldmodel.nets.encoders import pixel_weights
from worldmodel.nets.parallel import all_gather


class DeviationEncoder(nn.Module):
    """Moments of the deviation of each frame from the mean frame of training.

    The map of a frame is its absolute deviation, a mean over channels. Of its powers 2 and 4, the mean, the centre and
    the second moments are kept, and standardised: F = 12 T. A high power makes the centre that of what differs most.
    These features have no weights to learn. They hold positions to a fraction of a pixel from a minute of video on, and
    with several frames also velocities; convolutional networks need far more video for that (docs/experiments.md).
    """

    POWERS = (2, 4)
    FAINT = 0.01
    """A map is divided by its largest value plus this. Below, a difference is as likely to be noise."""

    mean_frame: Tensor
    num_batches: Tensor

    def __init__(self, channels: int, num_frames: int, size_px: int) -> None:
        super().__init__()
        self.register_buffer("mean_frame", torch.zeros(channels, size_px, size_px))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.int64))
        self.num_features = 6 * len(self.POWERS) * num_frames
        self.standardise = nn.BatchNorm1d(self.num_features, affine=False)

    def forward(self, video: Tensor) -> Tensor:
        """Encode video [B, T, C, H, W] in [0, 1]: float32 features [B, F].

        In training the mean frame is updated first, by the clips of the ambient `global_batch`.
        """
        with torch.autocast(video.device.type, enabled=False):
            video = video.to(self.mean_frame.dtype)
            if self.training:
                self.num_batches += 1
                follow_mean(self.mean_frame, video, self.num_batches)
            maps = rearrange((video - self.mean_frame).abs().mean(dim=2), "b t h w -> (b t) h w")
            moments = torch.cat([_moments(maps, power, self.FAINT) for power in self.POWERS], dim=1)
            return self.standardise(rearrange(moments, "(b t) f -> b (t f)", t=video.shape[1]))


@torch.no_grad()
def follow_mean(mean: Tensor, frames: Tensor, num_batches: Tensor) -> None:
    """Move the mean frame [C, H, W] to that of `frames` [B, T, C, H, W] of all processes, batch number `num_batches`.

    Batches count alike, until the weight of a new one is MOMENTUM.
    """
    of_batch = all_gather(frames.mean(dim=1)).mean(dim=0)
    mean.lerp_(of_batch, (1 / num_batches).clamp(min=MOMENTUM))


MOMENTUM = 0.01
"""Least weight of a new batch in the mean frame."""


def _moments(maps: Tensor, power: int, faint: float) -> Tensor:
    """Return mean, centre and second moments of a power of maps [I, H, W] >= 0, relative to their maximum: [I, 6]."""
    height, width = maps.shape[1:]
    pixels = maps.flatten(1)
    weights = (pixels / (pixels.amax(dim=1, keepdim=True) + faint)) ** power
    coordinates = pixel_weights(height, width, "moments", maps.device)[1:].to(maps)
    even = weights + EVEN / (height * width)
    return torch.cat([weights.mean(dim=1, keepdim=True), even / even.sum(dim=1, keepdim=True) @ coordinates.T], dim=1)


EVEN = 0.02
"""Mass that is spread evenly over a map, so that the centre of an empty one is in the middle."""
