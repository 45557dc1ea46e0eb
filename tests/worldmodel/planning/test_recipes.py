"""The recipes of others: what trains their networks, and an agent that sees as a pretrained encoder did in training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.decoders import read_frames
from data_pipelines.worlds.recorder import Recording, make_env, record
from tests.conftest import REPO, normal
from worldmodel import load
from worldmodel.build import build_training_model
from worldmodel.config import Config, PlanningConfig, load_config
from worldmodel.data import TrainingInputs
from worldmodel.planning.imagination import LatentPolicy
from worldmodel.planning.plan import plan
from worldmodel.planning.protocol import PlanningProtocol
from worldmodel.runs.folder import RunFolder
from worldmodel.runs.metrics import read_planning
from worldmodel.runs.trained_run import TrainedRun
from worldmodel.training.loop import train

ROOMS = "data_pipelines.worlds.two_rooms:worldmodel/TwoRooms-v0"
SMALL = ["model.encoder.width=0.125", "data.root=unused"]


def recipe(name: str, *overrides: str) -> Config:
    return load_config(REPO / "configs" / f"point_maze_{name}.yaml", overrides)


def losses_of(config: Config) -> tuple[Any, dict[str, Tensor], Tensor, Tensor]:
    """The model after a backward pass, its losses, and the embeddings [B, 2, D] and actions [B, 1, A] of a batch."""
    torch.manual_seed(0)
    training = build_training_model(config)
    segments, actions = (
        torch.rand(16, 2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(1)),
        normal(2, 16, 1, 10),
    )
    inputs = TrainingInputs(segments, known_r=torch.zeros(16, 0), actions=actions)
    losses, targets = training(inputs, None, beta=1.0, generator=torch.Generator().manual_seed(3))
    losses["loss"].backward()
    features = training.model.embedder.features(torch.cat([segments[:, 0], segments[:, 1]]))
    context, target = training.model.embedder.project(features).detach().chunk(2)
    torch.testing.assert_close(target, targets)
    return training, losses, torch.stack([context, target], dim=1), actions


def moved(module: torch.nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters())


def test_lewm_is_trained_by_the_prediction_error_and_normality_alone() -> None:
    training, losses, embeddings, actions = losses_of(recipe("lewm", *SMALL))
    model = training.model
    assert (model.embedding_dim, model.latent.latent_dim, model.distance.num_values) == (192, 0, 0)
    context, target = embeddings.unbind(dim=1)
    predicted = model.edit(context, context[:, :0], actions[:, 0])
    directions = F.normalize(torch.randn(256, 192, generator=torch.Generator().manual_seed(3)), dim=1)
    # Epps and Pulley's integral by a fine sum over both sides, of the context and of the target
    t = torch.linspace(-5, 5, 401)
    statistics = []
    for samples in (context @ directions.T, target @ directions.T):
        found = torch.exp(1j * samples[..., None] * t).mean(dim=0)
        normal_one = torch.exp(-(t**2) / 2)
        statistics.append(16 * torch.trapezoid((found - normal_one).abs().square() * normal_one, t).mean())
    expected = F.mse_loss(predicted, target) + 0.09 * sum(statistics) / 2
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-3, atol=1e-3)


def test_cloning_trains_the_encoder_by_actions_and_no_predictor() -> None:
    training, losses, embeddings, actions = losses_of(recipe("gcbc", *SMALL))
    assert moved(training.model.embedder.encoder) and not moved(training.model.editor)
    guessed = training.sequence_terms.action_net(embeddings.flatten(1))
    torch.testing.assert_close(losses["loss"], F.mse_loss(guessed, actions[:, 0]), rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------- pretrained encoder


def tiny_dinov2(folder: Path) -> Path:
    """Save a DINOv2 of tiny size with random weights, for patches of 14 px, and return its folder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recipes") / "rooms"
    record(
        root,
        {"train": 4, "selection": 2, "test": 2},
        Recording(env=ROOMS, past_end=True, num_steps=20),
        num_processes=1,
    )
    return root


@pytest.fixture(scope="module")
def frozen_run(rooms: Path) -> Path:
    """The recipe of DINO-WM with an encoder of tiny size and random weights, after two updates."""
    encoder = tiny_dinov2(rooms.parent / "tiny")
    overrides = [
        f"data.root={rooms}", f"run_dir={rooms.parent / 'run'}", f"model.encoder.path={encoder}",
        f"train.encoder_cache={rooms.parent / 'cache'}", "data.size_px=56", "data.batch_size=4", "data.num_lanes=2",
        "data.num_workers=0", "model.embedding_dim=16", "model.hidden_dim=16", "train.steps=2", "train.eval_every=2",
        "evaluation.horizon=1", "evaluation.queries=2", "evaluation.fit_clips=4", "evaluation.selection_clips=2",
        "tracking.wandb=disabled",
    ]  # fmt: skip
    return train(recipe("dino_wm", *overrides))


def test_a_frozen_encoder_trains_and_plans(frozen_run: Path) -> None:
    run = load(frozen_run)
    asked = PlanningProtocol(env=ROOMS, env_kwargs={}, seeds=1, episodes=2, budget=10, first_seed=0)
    few = PlanningConfig(**{**vars(run.config.planning), "candidates": 40, "iterations": 2, "horizon": 2})
    result = plan(run, asked, few)
    assert result["protocol"]["block"] == 5 and result["success_rate"] in (0, 0.5, 1)
    assert read_planning(frozen_run) is not None and RunFolder(frozen_run).planned_episodes.is_file()


@pytest.mark.parametrize(("channels", "size_px"), [(3, 112), (3, 64), (1, 56)])
def test_frames_of_the_environment_are_seen_as_those_of_videos(rooms: Path, channels: int, size_px: int) -> None:
    """An environment is put at each state of a video, and its picture compared with the frame there."""
    overrides = [f"data.root={rooms}", f"data.channels={channels}", f"data.size_px={size_px}", "data.num_workers=0"]
    config = load_config(REPO / "configs" / "two_rooms.yaml", [*overrides, "model.encoder.width=0.125"])
    run = TrainedRun(rooms, config, build_training_model(config).eval(), None, {})
    policy, seen = LatentPolicy(run, PlanningConfig(horizon=1, candidates=40, iterations=1), seed=0), []
    run.model.embedder.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    env, video = make_env(ROOMS, {}, num_steps=20), rooms / "test" / "000000.mp4"
    row = json.loads((rooms / "test" / "metadata.jsonl").read_text().splitlines()[0])
    env.reset(seed=0)
    pictures = []
    for state in row["state"][:8]:
        env.unwrapped.set_state(np.float32(state))  # type: ignore[attr-defined]
        pictures.append(torch.from_numpy(np.array(env.render())).movedim(-1, 0))
    frames = np.stack(list(read_frames(video, 0, 8, channels=channels, size_px=size_px)))
    policy.begin(torch.stack(pictures))
    policy.act(torch.stack(pictures)[:, None])
    assert len(seen) >= 2 and frames.shape == (8, channels, size_px, size_px)
    for video_seen in seen:
        error = (255 * video_seen[:, 0] - torch.from_numpy(frames)).abs()
        assert error.max() <= 12 and error.mean() < 0.5  # the videos are compressed
    assert (frames[1:].astype(int) - frames[:-1]).max() > 20  # the dot has moved each time
