import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.integrate import quad
from torch import Tensor

from worldmodel import parts
from worldmodel.config import TeacherObjective, choices
from worldmodel.training.objectives import (
    AnInfoNce,
    HInfoNce,
    InfoNce,
    Ressl,
    SslHsic,
    Vicreg,
    covariance_penalty,
    epps_pulley,
    hsic,
    inverse_multiquadric_kernel,
    variance_hinge,
)
from worldmodel.training.objectives import Objective as AnyObjective

CONFIGS: dict[str, Any] = choices("objective")
every_objective = pytest.mark.parametrize("name", CONFIGS)


def batch(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(name: str, embedding_dim: int = 4, temperature: float = 0.5) -> AnyObjective:
    torch.manual_seed(0)
    own = {"sigreg": {"sigreg_weight": 0.3}, "infonce": {"temperature": temperature}}
    own |= dict.fromkeys(("aninfonce", "hinfonce"), own["infonce"])
    config = CONFIGS[name](name=name, **own.get(name, {}))
    built = parts.build_module("objective.name", config, AnyObjective, embedding_dim=embedding_dim, hidden_dim=5)
    return built.double()


def evaluate(objective: AnyObjective, edited: Tensor, target: Tensor, context: Tensor) -> dict[str, Tensor]:
    return objective(edited, target, context, torch.Generator().manual_seed(0))


def loss(objective: AnyObjective, edited: Tensor, target: Tensor, context: Tensor) -> float:
    return evaluate(objective, edited, target, context)["prediction_loss"].item()


def inverse_softplus(value: float) -> float:
    return math.log(math.expm1(value))


# ------------------------------------------------------------------------------------------------- every objective


@every_objective
def test_gradient_equals_finite_differences(name: str) -> None:
    """In the prediction and, where the encoder is shared, in the target and the context; and in learned weights."""
    objective = make(name, 3)
    shared = not objective.needs_teacher
    embeddings = [batch(0, 4, 3).requires_grad_(), *(batch(seed, 4, 3).requires_grad_(shared) for seed in (1, 2))]
    names = [key for key, _ in objective.named_parameters()]

    def prediction_loss(edited: Tensor, target: Tensor, context: Tensor, *weights: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        arguments = (edited, target, context, generator)
        return torch.func.functional_call(objective, dict(zip(names, weights, strict=True)), arguments)[
            "prediction_loss"
        ]

    weights = [value.detach().clone().requires_grad_() for value in objective.parameters()]
    assert torch.autograd.gradcheck(prediction_loss, [*embeddings, *weights])


@every_objective
def test_only_the_loss_carries_gradient_and_all_are_finite_scalars(name: str) -> None:
    values = evaluate(make(name), *(batch(seed, 5, 4).requires_grad_() for seed in (0, 1, 2)))
    assert [key for key, value in values.items() if value.requires_grad] == ["prediction_loss"]
    assert all(value.shape == () and value.isfinite() for value in values.values())


@every_objective
def test_order_of_the_clips_does_not_matter(name: str) -> None:
    edited, target, context = (batch(seed, 7, 4) for seed in (0, 1, 2))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    objective = make(name)
    before = evaluate(objective, edited, target, context)
    torch.testing.assert_close(evaluate(objective, edited[order], target[order], context[order]), before)
    assert loss(objective, edited, target[order], context) != pytest.approx(before["prediction_loss"].item())


@every_objective
def test_loss_falls_as_the_prediction_moves_to_the_target(name: str) -> None:
    target, context, error = batch(0, 32, 4), batch(1, 32, 4), batch(2, 32, 4)
    losses = [loss(make(name), target + distance * error, target, context) for distance in (0.0, 0.3, 1.0)]
    assert losses == sorted(losses) and losses[0] < losses[2] - 0.01


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("byol", {"teacher", "sphere", "predictor"}),
        ("jepa", {"teacher", "predictor"}),
        ("infonce", {"negatives"}),
        ("aninfonce", {"negatives"}),
        ("hinfonce", {"negatives"}),
        ("vicreg", {"batch_statistics"}),
        ("sigreg", {"batch_statistics"}),
        ("ressl", {"teacher", "negatives", "sphere"}),
        ("ssl_hsic", {"teacher", "negatives", "batch_statistics", "sphere", "predictor"}),
    ],
)
def test_what_an_objective_asks_for(name: str, needs: set[str]) -> None:
    flags = ("teacher", "negatives", "batch_statistics", "predictor")
    kind: Any = parts.load("objective.name", CONFIGS[name].built_by)
    found = {flag for flag in flags if getattr(kind, f"needs_{flag}")}
    assert found | ({"sphere"} if CONFIGS[name].needs_sphere else set()) == needs
    assert kind.needs_teacher == issubclass(CONFIGS[name], TeacherObjective)


