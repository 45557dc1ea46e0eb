"""Two rooms with a door between them: a Gymnasium environment with a known law (two_rooms_law.py).

A dot moves on a canvas of 64x64 px by at most 4 px per step. A vertical wall with a door divides the canvas. The world
follows the Two-Rooms environment of PLDM (Sobal et al., arXiv 2502.14819, section 4) and the Wall environment of
DINO-WM (Zhou et al., arXiv 2411.04983). Sizes, colours and the law of contact are ours. Layouts differ only in
the positions of the wall and its door. The fixed layout has its door above the middle.

Importing this module registers "worldmodel/TwoRooms-v0". gymnasium.make imports it for the id
"data_pipelines.worlds.two_rooms:worldmodel/TwoRooms-v0".
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipelines.errors import UserError
from data_pipelines.worlds.digits import CANVAS_PX
from data_pipelines.worlds.policies import MakePolicy, Policy, smooth_walk
from data_pipelines.worlds.shapes import Colour, check_agent_size, check_render_mode, rgb_of
from data_pipelines.worlds.two_rooms_law import (
    DOOR_HEIGHT_PX,
    DOOR_Y_RANGE_PX,
    DOT_STD_PX,
    FIXED_DOOR_Y_PX,
    FIXED_WALL_X_PX,
    HIGH_PX,
    LOW_PX,
    MAX_STEP_PX,
    PIT_PX,
    UNREACHABLE_PX,
    WALL_WIDTH_PX,
    WALL_X_RANGE_PX,
    clip_to_disc,
    distances_around_the_pit,
    draw,
    grid_points,
    in_pit,
    is_free,
    move,
    out_of_the_wall,
    shortest_path_px,
    step_of_action,
)

ENV_ID = "worldmodel/TwoRooms-v0"

MAX_GOAL_RADIUS_PX = 10.0
"""Smaller than every room, so that every start has a goal that it does not already meet."""

NUM_HEADINGS = 32
"""Headings that `go_around` chooses from."""
SLIPPED_FUTURES = 16
"""Futures of a sequence of actions that the privileged cost averages over, if actions slip."""

Layout = Literal["fixed", "random"]
Array = NDArray[np.float32]


# ------------------------------------------------------------------------------------------------ the environment


class TwoRoomsEnv(gymnasium.Env[NDArray[np.uint8], Array]):
    """Reach a goal: reward 0 and termination within goal_radius_px of it, -1 per step until then.

    The step is an action in [-1, 1]^2, its length clipped to 1, times 4 px. Observations are uint8 [64, 64, 3].
    info: "state" and "goal" (float32 [2] px), "wall_x_px", "door_y_px", "is_success"; after a step also
    "applied_action" (float32 [2]), the executed action with its length clipped.

    layout: "fixed", or "random": the wall's x in 20..43 px and the door anywhere along it, drawn at every reset.
    slip: the probability that an action is replaced by one drawn uniformly from the action space.
    pit: whether there is a pit beside the shortest path, in the fixed layout. A dot that steps into it stays there: the
        episode is lost. Starts and goals are outside of it.
    cross_room: the probability that the goal is in the other room. Starts are uniform over both rooms, goals over their
        room. Goals that the start already meets are drawn again.
    goal_radius_px: the distance at which the goal is reached. Later steps work as before.
    agent_size: the size of the drawn dot, relative to the usual one. The law moves its centre and does not know it.
    background: the colour where neither wall, dot nor pit is drawn; black by default.

    reset(options=...) sets "state", "goal", "wall_x_px" and "door_y_px". The others are drawn.

    Raises:
        UserError: a value is out of range, an option is unknown, a state or a goal lies within a wall or the pit, or a
            pit is asked for in another layout.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    reset_facts = ("wall_x_px", "door_y_px")
    """The numbers of info that fix an episode beside state and goal, and that `reset` takes as options."""
    factors = ("agent_size", "background", "slip")
    """The arguments that are factors of variation (worldmodel.planning.vary)."""

    def __init__(
        self,
        layout: Layout = "fixed",
        slip: float = 0.0,
        pit: bool = False,
        cross_room: float = 0.5,
        goal_radius_px: float = 4.0,
        agent_size: float = 1.0,
        background: Colour = "black",
        render_mode: str | None = None,
    ) -> None:
        if layout not in ("fixed", "random"):
            raise UserError(f"layout={layout!r} is unknown: use fixed or random")
        _check_range("slip", slip, 0, 1)
        _check_range("cross_room", cross_room, 0, 1)
        _check_range("goal_radius_px", goal_radius_px, 0, MAX_GOAL_RADIUS_PX)
        check_agent_size(agent_size)
        check_render_mode(render_mode)
        if pit and layout != "fixed":
            raise UserError(f"pit=true needs layout=fixed, not {layout}")
        self.layout, self.slip, self.pit = layout, slip, pit
        self.cross_room, self.goal_radius_px = cross_room, goal_radius_px
        self.agent_size, self.background = agent_size, background
        self._background_rgb = rgb_of("background", background)
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.Box(0, 255, (CANVAS_PX, CANVAS_PX, 3), np.uint8)
        self.action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        self._wall_x, self._door_y = FIXED_WALL_X_PX, FIXED_DOOR_Y_PX
        self._state = self._goal = torch.full((2,), LOW_PX)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """Draw a layout, start and goal. Return the observation and info."""
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
        """Execute an action [2]. Return observation, reward, terminated, truncated (always False), info."""
        if self.slip and self.np_random.random() < self.slip:
            action = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        applied = clip_to_disc(torch.as_tensor(np.asarray(action, np.float32)))
        self._state = move(self._state, step_of_action(applied), self._wall_x, self._door_y, pit=self.pit)
        info = self._info() | {"applied_action": applied.numpy().copy()}
        return self._picture(self._state), 0.0 if info["is_success"] else -1.0, info["is_success"], False, info

    def render(self) -> NDArray[np.uint8] | None:
        """Return the observation; None without a render mode."""
        return None if self.render_mode is None else self._picture(self._state)

    def goal_frame(self) -> NDArray[np.uint8]:
        """Return the observation with the dot at the goal, uint8 [64, 64, 3]."""
        return self._picture(self._goal)

    def set_state(self, state: Any) -> dict[str, Any]:
        """Put the dot at a state [2] px, and return info."""
        point = self._point({"state": state}, "state")
        self._state = self._state if point is None else point
        return self._info()

    def set_goal(self, state: Any) -> dict[str, Any]:
        """Make a state [2] px the goal, and return info."""
        point = self._point({"goal": state}, "goal")
        self._goal = self._goal if point is None else point
        return self._info()

    def is_lost(self, state: NDArray[Any]) -> bool:
        """Return whether a state [2] px lies in the pit, which nothing leaves."""
        return self.pit and bool(in_pit(torch.as_tensor(state)))

    def shortest_path_px(self) -> float:
        """Return the length of the shortest path from the current state to the goal's radius; NaN with a pit."""
        if self.pit:
            return math.nan
        whole = float(shortest_path_px(self._state, self._goal, self._wall_x, self._door_y))
        return max(0.0, whole - self.goal_radius_px)

    @staticmethod
    def state_px(states: NDArray[Any]) -> NDArray[Any]:
        """Return the position of the dot, [..., 2] px, for states [..., 2]: they are positions."""
        return states

    @staticmethod
    def privileged_cost(envs: "Sequence[TwoRoomsEnv]") -> "PrivilegedCost":
        """Return the cost of action sequences from the current states of environments, by law and shortest paths."""
        return PrivilegedCost(envs)

    def policies(self) -> Mapping[str, MakePolicy]:
        """Return the policies for recording, by name."""
        return {"own": self.exploration_policy}

    def exploration_policy(self, rng: np.random.Generator) -> Policy:
        """Return a policy for one episode: smooth_walk, wander or run_straight, with equal probability.

        With a pit, three of four episodes follow go_around, and the others one of these.
        """
        if self.pit and rng.random() < 0.75:
            return go_around(rng)
        chosen = rng.integers(3)
        if chosen == 0:
            return smooth_walk(self.action_space, rng)
        return wander(rng) if chosen == 1 else run_straight(rng)

    def _place(self, options: Mapping[str, Any], name: str, fixed: float, bounds: tuple[float, float]) -> float:
        drawn = float(self.np_random.uniform(*bounds)) if self.layout == "random" else fixed
        value = options.get(name, drawn)
        _check_range(f"reset option {name}", value, *bounds)
        return float(np.float32(value))  # the precision of the pictures and the law

    def _point(self, options: Mapping[str, Any], name: str) -> Tensor | None:
        value = options.get(name)
        if value is None:
            return None
        try:
            point = torch.tensor(np.asarray(value, np.float32))
        except (ValueError, TypeError):
            point = torch.empty(0)
        if point.shape != (2,) or not is_free(point, self._wall_x, self._door_y, pit=self.pit):
            pit = f" and the pit {PIT_PX}" if self.pit else ""
            raise UserError(
                f"reset option {name}={value!r} must be (x, y) within {LOW_PX:g}..{HIGH_PX:g} px and outside the wall "
                f"at x={self._wall_x:g} px{pit}"
            )
        return point

    def _meets(self, state: Tensor, goal: Tensor) -> bool:
        return bool((state - goal).norm() <= self.goal_radius_px)

    def _room_of(self, point: Tensor) -> int:
        return int(point[0] > self._wall_x)

    def _draw_room(self) -> int:
        """Draw a room in proportion to its area: left 0 or right 1."""
        widths = [high - low for low, high in map(self._room_bounds, (0, 1))]
        return int(self.np_random.random() < widths[1] / sum(widths))

    def _room_bounds(self, room: int) -> tuple[float, float]:
        half = WALL_WIDTH_PX / 2
        return (LOW_PX, self._wall_x - half) if room == 0 else (self._wall_x + half, HIGH_PX)

    def _draw_in(self, room: int) -> Tensor:
        """Draw a point of a room, outside of the pit."""
        while True:
            x, y = self.np_random.uniform(*self._room_bounds(room)), self.np_random.uniform(LOW_PX, HIGH_PX)
            point = torch.tensor([x, y], dtype=torch.float32)
            if not (self.pit and in_pit(point)):
                return point

    def _draw_apart(self, point: Tensor, other_room: bool) -> Tensor:
        """Draw a point in the same room or the other one, outside the goal's radius."""
        room = self._room_of(point) ^ int(other_room)
        while self._meets(drawn := self._draw_in(room), point):
            pass
        return drawn

    def _picture(self, point: Tensor) -> NDArray[np.uint8]:
        pictures = draw(
            point[None],
            self._wall_x,
            self._door_y,
            pit=self.pit,
            dot_std_px=self.agent_size * DOT_STD_PX,
            background=self._background_rgb,
        )
        return pictures[0].numpy()

    def _info(self) -> dict[str, Any]:
        return {
            "state": self._state.numpy().copy(),
            "goal": self._goal.numpy().copy(),
            "wall_x_px": self._wall_x,
            "door_y_px": self._door_y,
            "is_success": self._meets(self._state, self._goal),
        }


