"""A run whose model remembers earlier segments: every part that predicts starts from what was observed before."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipelines.errors import UserError
from data_pipelines.transforms import split_segments
from data_pipelines.worlds.recorder import Recording, record
from tests.conftest import REPO, normal
from tests.worldmodel.planning.test_goal_conditioned import Obedient
from worldmodel import load
from worldmodel.build import build_training_model
from worldmodel.commands.rollout import read_clip
from worldmodel.config import Config, External, load_config
from worldmodel.evaluation.embed import embed_split
from worldmodel.evaluation.forecast import evaluate_forecasts
from worldmodel.evaluation.influence import TransitionGradients, TransitionLoss, embed_transitions
from worldmodel.evaluation.surprise import SurpriseOptions, measure, score_clips, score_transitions
from worldmodel.nets.world_model import WorldModel
from worldmodel.planning.goal_conditioned import embed_clips
from worldmodel.planning.imagination import LatentPolicy
from worldmodel.runs.programs import EncoderProgram, write_programs
from worldmodel.runs.trained_run import TrainedRun
from worldmodel.sources import make_source
from worldmodel.training.loop import train
from worldmodel.training.refine import RefinementClips, draw_batch, steps_of

ENV = "data_pipelines.worlds.two_rooms:worldmodel/TwoRooms-v0"
SMALL = ["model.encoder.width=0.125", "model.embedding_dim=16", "model.hidden_dim=32", "data.num_workers=0"]


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("history") / "rooms"
    facts = Recording(env=ENV, kwargs={}, past_end=True, num_steps=20)
    record(root, {"train": 12, "selection": 2, "test": 2}, facts, num_processes=1)
    return root


def run_of(config: Config, folder: Path) -> TrainedRun:
    torch.manual_seed(0)
    return TrainedRun(folder, config, build_training_model(config).eval(), None, {"step": 0})


def run_of_rooms(rooms: Path, *overrides: str) -> TrainedRun:
    paths = [f"data.root={rooms}", "data.history_segments=2"]
    return run_of(load_config(REPO / "configs" / "two_rooms.yaml", [*SMALL, *paths, *overrides]), rooms / "run")


def run_of_video(*overrides: str) -> TrainedRun:
    """A run on gray frames, of which each is a segment."""
    keys = ["data.source=videos", "data.root=nothing", "data.num_frames=1", "data.history_segments=2"]
    return run_of(load_config(REPO / "configs" / "objectives.yaml", [*SMALL, *keys, *overrides]), Path("run"))


def remembered(model: WorldModel, segments: Tensor, actions: Tensor) -> Tensor:
    """The state of the last of segments [B, L, T, C, H, W] after actions [B, L - 1, A]."""
    before = torch.stack([model.encode(segments[:, at]) for at in range(segments.shape[1] - 1)], dim=1)
    return model.remember(model.observe(segments[:, -1]), before, actions)


# ------------------------------------------------------------------------------------------------------------ config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.latent=oracle"],
            "model.latent=oracle knows the r of the first segment of a clip: with data.",
        ),
        (["model.latent.prior=linear"], "model.latent.prior=linear is linear in one embedding"),
        (["model.editor=low_rank"], "model.editor=low_rank takes no history: with data.history_segments=1 it must be"),
        (["data.source=moving_mnist", "data.history_segments=2"], "data.history_segments=2"),
        (["data.history_segments=-1"], "data.history_segments=-1"),
    ],
)
def test_what_cannot_have_a_history_is_refused(
    overrides: list[str], message: str, tiny_config: Callable[..., Config]
) -> None:
    with pytest.raises(UserError) as caught:
        tiny_config("data.source=videos", "data.num_segments=2", "data.history_segments=1", *overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_videos_that_are_too_short_are_named_with_the_key(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config("data.source=videos", "data.history_segments=1")  # nine frames are three segments
    with pytest.raises(UserError, match=r"num_segments is data.num_segments=3 plus data.history_segments=1"):
        make_source(config).check_split("train", 2, set(), "objective.rollout_steps")


# ---------------------------------------------------------------------------------------------- training, evaluation


def test_a_run_with_a_history_trains_refines_and_is_evaluated(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(
        "data.source=videos", "data.num_segments=2", "data.history_segments=1", "data.clip_step=1",
        "train.refine_steps=4", "train.refine_clips=12", "train.refine_energy_weight=1.0", "model.scene_dim=2",
    )  # fmt: skip
    trained = load(train(config))
    assert "history.places" in trained.training.state_dict()
    metrics = evaluate_forecasts(trained.networks, config.evaluation).metrics
    scores: Any = metrics["embedding"]["forecasts"]["model"]["energy_score"]
    assert len(scores) == config.evaluation.horizon and np.isfinite(scores).all()


def test_refinement_draws_the_segments_and_actions_before_each_context(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(
        "data.source=videos", "data.history_segments=2", "train.refine_horizon=3", "objective.rollout_steps=2",
        "model.scene_dim=2", "model.embedding_dim=1", "train.refine_steps=1", "data.batch_size=256",
    )  # fmt: skip
    training, length = build_training_model(config), 2 + steps_of(config) + 2
    numbers = 100.0 * torch.arange(5)[:, None] + torch.arange(length)
    own = numbers[..., None]
    clips = RefinementClips(own, own[:, 1:], own + 2000, torch.empty(5, 0), own[:, :-2] + 3000)
    drawn = draw_batch(clips, config, training, torch.Generator().manual_seed(0))
    context = drawn.embedded.real[:, 0]
    assert set((context % 100).flatten().tolist()) == {2.0, 3.0, 4.0}
    assert torch.equal(drawn.embedded.before[..., 0], context + torch.arange(-2, 0))
    assert torch.equal(drawn.embedded.real[:, 1:, 0], context + torch.arange(1, 3))
    assert torch.equal(drawn.actions[..., 0], context + torch.arange(-2, 2) + 3000)
    assert torch.equal(drawn.embedded.features[:, 0] - 2000, context[:, 0] - drawn.embedded.age)


@torch.no_grad()
def test_queries_remember_the_segments_before_the_context(rooms: Path) -> None:
    run = run_of_rooms(rooms, "data.num_segments=2")
    networks, layout = run.networks, run.networks.layout
    assert layout.segments_for(3) == 2 + 4
    [batch] = run.source.evaluation_batches("test", 2, 3)
    segments = split_segments(batch["video"].float() / 255, 6)
    actions = batch["labels"]["action"][:, :5]
    split = embed_split(networks, "test", 2, seed=0, horizon=3, num_framed=2)
    torch.testing.assert_close(split.state, remembered(run.model, segments[:, :3], actions[:, :2]))
    torch.testing.assert_close(split.targets[:, 2], run.model.encode(segments[:, 5]))
    assert torch.equal(split.actions, actions[:, 2:])
    assert torch.equal(split.labels["state"], batch["labels"]["state"][:, 2:])
    assert torch.equal(split.frames, batch["video"][:, 2:])
    clips = embed_clips(run, 3, num_clips=4_000)
    every = split_segments(next(iter(run.source.evaluation_batches("train", 1, 3)))["video"].float() / 255, 6)
    torch.testing.assert_close(clips.states[0], run.model.encode(every[0, 2:]), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- planning


@torch.no_grad()
@pytest.mark.parametrize("replan_every", [1, 2])
def test_a_plan_starts_from_what_the_episode_has_shown(rooms: Path, replan_every: int) -> None:
    run = run_of_rooms(rooms, "data.frame_stride=2")
    config = dataclasses.replace(
        run.config.planning, planner=External(f"{Obedient.__module__}:Obedient"), horizon=3, replan_every=replan_every
    )
    policy = LatentPolicy(run, config, seed=0)
    pictures = (255 * torch.rand(2, 13, 3, 64, 64, generator=torch.Generator().manual_seed(0))).byte()
    policy.begin(pictures[:, 0])
    policy.plan = policy.plan._replace(mean=normal(1, *policy.plan.mean.shape))
    executed = [policy.act(pictures[:, :1])]
    for first in range(1, 13, 2 * replan_every):
        executed.append(policy.act(pictures[:, first : first + 2 * replan_every]))
    taken = torch.cat(executed, dim=1).unflatten(1, (-1, 2)).flatten(2)
    segments = pictures[:, ::2, None].float() / 255  # after each step of the model
    for number, decision in enumerate(policy.decisions):
        at = number * replan_every
        since = slice(max(0, at - 2), at)
        expected = remembered(run.model, segments[:, since.start : at + 1], taken[:, since]) if at else None
        expected = run.model.observe(segments[:, 0]) if expected is None else expected
        torch.testing.assert_close(decision.state, expected)
    policy.keep(torch.tensor([False, True]))
    policy.act(pictures[1:, : 2 * replan_every])
    assert policy.decisions[-1].state.shape == (1, run.model.embedding_dim + run.model.history.num_values)


# ------------------------------------------------------------------------------------------------ surprise, influence


@torch.no_grad()
@pytest.mark.parametrize("step_frames", [1, 2])
def test_surprise_remembers_what_the_video_has_shown(step_frames: int) -> None:
    run = run_of_video()
    video = torch.rand(9, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    found = score_transitions(
        run.networks, video.numpy(), 9, name="it", options=SurpriseOptions(step_frames=step_frames)
    )
    seen_at = run.model.seen_at
    for row, start in enumerate(found.start.tolist()):
        segments = video[None, max(0, start - 2) : start + 1, None]
        none = torch.empty(1, segments.shape[1] - 1, 0)
        state = remembered(run.model, segments, none) if none.shape[1] else run.model.observe(segments[:, 0])
        later = [run.model.encode(video[None, start + at, None]) for at in (1, seen_at)]
        kl, error = measure(run.training, state, *later)
        np.testing.assert_allclose(found.kl_nats[row], kl[0], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(found.prediction_error[row], error[0], rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_ordinary_surprise_is_of_the_transition_after_the_history() -> None:
    run = run_of_video()
    video = torch.rand(3, 5, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    batch: Any = {"video": video, "labels": {}, "clip_id": torch.arange(3), "row": torch.arange(3)}
    ordinary = score_clips(run.networks, [batch])
    alone = [score_transitions(run.networks, each.numpy(), 5, name="it").surprise[2] for each in video]
    np.testing.assert_allclose(ordinary.surprise, np.sort(alone), rtol=1e-3, atol=1e-5)


def test_gradients_of_influence_include_the_history() -> None:
    run = run_of_video()
    video = torch.rand(3, 5, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    batch: Any = {"video": video, "labels": {}, "clip_id": torch.arange(3), "row": torch.arange(3)}
    [found] = embed_transitions(run.networks, [batch])
    loss, gradients = TransitionLoss(run.training), TransitionGradients(run.training)
    projected = gradients(found)
    assert [name for name in gradients.weights if name.startswith("history.")]
    for row, transition in enumerate(zip(*found[1:], strict=True)):
        of_weights = torch.autograd.grad(loss(*transition), list(loss.parameters()))
        expected = gradients.project(torch.cat([each.flatten() for each in of_weights])[None])[0]
        torch.testing.assert_close(projected[row], expected, rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------------- a run in Python


@torch.no_grad()
def test_rollouts_take_a_clip_with_or_without_earlier_segments(rooms: Path) -> None:
    run = run_of_rooms(rooms)
    clip, actions = torch.rand(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0)), normal(1, 2, 6, 2)
    for count in (1, 2, 3):
        given = actions[:, : count - 1 + 4]
        futures = run.rollout(clip[:, -count:], 4, 5, actions=given)
        segments = clip[:, -count:, None]
        state = remembered(run.model, segments, given[:, : count - 1]) if count > 1 else run.model.observe(clip[:, -1:])
        generator = torch.Generator().manual_seed(0)
        expected = run.model.rollout_embedding(state, 4, 5, generator, actions=given[:, count - 1 :])
        torch.testing.assert_close(futures, expected)
    with pytest.raises(UserError, match=r"it takes \(2, 6, 2\)"):
        run.rollout(clip, 4, 5, actions=actions[:, :4])
    with pytest.raises(UserError, match=r"takes \[B, 3, 3, 64, 64\]"):
        run.rollout(torch.cat([clip, clip], dim=1), 4, 5, actions=actions)


def test_the_command_reads_as_many_segments_as_the_video_has(long_video: Path) -> None:
    run = run_of_video("data.frame_stride=2")
    whole = read_clip(run_of_video("data.history_segments=0", "data.num_frames=30"), long_video, 0)[0]
    for start, frames in ((0, [0]), (1, [1]), (2, [0, 2]), (3, [1, 3]), (9, [5, 7, 9])):
        torch.testing.assert_close(read_clip(run, long_video, start)[0], whole[frames])


@torch.no_grad()
def test_programs_start_with_an_empty_history_that_grows(tmp_path: Path) -> None:
    run = run_of_video("model.latent=none")
    write_programs(tmp_path, run.model, run.config.data)
    encode, step = (torch.export.load(tmp_path / f"{name}.pt2").module() for name in ("encoder", "rollout_step"))
    clip = torch.rand(3, 1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    state = encode(clip)
    torch.testing.assert_close(state, EncoderProgram(run.model)(clip))
    expected = state
    for _ in range(3):
        state, expected = step(state), run.model.edit(expected, expected[:, :0])
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)
    assert (state[:, run.model.embedding_dim :].unflatten(1, (2, -1))[..., -1] == 1).all()
