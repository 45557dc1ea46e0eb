"""Editors t(z, r): the embedding of a future, given that of the past and the latent.

Legend: B clips, D embedding dimensions, R latent dimensions.
"""

import torch
from torch import Tensor, nn

from worldmodel.encoders import mlp, normalise


class MlpEditor(nn.Module):
    """t([f(x), r]), an MLP with two hidden layers (AdaSSL, arXiv 2602.02381, appendix D.5).

    With latent_dim 0 it is BYOL's predictor: one future for each past.
    """

    def __init__(self, embedding_dim: int, hidden_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.net = mlp([embedding_dim + latent_dim, hidden_dim, hidden_dim, embedding_dim])

    def forward(self, context: Tensor, r: Tensor) -> Tensor:
        """context [B, D], r [B, R] -> predicted embedding float32 [B, D], normalised as the encoder's are."""
        return normalise(self.net(torch.cat([context, r], dim=-1)))
