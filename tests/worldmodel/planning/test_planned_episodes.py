"""Imagined paths, in a plane whose embedding is the position itself."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_pipelines.worlds.two_rooms import TwoRoomsEnv
from worldmodel.build import clip_layout
from worldmodel.config import Config, EvaluationConfig, PlanningConfig, VideosConfig
from worldmodel.evaluation.embed import Networks
from worldmodel.evaluation.readout import Readout
from worldmodel.nets.world_model import WorldModel
from worldmodel.planning.imagination import LatentPolicy
from worldmodel.planning.planned_episodes import (
    choose_shown,
    decoded_plans,
    planned_episodes,
    read_paths,
    state_readout,
)
from worldmodel.planning.protocol import EpisodeResults
from worldmodel.sources import make_source

STEP_PX, SIZE_PX = 4.0, 32
PERFECT = Readout(torch.zeros(2), torch.ones(2), torch.eye(2), torch.zeros(2), 0.0)


class Plane(nn.Module):
    """An action moves the embedding by 4 px; its prior, where it has one, adds noise of a standard deviation."""

    action_dim = embedding_dim = 2
    steps = WorldModel.steps

    def __init__(self, noise_px: float = 0.0) -> None:
        super().__init__()
        self.noise_px = noise_px

    def observe(self, video: Tensor) -> Tensor:
        """Where the one white pixel of video [B, 1, C, H, W] is: [B, 2]."""
        flat = video[:, 0, 0].flatten(1).argmax(dim=1)
        return torch.stack([flat % SIZE_PX, flat // SIZE_PX], dim=1).float()

    def embedding_of(self, state: Tensor) -> Tensor:
        return state

    def prior_mean(self, context: Tensor, action: Tensor) -> Tensor:
        return torch.zeros_like(context)

    def sample(self, context: Tensor, generator: torch.Generator, *, action: Tensor) -> Tensor:
        return self.noise_px * torch.randn(context.shape, generator=generator)

    def edit(self, context: Tensor, r: Tensor, action: Tensor) -> Tensor:
        return context + STEP_PX * action + r


def pictures(points: Tensor) -> Tensor:
    """Whole positions [E, 2] -> frames uint8 [E, 1, H, W] with a white pixel there."""
    frames = torch.zeros(len(points), 1, SIZE_PX, SIZE_PX, dtype=torch.uint8)
    frames[torch.arange(len(points)), 0, points[:, 1], points[:, 0]] = 255
    return frames


def run_of(plane: Plane) -> Any:
    """A run whose model and target encoder are those of a plane."""
    return SimpleNamespace(
        model=plane,
        target_encoder=plane.observe,
        config=Config(run_dir="", data=VideosConfig(num_frames=1, num_segments=2, size_px=SIZE_PX, channels=1)),
        networks=None,
        folder=Path("plane"),
        state={"step": 1},
        num_updates=1,
        device=torch.device("cpu"),
    )


def policy(noise_px: float = 0.0, **planning: Any) -> LatentPolicy:
    config = PlanningConfig(horizon=6, candidates=200, cost="last", **planning)
    return LatentPolicy(run_of(Plane(noise_px)), config, seed=0)


def test_a_plan_is_imagined_from_the_agent_to_the_goal() -> None:
    goals = torch.tensor([[20, 10], [5, 25], [12, 12]])
    seen = torch.tensor([[8, 10], [5, 12], [26, 20]])
    planner = policy()
    planner.begin(pictures(goals))
    planner.act(pictures(seen)[:, None])
    planner.keep(torch.tensor([True, False, True]))
    later = torch.tensor([[12, 10], [22, 18]])
    planner.act(pictures(later)[:, None])
    assert [len(planner.imagined(episode)) for episode in range(3)] == [2, 1, 2]
    for episode, ways in ((0, [seen[0], later[0]]), (1, [seen[1]]), (2, [seen[2], later[1]])):
        paths = read_paths(planner.imagined(episode), PERFECT, TwoRoomsEnv.state_px)
        assert paths.shape == (len(ways), 1, 6, 2)
        for way, path in zip(ways, paths, strict=True):
            legs = np.linalg.norm(np.diff(np.concatenate([way[None].numpy(), path[0]]), axis=0), axis=1)
            assert 0 < legs[0] <= STEP_PX + 1e-3 and legs.max() <= STEP_PX + 1e-3
            assert np.linalg.norm(path[0, -1] - goals[episode].numpy()) < 1.5


def test_positions_are_what_the_environment_makes_of_the_state_that_is_read() -> None:
    embeddings = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    doubled = Readout(torch.zeros(2), torch.ones(2), 2 * torch.eye(2), torch.tensor([1.0, 0.0]), 0.0)
    assert read_paths(embeddings, doubled, lambda states: 10 * states).tolist() == [[[[30, 40], [70, 80]]]]


def test_futures_that_are_drawn_are_imagined_one_by_one_and_the_same_each_time() -> None:
    planner = policy(noise_px=1.0, num_samples=64)
    planner.begin(pictures(torch.tensor([[20, 10]])))
    planner.act(pictures(torch.tensor([[8, 10]]))[:, None])
    futures = planner.imagined(0)
    assert futures.shape == (1, 64, 6, 2) and torch.equal(futures, planner.imagined(0))
    spread = futures[0].std(dim=0).mean(dim=-1)
    assert spread[0] == pytest.approx(1, abs=0.3) and spread[-1] == pytest.approx(6**0.5, abs=0.6)


class Painter(nn.Module):
    """A decoder that paints the position it gets, and the frame before at half its brightness."""

    side_px = SIZE_PX
    mean_picture = torch.zeros(1)

    def forward(self, embedding: Tensor, before: Tensor) -> Tensor:
        """[B, 2] and [B, 1, P, P] -> [B, 1, 1, P, P]"""
        return (pictures(embedding.round().long()) / 255 + before / 2)[:, None]


def test_plans_are_decoded_after_the_frames_at_their_decisions() -> None:
    planner, seen = policy(), [torch.tensor([[x, 10]]) for x in (6, 10, 14, 18, 22)]
    planner.begin(pictures(torch.tensor([[26, 20]])))
    for position in seen:
        planner.act(pictures(position)[:, None])
    frames = pictures(torch.cat([*seen, seen[-1]])).numpy()
    decoder: Any = Painter()
    plans = decoded_plans(decoder, planner, 0, frames)
    assert plans.at.tolist() == [0, 2, 4] and plans.ahead.tolist() == [1, 2, 3, 4, 5, 6]
    imagined = planner.imagined(0)[plans.at, 0].round().long()
    for row, decision in enumerate(plans.at):
        (x, y), path = seen[decision][0].tolist(), imagined[row].tolist()
        assert plans.pictures[row, 0, 0, y, x] == 128 or path[0] == [x, y]
        for step, (to_x, to_y) in enumerate(path):
            assert plans.pictures[row, step, 0, to_y, to_x] == 255


def test_imagining_does_not_change_what_is_decided() -> None:
    actions = []
    for looks in (False, True):
        planner = policy(noise_px=1.0, num_samples=4)
        planner.begin(pictures(torch.tensor([[20, 10]])))
        for x in (8, 12):
            action = planner.act(pictures(torch.tensor([[x, 10]]))[:, None])
            if looks:
                planner.imagined(0)
        actions.append(action)
    assert torch.equal(*actions)


@pytest.mark.parametrize(
    ("failed", "shown"),
    [([], [0, 1, 2, 3]), ([2, 6], [0, 1, 2, 3]), ([6, 7], [0, 1, 2, 6]), (range(8), [0, 1, 2, 3])],
)
def test_the_first_episodes_are_shown_and_a_failure_among_them(failed: list[int], shown: list[int]) -> None:
    success = np.ones(8, bool)
    success[list(failed)] = False
    assert choose_shown(success) == shown
    assert choose_shown(success[:2]) == [0, 1]


def ran(planner: LatentPolicy) -> EpisodeResults:
    """An episode of one step to the right."""
    planner.begin(pictures(torch.tensor([[20, 10]])))
    planner.act(pictures(torch.tensor([[8, 10]]))[:, None])
    return EpisodeResults(
        success=np.array([False]),
        steps=np.array([1]),
        path=np.array([4.0]),
        shortest=np.array([12.0]),
        states=[np.array([[8.0, 10.0], [12.0, 10.0]])],
        goals=pictures(torch.tensor([[20, 10]])).numpy(),
        goal_states=[np.array([20.0, 10.0])],
        frames=[pictures(torch.tensor([[8, 10], [12, 10]])).numpy()],
        decision_s=1.0,
        decisions=1,
    )


def test_without_positions_or_labels_there_is_no_path(caplog: pytest.LogCaptureFixture) -> None:
    planner = policy()
    episodes = ran(planner)
    (plain,) = planned_episodes(planner.run, planner, episodes, None)
    assert plain.way_px is plain.goal_px is plain.imagined_px is None and not caplog.text
    (unread,) = planned_episodes(planner.run, planner, episodes, TwoRoomsEnv.state_px)
    assert unread.way_px is episodes.states[0] and unread.imagined_px is None
    assert "evaluation.label=None is not 'state'" in caplog.text


def test_videos_that_are_not_there_cost_the_path_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    planner = policy()
    planner.run.config = Config(  # type: ignore[misc]
        run_dir="",
        data=VideosConfig(root=str(tmp_path / "gone"), num_frames=1, num_segments=2),
        evaluation=EvaluationConfig(label="state"),
    )
    config = planner.run.config
    source, layout = make_source(config), clip_layout(config)
    networks = Networks(planner.run.model, nn.Identity(), torch.device("cpu"), source, layout)
    planner.run.networks = networks  # type: ignore[misc]
    assert state_readout(planner.run) is None
    assert "gone" in caplog.text
