"""Freeway, Breakout and Pong on the Arcade Learning Environment (Bellemare et al., arXiv 1207.4708; package ale-py).

A frame is four frames of the console, as is usual. In each of them an action is *sticky* (Machado et al., arXiv
1709.06009): with probability 0.25 the last one is executed again. The stickiness is ours, with the same law as that of
the emulator, whose own has no random numbers that could be set. The emulator itself is deterministic.

Positions come from the memory of the console. Its addresses are those of AtariARI (Anand et al., arXiv 1906.08226,
atariari/benchmark/ram_annotations.py): Freeway 14 player_y, 108..117 enemy_car_x; Breakout 99 ball_x, 101 ball_y,
72 player_x; Pong 49 ball_x, 54 ball_y, 51 player_y, 50 enemy_y. The offsets to pixels of the screen were measured, and
tests compare positions with coloured pixels.

Time without a ball is skipped: a lost ball is served at once, and the frame after it shows the new one. A game that
ends starts anew.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ale_py import Action, ALEInterface, LoggerMode, roms
from numpy.typing import NDArray

from data_pipelines.worlds.games import SIZE_PX, Chance, Picture

FRAME_SKIP = 4
STICKINESS = 0.25
MAX_PAUSE = 1_000  # frames of the console in which a ball must be served

Ram = NDArray[np.uint8]


@dataclass(frozen=True)
class Cut:
    """The recorded part of the screen of 210 x 160 px: rows top..bottom and columns left..right, without the last."""

    top: int
    bottom: int
    left: int
    right: int

    def x_px(self, x: float) -> float:
        """Convert a column of the screen to px of the video; pixel centres are whole numbers."""
        return round((x + 0.5 - self.left) * SIZE_PX / (self.right - self.left) - 0.5, 3)

    def y_px(self, y: float) -> float:
        """Convert a row of the screen to px of the video."""
        return round((y + 0.5 - self.top) * SIZE_PX / (self.bottom - self.top) - 0.5, 3)


@dataclass(frozen=True)
class Rules:
    """The rules of one game.

    start: the intention of the player at the start, a number that `decide` interprets.
    decide: (memory, intention, chance) -> the new intention and an action: the policy.
    labels: memory -> labels of the frame.
    in_play: memory -> whether there is a ball. If not, `serve` is pressed until there is.
    """

    cut: Cut
    start: float
    decide: Callable[[Ram, float, float], tuple[float, Action]]
    labels: Callable[[Ram], dict[str, list[float]]]
    in_play: Callable[[Ram], bool]
    serve: Action


# ------------------------------------------------------------------------------------------------------------- freeway

FREEWAY_CUT = Cut(14, 198, 8, 160)
SWITCH = 0.1
"""Probability per frame that a player changes their intention."""


def walk(ram: Ram, intention: float, chance: float) -> tuple[float, Action]:
    """Keep walking. With probability 0.1 draw another direction: up with 0.6, down with 0.25, none with 0.15."""
    if chance < SWITCH:
        intention = chance / SWITCH
    return intention, Action.UP if intention < 0.6 else Action.DOWN if intention < 0.85 else Action.NOOP


def freeway_labels(ram: Ram) -> dict[str, list[float]]:
    """Return the y of the left chicken's middle, and the memory's ten positions of cars, which wrap around."""
    return {"position": [FREEWAY_CUT.y_px(196.5 - int(ram[14]))], "cars": ram[108:118].astype(float).tolist()}


# ------------------------------------------------------------------------------------------------ breakout and pong

BREAKOUT_CUT = Cut(32, 196, 8, 152)
PONG_CUT = Cut(34, 194, 0, 160)
AIM_PX = 10.0
"""Largest distance between the ball and the point of the paddle with which a player tries to meet it."""
REST_PX = 4.0
"""Distance to the aim at which a player rests."""


def follow(error_px: float, forward: Action, backward: Action) -> Action:
    """Return the action that moves a paddle by `error_px`."""
    return Action.NOOP if abs(error_px) < REST_PX else forward if error_px > 0 else backward


def aim(intention: float, chance: float) -> float:
    """Keep aiming at a point of the paddle. With probability 0.1 draw another one, uniform within AIM_PX."""
    return AIM_PX * (2 * chance / SWITCH - 1) if chance < SWITCH else intention


def breakout_screen(ram: Ram) -> tuple[float, float, float]:
    """Return the x and y of the ball's middle and the x of the paddle's, px of the screen."""
    return int(ram[99]) - 48.5, int(ram[101]) + 10.5, int(ram[72]) - 39.5


def play_breakout(ram: Ram, intention: float, chance: float) -> tuple[float, Action]:
    """Follow the ball, with a random aim."""
    intention = aim(intention, chance)
    ball_x, _, paddle_x = breakout_screen(ram)
    return intention, follow(ball_x + intention - paddle_x, Action.RIGHT, Action.LEFT)


def breakout_labels(ram: Ram) -> dict[str, list[float]]:
    """Return the x and y of the ball and the x of the paddle."""
    ball_x, ball_y, paddle_x = breakout_screen(ram)
    return {"position": [BREAKOUT_CUT.x_px(ball_x), BREAKOUT_CUT.y_px(ball_y), BREAKOUT_CUT.x_px(paddle_x)]}


def breakout_in_play(ram: Ram) -> bool:
    """Return whether the ball is in the cut."""
    return 0 < int(ram[101]) < BREAKOUT_CUT.bottom - 12


def pong_screen(ram: Ram) -> tuple[float, float, float, float]:
    """Return the x and y of the ball's middle, the y of the right and that of the left paddle, px of the screen."""
    return int(ram[49]) - 48.5, int(ram[54]) - 12.5, int(ram[51]) - 6.0, int(ram[50]) - 7.5


