"""A decoder from embeddings to frames, for pictures alone: no loss of a world model ever sees it.

An embedding that predicts well need not say where an object is or what it looks like, as long as it says how it moves.
So the decoder also sees one picture: the last frame before the segment that it decodes. A still picture has no motion:
all motion must come from the embedding. A frame is composed of that picture, of the picture moved by displacements that
the embedding determines, and of a picture drawn from the embedding alone. Moving a picture by a learned distribution of
displacements follows Finn et al. (arXiv 1605.07157).

Legend: B embeddings, D embedding dimensions, T frames of a segment, C channels, P pixels of a decoded side, K movers, S
sources that a frame is composed of (K + 2).
"""

from math import ceil

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

MAX_DECODED_PX = 64
FIRST_SIDE_PX = 4
HIDDEN_DIM = 512
CHANNELS = (128, 96, 64, 32)
"""Channels of the feature map with the first side, and after each doubling."""
NORM_GROUPS = 8
NUM_MOVERS = 3


class Decoder(nn.Module):
    """Decode embeddings [B, D] into the frames [B, T, C, P, P] of the segments that they are of.

    P is `decoded_px(size_px)`: frames above 64 px are decoded at 64 px. The buffers are set before training and
    belong to the weights: the mean picture, and the mean and the standard deviation of each embedding dimension.
    """

    def __init__(self, embedding_dim: int, num_frames: int, channels: int, size_px: int) -> None:
        super().__init__()
        self.side_px = decoded_px(size_px)
        self.sides_px = feature_sides(self.side_px)
        widths, first_px = CHANNELS[: len(self.sides_px)], self.sides_px[0]
        self.hidden = nn.Sequential(nn.Linear(embedding_dim, HIDDEN_DIM), nn.SiLU())
        self.first = nn.Linear(HIDDEN_DIM, widths[0] * first_px * first_px)
        pairs = zip((widths[0], *widths), widths, strict=False)
        self.blocks = nn.ModuleList(_block(before, after) for before, after in pairs)
        # A convolution at half of the side gives four values for each of its pixels: a fourth of the cost.
        self.drawn = nn.Conv2d(widths[-1], 4 * num_frames * channels, 3, padding=1)
        num_sources = NUM_MOVERS + 2
        num_seen = channels * (1 + num_frames * (NUM_MOVERS + 1))
        self.weights = nn.Sequential(
            _block(num_seen + widths[-1], 32), nn.Conv2d(32, 4 * num_frames * num_sources, 3, padding=1)
        )
        self.movers = Movers(num_frames, self.side_px)
        self.mean_picture: Tensor
        self.centre: Tensor
        self.scale: Tensor
        self.register_buffer("mean_picture", torch.zeros(num_frames, channels, self.side_px, self.side_px))
        self.register_buffer("centre", torch.zeros(embedding_dim))
        self.register_buffer("scale", torch.ones(embedding_dim))

    def forward(self, embedding: Tensor, before: Tensor) -> Tensor:
        """Decode embeddings [B, D] after the frames before them [B, C, P, P] in [0, 1]: frames [B, T, C, P, P].

        The frames are in about the same range.
        """
        hidden = self.hidden((embedding - self.centre) / self.scale)
        maps = self.first(hidden).unflatten(1, (-1, self.sides_px[0], self.sides_px[0]))
        maps = maps.contiguous(memory_format=torch.channels_last)
        for side_px, block in zip(self.sides_px, self.blocks, strict=True):
            maps = block(maps if maps.shape[-1] == side_px else F.interpolate(maps, size=side_px))
        num_frames = len(self.mean_picture)
        drawn = self.mean_picture + F.pixel_shuffle(self.drawn(maps), 2).float().unflatten(1, (num_frames, -1))
        moved = self.movers(hidden, before)
        sources = torch.stack([*moved.unbind(1), drawn, before[:, None].expand_as(drawn)], dim=1)
        seen = torch.cat([sources[:, :-1].flatten(1, 3), before], dim=1)
        weights = F.pixel_shuffle(self.weights(torch.cat([F.avg_pool2d(seen, 2), maps], dim=1)), 2).float()
        weights = rearrange(weights, "b (t s) h w -> b s t 1 h w", t=num_frames).softmax(dim=1)
        return (weights * sources).sum(dim=1)


class Movers(nn.Module):
    """Move a picture by K displacements for each frame.

    Each displacement is a distribution over whole pixels, the product of one along x and one along y.
    """

    def __init__(self, num_frames: int, side_px: int) -> None:
        super().__init__()
        self.shape = (NUM_MOVERS, num_frames, 2, 2 * side_px - 1)
        shift_px = torch.arange(1 - side_px, side_px)
        self.logits = nn.Linear(HIDDEN_DIM, NUM_MOVERS * num_frames * 2 * len(shift_px))
        with torch.no_grad():  # small displacements at first
            start = -0.5 * (shift_px / (side_px / 16)).square()
            self.logits.bias.add_(start.repeat(NUM_MOVERS * num_frames * 2))
        # Entry [i, j] is the place of the displacement from pixel j to pixel i.
        pixels = torch.arange(side_px)
        self.places: Tensor
        self.register_buffer("places", pixels[:, None] - pixels + side_px - 1, persistent=False)

    def forward(self, hidden: Tensor, before: Tensor) -> Tensor:
        """hidden [B, HIDDEN_DIM], before [B, C, P, P] -> moved pictures [B, K, T, C, P, P]."""
        logits = self.logits(hidden).float().unflatten(1, self.shape)
        with torch.autocast(before.device.type, enabled=False):  # 8 bits of a pixel are too few
            moves = logits.softmax(dim=-1)[..., self.places]
            moves = moves / (moves.sum(dim=-1, keepdim=True) + 1e-4)  # what comes from outside is not dark
            along_x, along_y = moves[:, :, :, None].unbind(4)
            return along_y @ before[:, None, None] @ along_x.mT


def _block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False), nn.GroupNorm(NORM_GROUPS, after), nn.SiLU()
    )


def decoded_px(size_px: int) -> int:
    """Return the side of decoded frames: that of the videos, at most MAX_DECODED_PX, rounded up to an even number."""
    return min(size_px + size_px % 2, MAX_DECODED_PX)


def feature_sides(side_px: int) -> list[int]:
    """Return the sides of the feature maps, from at most FIRST_SIDE_PX to half of the frames, about doubling."""
    sides = [side_px // 2]
    while sides[0] > FIRST_SIDE_PX:
        sides.insert(0, ceil(sides[0] / 2))
    return sides
