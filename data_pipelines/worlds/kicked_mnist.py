"""Kicked Moving-MNIST: a digit is kicked at every segment boundary, for forecasts over many segments.

The law of stochastic Moving-MNIST (AdaSSL, arXiv 2602.02381, appendix D.5) is applied repeatedly. At each boundary
one axis k, either with probability 1/2, gets the velocity

    v'_k = sign(v_k) b (1 + (2/3) eps),    eps ~ N(0, 1),

and that of the other axis is unchanged. b is the base speed of the digit's class, BASE_SPEED_PX. Kicks vary around it,
so speeds do not die out as they would around v_k itself. The class is visible, so a segment shows the whole state on
which the law depends. At the start of a video each axis has just been kicked, in a random direction.

borders="bounce": digits are reflected at the borders of the canvas. borders="crop": they leave it for good.
Coordinates are (x, y) in pixels, y down. Dimensions: B videos, M draws, T frames, S segments, N digits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.errors import UserError
from data_pipelines.splits import Split
from data_pipelines.worlds.digits import (
    CANVAS_PX,
    SPRITE_PX,
    Sprites,
    ink_centroid,
    pixel_centroid,
    render,
)
from data_pipelines.worlds.law import ClipFormat, Quantity
from data_pipelines.worlds.moving_mnist import CHANGE_STD, SEGMENT_FRAMES
from data_pipelines.worlds.written import DrawnVideos, write_digits

WORLD = "kicked_mnist"
BASE_SPEED_PX = tuple(0.5 + digit / 6 for digit in range(10))  # px/frame, by class
LOW_PX = (SPRITE_PX - 1) / 2  # of the centre of a digit that touches the left or upper border
HIGH_PX = CANVAS_PX - 1 - LOW_PX

MIN_FRAMES = 2 * SEGMENT_FRAMES

Borders = Literal["bounce", "crop"]

VIDEO_COUNTS: dict[Split, int] = {"train": 12_000, "selection": 512, "test": 512}
"""Videos per split of a world of the usual size."""


class Motion(NamedTuple):
    """centre [..., T, N, 2] px; velocity [..., T, N, 2] px/frame with which each frame is left; kick [..., T, N, 2]:
    the change of velocity at the boundary before the frame's segment."""

    centre: Tensor
    velocity: Tensor
    kick: Tensor


@dataclass(frozen=True)
class Videos:
    """B videos without pixels: sprite and digit int64 [B, N], which are rows in Sprites and classes; motion."""

    sprite: Tensor
    digit: Tensor
    motion: Motion

    def __len__(self) -> int:
        return len(self.sprite)


# ------------------------------------------------------------------------------------------------------- the law


def base_speed(digit: Tensor) -> Tensor:
    """Return the base speed of classes, [...] px/frame."""
    return torch.tensor(BASE_SPEED_PX, device=digit.device)[digit]


def sample_videos(
    sprites: Sprites, count: int, num_digits: int, num_frames: int, borders: Borders, generator: torch.Generator
) -> Videos:
    """Draw `count` videos of `num_frames` frames, a multiple of the segment's."""
    sprite = torch.randint(len(sprites), (count, num_digits), generator=generator)
    digit = sprites.digits[sprite]
    shape = (count, num_digits, 2)
    centre = LOW_PX + (HIGH_PX - LOW_PX) * torch.rand(shape, generator=generator)
    heading = torch.randint(2, shape, generator=generator) * 2.0 - 1
    speed = base_speed(digit)[..., None] * (1 + CHANGE_STD * torch.randn(shape, generator=generator))
    state = centre, heading * speed
    first = _move(*state, SEGMENT_FRAMES - 1, borders)
    later = simulate(
        first.centre[..., -1, :, :], first.velocity[..., -1, :, :], digit,
        num_frames // SEGMENT_FRAMES - 1, borders, generator,
    )  # fmt: skip
    start = Motion(*(value.unsqueeze(-3) for value in (*state, torch.zeros(shape))))
    return Videos(sprite, digit, Motion(*(torch.cat(parts, dim=-3) for parts in zip(start, first, later, strict=True))))


def simulate(
    centre: Tensor, velocity: Tensor, digit: Tensor, num_segments: int, borders: Borders, generator: torch.Generator
) -> Motion:
    """Simulate segments after a state. Each of them begins with a kick.

    centre [..., N, 2] px, velocity [..., N, 2] px/frame, digit [..., N] -> T = num_segments * 3 frames.
    """
    speed = base_speed(digit)
    parts = []
    for _ in range(num_segments):
        kicked = _kick(velocity, speed, generator)
        part = _move(centre, kicked, SEGMENT_FRAMES, borders)
        parts.append(part._replace(kick=(kicked - velocity).unsqueeze(-3).expand_as(part.kick)))
        centre, velocity = part.centre[..., -1, :, :], part.velocity[..., -1, :, :]
    return Motion(*(torch.cat(values, dim=-3) for values in zip(*parts, strict=True)))


