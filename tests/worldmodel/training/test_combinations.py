"""Every objective with every latent: trains, stays finite, rolls out."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from worldmodel import load
from worldmodel.config import Config, choices
from worldmodel.training.loop import train

SIZE_PX = 32
SHORT = (
    f"data.size_px={SIZE_PX}",
    "train.steps=20",
    "train.log_every=10",
    "train.eval_every=20",
    "train.checkpoint_every=20",
)
LATENTS = {
    "none": [],
    "gaussian": ["model.latent.prior_components=2"],
    "sparse": ["model.editor=low_rank", "model.latent.prior_components=2"],
    "oracle": ["model.latent.dim=2", "model.latent.prior_components=2"],
}


def train_and_roll_out(config: Config) -> None:
    trained = load(train(config))
    rows = [json.loads(line) for line in Path(config.run_dir, "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float)), row
    assert {row["split"] for row in rows} == {"train", "selection"}
    clip = torch.rand(2, 3, 1, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        futures = trained.model.rollout(clip, 3, 4, torch.Generator().manual_seed(0))
    assert futures.shape == (2, 4, 3, config.model.embedding_dim) and futures.isfinite().all()
    assert (futures.std(dim=1).max() > 1e-6) == (config.model.latent.name != "none")


QUICK = ("none", "gaussian")


@pytest.mark.parametrize(
    "latent", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in LATENTS]
)
@pytest.mark.parametrize("objective", choices("objective"))
def test_trains_and_rolls_out(objective: str, latent: str, tiny_config: Callable[..., Config]) -> None:
    train_and_roll_out(tiny_config(*SHORT, f"objective.name={objective}", f"model.latent={latent}", *LATENTS[latent]))


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.latent.prior=flow"],
        ["model.editor=sum", "model.latent.dim=16"],
        ["model.editor=low_rank"],
        ["model.latent.posterior_sees=target"],
        ["objective.name=infonce", "model.embedding_norm=standard"],
        ["objective.name=infonce", "model.embedding_norm=white", "model.editor=sum", "model.latent.dim=16"],
        ["objective.name=vicreg", "model.embedding_norm=standard", "data.num_segments=2"],
    ],
)
def test_other_choices_train_and_roll_out(overrides: list[str], tiny_config: Callable[..., Config]) -> None:
    train_and_roll_out(tiny_config(*SHORT, *overrides))
