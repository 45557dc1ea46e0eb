"""The law of recorded games: futures are played by the simulator, from the frames where contexts end.

A draw costs as much as playing that long. So the positions in drawn futures are kept in files beside the videos: an
evaluation draws the same random numbers each time, and finds them there.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from data_pipelines.errors import UserError, one_line, one_line_logger
from data_pipelines.processes import ending, spawned_pool
from data_pipelines.splits import Split
from data_pipelines.worlds.games import (
    GAMES,
    SIZE_PX,
    Chance,
    Recording,
    Simulator,
    continue_with,
    picture_of,
    position_of,
    replay,
    simulator_of_process,
    version_of,
)
from data_pipelines.worlds.law import ClipFormat, Quantity

DRAWS_NAME = ".law"  # folder of drawn positions, in that of the videos
QUERIES_PER_JOB = 8
MIN_FRAMES_FOR_PROCESSES = 20_000  # fewer frames are played faster than processes start

log = one_line_logger(__name__)

Look = Callable[[Simulator], Any]


@dataclass(frozen=True)
class GameLaw:
    """The law of a recorded game (data_pipelines.worlds.law.Law), for clips of any length and stride.

    What the protocol calls centres is here the chance of each frame, [B, M, H * F * frame_stride, R]: uniform random
    numbers, from which `measure` and `render` play.

    root, split: the folder of the videos, and the split of the clips.
    num_frames, frame_stride: F, and source frames from one frame of a clip to the next.
    channels: of rendered frames, which are all the same gray.
    """

    root: Path
    recording: Recording
    split: Split
    num_frames: int
    frame_stride: int
    channels: int

    max_horizon = None

    @property
    def quantity(self) -> Quantity:
        return GAMES[self.recording.game].quantity

    @property
    def clip_format(self) -> ClipFormat:
        return ClipFormat(self.num_frames, SIZE_PX, whole_videos=False)

    def sample(self, labels: dict[str, Tensor], horizon: int, num_samples: int, generator: torch.Generator) -> Tensor:
        """Draw the chance of futures, [B, num_samples, H * F * frame_stride, R] in [0, 1)."""
        num_steps = horizon * self.num_frames * self.frame_stride
        num_chances = GAMES[self.recording.game].num_chances
        return torch.rand(len(labels["episode"]), num_samples, num_steps, num_chances, generator=generator)

    def truth(self, labels: dict[str, Tensor], horizon: int) -> Tensor:
        """Return the recorded quantity at the ends of segments, [B, H, K] px."""
        return labels["position"].float()[:, 2 * self.num_frames - 1 :: self.num_frames][:, :horizon]

    def measure(self, labels: dict[str, Tensor], centres: Tensor) -> Tensor:
        """Play futures from their chance: the quantity at the ends of segments, [B, M, H, K] px.

        Raises:
            UserError: the simulator is not installed, or it does not repeat the recording.
        """
        queries, chance = self._queries(labels), centres.numpy()
        every = self.num_frames * self.frame_stride
        shape = (*chance.shape[:2], chance.shape[2] // every, len(self.quantity.dimensions))
        path = self.root / DRAWS_NAME / f"{self._name_of(queries, chance, every)}.npz"
        values = _read_draws(path, shape)
        if values is None:
            values = self._play(queries, chance, every, position_of, num_processes=os.cpu_count() or 1)
            _keep_draws(path, values)
        return torch.from_numpy(values)

    def extrapolate(self, labels: dict[str, Tensor], context: Tensor, horizon: int) -> Tensor:
        """Continue the motion of the labels between the last two frames of the context, [B, H, K] px."""
        seen = labels["position"].float()[:, : self.num_frames]
        step = seen[:, -1] - seen[:, -2] if self.num_frames > 1 else torch.zeros_like(seen[:, -1])
        ahead = self.num_frames * torch.arange(1, horizon + 1)
        return seen[:, -1, None] + ahead[:, None] * step[:, None]

    def render(self, labels: dict[str, Tensor], centres: Tensor) -> Tensor:
        """Play futures from their chance: frames float32 [B, M, H * F, C, 64, 64] in [0, 1]."""
        frames = self._play(self._queries(labels), centres.numpy(), self.frame_stride, picture_of, num_processes=1)
        return torch.from_numpy(frames).float().div(255).unsqueeze(3).expand(-1, -1, -1, self.channels, -1, -1)

    def origin(self, labels: dict[str, Tensor]) -> Tensor:
        """Return the quantity in the last context frame, [B, K] px."""
        return labels["position"].float()[:, self.num_frames - 1]

    def positions(self, labels: dict[str, Tensor], values: Tensor) -> Tensor:
        """Return the values themselves: [B, S, H, K] px."""
        return values

    def probe_targets(self, labels: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the targets of probes: the quantity in the last context frame."""
        return {"position": self.origin(labels)}

    def _queries(self, labels: dict[str, Tensor]) -> list["Query"]:
        last = self.num_frames - 1
        columns = labels["episode"], labels["frame"][:, last, 0], labels["position"][:, last]
        return [
            Query(int(episode), int(frame), tuple(place.tolist()))
            for episode, frame, place in zip(*columns, strict=True)
        ]

    def _name_of(self, queries: list["Query"], chance: Chance, every: int) -> str:
        """Return a name for the draws that depends on all that determines them."""
        facts = [vars(self.recording), self.split, every, [[query.episode, query.frame] for query in queries]]
        return hashlib.sha256(json.dumps(facts).encode() + chance.tobytes()).hexdigest()[:32]

    def _play(
        self, queries: list["Query"], chance: Chance, every: int, look: Look, *, num_processes: int
    ) -> NDArray[Any]:
        """Play the futures of all queries, [B, M, N, R] -> [B, M, N / every, ...], in processes if it is much work."""
        simulator_of_process(self.recording.game)  # a missing package is reported once, and not by a process
        jobs = list(_jobs(queries))
        num_frames = chance.size // chance.shape[-1]
        arguments = [
            (self.recording, self.split, [queries[row] for row in job], chance[job], every, look) for job in jobs
        ]
        parts: list[NDArray[Any]] = [np.empty(0)] * len(jobs)
        large = num_frames >= MIN_FRAMES_FOR_PROCESSES
        with tqdm(total=len(queries), desc=f"playing {self.recording.game}", unit="query", disable=not large) as bar:
            if num_processes == 1 or not large:
                for number, job in enumerate(jobs):
                    parts[number] = play_futures(*arguments[number])
                    bar.update(len(job))
            else:
                with ending(spawned_pool(num_processes)) as pool:
                    numbers = {pool.submit(play_futures, *job): number for number, job in enumerate(arguments)}
                    for done in as_completed(numbers):
                        parts[numbers[done]] = done.result()
                        bar.update(len(jobs[numbers[done]]))
        values = np.concatenate(parts)
        return values[np.argsort([row for job in jobs for row in job], kind="stable")]