@every_objective
def test_the_loss_of_a_batch_is_the_mean_over_its_parts_unless_clips_meet_in_it(name: str) -> None:
    """Those flags are why a config may not accumulate gradients."""
    objective = make(name).eval()
    embeddings = [batch(seed, 8, 4) for seed in (0, 1, 2)]
    parts = [loss(objective, *(e[half] for e in embeddings)) for half in (slice(0, 4), slice(4, 8))]
    separable = loss(objective, *embeddings) == pytest.approx(np.mean(parts), abs=1e-9)
    assert separable is not (objective.needs_negatives or objective.needs_batch_statistics)


@every_objective
def test_the_length_of_either_side_matters_unless_the_sphere_is_asked_for(name: str) -> None:
    objective, (edited, target, context) = make(name), (batch(seed, 6, 4) for seed in (0, 1, 2))
    before = loss(objective, edited, target, context)
    for scaled in ((1.7 * edited, target), (edited, 0.3 * target)):
        ignored = loss(objective, *scaled, context) == pytest.approx(before, abs=1e-9)
        assert ignored is CONFIGS[name].needs_sphere


@every_objective
def test_a_clip_s_prediction_error_is_its_own_and_nothing_where_the_target_is_met(name: str) -> None:
    edited, target, context = (batch(seed, 6, 4) for seed in (0, 1, 2))
    objective = make(name).eval()
    errors = objective.prediction_error(edited, target, context)
    assert errors.shape == (6,) and bool((errors > 0).all())
    torch.testing.assert_close(objective.prediction_error(edited[2:3], target[2:3], context[2:3]), errors[2:3])
    assert bool((objective.prediction_error(target, target, context).abs() < 1e-12).all())


@pytest.mark.parametrize("name", ["byol", "jepa", "vicreg", "sigreg"])
def test_the_mean_prediction_error_is_what_the_loss_would_lose_with_it(name: str) -> None:
    edited, target, context = (batch(seed, 6, 4) for seed in (0, 1, 2))
    objective = make(name)
    expected = loss(objective, edited, target, context) - loss(objective, target, target, context)
    assert float(objective.prediction_error(edited, target, context).mean()) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["infonce", "aninfonce", "hinfonce"])
def test_the_contrastive_prediction_error_is_what_the_pair_s_logit_lacks(name: str) -> None:
    edited, target, context = (batch(seed, 6, 4) for seed in (0, 1, 2))
    objective = make(name)
    assert isinstance(objective, InfoNce)
    with torch.no_grad():
        for weight in objective.parameters():
            weight.add_(batch(3, *weight.shape))
    logits = objective.logits(edited, target, objective.metric(context)).diagonal()
    assert bool((logits > -20).all())
    torch.testing.assert_close(objective.prediction_error(edited, target, context), 1 / objective.temperature - logits)


def test_the_prediction_error_of_ssl_hsic_is_what_the_kernel_within_a_clip_lacks() -> None:
    edited, target = (torch.nn.functional.normalize(batch(seed, 6, 4), dim=-1) for seed in (0, 1))
    within = inverse_multiquadric_kernel(edited, target).diagonal()
    torch.testing.assert_close(make("ssl_hsic").prediction_error(3 * edited, 0.5 * target, edited), 1 - within)


# ------------------------------------------------------------------------------------------------- distillation


def test_byol_equals_the_cosine_of_the_angle() -> None:
    edited = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    target = torch.tensor([[math.cos(0.3), math.sin(0.3)], [0.0, -5.0]], dtype=torch.float64)
    assert loss(make("byol", 2), edited, target, edited) == pytest.approx(-(math.cos(0.3) - 1) / 2)


def test_jepa_is_half_the_squared_error_and_one_minus_the_cosine_on_the_sphere() -> None:
    edited, target = batch(0, 6, 4), batch(1, 6, 4)
    by_hand = sum((a - b) ** 2 for a, b in zip(edited.flatten().tolist(), target.flatten().tolist(), strict=True))
    assert loss(make("jepa"), edited, target, edited) == pytest.approx(by_hand / 24 / 2)
    on_the_sphere = (2 * torch.nn.functional.normalize(vectors, dim=1) for vectors in (edited, target, edited))
    assert loss(make("jepa"), *on_the_sphere) == pytest.approx(1 + loss(make("byol"), edited, target, edited))


