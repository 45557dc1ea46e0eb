import copy
import errno
import gzip
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from tests.conftest import REPO, TINY, normal
from worldmodel.build import build_training_model, clip_layout
from worldmodel.config import load_config
from worldmodel.data import training_inputs
from worldmodel.nets.teacher import Teacher
from worldmodel.sources import make_source
from worldmodel.training import profiling
from worldmodel.training.gradients import MicroBatch, compute_gradients, micro_batches
from worldmodel.training.losses import TrainingModel
from worldmodel.training.optimisation import step_generator
from worldmodel.training.profiling import PROFILED_STEPS, WARMUP_STEPS, FlopCounter, profiled

CPU = torch.device("cpu")


def step_flops(model: TrainingModel, teacher: Teacher | None, parts: list[MicroBatch]) -> int:
    accelerator = Accelerator(cpu=True)
    with FlopCounter() as counter:
        compute_gradients(accelerator, model, teacher, parts, 32, 1.0, lambda: step_generator(0, 0, CPU))
    return counter.total


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("latent", ["gaussian", "none"])
def test_the_flops_of_a_step_are_those_of_its_linear_layers(latent: str, num_parts: int) -> None:
    """A layer costs 2 * B * inputs * outputs forward, and as much for each gradient, by its weight and by its input.
    Counting changes nothing of the step."""
    overrides = ["run_dir=unused", "objective.name=byol", f"model.latent={latent}", "data.batch_size=32"]
    causal = [*TINY, "data.source=causal", "model.embedding_norm=sphere", *overrides]
    config = load_config(REPO / "configs" / "causal" / "heteroscedastic.yaml", causal)
    torch.manual_seed(0)
    model = build_training_model(config)
    teacher = Teacher(model.embedder)
    expected = 0

    def add(layer: nn.Linear, inputs: tuple[Tensor], _output: Tensor) -> None:
        nonlocal expected
        gradients = torch.is_grad_enabled() * (1 + inputs[0].requires_grad)
        expected += (1 + gradients) * 2 * len(inputs[0]) * layer.in_features * layer.out_features

    networks = copy.deepcopy((model, teacher))
    for module in (*model.modules(), *teacher.modules()):
        if isinstance(module, nn.Linear):
            module.register_forward_hook(add)
    batch = next(make_source(config).training_stream(1, rank=0, world_size=1, device=CPU).batches())
    parts = micro_batches(training_inputs(batch, clip_layout(config), 1, CPU), batch["row"], num_parts)
    random_state = torch.random.get_rng_state()
    assert step_flops(model, teacher, parts) == expected > 0
    assert torch.equal(torch.random.get_rng_state(), random_state)
    compute_gradients(Accelerator(cpu=True), *networks, parts, 32, 1.0, lambda: step_generator(0, 0, CPU))
    for counted, plain in zip((model, teacher), networks, strict=True):
        assert all(torch.equal(value, plain.state_dict()[name]) for name, value in counted.state_dict().items())
        gradients = [(a.grad, b.grad) for a, b in zip(counted.parameters(), plain.parameters(), strict=True)]
        assert all(a is b if a is None or b is None else torch.equal(a, b) for a, b in gradients)
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_a_first_pass_is_counted_too() -> None:
    """Of a loss that compares clips, in parts: a forward pass and a product of all embeddings more."""
    overrides = [*TINY, "data.source=causal", "run_dir=unused", "objective.name=infonce", "data.batch_size=32"]
    config = load_config(REPO / "configs" / "causal" / "heteroscedastic.yaml", overrides)
    model = build_training_model(config)
    batch = next(make_source(config).training_stream(1, rank=0, world_size=1, device=CPU).batches())
    inputs = training_inputs(batch, clip_layout(config), 1, CPU)
    whole, in_two = (step_flops(model, None, micro_batches(inputs, batch["row"], num_parts)) for num_parts in (1, 2))
    assert 1.2 * whole < in_two < 1.5 * whole


def test_attention_on_a_cpu_is_counted() -> None:
    """Two matrix products of [S, D] by [D, S] a head forward; backward five, of which one is forward's again."""
    heads, length, dim = 2, 16, 8
    query, key, value = (normal(seed, 1, heads, length, dim).requires_grad_() for seed in range(3))
    with FlopCounter() as counter:
        F.scaled_dot_product_attention(query, key, value).sum().backward()
    assert counter.total == 7 * 2 * heads * length * length * dim


@pytest.mark.parametrize("cause", ["a file in place of the folder", "a full disk", "a full disk for the table"])
def test_training_continues_without_a_profile_that_cannot_be_written(
    cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, steps = tmp_path / "profile", PROFILED_STEPS + WARMUP_STEPS

    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if cause == "a file in place of the folder":
        folder.write_text("")
    elif cause == "a full disk":
        monkeypatch.setattr(gzip.GzipFile, "write", fill)
    else:
        monkeypatch.setattr(profiling, "write_text", fill)
    with profiled(tmp_path, CPU, steps) as step:
        for _ in range(steps):
            step()
    assert "the profile cannot be written into" in caplog.text
    assert folder.is_file() or not list(folder.iterdir())
