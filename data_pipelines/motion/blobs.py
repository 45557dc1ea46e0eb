"""Blobs: connected regions of a picture that differ from its background."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from data_pipelines.motion.background import LEAST_AREA, LEAST_DIFFERENCE, NOISE_FACTOR, Background, Picture, difference

CONTRAST_SHARE = 0.3  # of the contrast of objects; smaller differences are shadows, reflections and the like
LEAST_MASS_SHARE = 0.1  # of the mass of objects
CORE_SHARE = 0.5
MAX_BLOBS = 24
JOIN = np.ones((3, 3), bool)


class Blob(NamedTuple):
    """A region of P pixels. Places are (x, y) in pixels at the working scale.

    places: [P, 2]. weights: the absolute difference from the background, [P]. mass: the sum of the weights.
    centre: the weighted mean of the places of the core, [2]. variance: of these places around it, the mean of both
        directions. The core has at least half of the weight of the strongest tenth: no shadow and no reflection.
    """

    places: NDArray[np.float32]
    weights: Picture
    mass: float
    centre: NDArray[np.float64]
    variance: float


class Typical(NamedTuple):
    """The medians over the objects in sampled frames: contrast in grey levels, mass, side (root of the area) in pixels.

    stirring: the median share of a frame's pixels that differ from the background and belong to no object.
    """

    contrast: float
    mass: float
    side: float
    stirring: float


def find_blobs(
    picture: Picture, background: Background, least_difference: float = 0.0, least_mass: float = 0.0
) -> list[Blob]:
    """Return the blobs of a picture [H, W], at most MAX_BLOBS, with the largest mass first.

    least_difference: from the background, in grey levels, in addition to the noise's limit.
    """
    weights = np.abs(difference(picture, background.image))
    limit = np.maximum(NOISE_FACTOR * background.noise, max(LEAST_DIFFERENCE, least_difference))
    mask = weights > limit
    labels, count = ndimage.label(ndimage.binary_dilation(mask, JOIN), JOIN)
    if not count:
        return []
    labels *= mask
    numbers = np.arange(1, count + 1)
    flat = labels.ravel()
    masses = np.bincount(flat, weights.ravel(), count + 1)[1:]
    areas = np.bincount(flat, minlength=count + 1)[1:]
    kept = numbers[(areas >= LEAST_AREA) & (masses >= least_mass)]
    kept = kept[np.argsort(-masses[kept - 1], kind="stable")][:MAX_BLOBS]
    boxes = ndimage.find_objects(labels)
    return [_blob_of(labels, weights, number, boxes[number - 1]) for number in kept.tolist()]


def _blob_of(labels: NDArray[np.int32], weights: Picture, number: int, box: tuple[slice, slice]) -> Blob:
    y, x = np.nonzero(labels[box] == number)
    y, x = y + box[0].start, x + box[1].start
    return blob_of_places(np.stack([x, y], axis=1).astype(np.float32), weights[y, x])


def blob_of_places(places: NDArray[np.float32], weights: Picture) -> Blob:
    """Return the blob of places [P, 2] and their weights [P]."""
    mass = float(weights.sum())
    core = np.where(weights >= CORE_SHARE * np.quantile(weights, 0.9), weights, 0)
    centre = (core[:, None] * places).sum(axis=0, dtype=np.float64) / core.sum(dtype=np.float64)
    variance = float((core[:, None] * (places - centre) ** 2).sum(dtype=np.float64)) / float(2 * core.sum())
    return Blob(places, weights, mass, centre, variance)


def typical_objects(samples: Sequence[Picture], background: Background, num_objects: int) -> Typical | None:
    """Return the medians over the largest blobs of sampled pictures; None if nothing differs from the background."""
    largest = [find_blobs(sample, background)[:num_objects] for sample in samples]
    objects = [blob for blobs in largest for blob in blobs]
    if not objects:
        return None
    # Objects of a large mass decide: a few pixels of noise are no object where something else moves.
    heaviest = max(blob.mass for blob in objects)
    objects = [blob for blob in objects if blob.mass >= LEAST_MASS_SHARE * heaviest]
    masses = [blob.mass for blob in objects]
    contrast = float(np.median([np.quantile(blob.weights, 0.75) for blob in objects]))
    sides = [len(blob.places) ** 0.5 for blob in objects]
    stirring = [_stirring(sample, background, blobs) for sample, blobs in zip(samples, largest, strict=True)]
    return Typical(contrast, float(np.median(masses)), float(np.median(sides)), float(np.median(stirring)))


def _stirring(picture: Picture, background: Background, objects: Sequence[Blob]) -> float:
    differs = np.abs(difference(picture, background.image)) > 2 * LEAST_DIFFERENCE
    for blob in objects:
        x, y = blob.places.astype(int).T
        differs[y, x] = False
    return float(differs.mean())
