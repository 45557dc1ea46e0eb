"""Single-digit stochastic Moving-MNIST, the world of AdaSSL (arXiv 2602.02381, appendix D.5).

A digit moves at constant velocity v through the context segment. At the border to the target segment one axis k changes
its velocity to v'_k = v_k + (2/3) v_k eps with eps ~ N(0, 1); the other axis keeps its own. v' holds for all later
segments. Setting "A" picks either axis with probability 1/2; setting "B" picks y with probability 0.1 + 0.8 digit / 9.

Coordinates are (x, y) in pixels, x to the right and y down, pixel centres at integers. Nothing bounces: what leaves the
canvas is cropped. Dimensions: B trajectories, T frames, M draws of the law, H = W = 64.
"""

import gzip
import hashlib
import json
import multiprocessing
import shutil
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from data_pipelines.errors import UserError
from data_pipelines.sources.fresh import batch_generator, share_of_rank

CANVAS_PX = 64
SPRITE_PX = 16
CENTRE_RANGE_PX = (8.0, 16.0)
MAX_SPEED_PX = 3.0
CHANGE_STD = 2.0 / 3.0
SEGMENT_FRAMES = 3
NUM_SEGMENTS = 3

Split = Literal["train", "selection", "test"]
Setting = Literal["A", "B"]
SPLITS: tuple[Split, ...] = ("train", "selection", "test")


@dataclass(frozen=True)
class Sprites:
    """Digits of one split: `images` float32 [N, 16, 16] in [0, 1], `digits` int64 [N]."""

    images: Tensor
    digits: Tensor

    def __len__(self) -> int:
        return len(self.digits)


