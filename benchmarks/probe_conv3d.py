"""Find the convolutions of the encoders for which this processor's oneDNN crashes or computes wrong gradients.

python -m benchmarks.probe_conv3d [--sizes 64 160 224] [--widths 0.25 1] [--frames 2 3] [--threads 1]

Each shape runs in a separate process, in bf16 and fp32, and again with the replacement of
worldmodel/nets/convolutions.py where that module expects a fault. glibc fills freed memory with junk and checks the
bytes after each block. Gradients are compared with those in fp64. The exit code is 1 if a shape fails that is not
replaced, or a replacement fails.
"""

import argparse
import copy
import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data_pipelines.errors import UserError
from worldmodel.commands.exits import report_errors
from worldmodel.commands.process import set_threads
from worldmodel.commands.shared import check_counts
from worldmodel.nets.convolutions import (
    Conv2d,
    Conv3d,
    conv2d_of_centre,
    conv3d_by_conv2d,
    has_few_strided_channels,
    has_one_strided_pixel,
    skips_a_frame,
    splits_rows,
)
from worldmodel.nets.cpu import has_amx
from worldmodel.nets.encoders import Conv3dEncoder, ResNetEncoder
from worldmodel.training.machine import machine_description

REPO = Path(__file__).resolve().parents[1]
MAX_ERRORS = {"bf16": 0.02, "fp32": 1e-4}
"""Of a gradient's norm: several times what rounding makes."""
CHECKED, TIMED = 4, 5
"""Repeats of a step: with junk in freed memory, and against the clock."""
CHECK_MEMORY = {"LD_PRELOAD": "libc_malloc_debug.so.0", "GLIBC_TUNABLES": "glibc.malloc.check=3"}
JUNK, M_PERTURB = 0xA5, -6
TIMEOUT_S = 60


class Shape(NamedTuple):
    """A convolution without bias and its input, [B, C, T, H, W], [B, C, H, W] or [B, C, T]."""

    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    input: tuple[int, ...]

    def __str__(self) -> str:
        kernel, stride, values = ("x".join(map(str, part)) for part in (self.kernel, self.stride, self.input))
        return f"{self.input[1]:>3} -> {self.out_channels:<3} kernel {kernel:<5} stride {stride:<5} of {values}"


class Outcome(NamedTuple):
    """The fault of a process or gradient, ms per step, and the oneDNN kernel that computes the gradient."""

    died: str | None
    wrong: bool
    step_ms: float
    implementation: str

    @property
    def failed(self) -> bool:
        return self.died is not None or self.wrong

    def __str__(self) -> str:
        return f"{self.died or ('WRONG' if self.wrong else 'right')} {self.step_ms:.1f} ms {self.implementation}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 32, 64, 96, 128, 144, 145, 160, 192, 224, 256])
    parser.add_argument("--widths", type=float, nargs="+", default=[0.125, 0.25, 0.5, 1.0])
    parser.add_argument("--frames", type=int, nargs="+", default=[3], help="frames per segment (default: 3)")
    parser.add_argument("--batch", type=int, default=4, help="clips per batch (default: 4)")
    parser.add_argument("--threads", type=int, help="threads (default: one per core)")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # one shape as JSON, a precision and a way
    args = parser.parse_args()
    if args.one:
        set_threads(args.threads)
        shape, precision, way = args.one
        print(json.dumps(measure(shape_of(json.loads(shape)), precision, way == "replaced")))
        return 0
    with report_errors():
        check_counts(args, "batch", "threads")
        for name, least in (("sizes", min(args.sizes)), ("frames", min(args.frames))):
            if least < 1:
                raise UserError(f"--{name} must be at least 1, not {least}")
        if not min(args.widths) > 0:
            raise UserError(f"--widths must be above 0, not {min(args.widths):g}")
        print(*(f"{name}: {value}" for name, value in machine_description().items()), f"amx: {has_amx()}", sep="\n")
        failed, missed = 0, 0
        for shape, precision in product(shapes(args.sizes, args.widths, args.frames, args.batch), MAX_ERRORS):
            outcomes = [run(shape, precision, "native", args.threads)]
            if is_replaced(shape, precision):
                outcomes.append(run(shape, precision, "replaced", args.threads))
            failed += outcomes[0].failed
            missed += outcomes[-1].failed
            print(f"{precision} {shape}: {', replaced: '.join(map(str, outcomes))}", flush=True)
        print(f"{failed} shapes fail as PyTorch computes them, {missed} as training does on a processor with AMX")
    return int(missed > 0)


def shapes(sizes: list[int], widths: list[float], frames: list[int], batch: int) -> list[Shape]:
    """Return every convolution of both encoders once, in the order of first use."""
    found: dict[Shape, None] = {}

    def note(layer: Any, inputs: tuple[Tensor]) -> None:
        found[Shape(layer.out_channels, layer.kernel_size, layer.stride, tuple(inputs[0].shape))] = None

    for kind in (Conv3dEncoder, ResNetEncoder):
        for size_px, width, num_frames, channels in product(sizes, widths, frames, (1, 3)):
            with torch.device("meta"):
                encoder = kind(channels, num_frames, width)
                for layer in encoder.modules():
                    if isinstance(layer, nn.modules.conv._ConvNd):
                        layer.register_forward_pre_hook(note)
                encoder(torch.empty(batch, num_frames, channels, size_px, size_px))
    return list(found)


