"""Detection of impossible events by surprise, in videos of test identities.

Kicked world: one event per video (data_pipelines.worlds.planted). Surprise is scored as a detector of the transition at
the event, over all thresholds (AUROC) and at a threshold of the run's own (worldmodel.evaluation.ordinary).

Occlusion: pairs of a possible and an impossible video (data_pipelines.worlds.occlusion), of which the impossible one
should surprise more, as in IntPhys (Riochet et al., arXiv 1803.07616).

Frames are used as rendered, without a codec.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from data_pipelines.errors import UserError
from data_pipelines.worlds import kicked_mnist, occlusion
from data_pipelines.worlds.digits import Sprites
from data_pipelines.worlds.kicked_mnist import render_digits
from data_pipelines.worlds.moving_mnist import SEGMENT_FRAMES
from data_pipelines.worlds.planted import EVENTS, Planted, plant
from data_pipelines.worlds.written import read_sprites, read_world
from worldmodel.config import VideosConfig
from worldmodel.evaluation.embed import Networks
from worldmodel.evaluation.ordinary import check_rate, ordinary_transitions, threshold_at
from worldmodel.evaluation.scores import auroc, wilson_interval
from worldmodel.evaluation.surprise import MEASURES, SurpriseOptions, Transitions, check_model, score_transitions
from worldmodel.runs.trained_run import TrainedRun

MIN_SEGMENTS = 4  # two before an event and two from it on
PAIRS_AT_ONCE = 16


class ScoredVideos(NamedTuple):
    """Transitions of videos without an event, and of videos with each event by its name.

    A transition is `length` frames long.
    """

    untouched: list[Transitions]
    events: dict[str, list[tuple[Transitions, Planted]]]
    length: int


def detect(run: TrainedRun, count: int, seed: int, rate: float) -> dict[str, Any]:
    """Measure how well surprise finds what is impossible in the run's world, by `count` videos or pairs per event.

    Returns: of the kicked world "auroc", from `event_aurocs`, and "alarms", from `event_alarms`, at the threshold of
    a rate of false alarms; of the occlusion world "pairs", from `pair_shares`.

    Raises:
        UserError: the run's videos show another world, or are too short, or its model cannot score videos; the rate is
            not between 0 and 1, or too low for the number of selection clips.
    """
    check_model(run.model)
    check_rate(rate)
    root, world = _world_of(run)
    sprites = read_sprites(root / "test")
    generator = torch.Generator().manual_seed(seed)
    ordinary = ordinary_transitions(run.networks, run.config.evaluation.selection_clips)
    networks = replace(run.networks, ordinary_motion=ordinary.motion)
    if world["world"] == occlusion.WORLD:
        return {"pairs": pair_shares(networks, sprites, count, generator)}
    threshold = threshold_at(rate, ordinary.surprise)
    videos = score_events(networks, sprites, world, count, generator)
    return {"auroc": event_aurocs(videos), "alarms": {"rate": rate} | event_alarms(videos, threshold)}


def _world_of(run: TrainedRun) -> tuple[Path, Mapping[str, Any]]:
    """Return the folder of the run's world, and the content of its world.json.

    Raises:
        UserError: there are no events for this world, or its videos are too short.
    """
    data, horizon = run.config.data, run.config.evaluation.horizon
    if isinstance(data, VideosConfig) and isinstance(data.root, str):
        root, law = Path(data.root), run.source.known_law("test", horizon)
        world = read_world(root)
        if world is not None and world["world"] == occlusion.WORLD:
            return root, world
        if world is not None and isinstance(law, kicked_mnist.KickedMnistLaw) and law.borders == "bounce":
            if world["num_frames"] < MIN_SEGMENTS * SEGMENT_FRAMES:
                raise UserError(
                    f"the videos of {root} have {world['num_frames']} frames, but events need at least "
                    f"{MIN_SEGMENTS * SEGMENT_FRAMES}: write longer ones"
                )
            return root, world
    raise UserError(
        f"events are planted in the kicked world with bouncing borders and in the occlusion world, but the run "
        f"{run.folder} has other videos or another clip format: train one on such a world"
    )


def score_video(networks: Networks, video: Tensor, step_frames: int | None = None) -> Transitions:
    """Score the transitions of a rendered video [T, C, H, W] in [0, 1]."""
    frames = (video * 255).round().byte().numpy()
    options = SurpriseOptions(step_frames=step_frames)
    return score_transitions(networks, frames, len(frames), name="a video", options=options)


# ----------------------------------------------------------------------------------------------------- kicked world


def score_events(
    networks: Networks, sprites: Sprites, world: Mapping[str, Any], count: int, generator: torch.Generator
) -> ScoredVideos:
    """Score `count` videos without an event, and as many with each event, of a kicked world with bouncing borders."""
    num_digits, num_frames = world["num_digits"], world["num_frames"]
    untouched: list[Transitions] = []
    scored: dict[str, list[tuple[Transitions, Planted]]] = {event: [] for event in EVENTS}

    def sample() -> kicked_mnist.Videos:
        return kicked_mnist.sample_videos(sprites, 1, num_digits, num_frames, "bounce", generator)

    for _ in tqdm(range(count), desc="planted events", unit="video"):
        plain = sample()
        untouched.append(score_video(networks, render_digits(sprites.images[plain.sprite], plain.motion.centre)[0]))
        for event in EVENTS:
            videos = sample()
            segment = int(torch.randint(2, num_frames // SEGMENT_FRAMES - 1, (), generator=generator))
            planted = plant(event, sprites, videos, segment * SEGMENT_FRAMES, generator)
            scored[event].append((score_video(networks, planted.video[0]), planted))
    return ScoredVideos(untouched, scored, (networks.model.seen_at + 1) * SEGMENT_FRAMES)


def event_aurocs(videos: ScoredVideos) -> dict[str, dict[str, float]]:
    """Return the AUROC over transitions for each measure and event: {measure: {event: AUROC, "all": AUROC}}.

    Transitions whose segments lie on both sides of the event's first frame are positive. Transitions that show nothing
    of an event are negative. Others are ignored.
    """
    result: dict[str, dict[str, float]] = {}
    for measure in MEASURES:
        negatives = [getattr(found, measure) for found in videos.untouched]
        positives = {event: _at_event(videos, event, measure) for event in videos.events}
        own_negatives: dict[str, list[np.ndarray]] = {event: [] for event in videos.events}
        for event, scored in videos.events.items():
            for found, planted in scored:
                values = getattr(found, measure)
                own_negatives[event].append(values[~touches(found.start, videos.length, planted.frame, planted.last)])
        result[measure] = {event: _auroc(positives[event], negatives + own_negatives[event]) for event in positives}
        result[measure]["all"] = _auroc(
            [part for parts in positives.values() for part in parts],
            negatives + [part for parts in own_negatives.values() for part in parts],
        )
    return result


def event_alarms(videos: ScoredVideos, threshold: float) -> dict[str, Any]:
    """Return the shares of transitions whose surprise exceeds a threshold.

    Returns: "threshold"; "normal", the share in videos without an event, with its 95% interval "normal_ci95", as if
    transitions were independent; "detected", by event, the share of the transitions at the event.
    """
    normal = np.concatenate([found.surprise for found in videos.untouched]) > threshold
    detected = {event: np.concatenate(_at_event(videos, event, "surprise")) > threshold for event in videos.events}
    return {
        "threshold": threshold,
        "normal": float(normal.mean()),
        "normal_ci95": list(wilson_interval(int(normal.sum()), len(normal))),
        "detected": {event: float(found.mean()) for event, found in detected.items()},
    }


def _at_event(videos: ScoredVideos, event: str, measure: str) -> list[np.ndarray]:
    """Return the measure of the transitions at the event's first frame, of each video with the event."""
    return [
        getattr(found, measure)[touches(found.start, videos.length, planted.frame, planted.frame)]
        for found, planted in videos.events[event]
    ]


