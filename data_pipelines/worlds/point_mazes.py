"""OGBench's point mazes: a Gymnasium environment in which walls bend the shortest path, and chance may decide.

A point moves in a maze of cells by at most 0.2 units per axis and step; a cell is 4 units wide. In the maze `teleport`,
two teleporters send the point to one of three exits at random. One of the exits is walled in. Mazes, physics
(MuJoCo) and the goal's radius are those of OGBench (Park et al., arXiv 2410.20092, `pointmaze-*-v0`). Different are:

- The frame is drawn from the state by numpy. MuJoCo's software renderer draws about 7 frames per second.
- The next state depends on the state, the action and the environment's own generator alone. OGBench keeps the solver's
  last forces, which changes a state by less than 1e-5 units, and draws exits from numpy's global generator.
- States are rounded to float32, so that recorded labels are exact. Actions are clipped to [-1, 1].
- Starts and goals are drawn in all cells, as in OGBench's data, not from five fixed pairs.

Coordinates are OGBench's (x, y) units, x along the columns of a maze and y down its rows. Importing this module
registers "worldmodel/PointMaze-v0". MuJoCo and OGBench (extra `mazes`) are imported when an environment is made.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import gymnasium
import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import UserError
from data_pipelines.worlds.policies import MakePolicy, Policy, smooth_walk
from data_pipelines.worlds.shapes import Colour, check_agent_size, check_render_mode, rgb_of

ENV_ID = "worldmodel/PointMaze-v0"

MazeName = Literal["medium", "large", "teleport"]
Cell = tuple[int, int]
Floats = NDArray[np.float64]
Array = NDArray[np.float32]

UNITS_PER_CELL = 4.0
START_NOISE = 1.0
"""Starts and goals deviate from the centre of their cell by up to this many units per axis, as in OGBench."""
DOT_STD = 1.4 / 64
"""Standard deviation of the dot, as a fraction of the frame's side."""


# ------------------------------------------------------------------------------------------------ the maze


@dataclass(frozen=True)
class Maze:
    """The cells of a maze, and its teleporters.

    free: bool [rows, columns]. entrances [N, 2] and exits [M, 2] in units; a point within entrance_radius of an
    entrance is sent to an exit. goal_radius: the distance in units at which a goal is reached.
    """

    free: NDArray[np.bool_]
    entrances: Floats
    exits: Floats
    entrance_radius: float
    goal_radius: float

    @property
    def cells(self) -> list[Cell]:
        """The free cells, row by row."""
        return [(int(row), int(column)) for row, column in np.argwhere(self.free)]

    @property
    def open_cells(self) -> list[Cell]:
        """The free cells in which starts and goals are drawn: no entrances, and nothing that is walled in."""
        entrances = {cell_of(place) for place in self.entrances}
        return [cell for cell in self.cells if cell not in self.walled_in and cell not in entrances]

    @cached_property
    def walled_in(self) -> frozenset[Cell]:
        """The free cells that have no way to most of the others."""
        largest = max((self.steps_to(cell) for cell in self.cells), key=lambda steps: int((steps >= 0).sum()))
        return frozenset(cell for cell in self.cells if largest[cell] < 0)

    def contains(self, point: Array) -> bool:
        """Return whether a point [2] lies in a free cell."""
        row, column = cell_of(point)
        return 0 <= row < self.free.shape[0] and 0 <= column < self.free.shape[1] and bool(self.free[row, column])

    def steps_to(self, goal: Cell, closed: frozenset[Cell] = frozenset()) -> NDArray[np.int64]:
        """Return the number of moves from each cell to the goal, -1 if there is no way: int [rows, columns].

        A move leads to one of four neighbours. No way leads through `closed` cells. (Breadth-first search.)
        """
        steps = np.full(self.free.shape, -1)
        steps[goal] = 0
        queue = deque([goal])
        while queue:
            cell = queue.popleft()
            for neighbour in neighbours_of(cell):
                if self.free[neighbour] and steps[neighbour] < 0 and neighbour not in closed:
                    steps[neighbour] = steps[cell] + 1
                    queue.append(neighbour)
        return steps


