"""The law of the two rooms, in closed form and in pixels, for any number of dots at once.

- The dot's centre is a point in [4, 59] x [4, 59] px. The wall is 3 px wide and closed except for a door, 10 px high.
- A step is a straight line. At its first contact with a wall it loses its component into the wall, and the rest slides
  along the wall. A second contact ends it. So the dot passes the door exactly if the line of its motion does.
- In rooms with a pit, a dot whose step ends in the pit stays there. The pit lies below the fixed door, beside the
  shortest path from one room to the other.

Coordinates are (x, y) in px, x to the right and y down, pixel centres at integers. The dot is green, the wall red and
the pit blue.
"""

import math
from functools import cache
from itertools import permutations, product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data_pipelines.worlds.digits import CANVAS_PX

if TYPE_CHECKING:
    from scipy.sparse import csr_array

LOW_PX, HIGH_PX = 4.0, 59.0
"""Range of the dot's centre, on both axes."""
WALL_WIDTH_PX, DOOR_HEIGHT_PX = 3.0, 10.0
MAX_STEP_PX = 4.0
DOT_STD_PX = 1.4

FIXED_WALL_X_PX, FIXED_DOOR_Y_PX = 31.5, 20.0
WALL_X_RANGE_PX = (20.0, 43.0)
DOOR_Y_RANGE_PX = (LOW_PX + DOOR_HEIGHT_PX / 2, HIGH_PX - DOOR_HEIGHT_PX / 2)

PIT_PX = ((16.0, 28.0), (47.0, 38.0))
"""Top left and bottom right corner of the pit."""
UNREACHABLE_PX = 2.0 * CANVAS_PX
"""Distance that counts where no path leads to the goal."""

CONTACT_TOLERANCE_PX = 1e-3  # rounding may leave the dot this far inside a wall; the next contact corrects it


# ------------------------------------------------------------------------------------------------ the law


def step_of_action(action: Tensor) -> Tensor:
    """Return the step of actions [..., 2], [..., 2] px. It is at most 4 px long for any action."""
    return MAX_STEP_PX * clip_to_disc(action)


def move(state: Tensor, step: Tensor, wall_x: Tensor | float, door_y: Tensor | float, *, pit: bool = False) -> Tensor:
    """Return the state after a step: the law of the environment, with a pit or without.

    state [..., 2] px in the free area, step [..., 2] px of any length, wall_x and door_y [...] px; all are broadcast.
    The result [..., 2] px has the type and device of the state. It never crosses a wall.
    """
    reached, rest = _leg(state, step, wall_x, door_y)
    if rest.any():
        reached = _leg(reached, rest, wall_x, door_y)[0]
    return torch.where(in_pit(state)[..., None], state, reached) if pit else reached


def is_free(state: Tensor, wall_x: Tensor | float, door_y: Tensor | float, *, pit: bool = False) -> Tensor:
    """Return whether points [..., 2] px are in the free area of the dot's centre, outside of any pit: bool [...]."""
    low, high = _wall_parts(state, wall_x, door_y)
    in_wall = ((state[..., None, :] > low) & (state[..., None, :] < high)).all(dim=-1).any(dim=-1)
    free = ((state >= LOW_PX) & (state <= HIGH_PX)).all(dim=-1) & ~in_wall
    return free & ~in_pit(state) if pit else free


def out_of_the_wall(points: Tensor, wall_x: float, door_y: float) -> Tensor:
    """Move points [..., 2] px that lie in the wall to its nearest edge, at a side of it or in the door: [..., 2] px."""
    x, y = points.unbind(-1)
    edges = [
        *(torch.stack([torch.full_like(x, wall_x + side * WALL_WIDTH_PX / 2), y], dim=-1) for side in (-1, 1)),
        *(torch.stack([x, torch.full_like(y, door_y + end * DOOR_HEIGHT_PX / 2)], dim=-1) for end in (-1, 1)),
    ]
    near = torch.stack(edges)
    nearest = (near - points).norm(dim=-1).argmin(dim=0)
    moved = near.gather(0, nearest[None, ..., None].expand(1, *points.shape)).squeeze(0)
    return torch.where(is_free(points, wall_x, door_y)[..., None], points, moved)


def in_pit(state: Tensor, margin_px: float = 0.0) -> Tensor:
    """Return whether points [..., 2] px are in the pit, made larger by a margin on all sides: bool [...]."""
    low, high = torch.tensor(PIT_PX, dtype=state.dtype, device=state.device)
    return ((state > low - margin_px) & (state < high + margin_px)).all(dim=-1)


