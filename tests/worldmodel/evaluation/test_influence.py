"""Influence of training clips: against gradients of autograd, a closed form, and weights that are trained again."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_pipelines.errors import UserError
from tests.conftest import normal
from worldmodel import TrainedRun, load
from worldmodel.commands.main import main
from worldmodel.evaluation import influence
from worldmodel.evaluation.influence import (
    EmbeddedTransitions,
    Projection,
    TransitionGradients,
    TransitionLoss,
    embed_transitions,
    influences,
    precondition,
)
from worldmodel.report.influence_picture import influence_figure, shown_columns
from worldmodel.runs.folder import RunFolder


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> TrainedRun:
    """A copy of the tiny run, which a test may write into."""
    return load(shutil.copytree(trained_run, tmp_path / "run"))


def transitions(run: TrainedRun, count: int) -> EmbeddedTransitions:
    """Return the first transitions of the training clips."""
    [found] = embed_transitions(run.networks, run.source.evaluation_batches("train", count))
    return found


def test_gradients_are_those_of_autograd(run: TrainedRun) -> None:
    found, loss = transitions(run, 5), TransitionLoss(run.training)
    gradients = TransitionGradients(run.training)(found)
    num_weights = sum(weight.numel() for weight in loss.parameters())
    of_parts = [weight for name, weight in run.training.named_parameters() if name.startswith(("editor.", "latent."))]
    assert num_weights == sum(weight.numel() for weight in of_parts)
    project = Projection(num_weights, gradients.shape[1], torch.device("cpu"))
    for row, transition in enumerate(zip(*found[1:], strict=True)):
        of_weights = torch.autograd.grad(loss(*transition), list(loss.parameters()))
        expected = project(torch.cat([each.flatten() for each in of_weights])[None])[0]
        torch.testing.assert_close(gradients[row], expected, rtol=1e-4, atol=1e-5)


def test_the_loss_is_that_of_surprise(run: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from worldmodel.evaluation.surprise import measure

    monkeypatch.setattr(influence, "NUM_DRAWS", 16)  # surprise takes as many, of the same seed
    found = transitions(run, 4)
    with torch.no_grad():
        kl, error = measure(run.training, found.state, found.target, found.seen)
        losses = torch.stack([TransitionLoss(run.training)(*each) for each in zip(*found[1:], strict=True)])
    torch.testing.assert_close(losses, error + run.training.beta * kl)


def test_a_projection_keeps_inner_products() -> None:
    values = normal(0, 2, 6000)
    values[1] += values[0]
    found = Projection(6000, 512, torch.device("cpu"))(values)
    assert found.shape == (2, 512)
    scale = values.norm(dim=1)
    torch.testing.assert_close(
        found @ found.T / scale / scale[:, None], values @ values.T / scale / scale[:, None], rtol=0, atol=0.15
    )


def test_influence_is_the_change_of_a_query_s_loss() -> None:
    """Least squares with noise of the model's own variance: F is the Hessian, and the weights can be fitted again."""
    count, dim = 4000, 4
    inputs, weights = normal(0, count, dim), normal(1, dim)
    outputs = inputs @ weights + normal(2, count)

    def fit(kept: Tensor) -> Tensor:
        return torch.linalg.lstsq(inputs[kept], outputs[kept, None]).solution[:, 0]

    everything = torch.arange(count)
    fitted = fit(everything)
    gradients = (inputs @ fitted - outputs)[:, None] * inputs
    query, truth = normal(3, dim), torch.tensor(0.7)
    query_gradient = (query @ fitted - truth) * query
    found = influences(gradients, query_gradient[None], damping=0)[0]
    for clip in (int(found.argmax()), int(found.argmin())):
        without = fit(everything[everything != clip])
        change = 0.5 * (query @ without - truth).square() - 0.5 * (query @ fitted - truth).square()
        assert float(found[clip]) == pytest.approx(float(change), rel=0.1)


def test_preconditioning_solves_the_damped_system() -> None:
    gradients, queries = normal(0, 50, 6), normal(1, 3, 6)
    fisher = gradients.T @ gradients / 50
    damped = fisher + 0.5 * fisher.diagonal().mean() * torch.eye(6)
    torch.testing.assert_close(precondition(gradients, queries, 0.5) @ damped, queries)


