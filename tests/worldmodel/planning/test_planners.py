"""Planners on a problem whose optimum linear algebra gives, and each of their steps against a loop in numpy.

The problem: x_{t+1} = x_t + a_t from x_0 = 0, cost |x_H - goal|^2 + EFFORT sum_t |a_t|^2.
"""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipelines.errors import UserError
from tests.conftest import REPO
from worldmodel.config import CemConfig, IcemConfig, MppiConfig, PlannerConfig, PlanningConfig, load_config
from worldmodel.planning import plan as plan_module
from worldmodel.planning.planners import (
    Cost,
    Plan,
    draw_noise,
    make_planner,
    project_,
    shift,
    start,
)
from worldmodel.planning.planners.icem import colouring
from worldmodel.planning.planners.mppi import path_integral_weights
from worldmodel.planning.protocol import PlanningProtocol

EFFORT = 0.5
CPU = torch.device("cpu")
PLANNERS: dict[str, PlannerConfig] = {"cem": CemConfig(), "icem": IcemConfig(), "mppi": MppiConfig()}
Planner = Literal["cem", "icem", "mppi"]
NAMES: tuple[Planner, ...] = ("cem", "icem", "mppi")


def goals(num_episodes: int, *, farthest: float) -> Tensor:
    """Goals [E, 2] in all directions, at distances up to `farthest`."""
    generator = torch.Generator().manual_seed(7)
    direction = torch.nn.functional.normalize(torch.randn(num_episodes, 2, generator=generator), dim=1)
    return direction * torch.linspace(0.2, 1, num_episodes)[:, None] * farthest


def reaching(goal: Tensor) -> Cost:
    def cost(actions: Tensor) -> Tensor:
        end = actions.sum(dim=2)
        return (end - goal[:, None]).square().sum(dim=-1) + EFFORT * actions.square().sum(dim=(-1, -2))

    return cost


class Recorder:
    """A cost that remembers what it was asked, as copies, and what it answered."""

    def __init__(self, cost: Cost) -> None:
        self.cost = cost
        self.actions: list[Tensor] = []
        self.costs: list[Tensor] = []

    def __call__(self, actions: Tensor) -> Tensor:
        self.actions.append(actions.clone())
        self.costs.append(self.cost(actions))
        return self.costs[-1]


def improve(config: PlanningConfig, plan: Plan, cost: Cost, generator: torch.Generator) -> tuple[Plan, Tensor, Tensor]:
    return make_planner(config.planner).improve(config, plan, cost, generator)