@dataclass(frozen=True)
class Trajectories:
    """What happened, without pixels. All on one device.

    sprite: int64 [B], row in Sprites; digit: int64 [B]; centre: [B, 2] px, in the first frame;
    velocity, velocity_after: [B, 2] px/frame, before and after the change; axis: int64 [B], 0 for x, 1 for y.
    """

    sprite: Tensor
    digit: Tensor
    centre: Tensor
    velocity: Tensor
    velocity_after: Tensor
    axis: Tensor

    def __len__(self) -> int:
        return len(self.sprite)

    def labels(self) -> dict[str, Tensor]:
        return {
            "sprite": self.sprite,
            "digit": self.digit,
            "centre": self.centre,
            "velocity": self.velocity,
            "velocity_after": self.velocity_after,
            "velocity_change": self.velocity_after - self.velocity,
            "axis": self.axis,
        }

    def rows(self, rows: slice | list[int]) -> "Trajectories":
        return Trajectories(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


# ---------------------------------------------------------------------------------------------------- the digits


def load_sprites(split: Split, mnist_dir: Path | None = None) -> Sprites:
    """Digits of one split; no identity stands in two splits.

    Without `mnist_dir`: scikit-learn's 1,797 bundled 8x8 digits, 1,297 / 250 / 250. With it: MNIST's IDX files (plain
    or gzipped), 50,000 / 10,000 training images and the 10,000 test images. Resized to 16x16, antialiased bilinear.

    Raises:
        UserError: a file of MNIST is missing or is no IDX file.
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
        images[start:stop, None], (SPRITE_PX, SPRITE_PX), mode="bilinear", antialias=True, align_corners=False
    )
    return Sprites(resized[:, 0].clamp(0, 1), digits[start:stop])


def _sklearn_digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bundled = load_digits()
    # The file is ordered by writer: a fixed permutation mixes writers over the splits.
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
    """One IDX file: two zero bytes, type 8 (uint8), number of dimensions, sizes (big-endian uint32), data."""
    plain, zipped = folder / name, folder / f"{name}.gz"
    if plain.is_file():
        raw = plain.read_bytes()
    elif zipped.is_file():
        try:
            raw = gzip.decompress(zipped.read_bytes())
        except (OSError, EOFError) as error:
            raise UserError(f"{zipped} is no readable gzip file: {error}") from error
    else:
        raise UserError(f"no {name} or {name}.gz in {folder}: the MNIST folder must hold MNIST's four IDX files")
    header_bytes = 4 + 4 * num_dims
    sizes = np.frombuffer(raw[4:header_bytes], ">u4")
    if raw[:4] != bytes((0, 0, 8, num_dims)) or len(raw) - header_bytes != int(np.prod(sizes, dtype=np.int64)):
        raise UserError(f"{folder / name} is no IDX file of uint8 with {num_dims} dimensions, or it is cut short")
    return np.frombuffer(raw, np.uint8, offset=header_bytes).reshape(tuple(int(n) for n in sizes))


# ------------------------------------------------------------------------------------------------------- the law


def sample_trajectories(sprites: Sprites, count: int, setting: Setting, generator: torch.Generator) -> Trajectories:
    """Draw `count` trajectories on the device of `generator`."""
    device = generator.device
    sprite = torch.randint(len(sprites), (count,), generator=generator, device=device)
    digit = sprites.digits.to(device)[sprite]
    low, high = CENTRE_RANGE_PX
    centre = low + (high - low) * torch.rand(count, 2, generator=generator, device=device)
    velocity = MAX_SPEED_PX * torch.rand(count, 2, generator=generator, device=device)
    axis, velocity_after = _change(velocity[:, None], digit[:, None], setting, generator)
    return Trajectories(sprite, digit, centre, velocity, velocity_after[:, 0], axis[:, 0])


def sample_law(
    velocity: Tensor, digit: Tensor, num_samples: int, setting: Setting, generator: torch.Generator
) -> Tensor:
    """Fresh draws of v' given the state: velocity [B, 2] px/frame, digit [B] -> [B, num_samples, 2] px/frame."""
    repeated = velocity[:, None].expand(-1, num_samples, 2)
    _, velocity_after = _change(repeated, digit[:, None].expand(-1, num_samples), setting, generator)
    return velocity_after


def _change(velocity: Tensor, digit: Tensor, setting: Setting, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """velocity [B, M, 2], digit [B, M] -> the changed axis [B, M] and the velocity after the change [B, M, 2]."""
    probability_y = torch.full_like(velocity[..., 0], 0.5) if setting == "A" else 0.1 + 0.8 * digit / 9
    uniform = torch.rand(velocity.shape[:-1], generator=generator, device=velocity.device)
    axis = (uniform < probability_y).long()
    eps = torch.randn(velocity.shape[:-1], generator=generator, device=velocity.device)
    factor = 1 + CHANGE_STD * eps[..., None] * F.one_hot(axis, 2)
    return axis, velocity * factor


# ---------------------------------------------------------------------------------------------------- the pixels


def centre_path(trajectories: Trajectories) -> Tensor:
    """Centres of the digit in the nine frames of each trajectory: [B, 9, 2] px."""
    context = torch.arange(SEGMENT_FRAMES, device=trajectories.centre.device)
    before = trajectories.centre[:, None] + context[:, None] * trajectories.velocity[:, None]
    return torch.cat([before, future_path(before[:, -1], trajectories.velocity_after, NUM_SEGMENTS - 1)], dim=1)


def future_path(last_centre: Tensor, velocity_after: Tensor, num_segments: int = 1) -> Tensor:
    """Centres in the segments after the change: last_centre, velocity_after [B, 2] -> [B, 3 * num_segments, 2] px."""
    steps = torch.arange(1, num_segments * SEGMENT_FRAMES + 1, device=last_centre.device)
    return last_centre[:, None] + steps[:, None] * velocity_after[:, None]


def render(images: Tensor, centres: Tensor) -> Tensor:
    """Draw one sprite a trajectory, bilinear at sub-pixel positions, zeros outside.

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


# ----------------------------------------------------------------------------------------------------- streaming


class MovingMnistStream:
    """Fresh trajectories for ever, in the batches of `data_pipelines.stream.VideoStream`, with no file behind them.

    The trajectories of a global batch are a pure function of (seed, batch number); a rank renders its own slice, on
    `device`. `batches_per_epoch` is 1: no trajectory ever comes again.

    Raises:
        UserError: `batch_size` is not a multiple of `world_size`.
    """

    batches_per_epoch = 1

    def __init__(
        self,
        sprites: Sprites,
        *,
        setting: Setting,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.sprites = Sprites(sprites.images.to(device), sprites.digits)
        self.setting: Setting = setting
        self.batch_size = batch_size
        self.seed = seed
        self.device = torch.device(device)
        self._slice = share_of_rank(batch_size, rank, world_size)
        content = hashlib.sha256(sprites.images.numpy().tobytes()).hexdigest()[:16]
        self.fingerprint = f"moving_mnist-{setting}-{batch_size}-{seed}-{content}"

    def trajectories(self, batch: int) -> Trajectories:
        """The trajectories of this rank in global batch number `batch`, on the CPU."""
        whole = sample_trajectories(
            Sprites(self.sprites.images, self.sprites.digits),
            self.batch_size,
            self.setting,
            batch_generator(self.seed, batch),
        )
        return whole.rows(self._slice)

    def batches(self, start_batch: int = 0) -> Generator[dict, None, None]:
        """Batches from number `start_batch` on: video float32 [B, 9, 1, 64, 64] in [0, 1], clip_id [B], labels."""
        batch = start_batch
        while True:
            trajectories = self.trajectories(batch)
            images = self.sprites.images[trajectories.sprite.to(self.device)]
            first = batch * self.batch_size + self._slice.start
            yield {
                "video": render(images, centre_path(trajectories).to(self.device)),
                "clip_id": torch.arange(first, first + len(trajectories)),
                "labels": trajectories.labels(),
            }
            batch += 1


# --------------------------------------------------------------------------------------- the law, for evaluation


@dataclass(frozen=True)
class MovingMnistLaw:
    """What an evaluation may know of this world and no model does: the true law, and how its futures look."""

    setting: Setting
    sprites: Sprites

    def sample(self, labels: dict[str, Tensor], num_samples: int, generator: torch.Generator) -> Tensor:
        """Labels of B clips -> fresh draws of v' given each clip's state: [B, num_samples, 2] px/frame."""
        return sample_law(labels["velocity"], labels["digit"], num_samples, self.setting, generator)

    def render_targets(self, labels: dict[str, Tensor], velocity_after: Tensor) -> Tensor:
        """Target segments under given futures: velocity_after [B, S, 2] -> float32 [B * S, 3, 1, 64, 64] in [0, 1]."""
        num_samples = velocity_after.shape[1]
        last = last_context_centre(labels).repeat_interleave(num_samples, dim=0)
        images = self.sprites.images[labels["sprite"].repeat_interleave(num_samples)]
        return render(images, future_path(last, velocity_after.flatten(0, 1)))


def last_context_centre(labels: dict[str, Tensor]) -> Tensor:
    """Labels of B clips -> centre of the digit in the last context frame: [B, 2] px."""
    return labels["centre"] + (SEGMENT_FRAMES - 1) * labels["velocity"]


def centroid_velocity(context: Tensor) -> Tensor:
    """Displacement of the centroid of the pixels: context [B, 3, 1, H, W] in [0, 1] -> [B, 2] px/frame."""
    frames = context[:, :, 0]
    mass = frames.sum(dim=(-2, -1)).clamp(min=1e-6)
    x = (frames.sum(dim=-2) * torch.arange(frames.shape[-1], device=frames.device)).sum(dim=-1) / mass
    y = (frames.sum(dim=-1) * torch.arange(frames.shape[-2], device=frames.device)).sum(dim=-1) / mass
    centroid = torch.stack([x, y], dim=-1)
    return (centroid[:, -1] - centroid[:, 0]) / (frames.shape[1] - 1)


# ------------------------------------------------------------------------------------------------ written worlds


def write_world(
    out: Path,
    counts: dict[Split, int],
    *,
    setting: Setting = "A",
    mnist_dir: Path | None = None,
    seed: int = 0,
    num_processes: int,
    overwrite: bool = False,
) -> None:
    """Render trajectories to H.264 files, one of nine frames a file, with a metadata.jsonl a split and a world.json.

    A world that was interrupted goes on where it stopped; one that is complete is left alone.

    Raises:
        UserError: `out` holds a world of other parameters, or something else, and `overwrite` is not given.
    """
    world = {
        "world": "moving_mnist",
        "setting": setting,
        "seed": seed,
        "digits": "mnist" if mnist_dir else "scikit-learn",
        "counts": {split: counts[split] for split in SPLITS},
    }
    marker = out / "world.json"
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) != world and not overwrite:
        raise UserError(f"{out} holds a world of other parameters: choose another folder, or pass --overwrite")
    if not marker.is_file() and out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds no world of this script: choose another folder")
    if overwrite and marker.is_file():
        for split in SPLITS:
            shutil.rmtree(out / split, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(world, indent=1) + "\n", encoding="utf-8")
    unfinished = [split for split in SPLITS if not (out / split / "metadata.jsonl").is_file()]
    if not unfinished:
        return
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for split in unfinished:
            generator = torch.Generator().manual_seed(1000 * seed + SPLITS.index(split))
            sprites = load_sprites(split, mnist_dir)
            trajectories = sample_trajectories(sprites, counts[split], setting, generator)
            _write_split(out / split, sprites, trajectories, seed, pool)


def read_law(root: Path) -> MovingMnistLaw | None:
    """The law of a written world, or None where `root` holds videos from elsewhere."""
    marker = root / "world.json"
    if not marker.is_file():
        return None
    setting = json.loads(marker.read_text(encoding="utf-8"))["setting"]
    stored = load_file(root / "test" / "sprites.safetensors")
    return MovingMnistLaw(setting, Sprites(stored["images"].float() / 255, stored["digits"]))


def _write_split(
    folder: Path, sprites: Sprites, trajectories: Trajectories, seed: int, pool: ProcessPoolExecutor
) -> None:
    folder.mkdir(exist_ok=True)
    labels = trajectories.labels()
    names = [f"{row:06d}.mp4" for row in range(len(trajectories))]
    missing = [row for row, name in enumerate(names) if not (folder / name).is_file()]
    chunks = [missing[start : start + 64] for start in range(0, len(missing), 64)]
    done = len(names) - len(missing)
    with tqdm(total=len(names), initial=done, desc=f"{folder.name} videos", unit="file") as bar:
        jobs = []
        for rows in chunks:
            part = trajectories.rows(rows)
            frames = (render(sprites.images[part.sprite], centre_path(part)) * 255).round().byte()[:, :, 0].numpy()
            jobs.append(pool.submit(_encode_chunk, [folder / names[row] for row in rows], frames))
        for job, rows in zip(jobs, chunks, strict=True):
            job.result()
            bar.update(len(rows))
    images = (sprites.images * 255).round().byte()
    save_file({"images": images, "digits": sprites.digits}, folder / "sprites.safetensors")
    rows_text = "".join(
        json.dumps({"file_name": name, **{key: value[row].tolist() for key, value in labels.items()}, "seed": seed})
        + "\n"
        for row, name in enumerate(names)
    )
    # Written last and as a whole: a split with this file is complete.
    aside = folder / ".metadata.partial"
    aside.write_text(rows_text, encoding="utf-8")
    aside.replace(folder / "metadata.jsonl")


def _encode_chunk(paths: list[Path], frames: np.ndarray) -> None:
    for path, video in zip(paths, frames, strict=True):
        aside = path.with_suffix(".partial")
        encode_gray_h264(aside, video)
        aside.replace(path)


def encode_gray_h264(path: Path, frames: np.ndarray, fps: int = 10) -> None:
    """Write uint8 [T, H, W] as an H.264 .mp4 file (constant rate factor 18)."""
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18", "preset": "veryfast"})
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
        container.mux(stream.encode(None))
