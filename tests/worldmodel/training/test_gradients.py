import pytest
import torch
from accelerate import Accelerator

from tests.conftest import REPO, TINY
from worldmodel.build import build_training_model, clip_layout
from worldmodel.config import choices, load_config
from worldmodel.data import training_inputs
from worldmodel.nets.teacher import Teacher
from worldmodel.sources import make_source
from worldmodel.training.gradients import compute_gradients, micro_batches
from worldmodel.training.optimisation import step_generator

CPU = torch.device("cpu")
CAUSAL = [*TINY, "data.source=causal", "run_dir=unused", "data.batch_size=32", "model.embedding_norm=sphere"]


def in_so_many(num_parts: int, overrides: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses and gradients of a batch; batch norm by running statistics, which parts leave alone."""
    config = load_config(REPO / "configs" / "causal" / "heteroscedastic.yaml", [*CAUSAL, *overrides])
    torch.manual_seed(0)
    model = build_training_model(config).eval()
    teacher = Teacher(model.embedder).eval() if model.objective.needs_teacher else None
    batch = next(make_source(config).training_stream(1, rank=0, world_size=1, device=CPU).batches())
    parts = micro_batches(training_inputs(batch, clip_layout(config), 1, CPU), batch["row"], num_parts)
    result = compute_gradients(
        Accelerator(cpu=True), model, teacher, parts, config.data.batch_size, 0.1, lambda: step_generator(0, 0, CPU)
    )
    assert result.num_clips == 32 and result.targets.shape == (32, config.model.embedding_dim)
    return result.losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "overrides",
    [
        *([f"objective.name={name}"] for name in choices("objective")),
        ["objective.name=infonce", "model.latent=sparse", "model.latent.prior_components=2"],
        ["objective.name=vicreg", "model.latent=none", "objective.time_variance_weight=1"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_the_gradient_in_parts_is_that_of_the_whole_batch(overrides: list[str]) -> None:
    losses, gradients = in_so_many(1, overrides)
    losses_in_parts, gradients_in_parts = in_so_many(3, overrides)
    assert losses.keys() == losses_in_parts.keys() and gradients.keys() == gradients_in_parts.keys()
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-3
    for name, value in losses.items():
        torch.testing.assert_close(losses_in_parts[name], value, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_in_parts[name], gradient, atol=1e-5, rtol=1e-5)


def test_a_first_pass_leaves_running_statistics_to_the_second() -> None:
    """Each part moves them once, as it does where one pass is enough."""
    config = load_config(REPO / "configs" / "causal" / "heteroscedastic.yaml", [*CAUSAL, "objective.name=infonce"])
    torch.manual_seed(0)
    model = build_training_model(config)
    batch = next(make_source(config).training_stream(1, rank=0, world_size=1, device=CPU).batches())
    parts = micro_batches(training_inputs(batch, clip_layout(config), 1, CPU), batch["row"], 3)
    compute_gradients(Accelerator(cpu=True), model, None, parts, 32, 0.1, lambda: step_generator(0, 0, CPU))
    counts = {int(value) for name, value in model.embedder.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {3}
