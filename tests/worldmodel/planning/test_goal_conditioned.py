"""The goal-conditioned policy: its likelihood, what it learns in a plane, its file, and its part in a search."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from tests.conftest import normal
from tests.worldmodel.planning.test_planned_episodes import Plane, pictures, run_of
from worldmodel.config import IcemConfig, PlanningConfig
from worldmodel.planning import goal_conditioned
from worldmodel.planning.goal_conditioned import (
    GoalClips,
    GoalConditionedPolicy,
    draw_examples,
    fit_policy,
    load_policy,
    save_policy,
)
from worldmodel.planning.imagination import LatentPolicy, propose
from worldmodel.planning.planners import Cost, Plan, project_


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goal_conditioned, "BATCH", 128)


def walks(num_clips: int, num_steps: int = 12) -> GoalClips:
    """Persistent walks in the plane: a state is a position, an action in the unit disc moves it by itself."""
    generator = torch.Generator().manual_seed(0)
    heading = 2 * torch.pi * torch.rand(num_clips, 1, generator=generator)
    heading = heading + 0.3 * torch.randn(num_clips, num_steps, generator=generator)
    length = torch.rand(num_clips, num_steps, 1, generator=generator)
    actions = length * torch.stack([heading.cos(), heading.sin()], dim=-1)
    first = 10 * torch.rand(num_clips, 1, 2, generator=generator)
    states = torch.cat([first, first + actions.cumsum(dim=1)], dim=1)
    return GoalClips(states, states, actions)


# ------------------------------------------------------------------------------------------------------- the network


def test_the_loss_is_the_likelihood_of_a_mixture_of_gaussians() -> None:
    policy = GoalConditionedPolicy(5, 3, 2, "ball")
    state, goal, action = normal(1, 7, 5), normal(2, 7, 3), normal(3, 7, 2)
    policy.standardise(normal(4, 50, 5), 2 * normal(5, 50, 3))
    with torch.no_grad():
        inputs = [(state - policy.state_mean) / policy.state_std, (goal - policy.goal_mean) / policy.goal_std]
        outputs = policy.net(torch.cat(inputs, dim=1))
        logits, means = outputs[:, :4], outputs[:, 4:].view(7, 4, 2)
        parts = Independent(Normal(means, policy.log_std.exp()), 1)
        expected = -MixtureSameFamily(Categorical(logits=logits), parts).log_prob(action).mean()
        torch.testing.assert_close(policy.loss(state, goal, action), expected)
        best = means[torch.arange(7), logits.argmax(dim=1)]
        torch.testing.assert_close(policy(state, goal), best / best.norm(dim=1, keepdim=True).clamp(min=1))


def test_discrete_actions_have_a_softmax_and_are_one_hot() -> None:
    policy = GoalConditionedPolicy(5, 3, 4, "one_hot")
    state, goal, number = normal(1, 7, 5), normal(2, 7, 3), torch.arange(7) % 4
    with torch.no_grad():
        logits = policy.net(torch.cat([state, goal], dim=1))
        loss = policy.loss(state, goal, F.one_hot(number, 4).float())
        torch.testing.assert_close(loss, F.cross_entropy(logits, number))
        assert torch.equal(policy(state, goal), F.one_hot(logits.argmax(dim=1), 4).float())


@pytest.mark.parametrize("action_set", ["ball", "box", "one_hot"])
def test_each_action_of_a_block_is_allowed(action_set: Any) -> None:
    policy = GoalConditionedPolicy(5, 3, 6, action_set, block=3)
    state, goal = 3 * normal(1, 20, 5), 3 * normal(2, 20, 3)
    with torch.no_grad():
        for layer in policy.net:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(4)  # so that actions lie far out
        actions = policy(state, goal)
        assert actions.shape == (20, 6)
        expected = project_(actions.view(60, 2).clone(), action_set).view(20, 6)
        torch.testing.assert_close(actions, expected)
        assert (actions.view(60, 2).norm(dim=1) > 0.99).any()
        if action_set == "one_hot":
            log_odds = policy._outputs(state, goal).view(20, 3, 2).log_softmax(dim=-1)
            likelihood = (log_odds * actions.view(20, 3, 2)).sum(dim=(1, 2))
            torch.testing.assert_close(policy.loss(state, goal, actions), -likelihood.mean())


# -------------------------------------------------------------------------------------------------------------- fit


def test_it_walks_towards_the_goal(small_batches: None) -> None:
    policy = GoalConditionedPolicy(2, 2, 2, "ball", hidden_dim=96)
    fit_policy(policy, walks(400), seed=0, updates=500)
    state, way = 2 + 6 * torch.rand(200, 2, generator=torch.Generator().manual_seed(1)), 3 * normal(2, 200, 2)
    way = 3 * F.normalize(way, dim=1)
    with torch.no_grad():
        actions = policy(state, state + way)
    assert actions.norm(dim=1).max() <= 1 + 1e-6
    cosine = F.cosine_similarity(actions, way, dim=1)
    assert cosine.mean() > 0.9 and (cosine > 0.6).float().mean() > 0.95, cosine


def test_of_two_ways_it_takes_one_and_not_their_mean(small_batches: None) -> None:
    clips = walks(200, num_steps=2)
    sign = torch.where(torch.arange(200) % 2 == 0, 1.0, -1.0)
    up_or_down = torch.stack([torch.zeros(200, 2), sign[:, None].expand(-1, 2)], dim=-1)
    policy = GoalConditionedPolicy(2, 2, 2, "ball", hidden_dim=96)
    fit_policy(policy, GoalClips(clips.states, torch.zeros_like(clips.goals), up_or_down), seed=0, updates=500)
    with torch.no_grad():
        actions = policy(clips.states[:, 0], torch.zeros(200, 2))
    assert (actions[:, 1].abs() > 0.9).all() and actions[:, 0].abs().max() < 0.2


def test_discrete_actions_are_learned(small_batches: None) -> None:
    clips = walks(300)
    numbers = (clips.actions[..., 0] > 0).long()
    policy = GoalConditionedPolicy(2, 2, 2, "one_hot", hidden_dim=96)
    fit_policy(policy, GoalClips(clips.states, clips.goals, F.one_hot(numbers, 2).float()), seed=0, updates=500)
    state = torch.tensor([[4.0, 5.0], [6.0, 5.0]])
    with torch.no_grad():
        assert policy(state, state.flip(0)).argmax(dim=1).tolist() == [1, 0]


@pytest.mark.slow
def test_a_seed_fixes_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goal_conditioned, "BATCH", 32)
    first, again, other = (GoalConditionedPolicy(2, 2, 2, "ball") for _ in range(3))
    for policy, seed in ((first, 3), (again, 3), (other, 4)):
        torch.manual_seed(int(torch.randint(100, ())))  # the global generator has no part in it
        fit_policy(policy, walks(20), seed, updates=250)
    weights = [torch.cat([values.flatten() for values in each.state_dict().values()]) for each in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.allclose(weights[0], weights[2])


def test_examples_are_later_segments_of_the_same_clip_and_the_first_action() -> None:
    number = torch.arange(6)[:, None] * 100 + torch.arange(9)
    clips = GoalClips(number[..., None].float(), number[..., None].float(), number[:, :8, None].float())
    state, goal, action = draw_examples(clips, 40_000, torch.Generator().manual_seed(0))
    assert torch.equal(state, action) and set((state // 100).unique().tolist()) == set(range(6))
    start, later = (state % 100).squeeze(1).long(), (goal - state).squeeze(1).long()
    assert torch.equal(goal // 100, state // 100) and later.min() == 1
    for step in range(8):
        counts = later[start == step].bincount(minlength=9).float()
        assert counts.sum() == pytest.approx(5_000, rel=0.1)
        wanted = torch.full((8 - step,), 1 / (8 - step))
        torch.testing.assert_close(counts[1 : 9 - step] / counts.sum(), wanted, rtol=0, atol=0.03)


# ------------------------------------------------------------------------------------------------------------- file


def test_the_file_is_for_the_settings_that_it_was_fitted_to(tmp_path: Path) -> None:
    def fresh(action_dim: int = 2) -> GoalConditionedPolicy:
        return GoalConditionedPolicy(4, 3, action_dim, "ball")

    stored, settings = fresh(), {"step": 10, "goal_steps": 8}
    assert not load_policy(tmp_path, fresh(), settings)
    save_policy(tmp_path, stored, settings)
    loaded = fresh()
    assert load_policy(tmp_path, loaded, settings)
    for name, values in stored.state_dict().items():
        assert torch.equal(values, loaded.state_dict()[name]), name
    assert not load_policy(tmp_path, fresh(), settings | {"step": 11})
    assert not load_policy(tmp_path, fresh(), settings | {"goal_steps": 9})
    assert not load_policy(tmp_path, fresh(3), settings)
    assert not load_policy(tmp_path, GoalConditionedPolicy(4, 3, 2, "box"), settings)
    path = tmp_path / "goal_policy.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert not load_policy(tmp_path, fresh(), settings)
    with torch.no_grad():
        stored.log_std.fill_(torch.nan)
    save_policy(tmp_path, stored, settings)
    assert not load_policy(tmp_path, fresh(), settings)


# --------------------------------------------------------------------------------------------------- with the planner


class TowardsGoal(nn.Module):
    """The policy of the plane: 4 px a step, straight to the goal."""

    block = 1

    def forward(self, state: Tensor, goal: Tensor) -> Tensor:
        return F.normalize(goal - state, dim=1)


class Obedient:
    """A planner that takes the mean which it is given."""

    def improve(
        self, config: PlanningConfig, plan: Plan, cost: Cost, generator: torch.Generator
    ) -> tuple[Plan, Tensor, Tensor]:
        return plan, plan.mean, cost(plan.mean[:, None])[:, 0]


class KnownPlane(Plane):
    """The plane, whose states persist as they are."""

    def persistent(self, state: Tensor) -> Tensor:
        return state


def acting(searches: bool, **planning: Any) -> LatentPolicy:
    learned: Any = TowardsGoal()
    config = PlanningConfig(horizon=5, **planning)
    policy = LatentPolicy(run_of(KnownPlane()), config, 0, learned=learned, searches=searches)
    policy.begin(pictures(torch.tensor([[28, 16], [16, 28]])))
    return policy


def test_alone_it_acts_and_the_next_state_is_imagined() -> None:
    policy = acting(searches=False)
    actions = policy.act(pictures(torch.tensor([[4, 16], [16, 4]]))[:, None])[:, 0]
    torch.testing.assert_close(actions, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert policy.imagined(0).tolist() == [[[[8.0, 16.0]]]]


def test_it_is_rolled_out_in_imagination() -> None:
    model: Any = KnownPlane()
    learned: Any = TowardsGoal()
    start, goal = torch.tensor([[4.0, 4.0]]), torch.tensor([[16.0, 20.0]])
    actions = propose(model, learned, start, goal, 5)
    torch.testing.assert_close(actions, torch.tensor([[[0.6, 0.8]]]).expand(1, 5, 2), rtol=0, atol=1e-2)
    assert propose(model, learned, start, goal, 1).shape == (1, 1, 2)


def test_a_search_starts_from_it_at_each_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = acting(searches=True, planner=IcemConfig(), candidates=40)
    policy.planner = Obedient()
    for seen, heading in ([[4, 16], [16, 4]], [[1.0, 0], [0, 1.0]]), ([[28, 8], [16, 12]], [[0, 1.0], [0, 1.0]]):
        actions = policy.act(pictures(torch.tensor(seen))[:, None])[:, 0]
        torch.testing.assert_close(actions, torch.tensor(heading))
        torch.testing.assert_close(policy.decisions[-1].actions[:, 1], torch.tensor(heading))
