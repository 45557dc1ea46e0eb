"""Editors t(z, r): from the embedding of the past and the latent to the embedding of a future.

An editor may end in a predictor, an MLP that only the prediction passes through. BYOL and related objectives need that
asymmetry.

Legend: B clips, D embedding dimensions, R latent dimensions. The editor's r also holds the scene code, the summary of
the history and the action, if the model has them.
"""

from typing import Protocol

import torch
from einops import einsum
from torch import Tensor, nn

from worldmodel.config import Norm
from worldmodel.nets.encoders import mlp


class MlpEditor(nn.Module):
    """t([f(x), r]), an MLP with two hidden layers (AdaSSL, arXiv 2602.02381, appendix D.5).

    The MLP is also the predictor. With latent_dim 0 it is BYOL's: one future for each past.
    """

    def __init__(self, embedding_dim: int, hidden_dim: int, latent_dim: int, norm: Norm = "batch") -> None:
        super().__init__()
        self.net = mlp([embedding_dim + latent_dim, hidden_dim, hidden_dim, embedding_dim], norm=norm)

    def forward(self, context: Tensor, r: Tensor) -> Tensor:
        """Edit context [B, D] by r [B, R]: [B, D]."""
        return self.net(torch.cat([context, r], dim=-1))


class ResidualEditor(nn.Module):
    """t = f(x) + MLP([f(x), r]): small changes per step, which suit planning over many steps."""

    def __init__(self, embedding_dim: int, hidden_dim: int, latent_dim: int, norm: Norm = "batch") -> None:
        super().__init__()
        self.net = mlp([embedding_dim + latent_dim, hidden_dim, hidden_dim, embedding_dim], norm=norm)

    def forward(self, context: Tensor, r: Tensor) -> Tensor:
        """Edit context [B, D] by r [B, R]: [B, D]."""
        return context + self.net(torch.cat([context, r], dim=-1))


class BlocksEditor(nn.Module):
    """t = f(x) + W [f(x), r] + g([f(x), r]), where g is a residual network.

    g has a linear layer, `num_blocks` blocks h + MLP(LayerNorm(h)) with 2 * hidden_dim hidden units and GELU (the
    blocks of a transformer without attention: Xiong et al., arXiv 2002.04745), and a last layer. W and that layer start
    at zero, and the editor as t = f(x).
    """

    def __init__(self, embedding_dim: int, hidden_dim: int, latent_dim: int, num_blocks: int = 2) -> None:
        super().__init__()
        self.linear = nn.Linear(embedding_dim + latent_dim, embedding_dim)
        self.first = nn.Linear(embedding_dim + latent_dim, hidden_dim)
        self.blocks = nn.ModuleList(_block(hidden_dim) for _ in range(num_blocks))
        last = nn.Linear(hidden_dim, embedding_dim)
        self.last = nn.Sequential(nn.LayerNorm(hidden_dim), nn.GELU(), last)
        for layer in (self.linear, last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, context: Tensor, r: Tensor) -> Tensor:
        """Edit context [B, D] by r [B, R]: [B, D]."""
        both = torch.cat([context, r], dim=-1)
        hidden = self.first(both)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return context + self.linear(both) + self.last(hidden)


def _block(dim: int) -> nn.Sequential:
    """Build the MLP of a residual block, which starts as a constant."""
    last = nn.Linear(2 * dim, dim)
    nn.init.zeros_(last.weight)
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), last)


class LinearEditor(nn.Module):
    """t = f(x) + W r: r holds all that changes, and W how the changes of dimensions go together. W starts as identity.

    The plain sum of AdaSSL (arXiv 2602.02381) has no W.
    """

    def __init__(self, embedding_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(embedding_dim, latent_dim))

    def forward(self, context: Tensor, r: Tensor) -> Tensor:
        """Add W r to context [B, D], for r [B, R]: [B, D]."""
        return context + r @ self.weight.T


class SumEditor(nn.Module):
    """t = f(x) + r, the plain sum (AdaSSL, arXiv 2602.02381). R is D, or 0 without a latent."""

    def forward(self, context: Tensor, r: Tensor) -> Tensor:
        """Add r [B, D] or [B, 0] to context [B, D]: [B, D]."""
        return context + r if r.shape[1] else context


class LowRankEditor(nn.Module):
    """t = f(x) + sum_i tanh(r_i) (B_i A_i f(x) + b_i): one low-rank module for each coordinate of r.

    AdaSSL-S, arXiv 2602.02381. A_i is Linear(D -> R), B_i Linear(R -> D) without bias that starts at zero.
    """

    def __init__(self, embedding_dim: int, latent_dim: int) -> None:
        super().__init__()
        rank = latent_dim
        self.down = nn.Linear(embedding_dim, latent_dim * rank)
        self.up = nn.Parameter(torch.zeros(latent_dim, rank, embedding_dim))
        self.shift = nn.Parameter(torch.zeros(latent_dim, embedding_dim))

    def forward(self, context: Tensor, r: Tensor) -> Tensor:
        """Edit context [B, D] by r [B, R]: [B, D]."""
        gate = torch.tanh(r)
        reduced = self.down(context).unflatten(-1, self.up.shape[:2]) * gate.unsqueeze(-1)
        return context + einsum(reduced, self.up, "b i k, i k d -> b d") + gate @ self.shift


class WithPredictor(nn.Module):
    """An editor followed by BYOL's predictor (Grill et al., arXiv 2006.07733, section 3)."""

    def __init__(
        self, editor: SumEditor | LowRankEditor, embedding_dim: int, hidden_dim: int, norm: Norm = "batch"
    ) -> None:
        super().__init__()
        self.editor = editor
        self.predictor = mlp([embedding_dim, hidden_dim, embedding_dim], norm=norm)

    def forward(self, context: Tensor, r: Tensor) -> Tensor:
        """Edit context [B, D] by r [B, R]: [B, D]."""
        return self.predictor(self.editor(context, r))


def sum_editor(embedding_dim: int, hidden_dim: int, norm: Norm, predictor: bool) -> SumEditor | WithPredictor:
    """Build the plain sum, followed by a predictor if the objective needs one."""
    return WithPredictor(SumEditor(), embedding_dim, hidden_dim, norm) if predictor else SumEditor()


def low_rank_editor(
    embedding_dim: int, hidden_dim: int, latent_dim: int, norm: Norm, predictor: bool
) -> LowRankEditor | SumEditor | WithPredictor:
    """Build the low-rank editor, followed by a predictor if the objective needs one.

    Without a latent it would have no modules, and is the plain sum.
    """
    if not latent_dim:
        return sum_editor(embedding_dim, hidden_dim, norm, predictor)
    editor = LowRankEditor(embedding_dim, latent_dim)
    return WithPredictor(editor, embedding_dim, hidden_dim, norm) if predictor else editor


class Editor(Protocol):
    """A network t from an embedding and r to the next embedding: an nn.Module with this member.

    To add one to the project, write its class in a file of this folder, and its entry in `EditorConfig`
    (worldmodel/config/model.py). Classes are offered embedding_dim=D, hidden_dim, latent_dim=R and predictor, True if
    the objective needs an MLP at the end (worldmodel/parts.py).
    """

    def forward(self, context: Tensor, r: Tensor) -> Tensor:
        """Edit context [B, D] by r [B, R]: [B, D]. R includes the scene code and the action of a model with these."""