def run(shape: Shape, precision: str, way: str, threads: int | None) -> Outcome:
    """Measure a shape in a separate process."""
    command = [sys.executable, "-m", "benchmarks.probe_conv3d", "--one", json.dumps(shape), precision, way]
    try:
        done = subprocess.run(
            [*command, *(["--threads", str(threads)] if threads else [])],
            capture_output=True,
            text=True,
            cwd=REPO,
            env={**os.environ, **CHECK_MEMORY, "ONEDNN_VERBOSE": "1"},
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return Outcome("HANGS", True, 1000 * TIMEOUT_S, "")
    lines = [line.split(",") for line in done.stdout.splitlines() if ",backward_weights," in line]
    name = lines[-1][lines[-1].index("backward_weights") - 1] if lines else "unknown"
    if done.returncode < 0:
        return Outcome(signal.Signals(-done.returncode).name, True, 0.0, name)
    assert done.returncode == 0, done.stderr
    wrong, step_ms = json.loads(done.stdout.splitlines()[-1])
    return Outcome(None, wrong, step_ms, name)


def shape_of(fields: list[Any]) -> Shape:
    out_channels, *tuples = fields
    return Shape(out_channels, *(tuple(values) for values in tuples))


def layer_of(shape: Shape) -> nn.Module:
    """Make the convolution as the encoders do, channels-last if possible."""
    in_channels, dims = shape.input[1], len(shape.kernel)
    if dims == 3:
        conv3d = Conv3d(in_channels, shape.out_channels, shape.kernel, shape.stride[1])  # type: ignore[arg-type]
        return conv3d.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    if dims == 2:
        conv2d = Conv2d(in_channels, shape.out_channels, shape.kernel[0], shape.stride[0])
        return conv2d.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return nn.Conv1d(in_channels, shape.out_channels, 3, padding=1, bias=False)


def is_replaced(shape: Shape, precision: str) -> bool:
    """Return whether worldmodel/nets/convolutions.py replaces the layer on some processor."""
    layer = layer_of(shape)
    if isinstance(layer, Conv3d):
        num_frames, *size = shape.input[2:]
        return precision == "bf16" and (skips_a_frame(layer, num_frames) or splits_rows(layer, *size))
    if not isinstance(layer, Conv2d):
        return False
    return has_one_strided_pixel(layer, *shape.input[2:]) if precision == "bf16" else has_few_strided_channels(layer)


def replacement(layer: nn.Module, values: Tensor) -> Tensor:
    if isinstance(layer, Conv3d):
        return conv3d_by_conv2d(layer, values)
    assert isinstance(layer, Conv2d)
    return conv2d_of_centre(layer, values)


def native(layer: Any, values: Tensor) -> Tensor:
    """Return the layer's output as PyTorch computes it."""
    return next(kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(layer, kind)).forward(layer, values)


def measure(shape: Shape, precision: str, replaced: bool) -> tuple[bool, float]:
    """Return whether a gradient is wrong, and the milliseconds of a step."""
    torch.manual_seed(0)
    layer = layer_of(shape)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(weight.bfloat16())
    values = torch.randn(shape.input).bfloat16().float()
    if values.ndim > 3:
        last = torch.channels_last if values.ndim == 4 else torch.channels_last_3d
        values = values.contiguous(memory_format=last)
    exact = copy.deepcopy(layer).double()
    expected = gradients(exact, values.double(), native)
    compute = replacement if replaced else native
    fill_freed_memory(JUNK)
    wrong = False
    for _ in range(CHECKED):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            found = gradients(layer, values, compute)
        for ours, theirs in zip(found, expected, strict=True):
            wrong |= not (ours - theirs).norm() <= MAX_ERRORS[precision] * theirs.norm()  # NaN is wrong, too
    fill_freed_memory(0)
    seconds = []
    for _ in range(TIMED):
        started_s = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            gradients(layer, values, compute)
        seconds.append(time.perf_counter() - started_s)
    return bool(wrong), 1000 * min(seconds)


def gradients(layer: nn.Module, values: Tensor, compute: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
    """Return the gradients of the weights and, unless it is a video, of the input, for a fixed output gradient."""
    layer.zero_grad()
    given = values.clone().requires_grad_(values.shape[1] > 3)
    out = compute(layer, given)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out))
    return [tensor for tensor in (*(weight.grad for weight in layer.parameters()), given.grad) if tensor is not None]


def fill_freed_memory(byte: int) -> None:
    """Make glibc fill freed memory with this byte and new memory with its complement; 0 switches it off."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_PERTURB, byte)


if __name__ == "__main__":
    sys.exit(main())
