"""The law of PushT, by pymunk, and its pictures.

A disc pushes a block in the shape of a T on a canvas of 512 x 512 units. The world is that of Diffusion Policy (Chi et
al., arXiv 2303.04137) as gym-pusht and stable-worldmodel have it: sizes, masses, the controller of the disc, 0.1 s per
step in 10 sub-steps. There is no friction between bodies, and the space stops every body that nothing pushes.

A state is the 10 numbers of STATE. They alone decide what follows: the simulation is built anew from them at each step,
so that no contact of the step before is remembered, and rounded to float32 after it, the precision of labels. A state
that was recorded, with the actions that were recorded, gives the same states again, bit for bit.

Coordinates are (x, y) in units, x to the right and y down. The block's position is the middle of the outer edge of
its bar, and its stem points along +y at angle 0. Angles turn from +x to +y.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import UserError
from data_pipelines.worlds.shapes import SIZE_PX, Array, box_distance, disc_distance, paint, pixel_centres
from data_pipelines.worlds.states import State

STATE = ("agent x", "agent y", "block x", "block y", "block angle", "agent vx", "agent vy", "vx", "vy", "spin")
"""Positions in units, the angle in rad within 0..2 pi, velocities per s. vx, vy: of the block's centre of mass."""
POSE_NUMBERS = 5  # the first of them

CANVAS = 512.0
WALL_LOW, WALL_HIGH, WALL_RADIUS = 5.0, 506.0, 2.0
AGENT_RADIUS = 15.0
BAR_LOW, BAR_HIGH = np.array([-60.0, 0.0]), np.array([60.0, 30.0])  # in the block's frame
STEM_LOW, STEM_HIGH = np.array([-15.0, 0.0]), np.array([15.0, 120.0])  # the part below the bar is a body's shape
OUTLINE = np.array([[-60, 0], [60, 0], [60, 30], [15, 30], [15, 120], [-15, 120], [-15, 30], [-60, 30]], np.float64)
CENTRE_OF_MASS = np.array([0.0, 45.0])
"""As gym-pusht sets it: the mean of the centres of bar and stem."""
MASS, MOMENT = 1.0, 3000.0

ACTION_UNITS = 100.0
"""An action of length 1 sets the controller's target this far from the disc."""
SUB_STEPS, SUB_STEP_S = 10, 0.01
STIFFNESS, DAMPING = 100.0, 20.0  # of the disc's controller, 1/s^2 and 1/s

GOAL_UNITS, GOAL_ANGLE = 20.0, np.pi / 9

UNITS_PER_PX = CANVAS / SIZE_PX
WHITE, LIGHT_GRAY, SLATE, BLUE = (255, 255, 255), (211, 211, 211), (119, 136, 153), (65, 105, 225)


def load_pymunk() -> Any:
    """Import pymunk.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pymunk
    except ImportError:
        raise UserError("PushT needs pymunk, which is not installed: pip install 'worldmodel[pusht]'") from None
    return pymunk


def move(state: State, action: NDArray[np.float32]) -> tuple[State, NDArray[np.float32]]:
    """Return the state after a step, float32 [10], and the executed action, float32 [2].

    The target of the disc is its position plus 100 units times the action, kept on the canvas. stable-worldmodel does
    not keep it there.
    """
    space, agent, block = _simulation(state)
    start = np.array(state[:2], np.float64)
    target = np.clip(start + ACTION_UNITS * np.asarray(action, np.float64), 0, CANVAS)
    target_x, target_y = target.tolist()
    for _ in range(SUB_STEPS):
        (x, y), (vx, vy) = agent.position, agent.velocity
        agent.velocity = (
            vx + SUB_STEP_S * (STIFFNESS * (target_x - x) - DAMPING * vx),
            vy + SUB_STEP_S * (STIFFNESS * (target_y - y) - DAMPING * vy),
        )
        space.step(SUB_STEP_S)
    angle = block.angle % (2 * np.pi)
    numbers = (
        *agent.position, *block.position, angle, *agent.velocity, *block.velocity, block.angular_velocity,
    )  # fmt: skip
    return np.array(numbers, np.float32), ((target - start) / ACTION_UNITS).astype(np.float32)


def _simulation(state: State) -> tuple[Any, Any, Any]:
    """Return pymunk's space, disc and block in a state."""
    pymunk = load_pymunk()
    agent_x, agent_y, block_x, block_y, angle, agent_vx, agent_vy, vx, vy, spin = map(float, state)
    space = pymunk.Space()
    space.damping = 0
    corners = [(WALL_LOW, WALL_HIGH), (WALL_LOW, WALL_LOW), (WALL_HIGH, WALL_LOW), (WALL_HIGH, WALL_HIGH)]
    for start, end in zip(corners, corners[1:] + corners[:1], strict=True):
        space.add(pymunk.Segment(space.static_body, start, end, WALL_RADIUS))
    agent = pymunk.Body(body_type=pymunk.Body.KINEMATIC)
    agent.position, agent.velocity = (agent_x, agent_y), (agent_vx, agent_vy)
    space.add(agent, pymunk.Circle(agent, AGENT_RADIUS))
    block = pymunk.Body(MASS, MOMENT)
    block.center_of_gravity = tuple(CENTRE_OF_MASS)
    block.angle = angle  # before the position: pymunk turns a body about its centre of mass
    block.position = block_x, block_y
    block.velocity, block.angular_velocity = (vx, vy), spin
    stem_low = np.array([STEM_LOW[0], BAR_HIGH[1]])
    boxes = [pymunk.Poly(block, _corners(low, high)) for low, high in [(BAR_LOW, BAR_HIGH), (stem_low, STEM_HIGH)]]
    space.add(block, *boxes)
    return space, agent, block


