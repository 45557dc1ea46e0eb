"""Policies that explore any environment, for recording.

A policy is for one episode: a function from the last observation and info to the next action. All its random numbers
come from one generator.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

Policy = Callable[[Any, Mapping[str, Any]], Any]
MakePolicy = Callable[[np.random.Generator], Policy]
"""Returns the policy of an episode."""

PERSISTENCE = 0.9
"""Correlation of successive headings, and the probability that a discrete action is repeated."""
DRIFT_SPEED = 0.1
"""Speed of a drifting action, as a fraction of half the action space."""


def smooth_walk(space: spaces.Space, rng: np.random.Generator) -> Policy:
    """Return a policy for actions that are velocities or forces: the heading persists, the length is uniform in [0, 1].

    In a bounded Box of D numbers the action is its middle plus heading times length times half its extent. The heading
    is a random walk on the unit sphere. Discrete actions persist. Other actions are independent at each step.
    """
    if isinstance(space, spaces.Discrete):
        return _repeated(space, rng)
    if not is_bounded_box(space):
        return uniform(space, rng)
    middle, half = _middle_and_half(space)
    heading = rng.normal(size=middle.shape)

    def act(observation: Any, info: Mapping[str, Any]) -> np.ndarray:
        nonlocal heading
        heading = PERSISTENCE * heading + np.sqrt(1 - PERSISTENCE**2) * rng.normal(size=middle.shape)
        action = middle + half * rng.random() * heading / max(float(np.linalg.norm(heading)), 1e-9)
        return _in_space(space, action)

    return act


def drift(space: spaces.Space, rng: np.random.Generator) -> Policy:
    """Return a policy for actions that are targets: a point wanders in a bounded Box and bounces off its borders.

    Its velocity persists as the heading of `smooth_walk` does. For other spaces it is `smooth_walk`.
    """
    if not is_bounded_box(space):
        return smooth_walk(space, rng)
    middle, half = _middle_and_half(space)
    place, velocity = rng.uniform(-1, 1, middle.shape), rng.normal(size=middle.shape)

    def act(observation: Any, info: Mapping[str, Any]) -> np.ndarray:
        nonlocal place, velocity
        velocity = PERSISTENCE * velocity + np.sqrt(1 - PERSISTENCE**2) * rng.normal(size=middle.shape)
        place = place + DRIFT_SPEED * velocity
        outside = np.abs(place) > 1
        velocity = np.where(outside, -np.sign(place) * np.abs(velocity), velocity)
        place = np.clip(np.where(outside, 2 * np.sign(place) - place, place), -1, 1)
        return _in_space(space, middle + half * place)

    return act


def uniform(space: spaces.Space, rng: np.random.Generator) -> Policy:
    """Return a policy that samples the action space, uniformly if it is bounded."""
    space.seed(int(rng.integers(2**31)))
    return lambda observation, info: space.sample()


def is_bounded_box(space: spaces.Space) -> bool:
    """Return whether actions are real numbers, all of them bounded."""
    return isinstance(space, spaces.Box) and space.is_bounded("both") and np.issubdtype(space.dtype, np.floating)


def _repeated(space: spaces.Discrete, rng: np.random.Generator) -> Policy:
    action: int | None = None

    def act(observation: Any, info: Mapping[str, Any]) -> np.integer:
        nonlocal action
        if action is None or rng.random() >= PERSISTENCE:
            action = int(space.start + rng.integers(space.n))
        return space.dtype.type(action)

    return act


def _middle_and_half(box: spaces.Space) -> tuple[np.ndarray, np.ndarray]:
    assert isinstance(box, spaces.Box)
    low, high = box.low.astype(np.float64), box.high.astype(np.float64)
    return (low + high) / 2, (high - low) / 2


def _in_space(box: spaces.Space, action: np.ndarray) -> np.ndarray:
    """Round an action to the type of the space and clip it to its bounds."""
    assert isinstance(box, spaces.Box)
    return np.clip(action.astype(box.dtype), box.low, box.high)