def test_ressl_equals_brute_force_loops() -> None:
    edited, target = batch(0, 5, 4), batch(1, 5, 4)
    total = 0.0
    for i in range(5):
        others = [j for j in range(5) if j != i]
        student = {j: math.exp(cosine(edited[i], target[j]) / 0.1) for j in others}
        teacher = {j: math.exp(cosine(target[i], target[j]) / 0.07) for j in others}
        for j in others:
            share = teacher[j] / sum(teacher.values())
            total -= share * math.log(student[j] / sum(student.values())) / 5
    assert loss(Ressl(), edited, target, edited) == pytest.approx(total)


def test_ressl_leaves_out_the_relation_of_a_clip_to_itself() -> None:
    """Of two clips, each has one other to be like: nothing is left to predict."""
    assert loss(Ressl(), batch(0, 2, 4), batch(1, 2, 4), batch(2, 2, 4)) == pytest.approx(0, abs=1e-12)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / (math.hypot(*a.tolist()) * math.hypot(*b.tolist()))


def test_hsic_equals_the_trace_with_centring_matrices() -> None:
    samples = batch(0, 9, 3)
    kernel = inverse_multiquadric_kernel(samples, samples).numpy()
    other = np.exp(-np.square(batch(1, 9, 1).numpy() - batch(1, 9, 1).numpy().T))
    centring = np.eye(9) - 1 / 9
    expected = np.trace(kernel @ centring @ other @ centring) / 64
    assert hsic(torch.from_numpy(kernel), torch.from_numpy(other)).item() == pytest.approx(expected)


def test_inverse_multiquadric_kernel_equals_its_formula() -> None:
    a, b = batch(0, 3, 4), batch(1, 5, 4)
    expected = [[1 / math.sqrt(1 + math.dist(x, y) ** 2) for y in b.tolist()] for x in a.tolist()]
    np.testing.assert_allclose(inverse_multiquadric_kernel(a, b), expected)


def test_hsic_is_near_zero_for_independent_and_large_for_dependent_samples() -> None:
    def dependence(x: Tensor, y: Tensor) -> float:
        return hsic(inverse_multiquadric_kernel(x, x), inverse_multiquadric_kernel(y, y)).item()

    x, y = batch(0, 400, 1), batch(1, 400, 1)
    assert 0 <= dependence(x, y) < 0.001
    # Uncorrelated, yet a function of x.
    assert dependence(x, x.square()) > 10 * dependence(x, y)


def test_ssl_hsic_equals_brute_force_loops_over_pairs() -> None:
    """Li et al., arXiv 2106.08320: the clip's two views against any two views, and the views' own dependence."""
    edited, target = batch(0, 5, 4), batch(1, 5, 4)
    views = [x / np.linalg.norm(x) for x in [*edited.numpy(), *target.numpy()]]
    kernel = np.array([[1 / math.sqrt(1 + np.square(a - b).sum()) for b in views] for a in views])
    same = [kernel[a, b] for a in range(10) for b in range(10) if a != b and a % 5 == b % 5]
    identity = np.mean(same) - np.mean([kernel[a, b] for a in range(10) for b in range(10)])
    centring = np.eye(10) - 1 / 10
    own = np.trace(kernel @ centring @ kernel @ centring) / 81
    values = evaluate(SslHsic(), edited, target, edited)
    assert values["hsic_identity"].item() == pytest.approx(identity)
    assert values["hsic_self"].item() == pytest.approx(own)
    assert values["prediction_loss"].item() == pytest.approx(-identity + 3 * math.sqrt(own))


def test_ssl_hsic_has_a_finite_gradient_at_collapse() -> None:
    edited = torch.ones(4, 3, requires_grad=True)
    SslHsic()(edited, torch.ones(4, 3), edited)["prediction_loss"].backward()
    assert edited.grad is not None and edited.grad.isfinite().all()


# -------------------------------------------------------------------------------------------------- contrastive

Similarity = Callable[[Tensor, Tensor, int], float]
"""Of two embeddings, as seen from a clip (by its place in the batch)."""


