"""A few episodes of planning to look at: what was seen, the way, and where each plan was imagined to lead.

Legend: E episodes, T decisions, M imagined futures, H steps of the horizon, D embedding dimensions, K numbers of a
state.
"""

from collections.abc import Callable

import numpy as np
from torch import Tensor

from data_pipelines.errors import UserError, one_line_logger
from worldmodel.evaluation.forecast import embed_clips, fitted_readout, frozen, quantity_of
from worldmodel.evaluation.readout import Readout
from worldmodel.planning.imagination import LatentPolicy
from worldmodel.planning.protocol import Episodes
from worldmodel.report.illustrations import PlannedEpisode
from worldmodel.runs.trained_run import TrainedRun

logger = one_line_logger(__name__)

NUM_SHOWN = 4
STATE_LABEL = "state"  # of recorded videos: what info["state"] holds

StatePx = Callable[[np.ndarray], np.ndarray]
"""As an environment's state_px: states [..., K] -> positions in px of its pictures [..., 2]."""


def planned_episodes(
    run: TrainedRun, policy: LatentPolicy, episodes: Episodes, state_px: StatePx | None
) -> list[PlannedEpisode]:
    """The episodes to show of those that `policy` ran and whose frames were kept.

    Without state_px there are no positions; without labels that say what its states are, no imagined ones.
    """
    readout = None if state_px is None else state_readout(run)
    shown = []
    for number in choose_shown(episodes.success):
        goal = episodes.goal_states[number]
        paths = None
        if state_px is not None and readout is not None:
            paths = read_paths(policy.imagined(number).float().cpu(), readout, state_px)
        shown.append(
            PlannedEpisode(
                number=number,
                success=bool(episodes.success[number]),
                frames=episodes.frames[number],
                goal=episodes.goals[number],
                way_px=None if state_px is None else state_px(episodes.states[number]),
                goal_px=None if state_px is None or goal is None else state_px(goal),
                imagined_px=paths,
            )
        )
    return shown


def choose_shown(success: np.ndarray, count: int = NUM_SHOWN) -> list[int]:
    """The first episodes of success [E]; if none of them failed, the last gives way to the first that did."""
    shown = list(range(min(count, len(success))))
    failed = np.flatnonzero(~success)
    if len(failed) and failed[0] >= count:
        shown[-1] = int(failed[0])
    return shown


def read_paths(embeddings: Tensor, readout: Readout, state_px: StatePx) -> np.ndarray:
    """Imagined embeddings [T, M, H, D] as positions [T, M, H, 2] in px."""
    return state_px(readout(embeddings).numpy())


def state_readout(run: TrainedRun) -> Readout | None:
    """The readout of the state from embeddings of real frames, chosen as the evaluation chooses it.

    None, with a warning, where evaluation.label is not the state, or the run's videos are not there or lack it.
    """
    config, networks = run.config, (run.model, run.target_encoder)
    sizes = config.evaluation
    if sizes.label != STATE_LABEL:
        logger.warning("imagined paths are not drawn: evaluation.label=%r is not %r", sizes.label, STATE_LABEL)
        return None
    try:
        with frozen(*networks):
            fit = embed_clips(config, *networks, "train", sizes.fit_clips, run.device, source=run.source)
            selection = embed_clips(
                config, *networks, "selection", sizes.selection_clips, run.device, source=run.source
            )
        quantity_of(config, None, fit.labels)  # tells of a label that is missing
        return fitted_readout(config, None, fit, selection)
    except UserError as error:
        logger.warning("imagined paths are not drawn: %s", error)
        return None
