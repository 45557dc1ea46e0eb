"""Infinite values and NaN never reach weights or checkpoints."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from data_pipelines.batches import Batch
from data_pipelines.errors import UserError
from tests.conftest import REPO, TINY, normal, run_here, script_environment
from tests.worldmodel.runs.checkpoints import make
from tests.worldmodel.training.test_loop import DEMO, assert_same_weights, rows
from worldmodel import load
from worldmodel.config import Config
from worldmodel.runs.checkpoint import load_checkpoint, save_checkpoint
from worldmodel.training import refine as refine_module
from worldmodel.training.finite import Guard, first_overflow, not_finite, overflowed_gradients
from worldmodel.training.gradients import MicroBatch
from worldmodel.training.launch import make_accelerator
from worldmodel.training.loop import train
from worldmodel.training.session import Interrupted
from worldmodel.training.trainer import Trainer

NAN, INF = float("nan"), float("inf")
RARE = ["train.log_every=50", "train.checkpoint_every=2", "train.keep_checkpoints=1", "train.eval_every=100"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 2))


def steps(model: nn.Module, guarded: bool, bad: dict[int, float]) -> list[dict[str, torch.Tensor]]:
    """The weights and the optimiser's state after each of five steps, of which some have a bad value in a gradient."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    guard = Guard(optimizer, torch.device("cpu")) if guarded else None
    found = []
    for step in range(5):
        loss = model(normal(step, 2, 1, 4, 4)).square().sum()
        loss.backward()
        if step in bad:
            list(model.parameters())[2].grad[1, 3] = bad[step]  # type: ignore[index]
        if guard:
            guard.watch(loss)
            assert guard.num_steps() == max((step - first + 1 for first in bad if first <= step), default=0)
        optimizer.step()
        optimizer.zero_grad()
        state = [value for values in optimizer.state.values() for value in values.values()]
        found.append({str(n): value.clone() for n, value in enumerate([*model.state_dict().values(), *state])})
    return found


def test_a_healthy_step_is_the_same_with_a_guard() -> None:
    plain, guarded = steps(network(), False, {}), steps(network(), True, {})
    assert all(torch.equal(plain[step][key], guarded[step][key]) for step in range(5) for key in plain[0])


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_weights_stay_as_they_are_from_the_first_bad_step_on(value: float) -> None:
    plain, guarded = steps(network(), False, {}), steps(network(), True, {2: value})
    for step in range(5):
        expected = plain[min(step, 1)]
        assert all(torch.equal(expected[key], guarded[step][key]) for key in expected)


def test_a_loss_alone_counts_too() -> None:
    model = network()
    guard = Guard(torch.optim.AdamW(model.parameters(), fused=True), torch.device("cpu"))
    guard.watch(torch.tensor(INF))
    assert guard.num_steps() == 1


def test_the_first_module_that_overflows_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh(), nn.Linear(2, 2)), nn.ReLU())
    model[1][1].weight.data.fill_(INF)  # type: ignore[index]
    with first_overflow(model) as found:
        model(torch.ones(1, 2))
    assert found == ["1.1 (Linear)"]
    with first_overflow(model) as found:
        model[0](torch.ones(1, 2))
    assert found == []


def test_gradients_that_overflow_are_named_in_the_order_of_the_backward_pass() -> None:
    model = network()
    model(normal(0, 2, 1, 4, 4)).sum().backward()
    assert overflowed_gradients(model) == []
    for name, parameter in model.named_parameters():
        if name != "2.bias":
            parameter.grad[0] = NAN  # type: ignore[index]
    assert overflowed_gradients(model) == ["2.weight", "0.bias", "0.weight"]


def test_whole_numbers_are_finite_and_half_precision_is_looked_at() -> None:
    assert not_finite({"steps": torch.tensor(2**40), "none": torch.zeros(0), "mask": torch.tensor(True)}) is None
    assert not_finite({"a": torch.ones(2), "b": torch.tensor([1.0, INF]).bfloat16()}) == "b"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, float], None]:
    """A function that makes one value in a gradient bad in a step."""
    compute = Trainer.compute_gradients

    def poison(bad_step: int, value: float) -> None:
        def poisoned(self: Trainer, parts: list[MicroBatch]) -> Any:
            losses = compute(self, parts)
            if self.step + 1 == bad_step:
                self.student.embedder.projector[0].weight.grad.view(-1)[7] = value  # type: ignore[operator, union-attr]
            return losses

        monkeypatch.setattr(Trainer, "compute_gradients", poisoned)

    return poison


@pytest.mark.parametrize(
    ("bad_step", "value"),
    [(4, NAN), pytest.param(5, INF, marks=pytest.mark.slow), (6, NAN)],
    ids=["at a save", "between", "last"],
)
def test_a_bad_step_leaves_the_checkpoint_before_it_from_which_the_run_continues(
    tiny_config: Callable[..., Config], poisoned: Callable[[int, float], None], bad_step: int, value: float
) -> None:
    poisoned(bad_step, value)
    good = (bad_step - 1) // 2 * 2
    line = rf"^at step {bad_step} a gradient is not finite, first that of embedder.projector.0.weight: lower train.lr"
    with pytest.raises(UserError, match=rf"{line} .*; the checkpoint of step {good} is intact$"):
        train(tiny_config(*RARE))
    run = Path(tiny_config().run_dir)
    assert [path.name for path in (run / "checkpoints").glob("*step*")] == [f"step_{good:08d}"]
    poisoned(0, NAN)
    resumed = train(tiny_config(*RARE), resume=True)
    assert_same_weights(resumed, train(tiny_config(*RARE, f"run_dir={run}_whole")))


