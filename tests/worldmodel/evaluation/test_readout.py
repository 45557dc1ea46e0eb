import numpy as np
import torch
from torch import Tensor

from worldmodel.evaluation.readout import choose_readout, fit_ridges


def test_ridge_equals_the_normal_equations_in_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, generator=generator) * 3 + 1, torch.randn(50, 2, generator=generator)
    standard = ((x - x.mean(0)) / x.std(0)).double().numpy()
    centred = (y - y.mean(0)).double().numpy()
    weight = np.linalg.inv(standard.T @ standard + 7 * np.eye(4)) @ standard.T @ centred
    expected = standard @ weight + y.mean(0).numpy()
    np.testing.assert_allclose(fit_ridges(x, y, (7.0,))[0](x).numpy(), expected, atol=1e-5)


def test_strength_is_chosen_on_selection_clips() -> None:
    """Many noisy inputs, few clips: the least regularised fit is best on the fit clips and worst elsewhere."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.zeros(60, 1)
    truth[0] = 1

    def clips(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, 60, generator=generator)
        return x, x @ truth + 3 * torch.randn(count, 1, generator=generator)

    readout = choose_readout(*clips(70), *clips(500))
    assert readout.strength == 100.0


def test_more_strengths_may_be_asked_for() -> None:
    """Where outputs are noise, the strongest shrinkage is best, and every one on offer is tried."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 20, generator=generator), torch.randn(200, 1, generator=generator)
    assert choose_readout(x[:100], y[:100], x[100:], y[100:], (1.0, 1e6, 10.0)).strength == 1e6