def decide(config: PlanningConfig, cost: Cost, num_episodes: int, seed: int = 0) -> tuple[Plan, Tensor, Tensor]:
    return improve(config, start(config, num_episodes, 2, CPU), cost, torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------- the optimum


@pytest.mark.parametrize("name", NAMES)
def test_the_optimum_is_found_for_every_goal(name: Planner) -> None:
    horizon, goal = 6, goals(16, farthest=5.5)
    # The gradient is zero where (1 1^T + EFFORT I) a = 1 goal; the optimum lies inside the ball.
    system = torch.ones(horizon, horizon) + EFFORT * torch.eye(horizon)
    optimum = torch.linalg.solve(system, torch.ones(horizon, 1)) * goal[:, None]
    assert optimum.norm(dim=-1).max() < 0.9
    cost = reaching(goal)
    best, at_rest = cost(optimum[:, None])[:, 0], goal.square().sum(dim=1)
    config = PlanningConfig(planner=PLANNERS[name], horizon=horizon, iterations=10)
    _, actions, costs = decide(config, cost, len(goal))
    torch.testing.assert_close(costs, cost(actions[:, None])[:, 0])
    assert (costs >= best * (1 - 1e-5)).all()
    # Of the cost that acting can save, at most 2 in 100 is missed on average, and 10 in 100 for any goal.
    missed = (costs - best) / (at_rest - best)
    assert missed.mean() < 0.02 and missed.max() < 0.1, missed
    assert (actions - optimum).square().mean().sqrt() < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_goal_out_of_reach_is_approached_at_full_length(name: Planner) -> None:
    goal = goals(8, farthest=30.0) + torch.nn.functional.normalize(goals(8, farthest=1.0), dim=1) * 10
    config = PlanningConfig(planner=PLANNERS[name], horizon=5, iterations=15)
    _, actions, _ = decide(config, reaching(goal), len(goal))
    heading = torch.nn.functional.normalize(goal, dim=1)
    # The optimum is the heading itself at each step: the nearest point to the goal is 5 of it away.
    along = (actions.sum(dim=1) * heading).sum(dim=1)
    assert (along > 4.5).all(), along


def test_more_iterations_cost_less() -> None:
    goal = goals(16, farthest=8.0)
    for name in NAMES:
        few, many = (
            decide(PlanningConfig(planner=PLANNERS[name], horizon=10, iterations=n), reaching(goal), 16)[2].mean()
            for n in (1, 8)
        )
        assert many < few, name


def test_coloured_noise_finds_far_goals_sooner() -> None:
    goal = goals(16, farthest=18.0)
    white, coloured = (
        decide(PlanningConfig(planner=IcemConfig(noise_beta=beta), iterations=2), reaching(goal), 16)[2].mean()
        for beta in (0.0, 2.0)
    )
    assert coloured < 0.8 * white


# ---------------------------------------------------------------------------------------------------- promises


@pytest.mark.parametrize("action_set", ["ball", "box"])
@pytest.mark.parametrize("name", NAMES)
def test_no_candidate_and_no_plan_leaves_the_action_set(name: Planner, action_set: Literal["ball", "box"]) -> None:
    goal = goals(4, farthest=40.0)
    config = PlanningConfig(planner=PLANNERS[name], action_set=action_set, init_std=2.0, horizon=8)
    recorder = Recorder(reaching(goal))
    plan, actions, _ = decide(config, recorder, 4)
    for shown in [*recorder.actions, actions, plan.mean, plan.elites]:
        size = shown.norm(dim=-1) if action_set == "ball" else shown.abs().amax(dim=-1)
        assert size.numel() == 0 or size.max() <= 1 + 1e-6
    # The box is used where it reaches beyond the ball.
    assert (recorder.actions[0].norm(dim=-1).max() > 1.2) == (action_set == "box")


def test_projection_is_onto_the_nearest_point() -> None:
    actions = torch.tensor([[3.0, 4.0], [0.3, -0.4], [0.0, 0.0], [-2.0, 0.5]])
    ball = torch.tensor([[0.6, 0.8], [0.3, -0.4], [0.0, 0.0], [-2.0, 0.5]])
    ball[3] /= 4.25**0.5
    torch.testing.assert_close(project_(actions.clone(), "ball"), ball)
    box = torch.tensor([[1.0, 1.0], [0.3, -0.4], [0.0, 0.0], [-1.0, 0.5]])
    torch.testing.assert_close(project_(actions.clone(), "box"), box)


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_fixes_the_plan_and_another_changes_it(name: Planner) -> None:
    config, cost = PlanningConfig(planner=PLANNERS[name], horizon=6), reaching(goals(3, farthest=4.0))
    first, again, other = (decide(config, cost, 3, seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)


def assert_planned_alike_alone(config: PlanningConfig, goal: Tensor) -> None:
    """Two decisions of each episode [E, 2] are the same alone and among the others."""

    def two_decisions(goal: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        plan = Plan(*(part.double() for part in start(config, len(goal), 2, CPU)))
        plan, _, _ = improve(config, plan, reaching(goal), generator)
        return improve(config, shift(plan), reaching(goal), generator)[1]

    alone = torch.cat([two_decisions(goal[i : i + 1]) for i in range(len(goal))])
    torch.testing.assert_close(two_decisions(goal), alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_an_episode_is_planned_alike_alone_and_among_others(name: Planner) -> None:
    config = PlanningConfig(planner=PLANNERS[name], horizon=6)
    assert_planned_alike_alone(config, goals(5, farthest=5.0).double())


@pytest.mark.parametrize("name", NAMES)
def test_a_warm_start_beats_a_cold_one_of_the_same_budget(name: Planner) -> None:
    goal = goals(24, farthest=10.0)
    config = PlanningConfig(planner=PLANNERS[name], horizon=12, iterations=2)
    generator = torch.Generator().manual_seed(0)
    plan, place = start(config, len(goal), 2, CPU), torch.zeros_like(goal)
    for _ in range(4):
        plan, actions, _ = improve(config, plan, reaching(goal - place), generator)
        place = place + actions[:, 0]
        plan = shift(plan)
    cost = reaching(goal - place)
    warm = improve(config, plan, cost, torch.Generator().manual_seed(9))[2]
    cold = decide(config, cost, len(goal), seed=9)[2]
    assert warm.mean() < 0.8 * cold.mean()


def test_shift_drops_the_first_action_and_appends_zero() -> None:
    config = PlanningConfig(planner=IcemConfig(), horizon=5)
    plan, _, _ = decide(config, reaching(goals(3, farthest=4.0)), 3)
    later = shift(plan)
    for before, after in zip(plan, later, strict=True):
        assert before.shape == after.shape
        assert torch.equal(after[..., :-1, :], before[..., 1:, :])
        assert not after[..., -1, :].any()
    assert later.elites.shape[1] == 9  # 0.3 of 30


def test_a_cold_plan_is_at_rest() -> None:
    plan = start(PlanningConfig(horizon=7), 3, 2, CPU)
    assert plan.mean.shape == (3, 7, 2) and not plan.mean.any() and plan.elites.shape == (3, 0, 7, 2)


def test_a_cost_of_a_wrong_shape_or_not_finite_is_refused() -> None:
    config = PlanningConfig(horizon=3)
    with pytest.raises(AssertionError, match=r"costs \(2, 300, 3\)"):
        decide(config, lambda actions: actions.sum(dim=-1), 2)
    with pytest.raises(AssertionError, match="not finite"):
        decide(config, lambda actions: actions.sum(dim=(-1, -2)) * torch.nan, 2)


def test_elites_must_be_fewer_than_candidates() -> None:
    demo = REPO / "configs" / "objectives.yaml"
    with pytest.raises(UserError, match=r"planning.planner.elites=30 must be below planning.candidates=30"):
        load_config(demo, ["planning.candidates=30"])
    least = load_config(demo, ["planning.candidates=2", "planning.planner.elites=1"]).planning
    for planner in (CemConfig(elites=1), IcemConfig(elites=1), MppiConfig()):
        _, actions, _ = decide(replace(least, planner=planner), reaching(goals(2, farthest=1.0)), 2)
        assert actions.isfinite().all()


# ------------------------------------------------------------------------------------------ each step, against loops


@pytest.mark.parametrize("name", NAMES)
def test_candidates_of_every_iteration_are_those_of_a_loop(name: Planner) -> None:
    """One episode after the other in float64 numpy, from the same noise; the action set is not reached."""
    planners = {"cem": CemConfig(elites=7), "icem": IcemConfig(elites=7), "mppi": MppiConfig(temperature=0.4)}
    config = PlanningConfig(
        planner=planners[name],  # type: ignore[arg-type]
        horizon=4,
        candidates=40,
        iterations=4,
        init_std=0.05,
    )
    goal = goals(3, farthest=0.5)
    recorder = Recorder(reaching(goal))
    plan, actions, costs = decide(config, recorder, len(goal))
    generator = torch.Generator().manual_seed(0)
    colour = colouring(config.horizon, 2.0) if name == "icem" else None
    noise = [draw_noise(config, 2, generator, colour).double().numpy() for _ in range(config.iterations)]
    assert len(recorder.actions) == config.iterations + (name != "icem")
    for episode in range(len(goal)):
        mean, std = np.zeros((4, 2)), np.full((4, 2), config.init_std)
        kept: list[np.ndarray] = []
        for iteration in range(config.iterations):
            candidates = [mean + std * noise[iteration][n] for n in range(config.candidates)]
            candidates[: len(kept)] = kept
            if name == "icem" and iteration == config.iterations - 1:
                candidates[len(kept)] = mean
            np.testing.assert_allclose(recorder.actions[iteration][episode].numpy(), candidates, atol=1e-5)
            cost = recorder.costs[iteration][episode].tolist()
            if name == "mppi":
                scale = np.std(cost)
                raw = [np.exp(-(c - min(cost)) / (0.4 * scale)) for c in cost]
                mean = np.sum([w / sum(raw) * a for w, a in zip(raw, candidates, strict=True)], axis=0)
                continue
            ranks = sorted(range(len(cost)), key=cost.__getitem__)
            elites = [candidates[n] for n in ranks[:7]]
            mean = 0.9 * np.mean(elites, axis=0) + 0.1 * mean
            std = 0.9 * np.std(elites, axis=0) + 0.1 * std
            kept = elites[:2] if name == "icem" else []  # 0.3 of 7
        np.testing.assert_allclose(plan.mean[episode].numpy(), mean, atol=1e-5)
        assert len(plan.elites[episode]) == len(kept)
        for have, want in zip(plan.elites[episode], kept, strict=True):
            np.testing.assert_allclose(have.numpy(), want, atol=1e-5)
        np.testing.assert_allclose(actions[episode].numpy(), kept[0] if name == "icem" else mean, atol=1e-5)
        if name == "icem":
            assert costs[episode] == recorder.costs[-1][episode].min()


def test_kept_elites_keep_the_best_so_far() -> None:
    config = PlanningConfig(planner=IcemConfig(elites=4), horizon=10, candidates=20, iterations=8)
    recorder = Recorder(reaching(goals(6, farthest=8.0)))
    plan, _, costs = decide(config, recorder, 6)
    best = torch.stack([cost.amin(dim=1) for cost in recorder.costs])
    assert (best.diff(dim=0) <= 0).all()
    assert torch.equal(costs, best[-1])
    # They come first among the candidates of the next decision.
    later = shift(plan)
    recorder = Recorder(recorder.cost)
    improve(config, later, recorder, torch.Generator().manual_seed(1))
    assert torch.equal(recorder.actions[0][:, : later.elites.shape[1]], later.elites)


def test_path_integral_weights_are_those_of_a_loop_whatever_the_unit_of_cost() -> None:
    costs = torch.randn(4, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = path_integral_weights(costs, 0.7)
    for row, have in zip(costs.tolist(), weights.tolist(), strict=True):
        scale = (sum((c - sum(row) / len(row)) ** 2 for c in row) / len(row)) ** 0.5
        raw = [np.exp(-c / (0.7 * scale)) for c in row]
        np.testing.assert_allclose(have, [w / sum(raw) for w in raw], rtol=1e-9)
    units = torch.tensor([1e-6, 1.0, 30.0, 1e6]).double()[:, None]
    torch.testing.assert_close(path_integral_weights(costs * units + 100 * units, 0.7), weights, rtol=1e-5, atol=0)
    torch.testing.assert_close(path_integral_weights(torch.full((2, 5), 3.0), 0.7), torch.full((2, 5), 0.2))


@pytest.mark.parametrize("horizon", [20, 33])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0, 3.0])
def test_noise_has_the_spectrum_asked_for_and_variance_one(beta: float, horizon: int) -> None:
    config = PlanningConfig(horizon=horizon, candidates=20_000)
    noise = draw_noise(config, 2, torch.Generator().manual_seed(0), colouring(horizon, beta)).double().numpy()
    assert noise.shape == (20_000, horizon, 2)
    power = (np.abs(np.fft.rfft(noise, axis=1)) ** 2).mean(axis=(0, 2))
    frequency = np.fft.rfftfreq(horizon)
    slope = np.polyfit(np.log(frequency[1:]), np.log(power[1:]), 1)[0]
    assert slope == pytest.approx(-beta, abs=0.03)
    assert power[0] == pytest.approx(power[1], rel=0.05)
    np.testing.assert_allclose(noise.var(axis=(0, 2)), 1, atol=0.04)
    # Coordinates, and candidates, are drawn apart.
    assert abs((noise[..., 0] * noise[..., 1]).mean()) < 0.02
    assert abs((noise[1:] * noise[:-1]).mean()) < 0.02


def test_colouring_is_a_filter_and_cem_and_mppi_have_none() -> None:
    torch.testing.assert_close(colouring(9, 0.0), torch.eye(9), rtol=0, atol=1e-6)
    matrix = colouring(12, 2.0)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-6)

    def first_candidates(planner: PlannerConfig) -> Tensor:
        recorder = Recorder(reaching(goals(1, farthest=1.0)))
        decide(PlanningConfig(planner=planner, iterations=2), recorder, 1)
        return recorder.actions[0]

    white = first_candidates(IcemConfig(noise_beta=0.0))
    assert not torch.allclose(first_candidates(IcemConfig(noise_beta=2.0)), white, atol=1e-3)
    for name in ("cem", "mppi"):
        torch.testing.assert_close(first_candidates(PLANNERS[name]), white, rtol=0, atol=1e-5)


@pytest.mark.parametrize("planner", [CemConfig(elites=120), IcemConfig(elites=120), MppiConfig()])
def test_the_ceiling_fits_its_candidates_whatever_the_plan_compares(
    planner: PlannerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It searches with fewer candidates, of which there cannot be more elites."""
    config = PlanningConfig(planner=planner, candidates=500)
    searched: list[PlanningConfig] = []
    monkeypatch.setattr(plan_module, "env_hook", lambda *_: True)
    monkeypatch.setattr(plan_module, "PrivilegedPolicy", lambda _, smaller, __: searched.append(smaller))
    monkeypatch.setattr(plan_module, "evaluate_policy", lambda _, make_policy, label: make_policy(0, []))
    plan_module._ceiling(PlanningProtocol("x", {}, seeds=1, episodes=1, budget=1, first_seed=0), config)
    [smaller] = searched
    assert smaller.candidates == plan_module.CEILING_CANDIDATES < config.candidates
    goal = goals(4, farthest=2.0)
    assert decide(replace(smaller, horizon=3), reaching(goal), len(goal))[0]