def neighbours_of(cell: Cell) -> list[Cell]:
    """Return the four neighbours of a cell. Free cells have four, as the border of a maze is wall."""
    row, column = cell
    return [(row - 1, column), (row, column - 1), (row + 1, column), (row, column + 1)]


def cell_of(point: NDArray[Any]) -> Cell:
    """Return the (row, column) of the cell that holds a point [2]."""
    column, row = np.floor(np.asarray(point, np.float64) / UNITS_PER_CELL + 1.5).astype(int).tolist()
    return row, column


def centre_of(cell: Cell) -> Floats:
    """Return the centre of a cell, [2] units."""
    row, column = cell
    return np.array([column - 1.0, row - 1.0]) * UNITS_PER_CELL


def way_between(maze: Maze, state: NDArray[Any], goal: NDArray[Any]) -> Floats:
    """Return the points [N, 2] of a short way: from state to goal over the centres of the cells between them."""
    steps, cell = maze.steps_to(cell_of(goal)), cell_of(state)
    between = []
    while steps[cell] > 1:
        cell = _next_cell(steps, cell)
        between.append(centre_of(cell))
    return np.stack([np.asarray(state, np.float64), *between, np.asarray(goal, np.float64)])


def _next_cell(steps: NDArray[np.int64], cell: Cell) -> Cell:
    return next(neighbour for neighbour in neighbours_of(cell) if steps[neighbour] == steps[cell] - 1)


# ------------------------------------------------------------------------------------------------ the physics


class Simulator:
    """OGBench's maze as a function from a state and an action to the next state, without teleporters."""

    def __init__(self, name: MazeName) -> None:
        import mujoco
        from ogbench.locomaze.maze import make_maze_env

        env = make_maze_env("point", "maze", maze_type=name, terminate_at_goal=False)
        Path(env.fullpath).unlink(missing_ok=True)  # the description of the maze, a temporary file
        teleporters, env._teleport_info = env._teleport_info or {}, None
        self.maze = Maze(
            free=env.maze_map == 0,
            entrances=np.array(teleporters.get("teleport_in_xys", []), np.float64).reshape(-1, 2),
            exits=np.array(teleporters.get("teleport_out_xys", []), np.float64).reshape(-1, 2),
            entrance_radius=1.5 * teleporters.get("teleport_radius", 0.0),
            goal_radius=env._goal_tol,
        )
        self._env, self._forget = env, lambda: mujoco.mj_resetData(env.model, env.data)

    def step(self, state: Array, action: Array) -> Array:
        """Return the state [2] after an action [2] in [-1, 1]^2, float32."""
        self._forget()  # the forces of the last contacts
        self._env.data.qpos[:] = state
        self._env.step(action.astype(np.float64))
        return self._env.get_xy().astype(np.float32)


@lru_cache
def simulator_of_process(name: MazeName) -> Simulator:
    """Return the one simulator of a maze in this process. Raises UserError: its packages are not installed."""
    try:
        return Simulator(name)
    except ImportError as error:
        raise UserError(
            f"point mazes need ogbench, which cannot be imported ({error}): pip install 'worldmodel[mazes]'"
        ) from None


# ------------------------------------------------------------------------------------------------ pictures


