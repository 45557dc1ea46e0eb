import math

import pytest
import torch

from data_pipelines.errors import UserError
from tests.conftest import REPO, normal
from worldmodel.config import (
    CvarRiskConfig,
    MeanRiskConfig,
    QuantileRiskConfig,
    ReachRiskConfig,
    load_config,
    validate,
)
from worldmodel.planning.risk import mean_of_worst, reduced

COSTS = torch.tensor([[[4.0, 1.0, 3.0, 2.0], [2.0, 2.0, 2.0, 2.1]]])
FAR = torch.full_like(COSTS, math.inf)


def test_measures_of_four_costs_by_hand() -> None:
    torch.testing.assert_close(reduced(MeanRiskConfig(), COSTS, FAR), torch.tensor([[2.5, 2.025]]))
    torch.testing.assert_close(reduced(QuantileRiskConfig(level=1.0), COSTS, FAR), torch.tensor([[4.0, 2.1]]))
    torch.testing.assert_close(reduced(CvarRiskConfig(level=0.5), COSTS, FAR), torch.tensor([[3.5, 2.05]]))
    torch.testing.assert_close(reduced(CvarRiskConfig(level=0.0), COSTS, FAR), torch.tensor([[2.5, 2.025]]))
    torch.testing.assert_close(reduced(CvarRiskConfig(level=1.0), COSTS, FAR), torch.tensor([[4.0, 2.1]]))


def test_a_cost_at_the_border_of_the_worst_counts_in_part() -> None:
    torch.testing.assert_close(mean_of_worst(COSTS[0, 0], 0.375), torch.tensor((4 + 3 / 2) / 1.5))


def test_the_mean_of_the_worst_is_that_of_the_law() -> None:
    """For a standard normal, the mean above the quantile q is the density at q over the share above it."""
    level, quantile = 0.9, 1.2815516
    expected = math.exp(-(quantile**2) / 2) / math.sqrt(2 * math.pi) / (1 - level)
    assert float(mean_of_worst(normal(0, 200_000), 1 - level)) == pytest.approx(expected, abs=0.02)


def test_the_probability_of_reaching_the_goal_counts_before_any_cost() -> None:
    nearest = torch.tensor([[[0.5, 1.0, 1.1, 9.0], [2.0, 3.0, 4.0, 5.0], [0.2, 3.0, 4.0, 5.0], [0.2, 3.0, 4.0, 5.0]]])
    costs = torch.tensor([[[1e6] * 4, [0.0] * 4, [5.0] * 4, [6.0] * 4]])
    cost = reduced(ReachRiskConfig(within=1.0), costs, nearest)[0]
    assert cost.argsort().tolist() == [0, 2, 3, 1]
    assert -0.5 <= float(cost[0]) <= -0.25


def test_a_level_of_an_earlier_version_is_a_quantile() -> None:
    tree = {"run_dir": "x", "data": {"source": "videos"}, "planning": {"num_samples": 4, "risk_quantile": 0.75}}
    assert validate(tree, source="it", overrides=()).planning.risk == QuantileRiskConfig(level=0.75)
    tree["planning"] = {"risk_quantile": None}
    assert validate(tree, source="it", overrides=()).planning.risk == MeanRiskConfig()


def test_a_measure_of_one_future_is_told() -> None:
    with pytest.raises(UserError, match=r"risk=cvar compares several futures: it needs planning\.num_samples"):
        load_config(REPO / "configs" / "two_rooms_slip.yaml", ["planning.risk=cvar", "planning.num_samples=0"])