def touches(start: np.ndarray, length: int, first: int, last: int) -> np.ndarray:
    """Mark the transitions [start, start + length) that show a change to any of the frames first ... last."""
    return (start < last) & (start + length > first)


def _auroc(positives: list[np.ndarray], negatives: list[np.ndarray]) -> float:
    scores = torch.from_numpy(np.concatenate(positives + negatives))
    return auroc(scores, torch.arange(len(scores)) < sum(map(len, positives)))


# -------------------------------------------------------------------------------------------------------- occlusion


def pair_shares(
    networks: Networks, sprites: Sprites, count: int, generator: torch.Generator
) -> dict[str, dict[str, Any]]:
    """Return the share of `count` pairs of each event whose impossible video has the higher surprise.

    The surprise of a video is the mean of its transitions, of which one starts at every frame. Chance is 0.5.

    Returns: {event: {"share", "ci95"}}, as `share_higher`.
    """
    result: dict[str, dict[str, Any]] = {}
    with tqdm(total=count * len(occlusion.EVENTS), desc="pairs", unit="pair") as bar:
        for event in occlusion.EVENTS:
            scores: list[list[float]] = []
            while len(scores) < count:
                pairs = occlusion.sample_pairs(event, sprites, min(PAIRS_AT_ONCE, count - len(scores)), generator)
                for both in zip(pairs.possible, pairs.impossible, strict=True):
                    scores.append(
                        [float(score_video(networks, video, step_frames=1).surprise.mean()) for video in both]
                    )
                    bar.update()
            possible, impossible = np.array(scores).T
            result[event] = share_higher(impossible, possible)
    return result


def share_higher(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Return the share of pairs in which the first number is higher: [N], [N] -> {"share", "ci95"}.

    Ties count half. For the 95% interval (Wilson 1927), half a pair is dropped.
    """
    wins = float((ours > theirs).sum() + (ours == theirs).sum() / 2)
    return {"share": wins / len(ours), "ci95": list(wilson_interval(int(wins), len(ours)))}