def test_clips_are_ranked_and_shown(run: TrainedRun, world: Path) -> None:
    found = run.influence(world / "train" / "000007.mp4", num_shown=3)
    everything = transitions(run, 64)
    gradients = TransitionGradients(run.training)(everything)
    expected = influences(gradients, gradients[7:8])[0].numpy()
    order = found.clip_id.tolist()
    assert sorted(order) == list(range(64)) and (np.diff(found.influence) <= 0).all()
    np.testing.assert_allclose(found.influence, expected[order], rtol=1e-3, atol=1e-6)
    assert found.names == [f"{number:06d}.mp4" for number in order] and not found.first_frame.any()
    [batch] = run.source.evaluation_batches("train", 64)
    video = batch["video"].numpy()
    assert (found.frames == video[7]).all()
    assert (found.largest == video[order[:3]]).all() and (found.smallest == video[order[:-4:-1]]).all()


def test_gradients_are_computed_once_for_a_checkpoint(
    run: TrainedRun, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run.influence(world / "test" / "000000.mp4", num_clips=16)
    assert RunFolder(run.folder).influence.is_file() and len(first.clip_id) == 16
    with monkeypatch.context() as patched:
        patched.setattr(run.source, "evaluation_batches", None)
        again = run.influence(world / "test" / "000000.mp4", num_clips=16)
    assert (again.influence == first.influence).all()
    assert len(run.influence(world / "test" / "000000.mp4", num_clips=20).clip_id) == 20
    stored = RunFolder(run.folder).influence
    for damaged in (b"", stored.read_bytes()[:99], b"of another version"):
        stored.write_bytes(damaged)
        again = run.influence(world / "test" / "000000.mp4", num_clips=16)
        assert (again.influence == first.influence).all() and stored.stat().st_size > 1000
    run.state["updates"] += 1
    monkeypatch.setattr(run.source, "evaluation_batches", None)
    with pytest.raises(TypeError):
        run.influence(world / "test" / "000000.mp4", num_clips=20)


def test_the_command_writes_a_table_and_a_picture(
    run: TrainedRun,
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "worldmodel.commands.influence.keep_freed_memory", lambda: None
    )  # would be for all tests to come
    out, video = tmp_path / "out", world / "test" / "000001.mp4"
    given = ["--run", str(run.folder), "--video", str(video), "--out", str(out)]
    assert main(["influence", *given, "--num", "2", "--clips", "30"]) == 0
    printed = capsys.readouterr().out
    rows = list(csv.DictReader((out / "influence.csv").read_text().splitlines()))
    assert len(rows) == 30 and list(rows[0]) == ["clip", "video", "start_frame", "influence"]
    values = [float(row["influence"]) for row in rows]
    assert values == sorted(values, reverse=True)
    shown = [line.split()[-1] for line in printed.splitlines() if line.endswith(".mp4")]
    assert shown == [rows[at]["video"] for at in (0, 1, -1, -2)]
    with Image.open(out / "influence.png") as picture:
        assert picture.width == 1500 and picture.height > 400


def test_the_picture_shows_each_clip_once(run: TrainedRun, world: Path) -> None:
    figure = influence_figure(run.influence(world / "test" / "000000.mp4", num_shown=2))
    assert len(figure.axes) == 9 * 5
    assert shown_columns(6, 3) == list(range(6)) and shown_columns(20, 10) == [0, 3, 6, 9, 10, 13, 16, 19]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--start-frame", "1"], "frames [1, 10)"),
        (["--start-frame", "-1"], "frames [-1, 8)"),
        (["--num", "0"], "--num must be at least 1, not 0"),
        (["--clips", "0"], "--clips must be at least 1, not 0"),
        (["--video", "no.mp4"], "--video no.mp4: there is no such file"),
        (["--out", "/dev/null"], "cannot write to --out /dev/null"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    trained_run: Path,
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worldmodel.commands.influence.keep_freed_memory", lambda: None)
    given = ["--run", str(trained_run), "--video", str(world / "test" / "000000.mp4"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main(["influence", *given, *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_clips_that_are_generated_cannot_be_shown(run: TrainedRun, world: Path) -> None:
    from worldmodel.config import MovingMnistConfig
    from worldmodel.sources.moving_mnist import MovingMnistSource

    run.__dict__["source"] = MovingMnistSource(MovingMnistConfig(), seed=0, evaluation_seed=1)
    with pytest.raises(UserError, match="influence needs a run on video files"):
        run.influence(world / "test" / "000000.mp4")


def test_a_training_clip_that_cannot_be_read_any_more_is_named(
    run: TrainedRun, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(influence, "read_clips", lambda *arguments: iter(()))
    with pytest.raises(UserError, match=r"^video '0000\d\d\.mp4' does not decode any more: its training clip \d+$"):
        run.influence(world / "test" / "000000.mp4", num_clips=16)
