import math

import pytest
import torch
from torch import Tensor

from worldmodel.evaluation.baselines import (
    MAX_MOMENTS,
    LinearGaussian,
    constant_velocity,
    other_clips,
    training_clips,
)
from worldmodel.evaluation.scores import energy_score
from worldmodel.sources.source import ClipPlaces


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def passive(count: int, horizon: int = 1) -> Tensor:
    return torch.empty(count, horizon, 0)


def places(videos: list[int]) -> ClipPlaces:
    return ClipPlaces(torch.tensor(videos), torch.arange(len(videos)), 1)


# --------------------------------------------------------------------------------------------------- linear-Gaussian

# x' = A x + e, e ~ N(0, C), in three dimensions of different speed and size
A = torch.tensor([[0.9, 0.2, 0.0], [-0.2, 0.8, 0.0], [0.0, 0.0, 0.5]])
ROOT = torch.tensor([[0.5, 0.0, 0.0], [0.3, 0.4, 0.0], [0.0, 0.0, 2.0]])
HORIZON = 4


def ar_paths(count: int, seed: int) -> Tensor:
    """Stationary paths [N, 1 + HORIZON, 3]."""
    draw = generator(seed)
    state, path = torch.zeros(count, 3), []
    for step in range(60 + HORIZON + 1):
        state = state @ A.T + torch.randn(count, 3, generator=draw) @ ROOT.T
        if step >= 60:
            path.append(state)
    return torch.stack(path, dim=1)


def law(start: Tensor, num_samples: int, draw: torch.Generator) -> Tensor:
    """Draws of the true future by its mean A^h x and covariance sum_i A^i C A^i', [Q, S, HORIZON, 3]."""
    futures, covariance, power = [], torch.zeros(3, 3), torch.eye(3)
    for _ in range(HORIZON):
        covariance = covariance + power @ ROOT @ ROOT.T @ power.T
        power = A @ power
        noise = torch.randn(len(start), num_samples, 3, generator=draw)
        futures.append((start @ power.T)[:, None] + noise @ torch.linalg.cholesky(covariance).T)
    return torch.stack(futures, dim=2)


def test_linear_gaussian_scores_as_the_law_of_an_autoregression_does() -> None:
    train, selection, test = (ar_paths(count, seed) for count, seed in ((4000, 1), (1000, 2), (1500, 3)))
    forecast = LinearGaussian.fitted(
        train[:, 0], train[:, 1], selection[:, 0], passive(1000, HORIZON), selection[:, 1:]
    )
    torch.testing.assert_close(forecast.factor @ forecast.factor.T, ROOT @ ROOT.T, atol=0.15, rtol=0.05)
    samples = forecast.roll_out(test[:, 0], passive(1500, HORIZON), 64, generator())
    truth = law(test[:, 0], 64, generator(1))
    for step in range(HORIZON):
        observed = test[:, 1 + step, None]
        scores = [energy_score(values[:, :, step], observed).mean() for values in (samples, truth)]
        assert float(scores[0] / scores[1]) == pytest.approx(1, abs=0.02)


def test_linear_gaussian_has_the_score_of_a_normal_law_in_closed_form() -> None:
    """In one dimension E|X - Y| = 2 s / sqrt(pi) for X and Y from N(m, s^2): the Energy Score is s / sqrt(pi)."""
    draw = generator()
    start = torch.randn(6000, 1, generator=draw)
    after = 0.6 * start + 0.8 * torch.randn(6000, 1, generator=draw)
    parts = start.split(2000), after.split(2000)
    forecast = LinearGaussian.fitted(parts[0][0], parts[1][0], parts[0][1], passive(2000), parts[1][1][:, None])
    samples = forecast.roll_out(parts[0][2], passive(2000), 64, draw)[:, :, 0]
    score = float(energy_score(samples, parts[1][2][:, None]).mean())
    assert score == pytest.approx(0.8 / math.sqrt(math.pi), rel=0.03)


def test_linear_gaussian_knows_the_actions_of_a_model_that_is_conditioned_on_them() -> None:
    draw = generator()
    start, action = torch.randn(3000, 2, generator=draw), torch.randn(3000, 1, generator=draw)
    after = 0.5 * start + action * torch.tensor([2.0, -1.0]) + 0.01 * torch.randn(3000, 2, generator=draw)
    inputs = torch.cat([start, action], dim=1)
    forecast = LinearGaussian.fitted(inputs[:2000], after[:2000], start[2000:], action[2000:, None], after[2000:, None])
    samples = forecast.roll_out(start[:4], torch.stack([action[:4], -action[:4]], dim=1), 8, draw)
    second = 0.5 * after[:4] - action[:4] * torch.tensor([2.0, -1.0])
    torch.testing.assert_close(samples.mean(dim=1), torch.stack([after[:4], second], dim=1), atol=0.06, rtol=0)


