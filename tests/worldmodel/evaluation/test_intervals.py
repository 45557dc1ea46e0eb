import math

import pytest
import torch
from torch import Tensor

from worldmodel.evaluation.intervals import block_length, resample, skill
from worldmodel.sources.source import ClipPlaces


def one_video(count: int, *, gap: int = 1, span: int = 1) -> ClipPlaces:
    return ClipPlaces(torch.zeros(count, dtype=torch.int64), torch.arange(count) * gap, span)


def own_videos(count: int) -> ClipPlaces:
    return ClipPlaces(torch.arange(count), torch.zeros(count, dtype=torch.int64), 9)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def autocorrelated(count: int, coefficient: float, seed: int) -> Tensor:
    noise = torch.randn(count, generator=generator(seed)).tolist()
    values, value = [], 0.0
    for step in noise:
        value = coefficient * value + math.sqrt(1 - coefficient**2) * step
        values.append(value)
    return torch.tensor(values)


def width(scores: Tensor, baseline: Tensor, places: ClipPlaces) -> float:
    found = skill(scores[:, None], baseline[:, None], resample(places, generator()))
    low, high = found["low"][0], found["high"][0]
    assert isinstance(low, float) and isinstance(high, float)
    return high - low


def test_blocks_are_as_long_as_clips_share_frames_and_of_one_clip_without_neighbours() -> None:
    assert block_length(own_videos(1000)) == 1
    assert block_length(one_video(103, gap=2, span=29)) == 15  # 29 frames are shared by 15 clips that start 2 apart
    assert block_length(one_video(1000, gap=50, span=29)) == 10  # the cube root of 1,000
    two = ClipPlaces(torch.arange(100) % 2, torch.arange(100) // 2 * 4, 40)
    assert block_length(two) == 10


def test_each_query_is_drawn_once_on_average_and_in_whole_blocks() -> None:
    video = torch.tensor([7] * 20 + [3] * 2 + [5] * 10)
    first_frame = torch.cat([torch.arange(20), torch.arange(2), torch.arange(10)])
    mixed = torch.randperm(32, generator=generator())
    found = resample(ClipPlaces(video[mixed], first_frame[mixed], 4), generator(), 20_000)
    assert found.block_clips == 4 and found.num_blocks == 20 / 4 + 1 + 10 / 4 - 0.5  # 8.5 rounds to even
    torch.testing.assert_close(found.weights.mean(dim=0), torch.full((32,), 8 / 8.5), atol=0.05, rtol=0)
    # The two clips of the short video come and go together.
    short = found.weights[:, video[mixed] == 3]
    assert torch.equal(short[:, 0], short[:, 1])
    alone = resample(one_video(12, span=3), generator(), 500)
    first_of_blocks = alone.weights[alone.weights.sum(dim=1) == alone.weights.sum(dim=1).min()]
    assert (first_of_blocks.sum(dim=1) == alone.num_blocks * 3).all()


def test_the_interval_of_independent_queries_is_the_classical_one() -> None:
    """The delta method: the variance of a ratio of means is that of mean(x - R y) / mean(y)."""
    x = 2 + torch.rand(4000, generator=generator(1))
    y = 3 + torch.rand(4000, generator=generator(2))
    ratio = x.mean() / y.mean()
    error = float((x - ratio * y).std() / math.sqrt(4000) / y.mean())
    found = skill(x[:, None], y[:, None], resample(own_videos(4000), generator()))
    assert found["value"][0] == pytest.approx(1 - float(ratio))
    assert found["low"][0] == pytest.approx(1 - float(ratio) - 1.6449 * error, abs=0.1 * error)
    assert found["high"][0] == pytest.approx(1 - float(ratio) + 1.6449 * error, abs=0.1 * error)


@pytest.mark.parametrize(("num_series", "least"), [(20, 12), pytest.param(60, 46, marks=pytest.mark.slow)])
def test_the_interval_of_neighbours_in_time_is_wider_and_holds_the_truth(num_series: int, least: int) -> None:
    """Scores with an autocorrelation of 0.8: their mean varies by a factor of (1 + 0.8) / (1 - 0.8) = 9 more."""
    inside, widths = 0, []
    for seed in range(num_series):
        x = 10 + autocorrelated(600, 0.8, seed)
        y = torch.full((600,), 10.0)
        found = skill(x[:, None], y[:, None], resample(one_video(600, span=25), generator(seed)))
        low, high = found["low"][0], found["high"][0]
        assert isinstance(low, float) and isinstance(high, float)
        inside += low <= 0 <= high
        widths.append((high - low) / width(x, y, own_videos(600)))
    assert inside >= least  # 90% would be 18 and 54; blocks of 25 cover less
    assert 2.2 < sum(widths) / num_series < 3.2  # the root of 9, less what a block of 25 misses


def test_a_baseline_that_never_errs_has_no_skill_score() -> None:
    found = skill(torch.ones(8, 2), torch.tensor([0.0, 2.0]).expand(8, 2), resample(own_videos(8), generator()))
    assert found == {"value": [None, 0.5], "low": [None, 0.5], "high": [None, 0.5]}
