"""The encoder of objects: its clusters against numpy, its own loss, and what can be read from its features."""

import numpy as np
import pytest
import torch
from torch import Tensor

from worldmodel.nets.encoders import Embedder
from worldmodel.nets.objects import ABSENT, ObjectsEncoder, _clusters

SIZE = 32
TALL, WIDE = (1.5, 4.0), (4.0, 1.5)
"""Variances of two blobs in y and in x: only their shape tells them apart."""


def scene(places: Tensor) -> Tensor:
    """A tall and a wide bright blob on a fixed texture, at places [B, T, 2, 2] (x, y) in px: [B, T, 1, H, W]."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    picture = 0.3 * torch.rand(SIZE, SIZE, generator=generator)
    for blob, (of_x, of_y) in enumerate((TALL, WIDE)):
        away = (x - places[:, :, blob, 0, None, None]) ** 2 / of_x + (y - places[:, :, blob, 1, None, None]) ** 2 / of_y
        picture = picture + 0.6 * torch.exp(-away / 2)
    return picture.clamp(max=1).unsqueeze(2)


def places_of(count: int, seed: int) -> Tensor:
    """Independent places of both blobs in three frames, which drift slowly: [B, 3, 2, 2] px."""
    generator = torch.Generator().manual_seed(seed)
    start = 5 + (SIZE - 10) * torch.rand(count, 1, 2, 2, generator=generator)
    return start + torch.randn(count, 1, 2, 2, generator=generator) * torch.arange(-1, 2)[:, None, None]


def trained(steps: int) -> tuple[ObjectsEncoder, list[float]]:
    torch.manual_seed(0)
    encoder = ObjectsEncoder(1, 3, SIZE, num_objects=4, width=1.0)
    optimizer = torch.optim.Adam(encoder.parameters(), 3e-3)
    losses = []
    for seed in range(steps):
        loss = encoder.with_loss(scene(places_of(16, seed)))[1].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return encoder.eval(), losses


def test_shares_centres_and_spread_are_those_that_numpy_computes() -> None:
    generator = torch.Generator().manual_seed(0)
    assignment = torch.rand(2, 3, 4, 4, generator=generator).softmax(dim=1)
    energy = torch.rand(2, 8, 8, generator=generator)
    mass, centres, spread = _clusters(assignment.double(), energy.double())
    y, x = np.mgrid[-1:1:8j, -1:1:8j]
    for image in range(2):
        weight = energy[image].double().numpy() / energy[image].double().sum().item()
        expected_spread = 0.0
        for k in range(3):
            share = np.kron(assignment[image, k].double().numpy(), np.ones((2, 2))) * weight
            centre = np.array([(share * x).sum(), (share * y).sum()]) / (share.sum() + ABSENT)
            expected_spread += (share * (x * x + y * y)).sum() - share.sum() * (centre**2).sum()
            assert mass[image, k] == pytest.approx(share.sum(), abs=1e-6)
            np.testing.assert_allclose(centres[image, k].numpy(), centre, atol=1e-6)
        assert spread[image] == pytest.approx(expected_spread, abs=1e-6)


@pytest.mark.parametrize("size", [7, 32, 33])
def test_every_pixel_counts_once(size: int) -> None:
    """At odd sizes, too, where the last cells reach beyond the frame."""
    energy = torch.zeros(1, size, size)
    energy[0, 3, 2] = energy[0, size - 1, size - 2] = 1
    cells = (size + 1) // 2
    (mass,), (centre,), _ = _clusters(torch.ones(1, 1, cells, cells), energy)
    at = torch.linspace(-1, 1, size)
    expected = torch.stack([at[2] + at[size - 2], at[3] + at[size - 1]]) / 2 / (1 + ABSENT)
    assert mass.item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(centre[0], expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_places_of_two_objects_are_linear_in_the_features_after_training() -> None:
    encoder, losses = trained(200)
    assert np.mean(losses[-10:]) < 0.5 * losses[0]

    def inputs(seed: int) -> Tensor:
        with torch.no_grad():
            features = encoder(scene(places_of(400, seed)))
        return torch.cat([features, torch.ones(len(features), 1)], dim=1)

    weights = torch.linalg.lstsq(inputs(1_000), places_of(400, 1_000)[:, 2].flatten(1)).solution
    error = inputs(1_001) @ weights - places_of(400, 1_001)[:, 2].flatten(1)
    # A constant would err by 6 px, and centres of halves of the frame, without regard to looks, by 4.7. What training
    # reaches, 0.2 to 0.8, depends on how sums are rounded.
    assert (error.std(dim=0) < 1.5).all(), error.std(dim=0)


def test_only_its_own_loss_trains_the_network() -> None:
    encoder = ObjectsEncoder(3, 2, 16, num_objects=3, width=0.5)
    features, loss = encoder.with_loss(torch.rand(4, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert not features.requires_grad and loss.shape == (4,)
    loss.mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in encoder.parameters())


def test_frames_that_are_the_mean_have_no_objects() -> None:
    encoder = ObjectsEncoder(1, 1, 16, num_objects=2, width=1.0).eval()
    features, loss = encoder.with_loss(torch.zeros(1, 1, 1, 16, 16))
    assert features.abs().max() < 1e-6 and loss.abs().max() < 1e-6


def test_the_mean_frame_and_the_variance_are_those_of_all_batches_at_first() -> None:
    encoder = ObjectsEncoder(1, 2, 8, num_objects=2, width=1.0)
    batches = torch.rand(3, 5, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for batch in batches:
        encoder(batch)
    torch.testing.assert_close(encoder.mean_frame, batches.mean(dim=(0, 1, 2)))
    torch.testing.assert_close(encoder.mean_square, batches.square().mean(dim=(0, 1, 2)))


@pytest.mark.parametrize("size_px", [16, 33, 64, 96, 224, 256])
def test_places_do_not_depend_on_the_number_of_pixels(size_px: int) -> None:
    torch.manual_seed(0)
    encoder = ObjectsEncoder(3, 1, size_px, num_objects=1, width=1.0).eval()
    x = torch.linspace(-1, 1, size_px)
    blob = torch.exp(-((x - 0.3) ** 2 + (x[:, None] + 0.5) ** 2) / 0.02).expand(1, 1, 3, -1, -1)
    share, *centre = encoder(blob)[0].tolist()
    assert share == pytest.approx(1, abs=1e-3) and centre == pytest.approx([0.3, -0.5], abs=0.05)


def test_features_are_float32_under_autocast() -> None:
    encoder = ObjectsEncoder(1, 3, SIZE, num_objects=4, width=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, loss = encoder.with_loss(scene(places_of(4, 0)).bfloat16())
    assert features.dtype == loss.dtype == torch.float32
    assert features.shape == (4, encoder.num_features) == (4, 36)


def test_an_embedder_hands_on_the_loss_of_its_encoder() -> None:
    clip = scene(places_of(2, 0))
    with_own = Embedder(ObjectsEncoder(1, 3, SIZE, num_objects=2, width=1.0), [], 4, "standard")
    assert with_own.features_and_loss(clip)[1].shape == (2,)  # type: ignore[union-attr]
