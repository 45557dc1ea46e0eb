"""Impossible events planted in the kicked world, to test their detection: one per video, at a segment boundary.

- teleport: digits jump by half the distance between the borders, along both axes.
- freeze: digits stop for FREEZE_SEGMENTS segments and then continue.
- appearance: one more digit appears from one frame to the next.
- digit_change: each digit turns into one of another class, with the same position and velocity.

Each segment alone could be part of a video of this world, except those with an additional digit or a digit at rest.
Only the two sides of the boundary do not fit. After the event the law of the world holds again.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from data_pipelines.worlds.digits import Sprites
from data_pipelines.worlds.kicked_mnist import HIGH_PX, LOW_PX, Videos, render_digits, sample_videos, simulate
from data_pipelines.worlds.moving_mnist import SEGMENT_FRAMES

Event = Literal["teleport", "freeze", "appearance", "digit_change"]
EVENTS: tuple[Event, ...] = get_args(Event)
FREEZE_SEGMENTS = 3


@dataclass(frozen=True)
class Planted:
    """video float32 [B, T, 1, 64, 64] in [0, 1]; `frame` is the first that cannot follow the one before it.

    Frames up to `last` show something that the law excludes.
    """

    video: Tensor
    frame: int
    last: int


def plant(event: Event, sprites: Sprites, videos: Videos, frame: int, generator: torch.Generator) -> Planted:
    """Plant an event at `frame` of each of B videos with bouncing borders; the law draws the frames after it.

    frame: a multiple of the frames in a segment, neither the first frame nor beyond the last.
    """
    centres, velocities = videos.motion.centre, videos.motion.velocity
    num_frames = centres.shape[1]
    assert 0 < frame < num_frames and frame % SEGMENT_FRAMES == 0, (frame, num_frames)
    centre, velocity = centres[:, frame - 1], velocities[:, frame - 1]
    sprite, digit, last, still = videos.sprite, videos.digit, frame, 0
    if event == "teleport":
        centre = jump(centre)
    elif event == "freeze":
        still = min(FREEZE_SEGMENTS * SEGMENT_FRAMES, num_frames - frame)
        last = min(frame + still, num_frames - 1)  # the first frame that moves again
    elif event == "appearance":
        more = sample_videos(sprites, len(videos), 1, 2 * SEGMENT_FRAMES, "bounce", generator)
        sprite, digit = torch.cat([sprite, more.sprite], dim=1), torch.cat([digit, more.digit], dim=1)
        centre = torch.cat([centre, more.motion.centre[:, -1]], dim=1)
        velocity = torch.cat([velocity, more.motion.velocity[:, -1]], dim=1)
        last = num_frames - 1
    else:
        sprite = another_class(sprites, digit, generator)
        digit = sprites.digits[sprite]
    at_rest = centre[:, None].expand(-1, still, -1, -1)
    rest = num_frames - frame
    moving = simulate(centre, velocity, digit, rest // SEGMENT_FRAMES, "bounce", generator).centre
    after = torch.cat([at_rest, moving], dim=1)[:, :rest]
    parts = [
        render_digits(sprites.images[videos.sprite], centres[:, :frame]),
        render_digits(sprites.images[sprite], after),
    ]
    return Planted(torch.cat(parts, dim=1), frame, last)


def jump(centre: Tensor) -> Tensor:
    """Move centres [..., 2] px by half the distance between the borders along both axes."""
    span = HIGH_PX - LOW_PX
    return LOW_PX + (centre - LOW_PX + span / 2).remainder(span)


def another_class(sprites: Sprites, digit: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a sprite of another class for each class int64 [B, N], uniformly: int64 [B, N]."""
    others = (sprites.digits != digit[..., None]).float()
    return torch.multinomial(others.flatten(0, 1), 1, generator=generator).view(digit.shape)
