"""From actions to r: a decoder fitted on few labelled transitions of a model that knows none."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from data_pipelines.errors import UserError
from worldmodel.planning import latent_actions
from worldmodel.planning.latent_actions import fit_action_decoder, prediction_error
from worldmodel.runs.trained_run import TrainedRun

MIXING = torch.tensor([[0.0, 1.5, 0.0], [-0.7, 0.0, 0.4]])


class AddingModel(torch.nn.Module):
    """t(f(x), r) = f(x) + r, without actions and with a latent of three dimensions."""

    def __init__(self, action_dim: int = 0) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.latent = SimpleNamespace(latent_dim=3)

    def edit(self, state: Tensor, r: Tensor) -> Tensor:
        return state + r

    def embedding_of(self, state: Tensor) -> Tensor:
        return state


def transitions(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, actions and what follows: where the first coordinate is positive, the action counts double."""
    generator = torch.Generator().manual_seed(seed)
    context, action = torch.randn(count, 3, generator=generator), torch.rand(count, 2, generator=generator) * 2 - 1
    return context, action, context + action @ MIXING * torch.where(context[:, :1] > 0, 2.0, 1.0)


def run_of(model: AddingModel) -> TrainedRun:
    return cast(TrainedRun, SimpleNamespace(model=model, device=torch.device("cpu"), folder="toy"))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_actions, "labelled_transitions", lambda run, count: transitions(min(count, 1000), 0))


def test_actions_lead_where_they_do_in_the_world(world: None) -> None:
    model = AddingModel()
    decoder = fit_action_decoder(run_of(model), 1000, seed=0)
    context, action, target = transitions(500, seed=1)
    chance = float((target - context).square().mean())
    assert float(prediction_error(cast(Any, model), decoder, context, action, target)) < 0.02 * chance


@pytest.mark.slow
def test_it_is_the_same_for_the_same_seed_and_frozen(world: None) -> None:
    first, again = (fit_action_decoder(run_of(AddingModel()), 100, seed=3) for _ in range(2))
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b) and not a.requires_grad
    assert not first.training


def test_mistakes_are_told(world: None) -> None:
    with pytest.raises(UserError, match="passive run"):
        fit_action_decoder(run_of(AddingModel(action_dim=2)), 100, seed=0)
    with pytest.raises(UserError, match="labels=5000: the training split has 1000 transitions"):
        fit_action_decoder(run_of(AddingModel()), 5000, seed=0)