def _kick(velocity: Tensor, speed: Tensor, generator: torch.Generator) -> Tensor:
    """Return the velocity after a kick: velocity [..., N, 2], speed [..., N] -> [..., N, 2]."""
    axis = torch.randint(2, velocity.shape[:-1], generator=generator)
    eps = torch.randn(velocity.shape[:-1], generator=generator)
    heading = torch.where(velocity < 0, -1.0, 1.0)
    kicked = heading * (speed * (1 + CHANGE_STD * eps))[..., None]
    return torch.where(F.one_hot(axis, 2).bool(), kicked, velocity)


def _move(centre: Tensor, velocity: Tensor, num_frames: int, borders: Borders) -> Motion:
    """Simulate num_frames frames after a state, without a kick."""
    centres, velocities = [], []
    for _ in range(num_frames):
        centre = centre + velocity
        if borders == "bounce":
            velocity = torch.where((centre < LOW_PX) | (centre > HIGH_PX), -velocity, velocity)
            centre = reflect(centre)
        centres.append(centre)
        velocities.append(velocity)
    places = torch.stack(centres, dim=-3)
    return Motion(places, torch.stack(velocities, dim=-3), torch.zeros_like(places))


def reflect(position: Tensor) -> Tensor:
    """Reflect positions at the borders as often as needed, so that they lie between them."""
    span = HIGH_PX - LOW_PX
    folded = (position - LOW_PX).remainder(2 * span)
    return LOW_PX + torch.where(folded > span, 2 * span - folded, folded)


# ---------------------------------------------------------------------------------------------------- the pixels


def render_digits(images: Tensor, centres: Tensor) -> Tensor:
    """Draw images [B, N, 16, 16] in [0, 1] at centres [B, T, N, 2] px: float32 [B, T, 1, 64, 64] in [0, 1]."""
    digits = [render(images[:, n], centres[:, :, n]) for n in range(images.shape[1])]
    return digits[0] if len(digits) == 1 else torch.stack(digits).sum(dim=0).clamp_(max=1)


def centroid(images: Tensor, centres: Tensor) -> Tensor:
    """Return the centroid of all ink: images [B, N, 16, 16], centres [B, ..., N, 2] px -> [B, ..., 2] px."""
    extra = (1,) * (centres.ndim - 3)
    mass = images.sum(dim=(-2, -1)).unflatten(0, (-1, *extra))[..., None]
    places = centres + ink_centroid(images).unflatten(0, (-1, *extra))
    return (mass * places).sum(dim=-2) / mass.sum(dim=-2)


# --------------------------------------------------------------------------------------- the law, for evaluation


