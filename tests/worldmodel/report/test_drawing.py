import base64

import numpy as np

from worldmodel.report.drawing import MAX_STRIP_BYTES, strip


def size_of(frames: np.ndarray) -> int:
    return len(base64.b64decode(strip(frames, "").light.split(",")[1]))


def test_gray_frames_are_stored_without_loss_unless_they_are_noise() -> None:
    rng = np.random.default_rng(0)
    drawn = np.zeros((3, 1, 96, 96), np.uint8)
    drawn[:, :, 30:60, 40:50] = 255
    noisy = np.clip(drawn + rng.normal(60, 8, drawn.shape), 0, 255).astype(np.uint8)
    assert size_of(drawn) < 500
    assert size_of(noisy) < 2 * MAX_STRIP_BYTES
