"""Two rooms with a door between them: a Gymnasium environment whose law is known, in pixels and in closed form.

A dot moves on a canvas of 64x64 px by at most 4 px a step; a vertical wall with a door parts the canvas. After the
Two-Rooms environment of PLDM (Sobal et al., arXiv 2502.14819, section 4) and the Wall environment of DINO-WM (Zhou et
al., arXiv 2411.04983); sizes, colours and the law of contact are ours:

- The dot's centre is a point in [4, 59] x [4, 59] px. The wall is 3 px wide and closed but for a door, 10 px high.
- A step is a straight line. Where it first meets a wall it loses the part that goes into the wall, and what is left
  slides along; a second contact ends it. So the dot passes the door where the line of its motion does.
- Only the door and the wall's place tell one layout from another. The fixed one has its door above the middle.

Importing this module registers "worldmodel/TwoRooms-v0"; gymnasium.make("data_pipelines.worlds.two_rooms:worldmodel/
TwoRooms-v0") imports it by itself.

Coordinates are (x, y) in px, x to the right and y down, pixel centres at integers. The dot is green, the wall red.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipelines.errors import UserError
from data_pipelines.worlds.digits import CANVAS_PX
from data_pipelines.worlds.policies import Policy, smooth_walk

ENV_ID = "worldmodel/TwoRooms-v0"

LOW_PX, HIGH_PX = 4.0, 59.0
"""Where the dot's centre may be, on both axes."""
WALL_WIDTH_PX, DOOR_HEIGHT_PX = 3.0, 10.0
MAX_STEP_PX = 4.0
DOT_STD_PX = 1.4

FIXED_WALL_X_PX, FIXED_DOOR_Y_PX = 31.5, 20.0
WALL_X_RANGE_PX = (20.0, 43.0)
DOOR_Y_RANGE_PX = (LOW_PX + DOOR_HEIGHT_PX / 2, HIGH_PX - DOOR_HEIGHT_PX / 2)

MAX_GOAL_RADIUS_PX = 10.0
"""Smaller than every room, so that there is a goal out of reach of every start."""

CONTACT_TOLERANCE_PX = 1e-3  # rounding may leave the dot this far in a wall, which the next contact undoes

Layout = Literal["fixed", "random"]
Array = NDArray[np.float32]


# ------------------------------------------------------------------------------------------------ the law


def step_of_action(action: Tensor) -> Tensor:
    """Actions [..., 2] -> the step that they ask for, [..., 2] px: no longer than 4 px, whatever the action."""
    return MAX_STEP_PX * _within_the_unit_disc(action)


def move(state: Tensor, step: Tensor, wall_x: Tensor | float, door_y: Tensor | float) -> Tensor:
    """Where a step leads: the law of the environment, for any number of dots at once.

    state [..., 2] px in the free area, step [..., 2] px of any length, wall_x and door_y [...] px, all broadcast
    -> [..., 2] px, of the state's type and device. It never crosses a wall.
    """
    reached, rest = _leg(state, step, wall_x, door_y)
    return _leg(reached, rest, wall_x, door_y)[0] if rest.any() else reached


def is_free(state: Tensor, wall_x: Tensor | float, door_y: Tensor | float) -> Tensor:
    """Whether the dot's centre may be there: [..., 2] px -> bool [...]."""
    low, high = _wall_parts(state, wall_x, door_y)
    in_wall = ((state[..., None, :] > low) & (state[..., None, :] < high)).all(dim=-1).any(dim=-1)
    return ((state >= LOW_PX) & (state <= HIGH_PX)).all(dim=-1) & ~in_wall


