from typing import Literal

import pytest
import torch

from worldmodel.nets.encoders import (
    NUM_MOMENTS,
    Conv3dEncoder,
    Embedder,
    MlpEncoder,
    ResNetEncoder,
    Whitening,
    mlp,
    normalise,
)

ENCODERS = {"conv3d": Conv3dEncoder, "resnet": ResNetEncoder}


def clip(batch: int = 3, frames: int = 3, channels: int = 1, size_px: int = 64) -> torch.Tensor:
    return torch.rand(batch, frames, channels, size_px, size_px, generator=torch.Generator().manual_seed(0))


def test_the_published_sizes() -> None:
    """768 features; 32-64-128-128-256 channels: the five kernels without bias and the norms' scales and shifts."""
    encoder = Conv3dEncoder(channels=1, num_frames=3, width=1.0)
    kernels = 9 * 1 * 32 + 9 * 32 * 64 + 3 * 64 * 128 + 3 * 128 * 128 + 9 * 128 * 256
    assert encoder.num_features == 768
    assert encoder(clip()).shape == (3, 768)
    assert sum(p.numel() for p in encoder.parameters()) == kernels + 2 * (32 + 64 + 128 + 128 + 256)


@pytest.mark.parametrize("name", ["conv3d", "resnet"])
@pytest.mark.parametrize(("channels", "frames", "size_px"), [(1, 3, 64), (3, 2, 96), (3, 1, 64)])
def test_any_number_of_frames_channels_and_pixels(name: str, channels: int, frames: int, size_px: int) -> None:
    encoder = ENCODERS[name](channels, frames, 0.125)
    assert encoder(clip(2, frames, channels, size_px)).shape == (2, encoder.num_features)


@pytest.mark.parametrize("name", ["conv3d", "resnet"])
def test_features_tell_the_order_of_frames(name: str) -> None:
    torch.manual_seed(0)
    encoder = ENCODERS[name](1, 3, 0.125).eval()
    video = clip()
    assert not torch.allclose(encoder(video), encoder(video.flip(1)), atol=1e-4)


def test_kernels_in_space_encode_each_frame_by_itself() -> None:
    torch.manual_seed(0)
    video = clip()
    for kernels in ("space", "space_time"):
        encoder = Conv3dEncoder(1, 3, 0.125, "moments", kernels).eval()
        features, swapped = (encoder(frames).unflatten(1, (-1, 3)) for frames in (video, video[:, [0, 2, 1]]))
        same = torch.isclose(swapped, features, atol=1e-6).all(dim=1).all(dim=0)
        assert same.tolist() == ([True, False, False] if kernels == "space" else [False] * 3)


def test_kernels_in_space_are_five_of_three_by_three() -> None:
    encoder = Conv3dEncoder(channels=1, num_frames=2, width=1.0, kernels="space")
    kernels = 9 * (1 * 32 + 32 * 64 + 64 * 128 + 128 * 128 + 128 * 256)
    assert sum(p.numel() for p in encoder.parameters()) == kernels + 2 * (32 + 64 + 128 + 128 + 256)
    assert encoder.layers(clip(frames=2).transpose(1, 2)).shape == (3, 256, 2, 8, 8)


def test_features_are_means_over_pixels() -> None:
    torch.manual_seed(0)
    encoder = Conv3dEncoder(1, 3, 0.125)
    values = encoder.layers(clip().transpose(1, 2))
    torch.testing.assert_close(encoder(clip()), values.mean(dim=(3, 4)).flatten(1))


def moments_of(maps: torch.Tensor) -> torch.Tensor:
    """[..., C, H, W] -> [..., C, 6], map by map."""
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, size) for size in maps.shape[-2:]), indexing="ij")
    mass = maps.sum(dim=(-2, -1))
    moments = [(maps * power).sum(dim=(-2, -1)) / (mass + 0.05) for power in (x, y, x**2, x * y, y**2)]
    return torch.stack([maps.mean(dim=(-2, -1)), *moments], dim=-1)


