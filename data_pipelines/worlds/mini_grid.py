"""MiniGrid with dynamic obstacles: a Gymnasium environment with discrete actions, in which balls move at random.

The world is MiniGrid-Dynamic-Obstacles-8x8-v0 (mini_grid_law.py). Different are:

- The goal is a picture of another state. It is reached in the same cell; direction and balls do not count. There is no
  green square, and balls may enter all cells.
- An agent that hits a ball or the wall is lost: it stays where it is, on a yellow floor. MiniGrid ends the episode.
- The whole room is seen, without the highlighted view.

Importing this module registers "worldmodel/MiniGridObstacles-v0". gymnasium.make imports it for the id
"data_pipelines.worlds.mini_grid:worldmodel/MiniGridObstacles-v0".
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipelines.errors import UserError
from data_pipelines.worlds.mini_grid_law import (
    FORWARD,
    LEFT,
    LOST,
    NUM_ACTIONS,
    NUM_BALLS,
    NUM_CELLS,
    PLACE,
    RIGHT,
    STATE,
    TILE_PX,
    draw,
    free_neighbours,
    in_room,
    least_steps,
    move,
    move_balls,
    occupied,
    parts_of,
    state_of,
    turned_and_ahead,
)
from data_pipelines.worlds.policies import MakePolicy, Policy
from data_pipelines.worlds.states import Frame, State, StateEnv

ENV_ID = "worldmodel/MiniGridObstacles-v0"


class MiniGridObstaclesEnv(StateEnv):
    """Move to the cell of the goal: reward 0 and termination when it is reached, -1 per step until then.

    Actions are 0 (turn left), 1 (turn right) and 2 (forward); there is none that waits. Observations are uint8
    [64, 64, 3]. info: "state" and "goal" (float32 [12], see mini_grid_law.STATE) and "is_success".

    Starts and goals are drawn independently: agent and balls are in different cells, uniformly. A goal in the start's
    cell is drawn again.

    strict: an agent that moves forward also hits a ball that moves into the cell ahead in the same step. Otherwise it
        is only blocked, as in MiniGrid, so that a look at the cell ahead is enough.

    reset(options=...) sets "state" and "goal", of 12 numbers. The others are drawn. The future of a state is random:
    the environment's own seed decides.

    Raises:
        UserError: an option is unknown, a value or a state is not valid.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    state_names, num_positions, num_choices = STATE, len(STATE), NUM_ACTIONS

    def __init__(self, render_mode: str | None = None, strict: bool = False) -> None:
        super().__init__(render_mode)
        if not isinstance(strict, bool):
            raise UserError(f"strict={strict!r} must be true or false")
        self.strict = strict

    def picture(self, state: State) -> Frame:
        return draw(state)

    def reaches(self, state: State, goal: State) -> bool:
        return bool((state[PLACE] == goal[PLACE]).all()) and not self.is_lost(state)

    def advance(self, action: int) -> tuple[State, dict[str, Any]]:
        return move(self._state[None], np.array([action]), self.np_random, strict=self.strict)[0], {}

    def draw_state(self) -> State:
        cells = self.np_random.permutation(NUM_CELLS**2)[: 1 + NUM_BALLS]
        places = np.stack([cells % NUM_CELLS, cells // NUM_CELLS], axis=-1) + 1
        return state_of(places[0], self.np_random.integers(4, size=()), np.zeros(()), places[1:])

    @staticmethod
    def is_lost(state: NDArray[Any]) -> bool:
        """Return whether the agent of a state [12] has hit something, after which it does not move."""
        return bool(state[LOST] > 0)

    @staticmethod
    def state_px(states: NDArray[Any]) -> NDArray[Any]:
        """Return the centre of the agent's tile in the frames, [..., 2] px, for states [..., K >= 2]."""
        return states[..., PLACE] * TILE_PX + (TILE_PX - 1) / 2

    def shortest_path_px(self) -> float:
        """Return the length of the shortest path to the goal if no ball is in the way, without turns."""
        return float(np.abs(self._state[PLACE] - self._goal[PLACE]).sum()) * TILE_PX

    @staticmethod
    def privileged_cost(envs: "Sequence[MiniGridObstaclesEnv]") -> "PrivilegedCost":
        """Return the cost of action sequences from the current states of environments, by the law."""
        return PrivilegedCost(envs)

    def policies(self) -> Mapping[str, MakePolicy]:
        """Return the policies for recording, by name, the usual one first."""
        return {
            "expert": partial(expert, strict=self.strict),
            "weak": partial(expert, strict=False, noise=WEAK_NOISE),
        }

    def _checked(self, name: str, value: Any) -> State:
        state = super()._checked(name, value)
        place, _, _, balls = parts_of(state)
        cells = np.concatenate([place[None], balls])
        whole = (state == np.round(state)).all() and 0 <= state[2] <= 3 and state[LOST] in (0, 1)
        if not whole or not in_room(cells).all() or len(np.unique(cells, axis=0)) < len(cells):
            raise UserError(
                f"{name}={value!r} must have agent and balls in different cells (1 to {NUM_CELLS}), a direction of "
                "0 to 3, and lost 0 or 1"
            )
        return state


# ------------------------------------------------------------------------------------------------ the true law

FUTURES = 16
LOST_STEPS = 40
"""Steps that count for a lost agent."""


class PrivilegedCost:
    """The least steps to the goal, summed over the steps of a sequence: actions [E, N, H, 3] -> cost [E, N].

    It is the mean over FUTURES futures of the balls by the law, the same for all candidates of a call. In these, balls
    do not avoid the agent, so that they do not depend on the candidate.
    """

    def __init__(self, envs: Sequence[MiniGridObstaclesEnv]) -> None:
        self.envs, self.strict = list(envs), envs[0].strict
        self.rng = np.random.default_rng(0)

    def __call__(self, actions: Tensor) -> Tensor:
        chosen = actions.argmax(dim=-1).numpy()
        states = np.stack([env._state for env in self.envs])
        goal = np.stack([env._goal[PLACE] for env in self.envs])[:, None, None]
        _, _, _, balls = parts_of(states)
        balls = balls.repeat(FUTURES, axis=0)
        shape = (*chosen.shape[:2], FUTURES)
        place, direction, lost, _ = (
            np.broadcast_to(part[:, None, None], (*shape, *part.shape[1:])) for part in parts_of(states)
        )
        rows, futures = np.arange(len(states))[:, None, None], np.arange(FUTURES)
        cost = np.zeros(shape)
        before = _filled(balls)
        for action in np.moveaxis(chosen, -1, 0):
            balls = move_balls(balls, np.zeros((len(balls), 2), np.int64), self.rng)
            after = _filled(balls)
            turned, ahead = turned_and_ahead(place, direction, action[..., None])
            goes = (action == FORWARD)[..., None]
            column, row = ahead[..., 0], ahead[..., 1]
            hit, blocked = goes & before[rows, futures, row, column], goes & after[rows, futures, row, column]
            stays = lost | blocked
            lost = lost | hit | (blocked if self.strict else False)
            place = np.where(stays[..., None], place, ahead)
            direction = np.where(stays, direction, turned)
            cost += np.where(lost, LOST_STEPS, least_steps(place, direction, goal))
            before = after
        return torch.from_numpy(cost.mean(axis=-1)).float()

    def keep(self, is_running: Tensor) -> None:
        """Keep the episodes that continue, bool [E]."""
        self.envs = [env for env, stays in zip(self.envs, is_running.tolist(), strict=True) if stays]


def _filled(balls: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which cells of the grid with its wall hold something, [E, S, rows, columns], for balls [E * S, N, 2]."""
    filled = np.ones((len(balls), NUM_CELLS + 2, NUM_CELLS + 2), np.bool_)
    filled[:, 1:-1, 1:-1] = False
    filled[np.arange(len(balls))[:, None], balls[..., 1], balls[..., 0]] = True
    return filled.reshape(-1, FUTURES, *filled.shape[1:])


# ------------------------------------------------------------------------------------------------ the expert

EXPERT_NOISE, WEAK_NOISE = 0.05, 0.2
"""Probabilities of a random action."""
RISK_STEPS = 20.0
"""Steps that a certain hit costs in the expert's choice. Waiting costs two, so that risks above 0.1 are avoided."""


def expert(rng: np.random.Generator, *, strict: bool, noise: float = EXPERT_NOISE) -> Policy:
    """Return a policy that moves to info["goal"], and then to one drawn cell after another.

    It takes the action with the fewest steps left, and waits by turns while a ball is ahead; strict: also while one may
    move there with a probability above 0.1. noise: probability of a random action.
    """
    drawn: NDArray[np.int64] | None = None

    def act(observation: Any, info: Mapping[str, Any]) -> np.int64:
        nonlocal drawn
        state = info["state"]
        if info["is_success"] or (drawn is not None and (state[PLACE] == drawn).all()):
            drawn = rng.integers(1, NUM_CELLS + 1, 2)
        goal = info["goal"][PLACE] if drawn is None else drawn
        if rng.random() < noise:
            return np.int64(rng.integers(NUM_ACTIONS))
        return np.int64(_costs(state, goal, strict=strict).argmin())

    return act


def _costs(state: State, goal: NDArray[Any], *, strict: bool) -> NDArray[np.float64]:
    """Return the steps that are left after each action, [3], and what its risk of a hit costs."""
    place, direction, _, balls = parts_of(state)
    actions = np.array([LEFT, RIGHT, FORWARD])
    turned, ahead = turned_and_ahead(np.stack([place] * 3), np.stack([direction] * 3), actions)
    costs = least_steps(ahead, turned, goal).astype(np.float64)
    costs[FORWARD] += RISK_STEPS * hit_probability(place, ahead[FORWARD], balls, strict=strict)
    return costs


def hit_probability(place: NDArray[Any], ahead: NDArray[Any], balls: NDArray[Any], *, strict: bool) -> float:
    """Return the probability that a step from place to the cell ahead [2] hits the wall or one of balls [N, 2].

    strict: that of moving balls is to first order, as if each moved alone.
    """
    if not in_room(ahead) or occupied(ahead, balls):
        return 1.0
    if not strict:
        return 0.0
    missed = 1.0
    for ball, cell in enumerate(balls):
        if np.abs(cell - ahead).max() == 1:
            missed *= 1 - 1 / free_neighbours(balls[None], place[None], ball).sum()
    return 1 - missed


if ENV_ID not in gymnasium.registry:
    gymnasium.register(ENV_ID, entry_point=f"{__name__}:MiniGridObstaclesEnv", max_episode_steps=100)
