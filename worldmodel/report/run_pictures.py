"""Pictures of a run's illustrations: sampled futures, nearest real segments, surprise and planned episodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from worldmodel.evaluation.illustrations import Illustrations
from worldmodel.planning.planned_episodes import PlannedEpisode
from worldmodel.report import animations, charts, numbers
from worldmodel.report.drawing import Picture, Theme, chart, shown_frames, strip
from worldmodel.report.plan_pictures import plan_picture
from worldmodel.report.timeline import draw_timeline, timeline_moment
from worldmodel.runs.metrics import RunMetrics, value_at

MAX_FANNED = 8
"""Dimensions of a quantity in a fan chart, at most; those after them are left out."""


def future_pictures(illustrations: Illustrations, metrics: RunMetrics) -> list[tuple[Picture, Picture | None]]:
    """Return an animation for each query, and a fan chart if a quantity is forecast."""
    fans, num_frames = illustrations.fans, illustrations.num_frames
    quantity = numbers.mapping(metrics.get("quantity"))
    # A law draws its quantity as positions.
    unit = str(quantity.get("unit") or "") if fans is None or fans.law is None else "px"
    pictures: list[tuple[Picture, Picture | None]] = []
    for query, frames in enumerate(illustrations.frames):
        num_steps = len(frames) // num_frames - 1
        alt = (
            f"Example {query + 1}: {num_frames} frames that the model sees, then {num_steps * num_frames} that followed"
        )
        if fans is None:
            pictures.append((animations.animation(frames, num_frames, alt + "."), None))
            continue
        dimensions = [str(name) for name in quantity.get("dimensions") or ()]
        if len(dimensions) != fans.true.shape[-1]:
            dimensions = [f"dimension {k + 1}" for k in range(fans.true.shape[-1])]
        dimensions = dimensions[:MAX_FANNED]
        words = charts.fan_words(fans, query, dimensions, unit)
        moving = animations.animation(
            frames,
            num_frames,
            f"{alt}, under sampled paths and the true one. {words}" if fans.on_frames else f"{alt}.",
            fans=fans if fans.on_frames else None,
            query=query,
        )
        fan = charts.fan_chart(fans, query, dimensions, unit, f"Example {query + 1} against the horizon. {words}")
        pictures.append((moving, fan))
    return pictures


def neighbour_pictures(illustrations: Illustrations) -> list[list[tuple[int, Picture, list[Picture]]]]:
    """Return the marked steps of each query, with the true segment and those nearest to sampled futures."""
    if not illustrations.neighbours.size:
        return []
    n, shown = illustrations.num_frames, shown_frames(illustrations.num_frames)
    pictures = []
    for query, (clip, by_step) in enumerate(zip(illustrations.frames, illustrations.neighbours, strict=True)):
        rows = []
        for step, nearest in zip(illustrations.neighbour_steps, by_step, strict=True):
            about = f"Example {query + 1}, horizon {step}"
            actual = strip(clip[step * n : (step + 1) * n][shown], f"{about}: the segment that followed.")
            near = [
                strip(frames[shown], f"{about}: the real segment nearest to sampled future {i + 1}.")
                for i, frames in enumerate(nearest)
            ]
            rows.append((step, actual, near))
        pictures.append(rows)
    return pictures


def timeline_pictures(illustrations: Illustrations) -> dict[str, Any] | None:
    """Return the chart of surprise against time, and the frames and the time of each peak."""
    timeline = illustrations.timeline
    if timeline is None or not len(timeline.surprise):
        return None
    shown = shown_frames(illustrations.num_frames)
    both = [*shown, *(illustrations.num_frames + i for i in shown)]
    moments = [timeline_moment(timeline, peak) for peak in timeline.peaks]
    alt = (
        f"Surprise of {len(timeline.surprise):,} transitions of {timeline.video}, median "
        f"{np.nanmedian(timeline.surprise):.2f} {timeline.unit}. Peaks: {'; '.join(moments) or 'none'}."
    )

    def draw(figure: Any, theme: Theme) -> None:
        draw_timeline(figure.add_subplot(), theme, timeline)

    return {
        "video": timeline.video,
        "has_kl": timeline.unit == "nats",
        "has_scene": timeline.scene_nats is not None,
        "has_stillness": timeline.still_nats is not None,
        "chart": chart(draw, alt, size_in=(5.2, 2.2)),
        "peaks": [
            (moment, strip(frames[both], f"Peak {i + 1}, {moment}: the context, then the target."))
            for i, (moment, frames) in enumerate(zip(moments, timeline.peak_frames, strict=True))
        ],
    }


def planning_pictures(
    episodes: Sequence[PlannedEpisode], metrics: RunMetrics
) -> list[tuple[str, Picture, Picture, Picture | None]]:
    """Return the outcome of each shown episode, its animation, its goal image next to its last frame, and its plans.

    Plans are None without a decoder.
    """
    budget = value_at(metrics, "planning.protocol.budget")
    pictures = []
    for episode in episodes:
        steps = len(episode.frames) - 1
        outcome = f"reached after {steps} steps" if episode.success else f"not reached in {steps} steps"
        alt = f"Episode {episode.number + 1}: the goal is {outcome}, of at most {numbers.number(budget)}."
        if episode.way_px is not None and episode.goal_px is not None:
            left_px = np.linalg.norm(episode.way_px[[0, -1]] - episode.goal_px, axis=1)
            alt += f" The agent starts {left_px[0]:.1f} px from it and ends {left_px[1]:.1f} px from it."
            if episode.imagined_px is not None:
                nearest_px = np.linalg.norm(episode.imagined_px[0] - episode.goal_px, axis=-1).min(axis=-1).mean()
                alt += f" The first plan is imagined to reach within {nearest_px:.1f} px of it."
        both = np.stack([episode.goal, episode.frames[-1]])
        words = f"Episode {episode.number + 1}: the goal image, then the last frame."
        pictures.append(
            (
                f"Episode {episode.number + 1}: {outcome}",
                animations.planning_animation(episode, alt),
                strip(both, words),
                plan_picture(episode),
            )
        )
    return pictures
