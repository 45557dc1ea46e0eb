"""Planning with a trained model: what a sequence of actions costs, by where the model imagines that it leads.

The cost of actions is how far the embeddings that they are imagined to lead to lie from the goal's. Where the future is
open, several are imagined for each sequence, and their cost averaged, or their upper quantile taken.

Legend: E episodes, N candidates, M imagined futures, H steps of the horizon, A numbers of an action, D embedding
dimensions, C channels, F = W pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipelines.errors import UserError
from data_pipelines.transforms import to_float
from worldmodel.config import PlanningConfig
from worldmodel.latent_actions import ActionDecoder
from worldmodel.machine import computes_bf16
from worldmodel.model import WorldModel
from worldmodel.planners import Plan, improve, shift, start
from worldmodel.run import TrainedRun


@dataclass(frozen=True)
class LatentCost:
    """What candidates cost: context, goal [E, D] -> a function of actions [E, N, H, A] to [E, N].

    With a decoder, actions reach a passive model as the r that they amount to.
    """

    model: WorldModel
    decoder: ActionDecoder | None
    config: PlanningConfig
    context: Tensor
    goal: Tensor
    generator: torch.Generator

    def __call__(self, actions: Tensor) -> Tensor:
        num_candidates, num_futures = actions.shape[1], max(1, self.config.num_samples)
        flat = actions.flatten(0, 1).repeat_interleave(num_futures, dim=0)
        goal = self.goal.repeat_interleave(num_candidates * num_futures, dim=0)
        state = self.context.repeat_interleave(num_candidates * num_futures, dim=0)
        cost = state.new_zeros(len(state))
        with torch.autocast(state.device.type, torch.bfloat16, enabled=computes_bf16()):
            for action in flat.unbind(1):
                state = self._step(state, action)
                if self.config.cost == "sum":
                    cost += (state - goal).square().mean(dim=-1)
        if self.config.cost == "last":
            cost = (state - goal).square().mean(dim=-1)
        futures = cost.float().view(*actions.shape[:2], num_futures)
        if self.config.risk_quantile is not None:
            return futures.quantile(self.config.risk_quantile, dim=-1)
        return futures.mean(dim=-1)

    def _step(self, state: Tensor, action: Tensor) -> Tensor:
        if self.decoder is not None:
            return self.model.edit(state, self.decoder(state, action))
        if self.config.num_samples:
            return self.model.edit(state, self.model.sample(state, self.generator, action=action), action)
        return self.model.edit(state, self.model.prior_mean(state, action), action)


class LatentPolicy:
    """Acts towards pictures of goals in a batch of episodes, planning anew at every step from the last plan.

    Raises:
        UserError: the run is not conditioned on actions and has no decoder of them, or sees more than one frame at a
            time.
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
        self.run, self.config, self.seed = run, config, seed
        self.plan: Plan

    def begin(self, goals: Tensor) -> None:
        """Pictures of the goals of E episodes, uint8 [E, C, F, W]."""
        self.generator = torch.Generator().manual_seed(self.seed)
        self.goal = self._embed(goals, target=True)
        self.plan = start(self.config, len(goals), self.action_dim, self.run.device)

    def act(self, frames: Tensor) -> Tensor:
        """What the episodes show now, uint8 [E, C, F, W] -> the next action of each, [E, A] on the CPU."""
        context = self._embed(frames, target=False)
        on_device = torch.Generator(self.run.device).manual_seed(
            int(torch.randint(2**62, (), generator=self.generator))
        )
        cost = LatentCost(self.run.model, self.decoder, self.config, context, self.goal, on_device)
        plan, actions, _ = improve(self.config, self.plan, cost, self.generator)
        self.plan = shift(plan)
        return actions[:, 0].cpu()

    def keep(self, going_on: Tensor) -> None:
        """Drop the episodes that have ended: bool [E]."""
        self.goal = self.goal[going_on]
        self.plan = Plan(*(part[going_on] for part in self.plan))

    @torch.no_grad()
    def _embed(self, frames: Tensor, target: bool) -> Tensor:
        video = to_float(frames[:, None].to(self.run.device))
        return self.run.target_encoder(video) if target else self.run.model.encode(video)
