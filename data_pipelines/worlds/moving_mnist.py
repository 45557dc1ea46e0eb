"""Stochastic Moving-MNIST with one digit, the world of AdaSSL (arXiv 2602.02381, appendix D.5).

A digit moves at constant velocity v through the context segment. At the boundary to the target segment the
velocity of one axis k changes to v'_k = v_k + (2/3) v_k eps with eps ~ N(0, 1). That of the other axis is unchanged. v'
holds for all later segments. Setting "A" picks either axis with probability 1/2. Setting "B" picks y with probability
0.1 + 0.8 digit / 9.

Coordinates are (x, y) in pixels, x to the right and y down, pixel centres at integers. Nothing bounces: parts outside
the canvas are cropped. Dimensions: B trajectories, T frames, M draws of the law, H = W = 64.
"""

import hashlib
from collections.abc import Generator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.batches import Batch, BatchStream
from data_pipelines.splits import Split
from data_pipelines.transforms import on_device
from data_pipelines.worlds.digits import Sprites, pixel_centroid, render
from data_pipelines.worlds.fresh import batch_generator, share_of_rank
from data_pipelines.worlds.law import ClipFormat, Quantity
from data_pipelines.worlds.written import DrawnVideos, write_digits

WORLD = "moving_mnist"
CENTRE_RANGE_PX = (8.0, 16.0)
MAX_SPEED_PX = 3.0
CHANGE_STD = 2.0 / 3.0
SEGMENT_FRAMES = 3
NUM_SEGMENTS = 3

Setting = Literal["A", "B"]

VIDEO_COUNTS: dict[Split, int] = {"train": 16_384, "selection": 2_048, "test": 1_024}
"""Videos per split of a world of the usual size."""


@dataclass(frozen=True)
class Trajectories:
    """Trajectories without pixels. All tensors are on one device.

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
    """Draw v' given the state: velocity [B, 2] px/frame, digit [B] -> [B, num_samples, 2] px/frame."""
    repeated = velocity[:, None].expand(-1, num_samples, 2)
    _, velocity_after = _change(repeated, digit[:, None].expand(-1, num_samples), setting, generator)
    return velocity_after


