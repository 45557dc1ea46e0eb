"""The law of OGBench's cube-single, by OGBench and MuJoCo, and its pictures.

A UR5e arm with a Robotiq 2F-85 gripper moves a cube of 4 cm on a table (Park et al., arXiv 2410.20092,
`cube-single-v0`). Model, controller and step are OGBench's: an action moves the target of the gripper, relative to the
gripper, for 0.05 s in 25 sub-steps. No picture is rendered by MuJoCo, and no OpenGL context is made.

A state is MuJoCo's positions and velocities, the 41 numbers of STATE. They alone decide what follows, and are rounded
to float32 after each step, so that recorded states and actions can be replayed bit for bit. OGBench's controller starts
from the gripper's pose of one sub-step ago. It follows from the state: positions minus 0.002 s of velocities. The
forces from which MuJoCo's solver starts its iterations are forgotten at each step, unlike in OGBench.

Coordinates are (x, y, z) in m: x away from the arm's base, z up, the table at 0. Quaternions are (w, x, y, z).
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import UserError
from data_pipelines.worlds.shapes import (
    SIZE_PX,
    Array,
    box_silhouette_distance,
    capsule_distance,
    paint,
    pixel_centres,
)
from data_pipelines.worlds.states import State

ARM_JOINTS = ("shoulder pan", "shoulder lift", "elbow", "wrist 1", "wrist 2", "wrist 3")
GRIPPER_JOINTS = tuple(
    f"{side} {part}" for side in ("right", "left") for part in ("driver", "coupler", "spring link", "follower")
)
CUBE_POSE = ("cube x", "cube y", "cube z", "cube qw", "cube qx", "cube qy", "cube qz")
CUBE_VELOCITY = ("cube vx", "cube vy", "cube vz", "cube spin x", "cube spin y", "cube spin z")
POSITIONS = (*ARM_JOINTS, *GRIPPER_JOINTS, *CUBE_POSE)
STATE = (*POSITIONS, *(f"{name} velocity" for name in (*ARM_JOINTS, *GRIPPER_JOINTS)), *CUBE_VELOCITY)
"""Angles in rad, positions in m, velocities per s. All but the cube's quaternion: joints as MuJoCo has them."""
NUM_POSITIONS = len(POSITIONS)
CUBE = slice(14, 17)
"""The cube's position in a state."""
CUBE_QUATERNION = slice(17, 21)
OPENING_JOINT, CLOSED_RAD = 6, 0.8

NUM_ACTIONS = 5
STEP_S, SUB_STEPS = 0.05, 25
GOAL_M = 0.04
CUBE_HALF_M = 0.02


def reaches(state: NDArray[Any], goal: NDArray[Any]) -> bool:
    """Return whether the cube is within 0.04 m of its position in the goal, OGBench's criterion.

    The cube's angle, the gripper and velocities do not count.
    """
    return bool(np.linalg.norm(np.asarray(state[CUBE], np.float64) - goal[CUBE]) <= GOAL_M)


def _yaw_of(rotation: Array) -> float:
    """Return the angle by which a rotation matrix [3, 3] turns about z, in rad within -pi..pi."""
    return float(np.arctan2(rotation[1, 0], rotation[0, 0]))


@dataclass(frozen=True)
class Box:
    """A box in m: its centre [3] and its half edges [3, 3], a vector a row."""

    centre: Array
    half_edges: Array


@dataclass(frozen=True)
class Bodies:
    """The parts of a state that a picture shows.

    fingers, knuckles: right and left; a knuckle [3] is where a finger starts.

    The inner faces of the fingers are those of the gripper's pads. They are drawn twice as thick, outwards.
    """

    cube: Box
    fingers: tuple[Box, Box]
    hand: Box
    knuckles: Array