class PrivilegedCost:
    """The remaining distance to the goal, summed over steps: actions [E, N, H, 2] in units of 4 px -> cost [E, N] px.

    Distances come from a grid of 1 px, which is computed once per episode. If actions slip, the cost is the mean over
    SLIPPED_FUTURES futures, with the same slips for all candidates of a call.
    """

    def __init__(self, envs: Sequence[TwoRoomsEnv]) -> None:
        self.envs, self.slip, self.pit = list(envs), envs[0].slip, envs[0].pit
        self.generator = torch.Generator().manual_seed(0)
        self.left = torch.stack([_distances(env) for env in self.envs])

    def __call__(self, actions: Tensor) -> Tensor:
        num_futures = SLIPPED_FUTURES if self.slip else 1
        shape = (*actions.shape[:2], num_futures)
        state = torch.stack([env._state for env in self.envs])[:, None, None].expand(*shape, 2)
        wall_x = torch.tensor([env._wall_x for env in self.envs])[:, None, None]
        door_y = torch.tensor([env._door_y for env in self.envs])[:, None, None]
        rows = torch.arange(len(self.envs))[:, None, None]
        cost = torch.zeros(shape)
        for action in actions[:, :, None].expand(*shape, -1, -1).unbind(3):
            step = step_of_action(self._slipped(action))
            state = move(state, step, wall_x, door_y, pit=self.pit)
            x, y = (state - LOW_PX).round().long().unbind(-1)
            left = self.left[rows, y, x]
            cost += torch.where(in_pit(state), UNREACHABLE_PX, left) if self.pit else left
        return cost.mean(dim=2)

    def _slipped(self, action: Tensor) -> Tensor:
        """Replace actions [E, N, S, 2] of some futures by drawn ones."""
        if not self.slip:
            return action
        slips = torch.rand(action.shape[2], 1, generator=self.generator) < self.slip
        drawn = 2 * torch.rand(action.shape[2], 2, generator=self.generator) - 1
        return torch.where(slips, drawn, action)

    def keep(self, is_running: Tensor) -> None:
        """Keep the episodes that continue, bool [E]."""
        self.envs = [env for env, stays in zip(self.envs, is_running.tolist(), strict=True) if stays]
        self.left = self.left[is_running]


