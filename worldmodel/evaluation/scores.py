"""Scores of forecasts and embeddings: pure functions of tensors on the CPU.

Legend: Q queries, S samples of a forecast, M observed draws, D embedding dimensions, K dimensions of a quantity, V
factors, N items.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmodel.runs.metrics import Forecast, RetrievalScores

INTERVAL_LEVELS = (0.5, 0.8, 0.9)
RANK_BINS = 10
RETRIEVAL_CUTOFFS = (1, 5, 10)
# Queries compared with all targets at once: 64 queries of 64 samples against 1,024 targets take 16 MiB.
RETRIEVAL_QUERIES = 64


def forecast_scores(
    samples: Tensor,
    observed: Tensor,
    oracle: Sequence[Any] | None = None,
    *,
    energy: Tensor | None = None,
    mean_over_dimensions: bool = False,
) -> Forecast:
    """Compute every score of a probability forecast at each horizon step, as plain numbers.

    samples [Q, S, horizon, K], observed [Q, M, horizon, K]. energy [Q, horizon] is the result of `energy_scores`, if it
    is known already. oracle [horizon] is the Energy Score of the true law and adds ratio_to_oracle. Scores of each
    dimension are `[horizon][K]`, or `[horizon][1]` with `mean_over_dimensions`, for many nameless dimensions. coverage,
    width, spread_skill and rank_histogram of a single sample are None.
    """
    # One step at a time: in embedding space a copy of all steps is half a gigabyte.
    steps = [
        _step_scores(samples[:, :, step], observed[:, :, step], mean_over_dimensions)
        for step in range(samples.shape[2])
    ]
    energy = energy_scores(samples, observed) if energy is None else energy
    scores = Forecast(
        energy_score=energy.mean(dim=0).tolist(),
        crps=[step["crps"] for step in steps],
        best_of=[step["best_of"] for step in steps],
        coverage=None,
        width=None,
        spread_skill=None,
        rank_histogram=None,
    )
    if samples.shape[1] > 1:
        scores["coverage"] = {level: [step["coverage"][level] for step in steps] for level in steps[0]["coverage"]}
        scores["width"] = {level: [step["width"][level] for step in steps] for level in steps[0]["width"]}
        scores["spread_skill"] = [step["spread_skill"] for step in steps]
        scores["rank_histogram"] = [step["rank_histogram"] for step in steps]
    if oracle is not None:
        own = energy.mean(dim=0).tolist()
        scores["ratio_to_oracle"] = [score / reference for score, reference in zip(own, oracle, strict=True)]
    return scores


def _step_scores(samples: Tensor, observed: Tensor, mean_over_dimensions: bool) -> dict[str, Any]:
    """Return the scores at one horizon step, [Q, S, K] and [Q, M, K]; a single sample has no scores of its spread."""

    def by_dimension(values: Tensor) -> list[float]:
        return values.mean(dim=0, keepdim=True).tolist() if mean_over_dimensions else values.tolist()

    ordered = _ordered(samples)
    scores: dict[str, Any] = {
        "crps": by_dimension(_crps(ordered, observed).mean(dim=0)),
        "best_of": float(best_of(samples, observed).mean()),
    }
    if samples.shape[1] == 1:
        return scores
    ends = {f"{100 * level:.0f}": _interval(ordered, level) for level in INTERVAL_LEVELS}
    return scores | {
        "coverage": {level: by_dimension(_share_inside(*end, observed)) for level, end in ends.items()},
        "width": {level: by_dimension((upper - lower).mean(dim=0)) for level, (lower, upper) in ends.items()},
        "spread_skill": spread_skill(samples, observed),
        "rank_histogram": _rank_shares(ordered, observed, RANK_BINS).tolist(),
    }


def energy_scores(samples: Tensor, observed: Tensor) -> Tensor:
    """Return the Energy Score of each query at each step: [Q, S, horizon, K], [Q, M, horizon, K] -> [Q, horizon]."""
    steps = zip(samples.unbind(2), observed.unbind(2), strict=True)
    return torch.stack([energy_score(forecast, truth) for forecast, truth in steps], dim=1)


def energy_score(forecasts: Tensor, observed: Tensor) -> Tensor:
    """Return the Energy Score of each query: forecasts [Q, S, D], observed [Q, M, D] -> [Q]; lower is better.

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


