import numpy as np
import pytest
from gymnasium import spaces

from data_pipelines.worlds.policies import Policy, drift, smooth_walk, uniform

SQUARE = spaces.Box(-1, 1, (2,), np.float32)
TARGETS = spaces.Box(np.array([0, 100], np.float32), np.array([512, 300], np.float32))


def actions(policy: Policy, count: int) -> np.ndarray:
    return np.stack([policy(None, {}) for _ in range(count)])


@pytest.mark.parametrize("make", [smooth_walk, drift, uniform])
@pytest.mark.parametrize(
    "space",
    [SQUARE, TARGETS, spaces.Discrete(4, start=1), spaces.MultiDiscrete([2, 3]), spaces.Box(-np.inf, np.inf, (2,))],
)
def test_actions_are_of_the_space_and_all_chance_is_the_generators(make, space) -> None:  # type: ignore[no-untyped-def]
    drawn, again = (actions(make(space, np.random.default_rng(3)), 200) for _ in range(2))
    other = actions(make(space, np.random.default_rng(4)), 200)
    assert np.array_equal(drawn, again) and not np.array_equal(drawn, other)
    policy = make(space, np.random.default_rng(3))
    assert all(space.contains(policy(None, {})) for _ in range(100))


def test_headings_persist_and_lengths_do_not() -> None:
    drawn = actions(smooth_walk(SQUARE, np.random.default_rng(0)), 20_000)
    length = np.linalg.norm(drawn, axis=1)
    heading = drawn / length[:, None]
    assert (heading[1:] * heading[:-1]).sum(axis=1).mean() > 0.8
    assert np.abs(heading.mean(axis=0)).max() < 0.06
    assert abs(np.corrcoef(length[1:], length[:-1])[0, 1]) < 0.03
    assert length.mean() == pytest.approx(0.5, abs=0.01) and length.max() <= 1 + 1e-6


def test_a_walk_fills_the_box_of_its_space() -> None:
    scaled = (actions(smooth_walk(TARGETS, np.random.default_rng(0)), 5_000) - [256, 200]) / [256, 100]
    plain = actions(smooth_walk(SQUARE, np.random.default_rng(0)), 5_000)
    np.testing.assert_allclose(scaled, plain, atol=1e-5)


def test_drifting_targets_move_little_and_get_everywhere() -> None:
    drawn = (actions(drift(TARGETS, np.random.default_rng(0)), 20_000) - [256, 200]) / [256, 100]
    steps = np.linalg.norm(np.diff(drawn, axis=0), axis=1)
    assert steps.mean() == pytest.approx(0.1 * np.sqrt(np.pi / 2), rel=0.1)  # speed: Rayleigh
    assert np.abs(drawn.mean(axis=0)).max() < 0.1
    assert np.abs(drawn.var(axis=0) - 1 / 3).max() < 0.06  # as if uniform
    assert (drawn.max(axis=0) > 0.99).all() and (drawn.min(axis=0) < -0.99).all()


def test_discrete_actions_persist() -> None:
    drawn = actions(smooth_walk(spaces.Discrete(4, start=1), np.random.default_rng(0)), 20_000)
    assert set(drawn) == {1, 2, 3, 4}
    assert (drawn[1:] == drawn[:-1]).mean() == pytest.approx(0.9 + 0.1 / 4, abs=0.01)