def _change(velocity: Tensor, digit: Tensor, setting: Setting, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the changed axis [B, M] and the velocity after the change [B, M, 2]. velocity [B, M, 2], digit [B, M]."""
    probability_y = torch.full_like(velocity[..., 0], 0.5) if setting == "A" else 0.1 + 0.8 * digit / 9
    uniform = torch.rand(velocity.shape[:-1], generator=generator, device=velocity.device)
    axis = (uniform < probability_y).long()
    eps = torch.randn(velocity.shape[:-1], generator=generator, device=velocity.device)
    factor = 1 + CHANGE_STD * eps[..., None] * F.one_hot(axis, 2)
    return axis, velocity * factor


# ---------------------------------------------------------------------------------------------------- the pixels


def centre_path(trajectories: Trajectories) -> Tensor:
    """Return the centres of the digit in the nine frames of each trajectory, [B, 9, 2] px."""
    context = torch.arange(SEGMENT_FRAMES, device=trajectories.centre.device)
    before = trajectories.centre[:, None] + context[:, None] * trajectories.velocity[:, None]
    return torch.cat([before, future_path(before[:, -1], trajectories.velocity_after, NUM_SEGMENTS - 1)], dim=1)


def future_path(last_centre: Tensor, velocity_after: Tensor, num_segments: int = 1) -> Tensor:
    """Return centres after the change: last_centre, velocity_after [B, 2] -> [B, 3 * num_segments, 2] px."""
    steps = torch.arange(1, num_segments * SEGMENT_FRAMES + 1, device=last_centre.device)
    return last_centre[:, None] + steps[:, None] * velocity_after[:, None]


# ----------------------------------------------------------------------------------------------------- streaming


class MovingMnistStream(BatchStream):
    """Fresh trajectories without end.

    The trajectories of a global batch are a pure function of (seed, batch number). A rank renders its slice, on
    `device`. `batches_per_epoch` is 1: no trajectory is repeated.

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
        """Return the trajectories of this rank in global batch number `batch`, on the CPU."""
        generator = batch_generator(self.seed, batch)
        whole = sample_trajectories(self.sprites, self.batch_size, self.setting, generator)
        return whole.rows(self._slice)

    def batches(self, start_batch: int = 0) -> Generator[Batch, None, None]:
        """Yield batches from number `start_batch` on, with video float32 [B, 9, 1, 64, 64] in [0, 1]."""
        batch = start_batch
        while True:
            trajectories = self.trajectories(batch)
            images = self.sprites.images[on_device(trajectories.sprite, self.device)]
            first = batch * self.batch_size + self._slice.start
            yield {
                "video": render(images, on_device(centre_path(trajectories), self.device)),
                "clip_id": torch.arange(first, first + len(trajectories)),
                "row": torch.arange(self._slice.start, self._slice.stop),
                "labels": trajectories.labels(),
            }
            batch += 1


# --------------------------------------------------------------------------------------- the law, for evaluation


@dataclass(frozen=True)
class MovingMnistLaw:
    """The law of this world (data_pipelines.worlds.law.Law): the velocity in the target segment."""

    setting: Setting
    sprites: Sprites

    quantity = Quantity("velocity", "px/frame", ("x", "y"))
    clip_format = ClipFormat(num_frames=SEGMENT_FRAMES, size_px=64, whole_videos=True)
    max_horizon = 1

    def sample(self, labels: dict[str, Tensor], horizon: int, num_samples: int, generator: torch.Generator) -> Tensor:
        """Draw centres under the law, [B, num_samples, 3, 1, 2] px."""
        assert horizon <= self.max_horizon
        velocity_after = sample_law(labels["velocity"], labels["digit"], num_samples, self.setting, generator)
        return self._path(labels, velocity_after)

    def truth(self, labels: dict[str, Tensor], horizon: int) -> Tensor:
        """Return the observed velocity, [B, 1, 2] px/frame."""
        assert horizon <= self.max_horizon
        return labels["velocity_after"][:, None]

    def measure(self, labels: dict[str, Tensor], centres: Tensor) -> Tensor:
        """Return the velocity [B, M, 1, 2] px/frame of centres [B, M, 3, 1, 2] px."""
        return (centres[:, :, -1] - centres[:, :, 0]) / (SEGMENT_FRAMES - 1)

    def extrapolate(self, labels: dict[str, Tensor], context: Tensor, horizon: int) -> Tensor:
        """Return the velocity seen in the pixels: context [B, 3, 1, H, W] in [0, 1] -> [B, 1, 2] px/frame."""
        assert horizon <= self.max_horizon
        return centroid_velocity(context)[:, None]

    def render(self, labels: dict[str, Tensor], centres: Tensor) -> Tensor:
        """Draw centres [B, M, 3, 1, 2] px as float32 [B, M, 3, 1, 64, 64] in [0, 1]."""
        num_samples = centres.shape[1]
        images = self.sprites.images[labels["sprite"].repeat_interleave(num_samples)]
        return render(images, centres.flatten(0, 1)[:, :, 0]).unflatten(0, (-1, num_samples))

    def origin(self, labels: dict[str, Tensor]) -> Tensor:
        """Return the centre of the digit in the last context frame, [B, 2] px."""
        return last_context_centre(labels)

    def positions(self, labels: dict[str, Tensor], velocity: Tensor) -> Tensor:
        """Return the centre at the end of the target segment, [B, S, 1, 2] px, for velocity [B, S, 1, 2] px/frame."""
        return last_context_centre(labels)[:, None, None] + SEGMENT_FRAMES * velocity

    def probe_targets(self, labels: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the targets of probes: int64 [B] is a class, float32 [B, K] a measure."""
        return {
            "digit": labels["digit"],
            "velocity": labels["velocity"],
            "velocity_change": labels["velocity_change"],
            "position": last_context_centre(labels),
        }

    def _path(self, labels: dict[str, Tensor], velocity_after: Tensor) -> Tensor:
        """Return centres in the target segment, [B, M, 3, 1, 2] px, for velocity_after [B, M, 2] px/frame."""
        last = last_context_centre(labels)[:, None].expand(velocity_after.shape).flatten(0, 1)
        return future_path(last, velocity_after.flatten(0, 1)).unflatten(0, velocity_after.shape[:2]).unsqueeze(3)


def last_context_centre(labels: dict[str, Tensor]) -> Tensor:
    """Return the centre of the digit in the last context frame, [B, 2] px, from the labels of B clips."""
    return labels["centre"] + (SEGMENT_FRAMES - 1) * labels["velocity"]


def centroid_velocity(context: Tensor) -> Tensor:
    """Return the velocity of the centroid of the pixels: context [B, 3, 1, H, W] in [0, 1] -> [B, 2] px/frame."""
    centroid = pixel_centroid(context[:, :, 0])
    return (centroid[:, -1] - centroid[:, 0]) / (context.shape[1] - 1)


# ------------------------------------------------------------------------------------------------ written worlds


def write_moving_mnist(
    out: Path,
    counts: Mapping[Split, int],
    *,
    setting: Setting = "A",
    mnist_dir: Path | None = None,
    seed: int = 0,
    num_processes: int,
    overwrite: bool = False,
) -> None:
    """Write videos of nine frames, one trajectory each, with labels, as H.264 files in out/train and so on.

    counts: videos per split; usually VIDEO_COUNTS.

    Raises:
        UserError: as write_digits.
    """

    def sample(sprites: Sprites, count: int, generator: torch.Generator) -> DrawnVideos:
        trajectories = sample_trajectories(sprites, count, setting, generator)
        labels = {name: values.tolist() for name, values in trajectories.labels().items()}

        def draw(rows: list[int]) -> Tensor:
            part = trajectories.rows(rows)
            return render(sprites.images[part.sprite], centre_path(part))

        return [{name: values[row] for name, values in labels.items()} for row in range(count)], draw

    facts = {"world": WORLD, "setting": setting}
    write_digits(
        out, facts, counts, sample, mnist_dir=mnist_dir, seed=seed, num_processes=num_processes, overwrite=overwrite
    )
