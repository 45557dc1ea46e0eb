"""Planning with a trained model: what a sequence of actions costs, by where the model imagines that it leads.

The cost of actions is how far the states that they are imagined to lead to lie from the goal, by their embeddings or by
the steps that a temporal distance counts. Where the future is open, several are imagined for each sequence, and their
cost averaged, or their upper quantile taken.

Legend: E episodes, N candidates, M imagined futures, H steps of the horizon, A numbers of an action, D embedding
dimensions, Z numbers of a scene code, P numbers of a temporal distance, C channels, F = W pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipelines.errors import UserError
from data_pipelines.transforms import to_float
from worldmodel.config import PlanningConfig
from worldmodel.nets.distance import steps_between
from worldmodel.nets.world_model import WorldModel
from worldmodel.planning.latent_actions import ActionDecoder
from worldmodel.planning.planners import Plan, improve, shift, start
from worldmodel.runs.trained_run import TrainedRun
from worldmodel.training.machine import computes_bf16


def imagine(
    model: WorldModel,
    decoder: ActionDecoder | None,
    state: Tensor,
    actions: Tensor,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Where actions [B, H, A] are imagined to lead from a state [B, D + Z]: states [B, D + Z], step by step.

    They are at the prior's mean or, with a generator, at draws from it. With a decoder, actions reach a passive model
    as the r that they amount to.
    """
    for action in actions.unbind(1):
        if decoder is not None:
            state = model.edit(state, decoder(state, action))
        elif generator is not None:
            state = model.edit(state, model.sample(state, generator, action=action), action)
        else:
            state = model.edit(state, model.prior_mean(state, action), action)
        yield state


@dataclass(frozen=True)
class LatentCost:
    """What candidates cost: state and goal [E, D + Z] -> a function of actions [E, N, H, A] to [E, N]."""

    model: WorldModel
    decoder: ActionDecoder | None
    config: PlanningConfig
    state: Tensor
    goal: Tensor
    generator: torch.Generator

    def __call__(self, actions: Tensor) -> Tensor:
        num_candidates, num_futures = actions.shape[1], max(1, self.config.num_samples)
        flat = actions.flatten(0, 1).repeat_interleave(num_futures, dim=0)
        state = self.state.repeat_interleave(num_candidates * num_futures, dim=0)
        cost = state.new_zeros(len(state))
        drawn = self.generator if self.config.num_samples else None
        with torch.autocast(state.device.type, torch.bfloat16, enabled=computes_bf16()):
            goal = self._place(self.goal).repeat_interleave(num_candidates * num_futures, dim=0)
            for imagined in imagine(self.model, self.decoder, state, flat, drawn):
                if self.config.cost == "sum":
                    cost += self._away(imagined, goal)
        if self.config.cost == "last":
            cost = self._away(imagined, goal)
        futures = cost.float().view(*actions.shape[:2], num_futures)
        if self.config.risk_quantile is not None:
            return futures.quantile(self.config.risk_quantile, dim=-1)
        return futures.mean(dim=-1)

    def _place(self, state: Tensor) -> Tensor:
        """What of states [B, D + Z] distances are read from: [B, D or P]."""
        if self.config.distance == "embedding":
            return self.model.embedding_of(state)
        assert self.model.distance is not None
        return self.model.distance(self.model.lasting(state))

    def _away(self, state: Tensor, goal: Tensor) -> Tensor:
        """How far states [B, D + Z] are from goals [B, D or P]: [B]."""
        place = self._place(state)
        return steps_between(place, goal) if self.config.distance == "steps" else (place - goal).square().mean(dim=-1)


class Decision(NamedTuple):
    """What a decision began from and came to: episodes [E], their numbers; state [E, D + Z]; actions [E, H, A]."""

    episodes: Tensor
    state: Tensor
    actions: Tensor