def test_moments_are_those_of_coordinates_weighed_by_the_map() -> None:
    torch.manual_seed(0)
    video = clip(2, 2, 1, 96)
    spatial = Conv3dEncoder(1, 2, 0.125, "moments")
    maps = spatial.layers(video.transpose(1, 2)).transpose(1, 2)
    assert spatial.num_features == NUM_MOMENTS["moments"] * 32 * 2
    expected = moments_of(maps).permute(0, 2, 3, 1).flatten(1)  # channel, moment, frame
    torch.testing.assert_close(spatial(video), expected, atol=1e-4, rtol=1e-4)
    residual = ResNetEncoder(1, 2, 0.125, "moments")
    frames = residual.frames(video.flatten(0, 1)).unflatten(0, (2, 2))
    expected = residual.time(moments_of(frames).permute(0, 2, 3, 1).flatten(1, 2)).flatten(1)
    torch.testing.assert_close(residual(video), expected, atol=1e-4, rtol=1e-4)


def test_moments_tell_the_place_that_the_mean_forgets() -> None:
    torch.manual_seed(0)
    video = torch.zeros(1, 3, 1, 64, 64)
    video[..., 24:30, 24:30] = 1
    moved = video.roll(8, dims=-1)
    for pooling in ("mean", "moments"):
        encoder = Conv3dEncoder(1, 3, 0.125, pooling).eval()
        assert torch.allclose(encoder(video), encoder(moved), atol=1e-6) == (pooling == "mean")


def test_embeddings_have_one_length() -> None:
    torch.manual_seed(0)
    embedder = Embedder(Conv3dEncoder(1, 3, 0.125), [16], 8, "sphere")
    torch.testing.assert_close(embedder(clip()).norm(dim=-1), torch.full((3,), 8**0.5))
    torch.testing.assert_close(normalise(5 * torch.ones(2, 8)), torch.ones(2, 8))


def observations(batch: int = 512) -> torch.Tensor:
    return torch.randn(batch, 1, 6, 1, 1, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm", ["standard", "white"])
def test_off_the_sphere_dimensions_have_mean_0_and_variance_1(norm: Literal["standard", "white"]) -> None:
    torch.manual_seed(0)
    embedding = Embedder(MlpEncoder(6, 1, 0.125), [], 4, norm)(observations())
    covariance = torch.cov(embedding.T, correction=0)
    torch.testing.assert_close(embedding.mean(dim=0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(covariance.diagonal(), torch.ones(4), atol=0.02, rtol=0)
    off_diagonal = (covariance - torch.diag(covariance.diagonal())).abs().max()
    assert (off_diagonal < 0.01) == (norm == "white")


@pytest.mark.parametrize("norm", ["sphere", "standard", "white"])
def test_without_a_projector_the_embedding_is_the_normalised_features(
    norm: Literal["sphere", "standard", "white"],
) -> None:
    torch.manual_seed(0)
    encoder = MlpEncoder(6, 1, 0.125)
    embedder = Embedder(encoder, None, encoder.num_features, norm)
    assert not list(embedder.projector.parameters())
    features = encoder(observations())
    expected = {
        "sphere": lambda: normalise(standardised(features)),
        "standard": lambda: standardised(features),
        "white": lambda: Whitening(encoder.num_features)(features),
    }[norm]()
    torch.testing.assert_close(embedder(observations()), expected, atol=1e-4, rtol=1e-4)


def standardised(features: torch.Tensor) -> torch.Tensor:
    return (features - features.mean(dim=0)) / (features.var(dim=0, correction=0) + 1e-5).sqrt()


def test_whitening_in_evaluation_takes_the_running_statistics() -> None:
    torch.manual_seed(0)
    layer = Whitening(3)
    mixed = torch.randn(4000, 3) @ torch.tensor([[1.0, 0.8, 0.0], [0.0, 0.5, 0.0], [0.3, 0.0, 2.0]]) + 5
    in_training = layer(mixed)
    for _ in range(100):
        layer(mixed)
    torch.testing.assert_close(layer.eval()(mixed), in_training, atol=1e-2, rtol=0)
    # One row alone has no covariance of its own.
    torch.testing.assert_close(layer(mixed[:1]), in_training[:1], atol=1e-2, rtol=0)


def test_mlp_has_no_bias_before_a_norm() -> None:
    with_norm, without = mlp([4, 5, 6], final_norm=True), mlp([4, 5, 6])
    assert [m.bias is None for m in with_norm if isinstance(m, torch.nn.Linear)] == [True, True]
    assert [m.bias is None for m in without if isinstance(m, torch.nn.Linear)] == [True, False]
    assert isinstance(with_norm[-1], torch.nn.BatchNorm1d)
