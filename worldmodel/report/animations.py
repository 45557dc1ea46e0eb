"""Animations of a report: forecasts over frames of a video, and episodes of planning.

Legend: Q queries, S samples, T frames, P points of a path, C channels, H = W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from worldmodel.evaluation.illustrations import Fans
from worldmodel.planning.planned_episodes import PlannedEpisode
from worldmodel.report.drawing import FAN, GOAL, THEMES, TRUTH, Picture, data_uri, pixels, show_frame, style

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

MAX_FRAMES_MOVING, MAX_STEPS_MOVING = 32, 64  # of an animation: of a video, of an episode of planning
ANIMATION_PX = 320
MAX_ANIMATION_BYTES, MAX_EPISODE_BYTES = 200_000, 120_000
CONTEXT_MS, FUTURE_MS, STEP_MS, PAUSE_MS = 300, 160, 200, 1800
BAR_PX = 12  # height of the progress bar below an animation
DIMMED = 0.6  # brightness of frames under paths


class Screen:
    """Enlarged frames of height x width px, with paths over them and a progress bar below."""

    def __init__(self, height: int, width: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        scale = ANIMATION_PX / max(height, width)
        wide, high = round(width * scale), round(height * scale)
        self.figure = Figure(figsize=(wide / 100, (high + BAR_PX) / 100), dpi=100, facecolor="#0b0e12")
        self.canvas = FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, BAR_PX / (high + BAR_PX), 1, high / (high + BAR_PX)))
        self.image = show_frame(self.axes, np.zeros((1, height, width), np.uint8))
        self.axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        self.bar = self.figure.add_axes((0, 0, 1, BAR_PX / (high + BAR_PX)))
        self.bar.set_axis_off()
        self.bar.set(ylim=(0, 1))

    def fill(self, left: float, right: float, colour: str) -> None:
        """Colour a part of the bar."""
        self.bar.axvspan(left, right, 0.3, 0.8, color=colour, lw=0)

    def paths(self, count: int) -> Callable[[np.ndarray], None]:
        """Return a function that draws `count` paths [count, P, 2] with their heads; many paths are drawn thinner."""
        from matplotlib.collections import LineCollection

        alpha = float(np.clip(14 / count, 0.1, 0.9))
        lines = LineCollection([], colors=FAN, linewidths=1.3, alpha=alpha)
        self.axes.add_collection(lines)
        (heads,) = self.axes.plot([], [], ".", color=FAN, markersize=7, alpha=min(0.85, 3 * alpha), markeredgewidth=0)

        def draw(paths: np.ndarray) -> None:
            lines.set_segments(list(paths))
            heads.set_data(paths[:, -1, 0], paths[:, -1, 1])

        return draw

    def shot(self, frame: np.ndarray, *, dimmed: bool) -> PillowImage:
        """Render the screen over a frame uint8 [C, H, W]."""
        from PIL import Image

        self.image.set_data(pixels((frame * DIMMED).astype(np.uint8) if dimmed else frame))
        self.canvas.draw()
        return Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3].copy())


def moving_picture(
    images: Sequence[PillowImage], durations_ms: Sequence[int], still: PillowImage, alt: str, *, max_bytes: int
) -> Picture:
    """Return images as an animation for the page, with the best quality that fits into `max_bytes`."""
    end = BytesIO()
    still.save(end, format="webp", quality=82)
    uri = data_uri(moving_bytes(images, durations_ms, max_bytes=max_bytes))
    return Picture(uri, uri, alt, *images[0].size, still=data_uri(end.getvalue()))


def moving_bytes(images: Sequence[PillowImage], durations_ms: Sequence[int], *, max_bytes: int) -> bytes:
    """Encode images as an animated WebP, with the best quality that fits into `max_bytes`."""
    for quality, shrink in ((72, 1), (45, 1), (30, 2), (30, 4)):
        moving, sized = BytesIO(), [image.reduce(shrink) for image in images]
        sized[0].save(
            moving,
            format="webp",
            save_all=True,
            append_images=sized[1:],
            duration=list(durations_ms),
            loop=0,
            quality=quality,
        )
        if moving.tell() <= max_bytes:
            break
    return moving.getvalue()


def spread_over(total: int, most: int) -> np.ndarray:
    """Return at most `most` of the indices below `total`, from the first to the last."""
    return np.unique(np.linspace(0, total - 1, min(total, most)).round().astype(int))


def path_until(origin: np.ndarray, ends: np.ndarray, segments: float) -> np.ndarray:
    """Return the path [..., P, 2] from `origin` [2] through `ends` [..., horizon, 2], for `segments` segments.

    It is straight between the ends of segments.
    """
    whole, part = int(segments), segments - int(segments)
    points = np.concatenate([np.broadcast_to(origin, (*ends.shape[:-2], 1, 2)), ends], axis=-2)
    path = points[..., : whole + 1, :]
    if part > 0:
        tip = points[..., whole, :] + part * (points[..., whole + 1, :] - points[..., whole, :])
        path = np.concatenate([path, tip[..., None, :]], axis=-2)
    return path


def animation(frames: np.ndarray, num_frames: int, alt: str, *, fans: Fans | None = None, query: int = 0) -> Picture:
    """Animate a context segment and the segments that followed, uint8 [T, C, H, W], with a still of the end.

    Sampled paths of `fans`, positions on the frames, grow frame by frame over the future: the first two dimensions. A
    bar at the bottom fills with the segments, starting with the context.
    """
    total = len(frames)
    images, durations_ms = [], []
    with style(THEMES["dark"]):
        screen = Screen(*frames.shape[-2:])
        screen.bar.set_xlim(0, total)
        for left in range(0, total, num_frames):
            screen.fill(left + 0.1, left + num_frames - 0.1, "#323a44")
        if fans is not None:
            draw_paths = screen.paths(fans.samples.shape[1])
            (trace,) = screen.axes.plot([], [], color=TRUTH, linewidth=1.8)
            (ring,) = screen.axes.plot([], [], "o", color=TRUTH, markersize=16, markerfacecolor="none", mew=2)
        for index in spread_over(total, MAX_FRAMES_MOVING):
            future = index >= num_frames
            if fans is not None and future:
                segments = (index + 1 - num_frames) / num_frames
                origin = fans.origin[query, :2]
                truth = path_until(origin, fans.true[query, ..., :2], segments)
                draw_paths(path_until(origin, fans.samples[query, ..., :2], segments))
                trace.set_data(truth[:, 0], truth[:, 1])
                ring.set_data(truth[-1:, 0], truth[-1:, 1])
            left = index // num_frames * num_frames
            right = min(index + 0.9, left + num_frames - 0.1)
            screen.fill(left + 0.1, right, TRUTH if future else "#ffffff")
            images.append(screen.shot(frames[index], dimmed=fans is not None and future))
            durations_ms.append(FUTURE_MS if future else CONTEXT_MS)
    durations_ms[-1] = PAUSE_MS
    return moving_picture(images, durations_ms, images[-1], alt, max_bytes=MAX_ANIMATION_BYTES)


def imagined_paths(episode: PlannedEpisode, step: int) -> np.ndarray:
    """Return the imagined paths of the plan at a step, from the agent's position on: [S, 1 + horizon, 2] px."""
    assert episode.way_px is not None and episode.imagined_px is not None
    imagined = episode.imagined_px[step]
    here = np.broadcast_to(episode.way_px[step], (len(imagined), 1, 2))
    return np.concatenate([here, imagined], axis=1)