class LatentPolicy:
    """Acts towards pictures of goals in a batch of episodes, planning anew at every step from the last plan.

    `decisions` holds what was decided at each step, for `imagined`.

    Raises:
        UserError: the run is not conditioned on actions and has no decoder of them, or sees more than one frame at a
            time; planning.distance=steps and the run has no temporal distance.
    """

    def __init__(
        self, run: TrainedRun, config: PlanningConfig, seed: int, decoder: ActionDecoder | None = None
    ) -> None:
        self.decoder, self.action_dim = decoder, decoder.action_dim if decoder else run.model.action_dim
        if not self.action_dim:
            raise UserError(
                f"the run {run.folder} knows no actions: train it with model.action_dim, or give --labels to one with "
                "a latent"
            )
        if decoder and config.num_samples:
            raise UserError(
                f"planning.num_samples={config.num_samples}: r stands for the action here, and is not drawn"
            )
        if run.config.data.num_frames != 1:
            raise UserError(f"the run {run.folder} has data.num_frames={run.config.data.num_frames}: plans take 1")
        if config.distance == "steps" and run.model.distance is None:
            raise UserError(f"the run {run.folder} has no temporal distance: train it with model.distance_dim")
        self.run, self.config, self.seed = run, config, seed
        self.plan: Plan
        self.decisions: list[Decision]

    @torch.no_grad()
    def begin(self, goals: Tensor) -> None:
        """Pictures of the goals of E episodes, uint8 [E, C, F, W]."""
        self.generator = torch.Generator().manual_seed(self.seed)
        video = self._video(goals)
        scene = self.run.model.observe(video)[:, self.run.model.embedding_dim :]
        self.goal = torch.cat([self.run.target_encoder(video), scene], dim=1)
        self.plan = start(self.config, len(goals), self.action_dim, self.run.device)
        self.episodes, self.decisions = torch.arange(len(goals)), []

    @torch.no_grad()
    def act(self, frames: Tensor) -> Tensor:
        """What the episodes show now, uint8 [E, C, F, W] -> the next action of each, [E, A] on the CPU."""
        state = self.run.model.observe(self._video(frames))
        on_device = torch.Generator(self.run.device).manual_seed(
            int(torch.randint(2**62, (), generator=self.generator))
        )
        cost = LatentCost(self.run.model, self.decoder, self.config, state, self.goal, on_device)
        plan, actions, _ = improve(self.config, self.plan, cost, self.generator)
        self.plan = shift(plan)
        self.decisions.append(Decision(self.episodes, state, actions))
        return actions[:, 0].cpu()

    def keep(self, going_on: Tensor) -> None:
        """Drop the episodes that have ended: bool [E]."""
        self.goal, self.episodes = self.goal[going_on], self.episodes[going_on]
        self.plan = Plan(*(part[going_on] for part in self.plan))

    @torch.no_grad()
    def imagined(self, episode: int) -> Tensor:
        """Where each decision's plan was imagined to lead in one of the episodes: [T, M, H, D] for T decisions.

        The futures are those that a cost averages: M drawn ones, or the one at the prior's mean.
        """
        num_futures = max(1, self.config.num_samples)
        own = [decision.episodes == episode for decision in self.decisions]
        state = torch.cat([decision.state[rows] for decision, rows in zip(self.decisions, own, strict=True)])
        actions = torch.cat([decision.actions[rows] for decision, rows in zip(self.decisions, own, strict=True)])
        generator = torch.Generator(self.run.device).manual_seed(self.seed) if self.config.num_samples else None
        with torch.autocast(self.run.device.type, torch.bfloat16, enabled=computes_bf16()):
            steps = imagine(
                self.run.model,
                self.decoder,
                state.repeat_interleave(num_futures, dim=0),
                actions.repeat_interleave(num_futures, dim=0),
                generator,
            )
            embeddings = [self.run.model.embedding_of(state) for state in steps]
            return torch.stack(embeddings, dim=1).unflatten(0, (-1, num_futures))

    def _video(self, frames: Tensor) -> Tensor:
        return to_float(frames[:, None].to(self.run.device))
