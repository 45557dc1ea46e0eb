import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from tests.conftest import normal
from worldmodel import parts
from worldmodel.config import GaussianConfig, LatentConfig, NoLatentConfig, OracleConfig, SparseConfig
from worldmodel.nets.latents import (
    PRIOR_NLL,
    FlowPrior,
    GaussianLatent,
    Latent,
    LinearPrior,
    MixturePrior,
    NoLatent,
    OracleLatent,
    SparseLatent,
    SpikeAndSlabPrior,
)


def make(
    name: str, prior: str = "mixture", latent_dim: int = 3, prior_components: int = 2
) -> GaussianLatent | SparseLatent | OracleLatent:
    torch.manual_seed(0)
    config: LatentConfig
    if name == "gaussian":
        config = GaussianConfig(dim=latent_dim, prior=prior, prior_components=prior_components)  # type: ignore[arg-type]
    else:
        kind = {"sparse": SparseConfig, "oracle": OracleConfig}[name]
        config = kind(dim=latent_dim, prior_components=prior_components)
    latent = parts.build_module("model.latent.name", config, Latent, context_dim=8, embedding_dim=8, hidden_dim=16)
    assert isinstance(latent, GaussianLatent | SparseLatent | OracleLatent)
    return latent


def no_r(batch: int) -> Tensor:
    return torch.empty(batch, 0)


@pytest.mark.parametrize(
    ("name", "prior", "latent", "kind"),
    [
        ("gaussian", "mixture", GaussianLatent, MixturePrior),
        ("gaussian", "flow", GaussianLatent, FlowPrior),
        ("gaussian", "linear", GaussianLatent, LinearPrior),
        ("sparse", "mixture", SparseLatent, SpikeAndSlabPrior),
        ("oracle", "mixture", OracleLatent, SpikeAndSlabPrior),
    ],
)
def test_the_name_in_the_config_makes_the_latent_and_its_prior(name: str, prior: str, latent: type, kind: type) -> None:
    made = make(name, prior)
    assert type(made) is latent and type(made.prior) is kind
    assert made.latent_dim == 3 and made.prior(normal(0, 5, 8)).draw().shape == (5, 3)


def test_a_linear_prior_starts_as_it_is_told() -> None:
    prior = LinearPrior(4, 8, 2)
    torch.nn.init.normal_(prior.out.weight)
    centre, spread, bias = torch.arange(4.0), torch.tensor([1.0, 2.0, 0.5, 4.0]), torch.tensor([0.3, -2.0])
    weight, context = normal(0, 2, 4), normal(1, 6, 4)
    prior.start(centre, spread, weight, bias, scale=1.4)
    drawn = prior(context)
    torch.testing.assert_close(drawn.mean, ((context - centre) / spread) @ weight.T + bias)
    torch.testing.assert_close(drawn.scale, torch.full((6, 2), 1.4))
    prior(context).mean.sum().backward()
    assert prior.out.weight.grad is not None and prior.out.weight.grad.abs().sum() > 0


def test_no_latent_is_made_of_none() -> None:
    assert isinstance(
        parts.build_module(
            "model.latent.name", NoLatentConfig(), Latent, context_dim=8, embedding_dim=8, hidden_dim=16
        ),
        NoLatent,
    )


@pytest.mark.parametrize("num_components", [1, 4])
def test_prior_reads_the_context_alone_and_posterior_also_the_later_segment(num_components: int) -> None:
    latent = make("gaussian", prior_components=num_components).eval()
    assert isinstance(latent, GaussianLatent)
    context, later, other = normal(0, 3, 5, 8).unbind(0)
    prior = latent.prior(context)
    assert prior.components.mean.shape == prior.components.scale.shape == (5, num_components, 3)
    assert prior.draw().shape == (5, 3)
    assert (prior.components.scale >= 1e-6).all()
    torch.testing.assert_close(prior.log_weights.exp().sum(dim=1), torch.ones(5))
    assert not torch.allclose(latent.posterior(context, later).mean, latent.posterior(context, other).mean)
    assert not torch.allclose(latent.posterior(context, later).mean, latent.posterior(other, later).mean)


@pytest.mark.parametrize("num_components", [1, 4])
def test_a_spike_and_slab_prior_has_normalised_weights_and_no_slab_on_a_point(num_components: int) -> None:
    prior = SpikeAndSlabPrior(8, 16, 3, num_components).eval()(100 * normal(0, 5, 8))
    assert prior.on_logits.shape == prior.slab.mean.shape == prior.slab.scale.shape == (5, num_components, 3)
    assert (prior.slab.scale >= 0.01).all()
    torch.testing.assert_close(prior.log_weights.exp().sum(dim=1), torch.ones(5))


