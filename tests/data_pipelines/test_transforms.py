from unittest.mock import Mock

import pytest
import torch

from data_pipelines.transforms import on_device, split_segments, to_float


def test_to_float_maps_bytes_onto_the_unit_interval_and_leaves_floats() -> None:
    out = to_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, torch.tensor([0.0, 0.2, 1.0]))
    torch.testing.assert_close(to_float(torch.tensor([0.25], dtype=torch.float64)), torch.tensor([0.25]))


def test_split_segments_keeps_the_order_of_time() -> None:
    video = torch.arange(9).reshape(1, 9, 1, 1, 1).expand(2, 9, 1, 4, 4)
    segments = split_segments(video, 3)
    assert segments.shape == (2, 3, 3, 1, 4, 4)
    assert segments[0, :, :, 0, 0, 0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize(
    ("kind", "at", "pinned"), [("cuda", "cpu", True), ("cuda", "cuda", False), ("cpu", "cpu", False)]
)
def test_what_goes_to_a_gpu_is_pinned_first(kind: str, at: str, pinned: bool) -> None:
    values = Mock(spec=torch.Tensor, device=torch.device(at))
    on_device(values, torch.device(kind))
    assert values.pin_memory.called == pinned
    copied = values.pin_memory.return_value if pinned else values
    copied.to.assert_called_once_with(torch.device(kind), non_blocking=True)
