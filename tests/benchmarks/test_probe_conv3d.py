"""Shapes of the encoders, tried in processes of their own."""

import pytest

from benchmarks.probe_conv3d import Shape, is_replaced, run, shapes
from worldmodel.nets.encoders import Conv3dEncoder, ResNetEncoder

SPATIAL = Shape(8, (1, 3, 3), (1, 2, 2), (1, 3, 3, 160, 160))
FRAMES = Shape(32, (3, 1, 1), (1, 1, 1), (1, 16, 2, 8, 8))
NARROW = Shape(16, (1, 1), (2, 2), (1, 8, 6, 6))


def test_every_convolution_of_both_encoders_is_found() -> None:
    found = shapes([64], [0.25], [3], batch=2)
    assert len(found) == len(set(found))
    assert Shape(16, (1, 3, 3), (1, 2, 2), (2, 8, 3, 32, 32)) in found
    assert Shape(128, (3,), (1,), (2, 128, 3)) in found
    layers = [
        layer
        for kind in (Conv3dEncoder, ResNetEncoder)
        for layer in kind(3, 3, 0.25).modules()
        if hasattr(layer, "kernel_size") and hasattr(layer, "weight")
    ]
    kinds = {(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride) for layer in layers}
    assert kinds <= {(shape.input[1], shape.out_channels, shape.kernel, shape.stride) for shape in found}


def test_what_training_replaces_depends_on_the_precision() -> None:
    replaced = {
        (shape, precision)
        for shape in (SPATIAL, FRAMES, NARROW, Shape(8, (1, 3, 3), (1, 2, 2), (1, 3, 3, 64, 64)))
        for precision in ("bf16", "fp32")
        if is_replaced(shape, precision)
    }
    assert replaced == {(SPATIAL, "bf16"), (FRAMES, "bf16"), (NARROW, "fp32")}


@pytest.mark.slow
def test_replacements_are_right_and_wrong_ones_are_told() -> None:
    """A single pixel's centre is all that a kernel meets; of more pixels it is not."""
    assert not run(NARROW, "fp32", "replaced", threads=1).failed
    outcome = run(Shape(8, (3, 3), (2, 2), (2, 16, 8, 8)), "fp32", "replaced", threads=1)
    assert outcome.failed and outcome.died is None and "WRONG" in str(outcome)
