"""The positions of what moves in one video, read forwards once, with its background sampled before."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from data_pipelines.containers import video_url
from data_pipelines.decoders import VideoReader, open_video, resolve_decoder
from data_pipelines.facts import Video
from data_pipelines.motion.background import Background, Picture, estimated_background, reduced, working_factor
from data_pipelines.motion.blobs import CONTRAST_SHARE, LEAST_MASS_SHARE, Typical, find_blobs, typical_objects
from data_pipelines.motion.tracks import Positions, Tracker

NUM_SAMPLES = 64  # frames for a background
WINDOW_FRAMES = 9_000  # five minutes at 30 frames per second; each window has a background of its own
SURVEYED = 5  # windows from which the typical object of a video is known
LEAST_FOUND = 3  # frames in which an object must be found
OUTLIER_SIDES = 3.0  # distance from the median of five frames, in sides of a typical object


@dataclass(frozen=True)
class Motion:
    """Positions in a video of F frames.

    positions: [F, N, 2] as (x, y) in pixels of the frame as shown, x to the right and y downwards; the centre of the
        top left pixel is (0, 0). Objects that are not found are interpolated linearly in time.
    is_found: [F, N], False where a position is interpolated.
    stirring: the share of a frame that differs from the background besides the objects, the median over frames.
    """

    positions: Positions
    is_found: NDArray[np.bool_]
    stirring: float

    @property
    def interpolated(self) -> float:
        """The share of positions that are interpolated."""
        return 1 - float(self.is_found.mean())


class NothingMoves(Exception):
    """A video shows fewer moving objects than were asked for. The message says how many."""


def follow(root: Path, video: Video, num_objects: int) -> Iterator[int | Motion]:
    """Track the objects that move in a video. Yields the number of frames that are done, and last the Motion.

    Memory does not grow with the length of the video, except for the positions.

    Raises:
        NothingMoves: fewer objects were found.
        DecodeError: a frame cannot be read.
    """
    factor = working_factor(video.height, video.width)
    windows = _windows(video.num_frames)
    typical, backgrounds = _surveyed(root, video, windows, factor, num_objects)
    reader = _opened(root, video)
    try:
        tracker = Tracker(num_objects, typical)
        found = np.full((video.num_frames, num_objects, 2), np.nan)
        for window in windows:
            background = backgrounds.pop(window, None) or _background_of(root, video, window, factor)[0]
            for number in range(window.start, window.stop):
                picture = reduced(reader.read(number)[0], factor)
                blobs = find_blobs(
                    picture, background, CONTRAST_SHARE * typical.contrast, LEAST_MASS_SHARE * typical.mass
                )
                found[number] = tracker.step(blobs)
                yield number + 1
    finally:
        reader.close()
    found = _without_outliers(found, OUTLIER_SIDES * typical.side)
    is_found = np.isfinite(found[:, :, 0])
    seen = int((is_found.sum(axis=0) >= min(LEAST_FOUND, video.num_frames)).sum())
    if seen < num_objects:
        raise NothingMoves(f"{seen} of {num_objects} moving objects are found" if seen else "nothing moves")
    positions = (interpolated(found) + 0.5) * factor - 0.5
    yield Motion(positions, is_found, typical.stirring)


class _Window(NamedTuple):
    """Frames [start, stop) with a background of their own, sampled from [first, last)."""

    start: int
    stop: int
    first: int
    last: int


def _windows(num_frames: int) -> list[_Window]:
    count = max(1, round(num_frames / WINDOW_FRAMES))
    bounds = [round(number * num_frames / count) for number in range(count + 1)]
    return [
        _Window(start, stop, max(0, start - WINDOW_FRAMES // 2), min(num_frames, stop + WINDOW_FRAMES // 2))
        for start, stop in pairwise(bounds)
    ]


def _opened(root: Path, video: Video) -> VideoReader:
    return open_video(video_url(root, video), video, channels=1, size_px=None, decoder=resolve_decoder("auto"))


def _surveyed(
    root: Path, video: Video, windows: Sequence[_Window], factor: int, num_objects: int
) -> tuple[Typical, dict[_Window, Background]]:
    """Return the typical object of a video, and the backgrounds of the windows that were read for it."""
    chosen = [windows[number * (len(windows) - 1) // (SURVEYED - 1)] for number in range(SURVEYED)]
    backgrounds, typicals = {}, []
    for window in dict.fromkeys(chosen):
        backgrounds[window], samples = _background_of(root, video, window, factor)
        if typical := typical_objects(list(samples), backgrounds[window], num_objects):
            typicals.append(typical)
    if not typicals:
        raise NothingMoves("nothing moves")
    return Typical(*np.median(np.array(typicals), axis=0).tolist()), backgrounds


def _background_of(root: Path, video: Video, window: _Window, factor: int) -> tuple[Background, Picture]:
    """Return the background of a window, and the sampled pictures."""
    reader = _opened(root, video)  # one of its own, so that the other one goes on without seeking back
    try:
        samples = _sampled(reader, window.first, window.last, factor)
    finally:
        reader.close()
    return estimated_background(samples), samples


def _sampled(reader: VideoReader, start: int, stop: int, factor: int) -> Picture:
    """Return evenly spread frames of [start, stop) at the working scale, [N, H, W]."""
    count = min(NUM_SAMPLES, stop - start)
    numbers = (np.linspace(start, stop, count, endpoint=False) + (stop - start) / count / 2).astype(int)
    return np.stack([reduced(reader.read(number)[0], factor) for number in numbers.tolist()])


def _without_outliers(found: Positions, most: float) -> Positions:
    """Replace by NaN the positions [F, N, 2] that are further than this from the median of five frames."""
    filled = interpolated(found)
    middle = ndimage.median_filter(filled, size=(5, 1, 1), mode="nearest")
    is_outlier = np.linalg.norm(filled - middle, axis=-1) > most
    return np.where(is_outlier[:, :, None], np.nan, found)


def interpolated(found: Positions) -> Positions:
    """Fill positions [F, N, 2] that are NaN linearly in time, from the nearest ones before and after."""
    filled = found.copy()
    frames = np.arange(len(found))
    for series in filled.reshape(len(found), -1).T:
        is_known = np.isfinite(series)
        if is_known.any():
            series[~is_known] = np.interp(frames[~is_known], frames[is_known], series[is_known])
    return filled
