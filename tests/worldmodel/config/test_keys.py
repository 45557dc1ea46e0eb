"""No key of a shipped config is decoration: each is read by code that acts on it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints
from unittest.mock import Mock

import pytest
import torch

from data_pipelines.worlds.digit_images import write_digit_images
from tests.conftest import REPO, videos_of
from tests.worldmodel.config.test_mistakes import CONFIGS
from tests.worldmodel.planning.test_recipes import tiny_dinov2
from worldmodel import load
from worldmodel.build import build_training_model, clip_layout
from worldmodel.commands.process import prepare_process
from worldmodel.config import Config, flatten, load_config, read_with_bases
from worldmodel.config.kinds import OUTSIDE, choice_of, members_of
from worldmodel.data import actions_of
from worldmodel.evaluation.factors import evaluate_factors
from worldmodel.evaluation.forecast import evaluate_forecasts
from worldmodel.planning import goal_conditioned
from worldmodel.planning.imagination import LatentPolicy
from worldmodel.planning.plan import needs_learned_policy
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
TAGS = {
    "data.source",
    "model.encoder.name",
    "model.latent.name",
    "model.editor.name",
    "planning.planner.name",
    "planning.risk.name",
    "data.relation.name",
}
"""Names of choices, which select the dataclass that is read."""


def dataclasses_of(kind: Any = Config, prefix: str = "") -> Iterator[tuple[type, str]]:
    """The dataclasses of the project's own choices and of sections, with the prefix of their keys."""
    members = members_of(kind) if choice_of(kind) else {"": kind}
    for member in dict.fromkeys(member for name, member in members.items() if name != OUTSIDE):
        yield member, prefix
        for key, hint in get_type_hints(member, include_extras=True).items():
            if choice_of(hint) or is_dataclass(hint):
                yield from dataclasses_of(hint, f"{prefix}{key}.")


@contextmanager
def recorded_reads() -> Iterator[set[str]]:
    """The keys that are read by code of the two packages; worldmodel/config reads all to copy them."""
    reads: set[str] = set()
    originals: dict[type, Any] = {}

    def watch(cls: type, prefix: str) -> None:
        original = originals[cls] = cls.__getattribute__

        def spy(self: object, name: str) -> Any:
            reader = sys._getframe(1).f_globals.get("__name__", "")
            if reader.split(".")[0] in ("worldmodel", "data_pipelines") and not reader.startswith("worldmodel.config"):
                reads.add(prefix + name)
            return original(self, name)  # type: ignore[call-arg, arg-type]

        cls.__getattribute__ = spy  # type: ignore[method-assign, assignment]

    for kind, prefix in dataclasses_of():
        watch(kind, prefix)
    try:
        yield reads
    finally:
        for cls, original in originals.items():
            cls.__getattribute__ = original  # type: ignore[method-assign]


def train_and_evaluate(config: Config) -> None:
    prepare_process(config.train)
    trained = load(train(config))
    evaluate_forecasts(trained.networks, config.evaluation)


def plan_once(config: Config, folder: Path) -> None:
    """One decision of a model that is conditioned on actions, and of its policy, both untrained."""
    block, action_dim = clip_layout(config).span, config.model.action_dim
    frames, stride = 2 * config.data.num_frames, videos_of(config).frame_stride
    labels = {videos_of(config).action_label: torch.zeros(2, frames, stride * action_dim)}
    batch: Any = {"labels": labels}
    actions = actions_of(batch, clip_layout(config), 1, torch.device("cpu"))
    assert actions.shape == (2, 1, block * action_dim)
    run = TrainedRun(folder, config, build_training_model(config).eval(), None, {"step": 0})
    learned = None
    if needs_learned_policy(config.planning, "search"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainedRun, "source", Mock())
            patch.setattr(goal_conditioned, "embed_clips", Mock())
            patch.setattr(goal_conditioned, "fit_policy", Mock())
            learned = goal_conditioned.goal_conditioned_policy(run, config.planning)
    policy = LatentPolicy(run, config.planning, seed=0, learned=learned)
    pictures = torch.zeros(2, 1, 3, 64, 64, dtype=torch.uint8)
    policy.begin(pictures[:, 0])
    assert policy.act(pictures).shape == (2, block, action_dim)


def test_every_key_of_every_shipped_config_is_read(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    encoder = f"model.encoder.path={tiny_dinov2(tmp_path / 'dinov2')}"
    with recorded_reads() as reads:
        train_and_evaluate(tiny_config("train.refine_steps=2", "train.refine_clips=12"))
        fresh = tiny_config(
            "data.source=moving_mnist", "objective.beta_warmup_steps=3", "objective.ema_schedule=cosine"
        )
        train_and_evaluate(Config(**{**vars(fresh), "run_dir": fresh.run_dir + "_fresh"}))
        causal = [*CAUSAL, f"run_dir={fresh.run_dir}_causal"]
        trained = load(train(load_config(REPO / "configs" / "causal" / "heteroscedastic.yaml", causal)))
        evaluate_factors(trained.networks, trained.config.evaluation)
        write_digit_images(tmp_path / "digits", {"train": 40, "selection": 12, "test": 12})
        digits = [f"data.root={tmp_path / 'digits'}", f"run_dir={fresh.run_dir}_digits", "data.batch_size=16"]
        digits += ["train.steps=2", "train.eval_every=2", "tracking.wandb=disabled"]
        train_and_evaluate(load_config(REPO / "configs" / "digits.yaml", digits))
        mazes = ("point_maze", "point_maze_lewm", "point_maze_gcbc", "point_maze_dino_wm")
        rooms = ("two_rooms", "two_rooms_random", "two_rooms_pit", "swm_two_room")
        for name in (*rooms, *mazes, "reacher", "cube", "push_t"):
            overrides = ["planning.candidates=40", "planning.iterations=2", *[encoder] * name.endswith("dino_wm")]
            plan_once(load_config(REPO / "configs" / f"{name}.yaml", overrides), tmp_path)
        build_training_model(load_config(REPO / "configs" / "video_vit.yaml", ["model.encoder=vit_tiny"]))
        build_training_model(load_config(REPO / "configs" / "games.yaml"))
    for path in CONFIGS:
        unread = set(flatten(read_with_bases(path))) - reads - TAGS
        assert not unread, f"{path.name} sets keys that nothing reads: {sorted(unread)}"
    assert "model.encoder.width" in reads and "train.nonsense" not in reads
