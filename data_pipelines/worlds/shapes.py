"""Antialiased pictures of simple shapes, from their signed distances: a pixel is covered by 0.5 px minus its distance.

Distances are negative inside. Points are (x, y), [..., 2] of any unit.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ImageColor

from data_pipelines.errors import UserError
from data_pipelines.text_files import shown

Array = NDArray[np.float64]
Colour = str | Sequence[int]
"""A CSS name such as "navy", or red, green and blue from 0 to 255."""

SIZE_PX = 64
"""Side of the pictures of an environment."""
AGENT_SIZE_RANGE = (0.25, 4.0)


def check_render_mode(render_mode: Any) -> None:
    """Check the render mode of an environment.

    Raises:
        UserError: it is not "rgb_array" or None.
    """
    if render_mode not in (None, "rgb_array"):
        raise UserError(f"render_mode={render_mode!r} is unknown: use rgb_array, or leave it out")


def check_agent_size(size: Any) -> None:
    """Check the size of a drawn agent, relative to the usual one.

    Raises:
        UserError: it is out of range.
    """
    check_number("agent_size", size, *AGENT_SIZE_RANGE)


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Check the value of an argument with this name.

    Raises:
        UserError: it is not a number within low..high.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{name}={shown(value)} must be a number within {low:g}..{high:g}")


def rgb_of(name: str, colour: Any) -> tuple[int, int, int]:
    """Return a Colour, the value of an argument with this name, as red, green and blue from 0 to 255.

    Raises:
        UserError: it is not a Colour.
    """
    try:
        rgb: tuple[Any, ...] = tuple(ImageColor.getrgb(colour) if isinstance(colour, str) else colour)
    except (ValueError, TypeError):
        rgb = ()
    if len(rgb) != 3 or not all(type(part) is int and 0 <= part <= 255 for part in rgb):
        raise UserError(f"{name}={shown(colour)} must be a colour: a name such as navy, or [R, G, B] of 0 to 255 each")
    red, green, blue = rgb
    return red, green, blue


def disc_distance(points: Array, centre: Array, radius: float) -> Array:
    """Return the signed distance of points [..., 2] from discs, with centres that broadcast to them."""
    return np.linalg.norm(points - centre, axis=-1) - radius


def box_distance(points: Array, low: Array, high: Array) -> Array:
    """Return the signed distance of points [..., 2] from the axis-aligned box low..high, [2] each."""
    outside = np.abs(points - (low + high) / 2) - (high - low) / 2
    return np.linalg.norm(outside.clip(min=0), axis=-1) + outside.max(axis=-1).clip(max=0)


def capsule_distance(points: Array, start: Array, end: Array, radius: float) -> Array:
    """Return the signed distance of points [..., 2] from capsules, with ends that broadcast to them."""
    along, offset = end - start, points - start
    fraction = (offset * along).sum(axis=-1) / np.maximum((along * along).sum(axis=-1), 1e-12)
    return np.linalg.norm(offset - fraction.clip(0, 1)[..., None] * along, axis=-1) - radius


def box_silhouette_distance(points: Array, centre: Array, half_edges: Array) -> Array:
    """Return the signed distance of points [..., 2] from the silhouette of a box in an orthographic view.

    centre [2]; half_edges [3, 2]: half of the box's edges as vectors in the view. The silhouette is the set of points p
    with |n (p - centre)| <= sum over half edges e of |n e| for the normal n of each of them. Beyond a corner, the
    distance is that from the nearest edges' lines.
    """
    lengths = np.linalg.norm(half_edges, axis=-1, keepdims=True)
    across = np.stack([-half_edges[:, 1], half_edges[:, 0]], axis=-1)
    # An edge along the view has no normal. The inequality holds for any.
    normals = np.where(lengths > 1e-6, across / np.maximum(lengths, 1e-6), np.array([1.0, 0.0]))
    reach = np.abs(normals @ half_edges.T).sum(axis=-1)
    return (np.abs((points - centre) @ normals.T) - reach).max(axis=-1)


def pixel_centres(size_px: int) -> Array:
    """Return the centres of the pixels of a square picture, [size_px, size_px, 2] px; the first is at (0, 0)."""
    places = np.arange(size_px, dtype=np.float64)
    return np.stack(np.meshgrid(places, places), axis=-1)


def paint(picture: Array, distance_px: Array, colour: tuple[int, int, int]) -> Array:
    """Paint a shape over pictures [..., H, W, 3], given its distance [..., H, W] px."""
    cover = (0.5 - distance_px).clip(0, 1)[..., None]
    return picture * (1 - cover) + cover * np.asarray(colour, np.float64)
