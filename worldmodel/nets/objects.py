"""An encoder for videos of a fixed camera in which several things move: which pixels belong together, and where.

Legend: B clips, T frames, C channels, H = W pixels, I = B * T images, K objects, h = w cells of the assignment,
F features.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from worldmodel.nets.convolutions import Conv2d
from worldmodel.nets.deviation import follow_mean
from worldmodel.nets.encoders import pixel_weights


class ObjectsEncoder(nn.Module):
    """Assigns what differs from the mean frame to K objects, and keeps the share and the centre of each.

    The energy of a pixel is d / (d + HALF), where d is its squared deviation from the mean frame of training, by that
    pixel's variance. A small convolutional network assigns each place to one of K objects (softmax). The encoder's own
    loss is the mean squared distance of energy from the centre of its object: k-means (MacQueen 1967) in every frame,
    with a network that assigns. One network for all frames must tell objects apart by how they look and where they can
    be, so that an object is the same one in the next frame. Other losses do not reach the network.

    F = 3 K T features, not standardised: share, x and y of each object in each frame. An object that is absent has its
    centre in the middle. Frames above 64 px are first reduced to 64 px.
    """

    CHANNELS = 16
    LARGEST_PX = 64
    STRIDE = 2
    FLOOR = 0.5
    """Added to the variance of a pixel, relative to the mean over pixels: noise where nothing moves stays faint."""
    HALF = 2.0
    """Squared deviation, in variances, that has half of the largest energy: strong objects do not drown out faint ones.
    """
    PLACE = 0.3
    """Weight of places against looks before training. At 1, places may be all that is ever learned."""
    LARGEST = 5.0
    """Deviations that the network sees end here, in standard deviations."""

    mean_frame: Tensor
    mean_square: Tensor
    num_batches: Tensor

    def __init__(self, channels: int, num_frames: int, size_px: int, num_objects: int, width: float) -> None:
        super().__init__()
        self.size_px = min(size_px, self.LARGEST_PX)
        self.register_buffer("mean_frame", torch.zeros(channels, self.size_px, self.size_px))
        self.register_buffer("mean_square", torch.zeros(channels, self.size_px, self.size_px))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.int64))
        hidden = max(1, round(self.CHANNELS * width))
        self.layers = nn.Sequential(
            *_layer(2 * channels, hidden, 5, self.STRIDE), *_layer(hidden, hidden, 3, 1), *_layer(hidden, hidden, 3, 1)
        ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.assign = nn.Conv2d(hidden, num_objects, 1)
        nn.init.normal_(self.assign.weight, std=0.3)
        cells = -(-self.size_px // self.STRIDE)
        centres = 1.6 * torch.rand(num_objects, 2) - 0.8
        grid = pixel_weights(cells, cells, "moments", centres.device)[1:3].unflatten(1, (cells, cells))
        # At first an object is rather what is nearer to its point than to those of the others.
        self.place = nn.Parameter(-self.PLACE * (grid - centres[:, :, None, None]).square().sum(dim=1))
        self.num_features = 3 * num_objects * num_frames

    def forward(self, video: Tensor) -> Tensor:
        """Encode video [B, T, C, H, W] in [0, 1]: float32 features [B, F]."""
        return self.with_loss(video)[0]

    def with_loss(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Encode video [B, T, C, H, W] in [0, 1]: float32 features [B, F], and the encoder's own loss of each clip [B].

        In training the mean frame is updated first, by the clips of the ambient `global_batch`.
        """
        frames = rearrange(video, "b t c h w -> (b t) c h w").to(self.mean_frame.dtype)
        if frames.shape[-1] > self.size_px:
            frames = F.adaptive_avg_pool2d(frames, self.size_px)
        if self.training:
            self._update(rearrange(frames, "(b t) c h w -> b t c h w", t=video.shape[1]))
        deviation = frames - self.mean_frame
        variance = (self.mean_square - self.mean_frame.square()).clamp(min=0)
        scale = variance.mean() + 1e-6
        seen = deviation / scale.sqrt()
        seen = torch.cat([seen, seen.abs()], dim=1).clamp(-self.LARGEST, self.LARGEST)
        logits = self.assign(self.layers(seen.contiguous(memory_format=torch.channels_last))) + self.place
        with torch.autocast(video.device.type, enabled=False):
            shares = logits.to(self.mean_frame.dtype).softmax(dim=1)
            energy = (deviation.square() / (variance + self.FLOOR * scale)).mean(dim=1)
            energy = energy / (energy + self.HALF)
            mass, centres, spread = _clusters(shares, energy)
        features = torch.cat([mass[:, :, None], centres], dim=2).detach()
        by_clip = rearrange(features, "(b t) k f -> b (t k f)", t=video.shape[1])
        return by_clip, rearrange(spread, "(b t) -> b t", t=video.shape[1]).mean(dim=1)

    @torch.no_grad()
    def _update(self, frames: Tensor) -> None:
        self.num_batches += 1
        follow_mean(self.mean_frame, frames, self.num_batches)
        follow_mean(self.mean_square, frames.square(), self.num_batches)


def _layer(in_channels: int, out_channels: int, kernel: int, stride: int) -> list[nn.Module]:
    return [Conv2d(in_channels, out_channels, kernel, stride), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


def _clusters(shares: Tensor, energy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return share [I, K] and centre [I, K, 2] of objects, and the energy's squared distance [I] from its centre.

    shares: [I, K, h, w], of the objects in each cell.
    energy: [I, H, W], of pixels. Its moments within a cell are kept: centres are exact to a fraction of it.
    """
    height, width = energy.shape[1:]
    weights = pixel_weights(height, width, "moments", energy.device).to(energy).unflatten(1, (height, width))
    one, x, y, xx, _, yy = weights
    of_pixels = energy[:, None] * torch.stack([one, x, y, xx + yy])  # [I, 4, H, W]
    # Windows of equal size, so that each pixel counts once: those of adaptive pooling overlap at odd sizes.
    rows, columns = (-(-size // cells) for size, cells in zip((height, width), shares.shape[2:], strict=True))
    below, right = rows * shares.shape[2] - height, columns * shares.shape[3] - width
    cells = F.avg_pool2d(F.pad(of_pixels, (0, right, 0, below)), (rows, columns)).flatten(2)  # [I, 4, h * w]
    cells = cells / (cells[:, :1].sum(dim=2, keepdim=True) + 1e-6)
    moments = shares.flatten(2) @ cells.transpose(1, 2)  # [I, K, 4]
    mass = moments[:, :, 0]
    centres = moments[:, :, 1:3] / (mass[:, :, None] + ABSENT)
    spread = moments[:, :, 3] - mass * centres.square().sum(dim=2)
    return mass, centres, spread.sum(dim=1)


ABSENT = 1e-3
"""Share of a frame's energy below which an object counts as absent."""
