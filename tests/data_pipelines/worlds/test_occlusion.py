import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipelines.decoders import read_frames
from data_pipelines.errors import UserError
from data_pipelines.worlds.digits import SPRITE_PX, Sprites, load_sprites
from data_pipelines.worlds.kicked_mnist import HIGH_PX, LOW_PX
from data_pipelines.worlds.occlusion import (
    EMPTY_SHARE,
    EVENTS,
    MIDDLE_PX,
    SCREEN,
    SCREEN_GREY,
    SCREEN_PX,
    SEGMENT_FRAMES,
    SPEEDS_PX,
    Event,
    Pairs,
    render_videos,
    sample_pairs,
    sample_videos,
    write_occlusion,
)
from worldmodel.commands import main


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def sprites() -> Sprites:
    return load_sprites("test")


def ink(video: Tensor) -> Tensor:
    """The ink next to the screen in each frame: [B, T, 1, H, W] -> [B, T]."""
    outside = video.clone()
    outside[..., SCREEN] = 0
    return outside.sum(dim=(2, 3, 4))


def test_digits_move_along_a_row_at_speeds_that_change_at_the_borders_alone(sprites: Sprites) -> None:
    videos = sample_videos(sprites, 200, 120, generator())
    x, y = videos.centre.unbind(-1)
    assert torch.equal(y, y[:, :1].expand_as(y)) and y.min() >= LOW_PX and y.max() <= HIGH_PX
    steps = x.diff(dim=1)
    low, high = SPEEDS_PX
    turned = steps[:, 1:].sign() != steps[:, :-1].sign()
    near = torch.minimum(x - LOW_PX, HIGH_PX - x) <= high
    assert x.min() >= LOW_PX and x.max() <= HIGH_PX
    inside = ~near[:, 1:-1]
    torch.testing.assert_close(steps[:, 1:][inside], steps[:, :-1][inside], atol=1e-4, rtol=0)
    assert steps[:, :-1][inside].abs().min() >= low - 1e-4 and steps[:, :-1][inside].abs().max() <= high + 1e-4
    assert turned.any() and near[:, 1:-1][turned].all()
    speeds = steps[:, :-1][inside].abs()
    assert float(speeds.mean()) == pytest.approx((low + high) / 2, abs=0.03)  # both speeds were drawn uniformly


def test_a_quarter_of_the_videos_show_the_screen_alone(sprites: Sprites) -> None:
    videos = sample_videos(sprites, 4000, 2, generator())
    assert float((~videos.shown).float().mean()) == pytest.approx(EMPTY_SHARE, abs=0.02)
    video = render_videos(sprites, sample_videos(sprites, 40, 24, generator(1)))
    assert (video[..., SCREEN] == SCREEN_GREY).all()
    shown = sample_videos(sprites, 40, 24, generator(1)).shown[:, 0]
    assert (ink(video)[~shown] == 0).all() and (ink(video)[shown, 0] > 20).all()


def test_the_screen_hides_every_digit_once_a_passage_and_none_for_a_segment(sprites: Sprites) -> None:
    assert SPRITE_PX + SPEEDS_PX[1] <= SCREEN_PX
    hidden = 0
    for split in ("train", "selection", "test"):
        digits = load_sprites(split)
        columns = (digits.images.amax(dim=1) > 0).int()
        narrowest = int((SPRITE_PX - columns.argmax(dim=1) - columns.flip(1).argmax(dim=1)).min())
        hidden = max(hidden, int((SCREEN_PX - narrowest) / SPEEDS_PX[0]) + 1)
    assert hidden < SEGMENT_FRAMES
    videos = sample_videos(sprites, 100, 60, generator())
    behind = ink(render_videos(sprites, videos))[videos.shown[:, 0]] < 1e-6
    assert behind.any(dim=1).all()
    runs = behind.unfold(1, SEGMENT_FRAMES, 1).all(dim=2)
    assert not runs.any()


@pytest.fixture(scope="module")
def pairs(sprites: Sprites) -> dict[str, Pairs]:
    return {event: sample_pairs(event, sprites, 32, generator(3)) for event in EVENTS}


@pytest.mark.parametrize("event", EVENTS)
def test_the_videos_of_a_pair_differ_only_after_the_digit_is_hidden(event: Event, pairs: dict[str, Pairs]) -> None:
    pair = pairs[event]
    assert torch.equal(pair.possible[:, : pair.hidden + 1], pair.impossible[:, : pair.hidden + 1])
    differs = (pair.possible - pair.impossible).abs().amax(dim=(2, 3, 4)) > 0.1
    assert differs[:, pair.hidden : pair.hidden + SEGMENT_FRAMES].any(dim=1).all()
    for video in (pair.possible, pair.impossible):
        assert (ink(video)[:, pair.hidden] < 1e-6).all() and (video[..., SCREEN] == SCREEN_GREY).all()


def test_what_comes_out(pairs: dict[str, Pairs]) -> None:
    hidden = pairs["vanish"].hidden
    for event, (possible, impossible) in {
        "vanish": ((True, True), (True, False)),
        "change": ((True, True), (True, True)),
        "appearance": ((False, False), (False, True)),
    }.items():
        for video, (before, after) in ((pairs[event].possible, possible), (pairs[event].impossible, impossible)):
            seen = ink(video) > 5
            assert (seen[:, hidden - 5] == before).all() and (seen[:, hidden + 5] == after).all()


def test_a_changed_digit_comes_out_where_and_when_the_first_would(sprites: Sprites, pairs: dict[str, Pairs]) -> None:
    pair = pairs["change"]
    outside = [video.clone() for video in (pair.possible, pair.impossible)]
    for video in outside:
        video[..., SCREEN] = 0
    columns = [video[:, -SEGMENT_FRAMES:, 0].sum(dim=2) for video in outside]
    along = torch.arange(64.0)
    centres = [(each * along).sum(dim=-1) / each.sum(dim=-1) for each in columns]
    assert (centres[0] - centres[1]).abs().max() < 5 and MIDDLE_PX == 31.5
    assert ((outside[0] - outside[1]).abs()[:, -SEGMENT_FRAMES:].sum(dim=(1, 2, 3, 4)) > 10).all()


def test_pairs_are_a_function_of_the_generator(sprites: Sprites) -> None:
    first, again, other = (sample_pairs("change", sprites, 4, generator(seed)).impossible for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_written_videos_are_those_that_are_drawn(sprites: Sprites, occlusion_world: Path) -> None:
    videos = sample_videos(sprites, 4, 24, generator(2))
    folder = occlusion_world / "test"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row, sprite, shown, pixels in zip(
        rows, videos.sprite, videos.shown, render_videos(sprites, videos), strict=True
    ):
        frames = np.stack(list(read_frames(folder / row["file_name"], channels=1, size_px=64)))
        assert np.abs(frames / 255 - pixels.numpy()).max() < 0.01
        assert row["digit"] == (int(sprites.digits[sprite]) if shown[0] else -1)


def test_videos_that_are_too_short_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="num_frames=11 must be at least 12"):
        write_occlusion(tmp_path / "out", {"train": 1, "selection": 1, "test": 1}, num_frames=11, num_processes=1)
    with pytest.raises(SystemExit) as ended:
        main.main(["videos", "occlusion", "--num-digits", "2", "--out", str(tmp_path / "out")])
    assert ended.value.code == 2 and "--num-digits 2 is not an option of occlusion" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
