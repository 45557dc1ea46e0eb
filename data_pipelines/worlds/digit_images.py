"""Images of handwritten digits as PNG files, a folder for each digit, with attributes measured from their pixels.

Slant, thickness and width vary within a digit: they are what two images of one class do not share.

Legend: N images, H = W = 28 pixels.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data_pipelines.errors import UserError
from data_pipelines.files import write_errors
from data_pipelines.splits import SPLITS, Split
from data_pipelines.worlds.digits import load_sprites
from data_pipelines.worlds.written import finish_split, start_world

WORLD = "digit_images"
IMAGE_PX = 28


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
    padded = F.pad(images, (1, 1, 1, 1))
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
    out: Path, counts: Mapping[Split, int], *, mnist_dir: Path | None = None, seed: int = 0, overwrite: bool = False
) -> None:
    """Write gray images of 28x28 px as out/train/3/000001.png and so on, with a metadata.jsonl per split.

    The labels are "label", the digit, and those of `measure`. An interrupted folder is continued. A complete one is
    left unchanged.

    counts: images per split, a random choice by the seed.

    Raises:
        UserError: a count is below 1 or above the number of digits; the files of MNIST cannot be read; as start_world.
    """
    sprites = {split: load_sprites(split, mnist_dir, IMAGE_PX) for split in SPLITS}
    for split in SPLITS:
        if not 1 <= counts[split] <= len(sprites[split]):
            raise UserError(f"{counts[split]} {split} images: there must be 1 to {len(sprites[split])}")
    world = {"world": WORLD, "seed": seed, "digits": "mnist" if mnist_dir else "scikit-learn"}
    for split in start_world(out, world | {"counts": {name: counts[name] for name in SPLITS}}, overwrite=overwrite):
        generator = torch.Generator().manual_seed(1000 * seed + SPLITS.index(split))
        chosen = torch.randperm(len(sprites[split]), generator=generator)[: counts[split]]
        pixels = (sprites[split].images[chosen] * 255).round().byte()
        _write_split(out / split, pixels, sprites[split].digits[chosen].tolist())


def _write_split(folder: Path, pixels: Tensor, digits: Sequence[int]) -> None:
    """Write gray images uint8 [N, H, W] of digits, and their labels last."""
    from PIL import Image

    names = [f"{digit}/{row:06d}.png" for row, digit in enumerate(digits)]
    with write_errors(folder):
        for digit in set(digits):
            (folder / str(digit)).mkdir(parents=True, exist_ok=True)
        for name, image in zip(tqdm(names, desc=f"{folder.name} images", unit="file"), pixels.numpy(), strict=True):
            if not (folder / name).is_file():
                aside = (folder / name).with_suffix(".partial")
                Image.fromarray(image).save(aside, format="PNG")
                aside.replace(folder / name)
    measures = {name: values.tolist() for name, values in measure(pixels.float() / 255).items()}
    rows = (
        {"label": digit, **{name: round(values[row], 5) for name, values in measures.items()}}
        for row, digit in enumerate(digits)
    )
    finish_split(folder, names, rows)
