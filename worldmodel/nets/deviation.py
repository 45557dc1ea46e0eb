"""An encoder for videos of a fixed camera: where, and how widely spread, frames differ from the mean frame.

Legend: B clips, T frames, C channels, H = W pixels, I = B * T images, M maps, F features.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from worldmodel.nets.encoders import pixel_weights
from worldmodel.nets.parallel import all_gather


class DeviationEncoder(nn.Module):
    """Moments of the deviation of each frame from the mean frame of training.

    The first map is the mean absolute deviation over channels, and `maps` further ones are the absolute values of
    learned 5x5 convolutions of the deviation. Of each map, to the powers 2 and 4, the mean, the centre and the second
    moments are kept, and standardised: F = 12 T (1 + maps). A high power makes the centre of a map that of what differs
    most. These features hold positions to a fraction of a pixel after minutes of video, and with several frames also
    velocities; a convolutional network needs far more video for that (docs/experiments.md).

    Args:
        maps: number of learned maps; more for more video.
    """

    POWERS = (2, 4)
    MOMENTUM = 0.01
    """Least weight of a new batch in the mean frame. Until then each batch counts alike."""
    FAINT = 0.01
    """A map is divided by its largest value plus this. Below, a difference is as likely to be noise."""

    mean_frame: Tensor
    num_batches: Tensor

    def __init__(self, channels: int, num_frames: int, size_px: int, maps: int = 0) -> None:
        super().__init__()
        self.register_buffer("mean_frame", torch.zeros(channels, size_px, size_px))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.int64))
        self.filters = nn.Conv2d(channels, maps, 5, padding=2, bias=False) if maps else None
        self.num_features = 6 * len(self.POWERS) * (1 + maps) * num_frames
        self.standardise = nn.BatchNorm1d(self.num_features, affine=False)

    def forward(self, video: Tensor) -> Tensor:
        """Encode video [B, T, C, H, W] in [0, 1]: float32 features [B, F].

        In training the mean frame is updated first, by the clips of the ambient `global_batch`.
        """
        with torch.autocast(video.device.type, enabled=False):
            video = video.float()
            if self.training:
                self._update(video)
            deviation = rearrange(video - self.mean_frame, "b t c h w -> (b t) c h w")
            maps = deviation.abs().mean(dim=1, keepdim=True)
            if self.filters is not None:
                maps = torch.cat([maps, self.filters(deviation).abs()], dim=1)
            moments = torch.cat([_moments(maps, power, self.FAINT) for power in self.POWERS], dim=1)
            return self.standardise(rearrange(moments, "(b t) f -> b (t f)", b=len(video)))

    @torch.no_grad()
    def _update(self, video: Tensor) -> None:
        batch_mean = all_gather(video.mean(dim=1)).mean(dim=0)
        self.num_batches += 1
        self.mean_frame.lerp_(batch_mean, (1 / self.num_batches).clamp(min=self.MOMENTUM))


def _moments(maps: Tensor, power: int, faint: float) -> Tensor:
    """Return mean, centre and second moments of maps [I, M, H, W] >= 0, relative to their maximum, to a power.

    Returns: [I, 6 * M].
    """
    height, width = maps.shape[2:]
    pixels = maps.flatten(2)
    weights = (pixels / (pixels.amax(dim=2, keepdim=True) + faint)) ** power
    coordinates = pixel_weights(height, width, "moments", maps.device)[1:]
    even = 0.02 / (height * width)  # of an empty map, the centre is in the middle
    mass = weights.mean(dim=2, keepdim=True)
    shares = (weights + even) / (weights + even).sum(dim=2, keepdim=True)
    return torch.cat([mass, shares @ coordinates.T], dim=2).flatten(1)
