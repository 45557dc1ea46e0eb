import pytest
import torch

from worldmodel.config import DataConfig, ModelConfig
from worldmodel.latents import Gaussian, gaussian_kl
from worldmodel.model import WorldModel
from worldmodel.objectives import negative_cosine


def model(latent: str = "gaussian", **sizes: int) -> WorldModel:
    torch.manual_seed(0)
    defaults = {"embedding_dim": 16, "hidden_dim": 32, "latent_dim": 3}
    config = ModelConfig(width=0.125, latent=latent, **{**defaults, **sizes})  # type: ignore[arg-type]
    return WorldModel(config, DataConfig(channels=1))


def clip(batch: int = 4) -> torch.Tensor:
    return torch.rand(batch, 3, 1, 64, 64, generator=torch.Generator().manual_seed(0))


def embeddings(batch: int = 4, dims: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, dims, generator=torch.Generator().manual_seed(seed))


def test_rollout_shape_and_determinism() -> None:
    world = model().eval()
    with torch.no_grad():
        futures = world.rollout(clip(), 5, 7, torch.Generator().manual_seed(2))
        again = world.rollout(clip(), 5, 7, torch.Generator().manual_seed(2))
        other = world.rollout(clip(), 5, 7, torch.Generator().manual_seed(3))
    assert futures.shape == (4, 7, 5, 16)
    assert torch.equal(futures, again)
    assert not torch.allclose(futures, other)
    assert futures.std(dim=1).min() > 0


def test_rollout_feeds_predictions_back() -> None:
    """Step h of a long rollout is a one-step rollout of step h - 1, with the same draw."""
    world = model().eval()
    context = embeddings()
    with torch.no_grad():
        two_steps = world.rollout_embedding(context, 2, 1, torch.Generator().manual_seed(5))[:, 0]
        generator = torch.Generator().manual_seed(5)
        first = world.edit(context, world.sample(context, generator))
        second = world.edit(first, world.sample(first, generator))
    torch.testing.assert_close(two_steps, torch.stack([first, second], dim=1))


def test_edited_embeddings_are_as_long_as_encoded_ones() -> None:
    world = model().eval()
    with torch.no_grad():
        encoded = world.encode(clip())
        futures = world.rollout(clip(), 3, 2)
    torch.testing.assert_close(encoded.norm(dim=-1), torch.full((4,), 4.0))
    torch.testing.assert_close(futures.norm(dim=-1), torch.full((4, 2, 3), 4.0))


def test_samples_come_from_the_prior() -> None:
    world = model().eval()
    assert world.latent is not None
    context = embeddings(1).expand(20_000, -1)
    with torch.no_grad():
        prior = world.latent.prior(context[:1]).components
        draws = world.sample(context, torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws.mean(dim=0), prior.mean[0, 0], atol=0.05, rtol=0)
    torch.testing.assert_close(draws.std(dim=0), prior.scale[0, 0], atol=0.05, rtol=0)


def test_loss_is_prediction_plus_beta_kl() -> None:
    world = model().eval()  # running statistics: the parts can be computed one by one
    target, later = embeddings(seed=1), clip().flip(1)
    losses = world(clip(), later, target, 0.25, torch.Generator().manual_seed(0))
    assert world.latent is not None
    context = world.encode(clip())
    q, p = world.latent.posterior(context, world.encode(later)), world.latent.prior(context).components
    kl = gaussian_kl(q, Gaussian(p.mean[:, 0], p.scale[:, 0])).mean()
    r = q.mean + q.scale * torch.randn(q.mean.shape, generator=torch.Generator().manual_seed(0))
    prediction = negative_cosine(world.edit(context, r), target)
    torch.testing.assert_close(losses["loss"], prediction + 0.25 * kl)
    torch.testing.assert_close(losses["kl_nats"], kl.detach())
    assert losses["kl_nats"] > 0


def test_every_parameter_learns() -> None:
    for latent in ("gaussian", "none"):
        world = model(latent)
        world(clip(), clip().flip(1), embeddings(seed=1), 0.1)["loss"].backward()
        still = [name for name, p in world.named_parameters() if p.grad is None or not p.grad.any()]
        # The first layers' biases and the like may rest; a whole part of the model may not.
        assert not still, still


def test_the_encoder_learns_through_the_posterior() -> None:
    """The loss has a gradient in x++. With running statistics no other way than the posterior leads there."""
    world = model().eval()
    later = clip().flip(1).requires_grad_()
    world(clip(), later, embeddings(seed=1), 0.1, torch.Generator().manual_seed(0))["loss"].backward()
    assert later.grad is not None and later.grad.abs().max() > 0


def test_without_a_latent_there_is_one_future() -> None:
    world = model("none").eval()
    with torch.no_grad():
        futures = world.rollout(clip(), 2, 5)
        r, kl = world.infer(embeddings(), embeddings())
    torch.testing.assert_close(futures, futures[:, :1].expand(-1, 5, -1, -1))
    assert r.shape == (4, 0) and torch.equal(kl, torch.zeros(4))
    assert "kl_nats" not in world(clip(), clip(), embeddings(), 0.1)


@pytest.mark.parametrize("which", ["context", "later"])
def test_the_posterior_moves_with_both_segments(which: str) -> None:
    world = model().eval()
    context, later = embeddings(seed=1), embeddings(seed=2)
    changed = {"context": (embeddings(seed=3), later), "later": (context, embeddings(seed=3))}[which]
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    with torch.no_grad():
        first, second = world.infer(context, later, generators[0])[0], world.infer(*changed, generators[1])[0]
    assert not torch.allclose(first, second)
