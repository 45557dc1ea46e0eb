"""The law of MiniGrid's Dynamic-Obstacles-8x8, in closed form and for any number of states at once.

- The agent turns left or right, or moves forward by a cell, on 6 x 6 cells within a wall. Four balls move on them.
- At each step every ball moves, one after the other, to a random free cell of its eight neighbours; the agent's cell
  is not free. A ball that has none stays. (MiniGrid gives up after 100 rejected draws, fewer than 1 in 100,000 moves.)
- Then the agent moves. Forward into a ball or a wall that was ahead before the step is a hit, which loses the episode.
  A ball that moves into the cell ahead in the same step blocks the way. In the strict law it is hit, too.
- A lost agent stays where it is. In MiniGrid the episode ends.

A state is float32 [12]: the agent's x and y, its direction (0 right, 1 down, 2 left, 3 up), 1 if it is lost and 0
otherwise, and x and y of each ball. Cells count from 1 to 6, x to the right and y down. Pictures are those of the
package minigrid 3.2 (Chevalier-Boisvert et al., arXiv 2306.13831), tiles of 8 px without the highlighted view. The
package itself is not needed: it requires pygame (36 MB) for its window, and moves one state at a time.
"""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.worlds.shapes import SIZE_PX

Numbers = NDArray[Any]
Flags = NDArray[np.bool_]

NUM_CELLS = 6
"""Cells of the room along each axis."""
NUM_BALLS = 4
STATE = ("x", "y", "direction", "lost", *(f"{axis} of ball {ball + 1}" for ball in range(NUM_BALLS) for axis in "xy"))
PLACE, DIRECTION, LOST, BALLS = slice(0, 2), 2, 3, slice(4, None)

LEFT, RIGHT, FORWARD = range(3)
"""The actions, by their numbers in MiniGrid."""
NUM_ACTIONS = 3

HEADINGS = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])
NEIGHBOURS = np.array([[x, y] for y in (-1, 0, 1) for x in (-1, 0, 1) if x or y])

TILE_PX = SIZE_PX // (NUM_CELLS + 2)
SUBPIXELS = 3
LINES, WALL, BALL, AGENT, LOST_FLOOR = (100, 100, 100), (100, 100, 100), (0, 0, 255), (255, 0, 0), (127, 127, 0)
LINE_WIDTH, BALL_RADIUS = 0.031, 0.31  # of a tile's side
TRIANGLE = ((0.12, 0.19), (0.87, 0.50), (0.12, 0.81))

# ------------------------------------------------------------------------------------------------ the law


def in_room(cells: Numbers) -> Flags:
    """Return whether cells [..., 2] are inside of the wall: bool [...]."""
    return np.asarray(((cells >= 1) & (cells <= NUM_CELLS)).all(axis=-1))


def occupied(cells: Numbers, balls: Numbers) -> Flags:
    """Return whether cells [..., 2] hold one of balls [..., N, 2]: bool [...]."""
    return (cells[..., None, :] == balls).all(axis=-1).any(axis=-1)


def turned_and_ahead(place: Numbers, direction: Numbers, action: Numbers) -> tuple[Numbers, Numbers]:
    """Return the directions [...] after actions [...], and the cells [..., 2] that they move to if nothing blocks."""
    turned = (direction - (action == LEFT) + (action == RIGHT)) % 4
    return turned, place + HEADINGS[direction] * (action == FORWARD)[..., None]


def move_balls(balls: Numbers, place: Numbers, rng: np.random.Generator) -> Numbers:
    """Move balls [B, N, 2] one after the other, but not to the agents' places [B, 2]: [B, N, 2]."""
    moved = balls.copy()
    for ball in range(balls.shape[1]):
        free = free_neighbours(moved, place, ball)
        chance = np.where(free, rng.random(free.shape), -1)
        chosen = moved[:, ball] + NEIGHBOURS[chance.argmax(axis=-1)]
        moved[:, ball] = np.where(free.any(axis=-1, keepdims=True), chosen, moved[:, ball])
    return moved


def free_neighbours(balls: Numbers, place: Numbers, ball: int) -> Flags:
    """Return which NEIGHBOURS of a ball, one of balls [B, N, 2], are free of balls and agents [B, 2]: bool [B, 8]."""
    cells = balls[:, ball, None] + NEIGHBOURS
    is_agent = (cells == place[:, None]).all(axis=-1)
    return in_room(cells) & ~occupied(cells, balls[:, None]) & ~is_agent


def move(states: Numbers, actions: Numbers, rng: np.random.Generator, *, strict: bool = False) -> Numbers:
    """Return the states [B, 12] after actions [B], float32 [B, 12]: the law of the environment."""
    place, direction, lost, balls = parts_of(states)
    turned, ahead = turned_and_ahead(place, direction, actions)
    goes = actions == FORWARD
    hits = goes & (~in_room(ahead) | occupied(ahead, balls))
    balls = move_balls(balls, place, rng)
    blocked = ~in_room(ahead) | occupied(ahead, balls)
    if strict:
        hits = hits | (goes & blocked)
    stays = lost | (goes & blocked)
    reached = np.where(stays[:, None], place, ahead)
    return state_of(reached, np.where(lost, direction, turned), lost | hits, balls)


