"""Handwritten digits as sprites, and their drawing on a canvas.

Coordinates are (x, y) in pixels, x to the right and y down, pixel centres at integers. Parts outside the canvas
are cropped.
Dimensions: B videos, T frames, N digits in a video, H = W = 64.
"""

import gzip
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.errors import UserError
from data_pipelines.splits import Split

CANVAS_PX = 64
SPRITE_PX = 16


@dataclass(frozen=True)
class Sprites:
    """Digits of one split: `images` float32 [N, P, P] in [0, 1], `digits` int64 [N]. P = 16 to draw them."""

    images: Tensor
    digits: Tensor

    def __len__(self) -> int:
        return len(self.digits)


def load_sprites(split: Split, mnist_dir: Path | None = None, size_px: int = SPRITE_PX) -> Sprites:
    """Load the digits of one split, with sides of size_px. No identity is in two splits.

    Without `mnist_dir`: scikit-learn's 1,797 bundled 8x8 digits, 1,297 / 250 / 250. With it: MNIST's IDX files (plain
    or gzipped), 50,000 / 10,000 training images and the 10,000 test images. Resized, antialiased
    bilinear.

    Raises:
        UserError: a file of MNIST is missing or is not an IDX file.
    """
    if mnist_dir is None:
        images, digits = _sklearn_digits()
        bounds = {"train": (0, 1297), "selection": (1297, 1547), "test": (1547, 1797)}
    elif split == "test":
        images, digits = _mnist(mnist_dir, "t10k")
        bounds = {"test": (0, len(digits))}
    else:
        images, digits = _mnist(mnist_dir, "train")
        bounds = {"train": (0, 50_000), "selection": (50_000, len(digits))}
    start, stop = bounds[split]
    resized = F.interpolate(
        images[start:stop, None], (size_px, size_px), mode="bilinear", antialias=True, align_corners=False
    )
    return Sprites(resized[:, 0].clamp(0, 1), digits[start:stop])


@cache
def _sklearn_digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bundled = load_digits()
    # The file is sorted by writer: a fixed permutation mixes the writers over the splits.
    order = np.random.default_rng(0).permutation(len(bundled.target))
    images = torch.from_numpy(bundled.images[order] / 16.0).float()
    return images, torch.from_numpy(bundled.target[order].astype(np.int64))


def _mnist(mnist_dir: Path, part: Literal["train", "t10k"]) -> tuple[Tensor, Tensor]:
    images = _read_idx(mnist_dir, f"{part}-images-idx3-ubyte", num_dims=3)
    digits = _read_idx(mnist_dir, f"{part}-labels-idx1-ubyte", num_dims=1)
    if len(images) != len(digits):
        raise UserError(f"MNIST in {mnist_dir}: {len(images)} {part} images but {len(digits)} labels")
    return torch.from_numpy(images / np.float32(255)), torch.from_numpy(digits.astype(np.int64))


def _read_idx(folder: Path, name: str, num_dims: int) -> np.ndarray:
    """Read an IDX file: two zero bytes, type 8 (uint8), number of dimensions, sizes (big-endian uint32), data."""
    plain, zipped = folder / name, folder / f"{name}.gz"
    if plain.is_file():
        raw = plain.read_bytes()
    elif zipped.is_file():
        try:
            raw = gzip.decompress(zipped.read_bytes())
        except (OSError, EOFError) as error:
            raise UserError(f"{zipped} is not a readable gzip file: {error}") from error
    else:
        raise UserError(f"no {name} or {name}.gz in {folder}: the MNIST folder must hold MNIST's four IDX files")
    header_bytes = 4 + 4 * num_dims
    sizes = np.frombuffer(raw[4:header_bytes], ">u4")
    if raw[:4] != bytes((0, 0, 8, num_dims)) or len(raw) - header_bytes != int(np.prod(sizes, dtype=np.int64)):
        raise UserError(f"{folder / name} is not an IDX file of uint8 with {num_dims} dimensions, or it is truncated")
    return np.frombuffer(raw, np.uint8, offset=header_bytes).reshape(tuple(int(n) for n in sizes))


def render(images: Tensor, centres: Tensor) -> Tensor:
    """Draw one sprite per trajectory, bilinear at sub-pixel positions, with zeros outside.

    images [B, 16, 16] in [0, 1], centres [B, T, 2] px -> float32 [B, T, 1, 64, 64] in [0, 1].
    Bilinear placement is separable: canvas = Wy @ sprite @ Wx^T, with a tent for each sprite row and column.
    """
    pixel = torch.arange(CANVAS_PX, device=centres.device)
    texel = torch.arange(SPRITE_PX, device=centres.device)
    first = centres - (SPRITE_PX - 1) / 2
    offset = pixel[:, None] - first[..., None, None] - texel  # [B, T, 2, 64, 16]
    weight = (1 - offset.abs()).clamp_(min=0)
    columns, rows = weight.unbind(2)
    return (rows @ images[:, None] @ columns.transpose(-1, -2)).unsqueeze(2)


def ink_centroid(images: Tensor) -> Tensor:
    """Return the centroid of the ink of sprites, relative to their centre: [..., 16, 16] -> [..., 2] px."""
    along = torch.arange(SPRITE_PX, device=images.device) - (SPRITE_PX - 1) / 2
    mass = images.sum(dim=(-2, -1)).clamp(min=1e-6)
    return torch.stack([images.sum(dim=-2) @ along, images.sum(dim=-1) @ along], dim=-1) / mass[..., None]


def pixel_centroid(frames: Tensor) -> Tensor:
    """Return the centroid of the pixels of frames [..., H, W] in [0, 1]: [..., 2] px; (0, 0) for an empty frame."""
    mass = frames.sum(dim=(-2, -1)).clamp(min=1e-6)
    x = frames.sum(dim=-2) @ torch.arange(frames.shape[-1], device=frames.device, dtype=frames.dtype)
    y = frames.sum(dim=-1) @ torch.arange(frames.shape[-2], device=frames.device, dtype=frames.dtype)
    return torch.stack([x, y], dim=-1) / mass[..., None]
