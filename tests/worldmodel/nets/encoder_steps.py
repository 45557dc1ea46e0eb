"""One training step of an encoder in a process of its own, which a crash of a native library ends alone."""

import multiprocessing
from typing import NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from worldmodel import parts
from worldmodel.config import ModelConfig
from worldmodel.nets.encoders import Encoder, SelfTaught

TIMEOUT_S = 240
MIN_COSINE = 0.7
"""Between gradients in bf16 and in fp32, which measured 0.85 to 1.00."""


class Step(NamedTuple):
    encoder: str
    size_px: int
    precision: str
    num_frames: int = 3
    width: float = 0.25
    batch: int = 4
    pretrained: str | None = None


def exit_code(step: Step) -> int | None:
    """Run the step in a fresh process: 0, 1 where an assertion fails, minus the signal that ended it, None for a hang.

    Processes are forked from one that has imported what takes seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["worldmodel.nets.encoders", "torch._dynamo", "transformers"])
    process = context.Process(target=take, args=(step,))
    process.start()
    process.join(TIMEOUT_S)
    code = process.exitcode
    process.kill()
    process.join()
    return code


def take(step: Step) -> None:
    """Forward, backward and an update of the weights. All is finite, and gradients in bf16 are near those in fp32."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tree = (
        {"path": step.pretrained}
        if step.pretrained
        else {}
        if step.encoder.startswith("vit")
        else {"width": step.width}
    )
    model = TypeAdapter(ModelConfig).validate_python({"encoder": {"name": step.encoder} | tree})
    shape = {"channels": 3, "num_frames": step.num_frames, "size_px": step.size_px}
    encoder = parts.build_module("model.encoder.name", model.encoder, Encoder, **shape)
    video = torch.rand(step.batch, step.num_frames, 3, step.size_px, step.size_px)
    found = gradient(encoder, video, step.precision == "bf16")
    assert found.isfinite().all()
    if step.precision == "bf16":
        cosine = torch.cosine_similarity(found, gradient(encoder, video, in_bf16=False), dim=0)
        assert cosine > MIN_COSINE, cosine
    torch.optim.SGD(encoder.parameters(), lr=0.01).step()
    assert all(weights.isfinite().all() for weights in encoder.parameters())


def gradient(encoder: nn.Module, video: Tensor, in_bf16: bool) -> Tensor:
    """The gradients of all weights, each divided by its norm so that every layer counts, as one vector."""
    encoder.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
        features, own_loss = (
            encoder.with_loss(video) if isinstance(encoder, SelfTaught) else (encoder(video), torch.zeros(()))
        )
    direction = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    ((features.float() * direction).sum() + own_loss.sum()).backward()
    gradients = [weights.grad.flatten() for weights in encoder.parameters() if weights.grad is not None]
    return torch.cat([values / values.norm() if len(values) > 1 else values for values in gradients])
