"""Trainings that start from the weights of another run."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.errors import UserError
from tests.conftest import REPO, run_processes
from worldmodel.config import Config
from worldmodel.runs import hub
from worldmodel.runs.checkpoint import Checkpoint, load_checkpoint
from worldmodel.training.launch import make_accelerator
from worldmodel.training.loop import train
from worldmodel.training.session import Interrupted
from worldmodel.training.start_from import merged, start_from
from worldmodel.training.trainer import Trainer

MakeConfig = Callable[..., Config]
STILL = ["train.lr=1e-45", "train.weight_decay=0"]
"""With these, the parameters of a run are those of its start."""


def checkpoint_of(run: Path) -> Checkpoint:
    checkpoint = load_checkpoint(run)
    assert checkpoint is not None
    return checkpoint


def assert_equal(tensors: dict[str, Any], expected: dict[str, Any]) -> None:
    assert tensors.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(tensors[name].cpu(), expected[name])] == []


def test_student_and_teacher_are_those_of_the_other_run(trained_run: Path, tiny_config: MakeConfig) -> None:
    """Running statistics too."""
    stored = checkpoint_of(trained_run)
    trainer = Trainer(tiny_config("seed=5", "model.latent.prior=mixture"), make_accelerator("fp32", 60))
    assert trainer.teacher is not None
    start_from(trainer, str(trained_run))
    assert_equal(trainer.student.state_dict(), stored.model)
    assert_equal(trainer.teacher.state_dict(), stored.teacher)
    assert not trainer.optimizer.optimizer.state


def test_a_new_teacher_is_a_copy_of_the_student(
    tiny_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a network that the other run does not have starts with new weights."""
    other = train(tiny_config(f"run_dir={tmp_path / 'other'}", "objective=vicreg", "train.steps=2"))
    trainer = Trainer(tiny_config("seed=5", "model.editor=blocks"), make_accelerator("fp32", 60))
    new = {name: value.clone() for name, value in trainer.student.state_dict().items() if name.startswith("editor.")}
    assert trainer.teacher is not None and new
    start_from(trainer, str(other))
    stored = {name: value for name, value in checkpoint_of(other).model.items() if not name.startswith("editor.")}
    assert_equal(trainer.student.state_dict(), stored | new)
    assert_equal(trainer.teacher.state_dict(), {k: v for k, v in stored.items() if k.startswith("embedder.")})
    assert f"starting from {other}, step_00000002: embedder, latent; new: editor\n" in capsys.readouterr().out


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_run_starts_there_and_continues_without_it(
    trained_run: Path, tiny_config: MakeConfig, tmp_path: Path, interrupted: bool
) -> None:
    other = shutil.copytree(trained_run, tmp_path / "other")
    config = tiny_config(f"train.start_from={other}", "model.latent.prior=mixture", *STILL)
    if interrupted:
        steps = iter([0, signal.SIGTERM])
        with pytest.raises(Interrupted):
            train(config, stop=lambda: next(steps))
        shutil.rmtree(other)
    run = train(config, resume=interrupted)
    own, stored = checkpoint_of(run), checkpoint_of(trained_run)
    parameters = {name for name in stored.model if "running" not in name and "num_batches" not in name}
    assert own.state["step"] == 6 and len(parameters) > 20
    assert_equal({name: own.model[name] for name in parameters}, {name: stored.model[name] for name in parameters})


def test_an_interrupted_run_continues_bit_for_bit(trained_run: Path, tiny_config: MakeConfig, tmp_path: Path) -> None:
    keys = f"train.start_from={trained_run}", "model.latent.prior=mixture"
    whole = checkpoint_of(train(tiny_config(*keys, f"run_dir={tmp_path / 'whole'}")))
    steps = iter([0, 0, signal.SIGTERM])
    with pytest.raises(Interrupted):
        train(tiny_config(*keys), stop=lambda: next(steps))
    assert_equal(checkpoint_of(train(tiny_config(*keys), resume=True)).model, whole.model)


def test_networks_are_taken_as_a_whole_or_not_at_all() -> None:
    own = {
        "embedder.a": torch.zeros(2),
        "editor.a": torch.zeros(2),
        "editor.b": torch.zeros(3),
        "latent.a": torch.ones(1),
    }
    stored = {
        "embedder.a": torch.ones(2),
        "editor.a": torch.ones(2),
        "editor.b": torch.ones(4),
        "objective.a": torch.ones(1),
    }
    start = merged(own, stored, "other")
    assert_equal(start.weights, own | {"embedder.a": torch.ones(2)})
    assert (start.taken, start.new) == (["embedder"], ["editor", "latent"])


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("model.embedding_dim=24", r"embedder\.[\w.]+ is \[\d.*\] there, \[\d.*\] here"),
        ("model.encoder={name: vit_tiny, patch_px: 32}", r"embedder\.[\w.]+ is (missing there, \[|\[.*there, missing)"),
    ],
)
def test_another_encoder_is_one_line(trained_run: Path, tiny_config: MakeConfig, change: str, difference: str) -> None:
    message = f"^the encoder of train.start_from={trained_run} is another one: {difference}.*: give this run the .*$"
    with pytest.raises(UserError, match=message):
        train(tiny_config(f"train.start_from={trained_run}", change))


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_without_a_checkpoint_is_one_line(tiny_config: MakeConfig, tmp_path: Path, resume: bool) -> None:
    message = f"^train.start_from={tmp_path / 'nowhere'}: this is not a run with a checkpoint$"
    with pytest.raises(UserError, match=message):
        train(tiny_config(f"train.start_from={tmp_path / 'nowhere'}"), resume=resume)


def test_a_run_starts_from_one_on_the_hub(
    trained_run: Path, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def download(*arguments: Any) -> Path:
        asked.append(arguments)
        return trained_run

    monkeypatch.setattr(hub, "download", download)
    run = train(tiny_config("train.start_from=owner/name", "model.latent.prior=mixture", *STILL))
    assert set(asked) == {("owner/name", None, "latest")}
    assert "starting from owner/name, step_00000006: embedder, " in capsys.readouterr().out
    own, stored = checkpoint_of(run).model, checkpoint_of(trained_run).model
    weights = [name for name in stored if name.startswith("embedder.") and name.endswith(".weight")]
    assert_equal({name: own[name] for name in weights}, {name: stored[name] for name in weights})


def test_a_run_does_not_replace_the_one_that_it_starts_from(trained_run: Path, tiny_config: MakeConfig) -> None:
    config = tiny_config()
    run = Path(config.run_dir)
    shutil.copytree(trained_run, run)
    with pytest.raises(UserError, match="is run_dir itself: name another run_dir"):
        train(tiny_config(f"train.start_from={run.parent}/./{run.name}"), overwrite=True)
    assert checkpoint_of(run).state == checkpoint_of(trained_run).state


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_processes_start_there_together(
    trained_run: Path, tiny_overrides: list[str], tmp_path: Path, sharded: bool
) -> None:
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if sharded else {}
    script = [
        str(REPO / "scripts" / "train.py"),
        "--config",
        str(REPO / "configs" / "objectives.yaml"),
        *tiny_overrides,
    ]
    keys = [f"train.start_from={trained_run}", "model.latent.prior=mixture", *STILL]
    printed = run_processes(2, *script, *keys, environment=environment)
    assert printed.count(f"starting from {trained_run}") == 1 and "new:" not in printed
    own, stored = checkpoint_of(tmp_path / "run").model, checkpoint_of(trained_run).model
    parameters = {name for name in stored if "running" not in name and "num_batches" not in name}
    assert_equal({name: own[name] for name in parameters}, {name: stored[name] for name in parameters})
