from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipelines.errors import UserError
from tests.conftest import normal
from worldmodel.build import build_model
from worldmodel.config import (
    Config,
    Conv3dConfig,
    GaussianConfig,
    LatentConfig,
    ModelConfig,
    NoLatentConfig,
    PlanningConfig,
    QuantileRiskConfig,
    ReachRiskConfig,
    ResidualEditorConfig,
    VicregConfig,
    VideosConfig,
)
from worldmodel.nets.distance import steps_between
from worldmodel.nets.world_model import WorldModel
from worldmodel.planning.imagination import LatentCost, imagine
from worldmodel.planning.protocol import PlanningProtocol, evaluate_policy

NO_LATENT = NoLatentConfig()


def world(latent: LatentConfig = NO_LATENT, distance_dim: int = 0) -> WorldModel:
    torch.manual_seed(0)
    return build_model(
        Config(
            run_dir="",
            data=VideosConfig(num_frames=1, num_segments=2),
            model=ModelConfig(
                encoder=Conv3dConfig(width=0.125), latent=latent, editor=ResidualEditorConfig(), embedding_dim=8,
                hidden_dim=16, action_dim=2, embedding_norm="standard", distance_dim=distance_dim,
            ),
            objective=VicregConfig(),
        )
    ).eval()  # fmt: skip


def costs(model: WorldModel, actions: Tensor, **options: object) -> Tensor:
    config = PlanningConfig(horizon=4, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        cost = LatentCost(model, None, config, normal(1, 3, 8), normal(2, 3, 8), torch.Generator().manual_seed(0))
        return cost(actions)


class Ends(gymnasium.Env):
    """An environment of the user's own, whose episodes end at their second step, at the goal or not."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    observation_space = gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8)

    def __init__(
        self, reached: bool | None, terminated: bool = True, state: bool = True, render_mode: str = "rgb_array"
    ) -> None:
        self.reached, self.terminated, self.has_state, self.render_mode = reached, terminated, state, render_mode

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        self.num_steps = 0
        return self.render(), self._info()

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.num_steps += 1
        assert self.num_steps <= 2, "a step after the end"
        ends = self.num_steps == 2
        return self.render(), 0.0, ends and self.terminated, ends and not self.terminated, self._info()

    def render(self) -> np.ndarray:
        return np.zeros((8, 8, 3), np.uint8)

    goal_frame = render

    def _info(self) -> dict[str, Any]:
        info: dict[str, Any] = {"state": np.zeros(2, np.float32)} if self.has_state else {}
        return info if self.reached is None else info | {"is_success": self.reached and self.num_steps == 2}


gymnasium.register("tests/Ends-v0", entry_point=f"{__name__}:Ends")


class Still:
    """A policy of two zero actions for each decision."""

    def begin(self, goals: Tensor) -> None:
        self.count = len(goals)

    def act(self, frames: Tensor) -> Tensor:
        assert len(frames) == self.count
        return torch.zeros(self.count, 2, 2)

    def keep(self, is_running: Tensor) -> None:
        self.count = int(is_running.sum())


@pytest.mark.parametrize(
    ("kwargs", "rate"),
    [
        ({"reached": None}, 1.0),
        ({"reached": True}, 1.0),
        ({"reached": False}, 0.0),
        ({"reached": False, "terminated": False}, 0.0),
        ({"reached": None, "terminated": False}, 0.0),
    ],
)
def test_an_episode_that_ends_elsewhere_is_a_failure(kwargs: dict[str, Any], rate: float) -> None:
    """It is left alone then, and counts as all steps of the budget."""
    protocol = PlanningProtocol("tests/Ends-v0", kwargs, seeds=2, episodes=3, budget=6, first_seed=0)
    found = evaluate_policy(protocol, lambda seed, envs: Still(), label="")
    assert found["success_rate"] == rate and found["steps"] == (2 if rate else 6)


def test_an_environment_states_its_state() -> None:
    kwargs = {"reached": True, "state": False}
    protocol = PlanningProtocol("tests/Ends-v0", kwargs, seeds=1, episodes=1, budget=6, first_seed=0)
    with pytest.raises(UserError, match=r'planning needs info\["state"\] from reset and step'):
        evaluate_policy(protocol, lambda seed, envs: Still(), label="")


def test_costs_are_distances_to_the_goal_of_each_candidate_rolled_out_by_itself() -> None:
    model, actions = world(), 0.5 * normal(3, 3, 5, 4, 2)
    summed, last = costs(model, actions, cost="sum"), costs(model, actions, cost="last")
    for episode in range(3):
        context, goal = normal(1, 3, 8)[episode : episode + 1], normal(2, 3, 8)[episode]
        for candidate in range(5):
            with torch.no_grad():
                rolled = model.prior_mean_rollout(context, 4, actions[episode, candidate][None])[0]
            distances = (rolled - goal).square().mean(dim=-1)
            # Where the processor computes bf16, costs are in it.
            torch.testing.assert_close(summed[episode, candidate], distances.sum(), rtol=0.03, atol=0.03)
            torch.testing.assert_close(last[episode, candidate], distances[-1], rtol=0.03, atol=0.03)


def test_of_several_futures_the_mean_counts_or_their_quantile() -> None:
    model, actions = world(GaussianConfig()), 0.5 * normal(3, 3, 5, 4, 2)
    mean = costs(model, actions, num_samples=64)
    low, high = (costs(model, actions, num_samples=64, risk=QuantileRiskConfig(level=level)) for level in (0.0, 1.0))
    assert (low < mean).all() and (mean < high).all()
    again = costs(model, actions, num_samples=64)
    assert torch.equal(mean, again)
    assert not torch.equal(mean, costs(model, actions, num_samples=0))


def test_the_probability_of_reaching_the_goal_is_a_share_of_futures() -> None:
    """The goals are far away, and each future comes near one that is as far as the farthest of all."""
    model, actions = world(GaussianConfig()), 0.5 * normal(3, 3, 5, 4, 2)
    near, far = (costs(model, actions, num_samples=8, cost="last", risk=ReachRiskConfig(within=d)) for d in (1e-6, 1e6))
    assert ((near > 0) & (near < 1 / 8)).all() and ((far > -1) & (far < -1 + 1 / 8)).all()


def test_steps_are_counted_to_the_goal() -> None:
    model, actions = world(distance_dim=3), 0.5 * normal(3, 3, 5, 4, 2)
    with torch.no_grad():
        for parameter in model.distance.parameters():
            parameter.mul_(6)
    summed, last = (costs(model, actions, cost=cost, distance="steps") for cost in ("sum", "last"))
    for episode in range(3):
        with torch.no_grad():
            goal = model.distance(normal(2, 3, 8)[episode])
            for candidate in range(5):
                state = normal(1, 3, 8)[episode : episode + 1]
                states = imagine(model, None, state, actions[episode, candidate][None])
                away = [float(steps_between(model.distance(state), goal)) for state in states]
                expected = torch.tensor([sum(away), away[-1]])
                torch.testing.assert_close(summed[episode, candidate], expected[0], rtol=0.05, atol=0.2)
                torch.testing.assert_close(last[episode, candidate], expected[1], rtol=0.05, atol=0.2)
    assert summed.std() > 1
