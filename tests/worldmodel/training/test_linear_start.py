"""The linear start against the law of a linear-Gaussian process."""

from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipelines.errors import UserError
from worldmodel.build import build_training_model
from worldmodel.config import Config, validate
from worldmodel.nets.latents import LinearPrior
from worldmodel.nets.world_model import WorldModel
from worldmodel.training.linear_start import KEPT, keep_share, start_linear, starts_linear

DIM = 3


def linear_config(*, action_dim: int = 0, **changes: Any) -> Config:
    model = {
        "embedding_dim": DIM,
        "embedding_norm": "standard",
        "hidden_dim": 8,
        "latent": {"name": "gaussian", "dim": DIM, "prior": "linear"},
        "editor": {"name": "linear"},
        "action_dim": action_dim,
    }
    data = {"source": "videos", "root": "x", "num_frames": 1, "channels": 1, "frame_stride": 1}
    return validate(
        {
            "run_dir": "x",
            "data": data,
            "model": model | changes,
            "objective": {"name": "vicreg"},
            "train": {"refine_steps": 1},
        },
        source="test",
    )


def law(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = A x + B a + b + e with a full covariance of e: contexts, targets, actions, and the mean of y."""
    a, b = torch.tensor([[0.9, 0.2, 0.0], [0.0, 0.7, 0.1], [0.1, 0.0, 0.5]]), torch.tensor([[0.5], [0.0], [-0.3]])
    x = torch.randn(count, DIM, generator=generator) * torch.tensor([1.0, 3.0, 0.5])
    action = torch.randn(count, 1, generator=generator)
    mean = x @ a.T + action @ b.T + torch.tensor([0.2, -1.0, 0.0])
    return x, mean + torch.randn(count, DIM, generator=generator) @ FACTOR.T, action, mean


FACTOR = torch.tensor([[0.3, 0.0, 0.0], [0.2, 0.4, 0.0], [-0.1, 0.1, 0.2]])


def started(num_pairs: int, latent_dim: int = DIM) -> WorldModel:
    latent = {"name": "gaussian", "dim": latent_dim, "prior": "linear"}
    model = build_training_model(linear_config(action_dim=1, latent=latent)).model.eval()
    assert starts_linear(model)
    x, y, action, _ = law(torch.Generator().manual_seed(0), num_pairs)
    held = law(torch.Generator().manual_seed(1), 500)

    def score() -> float:
        drawn = model.rollout_embedding(held[0], 1, 2, torch.Generator().manual_seed(2), actions=held[2][:, None])
        first, second = drawn[:, :, 0].unbind(1)
        return float((first - held[1]).norm(dim=1).mean() - 0.5 * (first - second).norm(dim=1).mean())

    start_linear(model, x, y, action, score)
    return model


@pytest.mark.parametrize("latent_dim", [DIM, DIM + 2])
@torch.no_grad()
def test_the_start_has_mean_and_covariance_of_the_law(latent_dim: int) -> None:
    model = started(20_000, latent_dim)
    x, _, action, mean = law(torch.Generator().manual_seed(3), 200)
    futures = model.rollout_embedding(x, 1, 4000, torch.Generator().manual_seed(4), actions=action[:, None])[:, :, 0]
    assert (futures.mean(dim=1) - mean).abs().max() < 0.05
    residuals = (futures - futures.mean(dim=1, keepdim=True)).flatten(0, 1)
    torch.testing.assert_close(residuals.T @ residuals / len(residuals), FACTOR @ FACTOR.T, atol=0.01, rtol=0.05)


@torch.no_grad()
def test_an_r_of_fewer_dimensions_holds_the_largest_changes() -> None:
    model = started(20_000, 2)
    x, y, action, mean = law(torch.Generator().manual_seed(3), 500)
    futures = model.rollout_embedding(x, 1, 500, torch.Generator().manual_seed(4), actions=action[:, None])[:, :, 0]
    assert isinstance(model.latent.prior, LinearPrior)
    spread = model.latent.prior.spread[:DIM]
    change, forecast = (y - x) / spread, (futures.mean(dim=1) - x) / spread
    leading = torch.linalg.svd(change, full_matrices=False).Vh[:2]
    torch.testing.assert_close(forecast @ leading.T, (mean - x) / spread @ leading.T, atol=0.2, rtol=0)
    assert torch.linalg.matrix_rank(forecast - forecast.mean(dim=0), atol=0.01 * len(forecast) ** 0.5) == 2


@pytest.mark.parametrize("latent_dim", [2, 4, 6, 8])
@torch.no_grad()
def test_few_pairs_have_as_many_components(latent_dim: int) -> None:
    """Embeddings of six dimensions, three pairs."""
    latent = {"name": "gaussian", "dim": latent_dim, "prior": "linear"}
    model = build_training_model(linear_config(embedding_dim=6, latent=latent)).model.eval()
    contexts, targets = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    start_linear(model, contexts, targets, torch.empty(3, 0), lambda: 0.0)
    futures = model.rollout_embedding(contexts, 1, 100, torch.Generator().manual_seed(1))[:, :, 0]
    assert futures.isfinite().all()
    changes = (futures - futures.mean(dim=1, keepdim=True)).flatten(0, 1)
    num_components = min(latent_dim, 3) if latent_dim < 6 else 6
    assert torch.linalg.matrix_rank(changes, rtol=1e-3) == num_components


def test_other_models_do_not_start_linear() -> None:
    for changes in ({"editor": {"name": "residual"}}, {"latent": {"name": "gaussian", "dim": DIM}}):
        assert not starts_linear(build_training_model(linear_config(**changes)).model)


def test_a_share_of_the_change_is_kept() -> None:
    """That of a forecast, and not of networks that started at random."""
    training = build_training_model(linear_config(scene_dim=2, distance_dim=2))
    start = {name: torch.zeros_like(value) for name, value in training.state_dict().items()}
    trained = {name: value.clone() for name, value in training.state_dict().items()}
    keep_share(training, start)
    parts = set()
    for name, value in training.state_dict().items():
        part = ".".join(name.split(".")[: 2 if name.startswith("latent.") else 1])
        kept = KEPT if value.is_floating_point() and part in ("editor", "latent.prior") else 1
        torch.testing.assert_close(value, kept * trained[name])
        parts.add(part)
    assert {"editor", "latent.prior", "latent.posterior_net", "scene", "distance", "embedder"} <= parts


@torch.no_grad()
def test_inputs_that_do_not_vary_in_training_are_not_magnified() -> None:
    """Scene codes, of which the start uses nothing, and actions that were never taken."""
    model = build_training_model(linear_config(action_dim=2, scene_dim=2)).model.eval()
    x, y, action, _ = law(torch.Generator().manual_seed(0), 500)
    start_linear(model, x, y, torch.cat([action, torch.full_like(action, 0.5)], dim=1), lambda: 0.0)
    assert isinstance(model.latent.prior, LinearPrior)
    assert model.latent.prior.spread[DIM : DIM + 2].tolist() == [1, 1] and model.latent.prior.spread[-1] == 1
    torch.testing.assert_close(model.latent.prior.spread[:DIM], x.std(dim=0), atol=1e-4, rtol=0)


def test_a_linear_editor_without_r_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.editor=linear changes the embedding by r alone: it needs a latent"):
        linear_config(latent={"name": "none"})
