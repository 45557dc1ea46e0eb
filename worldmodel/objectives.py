"""Losses between predicted and target embeddings."""

import torch.nn.functional as F
from torch import Tensor


def negative_cosine(predicted: Tensor, target: Tensor) -> Tensor:
    """BYOL's loss up to scale and shift (Grill et al., arXiv 2006.07733, eq. 2): [B, D], [B, D] -> scalar in [-1, 1].

    No gradient flows into `target`.
    """
    return -F.cosine_similarity(predicted.float(), target.detach().float(), dim=-1).mean()
