import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import worldmodel
from data_pipelines.decoders import read_frames
from data_pipelines.errors import UserError
from data_pipelines.worlds.law import Quantity
from tests.conftest import REPO, videos_of
from worldmodel import TrainedRun, load
from worldmodel.commands.main import main
from worldmodel.config import Config
from worldmodel.evaluation.readout import Readout, load_readout, save_readout
from worldmodel.evaluation.surprise import SEGMENTS_AT_ONCE

CENTROID = Quantity("centroid", "px", ("x", "y"))
DIMS = 16


@pytest.fixture(scope="module")
def run(trained_run: Path) -> TrainedRun:
    return load(trained_run)


def clip(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def readout() -> Readout:
    generator = torch.Generator().manual_seed(1)
    centre, scale = torch.randn(DIMS, generator=generator), torch.rand(DIMS, generator=generator) + 0.5
    return Readout(centre, scale, torch.randn(DIMS, 2, generator=generator), torch.tensor([30.0, 20.0]), 0.01)


def evaluated(trained_run: Path, tmp_path: Path) -> TrainedRun:
    folder = tmp_path / "evaluated"
    shutil.copytree(trained_run, folder)
    loaded = load(folder)
    save_readout(folder, readout(), CENTROID, loaded.state["step"])
    return loaded


def test_videos_that_were_moved_are_named(
    trained_run: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a folder from which the data.root of the exported config leads nowhere."""
    exported, moved = worldmodel.export(load(trained_run), tmp_path / "exported"), tmp_path / "moved"
    moved.symlink_to(world)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"is not a folder below|does not exist"):
        worldmodel.evaluate(load(exported))
    here = load(exported, data_root=moved)
    assert here.source.content == "frames" and videos_of(here.config).root == str(moved)
    given = ["decode", "--run", "exported", "--steps", "1", "--clips", "4"]
    assert main([*given, "--data-root", "moved"]) == 0 and "mean squared error" in capsys.readouterr().out
    assert "root: moved" not in (exported / "config.yaml").read_text()


def test_clips_that_are_generated_have_no_folder(tiny_config: Callable[..., Config]) -> None:
    folder = worldmodel.train(tiny_config("data.source=moving_mnist", "train.steps=1"))
    with pytest.raises(UserError, match=r"data\.source=moving_mnist are not in a folder: leave out the data root 'a'"):
        load(folder, data_root="a")


def test_networks_are_in_evaluation_mode(run: TrainedRun) -> None:
    assert run.teacher is not None
    assert not run.model.training and not any(module.training for module in run.teacher.modules())


def test_rollout_is_the_model_s_from_a_seed_and_carries_no_gradient(run: TrainedRun) -> None:
    x = clip(2, 3, 1, 64, 64)
    futures = run.rollout(x, 3, 5, seed=4)
    with torch.no_grad():
        expected = run.model.rollout(x, 3, 5, torch.Generator().manual_seed(4))
    assert torch.equal(futures, expected) and futures.shape == (2, 5, 3, DIMS)
    assert not futures.requires_grad and not run.encode(x).requires_grad
    assert not torch.equal(futures, run.rollout(x, 3, 5, seed=5))


def test_clips_of_bytes_are_clips_in_0_to_1(run: TrainedRun) -> None:
    pixels = (clip(2, 3, 1, 64, 64) * 255).round().byte()
    torch.testing.assert_close(run.encode(pixels), run.encode(pixels / 255))


def test_forecast_is_the_rollout_read_through_the_saved_readout(trained_run: Path, tmp_path: Path) -> None:
    run = evaluated(trained_run, tmp_path)
    x = clip(2, 3, 1, 64, 64)
    forecast = run.forecast(x, 3, 5, seed=4)
    assert forecast.shape == (2, 5, 3, 2)
    torch.testing.assert_close(forecast, readout()(run.rollout(x, 3, 5, seed=4)))
    loaded, quantity = load_readout(run.folder, run.state["step"])
    assert quantity == CENTROID and loaded.strength == 0.01


def test_a_forecast_needs_an_evaluation_of_the_same_checkpoint_with_labels(trained_run: Path, tmp_path: Path) -> None:
    x = clip(1, 3, 1, 64, 64)
    run = evaluated(trained_run, tmp_path)
    save_readout(run.folder, readout(), CENTROID, step=2)
    with pytest.raises(UserError, match="evaluated at step 2, but the loaded checkpoint is from step 6"):
        run.forecast(x, 1, 2)
    (run.folder / "readout.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is damaged, evaluate the run again"):
        run.forecast(x, 1, 2)
    (run.folder / "readout.safetensors").unlink()
    with pytest.raises(UserError, match="was not evaluated: evaluate it first"):
        run.forecast(x, 1, 2)
    (run.folder / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match="have no labels"):
        run.forecast(x, 1, 2)


@pytest.mark.parametrize(
    ("change", "tells"),
    [
        (lambda x: {"centre": x.centre[1:]}, "scale is torch.float32 of shape"),
        (lambda x: {"weight": x.weight[:, :1]}, "weight is torch.float32 of shape"),
        (lambda x: {"weight": x.weight[0]}, "weight is torch.float32 of shape"),
        (lambda x: {"bias": x.bias.long()}, "bias is torch.int64"),
        (lambda x: {"centre": x.centre[1:], "scale": x.scale[1:], "weight": x.weight[1:]}, "is of another model"),
    ],
)
def test_a_readout_of_other_sizes_is_one_line(
    trained_run: Path, tmp_path: Path, change: Callable[[Readout], dict[str, Any]], tells: str
) -> None:
    run = evaluated(trained_run, tmp_path)
    save_readout(run.folder, replace(readout(), **change(readout())), CENTROID, run.state["step"])
    with pytest.raises(UserError, match=tells):
        run.forecast(clip(1, 3, 1, 64, 64), 1, 2)


@pytest.mark.parametrize(
    "shape", [(2, 3, 64, 64), (2, 4, 1, 64, 64), (2, 3, 3, 64, 64), (2, 3, 1, 32, 64), (0, 3, 1, 64, 64)]
)
def test_a_clip_of_another_shape_is_told_the_one_that_fits(run: TrainedRun, shape: tuple[int, ...]) -> None:
    for call in (run.encode, lambda x: run.rollout(x, 1, 1)):
        with pytest.raises(UserError, match=re.escape(str(list(shape)))) as raised:
            call(clip(*shape))
        assert "[B, 3, 1, 64, 64]" in str(raised.value)


def test_clips_and_numbers_that_make_no_sense_are_refused(run: TrainedRun) -> None:
    with pytest.raises(UserError, match=re.escape("[T, 1, 64, 64]")):
        run.surprise(clip(1, 12, 1, 64, 64))
    with pytest.raises(UserError, match="int64"):
        run.encode(torch.zeros(1, 3, 1, 64, 64, dtype=torch.int64))
    with pytest.raises(UserError, match=re.escape("values 0 to 255")):
        run.encode(torch.linspace(0, 255, 3 * 64 * 64).view(1, 3, 1, 64, 64))
    with pytest.raises(UserError, match="horizon=0"):
        run.rollout(clip(1, 3, 1, 64, 64), 0, 1)
    with pytest.raises(UserError, match="num_samples=0"):
        run.rollout(clip(1, 3, 1, 64, 64), 1, 0)


def test_the_surprise_of_a_file_is_that_of_its_frames(run: TrainedRun, long_video: Path) -> None:
    frames = torch.from_numpy(np.stack(list(read_frames(long_video, channels=1, size_px=64))))
    from_file, from_clip = run.surprise(long_video), run.surprise(frames)
    for name in ("frame", "surprise", "kl_nats", "prediction_error", "scene_nats", "peaks", "peak_frames"):
        np.testing.assert_array_equal(getattr(from_file, name), getattr(from_clip, name))
    assert from_file.video == "long.mp4" and from_clip.time_s is None
    assert len(from_file.surprise) == 10 and SEGMENTS_AT_ONCE > 12


def test_the_example_of_the_readme_runs_as_it_stands(
    trained_run: Path, long_video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = evaluated(trained_run, tmp_path)
    section = (REPO / "README.md").read_text(encoding="utf-8").partition("## Python")[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    for path, own in (("runs/demo", run.folder), ("data/moving_mnist/test/000000.mp4", long_video)):
        assert path in code
        code = code.replace(path, str(own))
    exec(compile(code, "README.md", "exec"), {})
    assert "[2, 64, 4, 2]" in capsys.readouterr().out
