"""Detection of impossible events by surprise, in videos of test identities (data_pipelines.worlds.planted)."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from data_pipelines.errors import UserError
from data_pipelines.worlds.kicked_mnist import KickedMnistLaw, render_digits, sample_videos
from data_pipelines.worlds.moving_mnist import SEGMENT_FRAMES
from data_pipelines.worlds.planted import EVENTS, Planted, plant
from data_pipelines.worlds.written import read_world
from worldmodel.config import VideosConfig
from worldmodel.evaluation.scores import auroc
from worldmodel.evaluation.surprise import MEASURES, Transitions, check_model, score_transitions
from worldmodel.runs.trained_run import TrainedRun

MIN_SEGMENTS = 4  # two before an event and two from it on


def detect_events(run: TrainedRun, num_videos: int, seed: int) -> dict[str, dict[str, float]]:
    """Return the AUROC over transitions for each measure and event: {measure: {event: AUROC, "all": AUROC}}.

    num_videos videos are rendered per event, and as many without an event. Transitions whose segments lie on both sides
    of the event's first frame are positive. Transitions that show nothing of an event are negative. Others are ignored.
    Frames are used as rendered, without a codec.

    Raises:
        UserError: the run's videos do not show the kicked world with bouncing borders, or are too short, or its model
            cannot score videos.
    """
    check_model(run.model)
    data, law = run.config.data, run.source.known_law("test", run.config.evaluation.horizon)
    if not isinstance(data, VideosConfig) or not isinstance(law, KickedMnistLaw) or law.borders != "bounce":
        raise UserError(
            f"events are planted in the kicked world with bouncing borders, but the run {run.folder} has other videos "
            "or another clip format: train one on the kicked world"
        )
    assert isinstance(data.root, str), "several roots have no known law"
    world = read_world(Path(data.root))
    assert world is not None
    num_digits, num_frames = world["num_digits"], world["num_frames"]
    if num_frames < MIN_SEGMENTS * SEGMENT_FRAMES:
        raise UserError(
            f"the videos of {data.root} have {num_frames} frames, but events need at least "
            f"{MIN_SEGMENTS * SEGMENT_FRAMES}: write longer ones"
        )
    generator = torch.Generator().manual_seed(seed)
    sprites = law.sprites
    length = (run.model.seen_at + 1) * SEGMENT_FRAMES

    def score(video: Tensor) -> Transitions:
        frames = (video * 255).round().byte().numpy()
        return score_transitions(run.networks, frames, len(frames), name="a video")

    untouched: list[Transitions] = []
    scored: dict[str, list[tuple[Transitions, Planted]]] = {event: [] for event in EVENTS}
    for _ in tqdm(range(num_videos), desc="planted events", unit="video"):
        plain = sample_videos(sprites, 1, num_digits, num_frames, "bounce", generator)
        untouched.append(score(render_digits(sprites.images[plain.sprite], plain.motion.centre)[0]))
        for event in EVENTS:
            videos = sample_videos(sprites, 1, num_digits, num_frames, "bounce", generator)
            segment = int(torch.randint(2, num_frames // SEGMENT_FRAMES - 1, (), generator=generator))
            planted = plant(event, sprites, videos, segment * SEGMENT_FRAMES, generator)
            scored[event].append((score(planted.video[0]), planted))
    return event_aurocs(untouched, scored, length)


def event_aurocs(
    untouched: list[Transitions], scored: dict[str, list[tuple[Transitions, Planted]]], length: int
) -> dict[str, dict[str, float]]:
    """Return AUROCs from the scores of videos without an event and with each event.

    A transition is `length` frames long.
    """
    result: dict[str, dict[str, float]] = {}
    for measure in MEASURES:
        negatives = [getattr(found, measure) for found in untouched]
        positives: dict[str, list[np.ndarray]] = {event: [] for event in scored}
        own_negatives: dict[str, list[np.ndarray]] = {event: [] for event in scored}
        for event, videos in scored.items():
            for found, planted in videos:
                values = getattr(found, measure)
                positives[event].append(values[touches(found.start, length, planted.frame, planted.frame)])
                own_negatives[event].append(values[~touches(found.start, length, planted.frame, planted.last)])
        result[measure] = {event: _auroc(positives[event], negatives + own_negatives[event]) for event in scored}
        result[measure]["all"] = _auroc(
            [part for parts in positives.values() for part in parts],
            negatives + [part for parts in own_negatives.values() for part in parts],
        )
    return result


def touches(start: np.ndarray, length: int, first: int, last: int) -> np.ndarray:
    """Mark the transitions [start, start + length) that show a change to any of the frames first ... last."""
    return (start < last) & (start + length > first)


def _auroc(positives: list[np.ndarray], negatives: list[np.ndarray]) -> float:
    scores = torch.from_numpy(np.concatenate(positives + negatives))
    return auroc(scores, torch.arange(len(scores)) < sum(map(len, positives)))
