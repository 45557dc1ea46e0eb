"""Skill of a forecast over a baseline, with an interval by a block bootstrap over time.

Successive clips of a video overlap and resemble each other, so their scores depend on each other, and resampling single
clips would give intervals that are too narrow. Blocks of successive clips of one video are resampled instead. They keep
the dependence within a block (Künsch 1989, "The jackknife and the bootstrap for general stationary observations"). The
clips of a video are wrapped around a circle, so that each is equally likely to be drawn (Politis and Romano 1992, "A
circular block-resampling procedure for stationary data"). With few blocks, say less than ten, intervals are too narrow.

Legend: Q queries, N resamples.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from worldmodel.runs.metrics import BASELINES, OWN_FORECASTS, Forecasts, Intervals, Series, Skill
from worldmodel.sources.source import ClipPlaces

LEVEL = 0.9
NUM_RESAMPLES = 2_000


@dataclass(frozen=True)
class Resampling:
    """How often each of N resamples contains each query: weights [N, Q].

    Blocks have block_clips queries, or all queries of a video that has fewer. num_blocks is the number of disjoint
    blocks that would hold all queries.
    """

    weights: Tensor
    block_clips: int
    num_blocks: int


def block_length(places: ClipPlaces) -> int:
    """Return the number of successive queries in a block: those that share frames, and at least the cube root of Q.

    The cube root is the optimal rate of growth for the variance of a mean (Hall, Horowitz and Jing 1995, "On blocking
    rules for the bootstrap with dependent data").
    """
    overlaps = []
    for rows in _rows_of_videos(places):
        first, last = places.first_frame[rows[[0, -1]]].tolist()
        if len(rows) > 1:
            overlaps.append(math.ceil(places.span_frames * (len(rows) - 1) / max(last - first, 1)))
    if not overlaps:
        return 1
    return max(int(median(overlaps)), math.ceil(len(places.video) ** (1 / 3) - 1e-9))


def resample(places: ClipPlaces, generator: torch.Generator, num_resamples: int = NUM_RESAMPLES) -> Resampling:
    """Draw resamples of blocks of successive queries, circularly within each video.

    A block starts at any query. A video shorter than a block is drawn as a whole, and as often as its queries deserve.
    """
    count, length = len(places.video), block_length(places)
    videos = _rows_of_videos(places)
    lengths = torch.ones(count)
    for rows in videos:
        lengths[rows] = min(length, len(rows))
    # Longer blocks start less often, so that each query is expected once in each resample.
    chance = 1 / lengths
    num_blocks = max(1, round(float(chance.sum())))
    starts = torch.multinomial(chance.expand(num_resamples, -1), num_blocks, replacement=True, generator=generator)
    started = torch.zeros(count, num_resamples).scatter_add_(0, starts.T, torch.ones(starts.T.shape))
    weights = torch.empty_like(started)
    for rows in videos:
        own, most = started[rows], min(length, len(rows))
        sums = torch.cat([torch.zeros(1, num_resamples), own[len(rows) - most + 1 :], own]).cumsum(dim=0)
        weights[rows] = sums[most:] - sums[:-most]  # the blocks that start at most `most` - 1 queries before
    return Resampling(weights.T, length, num_blocks)


def _rows_of_videos(places: ClipPlaces) -> list[Tensor]:
    """Return the queries of each video in the order of time."""
    by_time = places.first_frame.argsort(stable=True)
    order = by_time[places.video[by_time].argsort(stable=True)]
    _, counts = places.video[order].unique_consecutive(return_counts=True)
    return list(order.split(counts.tolist()))


def skill(scores: Tensor, baseline: Tensor, resampling: Resampling, level: float = LEVEL) -> Skill:
    """Return 1 - (mean score / mean score of the baseline) at each horizon step, with its interval.

    scores, baseline [Q, horizon] are Energy Scores of the same queries. The interval has the quantiles of the ratio of
    the means over resamples (the percentile method; Efron 1979). Below zero, the baseline is better. There is no skill
    score over a baseline that never errs: None.
    """
    weights = resampling.weights.double()
    scores, baseline = scores.double(), baseline.double()
    drawn = 1 - (weights @ scores) / (weights @ baseline)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=drawn.dtype)
    low, high = drawn.quantile(ends, dim=0)
    return Skill(value=_plain(1 - scores.mean(dim=0) / baseline.mean(dim=0)), low=_plain(low), high=_plain(high))


def add_skill(forecasts: Forecasts, energy: Mapping[str, Tensor], resampling: Resampling) -> None:
    """Add the skill over each baseline to the run's own forecasts: energy [Q, horizon] of the queries, by forecast."""
    for own in OWN_FORECASTS:
        if own in forecasts:
            forecasts[own]["skill"] = {
                name: skill(energy[own], energy[name], resampling) for name in BASELINES if name in energy
            }


def interval_facts(resampling: Resampling) -> Intervals:
    """Return how the intervals of `skill` were made."""
    return Intervals(
        level=LEVEL,
        block_clips=resampling.block_clips,
        num_blocks=resampling.num_blocks,
        resamples=len(resampling.weights),
    )


def _plain(values: Tensor) -> Series:
    return [float(value) if math.isfinite(value) else None for value in values]
