"""A few planned episodes for the report: frames, the path of the agent, and the imagined path of each plan.

Legend: E episodes, T decisions, M imagined futures, D embedding dimensions, K numbers of a state, C channels, H = W
pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from torch import Tensor

from data_pipelines.errors import UserError, one_line_logger
from worldmodel.evaluation.embed import embed_split, frozen
from worldmodel.evaluation.quantity import FrameLabel, fitted_readout
from worldmodel.evaluation.readout import Readout
from worldmodel.evaluation.records import Axes
from worldmodel.planning.imagination import LatentPolicy
from worldmodel.planning.protocol import EpisodeResults
from worldmodel.planning.recorded import STATE_LABEL
from worldmodel.runs.trained_run import TrainedRun

logger = one_line_logger(__name__)

NUM_SHOWN = 4

StatePx = Callable[[np.ndarray], np.ndarray]
"""An environment's state_px: states [..., K] -> positions in px of its frames [..., 2]."""


@dataclass(frozen=True)
class PlannedEpisode:
    """An episode of planning; `number` counts within its seed, from 0.

    frames uint8 [T + 1, C, H, W] were seen before each of T steps and after the last one. goal uint8 [C, H, W] is the
    goal image. Positions (x, y) are in pixels of the frames, pixel centres at integers; they are None if states are not
    positions. way_px [T + 1, 2] is the path of the agent, goal_px [2] the goal. imagined_px [T, M, horizon, 2] are the
    imagined paths of the plan that each step is part of.
    """

    number: int
    success: bool
    frames: Annotated[np.ndarray, Axes("u", "moment channel height width")]
    goal: Annotated[np.ndarray, Axes("u", "channel height width")]
    way_px: Annotated[np.ndarray, Axes("f", "moment 2")] | None
    goal_px: Annotated[np.ndarray, Axes("f", "2")] | None
    imagined_px: Annotated[np.ndarray, Axes("f", "decision future horizon 2")] | None

    def __post_init__(self) -> None:
        """Raise ValueError for imagined paths of other decisions, as in a damaged file."""
        if self.imagined_px is not None and len(self.imagined_px) != len(self.frames) - 1:
            raise ValueError(f"{len(self.imagined_px)} decisions imagined in {len(self.frames)} frames")


def planned_episodes(
    run: TrainedRun, policy: LatentPolicy, results: EpisodeResults, state_px: StatePx | None
) -> list[PlannedEpisode]:
    """Return the episodes to show, of those that `policy` ran and whose frames were kept.

    Positions need state_px. Imagined positions also need labels of the environment's states.
    """
    readout = None if state_px is None else state_readout(run)
    shown = []
    for number in choose_shown(results.success):
        goal = results.goal_states[number]
        paths = None
        if state_px is not None and readout is not None:
            decided = read_paths(policy.imagined(number).float().cpu(), readout, state_px)
            paths = decided.repeat(policy.block, axis=0)[: results.steps[number]]
        shown.append(
            PlannedEpisode(
                number=number,
                success=bool(results.success[number]),
                frames=results.frames[number],
                goal=results.goals[number],
                way_px=None if state_px is None else state_px(results.states[number]),
                goal_px=None if state_px is None or goal is None else state_px(goal),
                imagined_px=paths,
            )
        )
    return shown


def choose_shown(success: np.ndarray, count: int = NUM_SHOWN) -> list[int]:
    """Return the first episodes of success [E]; if none of them failed, the first failure replaces the last one."""
    shown = list(range(min(count, len(success))))
    failed = np.flatnonzero(~success)
    if len(failed) and failed[0] >= count:
        shown[-1] = int(failed[0])
    return shown


def read_paths(embeddings: Tensor, readout: Readout, state_px: StatePx) -> np.ndarray:
    """Read imagined embeddings [T, M, horizon, D] as positions [T, M, horizon, 2] in px."""
    return state_px(readout(embeddings).numpy())


def state_readout(run: TrainedRun) -> Readout | None:
    """Fit the readout of the state from embeddings of real frames, as the evaluation does.

    None, with a warning, if evaluation.label is not the state, or the run's videos are missing or lack that label.
    """
    networks, sizes = run.networks, run.config.evaluation
    if sizes.label != STATE_LABEL:
        logger.warning("imagined paths are not drawn: evaluation.label=%r is not %r", sizes.label, STATE_LABEL)
        return None
    try:
        with frozen(networks.model, networks.target_encoder):
            fit = embed_split(networks, "train", sizes.fit_clips, seed=sizes.seed)
            selection = embed_split(networks, "selection", sizes.selection_clips, seed=sizes.seed)
        state = FrameLabel(STATE_LABEL, networks.layout.num_frames)
        state.quantity(fit.labels)  # raises if the label is missing
        return fitted_readout(state, fit, selection)
    except UserError as error:
        logger.warning("imagined paths are not drawn: %s", error)
        return None
