"""Commands: a Gymnasium environment in which a command has two outcomes, whose probabilities depend on the state.

One object of some shape, size and colour lies on a table. A command moves it 6 px to the left, to the right, up or
down; or the object is deflected and moves as far to the right-hand side of that direction. It obeys with the
probability

    p = 0.1 + 0.25 i + 0.3 (x - LOW_PX) / (HIGH_PX - LOW_PX)

where i = 0, 1, 2 counts its size, and x is its place before the command. So the average of the two outcomes never
happens, and a forecast has to know size and place. The task is that of MPI3D with stochastic command execution
("Gaussian Residual Prediction without an EMA Target Network", 2026), in a world whose law is known.

The object keeps its attributes. Of the 72 combinations, 24 are held out with combinations="seen", and are the only ones
with "unseen". Each value of an attribute occurs in both.

Coordinates are (x, y) in px, y down, pixel centres at integers. Importing this module registers
"worldmodel/Commands-v0", and gymnasium.make imports it for "data_pipelines.worlds.commands:worldmodel/Commands-v0".
"""

from itertools import product
from typing import Any, Literal, NamedTuple, get_args

import gymnasium
import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import UserError
from data_pipelines.worlds.shapes import (
    SIZE_PX,
    Array,
    box_distance,
    check_render_mode,
    disc_distance,
    paint,
    pixel_centres,
)
from data_pipelines.worlds.states import Frame

ENV_ID = "worldmodel/Commands-v0"

COMMANDS = ((-1, 0), (1, 0), (0, -1), (0, 1))
"""Directions of the commands: left, right, up, down."""
STEP_PX = 6.0
LOW_PX, HIGH_PX = 9.0, 54.0
"""Range of the object's centre, on both axes. Moves are reflected at its ends."""

SHAPES = ("disc", "square", "diamond", "ring")
RADII_PX = (4.0, 5.5, 7.0)
COLOURS = ((214, 39, 40), (44, 160, 44), (31, 119, 180), (255, 187, 40), (148, 103, 189), (23, 190, 207))
TABLE = (235, 235, 230)

Combinations = Literal["seen", "unseen", "all"]


class Thing(NamedTuple):
    """The attributes of an object: indices into SHAPES, RADII_PX and COLOURS."""

    shape: int
    size: int
    colour: int


ALL_THINGS = tuple(
    Thing(*indices) for indices in product(range(len(SHAPES)), range(len(RADII_PX)), range(len(COLOURS)))
)


def is_seen(thing: Thing) -> bool:
    """Return whether a combination of attributes is one of the 48 for training."""
    return sum(thing) % 3 != 0


def things_of(combinations: Combinations) -> tuple[Thing, ...]:
    """Return the objects of a choice of combinations."""
    wanted = {"seen": (True,), "unseen": (False,), "all": (True, False)}[combinations]
    return tuple(thing for thing in ALL_THINGS if is_seen(thing) in wanted)


# ------------------------------------------------------------------------------------------------ the law


def probability(place: NDArray[Any], size: NDArray[Any] | int) -> Array:
    """Return the probability of obeying, [...], at places [..., 2] px, for sizes [...]."""
    return 0.1 + 0.25 * np.asarray(size, np.float64) + 0.3 * (np.asarray(place)[..., 0] - LOW_PX) / (HIGH_PX - LOW_PX)


def outcomes(place: NDArray[Any], command: NDArray[Any] | int) -> Array:
    """Return the two places that can follow, obeyed and deflected: [..., 2] px, commands [...] -> [..., 2, 2] px."""
    ahead = np.asarray(COMMANDS, np.float64)[command]
    aside = np.stack([-ahead[..., 1], ahead[..., 0]], axis=-1)
    reached = np.asarray(place, np.float64)[..., None, :] + STEP_PX * np.stack([ahead, aside], axis=-2)
    span = HIGH_PX - LOW_PX
    return LOW_PX + span - np.abs((reached - LOW_PX) % (2 * span) - span)


def draw(place: NDArray[Any], thing: Thing) -> Frame:
    """Draw an object at a place [2] px as RGB uint8 [64, 64, 3], antialiased."""
    radius, centre = RADII_PX[thing.size], np.asarray(place, np.float64)
    offset = np.abs(_PIXELS - centre)
    distance = {
        "disc": lambda: disc_distance(_PIXELS, centre, radius),
        "square": lambda: box_distance(_PIXELS, centre - 0.85 * radius, centre + 0.85 * radius),
        "diamond": lambda: (offset.sum(axis=-1) - 1.2 * radius) / np.sqrt(2),
        "ring": lambda: np.abs(disc_distance(_PIXELS, centre, 0.75 * radius)) - 0.25 * radius,
    }[SHAPES[thing.shape]]()
    return np.rint(paint(_EMPTY, distance, COLOURS[thing.colour])).astype(np.uint8)


_PIXELS = pixel_centres(SIZE_PX)
_EMPTY = np.full((SIZE_PX, SIZE_PX, 3), TABLE, np.float64)


# ------------------------------------------------------------------------------------------------ the environment


class CommandsEnv(gymnasium.Env[Frame, np.int64]):
    """An object that obeys commands, or is deflected. There is no reward, and episodes do not end.

    Actions are the numbers of COMMANDS. Observations are uint8 [64, 64, 3]. info: "state", the object's place, float32
    [2] px; after a reset also "shape", "size" and "colour". A reset draws the object and its place uniformly.

    combinations: the objects that are drawn: "seen" (the usual ones), "unseen" or "all".

    Raises:
        UserError: an argument is unknown.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, combinations: Combinations = "seen") -> None:
        check_render_mode(render_mode)
        if combinations not in get_args(Combinations):
            raise UserError(f"combinations={combinations!r} is unknown: use {', '.join(get_args(Combinations))}")
        self.render_mode, self.combinations = render_mode, combinations
        self.observation_space = gymnasium.spaces.Box(0, 255, (SIZE_PX, SIZE_PX, 3), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(len(COMMANDS))
        self._things = things_of(combinations)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Frame, dict[str, Any]]:
        """Draw an object and its place. Return the observation and info."""
        super().reset(seed=seed)
        self._thing = self._things[self.np_random.integers(len(self._things))]
        self._place = self.np_random.uniform(LOW_PX, HIGH_PX, 2).astype(np.float32)
        return draw(self._place, self._thing), self._info() | self._thing._asdict()

    def step(self, action: np.int64) -> tuple[Frame, float, bool, bool, dict[str, Any]]:
        """Execute a command. Return observation, reward (0), terminated and truncated (False) and info."""
        obeys = self.np_random.random() < probability(self._place, self._thing.size)
        self._place = outcomes(self._place, int(action))[0 if obeys else 1].astype(np.float32)
        return draw(self._place, self._thing), 0.0, False, False, self._info()

    def render(self) -> Frame | None:
        """Return the observation; None without a render mode."""
        return None if self.render_mode is None else draw(self._place, self._thing)

    def _info(self) -> dict[str, Any]:
        return {"state": self._place.copy()}


if ENV_ID not in gymnasium.registry:
    gymnasium.register(ENV_ID, entry_point=f"{__name__}:CommandsEnv")
