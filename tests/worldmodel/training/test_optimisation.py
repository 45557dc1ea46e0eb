import pytest
import torch

from worldmodel.training.optimisation import learning_rate, parameter_groups, step_generator


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    assert [learning_rate(step, 1.0, 10, 110) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(60, 1.0, 10, 110) == pytest.approx(0.5)
    assert learning_rate(109, 1.0, 10, 110) < 0.001
    assert learning_rate(110, 1.0, 10, 110) == pytest.approx(0, abs=1e-12)
    shorter_than_its_warm_up = learning_rate(4, 1.0, 10, 5)
    assert shorter_than_its_warm_up == pytest.approx(0.5)


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
