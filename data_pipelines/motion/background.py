"""The background of a fixed camera: what most sampled frames show, its noise, and what differs from it.

Pictures are luma at the working scale: [H, W], reduced by a whole factor so that about WORKING_PX pixels remain.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Picture = NDArray[np.float32]

WORKING_PX = 100_000
LEAST_DIFFERENCE = 6.0  # grey levels of 255; compression alone makes smaller ones
NOISE_FACTOR = 5.0
NOISE_QUANTILE, QUANTILE_OF_NORMAL = 0.4, 0.5244  # of |x|: an object may cover a pixel in half of the samples
DENSEST_SHARE, DENSEST_OF_NORMAL = 0.3, 0.3  # the shortest of all such intervals is shorter than the central one, 0.385
MAX_NOISE_RATIO = 3.0
SHARES = (0.4, 0.25, 0.15, 0.08, 0.04)  # of the samples that show a pixel's other value, in the order of the tests
SMOOTHER = 0.6  # of the gradient along the outline: a candidate with this share of the other's has no edge
LEAST_AREA = 9
MAX_GAIN = 1.5
LIGHT_SAMPLES = 4096


class Background(NamedTuple):
    """image: the luma without objects, [H, W]. noise: the standard deviation of a smoothed frame around it, [H, W]."""

    image: Picture
    noise: Picture


def working_factor(height: int, width: int) -> int:
    """Return the whole factor by which frames of this size are reduced."""
    return max(1, min(round(math.sqrt(height * width / WORKING_PX)), height, width))


def reduced(luma: NDArray[np.uint8], factor: int) -> Picture:
    """Return the means of blocks of factor x factor pixels of [H, W], smoothed by a box of 3 x 3 blocks.

    Rows and columns that do not fill a block are left out.
    """
    height, width = luma.shape[0] // factor, luma.shape[1] // factor
    picture: NDArray[Any] = luma[: height * factor, : width * factor]
    if factor > 1:
        rows = np.add.reduceat(picture, range(0, height * factor, factor), axis=0, dtype=np.uint16)
        blocks = np.add.reduceat(rows, range(0, width * factor, factor), axis=1, dtype=np.uint32)
        picture = blocks.astype(np.float32) / factor**2
    return ndimage.uniform_filter(picture.astype(np.float32), size=3, mode="nearest")


def difference(picture: Picture, background: Picture) -> Picture:
    """Return a picture minus the background in the picture's light, [H, W].

    The light is a gain and an offset for the whole picture: a robust straight line through the pixels.
    """
    step = max(1, math.isqrt(picture.size // LIGHT_SAMPLES))
    x, y = background[::step, ::step].ravel(), picture[::step, ::step].ravel()
    gain, offset = 1.0, float(np.median(y - x))
    for _ in range(2):
        error = np.abs(y - gain * x - offset)
        kept = error <= 4 * np.median(error) + 1
        x_kept, y_kept = x[kept], y[kept]
        variance = float(x_kept.var())
        if variance > 25:  # otherwise the gain cannot be told from the offset
            slope = float(((x_kept - x_kept.mean()) * (y_kept - y_kept.mean())).mean()) / variance
            gain = min(max(slope, 1 / MAX_GAIN), MAX_GAIN)
        offset = float(np.median(y_kept - gain * x_kept))
    return picture - (gain * background + offset)


def estimated_background(samples: Picture) -> Background:
    """Return the background of sampled pictures [N, H, W], at least one.

    A pixel has the value around which its samples are densest, or the median of those that differ from it. An object
    that rests longer than it moves would otherwise be part of the background, and leave a ghost when it moves. Of the
    darker and the brighter candidate for a region, the background is the one without an edge along the outline.
    """
    image = np.median(samples, axis=0)
    light = np.stack([difference(sample, image) for sample in samples])
    middle, narrow = _densest(light)
    image, light = image + middle, light - middle
    is_far = np.abs(light) > np.maximum(10.0, NOISE_FACTOR * _noise(light, narrow))
    share = is_far.mean(axis=0)
    places = share >= min(SHARES)
    if places.any():
        other, is_tight = _medians_of(light[:, places], is_far[:, places])
        alternative = image.copy()
        alternative[places] += other
        share[places] *= is_tight
        image = _without_objects(image, alternative, share)
    light = np.stack([difference(sample, image) for sample in samples])
    return Background(image.astype(np.float32), _noise(light, narrow))


def _densest(values: Picture) -> tuple[Picture, Picture]:
    """Return the middle of the shortest interval that holds DENSEST_SHARE of the values [N, ...], and a deviation.

    The deviation is that of a normal distribution with such an interval. Objects do not widen it while they cover less
    than the other part of the values.
    """
    count = len(values)
    within = max(1, round(DENSEST_SHARE * count)) if count > 1 else 0
    ordered = np.sort(values, axis=0)
    lengths = ordered[within:] - ordered[: count - within]
    first = lengths.argmin(axis=0)[None]
    low, middle, high = (np.take_along_axis(ordered, first + part, axis=0)[0] for part in (0, within // 2, within))
    return middle, (high - low) / 2 / DENSEST_OF_NORMAL


def _noise(differences: Picture, narrow: Picture) -> Picture:
    """Return the standard deviation per pixel from differences [N, H, W] that objects take part in.

    narrow: an estimate that objects do not widen, but that is too small for flickering pixels, [H, W].
    """
    spread = np.quantile(np.abs(differences), NOISE_QUANTILE, axis=0) / QUANTILE_OF_NORMAL
    bounded = np.minimum(spread, MAX_NOISE_RATIO * narrow + 1).astype(np.float32)
    return ndimage.uniform_filter(bounded, size=3, mode="nearest")


def _medians_of(values: Picture, is_chosen: NDArray[np.bool_]) -> tuple[Picture, NDArray[np.bool_]]:
    """Return the medians of the chosen values of each column of [N, P], and whether half of them are close to it."""
    ordered = np.sort(np.where(is_chosen, values, np.inf), axis=0)
    counts = is_chosen.sum(axis=0)

    def at(part: float) -> Picture:
        return np.take_along_axis(ordered, ((counts - 1) * part).astype(int)[None], axis=0)[0]

    return at(0.5), at(0.75) - at(0.25) <= np.maximum(12.0, 0.25 * np.abs(at(0.5)))


def _without_objects(image: Picture, alternative: Picture, share: Picture) -> Picture:
    """Replace regions of an image [H, W] by the darker or the brighter candidate, if one has no edge along the outline.

    alternative: the other candidate. share: of the samples that show it.
    """
    candidates = np.minimum(image, alternative), np.maximum(image, alternative)
    chosen = image.copy()
    is_replaced = np.zeros(image.shape, bool)
    for least in SHARES:
        labels, _ = ndimage.label((share >= least) & ~is_replaced)
        for number, box in enumerate(ndimage.find_objects(labels), start=1):
            around = tuple(slice(max(0, part.start - 3), part.stop + 3) for part in box)
            region = labels[around] == number
            if region.sum() < LEAST_AREA:
                continue
            region = ndimage.binary_dilation(region) & (share[around] >= SHARES[-1])
            outline = ndimage.binary_dilation(region, iterations=2) & ~ndimage.binary_erosion(region, iterations=2)
            filled = [np.where(region, candidate[around], chosen[around]) for candidate in candidates]
            edges = [float(_gradient(picture)[outline].mean()) for picture in filled]
            if min(edges) < SMOOTHER * max(edges):
                chosen[around] = filled[edges.index(min(edges))]
                is_replaced[around] |= region
    return chosen


def _gradient(picture: Picture) -> Picture:
    return np.hypot(ndimage.sobel(picture, 0, mode="nearest"), ndimage.sobel(picture, 1, mode="nearest"))
