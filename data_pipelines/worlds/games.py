"""Games whose future can be drawn: an episode is a pure function of random numbers, and every frame can be restored.

A simulator advances by one frame per row of R uniform random numbers, the *chance* of that frame. It decides all that
is random: the policy that plays, sticky actions, the other drivers. An episode draws its chance from the numbers (seed,
split, episode) alone. So it can be replayed up to any frame, and continued from there with other chance. Such
continuations are draws of the true law of the future, given the whole state of the simulator. Actions are part of the
chance. They are not among the labels: a model that knows them would be scored against the law of one that does not.

A video has the label episode. Its frames have the labels

    frame      the number of the frame, [1]
    position   the quantity of the game, [K] px of the video; pixel centres are whole numbers

and those that the game adds. Importing this module imports no simulator.

Dimensions: T frames of an episode, R random numbers per frame, Q queries, M draws, N frames of a future, K.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import UserError
from data_pipelines.splits import SPLITS, Split
from data_pipelines.worlds.law import Quantity
from data_pipelines.worlds.written import write_episodes

SIZE_PX = 64
"""Side of the square videos."""
MAX_BURN_IN = 300
"""Frames that are played before an episode begins, at most; their number is drawn uniformly."""
DEFAULT_FRAMES = 250

Picture = NDArray[np.uint8]
Chance = NDArray[np.float32]


class Simulator(Protocol):
    """A game that is being played."""

    def restart(self) -> None:
        """Return to the start, which is always the same."""

    def step(self, chance: Chance) -> None:
        """Advance by one frame: chance [R], uniform in [0, 1)."""

    def save(self) -> Any:
        """Return the whole state."""

    def restore(self, state: Any) -> None:
        """Return to a state of `save`."""

    def labels(self) -> dict[str, list[float]]:
        """Return the labels of the current frame; "position" is the quantity, [K]."""

    def picture(self) -> Picture:
        """Return the current frame, gray [SIZE_PX, SIZE_PX]."""


@dataclass(frozen=True)
class Game:
    """The facts of a game that are known without its simulator.

    package, module: the package that simulates it, and our module with `simulator(name)`.
    quantity: of the label "position". If it has several dimensions, the first two are a place (x, y) on the frames.
    num_chances: R.
    fps: frames per second at the usual speed of the game.
    """

    package: str
    module: str
    quantity: Quantity
    num_chances: int
    fps: int


_ATARI, _HIGHWAY = "data_pipelines.worlds.atari", "data_pipelines.worlds.highway"

GAMES: Mapping[str, Game] = {
    "freeway": Game("ale-py", _ATARI, Quantity("chicken", "px", ("y",)), 5, 15),
    "breakout": Game("ale-py", _ATARI, Quantity("ball and paddle", "px", ("ball x", "ball y", "paddle x")), 5, 15),
    "pong": Game(
        "ale-py", _ATARI, Quantity("ball and paddles", "px", ("ball x", "ball y", "player y", "opponent y")), 5, 15
    ),
    "highway": Game("highway-env", _HIGHWAY, Quantity("cars", "px", ("other x", "other y", "own y")), 7, 10),
}
"""The games by name. To add one: an entry here, and a simulator in a module of its own."""


def make_simulator(name: str) -> Simulator:
    """Start the simulator of a game. Raises UserError: its package is not installed."""
    game = GAMES[name]
    try:
        return import_module(game.module).simulator(name)
    except ImportError as error:
        raise UserError(
            f"{name} needs {game.package}, which cannot be imported ({error}): pip install 'worldmodel[games]'"
        ) from None


@dataclass(frozen=True)
class Recording:
    """The facts of recorded episodes, which are in world.json: the game, T, the seed, and the simulator's version."""

    game: str
    num_frames: int
    seed: int
    version: str

    @classmethod
    def of_world(cls, world: Mapping[str, Any]) -> "Recording":
        """Return the facts in the content of a world.json."""
        return cls(world["world"], world["num_frames"], world["seed"], world["version"])

    def chance_of(self, split: Split, episode: int) -> tuple[int, Chance]:
        """Return the number B of frames before the episode, and the chance of all frames, [B + T - 1, R]."""
        rng = np.random.default_rng([self.seed, SPLITS.index(split), episode])
        burn_in = int(rng.integers(MAX_BURN_IN + 1))
        return burn_in, rng.random((burn_in + self.num_frames - 1, GAMES[self.game].num_chances), dtype=np.float32)


