import math
import sys

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from data_pipelines.errors import UserError
from tests.conftest import normal
from worldmodel.nets.distributions import (
    Distribution,
    Flow,
    Gaussian,
    Mixture,
    SpikeAndSlab,
    bernoulli_mask,
    draw_and_choice,
    gaussian_kl,
)
from worldmodel.nets.distributions import kl_divergence as kl_to_prior
from worldmodel.nets.latents import (
    PRIOR_NLL,
    FlowPrior,
    OracleLatent,
)
from worldmodel.nets.parallel import rand_rows, randn_rows


def gaussian(seed: int, *shape: int) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    shape = shape or (6, 3)
    return Gaussian(torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) + 0.1)


def mixture(seed: int, batch: int = 6, num_components: int = 4, dims: int = 3) -> Mixture:
    logits = normal(seed, batch, num_components)
    return Mixture(logits.log_softmax(dim=-1), gaussian(seed + 1, batch, num_components, dims))


def spike_and_slab(seed: int, batch: int = 6, num_components: int = 3, dims: int = 2) -> SpikeAndSlab:
    drawn = mixture(seed, batch, num_components, dims)
    return SpikeAndSlab(drawn.log_weights, normal(seed + 2, batch, num_components, dims), drawn.components)


class Affine:
    """Noise is scale * r + shift."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        self.scale, self.shift = scale, shift

    def inv(self, noise: Tensor) -> Tensor:
        return (noise - self.shift) / self.scale

    def call_and_ladj(self, r: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale * r + self.shift, self.scale.log().sum(dim=-1)


def affine_flow(scale: Tensor, shift: Tensor) -> Flow:
    return Flow(Affine(scale, shift), torch.zeros_like(scale))


def flow_prior(latent_dim: int) -> FlowPrior:
    """With weights large enough to be far from a Gaussian."""
    torch.manual_seed(0)
    prior = FlowPrior(embedding_dim=3, hidden_dim=32, latent_dim=latent_dim)
    with torch.no_grad():
        for values in prior.parameters():
            values.mul_(1.5)
    return prior


def tensors(g: Gaussian) -> tuple[Tensor, Tensor]:
    return g.mean, g.scale


def independent(g: Gaussian) -> Independent:
    return Independent(Normal(g.mean, g.scale), 1)


def in_torch(p: Mixture) -> MixtureSameFamily:
    return MixtureSameFamily(Categorical(logits=p.log_weights), independent(p.components))


def assert_histogram_follows(draws: Tensor, one: Distribution) -> None:
    """Draws of one coordinate [N] beside the integral of the density of `one` (a batch of 8001) over each bin."""
    edges = torch.linspace(-4, 4, 33)
    counted = torch.histogram(draws, edges).hist / len(draws)
    density = one.log_density(torch.linspace(-4, 4, 8001)[:, None]).detach().exp()
    expected = ((density[1:] + density[:-1]) / 2).reshape(32, 250).mean(dim=1) * 0.25
    assert expected.sum() > 0.9
    torch.testing.assert_close(counted, expected, atol=0.01, rtol=0)


# ----------------------------------------------------------------------------------------- Gaussians and mixtures


def test_kl_equals_torch_distributions() -> None:
    q, p = gaussian(0), gaussian(1)
    torch.testing.assert_close(gaussian_kl(q, p), kl_divergence(independent(q), independent(p)))


def test_kl_is_positive_and_zero_only_between_equals() -> None:
    q, p = gaussian(0), gaussian(1)
    assert (gaussian_kl(q, p) > 0).all()
    torch.testing.assert_close(gaussian_kl(q, q), torch.zeros(6))


def test_gradient_of_kl_equals_finite_differences() -> None:
    def kl(*values: Tensor) -> Tensor:
        return gaussian_kl(Gaussian(*values[:2]), Gaussian(*values[2:]))

    values = [value.double().requires_grad_() for seed in (0, 1) for value in tensors(gaussian(seed))]
    assert torch.autograd.gradcheck(kl, values)


def test_log_densities_equal_torch_distributions() -> None:
    r = normal(9, 6, 3)
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
    one = mixture(3, batch=1, num_components=3, dims=1)
    many = Mixture(
        one.log_weights.expand(50_000, -1), Gaussian(*(v.expand(50_000, -1, -1) for v in tensors(one.components)))
    )
    assert_histogram_follows(many.draw(torch.Generator().manual_seed(0))[:, 0], one)


def estimated_kl(q: Gaussian, prior: Distribution, num_draws: int) -> tuple[Tensor, Tensor]:
    """The mean over draws for each clip, and its standard error; `prior` repeats the clips of q num_draws times."""
    many = Gaussian(*(value.repeat(num_draws, 1) for value in tensors(q)))
    estimates = kl_to_prior(many, prior, many.draw(torch.Generator().manual_seed(0))).unflatten(0, (num_draws, -1))
    return estimates.mean(dim=0), estimates.std(dim=0) / num_draws**0.5


def test_the_estimated_kl_of_a_mixture_of_equal_components_is_the_closed_form() -> None:
    q, p = gaussian(0), gaussian(1)
    components = Gaussian(*(value.unsqueeze(1).expand(-1, 3, -1).repeat(5000, 1, 1) for value in tensors(p)))
    estimate, error = estimated_kl(q, Mixture(torch.full((30_000, 3), 1 / 3).log(), components), 5000)
    assert ((estimate - gaussian_kl(q, p)).abs() < 5 * error).all()


def test_the_kl_to_a_single_component_does_not_depend_on_the_draw() -> None:
    q, p = gaussian(0), gaussian(1)
    prior = Mixture(torch.zeros(6, 1), Gaussian(*(value.unsqueeze(1) for value in tensors(p))))
    expected = kl_divergence(independent(q), independent(p))
    torch.testing.assert_close(kl_to_prior(q, prior, torch.full((6, 3), torch.nan)), expected)


# ------------------------------------------------------------------------------------------------- Bernoulli mask


def test_the_kl_to_a_gaussian_is_the_closed_form() -> None:
    q, p = Gaussian(normal(0, 5, 3), normal(1, 5, 3).exp()), Gaussian(normal(2, 5, 3), normal(3, 5, 3).exp())
    torch.testing.assert_close(kl_to_prior(q, p, q.draw()), kl_divergence(independent(q), independent(p)))


def test_mask_is_exactly_zero_or_one() -> None:
    mask = bernoulli_mask(normal(0, 100_000), torch.Generator().manual_seed(0))
    assert mask.unique().tolist() == [0.0, 1.0]


def test_mask_is_on_as_often_as_the_sigmoid_says() -> None:
    logits = torch.tensor([-20.0, -3.0, -0.5, 0.0, 1.0, 20.0])
    often = bernoulli_mask(logits.expand(40_000, -1), torch.Generator().manual_seed(0)).mean(dim=0)
    torch.testing.assert_close(often, logits.sigmoid(), atol=0.01, rtol=0)
    assert often[0] == 0 and often[-1] == pytest.approx(1, abs=1e-6)


def test_gradient_of_the_mask_is_that_of_a_sigmoid_with_the_same_noise() -> None:
    logits = normal(0, 50).requires_grad_()
    bernoulli_mask(logits, torch.Generator().manual_seed(1)).sum().backward()
    uniform = torch.rand(50, generator=torch.Generator().manual_seed(1))
    soft = 1 / (1 + torch.exp(-logits.detach()) * (1 - uniform) / uniform)
    torch.testing.assert_close(logits.grad, soft * (1 - soft))


# ------------------------------------------------------------------------------------------------- spike and slab


def test_log_density_of_a_spike_and_slab_equals_its_terms_one_by_one() -> None:
    """Of every pattern of zeros: the weighted sum over components of the product over coordinates."""
    p = spike_and_slab(0, batch=4)
    r = torch.tensor([[0.0, 0.0], [0.0, -0.7], [1.2, 0.0], [0.4, 2.0]])
    for clip in range(4):
        total = 0.0
        for k in range(3):
            term = p.log_weights[clip, k].exp()
            for i in range(2):
                on = Bernoulli(logits=p.on_logits[clip, k, i])
                slab = Normal(p.slab.mean[clip, k, i], p.slab.scale[clip, k, i])
                is_on = r[clip, i] != 0
                term = term * on.log_prob(is_on.float()).exp() * (slab.log_prob(r[clip, i]).exp() if is_on else 1)
            total += term.item()
        assert p.log_density(r)[clip].item() == pytest.approx(math.log(total), abs=1e-5)


def test_gradient_of_a_spike_and_slab_is_finite_and_equals_finite_differences() -> None:
    r = torch.tensor([[0.0, 0.0], [0.0, -0.7], [1.2, 0.4]], dtype=torch.float64)

    def log_density(*values: Tensor) -> Tensor:
        return SpikeAndSlab(values[0].log_softmax(dim=-1), values[1], Gaussian(*values[2:])).log_density(r)

    p = spike_and_slab(0, batch=3)
    assert torch.autograd.gradcheck(
        log_density, [value.double().requires_grad_() for value in (p.log_weights, p.on_logits, *tensors(p.slab))]
    )


def test_draws_of_a_spike_and_slab_have_its_zeros_its_slab_and_its_mean() -> None:
    one = spike_and_slab(7, batch=1)
    values = [
        one.log_weights.expand(50_000, -1),
        *(v.expand(50_000, -1, -1) for v in (one.on_logits, *tensors(one.slab))),
    ]
    draws = SpikeAndSlab(values[0], values[1], Gaussian(*values[2:])).draw(torch.Generator().manual_seed(0))

    weights, on = one.log_weights[0].exp(), one.on_logits[0].sigmoid()
    for pattern in ((0, 0), (0, 1), (1, 0), (1, 1)):
        wanted = torch.tensor(pattern).bool()
        expected = (weights * torch.where(wanted, on, 1 - on).prod(dim=-1)).sum().item()
        assert ((draws != 0) == wanted).all(dim=1).float().mean().item() == pytest.approx(expected, abs=0.01)
    torch.testing.assert_close(draws.mean(dim=0), one.mean[0], atol=0.02, rtol=0)

    # Where a coordinate is not zero it is a mixture of its slabs, each as heavy as it is often on.
    share = weights * on[:, 0]
    slabs = Gaussian(one.slab.mean[..., :1], one.slab.scale[..., :1])
    assert_histogram_follows(draws[:, 0][draws[:, 0] != 0], Mixture((share / share.sum()).log()[None], slabs))


def test_components_let_one_coordinate_be_on_only_while_the_other_is_off() -> None:
    on_logits = torch.tensor([[20.0, -20.0], [-20.0, 20.0]]).expand(20_000, -1, -1)
    slab = Gaussian(torch.ones(20_000, 2, 2), torch.ones(20_000, 2, 2))
    weights = torch.tensor([0.3, 0.7]).log().expand(20_000, -1)
    on = SpikeAndSlab(weights, on_logits, slab).draw(torch.Generator().manual_seed(0)) != 0
    assert (on.sum(dim=1) == 1).all()
    assert on[:, 0].float().mean().item() == pytest.approx(0.3, abs=0.015)


def test_a_draw_comes_with_the_log_probability_of_its_component_and_zeros() -> None:
    mean = torch.tensor([[[-9.0], [0.0], [9.0]]]).expand(2_000, -1, -1)
    log_weights = torch.tensor([0.2, 0.3, 0.5]).log().expand(2_000, -1)
    narrow = Gaussian(mean, torch.full_like(mean, 0.1))
    r, log_weight = draw_and_choice(Mixture(log_weights, narrow), torch.Generator().manual_seed(0))
    assert torch.equal(r, Mixture(log_weights, narrow).draw(torch.Generator().manual_seed(0)))
    nearest = (r[:, None] - mean).abs().argmin(dim=1)
    assert torch.equal(log_weight, log_weights.gather(1, nearest).squeeze(1))

    one = spike_and_slab(7, batch=2_000)
    always = SpikeAndSlab(log_weights, one.on_logits[:, :1, :1].expand(-1, 3, -1), Gaussian(mean + 20, narrow.scale))
    r, log_probability = draw_and_choice(always, torch.Generator().manual_seed(0))
    assert torch.equal(r, always.draw(torch.Generator().manual_seed(0)))
    nearest = (r[:, None] - mean - 20).abs().argmin(dim=1)
    on, chance_on = r[:, 0] != 0, one.on_logits[:, 0, 0].sigmoid()
    torch.testing.assert_close(log_probability[on], log_weights.gather(1, nearest).squeeze(1)[on] + chance_on.log()[on])
    off = log_weights[0] + (1 - chance_on[~on, None]).log()
    assert (log_probability[~on, None] - off).abs().amin(dim=1).max() < 1e-5


def fitted_patterns(num_components: int) -> dict[tuple[bool, bool], float]:
    """Of a prior fitted to an r with one axis that changes and one that does not: how often it draws each pattern."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    latent = OracleLatent(3, 8, dim=2, prior_components=num_components)
    optimizer = torch.optim.Adam(latent.parameters(), lr=0.03)
    for _ in range(200):
        first = torch.rand(256, 1, generator=generator) < 0.3
        change = 0.5 + torch.rand(256, 1, generator=generator)
        known = change * torch.cat([first, ~first], dim=1)
        nll = latent.infer(torch.randn(256, 3, generator=generator), torch.empty(256, 0), known).costs[PRIOR_NLL]
        optimizer.zero_grad()
        nll.mean().backward()
        optimizer.step()
    drawn = latent.eval().prior(torch.randn(10_000, 3, generator=generator)).draw(generator) != 0
    patterns = [(a, b) for a in (False, True) for b in (False, True)]
    return {pattern: (drawn == torch.tensor(pattern)).all(dim=1).float().mean().item() for pattern in patterns}


