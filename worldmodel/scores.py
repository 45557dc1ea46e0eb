"""Scores of forecasts and embeddings: pure functions of tensors.

Legend: Q queries, S sampled forecasts, M draws of the truth, D dimensions.
"""

import torch
from torch import Tensor


def energy_score(forecasts: Tensor, observed: Tensor) -> Tensor:
    """Energy Score of each query: forecasts [Q, S, D], observed [Q, M, D] -> [Q]; lower is better.

    ES = mean |X - Y| - (1/2) mean_{s != s'} |X_s - X_s'|, the unbiased estimate (Gneiting and Raftery 2007, eq. 22). It
    is strictly proper. The self-term of a single forecast is zero: its score is the mean distance.
    """
    num_samples = forecasts.shape[1]
    to_truth = _mean_distance(forecasts, observed)
    if num_samples == 1:
        return to_truth
    # The diagonal of the self-distances is zero, so only the divisor changes.
    within = _mean_distance(forecasts, forecasts) * num_samples / (num_samples - 1)
    return to_truth - within / 2


def central_interval(samples: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Ends of the central interval of each query and dimension: samples [Q, S, D] -> lower, upper [Q, D].

    Quantiles at ranks p (S + 1) of the sorted samples (Hyndman and Fan 1996, type 6): for samples of a continuous law a
    fresh draw then falls inside with probability `level` exactly, at any S of at least 2 / (1 - level) - 1.
    """
    ordered = samples.sort(dim=1).values
    last = samples.shape[1] - 1

    def quantile(probability: float) -> Tensor:
        rank = min(max(probability * (last + 2) - 1, 0.0), float(last))
        below = int(rank)
        above = min(below + 1, last)
        return torch.lerp(ordered[:, below], ordered[:, above], rank - below)

    return quantile((1 - level) / 2), quantile((1 + level) / 2)


def interval_coverage(samples: Tensor, observed: Tensor, level: float) -> Tensor:
    """Share of observed draws inside the central interval, by dimension: [Q, S, D], [Q, M, D] -> [D]."""
    lower, upper = central_interval(samples, level)
    inside = (observed >= lower[:, None]) & (observed <= upper[:, None])
    return inside.float().mean(dim=(0, 1))


def interval_width(samples: Tensor, level: float) -> Tensor:
    """Mean width of the central interval, by dimension: [Q, S, D] -> [D]."""
    lower, upper = central_interval(samples, level)
    return (upper - lower).mean(dim=0)


def r_squared(predicted: Tensor, truth: Tensor) -> float:
    """1 - residual / total sum of squares, the mean over dimensions: [N, D], [N, D] -> number up to 1."""
    residual = (truth - predicted).square().sum(dim=0)
    total = (truth - truth.mean(dim=0)).square().sum(dim=0)
    return float((1 - residual / total).mean())


def effective_rank(embeddings: Tensor) -> float:
    """exp of the entropy of the normalised singular values of centred embeddings [N, D], 1 to D; NaN if not finite.

    Roy and Vetterli 2007; RankMe, Garrido et al., arXiv 2210.02885, eq. 1.
    """
    if not embeddings.isfinite().all():
        return float("nan")
    centred = (embeddings - embeddings.mean(dim=0)).double()
    values = torch.linalg.svdvals(centred)
    if values.sum() <= 1e-9:
        return 1.0
    share = values / values.sum()
    return float(torch.special.entr(share).sum().exp())


def dci(importance: Tensor) -> tuple[float, float]:
    """Disentanglement and completeness of a code, each 0 to 1 (Eastwood and Williams, ICLR 2018, section 2).

    importance [D, F] >= 0 says how much each of D code dimensions tells of each of F factors. A code is disentangled
    where each dimension tells of one factor (dimensions weighted by how much they tell at all), complete where each
    factor is told by one dimension.
    """
    num_codes, num_factors = importance.shape
    assert num_codes > 1 and num_factors > 1, importance.shape

    def purity(rows: Tensor) -> Tensor:
        shares = rows / rows.sum(dim=1, keepdim=True).clamp(min=1e-12)
        return 1 - torch.special.entr(shares).sum(dim=1) / torch.log(torch.tensor(float(rows.shape[1])))

    weights = importance.sum(dim=1) / importance.sum().clamp(min=1e-12)
    return float((weights * purity(importance)).sum()), float(purity(importance.T).mean())


def _mean_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean Euclidean distance over all pairs: [Q, N, D], [Q, M, D] -> [Q]."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").mean(dim=(1, 2))