def planning_animation(episode: PlannedEpisode, alt: str) -> Picture:
    """Animate an episode: a cross at the goal, the path so far, and the imagined path of each plan.

    The still shows the whole path and the first plan. A bar at the bottom fills with the steps.
    """
    total, drawn = len(episode.frames), episode.imagined_px is not None
    images = []
    with style(THEMES["dark"]):
        screen = Screen(*episode.frames.shape[-2:])
        screen.bar.set_xlim(0, total)
        screen.fill(0.1, total - 0.1, "#323a44")
        if episode.imagined_px is not None:
            draw_paths = screen.paths(episode.imagined_px.shape[1])
        (way,) = screen.axes.plot([], [], color=TRUTH, linewidth=1.8)
        if episode.goal_px is not None:
            screen.axes.plot(*episode.goal_px, "x", color=GOAL, markersize=11, markeredgewidth=2.2)

        def shot(step: int, planned_at: int | None) -> PillowImage:
            if episode.way_px is not None:
                way.set_data(*episode.way_px[: step + 1].T)
            if drawn:
                draw_paths(imagined_paths(episode, planned_at) if planned_at is not None else np.empty((0, 1, 2)))
            return screen.shot(episode.frames[step], dimmed=drawn)

        for step in spread_over(total, MAX_STEPS_MOVING):
            screen.fill(0.1, min(step + 0.9, total - 0.1), TRUTH)
            images.append(shot(int(step), int(step) if step < total - 1 else None))
        still = shot(total - 1, 0)
    durations_ms = [*[STEP_MS] * (len(images) - 1), PAUSE_MS]
    return moving_picture(images, durations_ms, still, alt, max_bytes=MAX_EPISODE_BYTES)