def _distances(env: TwoRoomsEnv) -> Tensor:
    """Return the length of the shortest path from each of `grid_points` to the goal, [56, 56] px."""
    if env.pit:
        return distances_around_the_pit(env._goal)
    points = out_of_the_wall(grid_points().float(), env._wall_x, env._door_y)
    return shortest_path_px(points, env._goal, env._wall_x, env._door_y).float()


def _check_range(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not low <= value <= high:
        raise UserError(f"{name}={value!r} must be a number within {low:g}..{high:g}")


def wander(rng: np.random.Generator) -> Policy:
    """Return a policy that heads for one waypoint after another, uniform over both rooms, through the door if needed.

    Steps have random length and deviate from their heading by 0.3 rad (standard deviation).
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


def go_around(rng: np.random.Generator) -> Policy:
    """Return a policy that heads for one waypoint after another around the pit, at a margin of 0 to 8 px.

    Steps are as those of `wander`, so that it falls in now and then.
    """
    angles = np.linspace(0, 2 * math.pi, NUM_HEADINGS, endpoint=False)
    headings = MAX_STEP_PX * torch.tensor(np.stack([np.cos(angles), np.sin(angles)], axis=1), dtype=torch.float32)
    waypoint = left = None
    margin = 0.0

    def act(observation: Any, info: Mapping[str, Any]) -> Array:
        nonlocal waypoint, left, margin
        state = torch.from_numpy(info["state"])
        while waypoint is None or left is None or (waypoint - state).norm() < MAX_STEP_PX:
            waypoint = torch.tensor(rng.uniform(LOW_PX, HIGH_PX, 2), dtype=torch.float32)
            left, margin = distances_around_the_pit(waypoint), rng.uniform(0, 8)
            if left[tuple((state - LOW_PX).round().long().flip(0))] >= UNREACHABLE_PX and not in_pit(state):
                waypoint = None  # it is in the wall or the pit
        reached = move(state, headings, info["wall_x_px"], info["door_y_px"])
        x, y = (reached - LOW_PX).round().long().unbind(-1)
        best = (left[y, x] + UNREACHABLE_PX * in_pit(reached, margin)).argmin()
        ahead = waypoint - state if (waypoint - state).norm() < 2 * MAX_STEP_PX else headings[best]
        return _towards(ahead.double().numpy(), rng)

    return act


def run_straight(rng: np.random.Generator) -> Policy:
    """Return a policy that ignores the wall: it heads for waypoints in the other room, for 4 to 12 steps each.

    Its videos show the effect of pushing against the wall, as a naive plan does. Steps are as those of `wander`.
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
    """Return an action along `ahead`, [2] px, no farther: of random length, with 0.3 rad (std) of error."""
    heading = math.atan2(ahead[1], ahead[0]) + rng.normal(0, 0.3)
    length = min(rng.uniform(0.3, 1), float(np.linalg.norm(ahead)) / MAX_STEP_PX)
    return np.array([length * math.cos(heading), length * math.sin(heading)], np.float32)


if ENV_ID not in gymnasium.registry:
    gymnasium.register(ENV_ID, entry_point=f"{__name__}:TwoRoomsEnv", max_episode_steps=50)