@dataclass(frozen=True)
class Canvas:
    """A maze on a square frame: walls red, entrances blue, exits in a darker blue, the point green.

    The red value of a pixel is the fraction of it that walls cover. The maze is centred; beyond it there is wall.
    agent_size: that of the drawn point, relative to the usual one. floor: the colour where there is nothing else.
    """

    maze: Maze
    size_px: int
    agent_size: float = 1.0
    floor: tuple[int, int, int] = (0, 0, 0)

    @property
    def cell_px(self) -> float:
        return self.size_px / max(self.maze.free.shape)

    def px_of(self, points: NDArray[Any]) -> NDArray[Any]:
        """Return the positions (x, y) in px, pixel centres at integers, of points [..., 2] in units."""
        rows, columns = self.maze.free.shape
        margin_px = (self.size_px - self.cell_px * np.array([columns, rows])) / 2
        return (np.asarray(points, np.float64) / UNITS_PER_CELL + 1.5) * self.cell_px + margin_px - 0.5

    def background(self) -> NDArray[np.uint8]:
        """Draw the maze without the point and the floor, RGB uint8 [H, W, 3]."""
        pixels, sides = np.arange(self.size_px), []
        for count in self.maze.free.shape:
            first_px = (self.size_px - self.cell_px * count) / 2 + self.cell_px * np.arange(count)
            low, high = np.maximum(pixels[:, None], first_px), np.minimum(pixels[:, None] + 1, first_px + self.cell_px)
            sides.append(np.maximum(high - low, 0))  # the share of each pixel that each cell covers
        picture = np.zeros((self.size_px, self.size_px, 3))
        picture[..., 0] = 1 - sides[0] @ self.maze.free @ sides[1].T
        for place in self.maze.exits:
            picture[..., 2] = np.maximum(picture[..., 2], 0.5 * self._disc(place, self.maze.entrance_radius))
        for place in self.maze.entrances:
            picture[..., 2] = np.maximum(picture[..., 2], self._disc(place, self.maze.entrance_radius))
        return (picture.clip(0, 1) * 255).round().astype(np.uint8)

    def draw(self, background: NDArray[np.uint8], point: Array) -> NDArray[np.uint8]:
        """Draw the point [2] as a Gaussian blob at sub-pixel position, and the floor."""
        picture = background.copy()
        std = self.agent_size * DOT_STD * self.size_px
        across, down = np.exp(-0.5 * ((np.arange(self.size_px) - self.px_of(point)[:, None]) / std) ** 2)
        picture[..., 1] = (255 * down[:, None] * across).round()
        if any(self.floor):
            uncovered = (1 - picture / 255).prod(axis=-1, keepdims=True)
            picture = (picture + uncovered * self.floor).round().astype(np.uint8)
        return picture

    def _disc(self, place: Floats, radius: float) -> Floats:
        x, y = self.px_of(place)
        away_px = np.hypot(*np.meshgrid(np.arange(self.size_px) - x, np.arange(self.size_px) - y))
        return np.clip(radius * self.cell_px / UNITS_PER_CELL + 0.5 - away_px, 0, 1)


# ------------------------------------------------------------------------------------------------ the environment


