"""Identities over time: which blob is which object, from frame to frame."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from data_pipelines.motion.blobs import Blob, Typical

Positions = NDArray[np.float64]

REACH = 1.5  # how far from its prediction an object is looked for, in sides of a typical object
MASS_COST = 1.5  # cost of a mass that differs by a factor of e, in sides
MOST_COST = 3.0  # of an assignment within reach, in sides
NEAR = 0.75  # distance from a blob within which an object may be hidden in it, in sides
LARGEST_CHANGE = 4.0  # of an object's mass, where it is found far away from its prediction
BIRTH_MASS_SHARE = 0.3
TAKEOVER_FACTOR, TAKEOVER_FRAMES = 2.5, 15
SPLIT_STEPS = 8
PRIOR_SHARE, HIDDEN_PRIOR_SHARE, HIDDEN_SCALE = 0.1, 2.0, 0.3  # weight of predictions, as a share of an object's mass
VELOCITY_SHARE, SHARED_VELOCITY_SHARE = 0.4, 0.1  # how fast the velocity follows, alone and in a common blob
DAMPING, MASS_SHARE = 0.8, 0.1
IMPOSSIBLE = 1e9


class Tracker:
    """Follows N objects through the blobs of successive frames.

    Each object is predicted at constant velocity, and predictions are assigned to blobs at the least total cost
    (linear_sum_assignment), which is the distance plus a term for a different mass. An object without a blob whose
    prediction lies within or next to the blob of another one is hidden in it: the blob is split.
    """

    def __init__(self, num_objects: int, typical: Typical) -> None:
        self._side, self._typical_mass = typical.side, typical.mass
        self._place = np.full((num_objects, 2), np.nan)
        self._velocity = np.zeros((num_objects, 2))
        self._mass = np.full(num_objects, typical.mass)
        self._variance = np.full(num_objects, typical.side**2 / 12)
        self._missed = np.zeros(num_objects, int)
        self._is_shared = np.zeros(num_objects, bool)
        self._frames_of_contender = 0

    def step(self, blobs: Sequence[Blob]) -> Positions:
        """Return the positions of the objects in the next frame, [N, 2] as (x, y); NaN where one is not found."""
        predicted = self._place + self._velocity
        owners = self._assigned(blobs, predicted)
        shared = self._hidden(blobs, predicted, owners)
        self._take_over(blobs, owners, shared)
        self._give_birth(blobs, owners, shared)
        found = np.full_like(self._place, np.nan)
        self._is_shared[:] = False
        for blob_number in set(owners.values()):
            objects = [number for number, blob in {**owners, **shared}.items() if blob == blob_number]
            blob = blobs[blob_number]
            if len(objects) == 1:
                found[objects[0]] = blob.centre
                self._mass[objects[0]] *= (blob.mass / self._mass[objects[0]]) ** MASS_SHARE
                self._variance[objects[0]] += MASS_SHARE * (blob.variance - self._variance[objects[0]])
            else:
                self._is_shared[objects] = True
                found[objects] = split(blob, predicted[objects], self._variance[objects])
        self._move(found, predicted)
        return found

    def _assigned(self, blobs: Sequence[Blob], predicted: Positions) -> dict[int, int]:
        """Return the number of the blob of each object that has one of its own."""
        known = np.flatnonzero(np.isfinite(predicted[:, 0]))
        if not len(known) or not blobs:
            return {}
        centres, masses = np.stack([blob.centre for blob in blobs]), np.array([blob.mass for blob in blobs])
        distance = np.linalg.norm(predicted[known, None] - centres, axis=-1)
        change = np.abs(np.log(masses / self._mass[known, None]))
        cost = distance + MASS_COST * self._side * change
        speed = np.linalg.norm(self._velocity[known], axis=-1)
        reach = REACH * self._side + 2 * speed
        wide = reach * (1.0 + self._missed[known]) ** 2
        is_near = (distance <= reach[:, None]) & (cost <= MOST_COST * self._side)
        is_possible = is_near | ((distance <= wide[:, None]) & (change <= np.log(LARGEST_CHANGE)))
        cost = np.where(is_possible, cost, IMPOSSIBLE)
        rows, columns = linear_sum_assignment(cost)
        return {
            int(known[row]): int(column)
            for row, column in zip(rows, columns, strict=True)
            if cost[row, column] < IMPOSSIBLE
        }

    def _hidden(self, blobs: Sequence[Blob], predicted: Positions, owners: dict[int, int]) -> dict[int, int]:
        """Return the number of another object's blob for each object that is hidden in it."""
        hidden = {}
        for number in np.flatnonzero(np.isfinite(predicted[:, 0])).tolist():
            if number in owners:
                continue
            distances = {
                blob: float(np.linalg.norm(blobs[blob].places - predicted[number], axis=1).min())
                for blob in set(owners.values())
            }
            if distances and min(distances.values()) <= NEAR * self._side:
                hidden[number] = min(distances, key=lambda blob: distances[blob])
        return hidden

    def _take_over(self, blobs: Sequence[Blob], owners: dict[int, int], shared: dict[int, int]) -> None:
        """Drop the object of the least mass after a much larger blob has had no object for some time."""
        free = [blob.mass for number, blob in enumerate(blobs) if number not in owners.values()]
        alone = {number: self._mass[number] for number in owners if owners[number] not in shared.values()}
        weakest = min(alone, key=lambda number: alone[number], default=None)
        is_contended = weakest is not None and max(free, default=0.0) > TAKEOVER_FACTOR * alone[weakest]
        self._frames_of_contender = self._frames_of_contender + 1 if is_contended else 0
        if weakest is not None and self._frames_of_contender > TAKEOVER_FRAMES:
            del owners[weakest]
            self._place[weakest] = np.nan
            self._frames_of_contender = 0

    def _give_birth(self, blobs: Sequence[Blob], owners: dict[int, int], shared: dict[int, int]) -> None:
        """Give objects that were never seen, or dropped, the largest blobs that no object has."""
        taken = {*owners.values(), *shared.values()}
        free = [number for number in range(len(blobs)) if number not in taken]
        unknown = np.flatnonzero(np.isnan(self._place[:, 0])).tolist()
        for number, blob in zip(unknown, free, strict=False):
            if blobs[blob].mass >= BIRTH_MASS_SHARE * self._typical_mass:
                owners[number] = blob
                self._mass[number], self._variance[number] = blobs[blob].mass, blobs[blob].variance
                self._velocity[number], self._missed[number] = 0.0, 0

    def _move(self, found: Positions, predicted: Positions) -> None:
        is_found = np.isfinite(found[:, 0])
        is_followed = is_found & np.isfinite(self._place[:, 0]) & (self._missed == 0)
        moved = found[is_followed] - self._place[is_followed]
        share = np.where(self._is_shared[is_followed, None], SHARED_VELOCITY_SHARE, VELOCITY_SHARE)
        self._velocity[is_followed] += share * (moved - self._velocity[is_followed])
        self._velocity[is_found & ~is_followed] = 0.0
        self._velocity[~is_found] *= DAMPING
        self._place = np.where(is_found[:, None], found, predicted)
        self._missed = np.where(is_found, 0, self._missed + 1)


def split(blob: Blob, predicted: Positions, variances: NDArray[np.float64]) -> Positions:
    """Return the centres [N, 2] of N objects in one blob.

    A mixture of N round Gaussians with the variances that the objects had alone is fitted by expectation maximisation.
    It starts at the predictions [N, 2], which also count as some of the blob's mass: as little if the blob is larger
    than the objects, as much if they are hidden behind each other, so that only the predictions tell them apart.
    """
    centres = predicted.copy()
    weights = blob.weights.astype(np.float64)
    excess = max(0.0, blob.variance / float(variances.mean()) - 1)
    prior = PRIOR_SHARE + HIDDEN_PRIOR_SHARE * np.exp(-excess / HIDDEN_SCALE)
    prior *= weights.sum() / len(centres)
    for _ in range(SPLIT_STEPS):
        squares = ((blob.places[:, None] - centres) ** 2).sum(axis=-1)
        log_density = -squares / (2 * variances) - np.log(variances)
        density = np.exp(log_density - log_density.max(axis=1, keepdims=True))
        share = weights[:, None] * density / density.sum(axis=1, keepdims=True)
        centres = (share.T @ blob.places + prior * predicted) / (share.sum(axis=0)[:, None] + prior)
    return centres
