import math
from typing import get_args

import pytest
import torch

from data_pipelines.errors import UserError
from data_pipelines.worlds.causal import (
    JITTER_STD,
    NUM_FACTORS,
    CausalStream,
    CausalWorld,
    Change,
)

KINDS = get_args(Change)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unmix(world: CausalWorld, observed: torch.Tensor) -> torch.Tensor:
    """The inverse of g, layer by layer: [..., F] -> [..., F]."""
    values = observed @ world.rotations[-1].T
    for rotation, shift in reversed(list(zip(world.rotations, world.shifts, strict=False))):
        values = values / math.sqrt(2 / (1 + world.SLOPE**2))
        values = torch.where(values < 0, values / world.SLOPE, values)
        values = (values - shift) @ rotation.T
    return values


def test_mixing_can_be_undone_and_is_not_linear() -> None:
    world = CausalWorld("isotropic", 0)
    factors = world.draw_factors(500, seeded(), width=2.0)
    observed = world.mix(factors)
    torch.testing.assert_close(unmix(world, observed), factors, atol=1e-4, rtol=0)
    linear = torch.linalg.lstsq(torch.cat([factors, torch.ones(500, 1)], dim=1), observed)
    residual = observed - torch.cat([factors, torch.ones(500, 1)], dim=1) @ linear.solution
    assert residual.var() > 0.05 * observed.var()


def test_factors_are_uniform_with_the_asked_spread() -> None:
    for width in (1.0, 2.0):
        factors = CausalWorld("isotropic", 0).draw_factors(50_000, seeded(), width)
        torch.testing.assert_close(factors.std(dim=0), torch.full((NUM_FACTORS,), width), atol=0.02, rtol=0)
        assert factors.abs().max() <= width * math.sqrt(3)


def test_independent_changes_have_their_spreads() -> None:
    factors = torch.zeros(100_000, NUM_FACTORS)
    same = CausalWorld("isotropic", 0).draw_change(factors, seeded())
    torch.testing.assert_close(same.std(dim=0), torch.full((NUM_FACTORS,), 0.3), atol=0.01, rtol=0)
    world = CausalWorld("anisotropic", 0)
    spreads = world.draw_change(factors, seeded()).std(dim=0).sort().values
    expected = 0.3 * torch.logspace(math.log10(0.3), math.log10(3), NUM_FACTORS)
    torch.testing.assert_close(spreads, expected, rtol=0.02, atol=0)


def test_diagonal_changes_are_uncorrelated_with_sizes_that_the_state_sets() -> None:
    world = CausalWorld("diagonal", 0)
    sizes = []
    for z in (torch.full((NUM_FACTORS,), 0.7), torch.linspace(-1.5, 1.5, NUM_FACTORS)):
        change = world.draw_change(z.expand(200_000, -1), seeded())
        sizes.append(change.std(dim=0))
        expected = torch.tensor([0.3 * 3 ** math.tanh(float(row @ z)) for row in world.size_directions])
        torch.testing.assert_close(sizes[-1], expected, rtol=0.02, atol=0)
        assert torch.corrcoef(change.T).fill_diagonal_(0).abs().max() < 0.02
    assert (sizes[0] / sizes[1]).log().abs().max() > 0.5
    torch.testing.assert_close(world.size_directions.norm(dim=1), torch.ones(NUM_FACTORS))


def test_the_covariance_of_heteroscedastic_changes_is_that_of_the_fields() -> None:
    """At a fixed z: sum over actions of m m^T with m = D (M z + 0.1 b); and it moves with z."""
    world = CausalWorld("heteroscedastic", 0)
    covariances = []
    for z in (torch.full((NUM_FACTORS,), 0.7), torch.linspace(-1.5, 1.5, NUM_FACTORS)):
        change = world.draw_change(z.expand(200_000, -1), seeded())
        moves = [world.field_scale * (world.fields[i] @ z + world.drifts[i]) for i in range(3)]
        expected = sum(torch.outer(move, move) for move in moves)
        assert isinstance(expected, torch.Tensor)
        covariances.append(torch.cov(change.T))
        torch.testing.assert_close(covariances[-1], expected, atol=0.02 * float(expected.abs().max()), rtol=0.02)
        torch.testing.assert_close(change.mean(dim=0), torch.zeros(NUM_FACTORS), atol=0.03, rtol=0)
    assert (covariances[0] - covariances[1]).norm() > 0.5 * covariances[0].norm()


def test_a_multimodal_change_moves_one_factor_up_or_down() -> None:
    change = CausalWorld("multimodal", 0).draw_change(torch.zeros(60_000, NUM_FACTORS), seeded())
    moved = change.abs() > 0.9
    assert (moved.sum(dim=1) == 1).all()
    torch.testing.assert_close(moved.float().mean(dim=0), torch.full((NUM_FACTORS,), 1 / 6), atol=0.01, rtol=0)
    assert change[moved].abs().mean() == pytest.approx(1.8, abs=0.01)
    assert (change[moved] > 0).float().mean() == pytest.approx(0.5, abs=0.01)
    assert change[~moved].std() == pytest.approx(0.09, abs=0.002)


@pytest.mark.parametrize("kind", KINDS)
def test_both_later_views_share_the_change_and_jitter_on_their_own(kind: Change) -> None:
    world = CausalWorld(kind, 0)
    batch = world.draw_batch(20_000, seeded())
    assert batch["video"].shape == (20_000, 3, NUM_FACTORS, 1, 1)
    z, target, later = unmix(world, batch["video"][..., 0, 0]).unbind(1)
    labels = batch["labels"]
    torch.testing.assert_close(z, labels["factors"], atol=1e-3, rtol=0)
    jitters = [view - z - labels["change"] for view in (target, later)]
    for jitter in jitters:
        assert jitter.std() == pytest.approx(JITTER_STD, rel=0.02)
    assert (jitters[0] * jitters[1]).mean() == pytest.approx(0, abs=5e-4)


def test_batches_are_a_function_of_seed_and_number_and_ranks_share_them() -> None:
    world = CausalWorld("heteroscedastic", 0)
    whole = CausalStream(world, batch_size=8, seed=3).batches()
    batches = [next(whole) for _ in range(3)]
    again = next(CausalStream(world, batch_size=8, seed=3).batches(start_batch=2))
    assert torch.equal(again["video"], batches[2]["video"]) and torch.equal(again["clip_id"], batches[2]["clip_id"])
    assert not torch.equal(batches[0]["video"], batches[1]["video"])
    other = next(CausalStream(world, batch_size=8, seed=4).batches())
    assert not torch.equal(other["video"], batches[0]["video"])
    parts = [next(CausalStream(world, batch_size=8, seed=3, rank=r, world_size=2).batches()) for r in range(2)]
    assert torch.equal(torch.cat([part["video"] for part in parts]), batches[0]["video"])
    assert torch.cat([part["clip_id"] for part in parts]).tolist() == list(range(8))
    with pytest.raises(UserError, match=r"batch_size=8 is not a multiple of the 3 processes"):
        CausalStream(world, batch_size=8, seed=3, rank=0, world_size=3)