def test_a_fitted_prior_with_four_components_knows_that_one_axis_changes_at_a_time() -> None:
    expected = {(False, False): 0.0, (False, True): 0.7, (True, False): 0.3, (True, True): 0.0}
    assert fitted_patterns(4) == pytest.approx(expected, abs=0.05)


# ----------------------------------------------------------------------------------------------------------- flow


def test_an_affine_flow_is_the_gaussian_it_makes_of_noise() -> None:
    scale, shift, r = gaussian(0).scale, normal(1, 6, 3), normal(2, 6, 3)
    flow, expected = affine_flow(scale, shift), Gaussian(-shift / scale, 1 / scale)
    torch.testing.assert_close(flow.log_density(r), independent(expected).log_prob(r))
    torch.testing.assert_close(flow.mean, expected.mean)
    draws = [p.draw(torch.Generator().manual_seed(3)) for p in (flow, expected)]
    torch.testing.assert_close(draws[0], draws[1])


@pytest.mark.parametrize("affine", [False, True])
def test_the_estimated_kl_to_a_flow_is_the_closed_form_to_the_gaussian_that_it_is(affine: bool) -> None:
    """The identity, which is the standard normal, and an affine map."""
    q = gaussian(0)
    scale, shift = (gaussian(1).scale + 0.5, normal(2, 6, 3)) if affine else (torch.ones(6, 3), torch.zeros(6, 3))
    expected = kl_divergence(independent(q), independent(Gaussian(-shift / scale, 1 / scale)))
    estimate, error = estimated_kl(q, affine_flow(scale.repeat(5000, 1), shift.repeat(5000, 1)), 5000)
    assert ((estimate - expected).abs() < 5 * error).all()