def play_pong(ram: Ram, intention: float, chance: float) -> tuple[float, Action]:
    """Follow the ball with the right paddle, with a random aim."""
    intention = aim(intention, chance)
    _, ball_y, player_y, _ = pong_screen(ram)
    return intention, follow(ball_y + intention - player_y, Action.LEFT, Action.RIGHT)


def pong_labels(ram: Ram) -> dict[str, list[float]]:
    """Return the x and y of the ball, the y of the player's and that of the opponent's paddle."""
    ball_x, *heights = pong_screen(ram)
    return {"position": [PONG_CUT.x_px(ball_x), *map(PONG_CUT.y_px, heights)]}


RULES: Mapping[str, Rules] = {
    "freeway": Rules(FREEWAY_CUT, 0.0, walk, freeway_labels, lambda ram: True, Action.NOOP),
    "breakout": Rules(BREAKOUT_CUT, 0.0, play_breakout, breakout_labels, breakout_in_play, Action.FIRE),
    "pong": Rules(PONG_CUT, 0.0, play_pong, pong_labels, lambda ram: int(ram[54]) > 0, Action.NOOP),
}


# ------------------------------------------------------------------------------------------------------- the simulator


class Atari:
    """One of these games (data_pipelines.worlds.games.Simulator).

    Chance: one number for the policy, then one for the stickiness of each frame of the console.
    """

    def __init__(self, rom: str, rules: Rules) -> None:
        ALEInterface.setLoggerMode(LoggerMode.Error)
        self.ale = ALEInterface()
        self.ale.setInt("random_seed", 0)
        self.ale.setFloat("repeat_action_probability", 0.0)
        path = roms.get_rom_path(rom)
        assert path is not None, "the package holds the ROMs of all games"
        self.ale.loadROM(path)
        self._rules = rules
        self._start = self.ale.cloneState(), self.ale.getScreenGrayscale()
        self._held, self._intention = Action.NOOP, rules.start
        self._restored: NDArray[np.uint8] | None = None  # the screen, until the console draws one again

    def restart(self) -> None:
        self.restore((*self._start, Action.NOOP, self._rules.start))
        self._serve()

    def step(self, chance: Chance) -> None:
        decision, *stickiness = chance.tolist()
        self._intention, wanted = self._rules.decide(self.ale.getRAM(), self._intention, decision)
        for number in stickiness:
            if number >= STICKINESS:
                self._held = wanted
            self._act(self._held)
        self._begin_if_over()
        self._serve()

    def _serve(self) -> None:
        for _ in range(MAX_PAUSE):
            if self._rules.in_play(self.ale.getRAM()):
                return
            self._act(self._rules.serve)
            self._begin_if_over()
        raise RuntimeError(f"no ball was served in {MAX_PAUSE} frames")

    def _act(self, action: Action) -> None:
        """Hold an action for a frame of the console."""
        self.ale.act(action)
        self._restored = None

    def _begin_if_over(self) -> None:
        if self.ale.game_over():
            emulator, self._restored = self._start
            self.ale.restoreState(emulator)

    def save(self) -> Any:
        return self.ale.cloneState(), self._screen(), self._held, self._intention

    def restore(self, state: Any) -> None:
        emulator, self._restored, self._held, self._intention = state
        self.ale.restoreState(emulator)  # not the screen

    def _screen(self) -> NDArray[np.uint8]:
        return self.ale.getScreenGrayscale() if self._restored is None else self._restored

    def labels(self) -> dict[str, list[float]]:
        return self._rules.labels(self.ale.getRAM())

    def picture(self) -> Picture:
        """Return the cut in gray. Every pixel is the mean over its area of the screen."""
        cut = self._rules.cut
        screen = self._screen()[cut.top : cut.bottom, cut.left : cut.right].astype(np.float64)
        return area_means(area_means(screen, SIZE_PX).T, SIZE_PX).T.round().astype(np.uint8)


def area_means(values: NDArray[np.float64], num_target: int) -> NDArray[np.float64]:
    """Return means over num_target equal parts of the first axis: [N, ...] -> [num_target, ...].

    It is the difference of integrals. A product with a matrix would start threads for every picture.
    """
    edges = np.arange(num_target + 1) * (len(values) / num_target)
    whole = np.minimum(edges.astype(int), len(values) - 1)
    integral = np.concatenate([np.zeros_like(values[:1]), values.cumsum(axis=0)])
    until = integral[whole] + (edges - whole).reshape(-1, *[1] * (values.ndim - 1)) * values[whole]
    return np.diff(until, axis=0) * (num_target / len(values))


def simulator(name: str) -> Atari:
    """Return the simulator of a game."""
    return Atari(name, RULES[name])
