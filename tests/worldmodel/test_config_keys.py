"""No key of a shipped config is decoration: each is read by code that acts on it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.conftest import REPO
from tests.worldmodel.test_config import CONFIGS
from worldmodel import config as config_module
from worldmodel import load
from worldmodel.config import Config, flatten, load_config
from worldmodel.data import actions_of
from worldmodel.evaluation.factors import evaluate_factors
from worldmodel.evaluation.forecast import evaluate_forecasts
from worldmodel.nets.world_model import WorldModel
from worldmodel.planning.imagination import LatentPolicy
from worldmodel.runs.trained_run import TrainedRun
from worldmodel.training.loop import train

CAUSAL = [
    "model.latent=oracle",
    "train.steps=4",
    "train.eval_every=4",
    "evaluation.queries=50",
    "evaluation.fit_clips=50",
    "evaluation.selection_clips=50",
]
GROUPS = {
    "DataConfig": "data.",
    "ModelConfig": "model.",
    "ObjectiveConfig": "objective.",
    "TrainConfig": "train.",
    "EvaluationConfig": "evaluation.",
    "PlanningConfig": "planning.",
    "TrackingConfig": "tracking.",
    "Config": "",
}


@contextmanager
def recorded_reads() -> Iterator[set[str]]:
    """The keys that are read by code of the two packages other than config.py itself, which reads all to copy them."""
    reads: set[str] = set()
    originals: dict[type, Any] = {}

    def watch(cls: type, prefix: str) -> None:
        original = originals[cls] = cls.__getattribute__

        def spy(self: object, name: str) -> Any:
            reader = sys._getframe(1).f_globals.get("__name__", "")
            if reader.split(".")[0] in ("worldmodel", "data_pipelines") and reader != "worldmodel.config":
                reads.add(prefix + name)
            return original(self, name)  # type: ignore[call-arg, arg-type]

        cls.__getattribute__ = spy  # type: ignore[method-assign, assignment]

    for name, prefix in GROUPS.items():
        watch(getattr(config_module, name), prefix)
    try:
        yield reads
    finally:
        for cls, original in originals.items():
            cls.__getattribute__ = original  # type: ignore[method-assign]


def train_and_evaluate(config: Config) -> None:
    trained = load(train(config))
    evaluate_forecasts(trained.config, trained.model, trained.target_encoder, torch.device("cpu"))


def plan_once(config: Config) -> None:
    """One decision of a model that is conditioned on actions, untrained."""
    labels = {config.data.action_label: torch.zeros(2, 2, config.model.action_dim)}
    assert actions_of({"labels": labels}, config, 1, torch.device("cpu")) is not None
    run = TrainedRun(Path("run"), config, WorldModel(config).eval(), None, {})
    policy = LatentPolicy(run, config.planning, seed=0)
    frames = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    policy.begin(frames)
    assert policy.act(frames).shape == (2, config.model.action_dim)


def test_every_key_of_every_shipped_config_is_read(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with recorded_reads() as reads:
        train_and_evaluate(tiny_config("train.refine_steps=2", "train.refine_clips=12"))
        fresh = tiny_config(
            "data.source=moving_mnist", "objective.beta_warmup_steps=3", "objective.ema_schedule=cosine"
        )
        train_and_evaluate(Config(**{**vars(fresh), "run_dir": fresh.run_dir + "_fresh"}))
        causal = [*CAUSAL, f"run_dir={fresh.run_dir}_causal"]
        trained = load(train(load_config(REPO / "configs" / "causal" / "heteroscedastic.yaml", causal)))
        evaluate_factors(trained.config, trained.model, torch.device("cpu"))
        for name in ("two_rooms.yaml", "two_rooms_random.yaml"):
            plan_once(load_config(REPO / "configs" / name, ["planning.candidates=40", "planning.iterations=2"]))
    for path in CONFIGS:
        unread = set(flatten(yaml.safe_load(path.read_text()))) - reads
        assert not unread, f"{path.name} sets keys that nothing reads: {sorted(unread)}"
    assert "model.width" in reads and "train.nonsense" not in reads
