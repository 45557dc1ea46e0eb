"""A trained run and a video of many transitions, made once."""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from data_pipelines.worlds.digits import load_sprites
from data_pipelines.worlds.kicked_mnist import render_digits, sample_videos
from data_pipelines.worlds.written import encode_h264
from tests.conftest import REPO, TINY
from worldmodel.config import load_config
from worldmodel.training.loop import train


@pytest.fixture(scope="session")
def trained_run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six updates on the tiny world, its prior a mixture. Copy it before changing it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    run = tmp_path_factory.mktemp("trained") / "run"
    return train(load_config(REPO / "configs" / "demo.yaml", [*TINY, f"data.root={world}", f"run_dir={run}"]))


@pytest.fixture(scope="session")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kicked digit, 36 frames at ten a second."""
    sprites = load_sprites("test")
    videos = sample_videos(sprites, 1, 1, 36, "bounce", torch.Generator().manual_seed(0))
    frames = render_digits(sprites.images[videos.sprite], videos.motion.centre)[0, :, 0]
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    encode_h264(path, (frames * 255).round().byte().numpy())
    return path
