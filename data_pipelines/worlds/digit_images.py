"""Images of handwritten digits as PNG files, a folder for each digit, with attributes measured from their pixels.

Slant, thickness and width vary within a digit: they are what two images of one class do not share.

Legend: N images, H = W = 28 pixels.
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipelines.errors import UserError
from data_pipelines.processes import ending, spawned_pool
from data_pipelines.splits import SPLITS, Split
from data_pipelines.worlds.digits import load_sprites
from data_pipelines.worlds.written import check_counts, finish_split, run_chunks, start_world

WORLD = "digit_images"
IMAGE_PX = 28
CHUNK_IMAGES = 1024


def measure(images: Tensor) -> dict[str, Tensor]:
    """Measure the ink of images [N, H, W] in [0, 1]: float32 [N] each, by name.

    slant: the horizontal shift of the ink per pixel upwards, the regression of x on height by second moments. Positive
        leans to the right.
    thickness: twice the ink by its outline, px: the width of a long stroke. The outline is the total variation, which
        is the length of the border of any shape, also with soft edges (the coarea formula).
    width: that of a uniform bar with the same spread of x, after the slant is removed, px.
    """
    size = images.shape[-1]
    x = torch.arange(size, dtype=torch.float32)
    height = -x[:, None]  # rows count down
    ink = images.sum(dim=(1, 2)).clamp(min=1e-6)

    def mean(values: Tensor) -> Tensor:
        return (images * values).sum(dim=(1, 2)) / ink

    centre_x, centre_height = mean(x)[:, None, None], mean(height)[:, None, None]
    across, up = x - centre_x, height - centre_height
    slant = mean(across * up) / mean(up * up).clamp(min=1e-6)
    upright = across - slant[:, None, None] * up
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    # Each corner between four pixels: the gradient of the bilinear surface at its middle.
    right = (padded[:, :, 1:] - padded[:, :, :-1]).unfold(1, 2, 1).mean(dim=-1)
    down = (padded[:, 1:] - padded[:, :-1]).unfold(2, 2, 1).mean(dim=-1)
    outline = (right.square() + down.square()).sqrt().sum(dim=(1, 2)).clamp(min=1e-6)
    return {
        "slant": slant,
        "thickness": 2 * images.sum(dim=(1, 2)) / outline,
        "width": math.sqrt(12) * mean(upright.square()).sqrt(),
    }


def write_digit_images(
    out: Path,
    counts: Mapping[Split, int],
    *,
    mnist_dir: Path | None = None,
    seed: int = 0,
    num_processes: int,
    overwrite: bool = False,
) -> None:
    """Write gray images of 28x28 px as out/train/3/000001.png and so on, with a metadata.jsonl per split.

    The labels are "label", the digit, and those of `measure`. An interrupted folder is continued. A complete one is
    left unchanged.

    counts: images per split, a random choice by the seed.

    Raises:
        UserError: a count is below 1 or above the number of digits; the files of MNIST cannot be read; as start_world.
    """
    check_counts(counts, num_processes)
    world = {"world": WORLD, "seed": seed, "digits": "mnist" if mnist_dir else "scikit-learn"}
    world["counts"] = {split: counts[split] for split in SPLITS}
    sprites = {split: load_sprites(split, mnist_dir, IMAGE_PX) for split in SPLITS}
    for split in SPLITS:
        if counts[split] > len(sprites[split]):
            raise UserError(f"{counts[split]} {split} images: there are only {len(sprites[split])} digits")
    unfinished = start_world(out, world, overwrite=overwrite)
    if not unfinished:
        return
    with ending(spawned_pool(num_processes)) as pool:
        for split in unfinished:
            generator = torch.Generator().manual_seed(1000 * seed + SPLITS.index(split))
            chosen = torch.randperm(len(sprites[split]), generator=generator)[: counts[split]]
            images, digits = sprites[split].images[chosen], sprites[split].digits[chosen].tolist()
            pixels = (images * 255).round().byte().numpy()
            names = [f"{digit}/{row:06d}.png" for row, digit in enumerate(digits)]
            folder = out / split
            for digit in set(digits):
                (folder / str(digit)).mkdir(parents=True, exist_ok=True)

            def start(
                rows: list[int], folder: Path = folder, names: list[str] = names, pixels: np.ndarray = pixels
            ) -> Future[None]:
                return pool.submit(_write_images, [folder / names[row] for row in rows], pixels[rows])

            missing = [row for row, name in enumerate(names) if not (folder / name).is_file()]
            run_chunks(start, missing, len(names), split, chunk_size=CHUNK_IMAGES)
            measures = measure(torch.from_numpy(pixels).float() / 255)
            rows = [
                {"label": digit, **{name: round(float(values[row]), 5) for name, values in measures.items()}}
                for row, digit in enumerate(digits)
            ]
            finish_split(folder, names, rows)


def _write_images(paths: Sequence[Path], pixels: np.ndarray) -> None:
    """Write gray images [N, H, W] as PNG files. Each appears complete or not at all."""
    from PIL import Image

    for path, image in zip(paths, pixels, strict=True):
        aside = path.with_suffix(".partial")
        Image.fromarray(image).save(aside, format="PNG")
        aside.replace(path)