def shortest_path_px(state: Tensor, goal: Tensor, wall_x: Tensor | float, door_y: Tensor | float) -> Tensor:
    """Length of the shortest way from state to goal, float64 [...] px; all arguments broadcast as in `move`.

    A shortest way among convex obstacles bends at their corners only: the least of all ways over at most two corners of
    the door that cross no wall (visibility graph; Lozano-Pérez & Wesley 1979).
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


def _within_the_unit_disc(action: Tensor) -> Tensor:
    return action / action.norm(dim=-1, keepdim=True).clamp(min=1)


def _leg(state: Tensor, step: Tensor, wall_x: Tensor | float, door_y: Tensor | float) -> tuple[Tensor, Tensor]:
    """Straight to the first contact or the end -> the place [..., 2] and what is left of the step along the wall."""
    state, step, wall_x, door_y = _broadcast(state, step, wall_x, door_y)
    time, axis, face = _first_contact(state, step, wall_x, door_y)
    touches = time < 1
    time = time.clamp(0, 1)[..., None]
    blocked = touches[..., None] & (axis[..., None] == torch.arange(2, device=state.device))
    # The face itself, not a rounded place near it: the next step then slides along it.
    reached = torch.where(blocked, face[..., None], state + time * step).clamp(LOW_PX, HIGH_PX)
    return reached, torch.where(blocked, 0, (1 - time) * step)


def _first_contact(state: Tensor, step: Tensor, wall_x: Tensor, door_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """When a step first meets a wall, as a fraction of the step (> 1: after its end, or never); across which axis; and
    the coordinate of the face that it meets. Each [...].

    Of rays and boxes: the slab method (Kay & Kajiya 1986). Touching without going in is no contact.
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
    """Low and high corners of the wall above and below the door, [..., 2 parts, 2 axes] px."""
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
    """Two of [..., 2] and two of [...] -> of one shape, of the first one's type and device."""
    wall_x, door_y = (torch.as_tensor(value, dtype=first.dtype, device=first.device) for value in (wall_x, door_y))
    shape = torch.broadcast_shapes(first.shape[:-1], second.shape[:-1], wall_x.shape, door_y.shape)
    first, second = first.expand(*shape, 2), second.to(first).expand(*shape, 2)
    return first, second, wall_x.expand(shape), door_y.expand(shape)


# ------------------------------------------------------------------------------------------------ pictures


def draw(states: Tensor, wall_x: Tensor | float, door_y: Tensor | float) -> Tensor:
    """Pictures: states [N, 2], wall_x and door_y [N] px -> RGB uint8 [N, 64, 64, 3], on the states' device.

    The dot is a Gaussian blob (standard deviation 1.4 px) at its place between pixels, in green; the wall covers the
    share of each pixel that it covers, in red.
    """
    states, _, wall_x, door_y = _broadcast(states, states, wall_x, door_y)
    pixel = torch.arange(CANVAS_PX, device=states.device, dtype=states.dtype)
    columns, rows = torch.exp(-0.5 * ((pixel - states[..., None]) / DOT_STD_PX) ** 2).unbind(-2)
    dot = rows[..., :, None] * columns[..., None, :]
    wall = _cover(pixel, wall_x, WALL_WIDTH_PX)[..., None, :] * (1 - _cover(pixel, door_y, DOOR_HEIGHT_PX))[..., None]
    return (torch.stack([wall, dot, torch.zeros_like(dot)], dim=-1) * 255).round().byte()


def _cover(pixel: Tensor, centre: Tensor, width_px: float) -> Tensor:
    """The share of each pixel that an interval covers: pixel [P], centre [N] -> [N, P]."""
    return (width_px / 2 + 0.5 - (pixel - centre[..., None]).abs()).clamp(0, 1)


# ------------------------------------------------------------------------------------------------ the environment


