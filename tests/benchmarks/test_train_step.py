"""The plain step computes what the trainer's does, and the benchmark of both runs; no test looks at a clock."""

import json
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.train_step import (
    DEFAULTS,
    check_plain,
    make_plain,
    make_trainer,
    our_losses,
    plain_losses,
    plain_process,
)
from data_pipelines.errors import UserError
from tests.conftest import REPO, run_script
from tests.worldmodel.commands.test_scripts import assert_one_line
from worldmodel.config import load_config
from worldmodel.training.batch_norm import BatchNorm

PAPER = str(REPO / "configs" / "paper.yaml")
REDUCED = [
    "model.encoder.width=0.125",
    "model.hidden_dim=64",
    "train.num_threads=1",
    "train.steps=10",
]


@pytest.mark.slow
def test_our_step_in_fp32_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """At ten times the paper's learning rate, so that an update that differs shows in the next losses."""

    # In the channels-last layout PyTorch adds up the statistics of a batch norm in float32, one value after the other:
    # a thousandth is lost, which ten updates make much of. That is no difference of the steps.
    def in_double(norm: nn.BatchNorm1d | nn.BatchNorm3d, values: Tensor) -> Tensor:
        assert norm.training and norm.weight is not None and norm.bias is not None
        return F.batch_norm(
            values.double(), None, None, norm.weight.double(), norm.bias.double(), training=True, eps=norm.eps
        ).float()

    ours_of_vectors = BatchNorm.forward
    monkeypatch.setattr(nn.BatchNorm3d, "forward", in_double)
    monkeypatch.setattr(
        BatchNorm,
        "forward",
        lambda norm, values: in_double(norm, values) if values.ndim > 3 else ours_of_vectors(norm, values),
    )
    overrides = [*DEFAULTS, *REDUCED, "data.batch_size=32", "train.precision=fp32", "train.lr=1e-3"]
    config = load_config(PAPER, overrides)
    trainer = make_trainer(config)
    plain = make_plain(config, trainer)
    before = [weights.clone() for weights in plain.model.parameters()]
    losses = plain_losses(config, plain, 10)
    assert our_losses(config, trainer, 10) == pytest.approx(losses, abs=1e-5)
    assert trainer.teacher is not None
    for ours, theirs in (
        (trainer.student.embedder.encoder, plain.model.embedder.encoder),
        (trainer.teacher.embedder.projector, plain.teacher.projector),
    ):
        for weights, others in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(weights, others, rtol=0, atol=1e-4)
    moved = [float((new - old).detach().abs().max()) for new, old in zip(plain.model.parameters(), before, strict=True)]
    assert min(moved) > 1e-3, "every weight has learned"


@pytest.mark.parametrize(
    ("answer", "message"),
    [(None, "the process of the plain step has ended"), (UserError("no such folder"), "no such folder")],
)
def test_the_end_of_the_plain_process_is_a_mistake_of_the_user(
    answer: UserError | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended:
        def __init__(self, target: object, args: tuple[object, Connection], daemon: bool) -> None:
            self.requests = args[1]

        def start(self) -> None:
            if answer:
                self.requests.send(answer)
            self.requests.close()

        def join(self) -> None:
            pass

    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=Ended)
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)
    with plain_process(load_config(PAPER)) as plain, pytest.raises(UserError, match=message):
        plain("step")


@pytest.mark.slow
def test_it_times_both_and_compares_their_losses(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = run_script(
        *("benchmarks/train_step.py", "--config", PAPER, "--steps", "2", "--compare-steps", "10", "--out", str(out)),
        *(*REDUCED, "data.batch_size=8", "train.precision=bf16"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    losses = result["losses"]
    assert [len(of_steps) for of_steps in losses.values()] == [10, 10, 10]
    for key, name, most in (("loss_max_diff", "fp32", 2e-3), ("loss_max_diff_as_timed", "bf16", 0.1)):
        assert result[key] == max(abs(a - b) for a, b in zip(losses["plain"], losses[name], strict=True))
        assert 0 < result[key] < most
    assert (result["device"], result["precision"], result["compare_steps"]) == ("cpu", "bf16", 10)
    assert result["machine"]["threads"] == 1 and result["machine"]["torch"] == torch.__version__
    assert len(result["steps_s"]) == len(result["baseline_steps_s"]) == 2 and result["render_batch_s"] > 0
    assert result["speedup"] == pytest.approx(result["baseline_step_s"] / result["step_s"])
    assert f"{result['speedup']:.2f} x" in done.stdout


def test_other_kernels_are_not_those_of_the_plain_step() -> None:
    with pytest.raises(UserError, match=r"is written for model\.encoder\.kernels=space_time alone"):
        check_plain(load_config(PAPER, [*DEFAULTS, "model.encoder.kernels=space"]))


@pytest.mark.slow
def test_senseless_numbers_and_other_models_end_with_one_line() -> None:
    assert_one_line("benchmarks/train_step.py", "--steps", "0", tells="--steps must be at least 1, not 0")
    assert_one_line(
        "benchmarks/train_step.py", "--config", PAPER, "model.latent=none", tells="for model.latent.name=gaussian alone"
    )
    # The process of the plain step is the first to meet this one. It has ended when the program ends.
    processes = multiprocessing.active_children()
    assert_one_line(
        "benchmarks/train_step.py", "--config", PAPER, "data.mnist_dir=nowhere", tells="in nowhere: the MNIST folder"
    )
    assert set(multiprocessing.active_children()) <= set(processes)