def nt_xent(edited: Tensor, target: Tensor, similarity: Similarity) -> float:
    """Mean over clips and both directions of -log(positive / (positive + negatives from both views))."""
    clips = range(len(edited))
    total = 0.0
    for i in clips:
        positive = similarity(edited[i], target[i], i)
        others = [j for j in clips if j != i]
        forward = [similarity(edited[i], target[j], i) for j in others]
        forward += [similarity(edited[i], edited[j], i) for j in others]
        backward = [similarity(edited[j], target[i], j) for j in others]
        backward += [similarity(target[i], target[j], i) for j in others]
        for negatives in (forward, backward):
            total -= positive - math.log(sum(math.exp(s) for s in [positive, *negatives]))
    return total / (2 * len(clips))


def gaussian_similarity(metric: NDArray[np.float64], temperature: float) -> Similarity:
    """metric [B or 1, D]: a squared distance weighed as the clip says."""

    def similarity(a: Tensor, b: Tensor, clip: int) -> float:
        weights = metric[clip % len(metric)]
        distance = sum(float(w) * (float(x) - float(y)) ** 2 for w, x, y in zip(weights, a, b, strict=True))
        return -distance / (2 * len(weights) * temperature) + 1 / temperature

    return similarity


def on_sphere(embeddings: Tensor) -> Tensor:
    return embeddings / embeddings.norm(dim=-1, keepdim=True) * math.sqrt(embeddings.shape[1])


def test_infonce_on_the_sphere_equals_brute_force_loops_over_cosines() -> None:
    edited, target = on_sphere(batch(0, 5, 4)), on_sphere(batch(1, 5, 4))
    expected = nt_xent(edited, target, lambda a, b, clip: cosine(a, b) / 0.2)
    assert loss(InfoNce(4, 5, 0.2).double(), edited, target, edited) == pytest.approx(expected)


def test_infonce_off_the_sphere_equals_brute_force_loops_over_distances() -> None:
    edited, target = batch(0, 5, 4), batch(1, 5, 4)
    expected = nt_xent(edited, target, gaussian_similarity(np.ones((1, 4)), 0.5))
    assert loss(make("infonce"), edited, target, edited) == pytest.approx(expected)


def test_logits_are_cut_at_twenty() -> None:
    """Two opposite clips, each predicted as the other: the logits would be -25 for the truth, 25 for the other."""
    edited = math.sqrt(2) * torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    objective = make("infonce", 2, temperature=0.04)
    assert loss(objective, edited, -edited, edited) == pytest.approx(40, abs=1e-6)


def test_weight_of_infonce_starts_at_one_and_scales_squared_distances() -> None:
    objective, (edited, target) = InfoNce(4, 5, 0.5).double(), (batch(0, 5, 4), batch(1, 5, 4))
    assert objective.metric(edited).tolist() == [[pytest.approx(1)]]
    with torch.no_grad():
        objective.raw_weight.fill_(inverse_softplus(2.5))
    expected = nt_xent(edited, target, gaussian_similarity(np.full((1, 4), 2.5), 0.5))
    assert loss(objective, edited, target, edited) == pytest.approx(expected)


def test_information_is_log_b_minus_the_cross_entropy_among_the_targets() -> None:
    edited, target = batch(0, 6, 4), batch(1, 6, 4)
    similarity = gaussian_similarity(np.ones((1, 4)), 0.5)
    cross_entropy = 0.0
    for i in range(6):
        scores = [math.exp(similarity(edited[i], target[j], i)) for j in range(6)]
        cross_entropy -= math.log(scores[i] / sum(scores)) / 6
    information = evaluate(make("infonce"), edited, target, edited)["information_nats"].item()
    assert information == pytest.approx(math.log(6) - cross_entropy)


@pytest.mark.parametrize("name", ["infonce", "aninfonce", "hinfonce"])
def test_information_of_a_perfect_prediction_reaches_log_b_and_no_more(name: str) -> None:
    objective, target = make(name, temperature=0.02), 10 * batch(0, 6, 4)
    information = evaluate(objective, target, target, batch(1, 6, 4))["information_nats"].item()
    assert math.log(6) - 0.01 < information <= math.log(6)