def shortest_path_px(state: Tensor, goal: Tensor, wall_x: Tensor | float, door_y: Tensor | float) -> Tensor:
    """Return the length of the shortest path from state to goal, float64 [...] px. Arguments broadcast as in `move`.

    A shortest path among convex obstacles bends only at their corners. So it is the shortest of all paths over at most
    two corners of the door that cross no wall (visibility graph; Lozano-Pérez & Wesley 1979).
    """
    state, goal, wall_x, door_y = _broadcast(state, goal, wall_x, door_y)
    state, goal, wall_x, door_y = (values.double() for values in (state, goal, wall_x, door_y))
    corners = [
        torch.stack([wall_x + side * WALL_WIDTH_PX / 2, door_y + end * DOOR_HEIGHT_PX / 2], dim=-1)
        for side in (-1, 1)
        for end in (-1, 1)
    ]
    shortest = torch.full_like(wall_x, math.inf)
    for num_bends in range(3):
        for bends in permutations(corners, num_bends):
            points = torch.stack([state, *bends, goal], dim=-2)
            legs = points.diff(dim=-2)
            contact, _, _ = _first_contact(points[..., :-1, :], legs, wall_x[..., None], door_y[..., None])
            clear = (contact > 1 - 1e-9).all(dim=-1)
            shortest = torch.where(clear, torch.minimum(shortest, legs.norm(dim=-1).sum(dim=-1)), shortest)
    return shortest


def grid_points() -> Tensor:
    """Return the points of a grid of 1 px over the range of the dot's centre, [56, 56, 2] px, row by row."""
    places = torch.arange(LOW_PX, HIGH_PX + 1)
    return torch.stack(torch.meshgrid(places, places, indexing="xy"), dim=-1)


def distances_around_the_pit(goal: Tensor) -> Tensor:
    """Return the length of the shortest path from each of `grid_points` to a goal [2]: [56, 56] px.

    It is UNREACHABLE_PX where no path leads to the goal.
    """
    from scipy.sparse.csgraph import dijkstra

    side = len(grid_points())
    x, y = (goal - LOW_PX).round().long().tolist()
    lengths = torch.from_numpy(dijkstra(_paths_around_the_pit(), indices=y * side + x)).float()
    return lengths.clamp(max=UNREACHABLE_PX).view(side, side)


@cache
def _paths_around_the_pit() -> "csr_array":
    """Return the graph of straight moves between `grid_points` that avoid wall and pit.

    Moves are those to points at most 3 px away on each axis, so that lengths of paths are exact to about 1%.
    """
    from scipy.sparse import coo_array

    grid = grid_points()
    side = len(grid)
    number = torch.arange(side**2).view(side, side)
    starts, ends, lengths = [], [], []
    for dx, dy in product(range(-3, 4), repeat=2):
        if math.gcd(dx, dy) != 1:
            continue
        rows, columns = (slice(max(0, -by), side - max(0, by)) for by in (dy, dx))
        along = grid[rows, columns][..., None, :] + torch.linspace(0, 1, 9)[:, None] * torch.tensor([dx, dy])
        clear = is_free(along, FIXED_WALL_X_PX, FIXED_DOOR_Y_PX, pit=True).all(dim=-1)
        starts.append(number[rows, columns][clear])
        ends.append(starts[-1] + dy * side + dx)
        lengths.append(torch.full(starts[-1].shape, math.hypot(dx, dy), dtype=torch.float64))
    edges = (torch.cat(lengths).numpy(), (torch.cat(starts).numpy(), torch.cat(ends).numpy()))
    return coo_array(edges, shape=(side**2, side**2)).tocsr()


def clip_to_disc(action: Tensor) -> Tensor:
    """Clip the length of actions [..., 2] to 1."""
    return action / action.norm(dim=-1, keepdim=True).clamp(min=1)


def _leg(state: Tensor, step: Tensor, wall_x: Tensor | float, door_y: Tensor | float) -> tuple[Tensor, Tensor]:
    """Go straight to the first contact or the end. Return the point [..., 2] and the rest of the step."""
    state, step, wall_x, door_y = _broadcast(state, step, wall_x, door_y)
    time, axis, face = _first_contact(state, step, wall_x, door_y)
    touches = time < 1
    time = time.clamp(0, 1)[..., None]
    blocked = touches[..., None] & (axis[..., None] == torch.arange(2, device=state.device))
    # The face itself, not a rounded point near it: the next step then slides along it.
    reached = torch.where(blocked, face[..., None], state + time * step).clamp(LOW_PX, HIGH_PX)
    return reached, torch.where(blocked, 0, (1 - time) * step)


