"""Gradient descent through the future: on a cost whose optimum is known, and through a model."""

from typing import Literal

import pytest
import torch

from tests.conftest import normal
from tests.worldmodel.planning.test_planners import (
    EFFORT,
    Recorder,
    assert_planned_alike_alone,
    decide,
    goals,
    reaching,
)
from tests.worldmodel.planning.test_protocol import world
from worldmodel.config import GaussianConfig, GradientConfig, IcemConfig, LatentConfig, NoLatentConfig, PlanningConfig
from worldmodel.planning.imagination import LatentCost


def planning(iterations: int, **options: object) -> PlanningConfig:
    chosen = {"horizon": 6, "candidates": 8} | options
    return PlanningConfig(planner=GradientConfig(), iterations=iterations, **chosen)  # type: ignore[arg-type]


def test_the_optimum_of_a_quadratic_cost_is_reached() -> None:
    horizon, goal = 6, goals(16, farthest=5.5)
    system = torch.ones(horizon, horizon) + EFFORT * torch.eye(horizon)
    optimum = torch.linalg.solve(system, torch.ones(horizon, 1)) * goal[:, None]
    _, actions, costs = decide(planning(200), reaching(goal), len(goal))
    torch.testing.assert_close(actions, optimum, rtol=0, atol=0.01)
    torch.testing.assert_close(costs, reaching(goal)(actions[:, None])[:, 0])


def test_a_goal_out_of_reach_is_approached_at_full_length() -> None:
    goal = 30 * torch.nn.functional.normalize(goals(8, farthest=1.0), dim=1)
    _, actions, _ = decide(planning(100), reaching(goal), len(goal))
    # The optimum of the ball is the heading itself at each step.
    heading = torch.nn.functional.normalize(goal, dim=1)[:, None].expand_as(actions)
    torch.testing.assert_close(actions, heading, rtol=0, atol=0.02)


@pytest.mark.parametrize("action_set", ["ball", "box"])
def test_every_step_stays_in_the_action_set(action_set: Literal["ball", "box"]) -> None:
    recorder = Recorder(reaching(goals(4, farthest=40.0)))
    decide(planning(7, action_set=action_set, init_std=2.0), recorder, 4)
    assert len(recorder.actions) == 8
    for actions in recorder.actions:
        size = actions.norm(dim=-1) if action_set == "ball" else actions.abs().amax(dim=-1)
        assert size.max() <= 1 + 1e-6
    assert (recorder.actions[-1].norm(dim=-1).max() > 1.2) == (action_set == "box")


def test_each_step_is_adam_on_the_cost_of_its_own_start() -> None:
    goal = goals(3, farthest=0.5)
    config = planning(5, init_std=0.05, candidates=4)
    recorder = Recorder(reaching(goal))
    decide(config, recorder, len(goal))
    assert not recorder.actions[0][:, 0].any()  # the plan of the last decision is the first start
    for episode in range(3):
        for number in range(4):
            actions = recorder.actions[0][episode, number].detach().double()
            first, second = torch.zeros_like(actions), torch.zeros(6, 1).double()
            for step in range(1, 6):
                # The gradient of |sum a - goal|^2 + EFFORT sum |a|^2.
                gradient = 2 * (actions.sum(dim=0) - goal[episode]) + 2 * EFFORT * actions
                first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * (gradient**2).mean(1, True)
                moved = (first / (1 - 0.9**step)) / (second / (1 - 0.999**step)).sqrt()
                actions = actions - 0.1 * moved
                actions = actions / actions.norm(dim=-1, keepdim=True).clamp(min=1)
                torch.testing.assert_close(
                    recorder.actions[step][episode, number].detach(), actions.float(), rtol=0, atol=1e-4
                )


def test_the_best_of_all_steps_and_starts_is_kept() -> None:
    recorder = Recorder(reaching(goals(5, farthest=3.0)))
    plan, actions, costs = decide(planning(9, init_std=0.8), recorder, 5)
    assert torch.equal(costs, torch.stack(recorder.costs).amin(dim=(0, 2)))
    assert torch.equal(plan.mean, actions) and not actions.requires_grad


def test_a_seed_fixes_the_plan_and_an_episode_is_planned_alike_alone() -> None:
    assert_planned_alike_alone(planning(4), goals(4, farthest=5.0).double())


@pytest.mark.parametrize(("latent", "samples"), [(NoLatentConfig(), 0), (GaussianConfig(), 3)])
@pytest.mark.parametrize("cost", ["sum", "last"])
def test_the_cost_of_imagined_futures_falls(latent: LatentConfig, samples: int, cost: Literal["sum", "last"]) -> None:
    """Also where the caller has switched gradients off, as a policy does, and in bf16 where that is used."""
    model = world(latent)
    config = planning(15, horizon=4, num_samples=samples, cost=cost)
    with torch.no_grad():
        costs = LatentCost(model, None, config, normal(1, 3, 8), normal(2, 3, 8), torch.Generator().manual_seed(0))
        recorder = Recorder(costs)
        _, actions, found = decide(config, recorder, 3)
    firsts, lasts = recorder.costs[0].detach(), recorder.costs[-1]
    assert (lasts.mean(dim=1) < firsts.amin(dim=1)).all()  # on average, below the best start
    assert (found <= firsts.amin(dim=1)).all() and actions.isfinite().all()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_of_the_imagined_cost_are_those_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worldmodel.planning.imagination.computes_bf16", lambda _: False)
    config = PlanningConfig(planner=IcemConfig(), horizon=3)
    cost = LatentCost(world(), None, config, normal(1, 1, 8), normal(2, 1, 8), torch.Generator())
    actions = (0.3 * normal(3, 1, 2, 3, 2)).requires_grad_()
    (gradient,) = torch.autograd.grad(cost(actions).sum(), actions)
    with torch.no_grad():
        for place in ((0, 0, 0, 0), (0, 1, 1, 1), (0, 1, 2, 0)):
            moved = torch.zeros_like(actions)
            moved[place] = 1e-2
            slope = float((cost(actions + moved) - cost(actions - moved)).sum()) / 2e-2
            assert float(gradient[place]) == pytest.approx(slope, rel=0.05, abs=1e-3)
