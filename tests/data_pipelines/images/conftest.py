"""Small gray images, each of one gray level, in folders for three classes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

WriteImages = Callable[..., Path]


def level_of(number: int) -> int:
    """The gray level of image `number`."""
    return 10 + 2 * number


@pytest.fixture
def write_images(tmp_path: Path) -> WriteImages:
    """Write `counts` images per class, as c0/00.png and so on; numbers go on from class to class."""

    def write(folder: str = "images", counts: tuple[int, ...] = (5, 7, 8), side_px: int = 12) -> Path:
        root, number = tmp_path / folder, 0
        for kind, count in enumerate(counts):
            (root / f"c{kind}").mkdir(parents=True)
            for _ in range(count):
                pixels = np.full((side_px, side_px), level_of(number), np.uint8)
                Image.fromarray(pixels).save(root / f"c{kind}" / f"{number:02d}.png")
                number += 1
        return root

    return write