def replay(simulator: Simulator, recording: Recording, split: Split, episode: int) -> Iterator[int]:
    """Play an episode. The simulator is at the frame whose number is yielded."""
    burn_in, chance = recording.chance_of(split, episode)
    simulator.restart()
    for row in chance[:burn_in]:
        simulator.step(row)
    yield 0
    for frame, row in enumerate(chance[burn_in:], start=1):
        simulator.step(row)
        yield frame


def play_episode(
    simulator: Simulator, recording: Recording, split: Split, episode: int
) -> tuple[Picture, dict[str, Any]]:
    """Return the frames of an episode, uint8 [T, SIZE_PX, SIZE_PX], and its row of labels."""
    frames, labels = [], []
    for frame in replay(simulator, recording, split, episode):
        frames.append(simulator.picture())
        labels.append({"frame": [frame], **simulator.labels()})
    return np.stack(frames), {"episode": episode, **{name: [row[name] for row in labels] for name in labels[0]}}


def continue_with(
    simulator: Simulator, state: Any, chance: Chance, every: int, look: Callable[[Simulator], Any]
) -> NDArray[Any]:
    """Return `look` at every `every`-th frame after a state: chance [M, N, R] -> [M, N / every, ...]."""
    seen = []
    for future in chance:
        simulator.restore(state)
        for step, row in enumerate(future, start=1):
            simulator.step(row)
            if step % every == 0:
                seen.append(look(simulator))
    return np.stack(seen).reshape(len(chance), -1, *np.shape(seen[0]))


def position_of(simulator: Simulator) -> NDArray[np.float32]:
    """Return the quantity of the current frame, [K] px."""
    return np.asarray(simulator.labels()["position"], np.float32)


def picture_of(simulator: Simulator) -> Picture:
    """Return the current frame, gray [SIZE_PX, SIZE_PX]."""
    return simulator.picture()


def version_of(name: str) -> str:
    """Return the installed version of the package that simulates a game."""
    return metadata.version(GAMES[name].package)


def write_game(
    out: Path,
    name: str,
    counts: Mapping[Split, int],
    *,
    num_frames: int = DEFAULT_FRAMES,
    seed: int = 0,
    num_processes: int,
    overwrite: bool = False,
) -> None:
    """Record episodes of a game into out/train and so on. An interrupted recording is continued.

    counts: episodes per split.
    num_frames: T, at least 2.

    Raises:
        UserError: as write_episodes; T is too small; the package of the game is not installed.
    """
    if num_frames < 2:
        raise UserError(f"num_frames={num_frames} must be at least 2")
    make_simulator(name)  # a missing package is found before anything is written
    facts = Recording(name, num_frames, seed, version_of(name))
    world = {"world": name, "num_frames": num_frames, "seed": seed, "version": facts.version}
    world["counts"] = {split: counts[split] for split in SPLITS}
    write_episodes(out, world, counts, GameEpisodes(facts), num_processes=num_processes, overwrite=overwrite)


@dataclass(frozen=True)
class GameEpisodes:
    """Episodes of a game (data_pipelines.worlds.written.Episodes)."""

    recording: Recording

    @property
    def fps(self) -> int:
        return GAMES[self.recording.game].fps

    def play(self, split: Split, episode: int) -> tuple[Picture, dict[str, Any]]:
        """Return the frames of an episode and its row of labels."""
        return play_episode(simulator_of_process(self.recording.game), self.recording, split, episode)


_SIMULATORS: dict[str, Simulator] = {}


def simulator_of_process(name: str) -> Simulator:
    """Return the one simulator of a game in this process."""
    if name not in _SIMULATORS:
        _SIMULATORS[name] = make_simulator(name)
    return _SIMULATORS[name]
