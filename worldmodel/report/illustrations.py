"""What a report draws beside the numbers of metrics.json.

Legend: Q queries, S sampled futures, M draws of the law, H horizon steps, K dimensions of the forecast quantity, T
frames.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Fans:
    """Forecasts of a physical quantity at the last frame of each future segment.

    samples [Q, S, H, K]; law [Q, M, H, K], draws of the true law, or None where none is known; true [Q, H, K];
    origin [Q, K], the quantity in the last context frame. `on_frames`: the quantity is a position (x, y) in pixels of
    the frames, x right and y down, pixel centres at integers.
    """

    samples: np.ndarray
    law: np.ndarray | None
    true: np.ndarray
    origin: np.ndarray
    on_frames: bool


@dataclass(frozen=True)
class Latents:
    """Inferred r [N, R] of held-out transitions; change [N, K] is what truly changed there, None without labels.

    `change_name` says what changed, such as "velocity change, px/frame"; empty without labels.
    """

    r: np.ndarray
    change: np.ndarray | None
    change_name: str


@dataclass(frozen=True)
class Timeline:
    """The surprise of every transition of one video (worldmodel.evaluation.surprise).

    frame [N]: the first frame of each target segment, in source frames; time_s [N]: its time, or None where the video
    states no frame rate. surprise [N], in `unit`: "nats", or "units of the loss" where that weighs no KL. kl_nats,
    prediction_error, in the units of the loss, and scene_nats [N] are its parts. peaks [P]: positions in `frame` of
    the most surprising transitions, the highest first; peak_frames uint8 [P, T, C, H, W]: the context and target
    segments there.
    """

    video: str
    frame: np.ndarray
    time_s: np.ndarray | None
    unit: str
    surprise: np.ndarray
    kl_nats: np.ndarray
    prediction_error: np.ndarray
    scene_nats: np.ndarray
    peaks: np.ndarray
    peak_frames: np.ndarray


@dataclass(frozen=True)
class Illustrations:
    """A handful (at most 6) of queries to draw, and what the figures of the whole evaluation need.

    frames uint8 [Q, (1 + H) * num_frames, C, H, W], C 1 or 3: the context segment and the H that followed.
    neighbours uint8 [Q, L, N, num_frames, C, H, W]: for each of the horizon steps `neighbour_steps` (L of them, counted
    from 1) the real segments nearest to N sampled futures.
    """

    frames: np.ndarray
    num_frames: int
    fans: Fans | None
    neighbours: np.ndarray
    neighbour_steps: tuple[int, ...]
    latents: Latents | None
    timeline: Timeline | None


NO_ILLUSTRATIONS = Illustrations(
    frames=np.zeros((0, 2, 1, 1, 1), np.uint8),
    num_frames=1,
    fans=None,
    neighbours=np.zeros((0, 0, 0, 1, 1, 1, 1), np.uint8),
    neighbour_steps=(),
    latents=None,
    timeline=None,
)


@dataclass(frozen=True)
class PlannedEpisode:
    """An episode of planning; `number` counts within its seed, from 0.

    frames uint8 [T, C, H, W], what was seen before each of T - 1 steps and after the last; goal uint8 [C, H, W], the
    picture that is planned for. Positions (x, y) are in pixels of the frames, as those of Fans, and None where states
    are no positions: way_px [T, 2]; goal_px [2]; imagined_px [T - 1, S, H, 2], where each decision's plan was imagined
    to lead.
    """

    number: int
    success: bool
    frames: np.ndarray
    goal: np.ndarray
    way_px: np.ndarray | None
    goal_px: np.ndarray | None
    imagined_px: np.ndarray | None
