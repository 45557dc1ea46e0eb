import torch
from torch import Tensor

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
