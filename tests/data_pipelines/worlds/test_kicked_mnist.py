import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.clips import ClipSpec
from data_pipelines.decoders import read_frames
from data_pipelines.formats.registry import load_videos
from data_pipelines.shards.packing import pack_videos
from data_pipelines.worlds.digits import Sprites, load_sprites, pixel_centroid
from data_pipelines.worlds.kicked_mnist import (
    BASE_SPEED_PX,
    HIGH_PX,
    LOW_PX,
    Borders,
    KickedMnistLaw,
    base_speed,
    centroid,
    label_rows,
    reflect,
    render_digits,
    sample_videos,
    simulate,
    write_kicked_mnist,
)
from tests.data_pipelines.streams import read_clips
from worldmodel.evaluation.scores import energy_score

HORIZON = 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def sprites() -> Sprites:
    return load_sprites("test")


@pytest.fixture(scope="module")
def kicked_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kicked") / "world"
    write_kicked_mnist(root, {"train": 4, "selection": 2, "test": 3}, num_frames=18, num_processes=1)
    return root


def test_a_kick_changes_one_axis_around_the_base_speed() -> None:
    digit = torch.full((40_000, 1), 6)
    velocity = torch.tensor([[[0.4, -2.5]]]).expand(40_000, 1, 2)
    motion = simulate(torch.full((40_000, 1, 2), 30.0), velocity, digit, 1, "crop", generator())
    after = motion.velocity[:, 0, 0]
    x_kicked, y_kicked = after[:, 0] != 0.4, after[:, 1] != -2.5
    assert torch.equal(x_kicked, ~y_kicked)
    assert x_kicked.float().mean().item() == pytest.approx(0.5, abs=0.01)
    speed = BASE_SPEED_PX[6]
    assert after[x_kicked, 0].mean().item() == pytest.approx(speed, abs=0.02)
    assert after[x_kicked, 0].std().item() == pytest.approx(2 / 3 * speed, abs=0.02)
    assert after[y_kicked, 1].mean().item() == pytest.approx(-speed, abs=0.02)
    torch.testing.assert_close(motion.kick[:, 2, 0], after - velocity[:, 0])


def test_speeds_do_not_die_out(sprites: Sprites) -> None:
    videos = sample_videos(sprites, 4_000, 1, 180, "bounce", generator())
    speed = videos.motion.velocity.abs()[:, :, 0].mean(dim=-1) / base_speed(videos.digit)
    assert speed[:, -1].mean().item() == pytest.approx(speed[:, 0].mean().item(), abs=0.03)


@pytest.mark.parametrize("borders", ["bounce", "crop"])
def test_motion_is_steady_within_segments_and_keeps_to_its_borders(sprites: Sprites, borders: Borders) -> None:
    videos = sample_videos(sprites, 300, 2, 60, borders, generator())
    centre, velocity = videos.motion.centre, videos.motion.velocity
    assert centre.shape == (300, 60, 2, 2) and videos.digit.shape == (300, 2)
    inside = (centre >= LOW_PX).all() and (centre <= HIGH_PX).all()
    assert inside == (borders == "bounce")
    within = torch.arange(59) % 3 != 2  # from a frame to the next one of the same segment
    moved = centre[:, :-1] + velocity[:, :-1]
    expected = reflect(moved) if borders == "bounce" else moved
    torch.testing.assert_close(centre[:, 1:][:, within], expected[:, within], atol=1e-4, rtol=0)
    assert (centre[:, 1:] - expected)[:, ~within].abs().max() > 0.5


def test_reflection_folds_a_straight_path_back() -> None:
    ahead = torch.tensor([LOW_PX - 1, HIGH_PX + 2, 30.0, HIGH_PX + (HIGH_PX - LOW_PX) + 3])
    torch.testing.assert_close(reflect(ahead), torch.tensor([LOW_PX + 1, HIGH_PX - 2, 30.0, LOW_PX + 3]))


@pytest.mark.parametrize("num_digits", [1, 2])
def test_the_centroid_is_where_the_pixels_have_it(sprites: Sprites, num_digits: int) -> None:
    videos = sample_videos(sprites, 200, num_digits, 6, "bounce", generator(1))
    images = sprites.images[videos.sprite]
    apart = torch.ones(200, dtype=torch.bool)
    if num_digits == 2:  # where digits overlap, ink is clipped
        apart = (videos.motion.centre[:, :, 0] - videos.motion.centre[:, :, 1]).abs().amax(dim=-1).amin(dim=1) > 16
    drawn = render_digits(images, videos.motion.centre)[:, :, 0]
    said = centroid(images, videos.motion.centre)
    assert apart.sum() > 50
    torch.testing.assert_close(pixel_centroid(drawn)[apart], said[apart], atol=1e-3, rtol=0)