def test_draws_of_a_flow_in_one_dimension_follow_its_density() -> None:
    prior, context = flow_prior(1), normal(1, 1, 3)
    with torch.no_grad():
        draws = prior(context.expand(30_000, -1)).draw(torch.Generator().manual_seed(0))[:, 0]
        assert_histogram_follows(draws, prior(context.expand(8001, -1)))
    # Far from a Gaussian of the same mean and variance: otherwise a flow that did nothing would pass.
    edges = torch.linspace(-4, 4, 33)
    gaussian_share = Normal(draws.mean(), draws.std()).cdf(edges).diff()
    assert (torch.histogram(draws, edges).hist / 30_000 - gaussian_share).abs().max() > 0.02


def test_density_of_a_flow_in_two_dimensions_integrates_to_the_share_of_its_draws() -> None:
    """Over the plane and over boxes that tell how the two coordinates go together."""
    prior, context = flow_prior(2), normal(1, 1, 3)
    axis = torch.arange(-6, 6, 0.05) + 0.025
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        mass = prior(context.expand(len(grid), -1)).log_density(grid).exp() * 0.05**2
        draws = prior(context.expand(20_000, -1)).draw(torch.Generator().manual_seed(0))
    assert mass.sum().item() == pytest.approx(1, abs=0.01)
    lows = torch.cartesian_prod(torch.arange(-3.0, 3), torch.arange(-3.0, 3))
    expected, counted = (
        torch.stack([(((points >= low) & (points < low + 1)).all(dim=1) * weights).sum() for low in lows])
        for points, weights in ((grid, mass), (draws, torch.full((20_000,), 1 / 20_000)))
    )
    torch.testing.assert_close(counted, expected, atol=0.012, rtol=0)


