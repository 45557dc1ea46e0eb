"""A few planned episodes for the report: frames, the path of the agent, and what its plans imagined.

A plan is shown as a path if embeddings can be read as positions, and as pictures if the run has a decoder.

Legend: E episodes, T decisions, M imagined futures, D embedding dimensions, K numbers of a state, C channels, H = W
pixels, P pixels of a decoded side.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from data_pipelines.errors import UserError, one_line_logger
from data_pipelines.transforms import to_float
from worldmodel.evaluation.decoded import decode_paths, load_decoder, stored_facts
from worldmodel.evaluation.embed import embed_split, frozen
from worldmodel.evaluation.quantity import FrameLabel, fitted_readout
from worldmodel.evaluation.readout import Readout
from worldmodel.evaluation.records import Axes
from worldmodel.nets.decoder import Decoder
from worldmodel.planning.imagination import LatentPolicy, as_in_videos
from worldmodel.planning.protocol import EpisodeResults
from worldmodel.planning.recorded import STATE_LABEL
from worldmodel.runs.trained_run import TrainedRun
from worldmodel.training.decoding import as_bytes, resized

logger = one_line_logger(__name__)

NUM_SHOWN = 4
NUM_PLANS_SHOWN, NUM_STEPS_SHOWN = 3, 6  # of an episode as pictures, and of such a plan

StatePx = Callable[[np.ndarray], np.ndarray]
"""An environment's state_px: states [..., K] -> positions in px of its frames [..., 2]."""


@dataclass(frozen=True)
class DecodedPlans:
    """The imagined plans of a few decisions as pictures, uint8 [decision, step, C, P, P], of one future each.

    at: the steps of the environment before each decision. ahead: those from a decision to each picture.
    """

    at: Annotated[np.ndarray, Axes("i", "decision_shown")]
    ahead: Annotated[np.ndarray, Axes("i", "step_shown")]
    pictures: Annotated[np.ndarray, Axes("u", "decision_shown step_shown picture_channel picture_height picture_width")]


@dataclass(frozen=True)
class PlannedEpisode:
    """An episode of planning; `number` counts within its seed, from 0.

    frames uint8 [T + 1, C, H, W] were seen before each of T steps and after the last one. goal uint8 [C, H, W] is the
    goal image. Positions (x, y) are in pixels of the frames, pixel centres at integers; they are None if states are not
    positions. way_px [T + 1, 2] is the path of the agent, goal_px [2] the goal. imagined_px [T, M, horizon, 2] are the
    imagined paths of the plan that each step is part of. plans are None without a decoder.
    """

    number: int
    success: bool
    frames: Annotated[np.ndarray, Axes("u", "moment channel height width")]
    goal: Annotated[np.ndarray, Axes("u", "channel height width")]
    way_px: Annotated[np.ndarray, Axes("f", "moment 2")] | None
    goal_px: Annotated[np.ndarray, Axes("f", "2")] | None
    imagined_px: Annotated[np.ndarray, Axes("f", "decision future horizon 2")] | None
    plans: DecodedPlans | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for plans of other decisions, as in a damaged file."""
        if self.imagined_px is not None and len(self.imagined_px) != len(self.frames) - 1:
            raise ValueError(f"{len(self.imagined_px)} decisions imagined in {len(self.frames)} frames")
        if self.plans is not None and not (self.plans.at >= 0).all() & (self.plans.at < len(self.frames)).all():
            raise ValueError(f"decisions at {self.plans.at.tolist()} of {len(self.frames)} frames")


def planned_episodes(
    run: TrainedRun, policy: LatentPolicy, results: EpisodeResults, state_px: StatePx | None
) -> list[PlannedEpisode]:
    """Return the episodes to show, of those that `policy` ran and whose frames were kept.

    Positions need state_px. Imagined positions also need labels of the environment's states. Pictures of plans need a
    decoder of the run's checkpoint.
    """
    readout = None if state_px is None else state_readout(run)
    step = run.num_updates
    decoder = load_decoder(run.folder, run.config, step, run.device) if stored_facts(run.folder, step) else None
    shown = []
    for number in choose_shown(results.success):
        goal = results.goal_states[number]
        paths = None
        if state_px is not None and readout is not None:
            decided = read_paths(policy.imagined(number).float().cpu(), readout, state_px)
            paths = decided.repeat(policy.executed, axis=0)[: len(results.frames[number]) - 1]
        shown.append(
            PlannedEpisode(
                number=number,
                success=bool(results.success[number]),
                frames=results.frames[number],
                goal=results.goals[number],
                way_px=None if state_px is None else state_px(results.states[number]),
                goal_px=None if state_px is None or goal is None else state_px(goal),
                imagined_px=paths,
                plans=decoded_plans(decoder, policy, number, results.frames[number]) if decoder else None,
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


def decoded_plans(decoder: Decoder, policy: LatentPolicy, number: int, frames: np.ndarray) -> DecodedPlans:
    """Decode what some plans of an episode imagined, after the frames at their decisions: uint8 [T + 1, C, H, W]."""
    imagined = policy.imagined(number)[:, :1]
    decisions = _spread_over(len(imagined), NUM_PLANS_SHOWN)
    shown = _spread_over(imagined.shape[2], NUM_STEPS_SHOWN)
    at = decisions * policy.executed
    now = to_float(as_in_videos(torch.from_numpy(frames[at]), policy.run.config.data))
    before = resized(now[:, None], decoder.side_px)[:, 0]
    pictures = decode_paths(decoder, imagined[decisions].float(), before)[:, 0, shown, -1]
    ahead = (shown + 1) * policy.block
    return DecodedPlans(at, ahead, as_bytes(pictures).numpy())


def _spread_over(total: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, total - 1, min(total, most)).round().astype(int))


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
