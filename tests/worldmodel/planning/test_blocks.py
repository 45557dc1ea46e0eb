"""A step of the model that is several steps of the environment: its actions in clips, in costs and in episodes."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipelines.errors import UserError
from data_pipelines.transforms import to_float
from data_pipelines.worlds.recorder import Recording, record
from data_pipelines.worlds.two_rooms_law import move, step_of_action
from tests.conftest import REPO, normal
from tests.worldmodel.planning.test_goal_conditioned import Obedient
from worldmodel.build import build_training_model, clip_layout
from worldmodel.config import Config, External, PlanningConfig, load_config
from worldmodel.data import actions_of
from worldmodel.planning.controls import RandomPolicy, ReplayPolicy
from worldmodel.planning.goal_conditioned import GoalConditionedPolicy, embed_clips
from worldmodel.planning.imagination import LatentCost, LatentPolicy, propose
from worldmodel.planning.planners import Cost, Plan
from worldmodel.planning.protocol import PlanningProtocol, run_episodes
from worldmodel.runs.trained_run import TrainedRun
from worldmodel.sources import make_source

ENV = "data_pipelines.worlds.two_rooms:worldmodel/TwoRooms-v0"


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("blocks") / "rooms"
    facts = Recording(env=ENV, kwargs={"layout": "random"}, past_end=True, num_steps=20)
    record(root, {"train": 3, "selection": 1, "test": 2}, facts, num_processes=1)
    return root


def config_of(root: Path, *overrides: str) -> Config:
    sizes = [f"data.root={root}", "model.encoder.width=0.125", "data.num_workers=0"]
    return load_config(REPO / "configs" / "two_rooms.yaml", [*sizes, *overrides])


def run_of(root: Path, *overrides: str) -> TrainedRun:
    config = config_of(root, *overrides)
    torch.manual_seed(0)
    return TrainedRun(root / "run", config, build_training_model(config).eval(), None, {})


@pytest.mark.parametrize(("num_frames", "stride"), [(1, 1), (1, 3), (2, 2), (3, 1)])
def test_the_actions_of_a_step_lead_from_one_segment_to_the_next(rooms: Path, num_frames: int, stride: int) -> None:
    """By the law of the rooms: from the state of a segment's last frame to that of the next segment's last frame."""
    config = config_of(rooms, f"data.num_frames={num_frames}", f"data.frame_stride={stride}", "data.clip_step=1")
    assert build_training_model(config).model.action_dim == 2 * num_frames * stride
    compared = 0
    for batch in make_source(config).evaluation_batches("train", 1000, horizon=2):
        layout, labels = clip_layout(config), batch["labels"]
        actions = actions_of(batch, layout, 2, torch.device("cpu"))
        assert actions.shape[1:] == (2, 2 * num_frames * stride)
        states = labels["state"][:, num_frames - 1 :: num_frames]
        for step in range(2):
            state = states[:, step]
            for action in actions[:, step].unflatten(1, (-1, 2)).unbind(1):
                state = move(state, step_of_action(action), labels["wall_x_px"], labels["door_y_px"])
            torch.testing.assert_close(state, states[:, step + 1], rtol=0, atol=1e-3)
            compared += len(state)
    assert compared > 60


def test_a_candidate_costs_as_its_blocks_rolled_out_one_by_one(rooms: Path) -> None:
    run = run_of(rooms, "data.frame_stride=3")
    assert run.model.action_dim == 6
    config, state, goal = PlanningConfig(horizon=2), normal(1, 4, 32), normal(2, 4, 32)
    actions = 0.5 * normal(3, 4, 5, 6, 2)
    with torch.no_grad():
        cost = LatentCost(run.model, None, config, state, goal, torch.Generator())(actions)
        for episode in range(4):
            for candidate in range(5):
                first, second = (torch.cat(actions[episode, candidate, at : at + 3].unbind()) for at in (0, 3))
                rolled = run.model.prior_mean_rollout(state[[episode]], 2, torch.stack([first, second])[None])[0]
                expected = (rolled - goal[episode]).square().mean(dim=-1).sum()
                torch.testing.assert_close(cost[episode, candidate], expected, rtol=0.03, atol=0.03)


class Counting:
    """A planner that adds 0, 0.01, 0.02, ... to the plan of the last decision, and looks at its costs."""

    def improve(
        self, config: PlanningConfig, plan: Plan, cost: Cost, generator: torch.Generator
    ) -> tuple[Plan, Tensor, Tensor]:
        actions = plan.mean + 0.01 * torch.arange(config.horizon)[:, None]
        assert cost(actions[:, None]).shape == (len(actions), 1)
        return plan._replace(mean=actions), actions, torch.zeros(len(actions))


def test_a_decision_is_for_as_many_actions_as_a_step_has(rooms: Path) -> None:
    run = run_of(rooms, "data.frame_stride=3")
    policy = LatentPolicy(run, PlanningConfig(planner=External(f"{__name__}:Counting"), horizon=2), seed=0)
    frames = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    policy.begin(frames)
    first, second = policy.act(frames[:, None]), policy.act(frames[:, None])
    assert first.shape == second.shape == (2, 3, 2)
    assert first[0, :, 0].tolist() == pytest.approx([0, 0.01, 0.02])
    assert second[0, :, 0].tolist() == pytest.approx([0.03, 0.05, 0.07])  # the plan from its fourth action on
    assert policy.imagined(1).shape == (2, 1, 2, 32)


def test_several_steps_of_a_plan_are_executed_before_the_next_decision(rooms: Path) -> None:
    run = run_of(rooms, "data.frame_stride=3")
    config = PlanningConfig(planner=External(f"{__name__}:Counting"), horizon=3, replan_every=2)
    policy = LatentPolicy(run, config, seed=0)
    frames = torch.zeros(2, 6, 3, 64, 64, dtype=torch.uint8)
    policy.begin(frames[:, 0])
    first, second = policy.act(frames[:, :1]), policy.act(frames)
    assert first[0, :, 0].tolist() == pytest.approx([0, 0.01, 0.02, 0.03, 0.04, 0.05])
    assert second[0, :, 0].tolist() == pytest.approx([0.06, 0.08, 0.10, 0.03, 0.04, 0.05])  # from the seventh action on

    learned = GoalConditionedPolicy(32, 32, 6, "ball", block=3)
    alone = LatentPolicy(run, config, seed=0, learned=learned, searches=False)
    alone.begin(frames[:, 0])
    actions, goal = alone.act(frames[:, :1]), alone.goal
    expected = propose(run.model, learned, alone.decisions[0].state, goal, 2)
    assert actions.shape == (2, 6, 2) and torch.equal(actions, expected)

    too_many = dataclasses.replace(config, replan_every=4)
    with pytest.raises(UserError, match=r"planning.replan_every=4 is more than planning.horizon=3"):
        LatentPolicy(run, too_many, seed=0)


def test_a_learned_policy_decides_on_blocks_and_starts_a_search_with_them(rooms: Path) -> None:
    run = run_of(rooms, "data.frame_stride=3")
    torch.manual_seed(1)
    learned = GoalConditionedPolicy(32, 32, 6, "ball", block=3)
    frames = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    alone, searching = (
        LatentPolicy(run, PlanningConfig(horizon=2), seed=0, learned=learned, searches=searches)
        for searches in (False, True)
    )
    for policy in (alone, searching):
        policy.planner = Obedient()
        policy.begin(frames)
    own = alone.act(frames[:, None])
    assert own.shape == (2, 3, 2) and alone.decisions[0].actions.shape == (2, 1, 6)
    torch.testing.assert_close(searching.act(frames[:, None]), own)
    assert searching.decisions[0].actions.shape == (2, 2, 6)
    torch.testing.assert_close(searching.decisions[0].actions[:, 0], own.flatten(1))


def test_a_segment_of_several_frames_is_the_latest_ones_of_the_episode(
    rooms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames hold their episode (10 or 20) and time: a segment of two frames, three steps apart."""
    run = run_of(rooms, "data.num_frames=2", "data.frame_stride=3")
    policy = LatentPolicy(run, PlanningConfig(planner=External(f"{__name__}:Counting"), horizon=2), seed=0)
    observed: list[Tensor] = []
    observe = run.model.observe

    def spy(video: Tensor) -> Tensor:
        observed.append(video)
        return observe(video)

    monkeypatch.setattr(run.model, "observe", spy)

    def frames(episodes: list[int], *times: int) -> Tensor:
        values = torch.tensor(episodes)[:, None] + torch.tensor(times)
        return values.to(torch.uint8)[:, :, None, None, None].expand(-1, -1, 3, 64, 64)

    policy.begin(frames([10, 20], 9)[:, 0])
    assert policy.act(frames([10, 20], 0)).shape == (2, 6, 2)
    policy.act(frames([10, 20], 1, 2, 3, 4, 5, 6))
    policy.keep(torch.tensor([False, True]))
    policy.act(frames([20], 7, 8, 9, 10, 11, 12))
    seen = [(255 * video[:, :, 0, 0, 0]).round().tolist() for video in observed]
    assert seen == [[[19, 19], [29, 29]], [[10, 10], [20, 20]], [[13, 16], [23, 26]], [[29, 32]]]