def test_a_flow_depends_on_the_context_and_its_draws_on_the_generator() -> None:
    prior, (context, other) = flow_prior(3), normal(1, 2, 5, 3)
    first, again, elsewhere = (prior(z).draw(torch.Generator().manual_seed(0)) for z in (context, context, other))
    assert first.shape == (5, 3) and torch.equal(first, again)
    assert not torch.allclose(first, prior(context).draw(torch.Generator().manual_seed(1)))
    assert ((first - elsewhere).abs().amax(dim=1) > 1e-3).all()
    density = prior(context).log_density(first)
    assert density.shape == (5,) and density.isfinite().all()
    assert ((density - prior(other).log_density(first)).abs() > 1e-3).all()
    assert prior(context).mean.shape == (5, 3)


def test_a_flow_works_in_float32_within_autocast() -> None:
    prior, context = flow_prior(3), normal(1, 5, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        draws = prior(context.bfloat16()).draw(torch.Generator().manual_seed(0))
        density = prior(context).log_density(draws)
    assert draws.dtype == density.dtype == torch.float32
    torch.testing.assert_close(density, prior(context).log_density(draws), atol=1e-4, rtol=1e-4)


def test_a_missing_zuko_is_told_in_one_line_with_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(UserError, match=r"pip install 'worldmodel\[flow\]'") as raised:
        FlowPrior(embedding_dim=8, hidden_dim=16, latent_dim=3)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_the_numbers_of_torch_s_own_functions(dtype: torch.dtype) -> None:
    like = torch.empty(130, 7, dtype=dtype)
    for draw, reference in ((randn_rows, torch.randn), (rand_rows, torch.rand)):
        drawn = draw(like, torch.Generator().manual_seed(3))
        assert torch.equal(drawn, reference(130, 7, generator=torch.Generator().manual_seed(3), dtype=dtype))
