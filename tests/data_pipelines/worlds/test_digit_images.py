"""Measures of ink against closed forms, and the files of digits."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.errors import UserError
from data_pipelines.splits import Split
from data_pipelines.worlds.digit_images import IMAGE_PX, measure, write_digit_images
from data_pipelines.worlds.digits import load_sprites

COUNTS: dict[Split, int] = {"train": 12, "selection": 4, "test": 5}


def bar(width: float, height: float, slant: float = 0.0, fine: int = 8) -> torch.Tensor:
    """An antialiased bar, sheared to the right by `slant` pixels per pixel upwards: [1, 28, 28]."""
    place = (torch.arange(IMAGE_PX * fine) + 0.5) / fine - IMAGE_PX / 2
    up = -place[:, None]
    ink = ((place - slant * up).abs() <= width / 2) & (up.abs() <= height / 2)
    return torch.nn.functional.avg_pool2d(ink.float()[None, None], fine)[:, 0]


@pytest.mark.parametrize("slant", [-0.6, 0.0, 0.4])
def test_measures_of_a_bar(slant: float) -> None:
    found = measure(bar(4, 20, slant))
    assert float(found["slant"]) == pytest.approx(slant, abs=0.01)
    assert float(found["width"]) == pytest.approx(4, abs=0.2)  # pixels are as wide as a quarter of it
    outline = 2 * 20 * math.sqrt(1 + slant**2) + 2 * 4
    assert float(found["thickness"]) == pytest.approx(2 * 4 * 20 / outline, rel=0.04)


def test_measures_do_not_depend_on_place_and_brightness_of_ink() -> None:
    one = bar(3, 12, 0.3)
    other = 0.5 * one.roll((3, -4), dims=(1, 2))
    for name, value in measure(torch.cat([one, other])).items():
        assert float(value[0]) == pytest.approx(float(value[1]), abs=1e-4), name


def test_files_hold_the_digits_and_their_measures(tmp_path: Path) -> None:
    write_digit_images(tmp_path, COUNTS, seed=2)
    for split, count in COUNTS.items():
        rows = [json.loads(line) for line in (tmp_path / split / "metadata.jsonl").read_text().splitlines()]
        assert len(rows) == count
        known = {image.tobytes() for image in pixels(load_sprites(split, None, IMAGE_PX).images)}
        for row in rows:
            image = np.asarray(Image.open(tmp_path / split / row["file_name"]))
            assert image.tobytes() in known and row["file_name"].startswith(f"{row['label']}/")
            for name, value in measure(torch.from_numpy(image / np.float32(255))[None]).items():
                assert row[name] == pytest.approx(float(value), abs=1e-3)
    before = (tmp_path / "train" / "metadata.jsonl").read_bytes()
    (tmp_path / "train" / "metadata.jsonl").unlink()
    write_digit_images(tmp_path, COUNTS, seed=2)  # continues
    assert (tmp_path / "train" / "metadata.jsonl").read_bytes() == before


def pixels(images: torch.Tensor) -> np.ndarray:
    return (images * 255).round().byte().numpy()


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="300 test images: there must be 1 to 250"):
        write_digit_images(tmp_path, {**COUNTS, "test": 300})
    with pytest.raises(UserError, match="0 train images: there must be 1 to 1297"):
        write_digit_images(tmp_path, {**COUNTS, "train": 0})