def _first_contact(state: Tensor, step: Tensor, wall_x: Tensor, door_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first contact of steps with a wall: its time, its axis and the coordinate of the face. Each [...].

    The time is a fraction of the step (> 1: after its end, or never). Intersections of rays and boxes are computed with
    the slab method (Kay & Kajiya 1986). Touching a wall without entering it is not a contact.
    """
    low, high = _wall_parts(state, wall_x, door_y)
    start, along = state[..., None, :], step[..., None, :]
    moving = along != 0
    pace = torch.where(moving, along, 1)
    to_low, to_high = (low - start) / pace, (high - start) / pace
    between = (start > low) & (start < high)
    enter, axis = torch.where(moving, torch.minimum(to_low, to_high), torch.where(between, -math.inf, math.inf)).max(-1)
    leave = torch.where(moving, torch.maximum(to_low, to_high), torch.where(between, math.inf, -math.inf)).amin(-1)
    pace_in = along.expand(low.shape).gather(-1, axis[..., None])[..., 0]
    meets = (enter < leave) & (enter * pace_in.abs() >= -CONTACT_TOLERANCE_PX)
    near = torch.where(along > 0, low, high).gather(-1, axis[..., None])[..., 0]

    bound = torch.where(step > 0, HIGH_PX, LOW_PX)
    to_bound, bound_axis = torch.where(step != 0, (bound - state) / torch.where(step != 0, step, 1), math.inf).min(-1)
    times = torch.cat([torch.where(meets, enter, math.inf), to_bound[..., None]], dim=-1)
    axes = torch.cat([axis, bound_axis[..., None]], dim=-1)
    faces = torch.cat([near, bound.gather(-1, bound_axis[..., None])], dim=-1)
    time, first = times.min(dim=-1)
    return time, axes.gather(-1, first[..., None])[..., 0], faces.gather(-1, first[..., None])[..., 0]


def _wall_parts(state: Tensor, wall_x: Tensor | float, door_y: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the low and high corners of the wall above and below the door, [..., 2 parts, 2 axes] px."""
    _, _, wall_x, door_y = _broadcast(state, state, wall_x, door_y)
    without_end = torch.full_like(door_y, math.inf)
    left, right = wall_x - WALL_WIDTH_PX / 2, wall_x + WALL_WIDTH_PX / 2
    top, bottom = door_y - DOOR_HEIGHT_PX / 2, door_y + DOOR_HEIGHT_PX / 2
    low = torch.stack([left, -without_end, left, bottom], dim=-1)
    high = torch.stack([right, top, right, without_end], dim=-1)
    return low.unflatten(-1, (2, 2)), high.unflatten(-1, (2, 2))


def _broadcast(
    first: Tensor, second: Tensor, wall_x: Tensor | float, door_y: Tensor | float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Broadcast two tensors [..., 2] and two [...] to one shape, with the type and device of the first."""
    wall_x, door_y = (torch.as_tensor(value, dtype=first.dtype, device=first.device) for value in (wall_x, door_y))
    shape = torch.broadcast_shapes(first.shape[:-1], second.shape[:-1], wall_x.shape, door_y.shape)
    first, second = first.expand(*shape, 2), second.to(first).expand(*shape, 2)
    return first, second, wall_x.expand(shape), door_y.expand(shape)


# ------------------------------------------------------------------------------------------------ pictures


def draw(
    states: Tensor,
    wall_x: Tensor | float,
    door_y: Tensor | float,
    *,
    pit: bool = False,
    dot_std_px: float = DOT_STD_PX,
    background: tuple[int, int, int] = (0, 0, 0),
) -> Tensor:
    """Draw states [N, 2] with wall_x and door_y [N] px as RGB uint8 [N, 64, 64, 3], on the states' device.

    The dot is a Gaussian blob (standard deviation dot_std_px) at sub-pixel position, in green. The red value of a pixel
    is the fraction of it that the wall covers, the blue value that of the pit. The background, [R, G, B] of 0 to 255
    each, is seen where none of them covers a pixel.
    """
    states, _, wall_x, door_y = _broadcast(states, states, wall_x, door_y)
    pixel = torch.arange(CANVAS_PX, device=states.device, dtype=states.dtype)
    columns, rows = torch.exp(-0.5 * ((pixel - states[..., None]) / dot_std_px) ** 2).unbind(-2)
    dot = rows[..., :, None] * columns[..., None, :]
    wall = _cover(pixel, wall_x, WALL_WIDTH_PX)[..., None, :] * (1 - _cover(pixel, door_y, DOOR_HEIGHT_PX))[..., None]
    hole = torch.zeros_like(dot)
    if pit:
        (left, top), (right, bottom) = torch.tensor(PIT_PX, dtype=states.dtype, device=states.device)
        hole += _cover(pixel, (top + bottom) / 2, bottom - top)[:, None] * _cover(
            pixel, (left + right) / 2, right - left
        )
    picture = torch.stack([wall, dot, hole], dim=-1) * 255
    if any(background):
        uncovered = (1 - wall) * (1 - dot) * (1 - hole)
        picture += uncovered[..., None] * torch.tensor(background, dtype=states.dtype, device=states.device)
    return picture.round().byte()


def _cover(pixel: Tensor, centre: Tensor, width_px: Tensor | float) -> Tensor:
    """Return the fraction of each pixel that an interval covers: pixel [P], centre [N] -> [N, P]."""
    return (width_px / 2 + 0.5 - (pixel - centre[..., None]).abs()).clamp(0, 1)