def test_information_is_a_lower_bound_that_large_batches_make_tight() -> None:
    """Pairs of unit Gaussians with correlation c have -log(1 - c^2) / 2 nats a dimension.

    For the prediction x / c the density ratio p(y | x) / p(y) is a Gaussian in x / c - y, up to a function of x: a
    critic of this form, with temperature (1 - c^2) / (c^2 D), is the best one.
    """
    correlation, dims = 0.9, 2
    best = (1 - correlation**2) / (correlation**2 * dims)
    truth = -dims / 2 * math.log(1 - correlation**2)

    def information(batch_size: int, temperature: float) -> float:
        x, noise = batch(0, 4096, dims), batch(1, 4096, dims)
        edited, target = x / correlation, correlation * x + math.sqrt(1 - correlation**2) * noise
        objective = InfoNce(dims, 5, temperature).double()
        parts = zip(edited.split(batch_size), target.split(batch_size), strict=True)
        return float(np.mean([evaluate(objective, e, t, e)["information_nats"].item() for e, t in parts]))

    bounds = [information(size, best) for size in (8, 32, 512)]
    assert bounds == sorted(bounds)
    assert bounds[0] < truth - 0.2 and bounds[1] < truth - 0.05
    assert bounds[2] == pytest.approx(truth, abs=0.03)
    assert max(information(128, 4 * best), information(128, best / 4)) < truth - 0.2


def test_aninfonce_equals_infonce_on_embeddings_stretched_by_the_root_of_its_metric() -> None:
    edited, target = batch(0, 5, 4), batch(1, 5, 4)
    metric = torch.tensor([0.2, 0.7, 1.0, 1.9], dtype=torch.float64)
    objective = AnInfoNce(4, 5, 0.5).double()
    plain = evaluate(make("infonce"), edited, target, edited)
    torch.testing.assert_close(evaluate(objective, edited, target, edited), plain)
    with torch.no_grad():
        objective.raw_weight.copy_(metric.expm1().log())
    stretched = evaluate(make("infonce"), edited * metric.sqrt(), target * metric.sqrt(), edited)
    torch.testing.assert_close(evaluate(objective, edited, target, edited), stretched)


def test_hinfonce_with_a_constant_metric_equals_aninfonce() -> None:
    edited, target, context = (batch(seed, 5, 4) for seed in (0, 1, 2))
    anisotropic, conditional = AnInfoNce(4, 5, 0.5).double(), HInfoNce(4, 5, 0.5).double()
    offset = torch.tensor([-1.5, 0.0, 0.4, 1.2], dtype=torch.float64)
    last = conditional.metric_net[-1]
    assert isinstance(last, torch.nn.Linear)
    with torch.no_grad():
        anisotropic.raw_weight.add_(offset)
        last.weight.zero_()
        last.bias.copy_(offset)
    expected = evaluate(anisotropic, edited, target, context)
    torch.testing.assert_close(evaluate(conditional, edited, target, context), expected)


def test_hinfonce_compares_by_the_metric_of_each_clip() -> None:
    """A clip's own metric in its row; a negative of a target is seen by the metric of the clip that predicted it."""
    edited, target, context = (batch(seed, 5, 4) for seed in (0, 1, 2))
    objective = HInfoNce(4, 5, 0.5).double().eval()
    metric = objective.metric(context).detach().numpy()
    assert metric.std(axis=0).min() > 0.01 and metric.min() > 0
    expected = nt_xent(edited, target, gaussian_similarity(metric, 0.5))
    assert loss(objective, edited, target, context) == pytest.approx(expected)


# ------------------------------------------------------------------------------------- regularised, no teacher


def test_vicreg_equals_numpy() -> None:
    edited, target, context = (batch(seed, 6, 4) for seed in (0, 1, 2))
    invariance = np.mean([(a - b) ** 2 for a, b in zip(edited.flatten(), target.flatten(), strict=True)])
    variance, covariance = np.float64(0), np.float64(0)
    for view in (context.numpy(), target.numpy()):
        variance += np.mean([max(0, 1 - math.sqrt(np.var(view[:, d], ddof=1) + 1e-4)) for d in range(4)]) / 2
        matrix = np.cov(view, rowvar=False)
        covariance += sum(matrix[i, j] ** 2 for i in range(4) for j in range(4) if i != j) / 4
    values = evaluate(Vicreg((25, 25, 1)), edited, target, context)
    assert variance > 0.01
    assert values["invariance"].item() == pytest.approx(invariance)
    assert values["variance"].item() == pytest.approx(variance)
    assert values["covariance"].item() == pytest.approx(covariance)
    assert values["prediction_loss"].item() == pytest.approx(25 * invariance + 25 * variance + covariance)


