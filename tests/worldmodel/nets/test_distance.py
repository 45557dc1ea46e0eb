import pytest
import torch

from tests.conftest import normal
from worldmodel.nets.distance import (
    NUM_GROUPS,
    NUM_SIMILAR,
    STEP_WEIGHT,
    TemporalDistance,
    excess_steps,
    nearness,
    similar_clips,
    steps_between,
)


def test_it_is_a_quasimetric() -> None:
    a, b, c = (normal(seed, 500, NUM_GROUPS * 3) for seed in range(3))
    ab, bc, ac, ba = steps_between(a, b), steps_between(b, c), steps_between(a, c), steps_between(b, a)
    assert (ab >= 0).all() and (ac <= ab + bc + 1e-5).all()
    assert torch.equal(steps_between(a, a), torch.zeros(500))
    assert not torch.allclose(ab, ba)
    by_hand = [max(0.0, *(float(a[0, 3 * g + j] - b[0, 3 * g + j]) for j in range(3))) for g in range(NUM_GROUPS)]
    assert float(ab[0]) == pytest.approx(sum(by_hand) / NUM_GROUPS, rel=1e-5)


def test_only_more_than_a_step_is_in_excess_and_what_is_near_costs() -> None:
    still = torch.zeros(1, NUM_GROUPS)
    for steps, excess in ((0.5, 0.0), (1.0, 0.0), (3.0, 4.0)):
        assert float(excess_steps(still + steps, still)) == pytest.approx(excess)
    costs = [float(nearness(still + steps, still)) for steps in (0.0, 5.0, 15.0, 60.0)]
    assert costs == sorted(costs, reverse=True) and costs[-1] < 0.2
    # softplus with a knee of 10 steps: log(1 + e^0) * 10 at 15 steps
    assert costs[2] == pytest.approx(6.931, abs=1e-3)


def test_clips_are_similar_if_they_agree_on_what_separates_clips() -> None:
    layout = torch.arange(100.0)
    kept = torch.stack([layout, 100 * normal(0, 100)], dim=1)  # what clips differ in, and what changes in each
    similar = similar_clips(kept, torch.tensor([0.99, 0.0]))
    assert similar.shape == (100, NUM_SIMILAR)
    assert ((similar - torch.arange(100)[:, None]).abs() <= NUM_SIMILAR).all()
    assert (similar == torch.arange(100)[:, None]).any(dim=1).all()
    assert similar_clips(kept[:3], torch.tensor([0.99, 0.0])).shape == (3, 3)


@pytest.mark.slow
def test_it_learns_the_way_around_a_wall() -> None:
    """A corridor of two rows of ten cells that only its far end joins: the distance across, at the near end, is that
    of the way around, though the two rows look almost the same."""
    torch.manual_seed(0)
    cells = torch.tensor([[x, row] for row in (0, 1) for x in range(10)]).float()
    ways = {index: [o for o in (index - 1, index + 1) if o // 10 == index // 10 and 0 <= o < 20] for index in range(20)}
    ways[9].append(19)
    ways[19].append(9)
    edges = torch.tensor([(start, end) for start, ends in ways.items() for end in ends])
    scaled = torch.stack([(cells[:, 0] - 4.5) / 3, 0.3 * (cells[:, 1] - 0.5)], dim=1)
    distance = TemporalDistance(2, 64, 8).requires_grad_(True)
    optimizer = torch.optim.Adam(distance.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1500):
        phi = distance(scaled)
        start, end = torch.randint(20, (2, 256), generator=generator)
        loss = nearness(phi[start], phi[end]) + STEP_WEIGHT * excess_steps(phi[edges[:, 0]], phi[edges[:, 1]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = steps_between(distance(scaled)[:, None], distance(scaled)[None])
    # A step is a little more than 1 where that lets far cells be farther.
    step = float(found[edges[:, 0], edges[:, 1]].mean())
    assert 0.9 < step < 1.6
    assert float(found[0, 10]) / step > 12  # 19 steps around, and one step across
    assert 0.7 < float(found[0, 9]) / step / 9 < 1.2