class TwoRoomsEnv(gymnasium.Env[NDArray[np.uint8], Array]):
    """Reach a goal: reward 0 and the end within goal_radius_px of it, -1 a step until then.

    An action in [-1, 1]^2, its length cut to 1, times 4 px is the step. Observations are pictures, uint8 [64, 64, 3].
    info: "state" and "goal" (float32 [2] px), "wall_x_px", "door_y_px", "is_success"; after a step also
    "applied_action" (float32 [2]), the action that was carried out, its length cut.

    layout: "fixed", or "random": the wall's x in 20..43 and the door anywhere along it, drawn at every reset.
    slip: the probability with which an action is replaced by one drawn uniformly from the action space.
    cross_room: the probability that the goal is in the other room. Starts are uniform over both rooms, goals over their
        room; goals that the start already meets are drawn again.
    goal_radius_px: where the goal is reached. Steps after that are as any other.

    reset(options=...) takes "state", "goal", "wall_x_px" and "door_y_px" as they are to be; the rest is drawn.

    Raises UserError: a value out of range, an unknown option, a state or a goal within a wall.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self,
        layout: Layout = "fixed",
        slip: float = 0.0,
        cross_room: float = 0.5,
        goal_radius_px: float = 4.0,
        render_mode: str | None = None,
    ) -> None:
        if layout not in ("fixed", "random"):
            raise UserError(f"layout={layout!r} is unknown: use fixed or random")
        _check_range("slip", slip, 0, 1)
        _check_range("cross_room", cross_room, 0, 1)
        _check_range("goal_radius_px", goal_radius_px, 0, MAX_GOAL_RADIUS_PX)
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise UserError(f"render_mode={render_mode!r} is unknown: use rgb_array, or leave it out")
        self.layout, self.slip, self.cross_room, self.goal_radius_px = layout, slip, cross_room, goal_radius_px
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.Box(0, 255, (CANVAS_PX, CANVAS_PX, 3), np.uint8)
        self.action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        self._wall_x, self._door_y = FIXED_WALL_X_PX, FIXED_DOOR_Y_PX
        self._state = self._goal = torch.full((2,), LOW_PX)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """A new layout, start and goal -> observation, info."""
        super().reset(seed=seed)
        options = options or {}
        if unknown := sorted(options.keys() - {"state", "goal", "wall_x_px", "door_y_px"}):
            raise UserError(f"reset option {unknown[0]!r} is unknown: use state, goal, wall_x_px, door_y_px")
        self._wall_x = self._place(options, "wall_x_px", FIXED_WALL_X_PX, WALL_X_RANGE_PX)
        self._door_y = self._place(options, "door_y_px", FIXED_DOOR_Y_PX, DOOR_Y_RANGE_PX)
        state, goal = (self._point(options, name) for name in ("state", "goal"))
        if state is not None and goal is not None and self._meets(state, goal):
            raise UserError(f"reset option goal={goal.tolist()} is within {self.goal_radius_px:g} px of the state")
        crosses = self.np_random.random() < self.cross_room
        if state is None and goal is None:
            state = self._draw_in(self._draw_room())
        if goal is None:
            assert state is not None
            goal = self._draw_apart(state, crosses)
        elif state is None:
            state = self._draw_apart(goal, crosses)
        assert state is not None
        self._state, self._goal = state, goal
        return self._picture(self._state), self._info()

    def step(self, action: Array) -> tuple[NDArray[np.uint8], float, bool, bool, dict[str, Any]]:
        """An action [2] -> observation, reward, terminated, truncated (never by itself), info."""
        if self.slip and self.np_random.random() < self.slip:
            action = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        applied = _within_the_unit_disc(torch.as_tensor(np.asarray(action, np.float32)))
        self._state = move(self._state, step_of_action(applied), self._wall_x, self._door_y)
        info = self._info() | {"applied_action": applied.numpy().copy()}
        return self._picture(self._state), 0.0 if info["is_success"] else -1.0, info["is_success"], False, info

    def render(self) -> NDArray[np.uint8] | None:
        """The observation."""
        return None if self.render_mode is None else self._picture(self._state)

    def goal_frame(self) -> NDArray[np.uint8]:
        """The observation with the dot at the goal: uint8 [64, 64, 3]."""
        return self._picture(self._goal)

    def shortest_path_px(self) -> float:
        """Length of the shortest way from here to where the goal counts as reached."""
        whole = float(shortest_path_px(self._state, self._goal, self._wall_x, self._door_y))
        return max(0.0, whole - self.goal_radius_px)

    @staticmethod
    def state_px(states: NDArray[Any]) -> NDArray[Any]:
        """Where the dot is in its pictures, [..., 2] px, of states [..., 2]: they are just that."""
        return states

    @staticmethod
    def privileged_cost(envs: "Sequence[TwoRoomsEnv]") -> "PrivilegedCost":
        """What sequences of actions cost from where these environments are, by the law and the shortest ways."""
        return PrivilegedCost(envs)

    def exploration_policy(self, rng: np.random.Generator) -> Policy:
        """A policy for one episode: a smooth random walk, wandering through the door or running into walls, equally
        often."""
        chosen = rng.integers(3)
        if chosen == 0:
            return smooth_walk(self.action_space, rng)
        return wander(rng) if chosen == 1 else run_straight(rng)

    def _place(self, options: Mapping[str, Any], name: str, fixed: float, bounds: tuple[float, float]) -> float:
        drawn = float(self.np_random.uniform(*bounds)) if self.layout == "random" else fixed
        value = options.get(name, drawn)
        _check_range(f"reset option {name}", value, *bounds)
        return float(np.float32(value))  # as the pictures and the law, which compute in float32, have it

    def _point(self, options: Mapping[str, Any], name: str) -> Tensor | None:
        value = options.get(name)
        if value is None:
            return None
        try:
            point = torch.tensor(np.asarray(value, np.float32))
        except (ValueError, TypeError):
            point = torch.empty(0)
        if point.shape != (2,) or not is_free(point, self._wall_x, self._door_y):
            raise UserError(
                f"reset option {name}={value!r} must be (x, y) within {LOW_PX:g}..{HIGH_PX:g} px and outside the wall "
                f"at x={self._wall_x:g} px"
            )
        return point

    def _meets(self, state: Tensor, goal: Tensor) -> bool:
        return bool((state - goal).norm() <= self.goal_radius_px)

    def _room_of(self, point: Tensor) -> int:
        return int(point[0] > self._wall_x)

    def _draw_room(self) -> int:
        """Left 0 or right 1, by their areas."""
        widths = [high - low for low, high in map(self._room_bounds, (0, 1))]
        return int(self.np_random.random() < widths[1] / sum(widths))

    def _room_bounds(self, room: int) -> tuple[float, float]:
        half = WALL_WIDTH_PX / 2
        return (LOW_PX, self._wall_x - half) if room == 0 else (self._wall_x + half, HIGH_PX)

    def _draw_in(self, room: int) -> Tensor:
        x, y = self.np_random.uniform(*self._room_bounds(room)), self.np_random.uniform(LOW_PX, HIGH_PX)
        return torch.tensor([x, y], dtype=torch.float32)

    def _draw_apart(self, point: Tensor, other_room: bool) -> Tensor:
        """In the same room or in the other one, out of the goal's radius."""
        room = self._room_of(point) ^ int(other_room)
        while self._meets(drawn := self._draw_in(room), point):
            pass
        return drawn

    def _picture(self, point: Tensor) -> NDArray[np.uint8]:
        return draw(point[None], self._wall_x, self._door_y)[0].numpy()

    def _info(self) -> dict[str, Any]:
        return {
            "state": self._state.numpy().copy(),
            "goal": self._goal.numpy().copy(),
            "wall_x_px": self._wall_x,
            "door_y_px": self._door_y,
            "is_success": self._meets(self._state, self._goal),
        }


