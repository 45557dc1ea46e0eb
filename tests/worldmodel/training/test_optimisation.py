import pytest
import torch

from worldmodel.training.optimisation import (
    ema_momentum,
    learning_rate,
    parameter_groups,
    step_generator,
    warmed_up_beta,
)


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    assert [learning_rate(step, 1.0, 10, 110) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(60, 1.0, 10, 110) == pytest.approx(0.5)
    assert learning_rate(109, 1.0, 10, 110) < 0.001
    assert learning_rate(110, 1.0, 10, 110) == pytest.approx(0, abs=1e-12)
    shorter_than_its_warm_up = learning_rate(4, 1.0, 10, 5)
    assert shorter_than_its_warm_up == pytest.approx(0.5)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.99), (50, 0.995), (100, 1.0)])
def test_the_momentum_of_the_teacher_rises_to_one(step: int, expected: float) -> None:
    assert ema_momentum(step, 0.99, "cosine", 100) == pytest.approx(expected)
    assert ema_momentum(step, 0.99, "constant", 100) == 0.99


def test_beta_warms_up_from_zero() -> None:
    assert [warmed_up_beta(step, 0.2, 4) for step in (0, 1, 4, 9)] == pytest.approx([0, 0.05, 0.2, 0.2])
    assert warmed_up_beta(0, 0.2, 0) == 0.2


def test_weight_decay_spares_one_dimensional_parameters() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    decayed, spared = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0
    assert [p.ndim for p in decayed["params"]] == [2]
    assert [p.ndim for p in spared["params"]] == [1, 1, 1]


def test_the_random_numbers_of_a_step_depend_on_seed_and_step() -> None:
    draws = {
        (seed, step): torch.randn(4, generator=step_generator(seed, step, torch.device("cpu")))
        for seed in (0, 1)
        for step in (0, 1)
    }
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == 4
    again = torch.randn(4, generator=step_generator(1, 0, torch.device("cpu")))
    assert torch.equal(again, draws[1, 0])
