"""A vision transformer for real video: tubelets of patches -> tokens -> features.

Legend: B clips, T frames, C channels, H = W pixels, L tokens, of which S at each of L / S times, E dimensions of a
token, F = E * L / S features.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class VitSize(NamedTuple):
    dim: int
    num_blocks: int
    num_heads: int


VIT_SIZES = {
    "vit_tiny": VitSize(192, 12, 3),
    "vit_small": VitSize(384, 12, 6),
    "vit_base": VitSize(768, 12, 12),
    "vit_large": VitSize(1024, 24, 16),
}
"""The sizes of DeiT (arXiv 2012.12877, table 1), and the large one of ViT (arXiv 2010.11929, table 1)."""
MLP_RATIO = 4
NORM_EPS = 1e-6


class VitEncoder(nn.Module):
    """A vision transformer (arXiv 2010.11929) with attention between all tokens, over space and time.

    A token is a patch of `patch_px` x `patch_px` pixels in two successive frames, or in one if T is odd. Fixed sines
    and cosines encode its position (V-JEPA, arXiv 2404.08471). The features are the means over space of the last
    tokens, one per time.

    Args:
        checkpoint_activations: recompute the inside of each block in the backward pass instead of storing it. That
            takes far less memory and one extra forward pass.
    """

    positions: Tensor

    def __init__(
        self,
        size: VitSize,
        channels: int,
        num_frames: int,
        size_px: int,
        patch_px: int,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        assert size_px % patch_px == 0, "the config is checked for this"
        self.patch_px = patch_px
        self.tubelet_frames = 2 if num_frames % 2 == 0 else 1
        self.checkpoint_activations = checkpoint_activations
        self.num_times = num_frames // self.tubelet_frames
        side = size_px // patch_px
        self.patches = nn.Linear(self.tubelet_frames * channels * patch_px**2, size.dim)
        self.blocks = nn.ModuleList(Block(size.dim, size.num_heads) for _ in range(size.num_blocks))
        self.norm = nn.LayerNorm(size.dim, NORM_EPS)
        self.register_buffer("positions", sincos_positions(self.num_times, side, side, size.dim), persistent=False)
        self.num_features = size.dim * self.num_times
        self.apply(_initialise)

    def forward(self, video: Tensor) -> Tensor:
        """Encode video [B, T, C, H, W] in [0, 1]: features [B, F]."""
        tokens = self.tokens(video)
        return rearrange(tokens, "b (t s) e -> b t s e", t=self.num_times).mean(dim=2).flatten(1)

    def tokens(self, video: Tensor) -> Tensor:
        """Return the last tokens [B, L, E] of video [B, T, C, H, W] in [0, 1], ordered by time, row and column."""
        patches = rearrange(
            2 * video - 1,
            "b (p t) c (h i) (w j) -> b (p h w) (t c i j)",
            t=self.tubelet_frames,
            i=self.patch_px,
            j=self.patch_px,
        )
        tokens = self.patches(patches) + self.positions
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        return self.norm(tokens)


def vit_encoder(
    name: str, channels: int, num_frames: int, size_px: int, patch_px: int, checkpoint_activations: bool
) -> VitEncoder:
    """Build the encoder of a size of VIT_SIZES."""
    return VitEncoder(VIT_SIZES[name], channels, num_frames, size_px, patch_px, checkpoint_activations)


class Block(nn.Module):
    """Attention and an MLP, each with a layer norm before it and a shortcut (arXiv 2010.11929, equations 2 and 3)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(dim, NORM_EPS)
        self.queries_keys_values = nn.Linear(dim, 3 * dim)
        self.attention_out = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim, NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(dim, MLP_RATIO * dim), nn.GELU(), nn.Linear(MLP_RATIO * dim, dim))

    def forward(self, tokens: Tensor, is_attended: Tensor | None = None) -> Tensor:
        """Transform tokens [B, L, E]: [B, L, E].

        With is_attended, bool [B, 1, 1, L], tokens attend only to those for which it is True.
        """
        tokens = tokens + self._attend(self.attention_norm(tokens), is_attended)
        return tokens + self.mlp(self.mlp_norm(tokens))

    def _attend(self, tokens: Tensor, is_attended: Tensor | None) -> Tensor:
        queries, keys, values = rearrange(
            self.queries_keys_values(tokens), "b l (three heads e) -> three b heads l e", three=3, heads=self.num_heads
        ).unbind()
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=is_attended)
        return self.attention_out(rearrange(attended, "b heads l e -> b l (heads e)"))


def sincos_positions(num_times: int, num_rows: int, num_columns: int, dim: int) -> Tensor:
    """Encode positions: [num_times * num_rows * num_columns, dim].

    Time, row and column have a third of the dimensions each. A third holds sin(x w) and cos(x w) of a coordinate x, for
    w from 1 down to almost 1 / 10000 (Vaswani et al., arXiv 1706.03762, section 3.5). It is rounded up to an even
    number of dimensions; columns have the remaining ones.
    """
    third = 2 * math.ceil(dim / 6)
    coordinates = torch.meshgrid(
        *(torch.arange(length, dtype=torch.float64) for length in (num_times, num_rows, num_columns)), indexing="ij"
    )
    encoded = [
        _sincos(along.flatten(), part) for along, part in zip(coordinates, (third, third, dim - 2 * third), strict=True)
    ]
    return torch.cat(encoded, dim=1).float()


def _sincos(coordinate: Tensor, dim: int) -> Tensor:
    frequencies = 10_000.0 ** (-torch.arange(dim // 2, dtype=coordinate.dtype) / (dim // 2))
    angles = coordinate[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _initialise(module: nn.Module) -> None:
    """Initialise as ViT's published code does: Glorot's uniform weights, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
