import math

import pytest
import torch

from worldmodel.objectives import negative_cosine


def test_equals_the_cosine_of_the_angle() -> None:
    predicted = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    target = torch.tensor([[math.cos(0.3), math.sin(0.3)], [0.0, -5.0]])
    expected = -(math.cos(0.3) - 1) / 2
    assert negative_cosine(predicted, target).item() == pytest.approx(expected, abs=1e-6)


def test_scale_of_either_side_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, target = torch.randn(2, 7, 5, generator=generator).unbind(0)
    torch.testing.assert_close(negative_cosine(3 * predicted, 0.1 * target), negative_cosine(predicted, target))


def test_gradient_flows_into_the_prediction_alone() -> None:
    predicted = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    negative_cosine(predicted, target).backward()
    assert predicted.grad is not None and target.grad is None
