"""The decoder: shapes for every size, movement by whole pixels, and no motion without the embedding."""

from itertools import pairwise

import pytest
import torch

from tests.conftest import normal
from worldmodel.nets.decoder import NUM_MOVERS, Decoder, Movers, decoded_px, feature_sides


@pytest.mark.parametrize(
    ("size_px", "channels", "num_frames", "dim"), [(32, 1, 1, 16), (45, 3, 2, 16), (64, 3, 3, 512), (256, 1, 2, 16)]
)
def test_frames_of_every_size(size_px: int, channels: int, num_frames: int, dim: int) -> None:
    decoder = Decoder(dim, num_frames, channels, size_px)
    side_px = decoded_px(size_px)
    frames = decoder(normal(0, 2, dim), torch.rand(2, channels, side_px, side_px))
    assert frames.shape == (2, num_frames, channels, side_px, side_px) and frames.dtype == torch.float32
    assert side_px == {32: 32, 45: 46, 64: 64, 256: 64}[size_px]


@pytest.mark.parametrize("side_px", range(2, 65, 2))
def test_feature_maps_grow_at_most_twofold(side_px: int) -> None:
    sides = feature_sides(side_px)
    assert sides[0] <= 4 and sides[-1] == side_px // 2
    assert all(before < after <= 2 * before for before, after in pairwise(sides))


def test_movers_move_by_the_displacement_with_all_of_the_probability() -> None:
    side_px, shift_x, shift_y = 12, 3, -2
    movers = Movers(1, side_px)
    with torch.no_grad():
        movers.logits.weight.zero_()
        logits = torch.full((NUM_MOVERS, 1, 2, 2 * side_px - 1), -100.0)
        logits[..., 0, side_px - 1 + shift_x] = 0
        logits[..., 1, side_px - 1 + shift_y] = 0
        movers.logits.bias.copy_(logits.flatten())
    picture = torch.rand(1, 2, side_px, side_px)
    moved = movers(torch.zeros(1, movers.logits.in_features), picture)[0, 0, 0]
    # What was at (x, y) is at (x + 3, y - 2).
    torch.testing.assert_close(moved[:, : side_px - 2, 3:], picture[0, :, 2:, : side_px - 3], rtol=2e-3, atol=0)


def test_a_frame_is_composed_of_its_sources() -> None:
    """With equal weights, and movers that do not move, a frame is the mean of its sources."""
    decoder = Decoder(8, 2, 1, 16)
    with torch.no_grad():
        for layer in (decoder.drawn, decoder.weights[1]):
            for parameter in layer.parameters():
                parameter.zero_()
        decoder.movers.logits.weight.zero_()
        still = torch.full((NUM_MOVERS, 2, 2, 31), -100.0)
        still[..., 15] = 0
        decoder.movers.logits.bias.copy_(still.flatten())
        decoder.mean_picture.fill_(0.25)
        before = torch.rand(3, 1, 16, 16)
        frames = decoder(normal(0, 3, 8), before)
    expected = ((NUM_MOVERS + 1) * before + 0.25) / (NUM_MOVERS + 2)
    torch.testing.assert_close(frames, expected[:, None].expand(-1, 2, -1, -1, -1), rtol=0, atol=1e-3)
