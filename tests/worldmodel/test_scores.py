import math

import numpy as np
import pytest
import scoringrules
import torch
from torch import Tensor

from worldmodel import scores
from worldmodel.scores import (
    central_interval,
    dci,
    effective_rank,
    energy_score,
    interval_coverage,
    interval_width,
    r_squared,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


# ------------------------------------------------------------------------------------- probability forecasts


@pytest.mark.parametrize("num_dims", [1, 2, 16])
def test_energy_score_and_crps_agree_with_scoringrules(num_dims: int) -> None:
    samples, observed = normal(20, 9, num_dims), normal(20, 4, num_dims, seed=1) + 0.5
    ours, ours_crps = scores.energy_score(samples, observed), scores.crps(samples, observed)
    each = [
        scoringrules.es_ensemble(observed[:, m].numpy(), samples.numpy(), estimator="fair")
        for m in range(observed.shape[1])
    ]
    np.testing.assert_allclose(ours.numpy(), np.mean(each, axis=0), atol=1e-6)
    each = [
        scoringrules.crps_ensemble(observed[:, m].numpy(), samples.transpose(1, 2).numpy(), estimator="fair")
        for m in range(observed.shape[1])
    ]
    np.testing.assert_allclose(ours_crps.numpy(), np.mean(each, axis=0), atol=1e-6)


def test_scores_over_a_horizon_agree_with_scoringrules() -> None:
    """What metrics.json holds, of float32 samples as an evaluation has them."""
    samples, observed = normal(30, 8, 3, 2).float(), normal(30, 1, 3, 2, seed=1).float()
    found = scores.forecast_scores(samples, observed)
    for h in range(3):
        truth, forecast = observed[:, 0, h].double().numpy(), samples[:, :, h].double().numpy()
        energy = scoringrules.es_ensemble(truth, forecast, estimator="fair").mean()
        crps = scoringrules.crps_ensemble(truth, forecast.swapaxes(1, 2), estimator="fair").mean(axis=0)
        assert found["energy_score"][h] == pytest.approx(energy, abs=1e-6)
        np.testing.assert_allclose(found["crps"][h], crps, atol=1e-6)


def test_crps_of_a_normal_law_in_closed_form() -> None:
    """The expected CRPS of a calibrated N(0, 1) forecast is 1 / sqrt(pi) (Gneiting and Raftery 2007, eq. 21)."""
    found = scores.crps(normal(4_000, 50, 1), normal(4_000, 1, 1, seed=1)).mean()
    assert float(found) == pytest.approx(1 / math.sqrt(math.pi), rel=0.03)


def test_crps_of_one_sample_is_the_absolute_error() -> None:
    samples, observed = normal(5, 1, 2), normal(5, 3, 2, seed=1)
    torch.testing.assert_close(scores.crps(samples, observed), (samples - observed).abs().mean(dim=1))


@pytest.mark.parametrize(("stretch", "expected"), [(1.0, 1.0), (0.5, 0.5), (2.0, 2.0)])
def test_spread_and_skill_match_where_the_forecast_is_calibrated(stretch: float, expected: float) -> None:
    """Around a centre that the forecast knows; with few samples the correction matters: without it 10% are lost."""
    centre = normal(6_000, 1, 2, seed=3)
    samples = centre + stretch * normal(6_000, 5, 2)
    found = scores.spread_skill(samples, centre + normal(6_000, 1, 2, seed=1))
    error = math.sqrt((1 + stretch**2 / 5) / (1 + 1 / 5))  # the mean of few wide samples is itself in error
    assert found == pytest.approx(expected / error, rel=0.03)


@pytest.mark.parametrize("num_samples", [7, 10, 64])
def test_ranks_are_flat_where_the_forecast_is_calibrated_whatever_the_number_of_samples(num_samples: int) -> None:
    samples, observed = normal(3_000, num_samples, 2), normal(3_000, 2, 2, seed=1)
    shares = scores.rank_histogram(samples, observed)
    assert float(shares.sum()) == pytest.approx(1)
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / len(shares)), atol=0.012, rtol=0)
    narrow = scores.rank_histogram(samples / 3, observed)
    assert narrow[0] > 2 * narrow[4] and narrow[-1] > 2 * narrow[4]


def test_ranks_of_ties_are_shared() -> None:
    shares = scores.rank_histogram(torch.zeros(4, 9, 1), torch.zeros(4, 1, 1))
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / len(shares)))


def test_the_best_sample_is_the_nearest() -> None:
    samples = torch.tensor([[[0.0, 0.0], [3.0, 0.0], [0.0, 5.0]]])
    observed = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
    assert scores.best_of(samples, observed).tolist() == pytest.approx([(math.sqrt(10) + 0) / 2])


def test_retrieval_of_exact_forecasts_and_of_constant_ones() -> None:
    targets = normal(40, 6)
    exact = scores.retrieval(targets[:, None] + 1e-3 * normal(40, 5, 6, seed=1), targets)
    assert exact == {"mrr": 1.0, "hit_1": 1.0, "hit_5": 1.0, "hit_10": 1.0}
    constant = scores.retrieval(torch.zeros(40, 5, 6), torch.zeros(40, 6))
    chance = {"mrr": sum(1 / k for k in range(1, 41)) / 40, "hit_1": 1 / 40, "hit_5": 5 / 40, "hit_10": 10 / 40}
    assert constant == pytest.approx(chance)


def test_retrieval_prefers_the_modes_of_a_forecast_to_their_middle() -> None:
    """Samples around +3 and -3: what came is at +3, another candidate in the middle, which is nearer to their mean."""
    around = torch.cat([3 + 0.1 * normal(20, 1), -3 + 0.1 * normal(20, 1, seed=1)])[None]
    forecasts = torch.cat([around, 50 + around])
    found = scores.retrieval(forecasts, torch.tensor([[3.0], [0.0]], dtype=torch.float64))
    assert found["mrr"] == pytest.approx((1 + 0.5) / 2)


def test_auroc_counts_pairs_and_ties_half() -> None:
    values = torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0])
    positive = torch.tensor([True, False, True, False, False])
    assert scores.auroc(values, positive) == pytest.approx((3 + 2.5) / 6)
    assert math.isnan(scores.auroc(values, torch.zeros(5, dtype=torch.bool)))


def test_a_forecast_of_one_sample_has_no_spread() -> None:
    found = scores.forecast_scores(normal(6, 1, 2, 3), normal(6, 4, 2, 3, seed=1), oracle=[1.0, 2.0])
    assert found["coverage"] is None and found["rank_histogram"] is None
    assert found["ratio_to_oracle"] == pytest.approx([found["energy_score"][0], found["energy_score"][1] / 2])


def test_means_over_dimensions_are_those_of_each_dimension() -> None:
    samples, observed = normal(50, 9, 2, 4), normal(50, 1, 2, 4, seed=1)
    each = scores.forecast_scores(samples, observed)
    mean = scores.forecast_scores(samples, observed, mean_over_dimensions=True)
    for h in range(2):
        assert mean["crps"][h] == pytest.approx([np.mean(each["crps"][h])])
        assert mean["coverage"]["80"][h] == pytest.approx([np.mean(each["coverage"]["80"][h])])
    assert mean["energy_score"] == each["energy_score"]