@dataclass(frozen=True)
class KickedMnistLaw:
    """The law of this world (data_pipelines.worlds.law.Law): the centroid of the ink at the end of each segment.

    Labels of clips: sprite and digit [B] or [B, N]; of their frames centre, velocity, kick [B, T, 2 N] and centroid
    [B, T, 2].
    """

    borders: Borders
    sprites: Sprites

    quantity = Quantity("centroid", "px", ("x", "y"))
    clip_format = ClipFormat(num_frames=SEGMENT_FRAMES, size_px=CANVAS_PX, whole_videos=False)
    max_horizon = None

    def sample(self, labels: dict[str, Tensor], horizon: int, num_samples: int, generator: torch.Generator) -> Tensor:
        """Draw centres under the law, [B, num_samples, H * 3, N, 2] px."""
        last = SEGMENT_FRAMES - 1
        centre, velocity = (labels[name][:, last].unflatten(-1, (-1, 2)) for name in ("centre", "velocity"))
        digit = _per_digit(labels["digit"])

        def repeated(values: Tensor) -> Tensor:
            return values[:, None].expand(-1, num_samples, *values.shape[1:])

        state = repeated(centre), repeated(velocity), repeated(digit)
        return simulate(*state, horizon, self.borders, generator).centre

    def truth(self, labels: dict[str, Tensor], horizon: int) -> Tensor:
        """Return the observed centroids, [B, H, 2] px."""
        return labels["centroid"][:, 2 * SEGMENT_FRAMES - 1 :: SEGMENT_FRAMES][:, :horizon]

    def measure(self, labels: dict[str, Tensor], centres: Tensor) -> Tensor:
        """Return centroids at the ends of segments, [B, M, H, 2] px, of centres [B, M, H * 3, N, 2] px."""
        return centroid(self._images(labels), centres[:, :, SEGMENT_FRAMES - 1 :: SEGMENT_FRAMES])

    def extrapolate(self, labels: dict[str, Tensor], context: Tensor, horizon: int) -> Tensor:
        """Continue the motion of the pixels' centroid, reflected as digits are: [B, 3, 1, H, W] -> [B, H, 2] px."""
        seen = pixel_centroid(context[:, :, 0])
        frames = SEGMENT_FRAMES * torch.arange(1, horizon + 1, device=context.device)
        straight = seen[:, -1:] + frames[:, None] * ((seen[:, -1] - seen[:, 0]) / (SEGMENT_FRAMES - 1))[:, None]
        return reflect(straight) if self.borders == "bounce" else straight

    def render(self, labels: dict[str, Tensor], centres: Tensor) -> Tensor:
        """Draw centres [B, M, T, N, 2] px as float32 [B, M, T, 1, 64, 64] in [0, 1]."""
        num_samples = centres.shape[1]
        images = self._images(labels).repeat_interleave(num_samples, dim=0)
        return render_digits(images, centres.flatten(0, 1)).unflatten(0, (-1, num_samples))

    def origin(self, labels: dict[str, Tensor]) -> Tensor:
        """Return the centroid in the last context frame, [B, 2] px."""
        return labels["centroid"][:, SEGMENT_FRAMES - 1]

    def positions(self, labels: dict[str, Tensor], values: Tensor) -> Tensor:
        """Return the values themselves: the quantity is a position, [B, S, H, 2] px."""
        return values

    def probe_targets(self, labels: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the targets of probes; of several digits only the centroid of their ink, as they have no order."""
        targets = {"position": self.origin(labels)}
        if _per_digit(labels["digit"]).shape[1] > 1:
            return targets
        return targets | {
            "digit": _per_digit(labels["digit"])[:, 0],
            "velocity": labels["velocity"][:, SEGMENT_FRAMES - 1],
            "velocity_change": labels["kick"][:, SEGMENT_FRAMES],
        }

    def _images(self, labels: dict[str, Tensor]) -> Tensor:
        return self.sprites.images[_per_digit(labels["sprite"])]


def _per_digit(label: Tensor) -> Tensor:
    """Return a label [B] or [B, N] as [B, N]."""
    return label if label.ndim == 2 else label[:, None]


# ------------------------------------------------------------------------------------------------ written worlds


def write_kicked_mnist(
    out: Path,
    counts: Mapping[Split, int],
    *,
    num_frames: int = 60,
    num_digits: int = 1,
    borders: Borders = "bounce",
    mnist_dir: Path | None = None,
    seed: int = 0,
    num_processes: int,
    overwrite: bool = False,
) -> None:
    """Write videos with labels of videos and of frames, as H.264 files in out/train and so on.

    counts: videos per split; usually VIDEO_COUNTS.
    num_frames: frames in a video: a multiple of 3, at least 6.

    Raises:
        UserError: as write_digits; num_frames is not such a multiple.
    """
    if num_frames < MIN_FRAMES or num_frames % SEGMENT_FRAMES:
        raise UserError(f"num_frames={num_frames} must be a multiple of {SEGMENT_FRAMES}, at least {MIN_FRAMES}")

    def sample(sprites: Sprites, count: int, generator: torch.Generator) -> DrawnVideos:
        videos = sample_videos(sprites, count, num_digits, num_frames, borders, generator)

        def draw(rows: list[int]) -> Tensor:
            return render_digits(sprites.images[videos.sprite[rows]], videos.motion.centre[rows])

        return label_rows(sprites, videos), draw

    facts = {"world": WORLD, "borders": borders, "num_digits": num_digits, "num_frames": num_frames}
    write_digits(
        out, facts, counts, sample, mnist_dir=mnist_dir, seed=seed, num_processes=num_processes, overwrite=overwrite
    )


def label_rows(sprites: Sprites, videos: Videos) -> list[dict[str, Any]]:
    """Return the labels of each video. Those of frames are lists of numbers per frame (px and px/frame, to 1e-3)."""
    motion = videos.motion
    places = centroid(sprites.images[videos.sprite], motion.centre)
    frames = {"centroid": places, **{name: values.flatten(-2) for name, values in motion._asdict().items()}}
    single = videos.sprite.shape[1] == 1
    of_digits = {"sprite": videos.sprite, "digit": videos.digit, "base_speed": base_speed(videos.digit)}
    whole = {name: values[:, 0] if single else values for name, values in of_digits.items()}
    columns: dict[str, list] = {name: values.tolist() for name, values in whole.items()}
    columns |= {name: (values.double() * 1000).round().div(1000).tolist() for name, values in frames.items()}
    return [{name: values[row] for name, values in columns.items()} for row in range(len(videos))]
