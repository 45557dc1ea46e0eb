"""The encoder of deviations: its mean frame, its moments against numpy, and what can be read from its features."""

import numpy as np
import pytest
import torch
from torch import Tensor

from worldmodel.nets.deviation import EVEN, DeviationEncoder

SIZE = 32


def scene(positions: Tensor) -> Tensor:
    """A fixed texture with a soft dark blob at positions [B, T, 2] in px: [B, T, 3, H, W]."""
    generator = torch.Generator().manual_seed(0)
    texture = 0.4 + 0.5 * torch.rand(3, SIZE, SIZE, generator=generator)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    away = (x - positions[..., 0, None, None]) ** 2 + (y - positions[..., 1, None, None]) ** 2
    return texture * (1 - 0.9 * torch.exp(-away / 8)).unsqueeze(2)


def walks(count: int, seed: int) -> Tensor:
    """Straight motions of three frames, [B, 3, 2] in px."""
    generator = torch.Generator().manual_seed(seed)
    start = 6 + (SIZE - 12) * torch.rand(count, 1, 2, generator=generator)
    velocity = torch.randn(count, 1, 2, generator=generator)
    return start + velocity * torch.arange(-1, 2)[:, None]


def trained() -> DeviationEncoder:
    encoder = DeviationEncoder(3, 3, SIZE)
    for seed in range(20):
        encoder(scene(walks(64, seed)))
    return encoder.eval()


def test_the_mean_frame_is_that_of_all_batches_at_first_and_follows_later_ones() -> None:
    encoder = DeviationEncoder(1, 2, 4)
    batches = torch.rand(3, 5, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for batch in batches:
        encoder(batch)
    torch.testing.assert_close(encoder.mean_frame, batches.mean(dim=(0, 1, 2)))
    encoder.num_batches.fill_(10_000)
    before = encoder.mean_frame.clone()
    encoder(torch.ones(5, 2, 1, 4, 4))
    torch.testing.assert_close(encoder.mean_frame, before + 0.01 * (1 - before))
    encoder.eval()(torch.zeros(5, 2, 1, 4, 4))
    assert encoder.num_batches == 10_001


def test_features_are_the_moments_that_numpy_computes() -> None:
    encoder = DeviationEncoder(3, 2, 8).eval()
    encoder.mean_frame.copy_(torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1)))
    video = torch.rand(4, 2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    y, x = (grid.ravel() for grid in np.mgrid[-1:1:8j, -1:1:8j])
    expected = []
    for clip in video.numpy():
        for frame in clip:
            away = np.abs(frame - encoder.mean_frame.numpy()).mean(axis=0).ravel()
            for power in (2, 4):
                mass = (away / (away.max() + 0.01)) ** power
                share = (mass + EVEN / 64) / (mass + EVEN / 64).sum()
                expected.append([mass.mean(), *(share @ each for each in (x, y, x * x, x * y, y * y))])
    # Standardised by running statistics of an untrained encoder: mean 0 and variance 1, and batch norm's epsilon.
    found = encoder(video) * (1 + 1e-5) ** 0.5
    np.testing.assert_allclose(found.numpy(), np.reshape(expected, (4, 24)), atol=1e-5)


def test_position_and_velocity_are_linear_in_the_features() -> None:
    encoder = trained()
    features = {seed: encoder(scene(walks(400, seed))) for seed in (100, 101)}

    def with_one(values: Tensor) -> Tensor:
        return torch.cat([values, torch.ones(len(values), 1)], dim=1)

    for name, of in (("position", lambda walk: walk[:, 2]), ("velocity", lambda walk: walk[:, 2] - walk[:, 0])):
        weights = torch.linalg.lstsq(with_one(features[100]), of(walks(400, 100))).solution
        error = with_one(features[101]) @ weights - of(walks(400, 101))
        assert error.square().mean().sqrt() < 0.3, name  # px; frames have 32 of them


def test_frames_that_are_the_mean_have_their_centre_in_the_middle() -> None:
    encoder = DeviationEncoder(1, 1, 8).eval()
    mass, x, y, xx, xy, yy = encoder(torch.zeros(1, 1, 1, 8, 8))[0, :6].tolist()
    assert (mass, x, y, xy) == pytest.approx((0, 0, 0, 0), abs=1e-6) and xx == pytest.approx(yy) and xx > 0.1


def test_features_are_float32_under_autocast_and_have_no_weights() -> None:
    encoder = DeviationEncoder(3, 3, SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = encoder(scene(walks(4, 0)).bfloat16())
    assert features.dtype == torch.float32 and features.shape == (4, encoder.num_features) == (4, 36)
    assert not list(encoder.parameters())


@pytest.mark.parametrize("size_px", [32, 96, 224, 256])
@pytest.mark.parametrize("channels", [1, 3, 6])
def test_features_do_not_depend_on_the_number_of_pixels(channels: int, size_px: int) -> None:
    encoder = DeviationEncoder(channels, 1, size_px).eval()
    x = torch.linspace(-1, 1, size_px)
    blob = torch.exp(-((x - 0.3) ** 2 + (x[:, None] + 0.5) ** 2) / 0.02).expand(1, 1, channels, -1, -1)
    found = encoder(blob)[0]
    expected = torch.tensor([0.3, -0.5])
    torch.testing.assert_close(found[7:9], expected, atol=0.02, rtol=0)  # the centre of the fourth power