def _corners(low: Array, high: Array) -> list[tuple[float, float]]:
    (left, top), (right, bottom) = low.tolist(), high.tolist()
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


# ------------------------------------------------------------------------------------------------ geometry


def rotated(vectors: Array, angle: Any) -> Array:
    """Rotate vectors [..., 2] by angles that broadcast to [...]."""
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = vectors[..., 0], vectors[..., 1]
    return np.stack([cos * x - sin * y, sin * x + cos * y], axis=-1)


def to_block(points: Array, state: NDArray[Any]) -> Array:
    """Return points [..., 2] in the frame of the block of one state."""
    pose = np.asarray(state, np.float64)
    return rotated(points - pose[2:4], -pose[4])


def to_canvas(points: Array, state: NDArray[Any]) -> Array:
    """Return points [..., 2] of the frame of one state's block on the canvas."""
    pose = np.asarray(state, np.float64)
    return rotated(points, pose[4]) + pose[2:4]


def block_distance(points: Array) -> Array:
    """Return the signed distance of points [..., 2] in the block's frame from the T."""
    return np.minimum(box_distance(points, BAR_LOW, BAR_HIGH), box_distance(points, STEM_LOW, STEM_HIGH))


def angle_between(angle: Any, other: Any) -> Any:
    """Return angle - other within -pi..pi."""
    return (np.asarray(angle, np.float64) - other + np.pi) % (2 * np.pi) - np.pi


def reaches(state: NDArray[Any], goal: NDArray[Any]) -> bool:
    """Return whether a state meets a goal, by stable-worldmodel's criterion.

    The difference of the four coordinates of disc and block is less than 20 units long, and that of the block's angles
    less than pi / 9.
    """
    apart = np.linalg.norm(np.asarray(state[:4], np.float64) - goal[:4])
    return bool(apart < GOAL_UNITS and abs(angle_between(state[4], goal[4])) < GOAL_ANGLE)


# ------------------------------------------------------------------------------------------------ pictures


def draw(state: NDArray[Any], background: tuple[int, int, int] = WHITE) -> NDArray[np.uint8]:
    """Draw a state [K >= 5] on a background as RGB uint8 [64, 64, 3], antialiased: one pixel is 8 x 8 units.

    The colours are gym-pusht's. There is no green target, as a goal is a picture of its own.
    """
    points = UNITS_PER_PX * (_PIXELS + 0.5)
    pose = np.asarray(state, np.float64)
    picture = paint(_empty(background), block_distance(to_block(points, pose)) / UNITS_PER_PX, SLATE)
    picture = paint(picture, disc_distance(points, pose[:2], AGENT_RADIUS) / UNITS_PER_PX, BLUE)
    return np.rint(picture).astype(np.uint8)


_PIXELS = pixel_centres(SIZE_PX)


@lru_cache
def _empty(background: tuple[int, int, int]) -> Array:
    points = UNITS_PER_PX * (_PIXELS + 0.5)
    edge = np.abs(box_distance(points, np.full(2, WALL_LOW), np.full(2, WALL_HIGH)))
    # The wall is thinner than a pixel: its share of one is its width times the part of the pixel's width it crosses.
    cover = (2 * WALL_RADIUS / UNITS_PER_PX) * (1 - edge / UNITS_PER_PX).clip(0, 1)[..., None]
    return np.array(background) * (1 - cover) + cover * np.array(LIGHT_GRAY, np.float64)
