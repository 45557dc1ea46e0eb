"""Discrete actions: the categorical planner, and episodes of an environment whose actions are numbers from 3 to 6."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipelines.errors import UserError
from tests.conftest import REPO, normal
from tests.worldmodel.planning.test_planners import CPU, Recorder, decide, improve
from worldmodel.config import CategoricalConfig, CemConfig, PlanningConfig, load_config
from worldmodel.planning.controls import PrivilegedPolicy, RandomPolicy, ReplayPolicy
from worldmodel.planning.plan import check_actions
from worldmodel.planning.planners import Cost, Plan, project_, shift, start
from worldmodel.planning.planners.categorical import draw_sequences, normalised
from worldmodel.planning.protocol import GoalPolicy, PlanningProtocol, evaluate_policy, run_episodes

MOVES = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
SIDE = 7


class GridEnv(gymnasium.Env[np.ndarray, Any]):
    """A walk on a grid of 7 x 7 cells by the actions 3 to 6: right, left, down, up."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, render_mode: str = "rgb_array") -> None:
        self.render_mode = render_mode
        self.action_space = gymnasium.spaces.Discrete(4, start=3)
        self.observation_space = gymnasium.spaces.Box(0, 255, (16, 16, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.place, self.goal = self.np_random.integers(SIDE, size=(2, 2)).astype(np.float32)
        return self.goal_frame(), {"state": self.place.copy(), "goal": self.goal}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert action in self.action_space and isinstance(action, np.integer), action
        self.place = np.clip(self.place + MOVES[int(action) - 3].numpy(), 0, SIDE - 1)
        done = bool((self.place == self.goal).all())
        return self.goal_frame(), 0.0, done, False, {"state": self.place.copy()}

    def goal_frame(self) -> np.ndarray:
        return np.zeros((16, 16, 3), np.uint8)

    def render(self) -> np.ndarray:
        return self.goal_frame()

    @staticmethod
    def privileged_cost(envs: Sequence["GridEnv"]) -> "GridCost":
        return GridCost(envs)


class GridCost:
    """The distance to the goal, summed over the steps."""

    def __init__(self, envs: Sequence[GridEnv]) -> None:
        self.envs = list(envs)

    def __call__(self, actions: Tensor) -> Tensor:
        places = torch.from_numpy(np.stack([env.place for env in self.envs]))[:, None]
        goals = torch.from_numpy(np.stack([env.goal for env in self.envs]))[:, None]
        cost = torch.zeros(actions.shape[:2])
        for action in actions.unbind(2):
            places = (places + action @ MOVES).clamp(0, SIDE - 1)
            cost += (places - goals).abs().sum(dim=-1)
        return cost

    def keep(self, is_running: Tensor) -> None:
        self.envs = [env for env, stays in zip(self.envs, is_running.tolist(), strict=True) if stays]


gymnasium.register("worldmodel-tests/Grid-v0", entry_point=cast(Any, GridEnv))
ROOMS = "data_pipelines.worlds.two_rooms:worldmodel/TwoRooms-v0"


def protocol(env: str = "worldmodel-tests/Grid-v0") -> PlanningProtocol:
    return PlanningProtocol(env=env, env_kwargs={}, seeds=2, episodes=20, budget=14, first_seed=0)


def planning(**options: Any) -> PlanningConfig:
    chosen: dict[str, Any] = {
        "planner": CategoricalConfig(elites=8),
        "action_set": "one_hot",
        "horizon": 12,
        "candidates": 100,
    }
    return PlanningConfig(**chosen | options)


def meeting(wanted: Tensor) -> Cost:
    """The number of steps whose action is not the wanted one, of wanted numbers [E, horizon]."""
    return lambda actions: (actions.argmax(dim=-1) != wanted[:, None]).sum(dim=-1).float()


# ------------------------------------------------------------------------------------------------------ the planner


def test_the_one_best_sequence_of_a_million_is_found() -> None:
    wanted = torch.randint(4, (5, 10), generator=torch.Generator().manual_seed(2))
    config = planning(horizon=10, iterations=12)
    plan, actions, costs = improve(config, start(config, 5, 4, CPU), meeting(wanted), torch.Generator().manual_seed(0))
    assert torch.equal(actions.argmax(dim=-1), wanted) and not costs.any()
    assert torch.equal(plan.mean.argmax(dim=-1), wanted)


def test_candidates_are_one_hot_and_their_probabilities_are_those_of_a_loop() -> None:
    config = planning(planner=CategoricalConfig(elites=5, uniform_share=0.4), horizon=6, candidates=30, iterations=4)
    values = normal(1, 6, 3)
    recorder = Recorder(lambda actions: (actions * values).sum(dim=(-1, -2)))
    last = torch.rand(2, 6, 3, generator=torch.Generator().manual_seed(5))
    last[:, -1] = 0  # a step that `shift` has appended
    plan, actions, costs = improve(
        config, Plan(last, torch.zeros(2, 0, 6, 3)), recorder, torch.Generator().manual_seed(0)
    )
    uniform = torch.Generator().manual_seed(0)
    drawn = [torch.rand(30, 6, generator=uniform).double().numpy() for _ in range(4)]
    for episode in range(2):
        mean = last[episode].double().numpy()
        mean[-1] = 1 / 3
        mean = mean / mean.sum(axis=1, keepdims=True)
        best = mean.argmax(axis=1)
        mean = 0.6 * mean + 0.4 / 3
        for iteration in range(4):
            candidates = [best]
            for numbers in drawn[iteration][1:]:
                candidates.append(
                    [int(np.searchsorted(np.cumsum(p), u, "right")) for p, u in zip(mean, numbers, strict=True)]
                )
            seen = recorder.actions[iteration][episode]
            assert torch.equal(seen, seen.bool().float()) and (seen.sum(dim=-1) == 1).all()
            assert seen.argmax(dim=-1).tolist() == [list(candidate) for candidate in candidates]
            prices = [sum(float(values[t, a]) for t, a in enumerate(candidate)) for candidate in candidates]
            order = np.argsort(prices, kind="stable")[:5]
            share = np.mean([np.eye(3)[candidates[n]] for n in order], axis=0)
            mean = 0.9 * share + 0.1 * mean
            best = candidates[order[0]]
        np.testing.assert_allclose(plan.mean[episode], mean, atol=1e-5)
        assert actions[episode].argmax(dim=-1).tolist() == list(best)
        assert float(costs[episode]) == pytest.approx(min(prices), abs=1e-5)


def test_sequences_are_drawn_with_the_probabilities() -> None:
    probabilities = torch.tensor([[[0.1, 0.2, 0.7], [1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0], [0.5, 0.0, 0.5]]])
    drawn = draw_sequences(probabilities, 20_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.mean(dim=1), probabilities, rtol=0, atol=0.015)
    assert not drawn.mean(dim=1)[probabilities == 0].any()


def test_a_plan_at_rest_is_uniform_and_the_nearest_one_hot_action_is_the_largest() -> None:
    at_rest = normalised(start(planning(), 2, 4, CPU).mean)
    torch.testing.assert_close(at_rest, torch.full((2, 12, 4), 0.25))
    moved = shift(Plan(normalised(torch.rand(1, 3, 4)), torch.zeros(1, 0, 3, 4)))
    assert normalised(moved.mean)[0, -1].tolist() == [0.25] * 4
    assert project_(torch.tensor([[0.2, -3.0, 0.9], [-1.0, -0.5, -2.0]]), "one_hot").tolist() == [[0, 0, 1], [0, 1, 0]]


def test_a_seed_fixes_the_plan() -> None:
    wanted = torch.randint(2, (3, 12), generator=torch.Generator().manual_seed(2))
    config = planning(iterations=2)
    first, again, other = (decide(config, meeting(wanted), 3, seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


# --------------------------------------------------------------------------------------------------- the environment


def test_it_reaches_every_goal_of_a_discrete_environment_and_chance_does_not() -> None:
    def ceiling(seed: int, envs: Sequence[gymnasium.Env]) -> GoalPolicy:
        return PrivilegedPolicy(envs, planning(), seed)

    reached = evaluate_policy(protocol(), ceiling, label="ceiling")
    chance = evaluate_policy(protocol(), lambda seed, envs: RandomPolicy(envs, seed), label="chance")
    assert reached["success_rate"] == 1
    assert chance["success_rate"] is not None and chance["success_rate"] < 0.7


def test_random_actions_are_those_of_the_space_and_flat() -> None:
    policy = RandomPolicy([GridEnv()], seed=4)
    actions = policy.act(torch.zeros(200, 1, 3, 16, 16))
    space = gymnasium.spaces.Discrete(4, start=3)
    space.seed(4)
    assert actions[:, 0].argmax(dim=-1).tolist() == [int(space.sample()) - 3 for _ in range(200)]
    assert (actions.sum(dim=-1) == 1).all()


def test_a_policy_of_flat_actions_moves_as_they_say() -> None:
    class Right:
        def begin(self, goals: Tensor) -> None: ...

        def act(self, frames: Tensor) -> Tensor:
            return torch.tensor([1.0, 0, 0, 0]).expand(len(frames), 1, -1)

        def keep(self, is_running: Tensor) -> None: ...

    results = run_episodes(replace(protocol(), budget=3), 0, lambda envs: Right())
    for states in results.states:
        steps = np.diff(states, axis=0)
        assert set(map(tuple, steps)) <= {(1, 0), (0, 0)}  # (0, 0) at the border


def test_a_planner_of_the_other_kind_is_told() -> None:
    check_actions(protocol(), planning())
    check_actions(protocol(ROOMS), PlanningConfig())
    with pytest.raises(
        UserError, match=r"action_set=ball: the environment \S+Grid-v0 has 4 discrete actions: set plann"
    ):
        check_actions(protocol(), PlanningConfig())
    with pytest.raises(UserError, match=r"action_set=one_hot: the environment \S+ has continuous actions: set plann"):
        check_actions(protocol(ROOMS), planning())


@pytest.mark.parametrize("overrides", [["planning.planner=categorical"], ["planning.action_set=one_hot"]])
def test_planner_and_action_set_must_fit(overrides: list[str]) -> None:
    with pytest.raises(
        UserError, match=r"planning.planner=\w+ does not search planning.action_set=\w+: one_hot is for"
    ):
        load_config(REPO / "configs" / "objectives.yaml", overrides)
    with pytest.raises(UserError, match=r"elites=30 must be below planning.candidates=30"):
        both = ["planning.planner=categorical", "planning.action_set=one_hot", "planning.candidates=30"]
        load_config(REPO / "configs" / "objectives.yaml", both)
    assert load_config(REPO / "configs" / "objectives.yaml", ["planning.planner=cem"]).planning.planner == CemConfig()


def test_after_its_recorded_actions_a_replay_takes_the_first_action() -> None:
    up = np.tile(np.eye(4, dtype=np.float32)[3], (20, 1, 1))
    results = run_episodes(replace(protocol(), budget=3), 0, lambda envs: ReplayPolicy(up))
    steps = {tuple(np.diff(states, axis=0)[1:].ravel()) for states in results.states if len(states) == 4}
    assert (1, 0, 1, 0) in steps and {way[1::2] for way in steps} == {(0, 0)}  # to the right, or at the border