def crps(forecasts: Tensor, observed: Tensor) -> Tensor:
    """Return the continuous ranked probability score per query and dimension: [Q, S, K], [Q, M, K] -> [Q, K].

    Lower is better. It is the Energy Score in one dimension: mean |X - y| - (1/2) mean_{s != s'} |X_s - X_s'|, fair to
    an ensemble of any size (Ferro 2014, "Fair scores for ensemble forecasts"; Gneiting and Raftery 2007, eq. 21). The
    score of a single sample is its absolute error. O(S log S + S M) time and O(S + M) memory per query and dimension.
    """
    return _crps(_ordered(forecasts), observed)


def spread_skill(samples: Tensor, observed: Tensor) -> float:
    """Return the spread of the samples divided by the RMSE of their mean: [Q, S, K], [Q, M, K] -> number; S above 1.

    1 is calibrated, below 1 is overconfident. Spread is the root of the mean unbiased variance, times
    sqrt((S + 1) / S), as the mean of S samples has an error too (Fortin et al. 2014, "Why should ensemble spread match
    the RMSE of the ensemble mean?"). Squares are pooled over queries and dimensions.
    """
    num_samples = samples.shape[1]
    variance = samples.var(dim=1).mean()
    squared_error = (observed - samples.mean(dim=1, keepdim=True)).square().mean()
    return float((variance * (num_samples + 1) / num_samples / squared_error).sqrt())


def rank_histogram(samples: Tensor, observed: Tensor, num_bins: int = RANK_BINS) -> Tensor:
    """Return the histogram of ranks of the observed values among the samples: [Q, S, K], [Q, M, K] -> [num_bins].

    Shares sum to 1 and are pooled over dimensions. The histogram is flat if calibrated, for any S and number of bins:
    rank i of 0 to S has probability 1 / (S + 1) and is spread evenly over [i, i + 1] / (S + 1), which is then binned.
    An observation that equals samples is spread over all ranks that it may hold. This is the nonrandomised PIT
    histogram of the samples (Czado, Gneiting and Held 2009; rank histograms: Hamill 2001).
    """
    return _rank_shares(_ordered(samples), observed, num_bins)


def best_of(samples: Tensor, observed: Tensor) -> Tensor:
    """Return the distance from an observation to the nearest sample, averaged: [Q, S, D], [Q, M, D] -> [Q].

    It rewards coverage of the modes and never punishes spread. It is not a proper score: read it alongside one.
    """
    return _distances(samples, observed).amin(dim=1).mean(dim=1)


def retrieval(forecasts: Tensor, targets: Tensor) -> dict[str, float]:
    """Rank the true future among the targets of all queries: forecasts [Q, S, D], targets [Q, D] -> mrr, hit_k.

    Each query has Q candidates, its own target and Q - 1 distractors. They are ranked by a Gaussian kernel density
    estimate of the forecast, log mean_s exp(-|X_s - y|^2 / 2 h^2). The distance to the mean of the samples would prefer
    a point between two modes, the distance to the nearest sample a point near one stray sample. The bandwidth h is the
    mean distance from a sample to its nearest other sample; it adapts to the dimension of the space that the samples
    fill. A single sample, or equal samples, rank by distance.

    mrr is the mean of 1 / rank, and hit_k the share of ranks up to k. Tied candidates share their ranks in
    expectation, so that a collapsed embedding scores at chance: hit_k = k / Q.
    """
    num_queries = len(targets)
    # Distances by matrix products lose digits far from the origin. Equal targets become exact zeros.
    forecasts, targets = forecasts - targets[0], targets - targets[0]
    above, tied = [], []
    for rows in torch.arange(num_queries).split(RETRIEVAL_QUERIES):
        density = _log_density(forecasts[rows], targets)
        own = density.gather(1, rows[:, None])
        # Equal targets may differ in the last digits, as vectorised sums treat the last elements differently.
        is_tied = torch.isclose(density, own, rtol=1e-6, atol=0.0)
        above.append(((density > own) & ~is_tied).sum(dim=1))
        tied.append(is_tied.sum(dim=1))
    first, count = torch.cat(above).double(), torch.cat(tied).double()
    # The true target has each of the ranks first + 1 ... first + count with the same probability.
    harmonic = torch.cat([torch.zeros(1), 1 / torch.arange(1, num_queries + 1).double()]).cumsum(dim=0)
    reciprocal = (harmonic[(first + count).long()] - harmonic[first.long()]) / count
    hits = {f"hit_{k}": float(((k - first) / count).clamp(0, 1).mean()) for k in RETRIEVAL_CUTOFFS}
    return {"mrr": float(reciprocal.mean()), **hits}


