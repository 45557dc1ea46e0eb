import math
from typing import Any

import numpy as np
import pytest
import scoringrules
import torch

from worldmodel.evaluation.scores import (
    auroc,
    best_of,
    central_interval,
    crps,
    dci,
    effective_rank,
    energy_score,
    forecast_scores,
    interval_coverage,
    interval_width,
    r_squared,
    rank_histogram,
    retrieval,
    retrieval_scores,
    spread_skill,
    wilson_interval,
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


def test_dci_of_a_collapsed_code_is_zero() -> None:
    assert dci(torch.zeros(3, 2)) == pytest.approx((0, 0), abs=1e-6)
    # One factor has a dimension, the other has none.
    assert dci(torch.tensor([[1.0, 0.0], [0.0, 0.0]])) == pytest.approx((1, 0.5), abs=1e-6)


def test_r_squared() -> None:
    truth = normal(500, 2, seed=0)
    assert r_squared(truth, truth) == 1
    assert r_squared(truth.mean(dim=0).expand(500, 2), truth) == pytest.approx(0, abs=1e-6)
    noisy = truth + truth.std(dim=0) * normal(500, 2, seed=1)
    assert r_squared(noisy, truth) == pytest.approx(0, abs=0.15)


def test_r_squared_is_of_the_dimensions_that_vary() -> None:
    truth, predicted = normal(500, 2, seed=0), normal(500, 2, seed=1)
    constant = torch.full((500, 1), 3.0)
    expected = r_squared(predicted, truth)
    assert r_squared(torch.cat([predicted, constant + 1], 1), torch.cat([truth, constant], 1)) == expected
    assert math.isnan(r_squared(constant, constant))


def test_effective_rank_of_known_spectra() -> None:
    orthogonal = torch.linalg.qr(normal(64, 8, seed=0) - normal(64, 8, seed=0).mean(dim=0)).Q
    assert effective_rank(torch.zeros(10, 4)) == 1
    assert effective_rank(torch.arange(10.0)[:, None] * torch.ones(4)) == pytest.approx(1, abs=1e-4)
    assert effective_rank(orthogonal) == pytest.approx(8, abs=0.1)


def test_energy_score_and_crps_equal_those_of_scoringrules() -> None:
    forecasts, observed = normal(20, 7, 3, seed=0).double(), normal(20, 4, 3, seed=1).double()
    energy, by_dimension = [], []
    for draw in observed.unbind(dim=1):
        truth, ensemble = draw.numpy(), forecasts.numpy()
        energy.append(scoringrules.es_ensemble(truth, ensemble, estimator="fair"))
        by_dimension.append(scoringrules.crps_ensemble(truth, ensemble.swapaxes(1, 2), estimator="fair"))
    np.testing.assert_allclose(energy_score(forecasts, observed).numpy(), np.mean(energy, axis=0), atol=1e-6)
    np.testing.assert_allclose(crps(forecasts, observed).numpy(), np.mean(by_dimension, axis=0), atol=1e-6)


def test_crps_is_the_energy_score_of_each_dimension_alone() -> None:
    forecasts, observed = 30 + normal(5, 16, 2, seed=0), 30 + normal(5, 3, 2, seed=1)
    for count in (16, 1):
        alone = [energy_score(forecasts[:, :count, k, None], observed[..., k, None]) for k in range(2)]
        torch.testing.assert_close(crps(forecasts[:, :count], observed), torch.stack(alone, dim=1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_samples", [2, 8, 64])
def test_crps_is_fair_to_a_small_ensemble(num_samples: int) -> None:
    """CRPS of N(0, 1) at y: y (2 Phi(y) - 1) + 2 phi(y) - 1 / sqrt(pi), whatever the size of the ensemble."""
    y = 0.7
    cdf, density = (1 + math.erf(y / math.sqrt(2))) / 2, math.exp(-(y**2) / 2) / math.sqrt(2 * math.pi)
    expected = y * (2 * cdf - 1) + 2 * density - 1 / math.sqrt(math.pi)
    score = crps(normal(40000, num_samples, 1, seed=0), torch.full((40000, 1, 1), y)).mean()
    assert score.item() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("num_samples", [2, 8, 64])
def test_spread_over_skill_of_a_calibrated_forecast_is_one_at_any_ensemble_size(num_samples: int) -> None:
    samples, observed = normal(20000, num_samples, 2, seed=0), normal(20000, 1, 2, seed=1)
    assert spread_skill(samples, observed) == pytest.approx(1, abs=0.02)
    assert spread_skill(samples / 2, observed) < 0.75


@pytest.mark.parametrize(("num_samples", "num_bins"), [(64, 10), (19, 10), (6, 10), (64, 13)])
def test_ranks_of_a_calibrated_forecast_are_flat_whatever_the_bins(num_samples: int, num_bins: int) -> None:
    shares = rank_histogram(normal(4000, num_samples, 2, seed=0), normal(4000, 8, 2, seed=1), num_bins)
    assert shares.sum().item() == pytest.approx(1)
    assert (shares * num_bins - 1).abs().max().item() < 0.04


def test_ranks_show_bias_and_too_little_spread() -> None:
    samples, observed = normal(1000, 19, 1, seed=0), normal(1000, 4, 1, seed=1)
    low, narrow = rank_histogram(samples - 1, observed), rank_histogram(samples / 2, observed)
    assert low[-1] > 0.3 and low[0] < 0.03
    assert narrow[0] > 0.15 and narrow[-1] > 0.15 and narrow[5] < 0.09


def test_an_observation_equal_to_samples_is_spread_over_their_ranks() -> None:
    samples, observed = torch.tensor([[[0.0], [1.0], [1.0]]]), torch.ones(1, 1, 1)
    torch.testing.assert_close(rank_histogram(samples, observed, 4), torch.tensor([0, 1, 1, 1]).double() / 3)


def test_best_of_is_the_distance_to_the_nearest_sample() -> None:
    samples = torch.tensor([[[0.0, 0.0], [10.0, 0.0]]])
    observed = torch.tensor([[[3.0, 4.0], [10.0, 1.0]]])
    assert best_of(samples, observed).tolist() == [3.0]


def test_retrieval_by_hand() -> None:
    """Targets at 0, 1, ... 19 on a line, each forecast 0.6 beyond its own: one other is nearer, but for the last."""
    targets = torch.arange(20.0)[:, None]
    scores = retrieval(targets[:, None] + 0.6, targets)
    assert scores == pytest.approx({"mrr": (19 / 2 + 1) / 20, "hit_1": 1 / 20, "hit_5": 1, "hit_10": 1})


def test_retrieval_asks_for_density_not_for_a_stray_sample_nor_for_the_mean() -> None:
    """Two modes at -5 and 5 and one stray: a candidate midway and one at the stray lose to one in a mode."""
    modes = torch.cat([normal(10, 1, seed=0) / 2 - 5, normal(10, 1, seed=1) / 2 + 5, torch.tensor([[20.0]])])
    targets = torch.tensor([[4.9], [0.0], [20.001]])
    forecasts = torch.stack([modes, torch.zeros(21, 1), torch.full((21, 1), 20.0)])
    assert retrieval(forecasts, targets)["hit_1"] == 1


@pytest.mark.parametrize("num_samples", [1, 8])
def test_retrieval_of_a_constant_forecast_or_a_collapsed_embedding_is_chance(num_samples: int) -> None:
    chance = {"mrr": sum(1 / rank for rank in range(1, 101)) / 100, "hit_1": 0.01, "hit_5": 0.05, "hit_10": 0.1}
    constant = normal(1, num_samples, 4, seed=0).expand(100, -1, -1)
    assert retrieval(constant, normal(100, 4, seed=1)) == pytest.approx(chance)
    forecasts = normal(100, num_samples, 4, seed=2)
    assert retrieval(forecasts, torch.full((100, 4), 0.3)) == pytest.approx(chance)


def test_retrieval_scores_are_by_horizon_step() -> None:
    targets = 10 * normal(50, 2, 8, seed=0)
    samples = torch.stack([targets[:, 0], -targets[:, 1]], dim=1)[:, None] + normal(50, 16, 2, 8, seed=1)
    scores: Any = retrieval_scores(samples, targets)
    assert list(scores) == ["mrr", "hit_1", "hit_5", "hit_10"]
    assert scores["hit_1"][0] == 1 and scores["hit_1"][1] < 0.2


def test_auroc_by_hand() -> None:
    positive = torch.tensor([True, True, False, False])
    assert auroc(torch.tensor([3.0, 2.0, 1.0, 0.0]), positive) == 1
    assert auroc(torch.tensor([3.0, 1.0, 2.0, 0.0]), positive) == 0.75
    assert auroc(torch.ones(4), positive) == 0.5
    assert math.isnan(auroc(torch.ones(4), torch.ones(4, dtype=torch.bool)))
    assert math.isnan(auroc(torch.ones(4), torch.zeros(4, dtype=torch.bool)))


def test_forecast_scores_are_those_of_each_step() -> None:
    samples, observed = normal(30, 19, 3, 2, seed=0), normal(30, 5, 3, 2, seed=1)
    scores: Any = forecast_scores(samples, observed, oracle=[0.5, 1.0, 2.0])
    last, truth = samples[:, :, 2], observed[:, :, 2]
    assert scores["energy_score"][2] == pytest.approx(energy_score(last, truth).mean().item())
    assert scores["ratio_to_oracle"][2] == scores["energy_score"][2] / 2
    assert scores["crps"][2] == pytest.approx(crps(last, truth).mean(dim=0).tolist())
    assert scores["best_of"][2] == pytest.approx(best_of(last, truth).mean().item())
    assert scores["spread_skill"][2] == spread_skill(last, truth)
    assert scores["rank_histogram"][2] == rank_histogram(last, truth).tolist()
    for level in (50, 80, 90):
        assert scores["coverage"][str(level)][2] == interval_coverage(last, truth, level / 100).tolist()
        assert scores["width"][str(level)][2] == interval_width(last, level / 100).tolist()
    assert {len(values) for values in scores.values() if isinstance(values, list)} == {3}
    assert "ratio_to_oracle" not in forecast_scores(samples, observed)


def test_forecast_scores_average_over_dimensions_on_request() -> None:
    samples, observed = normal(30, 19, 2, 4, seed=0), normal(30, 1, 2, 4, seed=1)
    by_dimension: Any = forecast_scores(samples, observed)
    mean: Any = forecast_scores(samples, observed, mean_over_dimensions=True)
    assert mean["crps"] == [pytest.approx([np.mean(step)]) for step in by_dimension["crps"]]
    for name in ("coverage", "width"):
        assert mean[name]["90"] == [pytest.approx([np.mean(step)]) for step in by_dimension[name]["90"]]


def test_forecast_of_one_sample_has_no_spread_to_score() -> None:
    scores: Any = forecast_scores(normal(30, 1, 2, 4, seed=0), normal(30, 3, 2, 4, seed=1))
    assert {name for name, values in scores.items() if values is None} == {
        *("coverage", "width", "spread_skill", "rank_histogram")
    }
    assert len(scores["crps"]) == 2 and len(scores["crps"][0]) == 4


def test_what_metrics_hold_agrees_with_scoringrules() -> None:
    """float32 samples over a horizon, as an evaluation has them."""
    samples, observed = normal(30, 8, 3, 2, seed=0), normal(30, 1, 3, 2, seed=1)
    found: Any = forecast_scores(samples, observed)
    for h in range(3):
        truth, forecast = observed[:, 0, h].double().numpy(), samples[:, :, h].double().numpy()
        energy = scoringrules.es_ensemble(truth, forecast, estimator="fair").mean()
        by_dimension = scoringrules.crps_ensemble(truth, forecast.swapaxes(1, 2), estimator="fair").mean(axis=0)
        assert found["energy_score"][h] == pytest.approx(energy, abs=1e-6)
        np.testing.assert_allclose(found["crps"][h], by_dimension, atol=1e-6)


@pytest.mark.parametrize(("successes", "trials"), [(0, 50), (7, 50), (245, 250), (250, 250)])
def test_wilson_interval_holds_the_rates_that_a_score_test_does_not_reject(successes: int, trials: int) -> None:
    """Its ends solve |rate - p| = z sqrt(p (1 - p) / n): scipy has the same interval."""
    from scipy.stats import binomtest

    expected = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-9)