def test_goals_of_several_frames_are_pictures(rooms: Path) -> None:
    run = run_of(rooms, "data.num_frames=2")
    clips = embed_clips(run, num_steps=3, num_clips=4_000)
    [batch] = run.source.evaluation_batches("train", 4_000, 3)
    last = to_float(batch["video"][:, 1::2])
    with torch.no_grad():
        for segment in range(4):
            still = last[:, segment, None].expand(-1, 2, -1, -1, -1)
            torch.testing.assert_close(clips.goals[:, segment], run.target_encoder(still), rtol=0, atol=1e-5)
    assert (clips.goals - clips.states).abs().max() > 1e-3  # those of moving frames


class Blocks(ReplayPolicy):
    """Repeats recorded actions [E, T, A], four with each decision."""

    num_decisions = 0

    def act(self, frames: Tensor) -> Tensor:
        self.num_decisions += 1
        now, self.remaining = self.remaining[:, :4], self.remaining[:, 4:]
        return now


def test_blocks_are_executed_as_single_actions_are_until_goal_or_budget() -> None:
    protocol = PlanningProtocol(ENV, {"goal_radius_px": 10.0}, seeds=1, episodes=12, budget=30, first_seed=0)
    actions = normal(4, 12, 32, 2).clamp(-1, 1).numpy()
    one = run_episodes(protocol, 0, lambda envs: ReplayPolicy(actions))
    policy = Blocks(actions)
    four: Any = run_episodes(protocol, 0, lambda envs: policy, keep_frames=True)
    assert all(np.array_equal(a, b) for a, b in zip(one.states, four.states, strict=True))
    assert np.array_equal(one.success, four.success) and np.array_equal(one.steps, four.steps)
    assert 0 < one.success.sum() < 12 and (one.steps[one.success] % 4 != 0).any()  # some end within a block
    assert one.steps[~one.success].tolist() == [30] * int((~one.success).sum())
    assert [len(frames) for frames in four.frames] == (four.steps + 1).tolist()
    assert policy.num_decisions == 8 and four.decisions == int(np.ceil(four.steps / 4).sum())


def test_random_actions_are_decided_one_by_one() -> None:
    protocol = PlanningProtocol(ENV, {}, seeds=1, episodes=3, budget=5, first_seed=0)
    results = run_episodes(protocol, 0, lambda envs: RandomPolicy(envs, 0))
    assert results.decisions == results.steps.sum()


def test_plans_that_are_too_long_and_resampled_frames(rooms: Path) -> None:
    run = run_of(rooms, "data.frame_stride=60")
    with pytest.raises(
        UserError, match=r"planning.horizon=20: with 60 actions in a step .*, a plan has more than 1,024"
    ):
        LatentPolicy(run, run.config.planning, seed=0)
    passive = config_of(rooms, "data.fps=5.0", "model.action_dim=0", "objective.inverse_dynamics_weight=0")
    resampled = dataclasses.replace(run, config=passive)  # its labels would give it actions
    with pytest.raises(UserError, match=r"data.fps=5: planning needs null"):
        LatentPolicy(resampled, run.config.planning, seed=0)
    with pytest.raises(UserError, match=r"model.action_dim=2 needs the action at every frame.*without data.fps"):
        config_of(rooms, "data.fps=5.0")
