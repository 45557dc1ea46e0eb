"""Occlusion: a digit moves to and fro behind a screen, or there is no digit.

The screen is a vertical bar of grey over the whole height, in the middle of the canvas. A digit moves along a row at a
constant speed, is reflected at the left and right borders, and passes behind the screen. At each reflection it gets a
new speed, uniform in SPEEDS_PX: that is all that is random after the first frame. EMPTY_SHARE of the videos show the
screen alone.

The screen hides a whole sprite for at least one frame of each passage, so that a change behind it cannot be seen. It
hides no digit for as long as a segment of SEGMENT_FRAMES frames, so that each segment of a video with a digit shows
some of it. `sample_pairs` draws videos that are possible or impossible and have the same frames until the digit has to
come out:

- vanish: the digit does not come out.
- change: a digit of another class comes out, at the time and the place of the first.
- appearance: a digit comes out although none went in; the possible video shows the screen alone.

Coordinates are (x, y) in pixels, y down. Dimensions: B videos, T frames.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from data_pipelines.errors import UserError
from data_pipelines.splits import Split
from data_pipelines.worlds.digits import CANVAS_PX, SPRITE_PX, Sprites, render
from data_pipelines.worlds.kicked_mnist import HIGH_PX, LOW_PX
from data_pipelines.worlds.planted import another_class
from data_pipelines.worlds.written import DrawnVideos, write_digits

WORLD = "occlusion"
SEGMENT_FRAMES = 6
SPEEDS_PX = (3.0, 4.0)  # px/frame
SCREEN_PX = 20  # width: that of a sprite, and the longest way of a frame
SCREEN_GREY = 0.5
SCREEN = slice((CANVAS_PX - SCREEN_PX) // 2, (CANVAS_PX + SCREEN_PX) // 2)  # columns
MIDDLE_PX = (CANVAS_PX - 1) / 2
EMPTY_SHARE = 0.25

MIN_FRAMES = 2 * SEGMENT_FRAMES
BEFORE_FRAMES = AFTER_FRAMES = 2 * SEGMENT_FRAMES  # of a pair: until the digit is hidden, and after it

Event = Literal["vanish", "change", "appearance"]
EVENTS: tuple[Event, ...] = get_args(Event)


@dataclass(frozen=True)
class Videos:
    """B videos without pixels: sprite int64 [B], a row of Sprites; shown bool [B, T]; centre [B, T, 2] px.

    A digit that is not shown has a sprite and a centre, but is not drawn.
    """

    sprite: Tensor
    shown: Tensor
    centre: Tensor

    def __len__(self) -> int:
        return len(self.sprite)


def sample_videos(sprites: Sprites, count: int, num_frames: int, generator: torch.Generator) -> Videos:
    """Draw `count` videos of `num_frames` frames. No digit is behind the screen in its first frame."""
    sprite = torch.randint(len(sprites), (count,), generator=generator)
    shown = torch.rand(count, generator=generator) >= EMPTY_SHARE
    way = SCREEN.start - SPRITE_PX  # px, of centres between a border and the screen
    side, heading = (torch.randint(2, (2, count), generator=generator) * 2.0 - 1).unbind()
    x = MIDDLE_PX + side * (HIGH_PX - MIDDLE_PX - way * torch.rand(count, generator=generator))
    y = LOW_PX + (HIGH_PX - LOW_PX) * torch.rand(count, generator=generator)
    velocity = heading * _speeds(count, generator)
    columns = [x]
    for _ in range(num_frames - 1):
        x, velocity = _move(x, velocity, _speeds(count, generator))
        columns.append(x)
    across = torch.stack(columns, dim=1)
    centre = torch.stack([across, y[:, None].expand_as(across)], dim=-1)
    return Videos(sprite, shown[:, None].expand(-1, num_frames), centre)


def _speeds(count: int, generator: torch.Generator) -> Tensor:
    low, high = SPEEDS_PX
    return low + (high - low) * torch.rand(count, generator=generator)


def _move(x: Tensor, velocity: Tensor, new_speed: Tensor) -> tuple[Tensor, Tensor]:
    """Move places [B] by a frame, and return them with their velocities; a reflected one gets its new speed [B]."""
    moved = x + velocity
    beyond = (moved - moved.clamp(LOW_PX, HIGH_PX)).abs()
    reflected = beyond > 0
    back = -velocity.sign() * new_speed
    # The rest of the frame's way, as a share of it, is passed at the new speed.
    inside = moved.clamp(LOW_PX, HIGH_PX) + back * beyond / velocity.abs()
    return torch.where(reflected, inside, moved), torch.where(reflected, back, velocity)


def render_videos(sprites: Sprites, videos: Videos) -> Tensor:
    """Draw videos: float32 [B, T, 1, 64, 64] in [0, 1]."""
    frames = render(sprites.images[videos.sprite], videos.centre) * videos.shown[:, :, None, None, None]
    frames[..., SCREEN] = SCREEN_GREY
    return frames


# ------------------------------------------------------------------------------------------------------------ pairs


@dataclass(frozen=True)
class Pairs:
    """B pairs of videos float32 [B, T, 1, 64, 64] in [0, 1], with the same frames up to `hidden`.

    In the frame `hidden`, a digit of either video is wholly behind the screen.
    """

    possible: Tensor
    impossible: Tensor
    hidden: int


def sample_pairs(event: Event, sprites: Sprites, count: int, generator: torch.Generator) -> Pairs:
    """Draw `count` pairs of BEFORE_FRAMES + AFTER_FRAMES frames, around a passage behind the screen."""
    length = BEFORE_FRAMES + AFTER_FRAMES
    # A digit needs at most two ways across to a passage after BEFORE_FRAMES frames.
    drawn = sample_videos(sprites, count, 2 * length + AFTER_FRAMES, generator)
    distance = (drawn.centre[..., 0] - MIDDLE_PX).abs()
    behind = distance <= (SCREEN_PX - SPRITE_PX) / 2
    behind[:, :BEFORE_FRAMES] = False
    hidden = behind.int().argmax(dim=1)  # the first
    rows = torch.arange(count)[:, None]
    centre = drawn.centre[rows, hidden[:, None] + torch.arange(-BEFORE_FRAMES, AFTER_FRAMES)]
    other = another_class(sprites, sprites.digits[drawn.sprite][:, None], generator)[:, 0]
    before = (torch.arange(length) <= BEFORE_FRAMES).expand(count, -1)
    always, never = torch.ones_like(before), torch.zeros_like(before)
    passing = render_videos(sprites, Videos(drawn.sprite, always, centre))
    if event == "vanish":
        impossible = render_videos(sprites, Videos(drawn.sprite, before, centre))
    elif event == "change":
        changed = render_videos(sprites, Videos(other, always, centre))
        impossible = torch.where(before[:, :, None, None, None], passing, changed)
    else:
        impossible = render_videos(sprites, Videos(drawn.sprite, ~before, centre))
        passing = render_videos(sprites, Videos(drawn.sprite, never, centre))
    return Pairs(passing, impossible, BEFORE_FRAMES)


# ------------------------------------------------------------------------------------------------ written worlds


def write_occlusion(
    out: Path,
    counts: Mapping[Split, int],
    *,
    num_frames: int = 60,
    mnist_dir: Path | None = None,
    seed: int = 0,
    num_processes: int,
    overwrite: bool = False,
) -> None:
    """Write possible videos as H.264 files in out/train and so on, with the class of each digit, -1 for none.

    counts: videos per split.
    num_frames: frames in a video, at least MIN_FRAMES.

    Raises:
        UserError: as write_digits; num_frames is below MIN_FRAMES.
    """
    if num_frames < MIN_FRAMES:
        raise UserError(f"num_frames={num_frames} must be at least {MIN_FRAMES}")

    def sample(sprites: Sprites, count: int, generator: torch.Generator) -> DrawnVideos:
        videos = sample_videos(sprites, count, num_frames, generator)

        def draw(rows: list[int]) -> Tensor:
            return render_videos(sprites, Videos(videos.sprite[rows], videos.shown[rows], videos.centre[rows]))

        return label_rows(sprites, videos), draw

    facts = {"world": WORLD, "num_frames": num_frames}
    write_digits(
        out, facts, counts, sample, mnist_dir=mnist_dir, seed=seed, num_processes=num_processes, overwrite=overwrite
    )


def label_rows(sprites: Sprites, videos: Videos) -> list[dict[str, Any]]:
    """Return the labels of each video: the class of its digit; -1 without a digit."""
    digit = torch.where(videos.shown[:, 0], sprites.digits[videos.sprite], -1)
    return [{"digit": value} for value in digit.tolist()]