def test_a_stop_after_a_bad_step_saves_nothing(
    tiny_config: Callable[..., Config], poisoned: Callable[[int, float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(3, NAN)
    update, asked = Trainer.update, [0]

    def stopped(self: Trainer, batches: Iterator[Batch]) -> None:
        update(self, batches)
        if self.step == 5:
            asked.append(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "update", stopped)
    with pytest.raises(UserError, match=r"^at step 3 a gradient"):
        train(tiny_config(*RARE, "train.checkpoint_every=50"), stop=lambda: asked[-1])
    assert not list(Path(tiny_config().run_dir).glob("checkpoints/*"))
    poisoned(0, NAN)
    asked[:] = [0]
    with pytest.raises(Interrupted, match=r"^SIGTERM$"):
        train(tiny_config(*RARE), resume=True, stop=lambda: asked[-1])


def test_a_learning_rate_that_is_too_high_is_one_line_and_no_checkpoint(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    done = run_here("train.py", *DEMO, *tiny_overrides, *RARE, "train.clip_norm=0", "train.lr=1e30")
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(lines) == 1 and "is not finite" in lines[0] and "embedder.encoder.layers." in lines[0]
    assert "lower train.lr or set train.clip_norm" in lines[0]
    assert not list((tmp_path / "run").glob("checkpoints/*step*"))


@pytest.mark.parametrize("part", ["model", "teacher", "optimizer"])
@pytest.mark.parametrize("value", [NAN, -INF])
def test_no_checkpoint_with_such_values_is_written(tmp_path: Path, part: str, value: float) -> None:
    save_checkpoint(tmp_path, make(1), keep=1, is_best=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    bad = make(2)
    bad = replace(bad, **{part: dict(getattr(bad, part))})
    getattr(bad, part)["running_mean"] = torch.tensor([[0.0, value]])
    with pytest.raises(UserError, match=rf"^the {part} is not finite after step 2, first in running_mean: "):
        save_checkpoint(tmp_path, bad, keep=1, is_best=False)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_weights_that_are_not_finite_are_not_loaded(trained_copy: Path) -> None:
    name = json.loads((trained_copy / "checkpoints" / "index.json").read_text())["latest"]
    for part, message in (("teacher", "teacher/embedder."), ("model", "editor.")):
        path = trained_copy / "checkpoints" / name / f"{part}.safetensors"
        weights = load_file(path)
        next(value for key, value in weights.items() if key.endswith("running_var"))[0] = NAN
        save_file(weights, path)
        with pytest.raises(
            UserError, match=rf"checkpoint .*{name} holds weights that are not finite, first in {message}"
        ):
            load(trained_copy)
    done = run_here("evaluate.py", "--run", str(trained_copy))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "holds weights that are not finite" in done.stderr.splitlines()[-1]


@pytest.fixture
def trained_copy(trained_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "copy"))


def test_refinement_that_diverges_leaves_the_checkpoint_before_it(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    refined = [*RARE, "train.refine_steps=6", "train.refine_clips=12", "train.clip_norm=0"]
    monkeypatch.setattr(refine_module, "WARMUP_STEPS", 1)
    with pytest.raises(UserError, match=r"^at step \d of refinement .*, first the output of .*lower train.refine_lr"):
        train(tiny_config(*refined, "train.refine_lr=1e30"))
    run = Path(tiny_config().run_dir)
    checkpoint = load_checkpoint(run)
    assert checkpoint is not None and checkpoint.state["step"] == 6 and not checkpoint.state["refined"]
    assert not rows(run, "refinement")


@pytest.mark.slow
@pytest.mark.parametrize("shards", [False, True])
def test_two_processes_end_with_the_same_line(tmp_path: Path, shards: bool) -> None:
    environment = script_environment() | ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if shards else {})
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    overrides = [*TINY, "data.source=moving_mnist", *RARE, "train.lr=1e30", "train.clip_norm=0"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(REPO / "scripts/train.py"), *DEMO, *overrides, f"run_dir={tmp_path / 'run'}"],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = re.findall(r"(?<!traceback : )error: (.*)", done.stderr)
    assert done.returncode != 0 and len(lines) == 2, done.stderr[-5000:]
    assert all(line.startswith("at step 2 the loss is not finite, first the output of ") for line in lines)
    assert not list((tmp_path / "run").glob("checkpoints/*step*"))


def test_gradients_that_overflow_at_any_scale_end_the_run(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    trainer = Trainer(config, make_accelerator(config.train.precision, config.train.timeout_s))
    trainer.step = 4
    for scale in (65536.0, 2.0**-20):
        monkeypatch.setattr(trainer.accelerator, "scaler", SimpleNamespace(get_scale=lambda scale=scale: scale))
        trainer.check_steps()
    monkeypatch.setattr(trainer.accelerator, "scaler", SimpleNamespace(get_scale=lambda: 2.0**-30))
    with pytest.raises(UserError, match=r"^at step 4 gradients still overflow at the least scale"):
        trainer.check_steps()


def test_infinite_weights_are_not_evaluated(tiny_config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"^the model is not finite after step 1, first in embedder.encoder.layers.0"):
        train(tiny_config("train.lr=1e38", "train.clip_norm=0", "train.eval_every=1", "train.checkpoint_every=50"))
    assert not rows(Path(tiny_config().run_dir), "selection")