@dataclass(frozen=True)
class Query:
    """The last frame of a context: its episode, its number, and the recorded position in it."""

    episode: int
    frame: int
    position: tuple[float, ...]


def _jobs(queries: list[Query]) -> Iterator[list[int]]:
    """Yield the rows of queries of one episode, few at a time, in order of their frames."""
    rows = sorted(range(len(queries)), key=lambda row: (queries[row].episode, queries[row].frame))
    for _, group in groupby(rows, key=lambda row: queries[row].episode):
        of_episode = list(group)
        for first in range(0, len(of_episode), QUERIES_PER_JOB):
            yield of_episode[first : first + QUERIES_PER_JOB]


def play_futures(
    recording: Recording, split: Split, queries: list[Query], chance: Chance, every: int, look: Look
) -> NDArray[Any]:
    """Play futures of queries of one episode, sorted by frame: [Q, M, N, R] -> [Q, M, N / every, ...].

    Raises:
        UserError: the episode does not come out as it was recorded.
    """
    simulator = simulator_of_process(recording.game)
    states: dict[int, Any] = {}
    wanted = {query.frame: query.position for query in queries}
    for frame in replay(simulator, recording, split, queries[0].episode):
        if frame in wanted:
            states[frame] = simulator.save()
            if not np.allclose(position_of(simulator), wanted[frame], atol=0.01):
                raise UserError(_differs(recording, split, queries[0].episode, frame))
        if len(states) == len(wanted):
            break
    return np.stack(
        [
            continue_with(simulator, states[query.frame], part, every, look)
            for query, part in zip(queries, chance, strict=True)
        ]
    )


def _differs(recording: Recording, split: Split, episode: int, frame: int) -> str:
    package = GAMES[recording.game].package
    return (
        f"{package} {version_of(recording.game)} does not repeat the recording of {recording.game}: frame {frame} of "
        f"{split} episode {episode} differs. It was recorded with {package} {recording.version}: install that version"
    )


def _read_draws(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
    """Return drawn positions that were kept; None if there are none, or they are damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            values = stored["position"]
    except (OSError, ValueError, KeyError, BadZipFile, EOFError, RuntimeError, zlib.error):
        return None
    return values if values.shape == shape and values.dtype == np.float32 and np.isfinite(values).all() else None


def _keep_draws(path: Path, values: NDArray[np.float32]) -> None:
    """Write drawn positions. The file appears complete or not at all; without permission there is none."""
    aside = path.with_name(f"{path.stem}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(exist_ok=True)
        with open(aside, "wb") as out:
            np.savez_compressed(out, position=values)
        aside.replace(path)
    except OSError as error:
        log.warning("draws of the law are not kept, and will be played again: '%s' %s", path, one_line(error))