def retrieval_scores(samples: Tensor, targets: Tensor) -> RetrievalScores:
    """Compute `retrieval` at each horizon step: samples [Q, S, horizon, D], targets [Q, horizon, D] -> lists."""
    steps = [retrieval(samples[:, :, step], targets[:, step]) for step in range(targets.shape[1])]
    return RetrievalScores(
        mrr=[step["mrr"] for step in steps],
        hit_1=[step["hit_1"] for step in steps],
        hit_5=[step["hit_5"] for step in steps],
        hit_10=[step["hit_10"] for step in steps],
    )


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Return the area under the ROC curve, the probability that a positive scores above a negative: [N], bool [N].

    Ties count half (Mann-Whitney; Hanley and McNeil 1982). NaN if all items are of one kind.
    """
    from sklearn.metrics import roc_auc_score

    if not 0 < int(positive.sum()) < len(positive):
        return float("nan")
    return float(roc_auc_score(positive.numpy(), scores.numpy()))


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95% score interval of a rate (Wilson 1927), within [0, 1] even if all or none succeed."""
    from scipy.stats import binomtest

    interval = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def central_interval(samples: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Return the ends of the central interval per query and dimension: samples [Q, S, D] -> lower, upper [Q, D].

    Quantiles are at ranks p (S + 1) of the sorted samples (Hyndman and Fan 1996, type 6). For samples of a continuous
    law a fresh draw then falls inside with probability `level`, if S is at least 2 / (1 - level) - 1: exactly where the
    ranks are whole (S = 19 or 39 for 0.9), otherwise within 0.001 for 64 samples of a normal law, and 0.009 for 28.
    """
    return _interval(_ordered(samples), level)


def interval_coverage(samples: Tensor, observed: Tensor, level: float) -> Tensor:
    """Return the share of observed draws inside the central interval per dimension: [Q, S, D], [Q, M, D] -> [D]."""
    return _share_inside(*central_interval(samples, level), observed)


def interval_width(samples: Tensor, level: float) -> Tensor:
    """Return the mean width of the central interval per dimension: [Q, S, D] -> [D]."""
    lower, upper = central_interval(samples, level)
    return (upper - lower).mean(dim=0)


def r_squared(predicted: Tensor, truth: Tensor) -> float:
    """Return 1 - residual / total sum of squares, averaged over dimensions that vary: [N, D], [N, D] -> at most 1.

    NaN if a value is not finite, or nothing varies.
    """
    from sklearn.metrics import r2_score

    varies = (truth != truth[:1]).any(dim=0)
    if not (predicted.isfinite().all() and truth.isfinite().all() and varies.any()):
        return float("nan")
    return float(r2_score(truth[:, varies].numpy(), predicted[:, varies].numpy(), force_finite=False))


def effective_rank(embeddings: Tensor) -> float:
    """Return exp of the entropy of the normalised singular values of centred embeddings [N, D], from 1 to D.

    NaN if an embedding is not finite.
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
    """Return the disentanglement and completeness of a code, each from 0 to 1 .

    importance [D, V] >= 0 is the importance of each of D code dimensions for each of V factors. A code is disentangled
    if each dimension is important for one factor only; dimensions are weighted by their total importance. It is
    complete if one dimension only is important for each factor (Eastwood and Williams, ICLR 2018, section 2).
    """
    num_codes, num_factors = importance.shape
    assert num_codes > 1 and num_factors > 1, importance.shape

    def purity(rows: Tensor) -> Tensor:
        """[N, M] -> [N]; 0 for a row without importance."""
        totals = rows.sum(dim=1, keepdim=True)
        shares = torch.where(totals > 0, rows / totals.clamp(min=1e-12), 1 / rows.shape[1])
        return 1 - torch.special.entr(shares).sum(dim=1) / torch.log(torch.tensor(float(rows.shape[1])))

    weights = importance.sum(dim=1) / importance.sum().clamp(min=1e-12)
    return float((weights * purity(importance)).sum()), float(purity(importance.T).mean())


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the Euclidean distances of all pairs in full precision: [Q, N, D], [Q, M, D] -> [Q, N, M]."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _ordered(samples: Tensor) -> Tensor:
    """Sort samples in ascending order per dimension: [Q, S, K] -> [Q, K, S]."""
    # NumPy sorts short rows several times faster than torch, which also sorts indices.
    return torch.from_numpy(np.sort(samples.transpose(1, 2).contiguous().numpy(), axis=-1))


def _crps(ordered: Tensor, observed: Tensor) -> Tensor:
    """Compute `crps` from ordered samples [Q, K, S]."""
    num_samples = ordered.shape[2]
    to_truth = torch.stack([(ordered - draw[..., None]).abs().mean(dim=2) for draw in observed.unbind(dim=1)]).mean(
        dim=0
    )
    if num_samples == 1:
        return to_truth
    # The i-th of S ordered samples enters the sum of differences i - 1 times with a plus, S - i times with a minus.
    weights = torch.arange(1 - num_samples, num_samples, 2, dtype=ordered.dtype)
    return to_truth - ordered @ weights / (num_samples * (num_samples - 1))


def _interval(ordered: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Compute `central_interval` from ordered samples [Q, K, S]."""
    last = ordered.shape[2] - 1

    def quantile(probability: float) -> Tensor:
        rank = min(max(probability * (last + 2) - 1, 0.0), float(last))
        below = int(rank)
        above = min(below + 1, last)
        return torch.lerp(ordered[..., below], ordered[..., above], rank - below)

    return quantile((1 - level) / 2), quantile((1 + level) / 2)


def _share_inside(lower: Tensor, upper: Tensor, observed: Tensor) -> Tensor:
    """Return the share of observed values between the ends [Q, D]: [Q, M, D] -> [D]."""
    inside = (observed >= lower[:, None]) & (observed <= upper[:, None])
    return inside.float().mean(dim=(0, 1))


def _rank_shares(ordered: Tensor, observed: Tensor, num_bins: int) -> Tensor:
    """Compute `rank_histogram` from ordered samples [Q, K, S]."""
    num_ranks = ordered.shape[2] + 1
    truth = observed.transpose(1, 2).contiguous()
    least, greatest = (torch.searchsorted(ordered, truth, right=right) for right in (False, True))
    # Count each pair of a least and a greatest rank, then spread the few pairs over the bins.
    counts = torch.bincount((least * num_ranks + greatest).flatten(), minlength=num_ranks**2).double()
    pairs = counts.nonzero().squeeze(1)
    start = (pairs // num_ranks).double()[:, None] / num_ranks
    end = (pairs % num_ranks + 1).double()[:, None] / num_ranks
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)
    overlap = (torch.minimum(end, edges[1:]) - torch.maximum(start, edges[:-1])).clamp(min=0) / (end - start)
    return counts[pairs] @ overlap / counts.sum()


def _log_density(forecasts: Tensor, targets: Tensor) -> Tensor:
    """Return the log of the kernel density, up to a constant per query: [Q, S, D], targets [N, D] -> [Q, N]."""
    num_samples = forecasts.shape[1]
    squares = forecasts.square().sum(dim=2)[..., None] - 2 * forecasts @ targets.T + targets.square().sum(dim=1)
    if num_samples == 1:
        return -squares[:, 0]
    within = torch.cdist(forecasts, forecasts)
    within.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    bandwidth = within.amin(dim=2).mean(dim=1)[:, None, None].clamp(min=1e-6)
    return (-squares / (2 * bandwidth.square())).logsumexp(dim=1)


def _mean_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean Euclidean distance over all pairs: [Q, N, D], [Q, M, D] -> [Q]."""
    return _distances(a, b).mean(dim=(1, 2))