class Simulator:
    """OGBench's environment as functions of a state.

    Raises:
        ImportError: ogbench or one of its packages cannot be imported.
    """

    def __init__(self) -> None:
        with _quiet():
            import mujoco
            from ogbench.manipspace.envs.cube_env import CubeEnv
        self.ogbench = CubeEnv("single", mode="data_collection", visualize_info=False)
        self.ogbench.reset(seed=0)
        self._mujoco, self._model, self._data = mujoco, self.ogbench.model, self.ogbench.data
        assert (self._model.nq, self._model.nv) == (NUM_POSITIONS, len(STATE) - NUM_POSITIONS)
        assert self._model.opt.timestep * SUB_STEPS == STEP_S

    def draw_state(self, rng: np.random.Generator) -> State:
        """Draw a state at rest as OGBench does for its data: gripper open in the air, cube on the table."""
        self.ogbench.reset(seed=int(rng.integers(2**31)))
        return np.array([*self._data.qpos, *self._data.qvel], np.float32)

    def move(self, state: State, action: NDArray[np.float32]) -> State:
        """Return the state [41] after a step with an action [5] in -1..1."""
        self._mujoco.mj_resetData(self._model, self._data)  # the solver remembers forces
        self._place_gripper(state)
        self._data.qpos[:], self._data.qvel[:] = state[:NUM_POSITIONS], state[NUM_POSITIONS:]
        self.ogbench.set_control(action)
        self._mujoco.mj_step(self._model, self._data, nstep=SUB_STEPS)
        return np.array([*self._data.qpos, *self._data.qvel], np.float32)

    def gripper(self, state: State) -> tuple[Array, float, float]:
        """Return the gripper as the controller reads it: position [3] in m, yaw in rad, closing from 0 (open) to 1."""
        self._place_gripper(state)
        site = self._pinch_site
        yaw = _yaw_of(self._data.site_xmat[site].reshape(3, 3))
        return self._data.site_xpos[site].copy(), yaw, float(np.clip(state[OPENING_JOINT] / CLOSED_RAD, 0, 1))

    def bodies(self, state: State) -> Bodies:
        """Return the bodies of a picture in a state [K >= 21]."""
        self._data.qpos[:] = state[:NUM_POSITIONS]
        self._mujoco.mj_kinematics(self._model, self._data)
        cube, hand, right, right_below, left, left_below = (self._box(geom) for geom in self._geoms)
        fingers = _finger(right, right_below), _finger(left, left_below)
        return Bodies(cube, fingers, hand, self._data.xpos[self._knuckles])

    def _place_gripper(self, state: State) -> None:
        """Compute the places of bodies one sub-step before a state, which MuJoCo has after the step to the state."""
        self._data.qpos[:] = state[:NUM_POSITIONS]
        velocity = np.asarray(state[NUM_POSITIONS:], np.float64)
        self._mujoco.mj_integratePos(self._model, self._data.qpos, velocity, -self._model.opt.timestep)
        self._mujoco.mj_kinematics(self._model, self._data)

    def _box(self, geom: int) -> Box:
        """Return the box around a geom, along its own axes."""
        middle, half = self._model.geom_aabb[geom].reshape(2, 3)
        axes = self._data.geom_xmat[geom].reshape(3, 3)
        return Box(self._data.geom_xpos[geom] + axes @ middle, (axes * half).T)

    @cached_property
    def _pinch_site(self) -> int:
        return self._model.site("ur5e/robotiq/pinch").id

    @cached_property
    def _geoms(self) -> list[int]:
        pads = [f"ur5e/robotiq/{side}_pad{part}" for side in ("right", "left") for part in (1, 2)]
        hand = self._model.body("ur5e/robotiq/base").geomadr[0]
        return [self._model.geom("object_0").id, int(hand), *(self._model.geom(name).id for name in pads)]

    @cached_property
    def _knuckles(self) -> list[int]:
        return [self._model.body(f"ur5e/robotiq/{side}_driver").id for side in ("right", "left")]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what dm_control reports at its import: which display it found, which is not needed."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _finger(upper: Box, lower: Box) -> Box:
    """Return the box of a pad's two boxes, which touch along their third edge; the second points outwards."""
    middle = (upper.centre + lower.centre) / 2
    return Box(middle + upper.half_edges[1], upper.half_edges * np.array([[1], [2], [2]]))


@lru_cache
def simulator_of_process() -> Simulator:
    """Return the one simulator of this process; it takes seconds to build.

    Raises:
        UserError: its packages are not installed.
    """
    try:
        return Simulator()
    except ImportError as error:
        raise UserError(
            f"Cube needs ogbench, which cannot be imported ({error}): pip install 'worldmodel[cube]'"
        ) from None


# ------------------------------------------------------------------------------------------------ pictures

PX_PER_M = 83.0
TOP_ROWS = 34
"""Rows of the view from above; the others are the view from the front."""
LEFT_M, FAR_M = -SIZE_PX / PX_PER_M / 2, 0.22
"""y of the left edge, and x of the upper edge of the view from above: OGBench's wall."""
TABLE, CUBE_RED, HAND = (20, 28, 41), (245, 66, 84), (64, 74, 90)
FINGERS = (170, 90, 230), (89, 160, 232)  # the right one and the left one
FRONT_SHADE = 0.5
"""The colour behind the view from the front, as a fraction of the table's."""
ROD_M = 0.006  # radius of what joins a finger and the hand