class PointMazeEnv(gymnasium.Env[NDArray[np.uint8], Array]):
    """Reach a goal: reward 0 and termination within 1 unit of it, -1 per step until then.

    An action in [-1, 1]^2 moves the point by 0.2 units per axis. Observations are uint8 [size_px, size_px, 3].
    info: "state" and "goal" (float32 [2] in units), "is_success".

    maze: "medium", "large" or "teleport".
    size_px: side of the frames.
    agent_size: the size of the drawn point, relative to the usual one. Physics does not know it.
    background: the colour of the floor.

    reset(options=...) sets "state" and "goal". Otherwise they are drawn in all free cells except entrances and what is
    walled in. In the maze `teleport` a goal may be reachable by chance only.

    Raises:
        UserError: a value is out of range, an option is unknown, a state or goal is not in a free cell, or OGBench
            cannot be imported.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    factors = ("agent_size", "background")
    """The arguments that are factors of variation (worldmodel.planning.vary)."""

    def __init__(
        self,
        maze: MazeName = "medium",
        size_px: int = 64,
        agent_size: float = 1.0,
        background: Colour = "black",
        render_mode: str | None = None,
    ) -> None:
        if maze not in get_args(MazeName):
            raise UserError(f"maze={maze!r} is unknown: use {', '.join(get_args(MazeName))}")
        if isinstance(size_px, bool) or not isinstance(size_px, int) or not 16 <= size_px <= 1024:
            raise UserError(f"size_px={size_px!r} must be an integer within 16..1024")
        check_agent_size(agent_size)
        check_render_mode(render_mode)
        self._simulator = simulator_of_process(maze)
        self.maze, self.render_mode = self._simulator.maze, render_mode
        self.agent_size, self.background = agent_size, background
        self._canvas = Canvas(self.maze, size_px, agent_size, rgb_of("background", background))
        self._background = self._canvas.background()
        self._open_cells = self.maze.open_cells
        self.observation_space = gymnasium.spaces.Box(0, 255, (size_px, size_px, 3), np.uint8)
        self.action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        self._state = self._goal = centre_of(self._open_cells[0]).astype(np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """Draw a start and a goal that it does not meet. Return the observation and info."""
        super().reset(seed=seed)
        options = options or {}
        if unknown := sorted(options.keys() - {"state", "goal"}):
            raise UserError(f"reset option {unknown[0]!r} is unknown: use state, goal")
        given = {name: self._point(f"reset option {name}", value) for name, value in options.items()}
        state, goal = given.get("state"), given.get("goal")
        if state is not None and goal is not None and self._meets(state, goal):
            raise UserError(f"reset option goal={goal.tolist()} is within {self.maze.goal_radius:g} units of the state")
        if state is None:
            state = self._draw(apart_from=goal)
        self._state, self._goal = state, (self._draw(apart_from=state) if goal is None else goal)
        return self._picture(self._state), self._info()

    def step(self, action: Array) -> tuple[NDArray[np.uint8], float, bool, bool, dict[str, Any]]:
        """Execute an action [2]. Return observation, reward, terminated, truncated (always False), info."""
        clipped = np.clip(np.asarray(action, np.float32), -1, 1)
        self._state = self._simulator.step(self._state, clipped)
        if (np.linalg.norm(self.maze.entrances - self._state, axis=1) <= self.maze.entrance_radius).any():
            self._state = self.maze.exits[self.np_random.integers(len(self.maze.exits))].astype(np.float32)
        info = self._info()
        return self._picture(self._state), 0.0 if info["is_success"] else -1.0, info["is_success"], False, info

    def set_state(self, state: Any) -> dict[str, Any]:
        """Put the point at a state [2] in units, and return info."""
        self._state = self._point("state", state)
        return self._info()

    def set_goal(self, state: Any) -> dict[str, Any]:
        """Make a state [2] in units the goal, and return info."""
        self._goal = self._point("goal", state)
        return self._info()

    def render(self) -> NDArray[np.uint8] | None:
        """Return the observation; None without a render mode."""
        return None if self.render_mode is None else self._picture(self._state)

    def goal_frame(self) -> NDArray[np.uint8]:
        """Return the observation with the point at the goal, uint8 [size_px, size_px, 3]."""
        return self._picture(self._goal)

    def is_lost(self, state: NDArray[Any]) -> bool:
        """Return whether a state [2] in units is walled in."""
        return cell_of(state) in self.maze.walled_in

    def state_px(self, states: NDArray[Any]) -> NDArray[Any]:
        """Return the position of the point, [..., 2] px, for states [..., 2]."""
        return self._canvas.px_of(states)

    def shortest_path_px(self) -> float:
        """Return the length of a way to the goal's radius over the centres of cells; NaN with teleporters.

        It is an upper bound: the shortest way cuts corners.
        """
        if len(self.maze.entrances):
            return float("nan")
        way_px = self.state_px(way_between(self.maze, self._state, self._goal))
        radius_px = self.maze.goal_radius * self._canvas.cell_px / UNITS_PER_CELL
        return max(0.0, float(np.linalg.norm(np.diff(way_px, axis=0), axis=1).sum()) - radius_px)

    def policies(self) -> Mapping[str, MakePolicy]:
        """Return the policies for recording, by name."""
        return {"own": self.exploration_policy}

    def exploration_policy(self, rng: np.random.Generator) -> Policy:
        """Return a policy for one episode: `tour` of this maze."""
        return tour(self.maze, self.action_space, rng)

    def _point(self, name: str, value: Any) -> Array:
        try:
            point = np.array(value, np.float32)
        except (ValueError, TypeError):
            point = np.empty(0, np.float32)
        if point.shape != (2,) or not np.isfinite(point).all() or not self.maze.contains(point):
            raise UserError(f"{name}={value!r} must be (x, y) in units, in a free cell of the maze")
        return point

    def _meets(self, state: Array, goal: Array) -> bool:
        return bool(np.linalg.norm(state - goal) <= self.maze.goal_radius)

    def _draw(self, apart_from: Array | None) -> Array:
        """Draw a point near the centre of an open cell, which does not meet another point."""
        while True:
            centre = centre_of(self._open_cells[self.np_random.integers(len(self._open_cells))])
            point = (centre + self.np_random.uniform(-START_NOISE, START_NOISE, 2)).astype(np.float32)
            if apart_from is None or not self._meets(point, apart_from):
                return point

    def _picture(self, point: Array) -> NDArray[np.uint8]:
        return self._canvas.draw(self._background, point)

    def _info(self) -> dict[str, Any]:
        return {
            "state": self._state.copy(),
            "goal": self._goal.copy(),
            "is_success": self._meets(self._state, self._goal),
        }


# ------------------------------------------------------------------------------------------------ exploration

WALK_SHARE, WALK_STEPS = 0.25, 30
"""The share of legs that are a smooth walk, and its number of steps."""
ENTRANCE_SHARE = 0.3
"""The share of the other legs that lead to a teleporter, if there are any."""
ACTION_NOISE = 0.4


def tour(maze: Maze, space: gymnasium.Space, rng: np.random.Generator) -> Policy:
    """Return a policy that walks to one random free cell after another, around walls, and often to a teleporter.

    It heads for the centre of the next cell on the way, with normal noise (standard deviation 0.4) on both axes. A
    quarter of its legs are 30 steps of `smooth_walk`, and so are legs to cells that cannot be reached on foot.
    """
    walk, cells = smooth_walk(space, rng), maze.cells
    entrances = [cell_of(place) for place in maze.entrances]
    walk_left = 0
    steps: NDArray[np.int64] | None = None
    goal = np.zeros(2)
    last: Floats | None = None

    def start_leg() -> None:
        nonlocal walk_left, steps, goal
        steps, walk_left = None, WALK_STEPS
        if rng.random() >= WALK_SHARE:
            among = entrances if entrances and rng.random() < ENTRANCE_SHARE else cells
            cell = among[rng.integers(len(among))]
            goal = centre_of(cell) + rng.uniform(-START_NOISE, START_NOISE, 2)
            steps, walk_left = maze.steps_to(cell, closed=frozenset(entrances)), 0

    def act(observation: Any, info: Mapping[str, Any]) -> Array:
        nonlocal walk_left, steps, last
        state = info["state"].astype(np.float64)
        was_sent = last is not None and np.linalg.norm(state - last) > UNITS_PER_CELL / 2  # by a teleporter
        arrives = not walk_left and (steps is None or np.linalg.norm(goal - state) < maze.goal_radius)
        if was_sent or arrives:
            start_leg()
        last, cell = state, cell_of(state)
        if steps is not None and steps[cell] < 0:
            steps, walk_left = None, WALK_STEPS
        if steps is None:
            walk_left -= 1
            return walk(observation, info)
        ahead = (goal if steps[cell] == 0 else centre_of(_next_cell(steps, cell))) - state
        heading = ahead / max(float(np.linalg.norm(ahead)), 1e-9)
        return np.clip(heading + rng.normal(0, ACTION_NOISE, 2), -1, 1).astype(np.float32)

    return act


if ENV_ID not in gymnasium.registry:
    gymnasium.register(ENV_ID, entry_point=f"{__name__}:PointMazeEnv", max_episode_steps=1000)
