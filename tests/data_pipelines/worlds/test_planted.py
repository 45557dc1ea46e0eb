import pytest
import torch
from torch import Tensor

from data_pipelines.worlds.digits import Sprites, load_sprites, pixel_centroid
from data_pipelines.worlds.kicked_mnist import HIGH_PX, LOW_PX, Videos, render_digits, sample_videos
from data_pipelines.worlds.planted import EVENTS, Event, another_class, jump, plant

FRAME = 9


@pytest.fixture(scope="module")
def sprites() -> Sprites:
    return load_sprites("test")


def plain(sprites: Sprites, count: int = 8, num_frames: int = 30) -> tuple[Videos, Tensor]:
    videos = sample_videos(sprites, count, 1, num_frames, "bounce", torch.Generator().manual_seed(0))
    return videos, render_digits(sprites.images[videos.sprite], videos.motion.centre)


def steps_px(video: Tensor) -> Tensor:
    """How far the centroid of the ink moves from each frame to the next: [B, T - 1]."""
    return pixel_centroid(video[:, :, 0]).diff(dim=1).norm(dim=-1)


def planted(event: Event, sprites: Sprites, frame: int = FRAME) -> tuple[Tensor, Tensor, int]:
    """The video without the event, the one with it, and the last frame that is not of the law."""
    videos, before = plain(sprites)
    result = plant(event, sprites, videos, frame, torch.Generator().manual_seed(1))
    assert result.frame == frame and result.video.shape == before.shape
    return before, result.video, result.last


@pytest.mark.parametrize("event", EVENTS)
def test_nothing_is_changed_before_the_event_and_all_of_it_at_the_event(event: Event, sprites: Sprites) -> None:
    before, after, _ = planted(event, sprites)
    assert torch.equal(before[:, :FRAME], after[:, :FRAME])
    changed = (before[:, FRAME] - after[:, FRAME]).abs().amax(dim=(1, 2, 3)) > 0.1
    assert changed.all()


def test_a_teleport_is_one_far_jump_between_motions_of_the_law(sprites: Sprites) -> None:
    _, video, last = planted("teleport", sprites)
    steps = steps_px(video)
    assert (steps[:, FRAME - 1] > 25).all()
    assert (steps[:, torch.arange(29) != FRAME - 1] < 15).all() and last == FRAME


def test_a_jump_stays_between_the_borders_and_is_its_own_inverse() -> None:
    places = LOW_PX + (HIGH_PX - LOW_PX) * torch.rand(100, 2, generator=torch.Generator().manual_seed(0))
    there = jump(places)
    assert ((there >= LOW_PX) & (there <= HIGH_PX)).all()
    torch.testing.assert_close((there - places).abs(), torch.full((100, 2), (HIGH_PX - LOW_PX) / 2))
    torch.testing.assert_close(jump(there), places)


def test_a_frozen_digit_stands_still_where_it_was_and_moves_on(sprites: Sprites) -> None:
    _, video, last = planted("freeze", sprites)
    steps = steps_px(video)
    assert last == FRAME + 9
    assert (steps[:, FRAME - 1 : last - 1] == 0).all()
    assert (steps[:, FRAME - 2] > 0).all() and (steps[:, last - 1] > 0).all()


def test_a_freeze_may_last_to_the_end(sprites: Sprites) -> None:
    _, video, last = planted("freeze", sprites, frame=24)
    assert (steps_px(video)[:, 23:] == 0).all() and last == 29


def test_a_second_digit_appears_and_stays(sprites: Sprites) -> None:
    before, video, last = planted("appearance", sprites)
    ink, more = before.sum(dim=(2, 3, 4)), video.sum(dim=(2, 3, 4))
    assert (more[:, FRAME:] > 1.15 * ink[:, :1]).all() and last == 29


def test_a_digit_turns_into_one_of_another_class_that_goes_on_from_its_place(sprites: Sprites) -> None:
    _, video, last = planted("digit_change", sprites)
    assert (steps_px(video) < 15).all() and last == FRAME
    digit = torch.arange(10).repeat_interleave(40)[:, None]
    others = sprites.digits[another_class(sprites, digit, torch.Generator().manual_seed(0))]
    assert (others != digit).all() and others.shape == digit.shape
    assert len(others.unique()) == 10


def test_what_follows_is_a_function_of_the_generator(sprites: Sprites) -> None:
    videos, _ = plain(sprites)
    first, again, other = (
        plant("teleport", sprites, videos, FRAME, torch.Generator().manual_seed(seed)).video for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
