"""The video of noise holds every byte that was drawn, and no frame tells of another."""

from pathlib import Path

import numpy as np

from benchmarks.noise_video import noise, write_noise
from data_pipelines.formats.registry import load_videos
from tests.data_pipelines.convert.test_layouts import frames_of


def test_the_video_is_the_noise(tmp_path: Path) -> None:
    write_noise(tmp_path / "noise", 30, seed=1)
    [video] = load_videos(tmp_path / "noise").videos
    assert np.array_equal(frames_of(tmp_path / "noise" / video.path), noise(30, seed=1))


def test_successive_frames_are_independent() -> None:
    frames = noise(200, seed=0).reshape(200, -1).astype(float)
    centred = (frames - frames.mean()) / frames.std()
    correlation = (centred[1:] * centred[:-1]).mean()
    assert abs(correlation) < 4 / centred[1:].size ** 0.5
    assert abs(frames.mean() - 127.5) < 0.5 and abs(frames.std() - np.sqrt((256**2 - 1) / 12)) < 0.2
