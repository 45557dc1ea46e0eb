import torch
from torch.distributions import Independent, Normal, kl_divergence

from worldmodel.latents import GaussianLatent, draw_gaussian, gaussian_kl


def gaussian(seed: int, batch: int = 6, dims: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, dims, generator=generator), torch.rand(batch, dims, generator=generator) + 0.1


def test_kl_equals_torch_distributions() -> None:
    q, p = gaussian(0), gaussian(1)
    expected = kl_divergence(Independent(Normal(*q), 1), Independent(Normal(*p), 1))
    torch.testing.assert_close(gaussian_kl(*q, *p), expected)


def test_kl_is_positive_and_zero_only_between_equals() -> None:
    q, p = gaussian(0), gaussian(1)
    assert (gaussian_kl(*q, *p) > 0).all()
    torch.testing.assert_close(gaussian_kl(*q, *q), torch.zeros(6))


def test_gradient_of_kl_equals_finite_differences() -> None:
    q, p = ([value.double().requires_grad_() for value in gaussian(seed)] for seed in (0, 1))
    assert torch.autograd.gradcheck(gaussian_kl, (*q, *p))


def test_draws_have_the_mean_and_scale_and_carry_gradients() -> None:
    mean = torch.tensor([[1.0, -2.0]]).requires_grad_()
    scale = torch.tensor([[0.5, 2.0]]).requires_grad_()
    many = draw_gaussian(mean.expand(40_000, 2), scale.expand(40_000, 2), torch.Generator().manual_seed(0))
    torch.testing.assert_close(many.mean(dim=0), mean[0], atol=0.05, rtol=0)
    torch.testing.assert_close(many.std(dim=0), scale[0], atol=0.05, rtol=0)
    draw_gaussian(mean, scale).sum().backward()
    assert mean.grad is not None and scale.grad is not None
    torch.testing.assert_close(mean.grad, torch.ones(1, 2))


def test_prior_reads_the_context_alone_and_posterior_also_the_later_segment() -> None:
    torch.manual_seed(0)
    latent = GaussianLatent(embedding_dim=8, hidden_dim=16, latent_dim=3).eval()
    context, later, other = torch.randn(3, 5, 8).unbind(0)
    mean, scale = latent.prior(context)
    assert mean.shape == scale.shape == (5, 3)
    assert (scale >= 1e-6).all()
    assert not torch.allclose(latent.posterior(context, later)[0], latent.posterior(context, other)[0])
    assert not torch.allclose(latent.posterior(context, later)[0], latent.posterior(other, later)[0])
