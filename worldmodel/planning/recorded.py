"""Starts and goals from recorded episodes: frames of one episode of the test split that lie `offset` frames apart.

DINO-WM (Zhou et al., arXiv 2411.04983) and stable-worldmodel choose goals so. Here episodes are held out, and starts
that meet the goal already are left out and counted, as are starts and goals that the environment calls lost.

Legend: K numbers of a state, A numbers of an action.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np

from data_pipelines.errors import UserError
from data_pipelines.index import VideoIndex
from data_pipelines.splits import Split
from worldmodel.config import VideosConfig
from worldmodel.planning.protocol import PlanningProtocol
from worldmodel.runs.planning_metrics import ProtocolFacts
from worldmodel.runs.trained_run import TrainedRun
from worldmodel.sources.videos import VideosSource

STATE_LABEL = "state"  # of recorded videos: the content of info["state"]
SPLIT: Split = "test"


@dataclass(frozen=True)
class RecordedEpisode:
    """A start and a goal [K], the actions [offset, A] that led from one to the other, and options of the reset."""

    start: np.ndarray
    goal: np.ndarray
    actions: np.ndarray
    options: Mapping[str, Any]

    def begin(self, env: gymnasium.Env, env_seed: int) -> Mapping[str, Any]:
        """Put an environment at the start, with the goal, and return its info."""
        env.reset(seed=env_seed, options=dict(self.options) or None)
        settable: Any = env.unwrapped
        settable.set_state(self.start)
        info: Mapping[str, Any] = settable.set_goal(self.goal)
        return info


@dataclass(frozen=True)
class RecordedStarts:
    """The chosen episodes [seeds][episodes] (worldmodel.planning.protocol.Starts).

    left_out: how many drawn starts, over all seeds, met their goal already, or were lost themselves or their goals.
    """

    offset: int
    episodes: Sequence[Sequence[RecordedEpisode]]
    left_out: int

    def begin(self, env: gymnasium.Env, seed: int, number: int, env_seed: int) -> Mapping[str, Any]:
        return self.episodes[seed][number].begin(env, env_seed)

    @property
    def facts(self) -> ProtocolFacts:
        return ProtocolFacts(protocol="recorded", offset=self.offset, left_out=self.left_out)


def recorded_starts(run: TrainedRun, protocol: PlanningProtocol, offset: int) -> RecordedStarts:
    """Choose the episodes of a protocol from the test split of a run's videos.

    The episodes of a seed are all different pairs of frames, in a random order that (protocol.first_seed, seed)
    determines. The environment's attribute `reset_facts` names the labels of a video that its reset takes as options,
    such as the place of a wall. Its method `is_lost(state)`, if it has one, tells states from which nothing else is
    reached, such as a pit.

    Raises:
        UserError: the run has no videos, or their labels lack the state, an action or a fact; no episode is long
            enough, or too few starts are unsolved; the environment cannot be put at a state.
    """
    env = protocol.make_env()
    if not all(hasattr(env.unwrapped, name) for name in ("set_state", "set_goal")):
        raise UserError(f"the environment {protocol.env} has no set_state() and set_goal(): it cannot start at a frame")
    pairs = _Pairs.of_run(run, offset, getattr(env.unwrapped, "reset_facts", ()))
    is_lost = getattr(env.unwrapped, "is_lost", lambda state: False)
    chosen, left_out = [], 0
    for seed in range(protocol.seeds):
        unsolved: list[RecordedEpisode] = []
        for episode in pairs.shuffled(np.random.default_rng([protocol.first_seed, seed])):
            if is_lost(episode.start) or is_lost(episode.goal) or episode.begin(env, 0)["is_success"]:
                left_out += 1
            else:
                unsolved.append(episode)
            if len(unsolved) == protocol.episodes:
                break
        else:
            raise UserError(
                f"the {SPLIT} split has {len(unsolved)} unsolved pairs of frames that are {offset} apart: record more "
                f"episodes, or lower --episodes={protocol.episodes}"
            )
        chosen.append(unsolved)
    env.close()
    return RecordedStarts(offset, chosen, left_out)


@dataclass(frozen=True)
class _Pairs:
    """All pairs of frames of a split: `firsts` [N] in the labels of frames, and the video `rows` [N] of each."""

    index: VideoIndex
    offset: int
    firsts: np.ndarray
    rows: np.ndarray
    action_label: str
    facts: Sequence[str]

    @classmethod
    def of_run(cls, run: TrainedRun, offset: int, facts: Sequence[str]) -> "_Pairs":
        data = run.config.data
        if not isinstance(run.source, VideosSource) or not isinstance(data, VideosConfig):
            raise UserError(f"the run {run.folder} has data.source={data.source}: recorded episodes need videos")
        index = run.source.index(SPLIT)
        for name in (STATE_LABEL, data.action_label):
            if name not in index.frame_labels:
                raise UserError(f"the {SPLIT} split of {data.place} has no label {name!r} of frames: record it again")
        for name in facts:
            if name not in index.labels:
                raise UserError(f"the {SPLIT} split of {data.place} has no label {name!r} of videos: record it again")
        assert index.frame_label_offsets is not None
        first_rows = index.frame_label_offsets.tolist()
        firsts = [
            np.arange(start, stop - offset) + first
            for (start, stop), first in zip(index.frame_ranges, first_rows, strict=True)
        ]
        if not any(map(len, firsts)):
            longest = max(stop - start for start, stop in index.frame_ranges)
            raise UserError(
                f"--offset={offset}: the longest episode of the {SPLIT} split of {data.place} has {longest} frames"
            )
        rows = np.repeat(np.arange(len(firsts)), [len(part) for part in firsts])
        return cls(index, offset, np.concatenate(firsts), rows, data.action_label, facts)

    def shuffled(self, rng: np.random.Generator) -> Iterator[RecordedEpisode]:
        labels = self.index.frame_labels
        for pair in rng.permutation(len(self.firsts)).tolist():
            first, row = int(self.firsts[pair]), int(self.rows[pair])
            yield RecordedEpisode(
                start=labels[STATE_LABEL][first].numpy(),
                goal=labels[STATE_LABEL][first + self.offset].numpy(),
                actions=labels[self.action_label][first : first + self.offset].numpy(),
                options={name: self.index.labels[name][row].item() for name in self.facts},
            )