@pytest.mark.parametrize(("prior", "num_components"), [("mixture", 1), ("mixture", 2), ("flow", 1), ("linear", 1)])
def test_gaussian_latent_draws_from_its_posterior_and_pays_the_kl(prior: str, num_components: int) -> None:
    latent = make("gaussian", prior, prior_components=num_components).eval()
    assert isinstance(latent, GaussianLatent)
    context, later = (value.expand(4000, -1) for value in normal(0, 2, 1, 8))
    inference = latent.infer(context, later, no_r(4000), torch.Generator().manual_seed(0))
    r, penalty = inference.r, inference.costs["kl_nats"]
    posterior = latent.posterior(context, later)
    torch.testing.assert_close(r.mean(dim=0), posterior.mean[0], atol=0.06, rtol=0)
    torch.testing.assert_close(r.std(dim=0), posterior.scale[0], atol=0.06, rtol=0)
    assert inference.costs.keys() == {"kl_nats"} and inference.penalty is penalty
    of_prior = latent.prior(context)
    in_torch = Independent(Normal(posterior.mean, posterior.scale), 1)
    expected = in_torch.log_prob(r) - of_prior.log_density(r)
    error = (expected - penalty).std() / 4000**0.5
    assert penalty.mean() > 0 and (penalty.mean() - expected.mean()).abs() <= 5 * error + 1e-4
    penalty.mean().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in latent.parameters())


@pytest.mark.parametrize("latent_dim", [1, 16])
def test_a_flow_of_few_hidden_units(latent_dim: int) -> None:
    flow = FlowPrior(4, hidden_dim=3, latent_dim=latent_dim)(normal(0, 1, 5, 4))
    assert flow.log_density(normal(1, 1, 5, latent_dim)).isfinite().all()


def test_sparse_latent_pays_the_expected_number_of_coordinates_that_are_on() -> None:
    latent = make("sparse").eval()
    context, later = (value.repeat(20_000, 1) for value in normal(0, 2, 2, 8))
    inference = latent.infer(context, later, no_r(40_000), torch.Generator().manual_seed(0))
    r, penalty = inference.r, inference.costs["expected_l0"]
    assert inference.penalty is penalty and penalty.shape == (40_000,)
    counted = (r != 0).sum(dim=1).float().unflatten(0, (-1, 2)).mean(dim=0)
    torch.testing.assert_close(counted, penalty[:2], atol=0.03, rtol=0)


def test_a_coordinate_of_the_sparse_latent_is_zero_or_one_value_of_the_two_segments() -> None:
    latent = make("sparse").eval()
    context, later, other = (value.expand(400, -1) for value in normal(0, 3, 1, 8))
    r = latent.infer(context, later, no_r(400), torch.Generator().manual_seed(0)).r
    content = r.sum(dim=0) / (r != 0).sum(dim=0)
    assert ((r == 0).any(dim=0) & (r != 0).any(dim=0)).all()
    torch.testing.assert_close(r, torch.where(r == 0, 0, content))
    elsewhere = latent.infer(context, other, no_r(400), torch.Generator().manual_seed(0)).r
    assert not torch.allclose(elsewhere.sum(dim=0) / (elsewhere != 0).sum(dim=0), content)


def test_oracle_latent_is_the_known_r_without_a_penalty() -> None:
    known = normal(1, 5, 3)
    inference = make("oracle").infer(normal(0, 5, 8), no_r(5), known)
    assert torch.equal(inference.r, known)
    assert inference.penalty is None and inference.costs.keys() == {PRIOR_NLL}


def test_without_a_latent_r_has_no_dimensions_and_costs_nothing() -> None:
    latent = NoLatent()
    inference = latent.infer(normal(0, 5, 8), no_r(5), no_r(5))
    assert inference.r.shape == (5, 0) and not inference.costs
    random_state = torch.random.get_rng_state()
    prior = latent.prior(normal(0, 5, 8))
    assert prior.draw().shape == prior.mean.shape == (5, 0) and torch.equal(
        prior.log_density(inference.r), torch.zeros(5)
    )
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert not list(latent.parameters()) and not latent.state_dict()


@pytest.mark.parametrize("name", ["sparse", "oracle"])
def test_a_prior_fitted_alongside_is_fitted_without_touching_anything_else(name: str) -> None:
    latent = make(name).eval()
    context, later, known = normal(0, 5, 8).requires_grad_(), normal(1, 5, 8).requires_grad_(), normal(2, 5, 3)
    inference = latent.infer(context, later, known, torch.Generator().manual_seed(0))
    nll = inference.costs[PRIOR_NLL]
    torch.testing.assert_close(nll, -latent.prior(context).log_density(inference.r))
    nll.sum().backward()
    assert context.grad is None and later.grad is None
    of_prior = {id(value) for value in latent.prior.parameters()}
    assert {id(value) for value in latent.parameters() if value.grad is not None} == of_prior


def test_r_and_penalty_of_the_sparse_latent_train_its_network_and_not_its_prior() -> None:
    latent = make("sparse").eval()
    inference = latent.infer(normal(0, 5, 8), normal(1, 5, 8), no_r(5), torch.Generator().manual_seed(0))
    assert isinstance(latent, SparseLatent)
    (inference.r.square().sum() + inference.costs["expected_l0"].sum()).backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in latent.net[-1].parameters())
    assert all(value.grad is None for value in latent.prior.parameters())


@pytest.mark.parametrize(("name", "prior"), [("gaussian", "mixture"), ("gaussian", "flow"), ("sparse", "mixture")])
def test_inference_is_determined_by_the_generator(name: str, prior: str) -> None:
    latent = make(name, prior).eval()
    context, later = normal(0, 2, 5, 8)
    first, again, other = (
        latent.infer(context, later, no_r(5), torch.Generator().manual_seed(seed)).r for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.allclose(first, other)
