import pytest
import torch
from torch import Tensor

from worldmodel.nets.encoders import Norm
from worldmodel.nets.scene import NoScene, SceneCode, discriminant


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mixed(kept: Tensor, changing: Tensor) -> tuple[Tensor, Tensor]:
    """kept [N, P] of clips, changing [N, L, Q] of segments -> both, mixed and shifted, as features [N, L, P + Q]; and
    the matrix that mixed them."""
    parts = torch.cat([kept[:, None].expand(-1, changing.shape[1], -1), changing], dim=2)
    mixing = torch.linalg.qr(random(parts.shape[2], parts.shape[2], seed=9)).Q
    return parts @ mixing + 3, mixing


def test_the_directions_are_those_in_which_clips_differ() -> None:
    kept, changing = random(600, 2), 10 * random(600, 5, 6, seed=1)
    noise = 0.1 * random(600, 5, 8, seed=2)
    features, mixing = mixed(kept, changing)
    mean, directions, ratio = discriminant(features + noise @ mixing, 3)
    torch.testing.assert_close(mean, features.mean(dim=(0, 1)), atol=0.05, rtol=0.05)
    assert ratio[1] > 8 and ratio[2] < 1 and ratio.diff().le(0).all()
    found = (features - mean) @ directions[:, :2]
    explained = torch.linalg.lstsq(kept, found.mean(dim=1)).solution
    assert (found - (kept @ explained)[:, None]).std() < 0.15 * found.std()


def test_variances_between_and_within_are_those_of_an_analysis_of_variance() -> None:
    """One direction: the ratio is the variance of clips over that within, the latter's share of the means taken off."""
    features = random(4000, 4, 1) + 2.0**0.5 * random(4000, 1, 1, seed=1)
    _, _, ratio = discriminant(features, 1)
    assert ratio.item() == pytest.approx(2.0, rel=0.1)


def learned(features: Tensor) -> SceneCode:
    scene = SceneCode(features.shape[2], 8, 3, "none")
    scene.learn(features)
    return scene


def test_projections_have_unit_variance_and_separate_clips() -> None:
    features, _ = mixed(3 * random(500, 2), random(500, 4, 4, seed=1))
    scene = learned(features)
    kept = scene.project(features)
    torch.testing.assert_close(kept.square().mean(dim=(0, 1)), torch.ones(6), atol=1e-3, rtol=1e-3)
    assert (scene.correlation > 0).tolist() == [True, True, False, False, False, False]
    same = scene.change_nats(kept[:, 0], kept[:, 1])
    other = scene.change_nats(kept[:, 0], kept[:, 1].roll(1, dims=0))
    assert same.shape == (500,) and (same > 0).all()
    assert same.mean() < 0.3 and other.mean() > 5


def test_the_change_is_the_posterior_of_two_hypotheses() -> None:
    """Against densities of torch.distributions: correlated in pairs, or independent."""
    features, _ = mixed(2 * random(800, 2), random(800, 3, 3, seed=1))
    scene = learned(features)
    before, after = scene.project(random(7, 5, seed=3) + 3), scene.project(random(7, 5, seed=4) + 3)
    log_one = log_two = torch.zeros(7)
    normal = torch.distributions.Normal(0.0, 1.0)
    for at, rho in enumerate(scene.correlation.tolist()):
        pair = torch.distributions.MultivariateNormal(torch.zeros(2), torch.tensor([[1, rho], [rho, 1]]))
        log_one = log_one + pair.log_prob(torch.stack([before[:, at], after[:, at]], dim=1))
        log_two = log_two + normal.log_prob(before[:, at]) + normal.log_prob(after[:, at])
    expected = -(log_one - torch.logaddexp(log_one, log_two))
    torch.testing.assert_close(scene.change_nats(before, after), expected, atol=1e-4, rtol=1e-4)


def test_a_scene_code_is_zero_before_it_is_learned() -> None:
    scene = SceneCode(5, 8, 3, "none")
    code, kept = scene(random(4, 5), torch.zeros(4)), scene.project(random(4, 5))
    assert not kept.any() and not code.any() and not scene.advance(code).any()
    torch.testing.assert_close(scene.change_nats(kept, kept), torch.full((4,), 2.0).log())


@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_the_persistent_part_is_the_same_when_read_alone(norm: Norm) -> None:
    features, _ = mixed(3 * random(200, 2), random(200, 4, 4, seed=1))
    scene = SceneCode(6, 8, 3, norm).eval()
    scene.learn(features)
    code = scene(features[:, 0], torch.arange(200) % 3)
    assert torch.equal(scene.persistent(code), scene.persistent_from(features[:, 0]))
    assert torch.equal(scene.persistent(scene.advance(code)), scene.persistent(code))
    torch.testing.assert_close(scene.persistent_from(features)[:, 0], scene.persistent(code))


def test_without_a_scene_code_everything_has_width_zero() -> None:
    scene, features = NoScene(), random(4, 5)
    code = scene(features, torch.zeros(4))
    values = (
        code,
        scene.advance(code),
        scene.persistent(code),
        scene.persistent_from(features),
        scene.select(features),
    )
    assert all(value.shape == (4, 0) for value in values) and scene.select(random(4, 3, 5)).shape == (4, 3, 0)
    assert torch.equal(scene.change_nats(scene.project(features), scene.project(features)), torch.zeros(4))
    assert not list(scene.parameters()) and not scene.state_dict()
