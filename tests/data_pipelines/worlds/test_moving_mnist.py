import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_pipelines.batches import Batch
from data_pipelines.decoders import read_frames
from data_pipelines.errors import UserError
from data_pipelines.splits import SPLITS, Split
from data_pipelines.worlds.digits import Sprites, load_sprites, render
from data_pipelines.worlds.moving_mnist import (
    MovingMnistLaw,
    MovingMnistStream,
    centre_path,
    centroid_velocity,
    last_context_centre,
    sample_law,
    sample_trajectories,
    write_moving_mnist,
)
from data_pipelines.worlds.written import read_sprites
from worldmodel.evaluation.scores import energy_score

MNIST = Path(__file__).resolve().parents[4] / "shared" / "data" / "mnist"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def sprites() -> Sprites:
    return load_sprites("test")


def test_splits_share_no_identity() -> None:
    images = {split: {image.numpy().tobytes() for image in load_sprites(split).images} for split in SPLITS}
    assert [len(load_sprites(split)) for split in SPLITS] == [1297, 250, 250]
    assert not images["train"] & images["selection"]
    assert not images["train"] & images["test"]
    assert not images["selection"] & images["test"]


def test_the_law_of_setting_a(sprites: Sprites) -> None:
    """One axis changes by a normal factor of standard deviation 2/3, either axis with probability 1/2."""
    t = sample_trajectories(sprites, 50_000, "A", generator())
    assert t.centre.min() >= 8 and t.centre.max() <= 16
    assert t.velocity.min() >= 0 and t.velocity.max() <= 3
    assert t.velocity.mean().item() == pytest.approx(1.5, abs=0.02)
    assert t.axis.float().mean().item() == pytest.approx(0.5, abs=0.01)
    rows = torch.arange(len(t))
    assert torch.equal(t.velocity_after[rows, 1 - t.axis], t.velocity[rows, 1 - t.axis])
    factor = (t.velocity_after / t.velocity)[rows, t.axis]
    assert factor.mean().item() == pytest.approx(1, abs=0.02)
    assert factor.std().item() == pytest.approx(2 / 3, abs=0.01)


def test_in_setting_b_the_digit_tells_the_axis(sprites: Sprites) -> None:
    t = sample_trajectories(sprites, 50_000, "B", generator())
    for digit in (0, 4, 9):
        share_y = t.axis[t.digit == digit].float().mean().item()
        assert share_y == pytest.approx(0.1 + 0.8 * digit / 9, abs=0.03)


def test_fresh_draws_follow_the_law_of_their_own_state() -> None:
    velocity = torch.tensor([[3.0, 0.0], [1.0, 2.0]])
    draws = sample_law(velocity, torch.tensor([0, 0]), 20_000, "A", generator())
    assert torch.equal(draws[0, :, 1], torch.zeros(20_000))
    changed = draws[1, :, 0] != 1
    assert changed.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert draws[1, changed, 0].std().item() == pytest.approx(2 / 3, abs=0.02)


def test_paths_are_straight_with_one_bend(sprites: Sprites) -> None:
    t = sample_trajectories(sprites, 5, "A", generator())
    path = centre_path(t)
    step = path.diff(dim=1)
    torch.testing.assert_close(path[:, 0], t.centre)
    torch.testing.assert_close(path[:, 2], last_context_centre(t.labels()))
    torch.testing.assert_close(step[:, :2], t.velocity[:, None].expand(-1, 2, -1))
    torch.testing.assert_close(step[:, 2:], t.velocity_after[:, None].expand(-1, 6, -1))


def test_placement_equals_grid_sample(sprites: Sprites) -> None:
    """An independent bilinear sampler: canvas pixel p reads the sprite at p - (c - 7.5)."""
    centres = torch.tensor([[[20.3, 11.7], [61.2, 63.9]], [[8.0, 8.5], [-3.4, 30.0]]])
    images = sprites.images[:2]
    grid_y, grid_x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    drawn = render(images, centres)
    for b in range(2):
        for t in range(2):
            at = torch.stack([grid_x, grid_y], dim=-1) - (centres[b, t] - 7.5)
            normalised = (at + 0.5) / 16 * 2 - 1
            expected = F.grid_sample(images[b][None, None], normalised[None], padding_mode="zeros", align_corners=False)
            torch.testing.assert_close(drawn[b, t], expected[0], atol=1e-5, rtol=0)


def test_a_digit_on_whole_pixels_is_copied(sprites: Sprites) -> None:
    canvas = render(sprites.images[:1], torch.tensor([[[20.5, 30.5]]]))[0, 0, 0]
    torch.testing.assert_close(canvas[23:39, 13:29], sprites.images[0])
    assert canvas.sum().item() == pytest.approx(sprites.images[0].sum().item(), rel=1e-5)


def test_velocity_is_seen_in_the_pixels(sprites: Sprites) -> None:
    t = sample_trajectories(sprites, 64, "A", generator())
    context = render(sprites.images[t.sprite], centre_path(t)[:, :3])
    torch.testing.assert_close(centroid_velocity(context), t.velocity, atol=1e-4, rtol=0)


