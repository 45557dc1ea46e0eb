import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from worldmodel.latents import Gaussian, GaussianLatent, Mixture, gaussian_kl
from worldmodel.latents import kl_divergence as kl_to_prior


def gaussian(seed: int, *shape: int) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    shape = shape or (6, 3)
    return Gaussian(torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) + 0.1)


def mixture(seed: int, batch: int = 6, num_components: int = 4, dims: int = 3) -> Mixture:
    logits = torch.randn(batch, num_components, generator=torch.Generator().manual_seed(seed))
    return Mixture(logits.log_softmax(dim=-1), gaussian(seed + 1, batch, num_components, dims))


def independent(g: Gaussian) -> Independent:
    return Independent(Normal(*g), 1)


def in_torch(p: Mixture) -> MixtureSameFamily:
    return MixtureSameFamily(Categorical(logits=p.log_weights), independent(p.components))


def test_kl_equals_torch_distributions() -> None:
    q, p = gaussian(0), gaussian(1)
    torch.testing.assert_close(gaussian_kl(q, p), kl_divergence(independent(q), independent(p)))


def test_kl_is_positive_and_zero_only_between_equals() -> None:
    q, p = gaussian(0), gaussian(1)
    assert (gaussian_kl(q, p) > 0).all()
    torch.testing.assert_close(gaussian_kl(q, q), torch.zeros(6))


def test_gradient_of_kl_equals_finite_differences() -> None:
    def kl(*values: torch.Tensor) -> torch.Tensor:
        return gaussian_kl(Gaussian(*values[:2]), Gaussian(*values[2:]))

    values = [value.double().requires_grad_() for seed in (0, 1) for value in gaussian(seed)]
    assert torch.autograd.gradcheck(kl, values)


def test_log_densities_equal_torch_distributions() -> None:
    r = torch.randn(6, 3, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(gaussian(0).log_density(r), independent(gaussian(0)).log_prob(r))
    torch.testing.assert_close(mixture(0).log_density(r), in_torch(mixture(0)).log_prob(r))
    torch.testing.assert_close(mixture(0).mean, in_torch(mixture(0)).mean)


def test_draws_have_the_mean_and_scale_and_carry_gradients() -> None:
    mean = torch.tensor([[1.0, -2.0]]).requires_grad_()
    scale = torch.tensor([[0.5, 2.0]]).requires_grad_()
    many = Gaussian(mean.expand(40_000, 2), scale.expand(40_000, 2)).draw(torch.Generator().manual_seed(0))
    torch.testing.assert_close(many.mean(dim=0), mean[0], atol=0.05, rtol=0)
    torch.testing.assert_close(many.std(dim=0), scale[0], atol=0.05, rtol=0)
    Gaussian(mean, scale).draw().sum().backward()
    assert mean.grad is not None and scale.grad is not None
    torch.testing.assert_close(mean.grad, torch.ones(1, 2))


def test_draws_of_a_mixture_follow_its_density() -> None:
    """One dimension: the histogram of draws beside the integral of the density over each bin."""
    one = mixture(3, batch=1, num_components=3, dims=1)
    many = Mixture(one.log_weights.expand(50_000, -1), Gaussian(*(v.expand(50_000, -1, -1) for v in one.components)))
    draws = many.draw(torch.Generator().manual_seed(0))[:, 0]
    edges = torch.linspace(-4, 4, 33)
    counted = torch.histogram(draws, edges).hist / 50_000
    fine = torch.linspace(-4, 4, 3201)
    density = Mixture(one.log_weights, one.components).log_density(fine[:, None]).exp()
    expected = density[:-1].reshape(32, 100).mean(dim=1) * 0.25
    torch.testing.assert_close(counted, expected, atol=0.006, rtol=0)


def test_the_estimated_kl_of_a_mixture_of_equal_components_is_the_closed_form() -> None:
    q, p = gaussian(0), gaussian(1)
    components = Gaussian(*(value.unsqueeze(1).expand(-1, 3, -1) for value in p))
    prior = Mixture(torch.full((6, 3), 1 / 3).log(), components)
    generator = torch.Generator().manual_seed(0)
    estimates = torch.stack([kl_to_prior(q, prior, q.draw(generator)) for _ in range(20_000)])
    error = estimates.std(dim=0) / 20_000**0.5
    assert ((estimates.mean(dim=0) - gaussian_kl(q, p)).abs() < 5 * error).all()


@pytest.mark.parametrize("num_components", [1, 4])
def test_prior_reads_the_context_alone_and_posterior_also_the_later_segment(num_components: int) -> None:
    torch.manual_seed(0)
    latent = GaussianLatent(embedding_dim=8, hidden_dim=16, latent_dim=3, num_components=num_components).eval()
    context, later, other = torch.randn(3, 5, 8).unbind(0)
    prior = latent.prior(context)
    assert prior.components.mean.shape == prior.components.scale.shape == (5, num_components, 3)
    assert prior.draw().shape == (5, 3)
    assert (prior.components.scale >= 1e-6).all()
    torch.testing.assert_close(prior.log_weights.exp().sum(dim=1), torch.ones(5))
    assert not torch.allclose(latent.posterior(context, later).mean, latent.posterior(context, other).mean)
    assert not torch.allclose(latent.posterior(context, later).mean, latent.posterior(other, later).mean)