class PrivilegedCost:
    """The distance left to the goal, summed over the steps: actions [E, N, H, 2] in units of 4 px -> cost [E, N] px.

    Distances are looked up in a grid of 1 px, made once for each episode; slips are not foreseen.
    """

    def __init__(self, envs: Sequence[TwoRoomsEnv]) -> None:
        self.envs = list(envs)
        places = torch.arange(LOW_PX, HIGH_PX + 1)
        grid = torch.stack(torch.meshgrid(places, places, indexing="xy"), dim=-1)
        left = []
        for env in self.envs:
            wall_x, door_y = env._wall_x, env._door_y
            distance = shortest_path_px(grid, env._goal, wall_x, door_y).float()
            left.append(torch.where(is_free(grid, wall_x, door_y), distance, distance.new_tensor(2 * CANVAS_PX)))
        self.left = torch.stack(left)

    def __call__(self, actions: Tensor) -> Tensor:
        state = torch.stack([env._state for env in self.envs])[:, None].expand(*actions.shape[:2], 2)
        wall_x = torch.tensor([env._wall_x for env in self.envs])[:, None]
        door_y = torch.tensor([env._door_y for env in self.envs])[:, None]
        rows = torch.arange(len(self.envs))[:, None]
        cost = torch.zeros(actions.shape[:2])
        for action in actions.unbind(2):
            state = move(state, step_of_action(action), wall_x, door_y)
            x, y = (state - LOW_PX).round().long().unbind(-1)
            cost += self.left[rows, y, x]
        return cost

    def keep(self, going_on: Tensor) -> None:
        """Drop the episodes that have ended: bool [E]."""
        self.envs = [env for env, stays in zip(self.envs, going_on.tolist(), strict=True) if stays]
        self.left = self.left[going_on]