def test_target_segments_of_the_true_future_are_the_clip(sprites: Sprites) -> None:
    t = sample_trajectories(sprites, 4, "A", generator())
    whole = render(sprites.images[t.sprite], centre_path(t))
    law = MovingMnistLaw("A", sprites)
    true_path = centre_path(t)[:, None, 3:6, None]
    torch.testing.assert_close(law.render(t.labels(), true_path)[:, 0], whole[:, 3:6])
    torch.testing.assert_close(law.measure(t.labels(), true_path)[:, 0], law.truth(t.labels(), 1))
    ends = law.positions(t.labels(), law.truth(t.labels(), 1)[:, None])
    torch.testing.assert_close(ends[:, 0, 0], true_path[:, 0, -1, 0])


def test_batches_are_a_function_of_seed_and_number_and_ranks_share_them(sprites: Sprites) -> None:
    def first_batches(start: int, seed: int = 1, rank: int = 0, world_size: int = 1) -> list[Batch]:
        stream = MovingMnistStream(
            sprites, setting="A", batch_size=8, seed=seed, rank=rank, world_size=world_size
        ).batches(start)
        return [next(stream) for _ in range(3)]

    whole = first_batches(0)
    assert torch.equal(first_batches(2)[0]["video"], whole[2]["video"])
    assert not torch.equal(whole[0]["video"], whole[1]["video"])
    assert not torch.equal(first_batches(0, seed=2)[0]["video"], whole[0]["video"])
    halves = [first_batches(0, rank=rank, world_size=2)[1] for rank in (0, 1)]
    assert torch.equal(torch.cat([half["video"] for half in halves]), whole[1]["video"])
    assert torch.equal(torch.cat([half["clip_id"] for half in halves]), whole[1]["clip_id"])


@pytest.mark.skipif(not MNIST.is_dir(), reason="MNIST is not on this machine")
@pytest.mark.slow
def test_published_oracle_and_pixel_constant_velocity() -> None:
    """Published for 1,024 queries: simulator oracle 0.610, pixel constant velocity 0.797. More queries, less noise."""
    sprites = load_sprites("test", MNIST)
    t = sample_trajectories(sprites, 8192, "A", generator())
    law = MovingMnistLaw("A", sprites)
    draws, forecasts = (
        law.measure(t.labels(), law.sample(t.labels(), 1, count, generator(seed)))[:, :, 0]
        for count, seed in ((128, 1), (64, 2))
    )
    oracle = energy_score(forecasts, draws).mean().item()
    seen = torch.cat(
        [
            centroid_velocity(render(sprites.images[part], path))
            for part, path in zip(t.sprite.split(1024), centre_path(t)[:, :3].split(1024), strict=True)
        ]
    )
    constant = energy_score(seen[:, None], draws).mean().item()
    assert oracle == pytest.approx(0.61, abs=0.01)
    assert constant == pytest.approx(0.80, abs=0.02)


@pytest.mark.skipif(not MNIST.is_dir(), reason="MNIST is not on this machine")
def test_mnist_splits() -> None:
    assert [len(load_sprites(split, MNIST)) for split in SPLITS] == [50_000, 10_000, 10_000]
    sprites = load_sprites("test", MNIST)
    assert sprites.images.shape[1:] == (16, 16) and sprites.images.min() >= 0 and sprites.images.max() <= 1
    assert sprites.digits[:5].tolist() == [7, 2, 1, 0, 4]


def write_idx(path: Path, array: np.ndarray, *, cut: int = 0) -> None:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content[: len(content) - cut]))


def test_mnist_files_that_are_missing_cut_or_no_idx(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no t10k-images-idx3-ubyte"):
        load_sprites("test", tmp_path)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", np.zeros((3, 28, 28), np.uint8), cut=5)
    with pytest.raises(UserError, match="truncated"):
        load_sprites("test", tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="not a readable gzip"):
        load_sprites("test", tmp_path)


def test_a_written_world_holds_what_its_labels_say(world: Path) -> None:
    rows = [json.loads(line) for line in (world / "test" / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and next(iter(rows[0])) == "file_name"
    sprites = read_sprites(world / "test")
    for row in rows[:4]:
        frames = np.stack(list(read_frames(world / "test" / row["file_name"], channels=1, size_px=None)))
        centre, before, after = (torch.tensor([row[key]]) for key in ("centre", "velocity", "velocity_after"))
        context = centre[:, None] + torch.arange(3)[:, None] * before
        later = context[:, -1:] + torch.arange(1, 7)[:, None] * after
        drawn = render(sprites.images[row["sprite"]][None], torch.cat([context, later], dim=1))[0]
        error = np.abs(frames / 255 - drawn.numpy())
        assert frames.shape == (9, 1, 64, 64)
        assert error.mean() < 0.01 and error.max() < 0.25  # H.264 is lossy


def test_writing_goes_on_where_it_stopped_and_refuses_other_parameters(tmp_path: Path) -> None:
    counts: dict[Split, int] = {"train": 3, "selection": 2, "test": 2}
    write_moving_mnist(tmp_path / "w", counts, num_processes=1)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "w").rglob("*.mp4")}
    lost = tmp_path / "w" / "train" / "000001.mp4"
    content = lost.read_bytes()
    lost.unlink()
    (tmp_path / "w" / "train" / "metadata.jsonl").unlink()
    write_moving_mnist(tmp_path / "w", counts, num_processes=1)
    assert lost.read_bytes() == content
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items() if path != lost)
    with pytest.raises(UserError, match="other parameters"):
        write_moving_mnist(tmp_path / "w", counts, seed=1, num_processes=1)
    with pytest.raises(UserError, match="does not hold a world"):
        write_moving_mnist(tmp_path, counts, num_processes=1)