def test_vicreg_is_zero_for_matched_embeddings_that_are_white() -> None:
    centred = batch(0, 32, 4) - batch(0, 32, 4).mean(dim=0)
    white = torch.linalg.qr(centred).Q * math.sqrt(31)
    assert loss(Vicreg((25, 25, 1)), white, white, white) == pytest.approx(0, abs=1e-12)
    assert loss(Vicreg((25, 25, 1)), 3 * white, 3 * white, 3 * white) == pytest.approx(0, abs=1e-12)


def test_vicreg_penalises_collapse_to_a_point_and_to_a_line() -> None:
    point, line = torch.ones(32, 4), 3 * batch(0, 32, 1).expand(32, 4)
    assert variance_hinge(point).item() == pytest.approx(0.99) and covariance_penalty(point) == 0
    assert variance_hinge(line) == 0
    assert covariance_penalty(line).item() == pytest.approx(3 * line[:, 0].var().item() ** 2)


def epps_pulley_by_pairs(samples: Tensor) -> float:
    """The same integral over the whole line, in closed form: a squared maximum mean discrepancy."""
    x = samples.numpy()
    pairs = np.mean(np.exp(-np.square(x[:, None] - x) / 2))
    cross = np.mean(np.exp(-np.square(x) / 4)) / math.sqrt(2)
    return float(len(x) * math.sqrt(2 * math.pi) * (pairs - 2 * cross + 1 / math.sqrt(3)))


skewed_columns = torch.stack([batch(0, 40), 2 * batch(1, 40) + 1, batch(2, 40).exp() - 1, torch.zeros(40)], dim=1)


def test_epps_pulley_equals_numerical_integration_of_its_definition() -> None:
    for column, value in zip(skewed_columns.T.numpy(), epps_pulley(skewed_columns).tolist(), strict=True):

        def integrand(t: float, column: NDArray[np.float64] = column) -> float:
            distance = abs(np.exp(1j * t * column).mean() - math.exp(-(t**2) / 2))
            return float(distance**2 * math.exp(-(t**2) / 2))

        assert value == pytest.approx(40 * quad(integrand, -5, 5, limit=200)[0], rel=1e-3, abs=1e-3)


def test_epps_pulley_equals_its_closed_form() -> None:
    expected = [epps_pulley_by_pairs(column) for column in skewed_columns.T]
    np.testing.assert_allclose(epps_pulley(skewed_columns), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("num_samples", [4, 32])
def test_epps_pulley_of_normal_samples_has_its_analytic_mean(num_samples: int) -> None:
    """The integral of (1 - exp(-t^2)) exp(-t^2 / 2), whatever the number of samples."""
    mean = epps_pulley(batch(0, num_samples, 4000)).mean().item()
    assert mean == pytest.approx(math.sqrt(2 * math.pi) * (1 - 1 / math.sqrt(3)), abs=0.06)


def test_sigreg_in_one_dimension_equals_its_parts() -> None:
    """The one direction is 1 or -1, and the test of normality does not tell them apart."""
    edited, target, context = (batch(seed, 12, 1) for seed in (0, 1, 2))
    normality = (epps_pulley_by_pairs(target[:, 0]) + epps_pulley_by_pairs(context[:, 0])) / 2
    invariance = np.mean(np.square((edited - target).numpy()))
    values = evaluate(make("sigreg", 1), edited, target, context)
    assert values["normality"].item() == pytest.approx(normality, abs=1e-3)
    assert values["invariance"].item() == pytest.approx(invariance)
    assert values["prediction_loss"].item() == pytest.approx(invariance + 0.3 * normality, abs=1e-3)


def test_sigreg_tells_the_normal_from_the_collapsed_skewed_and_scaled() -> None:
    normal, other = batch(0, 256, 8), batch(1, 256, 8)

    def normality(embeddings: Tensor) -> float:
        return evaluate(make("sigreg", 8), other, other, embeddings)["normality"].item()

    variants = {
        "collapsed": 0 * normal,
        "line": normal[:, :1].expand(256, 8),
        "skewed": normal.exp() - math.exp(0.5),
        "wide": 2 * normal,
        "narrow": normal / 2,
        "shifted": normal + 0.5,
    }
    assert all(normality(variant) > normality(normal) + 0.5 for variant in variants.values())


def test_sigreg_draws_its_directions_from_the_generator() -> None:
    objective, embeddings = make("sigreg"), batch(0, 8, 4).exp()
    first, again, other = (
        objective(embeddings, embeddings, embeddings, torch.Generator().manual_seed(seed))["normality"].item()
        for seed in (0, 0, 1)
    )
    assert first == again != other
