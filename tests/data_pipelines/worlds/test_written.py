"""Written videos: without loss, at the size and colour of the frames."""

from pathlib import Path

import av
import numpy as np
import pytest

from data_pipelines.worlds.written import encode_h264


@pytest.mark.parametrize(("shape", "pixels"), [((6, 64, 64), "gray"), ((6, 48, 64, 3), "rgb24")])
def test_frames_come_back_but_for_the_rounding_of_yuv(tmp_path: Path, shape: tuple[int, ...], pixels: str) -> None:
    frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    encode_h264(tmp_path / "noise.mp4", frames)
    with av.open(str(tmp_path / "noise.mp4")) as container:
        decoded = np.stack([frame.to_ndarray(format=pixels) for frame in container.decode(video=0)])
    assert decoded.shape == shape
    assert np.abs(decoded.astype(int) - frames).max() <= 3


def test_what_stands_still_is_the_same_in_every_frame(tmp_path: Path) -> None:
    frames = np.repeat(np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8), 8, axis=0)
    frames[:, 20:24, 20:24] = np.arange(8, dtype=np.uint8)[:, None, None, None] * 30  # something must be encoded anew
    encode_h264(tmp_path / "still.mp4", frames)
    with av.open(str(tmp_path / "still.mp4")) as container:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert np.array_equal(decoded[:, 30:], np.repeat(decoded[:1, 30:], 8, axis=0))