def _check_range(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not low <= value <= high:
        raise UserError(f"{name}={value!r} must be a number within {low:g}..{high:g}")


def wander(rng: np.random.Generator) -> Policy:
    """Heads for one waypoint after another, uniform over both rooms, through the door where that is in between.

    Steps are of random length and miss their heading by 0.3 rad (standard deviation).
    """
    waypoint: NDArray[np.float64] | None = None
    side = 0.0

    def act(observation: Any, info: Mapping[str, Any]) -> Array:
        nonlocal waypoint, side
        state, wall_x, door_y = info["state"].astype(np.float64), info["wall_x_px"], info["door_y_px"]
        while waypoint is None or np.linalg.norm(waypoint - state) < MAX_STEP_PX:
            waypoint = rng.uniform(LOW_PX, HIGH_PX, 2)
            if abs(waypoint[0] - wall_x) <= WALL_WIDTH_PX / 2:
                waypoint = None
                continue
            side = float(np.sign(waypoint[0] - wall_x))
        ahead = waypoint - state
        if side * (state[0] - wall_x) < WALL_WIDTH_PX / 2:  # not yet in the waypoint's room
            beyond = np.array([wall_x + side * (WALL_WIDTH_PX / 2 + 1), door_y])
            before = np.array([wall_x - side * (WALL_WIDTH_PX / 2 + 1), door_y])
            at_the_door = abs(state[1] - door_y) < DOOR_HEIGHT_PX / 2 - 1
            ahead = (beyond if at_the_door else before) - state
        return _towards(ahead, rng)

    return act


def run_straight(rng: np.random.Generator) -> Policy:
    """Heads for waypoints in the other room as if there were no wall, for 4 to 12 steps each: what a wall does is seen
    where the dot pushes against it, as a plan that knows no better would.

    Steps are as those of `wander`.
    """
    waypoint = np.zeros(2)
    steps_left = 0

    def act(observation: Any, info: Mapping[str, Any]) -> Array:
        nonlocal waypoint, steps_left
        state, wall_x = info["state"].astype(np.float64), info["wall_x_px"]
        while steps_left == 0 or np.linalg.norm(waypoint - state) < MAX_STEP_PX:
            beyond = (wall_x, HIGH_PX) if state[0] < wall_x else (LOW_PX, wall_x)
            waypoint = np.array([rng.uniform(*beyond), rng.uniform(LOW_PX, HIGH_PX)])
            steps_left = int(rng.integers(4, 13))
        steps_left -= 1
        return _towards(waypoint - state, rng)

    return act


def _towards(ahead: NDArray[np.float64], rng: np.random.Generator) -> Array:
    """A step along `ahead`, [2] px, no farther: of random length, 0.3 rad (standard deviation) off."""
    heading = math.atan2(ahead[1], ahead[0]) + rng.normal(0, 0.3)
    length = min(rng.uniform(0.3, 1), float(np.linalg.norm(ahead)) / MAX_STEP_PX)
    return np.array([length * math.cos(heading), length * math.sin(heading)], np.float32)


if ENV_ID not in gymnasium.registry:
    gymnasium.register(ENV_ID, entry_point=f"{__name__}:TwoRoomsEnv", max_episode_steps=50)