@dataclass(frozen=True)
class View:
    """A part of the picture: an orthographic view of some rows.

    A point p [3] in m is at projection @ p + origin: (x, y) in px of these rows, the centre of the first at (0, 0).
    """

    pixels: Array
    projection: Array
    origin: Array

    def px_of(self, points: Array) -> Array:
        """Return the positions [..., 2] px of points [..., 3] in m."""
        return points @ self.projection.T + self.origin

    def draw(self, bodies: Bodies, background: Array, cube: tuple[int, int, int]) -> Array:
        """Draw bodies, the cube over the fingers over the hand: [rows, 64, 3]."""
        picture = np.tile(background, (*self.pixels.shape[:2], 1))
        self._paint_box(picture, bodies.hand, HAND)
        for finger, knuckle, colour in zip(bodies.fingers, bodies.knuckles, FINGERS, strict=True):
            self._paint_rod(picture, knuckle, finger.centre, colour)
            self._paint_box(picture, finger, colour)
        self._paint_box(picture, bodies.cube, cube)
        return picture

    def _paint_box(self, picture: Array, box: Box, colour: tuple[int, int, int]) -> None:
        centre, half_edges = self.px_of(box.centre), box.half_edges @ self.projection.T
        reach = np.abs(half_edges).sum(axis=0)
        near = self._window(centre - reach, centre + reach)
        picture[near] = paint(picture[near], box_silhouette_distance(self.pixels[near], centre, half_edges), colour)

    def _paint_rod(self, picture: Array, start: Array, end: Array, colour: tuple[int, int, int]) -> None:
        """Paint a rod from start to end, [3] in m."""
        start_px, end_px, radius = self.px_of(start), self.px_of(end), PX_PER_M * ROD_M
        near = self._window(np.minimum(start_px, end_px) - radius, np.maximum(start_px, end_px) + radius)
        picture[near] = paint(picture[near], capsule_distance(self.pixels[near], start_px, end_px, radius), colour)

    def _window(self, low: Array, high: Array) -> tuple[slice, slice]:
        """Return the rows and columns of the pixels that a shape within low..high, [2] px each, can touch."""
        (left, top), (right, bottom) = np.floor(low).astype(int).tolist(), np.ceil(high).astype(int).tolist()
        return slice(max(top, 0), max(bottom + 1, 0)), slice(max(left, 0), max(right + 1, 0))


def _view(rows: int, to_right: Array, down: Array, upper_left: Array) -> View:
    """Return a view: unit vectors [3] that point right and down in it, and the point [3] at its upper left corner."""
    projection = PX_PER_M * np.stack([to_right, down])
    return View(pixel_centres(SIZE_PX)[:rows], projection, -projection @ upper_left - 0.5)


_X, _Y, _Z = np.eye(3)
ABOVE = _view(TOP_ROWS, _Y, _X, FAR_M * _X + LEFT_M * _Y)
FRONT = _view(SIZE_PX - TOP_ROWS, _Y, -_Z, LEFT_M * _Y + (SIZE_PX - TOP_ROWS) / PX_PER_M * _Z)


def draw(
    bodies: Bodies, table: tuple[int, int, int] = TABLE, cube: tuple[int, int, int] = CUBE_RED
) -> NDArray[np.uint8]:
    """Draw bodies as RGB uint8 [64, 64, 3], antialiased: one pixel is 12 mm.

    The upper 34 rows are the table from above, y to the right and x down. The lower 30 rows are seen from the front, y
    to the right and z up from the table at the lower edge. The cube is drawn over the fingers, and these over the hand,
    so that nothing hides the cube. The rest of the arm is not drawn.
    """
    background = np.asarray(table, np.float64)
    views = [ABOVE.draw(bodies, background, cube), FRONT.draw(bodies, FRONT_SHADE * background, cube)]
    return np.rint(np.concatenate(views)).astype(np.uint8)


def cube_px(states: NDArray[Any]) -> Array:
    """Return the position of the cube in the view from above, [..., 2] px, for states [..., K >= 17]."""
    return ABOVE.px_of(np.asarray(states[..., CUBE], np.float64))