def test_clips_learned_by_heart_do_not_make_linear_gaussian_overconfident() -> None:
    """With as many dimensions as clips the fit is exact on the clips of the fit, and wrong on all others."""
    draw = generator()
    clips = [torch.randn(40, 40, generator=draw) for _ in range(4)]
    forecast = LinearGaussian.fitted(clips[0], clips[1], clips[2], passive(40), clips[3][:, None])
    samples = forecast.roll_out(torch.randn(300, 40, generator=draw), passive(300), 64, draw)[:, :, 0]
    observed = torch.randn(300, 40, generator=draw)
    inside = (samples.quantile(0.05, dim=1) < observed) & (observed < samples.quantile(0.95, dim=1))
    assert float(inside.float().mean()) == pytest.approx(0.9, abs=0.05)


def test_linear_gaussian_leaves_dimensions_that_hardly_vary_as_they_are() -> None:
    draw = generator()
    scale = torch.tensor([1.0, 1e-4]).repeat(10)
    clips = [scale * torch.randn(60, 20, generator=draw) for _ in range(4)]
    forecast = LinearGaussian.fitted(clips[0], clips[1], clips[2], passive(60), clips[3][:, None])
    spread = forecast.factor.square().sum(dim=1).sqrt()
    assert float(spread[1::2].max()) < 2e-4 and float(spread[::2].min()) > 0.5


def test_linear_gaussian_of_a_collapsed_embedding_is_that_embedding() -> None:
    same = torch.full((50, 4), 0.3)
    samples = LinearGaussian.fitted(same, same, same, passive(50), same[:, None]).roll_out(
        same[:3], passive(3, 2), 5, generator()
    )
    torch.testing.assert_close(samples, torch.full((3, 5, 2, 4), 0.3))


def test_linear_gaussian_of_numbers_that_are_not_finite_is_not_finite() -> None:
    clips = torch.randn(50, 4, generator=generator())
    broken = clips.clone()
    broken[3, 1] = math.nan
    samples = LinearGaussian.fitted(clips, broken, clips, passive(50), clips[:, None]).roll_out(
        clips[:3], passive(3, 2), 5, generator()
    )
    assert samples.shape == (3, 5, 2, 4) and samples.isnan().any()


# ------------------------------------------------------------------------------------------------------- climatology


def test_climatology_is_of_the_same_video_where_it_has_moments_enough() -> None:
    videos = [4] * 100 + [9] * 40 + [2] * 5 + [1] * 3
    found = other_clips(places(videos), generator())
    assert found.shape == (148, MAX_MOMENTS)
    assert ((found < 100) == (torch.arange(148) < 100)[:, None])[:140].all()
    assert ((found[100:140] >= 100) & (found[100:140] < 140)).all()
    assert (found[140:] < 100).any() and (found[140:] >= 145).any()  # few moments: those of all videos
    assert (found != torch.arange(148)[:, None]).all()
    counts = torch.bincount(found[:100].flatten(), minlength=148)[:100].float()
    assert float(counts.std() / counts.mean()) < 0.2  # each moment is as likely


def test_climatology_of_a_single_video_is_drawn_as_that_of_clips_without_videos() -> None:
    """Earlier versions pooled all clips: the figures of such data remain."""
    count = 30
    shift = 1 + torch.randint(count - 1, (count, count - 1), generator=generator(5))
    expected = (torch.arange(count)[:, None] + shift) % count
    assert torch.equal(other_clips(places([3] * count), generator(5)), expected)
    assert torch.equal(other_clips(places(list(range(count))), generator(5)), expected)


def test_training_climatology_is_of_the_video_that_a_query_continues() -> None:
    bank = places([8] * 50 + [6] * 50 + [5] * 2)
    found = training_clips(bank, places([6, 8, 5, 77]), 40, generator())
    assert ((found[0] >= 50) & (found[0] < 100)).all() and (found[1] < 50).all()
    for pooled in found[2:]:  # too few moments, and a video that no training clip is of
        assert (pooled < 50).any() and (pooled >= 50).any()


# ------------------------------------------------------------------------------------------------------------ labels


def test_constant_velocity_is_exact_on_a_linear_motion() -> None:
    start, velocity = torch.tensor([[3.0, -2.0], [0.5, 7.0]]), torch.tensor([[0.25, 1.5], [-2.0, 0.0]])
    path = start[:, None] + torch.arange(16)[:, None] * velocity[:, None]
    for num_frames in (2, 3, 4):
        forecast = constant_velocity(path[:, :num_frames], 3)
        torch.testing.assert_close(forecast, path[:, [2 * num_frames - 1, 3 * num_frames - 1, 4 * num_frames - 1]])


def test_constant_velocity_is_the_slope_of_least_squares() -> None:
    known = torch.tensor([[[50.0], [0.0], [1.0], [1.0], [2.0], [4.0]]])  # the first frame is too old to count
    slope = float(torch.linalg.lstsq(torch.stack([torch.arange(5.0), torch.ones(5)], 1), known[0, 1:]).solution[0])
    assert float(constant_velocity(known, 2)[0, 1]) == pytest.approx(4 + 12 * slope)
