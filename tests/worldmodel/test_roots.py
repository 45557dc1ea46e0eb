"""data.root as a list of roots with weights: in the config, in training and resuming, in evaluation and export."""

import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import worldmodel
from data_pipelines.errors import UserError
from data_pipelines.stream import VideoStream
from tests.conftest import videos_of
from worldmodel.config import Config, load_config, to_yaml
from worldmodel.config.data import RootConfig
from worldmodel.evaluation.evaluate import evaluate
from worldmodel.runs.folder import RunFolder
from worldmodel.sources import make_source
from worldmodel.training.loop import train


@pytest.fixture
def roots(world: Path, kicked_world: Path, tmp_path: Path) -> str:
    """The override of two roots: nine frames of a digit, and a quarter of the clips from longer videos."""
    shutil.copytree(world, tmp_path / "data" / "moving")
    shutil.copytree(kicked_world, tmp_path / "data" / "kicked")
    return f"data.root=[{{path: {tmp_path}/data/moving, weight: 3}}, {{path: {tmp_path}/data/kicked}}]"


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    [latest, *_] = sorted((run / "checkpoints").glob("step_*"), reverse=True)
    return load_file(latest / "model.safetensors")


def test_training_and_resuming_bit_for_bit(
    tiny_config: Callable[..., Config], roots: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tiny_config(roots, f"run_dir={tmp_path / 'whole'}"))
    batches = VideoStream.batches

    def stop_after_five(self: VideoStream, start_batch: int = 0) -> Iterator[Any]:
        yield from islice(batches(self, start_batch), 5)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(VideoStream, "batches", stop_after_five)
        train(tiny_config(roots, f"run_dir={tmp_path / 'stopped'}"))
    resumed = train(tiny_config(roots, f"run_dir={tmp_path / 'stopped'}"), resume=True)
    expected, found = weights_of(whole), weights_of(resumed)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    shutil.copy(
        next((tmp_path / "data" / "kicked" / "train").glob("*1.mp4")), tmp_path / "data/kicked/train/000000.mp4"
    )
    with pytest.raises(UserError, match=r"have changed since its checkpoint: '2:000000.mp4' has other content"):
        train(tiny_config(roots, f"run_dir={tmp_path / 'stopped'}"), resume=True)


def test_evaluation_and_export(tiny_config: Callable[..., Config], roots: str, tmp_path: Path) -> None:
    config = tiny_config(roots)
    source = make_source(config)
    assert source.url is None and source.known_law("test", 1) is None
    clips = sum(len(batch["video"]) for batch in source.evaluation_batches("test", 1000))
    assert clips == 24 + 4 * 6  # all of both roots: one in nine frames, six in 24, three frames apart
    run = train(config)
    evaluate(worldmodel.load(run))
    assert RunFolder(run).metrics.is_file()
    exported = worldmodel.export(worldmodel.load(run), tmp_path / "exported")
    data = videos_of(load_config(exported / "config.yaml"))
    assert data.root == (RootConfig("moving", 3.0), RootConfig("kicked", 1.0))
    assert "moving, kicked" in data.place and str(tmp_path) not in (exported / "config.yaml").read_text()


def test_a_split_that_is_too_short_names_the_roots(tiny_config: Callable[..., Config], roots: str) -> None:
    source = make_source(tiny_config(roots))
    with pytest.raises(UserError, match=r"the train split of .*/moving, .*/kicked: clips span 27 frames"):
        source.check_split("train", 7, (), "keys")


def test_the_config_takes_a_text_or_a_list(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny_config("data.root=[{path: 007, weight: 2}, {path: b}]")
    assert videos_of(config).root == (RootConfig("007", 2.0), RootConfig("b", 1.0))
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "c.yaml") == config
    for text in ("[x]", "[{path: a", "007", "#3 a: b ", "{path: a}"):
        assert videos_of(tiny_config(f"data.root={text}")).root == text
    for root, message in {
        "[{path: a, wight: 2}]": "(did you mean data.root.0.weight?)",
        "[{path: a, weight: 0}]": "data.root.0.weight=0: input should be greater than 0",
        "[{weight: 1}]": "missing key data.root.0.path",
        "[{path: ''}]": "data.root is empty, or has an empty path: give it a value",
    }.items():
        with pytest.raises(UserError, match=r"^[^\n]*: ") as caught:
            tiny_config(f"data.root={root}")
        assert str(caught.value).endswith(message), str(caught.value)
    (tmp_path / "c.yaml").write_text("run_dir: r\ndata: {root: []}\n")
    with pytest.raises(UserError, match=r"data\.root is empty"):
        load_config(tmp_path / "c.yaml")