def parts_of(states: Numbers) -> tuple[Numbers, Numbers, Flags, Numbers]:
    """Return the place [..., 2], direction [...], lost (bool [...]) and balls [..., N, 2] of states [..., 12]."""
    cells = np.asarray(states).astype(np.int64)
    balls = cells[..., BALLS].reshape(*cells.shape[:-1], NUM_BALLS, 2)
    return cells[..., PLACE], cells[..., DIRECTION], cells[..., LOST] > 0, balls


def state_of(place: Numbers, direction: Numbers, lost: Numbers, balls: Numbers) -> Numbers:
    """Return the states of these parts, float32 [..., 12]."""
    flat = balls.reshape(*balls.shape[:-2], -1)
    return np.concatenate([place, direction[..., None], lost[..., None], flat], axis=-1).astype(np.float32)


def least_steps(place: Numbers, direction: Numbers, goal: Numbers) -> Numbers:
    """Return the least number of steps to goal cells [..., 2] if nothing is in the way: int [...].

    They are the distance along the axes, and the turns: to the nearer of the headings that lead to the goal, and one
    more if there are two.
    """
    offset = np.asarray(goal) - place
    across, down = np.where(offset[..., 0] > 0, 0, 2), np.where(offset[..., 1] > 0, 1, 3)
    far = 2 * NUM_CELLS
    turns = [
        np.where(offset[..., axis] == 0, far, quarter_turns(direction, heading))
        for axis, heading in ((0, across), (1, down))
    ]
    fewest = np.minimum(*turns) + (offset != 0).all(axis=-1)
    return np.abs(offset).sum(axis=-1) + np.where((offset == 0).all(axis=-1), 0, fewest)


def quarter_turns(direction: Numbers, heading: Numbers) -> Numbers:
    """Return the least number of turns from one direction to another, 0 to 2."""
    turns = (heading - direction) % 4
    return np.minimum(turns, 4 - turns)


# ------------------------------------------------------------------------------------------------ pictures


@cache
def tile(kind: str, direction: int = 0) -> NDArray[np.uint8]:
    """Draw a tile, RGB uint8 [8, 8, 3]: "floor", "wall", "ball", or in a direction "agent" or "lost".

    As in the package, 3 x 3 points of a pixel are averaged.
    """
    side = TILE_PX * SUBPIXELS
    x, y = np.meshgrid(*[(np.arange(side) + 0.5) / side] * 2)
    fine = np.zeros((side, side, 3), np.uint8)
    fine[(x <= LINE_WIDTH) | (y <= LINE_WIDTH)] = LINES
    if kind == "wall":
        fine[:] = WALL
    if kind == "ball":
        fine[(x - 0.5) ** 2 + (y - 0.5) ** 2 <= BALL_RADIUS**2] = BALL
    if kind == "lost":
        fine[(x >= LINE_WIDTH) & (y >= LINE_WIDTH)] = LOST_FLOOR
    if kind in ("agent", "lost"):
        along, aside = HEADINGS[direction], HEADINGS[(direction + 1) % 4]
        u = 0.5 + (x - 0.5) * along[0] + (y - 0.5) * along[1]
        v = 0.5 + (x - 0.5) * aside[0] + (y - 0.5) * aside[1]
        fine[_in_triangle(u, v)] = AGENT
    return fine.reshape(TILE_PX, SUBPIXELS, TILE_PX, SUBPIXELS, 3).mean(axis=(1, 3)).astype(np.uint8)


def _in_triangle(x: Numbers, y: Numbers) -> Flags:
    """Return whether points are in TRIANGLE: on the same side of all three edges."""
    sides = []
    for (left, top), (right, bottom) in zip(TRIANGLE, TRIANGLE[1:] + TRIANGLE[:1], strict=True):
        sides.append((x - left) * (bottom - top) - (y - top) * (right - left))
    return np.asarray((np.stack(sides) <= 0).all(axis=0))


@cache
def _empty_room() -> NDArray[np.uint8]:
    """Draw the room without agent and balls, RGB uint8 [64, 64, 3]."""
    picture = np.tile(tile("wall"), (NUM_CELLS + 2, NUM_CELLS + 2, 1))
    picture[TILE_PX:-TILE_PX, TILE_PX:-TILE_PX] = np.tile(tile("floor"), (NUM_CELLS, NUM_CELLS, 1))
    return picture


def draw(state: Numbers) -> NDArray[np.uint8]:
    """Draw a state [12] as RGB uint8 [64, 64, 3]. The floor under a lost agent is yellow."""
    place, direction, lost, balls = parts_of(state)
    picture = _empty_room().copy()
    for cell in balls:
        _put(picture, cell, tile("ball"))
    _put(picture, place, tile("lost" if lost else "agent", int(direction)))
    return picture


def _put(picture: NDArray[np.uint8], cell: Numbers, drawn: NDArray[np.uint8]) -> None:
    column, row = (cell * TILE_PX).tolist()
    picture[row : row + TILE_PX, column : column + TILE_PX] = drawn
