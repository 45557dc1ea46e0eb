import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel.evaluation.scores import energy_score
from worldmodel.nets.distributions import Gaussian, Mixture, SpikeAndSlab, draw_and_choice
from worldmodel.nets.latents import PRIOR_NLL
from worldmodel.nets.world_model import ENCODER_LOSS, Predictions
from worldmodel.training.losses import CachedGradient, SequenceTerms, relative_scores, step_energy_scores, step_losses
from worldmodel.training.objectives import InfoNce, Vicreg


def batch(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_beta_weights_the_penalty_and_neither_the_fit_of_a_prior_nor_an_encoders_own_loss() -> None:
    edited, target, context = (batch(seed, 5, 3) for seed in range(3))
    costs = {"expected_l0": batch(3, 5), PRIOR_NLL: batch(4, 5), ENCODER_LOSS: batch(5, 5)}
    objective = Vicreg((1.0, 0.0, 0.0))
    losses = step_losses(objective, edited, target, context, costs, 0.3, None)
    expected = (edited - target).square().mean() + 0.3 * costs["expected_l0"].mean() + costs[PRIOR_NLL].mean()
    expected = expected + costs[ENCODER_LOSS].mean()
    torch.testing.assert_close(losses["loss"], expected)
    torch.testing.assert_close(losses["expected_l0"], costs["expected_l0"].mean())


def test_the_kl_is_taken_off_the_bound_on_information() -> None:
    edited, target, context = (batch(seed, 5, 3) for seed in range(3))
    objective, kl = InfoNce(3, 4, 0.5).double(), batch(3, 5).exp()
    without, with_kl = (
        step_losses(objective, edited, target, context, costs, 0.3, None) for costs in ({}, {"kl_nats": kl})
    )
    torch.testing.assert_close(with_kl["information_nats"], without["information_nats"] - kl.mean())


def test_a_surrogate_has_the_cached_gradient() -> None:
    leaves = {
        "real": batch(0, 4, 2, 3),
        "edited": batch(1, 4, 1, 3),
        "kl_nats": batch(2, 4, 1),
        "actions": batch(3, 4, 1, 0),
    }
    slopes = {"edited": batch(4, 4, 1, 3), "kl_nats": batch(5, 4, 1)}
    weight, slope = batch(6, 2).requires_grad_(), batch(7, 2)
    for leaf in leaves.values():
        leaf.requires_grad_()
    CachedGradient(slopes, [(weight, slope)]).surrogate(Predictions.from_tensors(leaves)).backward()
    for name, expected in slopes.items():
        torch.testing.assert_close(leaves[name].grad, expected)
    torch.testing.assert_close(weight.grad, slope)
    assert leaves["real"].grad is None and leaves["actions"].grad is None


def test_sequence_terms_equal_loops_over_clips_and_steps() -> None:
    embeddings, actions = batch(0, 5, 4, 3), batch(1, 5, 3, 2)
    torch.manual_seed(0)
    terms = SequenceTerms({"smoothness": 2.0, "inverse_dynamics": 3.0, "time_variance": 0.5}, 3, 8, 2).double().eval()
    values = terms(embeddings, actions)
    steps, errors, centred = [], [], []
    for clip in range(5):
        centred += [embeddings[clip, step] - embeddings[clip].mean(dim=0) for step in range(4)]
        for step in range(3):
            before, after = embeddings[clip, step], embeddings[clip, step + 1]
            steps.append((after - before).square().mean())
            read = terms.action_net(torch.cat([before, after])[None])[0]
            errors.append((read.double() - actions[clip, step]).square().mean())
    spread = torch.stack(centred).var(dim=0)
    expected = {
        "smoothness": torch.stack(steps).mean(),
        "inverse_dynamics": torch.stack(errors).mean(),
        "time_variance": (1 - (spread + 1e-4).sqrt()).clamp(min=0).mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value, atol=1e-6, rtol=1e-6)
    total = 2 * expected["smoothness"] + 3 * expected["inverse_dynamics"] + 0.5 * expected["time_variance"]
    torch.testing.assert_close(terms.total(values), total, atol=1e-6, rtol=1e-6)


def test_sequence_terms_without_weight_are_left_out() -> None:
    terms = SequenceTerms({"smoothness": 0.0, "inverse_dynamics": 0.0, "time_variance": 0.0}, 3, 8, 0)
    assert terms(batch(0, 5, 4, 3), batch(1, 5, 3, 0)) == {} and terms.total({}) == 0 and not list(terms.parameters())


def test_the_energy_score_is_that_of_evaluations_and_lowest_for_the_law() -> None:
    futures, targets = batch(0, 5, 7, 2, 3), batch(1, 5, 2, 3)
    of_steps = [energy_score(futures[:, :, k], targets[:, None, k]).mean() for k in range(2)]
    torch.testing.assert_close(step_energy_scores(futures, targets), torch.stack(of_steps) / 3**0.5)
    drawn, truth = batch(2, 4000, 8, 1, 2), batch(3, 4000, 1, 2)
    scores = {scale: float(step_energy_scores(scale * drawn, truth)) for scale in (0.5, 1.0, 2.0)}
    assert scores[1.0] < min(scores[0.5], scores[2.0]) - 0.01


@pytest.mark.parametrize("by_dimension", [False, True])
@pytest.mark.parametrize("num_samples", [2, 3])
def test_the_gradient_by_choices_is_that_of_the_expected_energy_score(num_samples: int, by_dimension: bool) -> None:
    """Four outcomes, and all the tuples of samples there are: expectations are sums."""
    outcomes, targets = batch(0, 4, 1, 3), batch(1, 1, 1, 3)
    logits = batch(2, 4).requires_grad_()
    weights = logits.softmax(dim=0)
    tuples = torch.tensor(list(itertools.product(range(4), repeat=num_samples)))
    found = logits.new_zeros(4)
    for chosen in tuples:
        scores = step_energy_scores(
            outcomes[chosen][None], targets, weights[chosen].log()[None, :, None], by_dimension=by_dimension
        )
        (gradient,) = torch.autograd.grad(scores.sum(), logits, retain_graph=True)
        found = found + weights[chosen].prod().detach() * gradient
    of_tuples = [step_energy_scores(outcomes[chosen][None], targets, by_dimension=by_dimension) for chosen in tuples]
    expectation = (weights[tuples].prod(dim=1) * torch.cat(of_tuples)).sum()
    torch.testing.assert_close(found, torch.autograd.grad(expectation, logits)[0])


def test_log_probabilities_add_a_gradient_and_no_value() -> None:
    futures, targets = batch(0, 5, 7, 2, 3), batch(1, 5, 2, 3)
    log_probabilities = batch(2, 5, 7, 2).requires_grad_()
    scores = step_energy_scores(futures, targets, log_probabilities)
    torch.testing.assert_close(scores, step_energy_scores(futures, targets))
    assert torch.autograd.grad(scores.sum(), log_probabilities)[0].abs().min() > 0


def mixture_of_two(logit: Tensor) -> Mixture:
    """Of values around 0 and 3, of which the second has the probability sigmoid(logit)."""
    components = Gaussian(torch.tensor([0.0, 3.0])[None, :, None].expand(512, -1, -1), torch.full((512, 2, 1), 0.1))
    return Mixture(torch.stack([F.logsigmoid(-logit), F.logsigmoid(logit)]).expand(512, -1), components)


def zero_or_three(logit: Tensor) -> SpikeAndSlab:
    """The same, with exact zeros."""
    slab = Gaussian(torch.full((512, 1, 1), 3.0), torch.full((512, 1, 1), 0.1))
    return SpikeAndSlab(torch.zeros(512, 1), logit.expand(512, 1, 1), slab)


@pytest.mark.parametrize("distribution", [mixture_of_two, zero_or_three])
def test_the_energy_score_fits_probabilities(distribution: Callable[[Tensor], Mixture | SpikeAndSlab]) -> None:
    generator = torch.Generator().manual_seed(0)
    logit = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([logit], lr=0.05)
    for _ in range(100):
        fitted = distribution(logit)
        draws = [draw_and_choice(fitted, generator) for _ in range(2)]
        futures, log_probabilities = (torch.stack(each, dim=1) for each in zip(*draws, strict=True))
        truth = 3 * (torch.rand(512, 1, 1, generator=generator) < 0.2).float()
        optimizer.zero_grad()
        step_energy_scores(futures[:, :, None], truth, log_probabilities[..., None]).sum().backward()
        optimizer.step()
    assert logit.sigmoid().item() == pytest.approx(0.2, abs=0.03)


def test_the_energy_score_by_dimension_is_the_mean_of_those_of_each_dimension() -> None:
    futures, targets = batch(0, 5, 7, 2, 3), batch(1, 5, 2, 3)
    alone = [step_energy_scores(futures[..., d : d + 1], targets[..., d : d + 1]) for d in range(3)]
    found = step_energy_scores(futures, targets, by_dimension=True)
    torch.testing.assert_close(found, torch.stack(alone).mean(dim=0))


def test_by_dimension_a_sharp_forecast_of_one_of_many_dimensions_counts() -> None:
    truth = torch.cat([torch.zeros(4000, 1, 1), 10 * batch(0, 4000, 1, 63)], dim=2)
    sharp, blurred = 10 * batch(1, 4000, 4, 1, 64), 10 * batch(1, 4000, 4, 1, 64)
    sharp[..., 0], blurred[..., 0] = 0.01 * batch(2, 4000, 4, 1), batch(2, 4000, 4, 1)

    def gain(by_dimension: bool) -> float:
        of_sharp, of_blurred = (
            float(step_energy_scores(futures, truth, by_dimension=by_dimension)) for futures in (sharp, blurred)
        )
        return of_blurred - of_sharp

    assert gain(True) > 50 * abs(gain(False))


def test_relative_scores_have_the_gradient_of_the_mean_logarithm() -> None:
    scores = torch.tensor([0.2, 3.0, -0.5, 1e-6], requires_grad=True)
    relative_scores(scores).mean().backward()
    assert scores.grad is not None
    expected = torch.tensor([1 / 0.2, 1 / 3.0, 1 / 0.5, 1 / 1e-3]) / 4  # an estimate may be negative, or almost zero
    torch.testing.assert_close(scores.grad, expected)


def test_the_energy_score_of_equal_futures_has_a_finite_gradient() -> None:
    futures = torch.zeros(2, 3, 1, 4, requires_grad=True)
    step_energy_scores(futures, torch.zeros(2, 1, 4)).sum().backward()
    assert futures.grad is not None and futures.grad.isfinite().all()
