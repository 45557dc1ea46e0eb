"""Attentive pooling: learned queries read the tokens of a segment, instead of the mean over space.

Legend: B clips, G times (frames or tubelets), P patches of one time, E dimensions of a token.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from worldmodel.nets.vit import sincos_positions

NUM_QUERIES = 4
HEAD_DIM = 64
QUERY_STD = 0.02


class AttentivePool(nn.Module):
    """Cross-attention from a few learned queries to all tokens of a segment (V-JEPA's probe, arXiv 2404.08471).

    Tokens are normalised first. A learned embedding of their time and one of their place are added, which start from
    sines and cosines: a frozen backbone's tokens need not say where and when they are, and a forecast needs to know.
    The answers of the queries, side by side, are the features, F = NUM_QUERIES * E.
    """

    def __init__(self, dim: int, num_times: int, num_patches: int) -> None:
        super().__init__()
        self.num_heads = max(heads for heads in range(1, max(1, dim // HEAD_DIM) + 1) if dim % heads == 0)
        self.norm = nn.LayerNorm(dim)
        side = math.isqrt(num_patches)
        rows, columns = (side, side) if side * side == num_patches else (num_patches, 1)
        self.times = nn.Parameter(sincos_positions(num_times, 1, 1, dim)[:, None])
        self.places = nn.Parameter(sincos_positions(1, rows, columns, dim))
        self.queries = nn.Parameter(torch.randn(NUM_QUERIES, dim) * QUERY_STD)
        self.to_queries = nn.Linear(dim, dim)
        self.keys_values = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.num_features = NUM_QUERIES * dim

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool tokens [B, G, P, E]: features [B, F]."""
        placed = (self.norm(tokens) + self.times + self.places).flatten(1, 2)
        keys, values = rearrange(self.keys_values(placed), "b l (two h e) -> two b h l e", two=2, h=self.num_heads)
        queries = rearrange(self.to_queries(self.queries), "q (h e) -> h q e", h=self.num_heads)
        answers = F.scaled_dot_product_attention(queries.expand(len(tokens), -1, -1, -1), keys, values)
        return self.out(rearrange(answers, "b h q e -> b q (h e)")).flatten(1)