def labels_of(sprites: Sprites, count: int) -> dict[str, torch.Tensor]:
    rows = label_rows(sprites, sample_videos(sprites, count, 1, 3 * (HORIZON + 1), "bounce", generator(2)))
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def test_the_law_is_that_of_the_world_and_no_forecast_beats_it(sprites: Sprites) -> None:
    """Draws of the law are as far from each other as from what happened, at every horizon."""
    labels = labels_of(sprites, 4_000)
    law = KickedMnistLaw("bounce", sprites)
    samples = law.measure(labels, law.sample(labels, HORIZON, 16, generator(3)))
    truth = law.truth(labels, HORIZON)
    assert samples.shape == (4_000, 16, HORIZON, 2) and truth.shape == (4_000, HORIZON, 2)
    still = law.origin(labels)[:, None]
    for h in range(HORIZON):
        to_truth = (samples[:, :, h] - truth[:, None, h]).norm(dim=-1).mean().item()
        apart = (samples[:, :8, h] - samples[:, 8:, h]).norm(dim=-1).mean().item()
        assert to_truth == pytest.approx(apart, rel=0.03)
        scores = [energy_score(values, truth[:, None, h]).mean() for values in (samples[:, :, h], still)]
        assert scores[0] < scores[1]


def test_rendered_futures_are_the_video(sprites: Sprites) -> None:
    videos = sample_videos(sprites, 3, 2, 9, "bounce", generator(5))
    rows = label_rows(sprites, videos)
    labels = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    law = KickedMnistLaw("bounce", sprites)
    drawn = law.render(labels, videos.motion.centre[:, None, 3:])
    torch.testing.assert_close(drawn[:, 0], render_digits(sprites.images[videos.sprite], videos.motion.centre)[:, 3:])


def test_extrapolation_reads_the_pixels_and_reflects(sprites: Sprites) -> None:
    law = KickedMnistLaw("bounce", sprites)
    centres = torch.tensor([[[50.0, 20.0], [51.0, 22.0], [52.0, 24.0]]])
    context = render_digits(sprites.images[:1, None], centres[:, :, None])
    seen = pixel_centroid(context[:, -1:, 0])
    expected = reflect(seen + torch.tensor([[[3.0, 6.0], [6.0, 12.0]]]))
    torch.testing.assert_close(law.extrapolate({}, context, 2), expected, atol=1e-3, rtol=0)


def test_written_videos_hold_what_their_labels_say(kicked_world: Path) -> None:
    rows = [json.loads(line) for line in (kicked_world / "test" / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        frames = np.stack(list(read_frames(kicked_world / "test" / row["file_name"], channels=1, size_px=None)))
        assert frames.shape == (18, 1, 64, 64)
        seen = pixel_centroid(torch.from_numpy(frames[:, 0]).float() / 255)
        torch.testing.assert_close(seen, torch.tensor(row["centroid"]), atol=0.25, rtol=0)  # H.264 is lossy


def test_frame_labels_come_with_the_frames_of_each_clip_also_from_shards(kicked_world: Path, tmp_path: Path) -> None:
    lines = (kicked_world / "test" / "metadata.jsonl").read_text().splitlines()
    row_of = {row["file_name"]: row for row in map(json.loads, lines)}
    pack_videos(kicked_world / "test", tmp_path / "shards")
    for index in (load_videos(kicked_world / "test"), load_videos(str(tmp_path / "shards"))):
        [batch] = read_clips(index, ClipSpec(2, 3, clip_step=6), size_px=None, channels=1, batch_size=64)
        assert batch["labels"]["digit"].shape == (9,) and batch["labels"]["centre"].shape == (9, 6, 2)
        for clip, (video, start) in enumerate((video, start) for video in index.videos for start in (0, 6, 12)):
            row = row_of[video.path]
            assert batch["labels"]["digit"][clip] == row["digit"]
            expected = torch.tensor(row["centroid"][start : start + 6])
            torch.testing.assert_close(batch["labels"]["centroid"][clip], expected)
