import math

import numpy as np
import pytest
import torch

from worldmodel.scores import (
    central_interval,
    dci,
    effective_rank,
    energy_score,
    interval_coverage,
    interval_width,
    r_squared,
)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_energy_score_equals_brute_force_loops() -> None:
    forecasts, observed = normal(3, 5, 2, seed=0), normal(3, 4, 2, seed=1)
    for query in range(3):
        to_truth = [math.dist(x, y) for x in forecasts[query].tolist() for y in observed[query].tolist()]
        within = [
            math.dist(forecasts[query, i].tolist(), forecasts[query, j].tolist())
            for i in range(5)
            for j in range(5)
            if i != j
        ]
        expected = np.mean(to_truth) - np.mean(within) / 2
        assert energy_score(forecasts, observed)[query].item() == pytest.approx(expected, abs=1e-6)


def test_energy_score_of_one_forecast_is_the_mean_distance() -> None:
    forecast, observed = normal(2, 1, 3, seed=0), normal(2, 7, 3, seed=1)
    expected = (forecast - observed).norm(dim=-1).mean(dim=1)
    torch.testing.assert_close(energy_score(forecast, observed), expected)


def test_energy_score_matches_the_closed_form_of_the_crps_of_a_normal() -> None:
    """In one dimension it is the CRPS: for N(0, 1) against itself, E CRPS = 1 / sqrt(pi)."""
    score = energy_score(normal(200, 200, 1, seed=0), normal(200, 200, 1, seed=1)).mean()
    assert score.item() == pytest.approx(1 / math.sqrt(math.pi), abs=0.01)


def test_energy_score_is_least_for_the_true_law() -> None:
    observed = normal(200, 64, 2, seed=0)
    scores = {
        scale: energy_score(scale * normal(200, 64, 2, seed=1), observed).mean().item()
        for scale in (0.01, 0.5, 1.0, 1.5, 3.0)
    }
    shifted = energy_score(normal(200, 64, 2, seed=1) + 0.3, observed).mean().item()
    assert min(scores, key=lambda scale: scores[scale]) == 1.0
    assert shifted > scores[1.0]


@pytest.mark.parametrize("num_samples", [19, 64, 200])
def test_a_fresh_draw_of_the_same_law_is_covered_as_often_as_the_level_says(num_samples: int) -> None:
    samples, observed = normal(4000, num_samples, 2, seed=0), normal(4000, 8, 2, seed=1)
    for covered in interval_coverage(samples, observed, 0.9).tolist():
        assert covered == pytest.approx(0.9, abs=0.01)


def test_central_interval_ends_at_order_statistics() -> None:
    """19 samples, level 0.9: ranks 0.05 * 20 = 1 and 0.95 * 20 = 19 are the least and the greatest."""
    samples = torch.randperm(19, generator=torch.Generator().manual_seed(0)).float().reshape(1, 19, 1)
    lower, upper = central_interval(samples, 0.9)
    assert (lower.item(), upper.item()) == (0, 18)
    assert interval_width(samples, 0.9).item() == 18


def test_coverage_is_per_dimension() -> None:
    samples = torch.stack([torch.linspace(-1, 1, 99), torch.linspace(4, 5, 99)], dim=-1)[None]
    assert interval_coverage(samples, torch.zeros(1, 3, 2), 0.9).tolist() == [1.0, 0.0]


def test_dci_of_known_importances() -> None:
    one_to_one = torch.eye(3)[torch.tensor([2, 0, 1])]
    assert dci(one_to_one) == pytest.approx((1, 1))
    assert dci(torch.ones(4, 3)) == pytest.approx((0, 0), abs=1e-6)
    # Two dimensions share each factor: each dimension is pure, no factor is told by one alone.
    shared = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert dci(shared) == pytest.approx((1, 0.5))
    # A dimension that tells nothing of any factor has no weight.
    assert dci(torch.cat([torch.eye(2), torch.full((1, 2), 1e-9)]))[0] == pytest.approx(1, abs=1e-6)


def test_r_squared() -> None:
    truth = normal(500, 2, seed=0)
    assert r_squared(truth, truth) == 1
    assert r_squared(truth.mean(dim=0).expand(500, 2), truth) == pytest.approx(0, abs=1e-6)
    noisy = truth + truth.std(dim=0) * normal(500, 2, seed=1)
    assert r_squared(noisy, truth) == pytest.approx(0, abs=0.15)


def test_effective_rank_of_known_spectra() -> None:
    orthogonal = torch.linalg.qr(normal(64, 8, seed=0) - normal(64, 8, seed=0).mean(dim=0)).Q
    assert effective_rank(torch.zeros(10, 4)) == 1
    assert effective_rank(torch.arange(10.0)[:, None] * torch.ones(4)) == pytest.approx(1, abs=1e-4)
    assert effective_rank(orthogonal) == pytest.approx(8, abs=0.1)
