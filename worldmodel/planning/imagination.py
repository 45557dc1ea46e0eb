"""Planning with a trained model: the cost of a sequence of actions, by the future that the model imagines for it.

The cost is the distance of the imagined states from the goal: between embeddings, or in steps of a temporal distance.
If the future is uncertain, several futures are imagined per sequence, and `planning.risk` is the measure of their
costs.

Legend: E episodes, I candidates, S imagined futures, B rows of them, K steps of the horizon, A numbers of an action, D
embedding dimensions, Z numbers of scene code and history, L numbers of a temporal distance's phi, C channels, H = W
pixels, N decisions.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipelines.decoders import from_rgb
from data_pipelines.errors import UserError
from data_pipelines.transforms import to_float
from worldmodel.build import clip_layout
from worldmodel.config import DataConfig, PlanningConfig, ReachRiskConfig, VideosConfig, frame_channels, num_cameras
from worldmodel.nets.distance import steps_between
from worldmodel.nets.world_model import WorldModel
from worldmodel.planning.goal_conditioned import GoalConditionedPolicy
from worldmodel.planning.latent_actions import ActionDecoder
from worldmodel.planning.planners import Plan, make_planner, shift, start
from worldmodel.planning.risk import reduced
from worldmodel.runs.trained_run import TrainedRun
from worldmodel.training.machine import computes_bf16

MAX_ACTIONS = 1_024
"""Limit of the actions in a plan: that of planning.horizon."""


def imagine(
    model: WorldModel,
    decoder: ActionDecoder | None,
    state: Tensor,
    actions: Tensor,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield the imagined states [B, D + Z] after each of actions [B, K, A] from a state [B, D + Z].

    r is the mean of the prior or, with a generator, a draw from it. With a decoder, the model takes no actions; it gets
    them as the r that the decoder returns.
    """
    if decoder:
        return model.steps(state, actions[..., :0], _decoded(decoder, actions))
    if generator:
        return model.steps(state, actions, lambda state, action: model.sample(state, generator, action=action))
    return model.steps(state, actions, model.prior_mean)


def in_blocks(actions: Tensor, horizon: int) -> Tensor:
    """Concatenate the n actions of each step of the model: [..., horizon * n, A] -> [..., horizon, n * A]."""
    return actions.reshape(*actions.shape[:-2], horizon, -1)


def _decoded(decoder: ActionDecoder, actions: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function that decodes one of actions [B, K, A] after another to r [B, R]."""
    remaining = iter(actions.unbind(1))
    return lambda state, _: decoder(state, next(remaining))


@dataclass(frozen=True)
class LatentCost:
    """The cost of candidates, a function of actions to [E, I], for a state and a goal [E, D + Z].

    Actions are those of the steps of the environment: [E, I, K * n, A] if a step of the model is n of them.
    """

    model: WorldModel
    decoder: ActionDecoder | None
    config: PlanningConfig
    state: Tensor
    goal: Tensor
    generator: torch.Generator

    def __call__(self, actions: Tensor) -> Tensor:
        num_candidates, num_futures = actions.shape[1], max(1, self.config.num_samples)
        flat = in_blocks(actions, self.config.horizon).flatten(0, 1).repeat_interleave(num_futures, dim=0)
        state = self.state.repeat_interleave(num_candidates * num_futures, dim=0)
        cost = state.new_zeros(len(state))
        nearest = torch.full_like(cost, math.inf)
        generator = self.generator if self.config.num_samples else None
        with torch.autocast(state.device.type, torch.bfloat16, enabled=computes_bf16(state.device)):
            goal = self._coordinates(self.goal).repeat_interleave(num_candidates * num_futures, dim=0)
            for imagined in imagine(self.model, self.decoder, state, flat, generator):
                state = imagined
                if self.needs_every_step:
                    distance = self._distance(state, goal)
                    cost += distance
                    nearest = torch.minimum(nearest, distance)
        if self.config.cost == "last":
            cost = self._distance(state, goal)
        costs, nearest = (values.float().view(*actions.shape[:2], num_futures) for values in (cost, nearest))
        return reduced(self.config.risk, costs, nearest)

    @property
    def needs_every_step(self) -> bool:
        """True if the distance of every step counts, not that of the last one alone."""
        return self.config.cost == "sum" or isinstance(self.config.risk, ReachRiskConfig)

    def _coordinates(self, state: Tensor) -> Tensor:
        """Return the coordinates of states [B, D + Z] that distances are computed from: [B, D or L]."""
        if self.config.distance == "embedding":
            return self.model.embedding_of(state)
        return self.model.distance(self.model.persistent(state))

    def _distance(self, state: Tensor, goal: Tensor) -> Tensor:
        """Return the distance of states [B, D + Z] from goals [B, D or L]: [B]."""
        reached = self._coordinates(state)
        if self.config.distance == "steps":
            return steps_between(reached, goal)
        return (reached - goal).square().mean(dim=-1)


def propose(model: WorldModel, policy: GoalConditionedPolicy, state: Tensor, goal: Tensor, horizon: int) -> Tensor:
    """Roll a policy out in imagination, from states towards goals [E, D + Z], for `horizon` steps of the model.

    Returns: actions of the steps of the environment, [E, horizon * n, A].
    """
    towards = model.embedding_of(goal)
    actions = [policy(model.persistent(state), towards)]
    while len(actions) < horizon:
        with torch.autocast(state.device.type, torch.bfloat16, enabled=computes_bf16(state.device)):
            state = model.edit(state, model.prior_mean(state, actions[-1]), actions[-1])
        actions.append(policy(model.persistent(state), towards))
    return torch.cat([action.unflatten(1, (policy.block, -1)) for action in actions], dim=1)


@dataclass(frozen=True)
class Decision:
    """One decision: the running episodes [E] by number, their state [E, D + Z], and the planned actions [E, K, A]."""

    episodes: Tensor
    state: Tensor
    actions: Tensor


def check_run(run: TrainedRun, config: PlanningConfig, decoder: ActionDecoder | None = None) -> None:
    """Check that a run can plan.

    Raises:
        UserError: the run is not conditioned on actions and there is no decoder; the run sees resampled frames or
            several cameras; planning.distance=steps, but the run has no temporal distance; a plan is too long, or
            shorter than what is executed of it.
    """
    if not run.model.action_dim and not decoder:
        raise UserError(
            f"the run {run.folder} is not conditioned on actions: train it with model.action_dim, or plan "
            "with labels if it has a latent"
        )
    if decoder and config.num_samples:
        raise UserError(
            f"planning.num_samples={config.num_samples}: with a decoder, r is given by the action and not drawn: "
            "set it to 0"
        )
    if (cameras := num_cameras(run.config.data)) > 1:
        raise UserError(f"the run {run.folder} sees {cameras} cameras (data.camera): planning needs 1")
    if isinstance(run.config.data, VideosConfig) and run.config.data.fps is not None:
        raise UserError(f"the run {run.folder} has data.fps={run.config.data.fps:g}: planning needs null")
    if config.distance == "steps" and not run.model.distance.num_values:
        raise UserError(f"the run {run.folder} has no temporal distance: train it with model.distance_dim")
    if config.replan_every > config.horizon:
        raise UserError(
            f"planning.replan_every={config.replan_every} is more than planning.horizon={config.horizon}: a plan "
            "has no actions for so many steps"
        )
    if config.horizon * (block := clip_layout(run.config).span) > MAX_ACTIONS:
        raise UserError(
            f"planning.horizon={config.horizon}: with {block} actions in a step of the model (data.num_frames * "
            f"data.frame_stride), a plan has more than {MAX_ACTIONS:,} actions"
        )


def as_in_videos(frames: Tensor, data: DataConfig) -> Tensor:
    """Return frames of an environment, uint8 RGB [..., 3, H, W], as videos are read for a run: [..., C, P, P]."""
    shape = (frame_channels(data), data.size_px, data.size_px)
    if frames.shape[-3:] == shape:
        return frames
    rows = frames.movedim(-3, -1).contiguous().flatten(0, -4).numpy()
    read = [torch.from_numpy(from_rgb(rgb, shape[0], data.size_px)) for rgb in rows]
    return torch.stack(read).unflatten(0, frames.shape[:-3])


class LatentPolicy:
    """A policy that acts towards goal images in a batch of episodes.

    It plans after every `planning.replan_every` steps of the model, starting from its last plan, or with a learned
    policy from the actions that this proposes. With `searches` false, it takes the actions of the learned policy, and
    plans hold these alone. A step of the model is data.num_frames * data.frame_stride steps of the environment, with an
    action each. The horizon counts steps of the model. The planner searches over single actions, so that the set of
    allowed actions is that of the environment.

    A model with a history remembers the segments since the start of the episode, and the actions that were executed
    between them. A segment of several frames is the latest ones of the episode, data.frame_stride apart. Before the
    first frame nothing has moved, as nothing moves at the goal. Frames are resized and cropped as the frames of videos
    are.

    `decisions` holds the decision of each step, for `imagined`.

    Raises:
        UserError: as check_run.
    """

    def __init__(
        self,
        run: TrainedRun,
        config: PlanningConfig,
        seed: int,
        decoder: ActionDecoder | None = None,
        *,
        learned: GoalConditionedPolicy | None = None,
        searches: bool = True,
    ) -> None:
        check_run(run, config, decoder)
        layout = clip_layout(run.config)
        self.decoder, self.block, self.remembers = decoder, layout.span, layout.history_segments > 0
        self.executed = config.replan_every * self.block
        self.action_dim = (decoder or run.model).action_dim // self.block
        self.run, self.config, self.seed = run, config, seed
        self.learned, self.searches = learned, searches
        self.search = dataclasses.replace(config, horizon=config.horizon * self.block)
        self.planner = make_planner(config.planner)
        self.plan: Plan
        self.before: tuple[Tensor, Tensor] | None
        self.decisions: list[Decision]

    @torch.no_grad()
    def begin(self, goals: Tensor) -> None:
        """Begin E episodes with these goal images, uint8 [E, C, H, W]."""
        self.generator = torch.Generator().manual_seed(self.seed)
        self.seen, self.before = goals[:, None][:, :0], None
        video = self._read(goals[:, None]).expand(-1, self.run.config.data.num_frames, -1, -1, -1)
        code = self.run.model.observe(video)[:, self.run.model.embedding_dim :]
        self.goal = torch.cat([self.run.target_encoder(video), code], dim=1)
        self.plan = start(self.search, len(goals), self.action_dim, self.run.device)
        self.episodes, self.decisions = torch.arange(len(goals)), []

    @torch.no_grad()
    def act(self, frames: Tensor) -> Tensor:
        """Return the next actions [E, planning.replan_every * n, A] of each episode, on the CPU.

        frames are the new ones, uint8 [E, T, C, H, W].
        """
        state = self._observed(frames)
        actions = self._searched(state) if self.searches else self._proposed(state, self.config.replan_every)
        blocks = in_blocks(actions, actions.shape[1] // self.block)
        self.decisions.append(Decision(self.episodes, state, blocks))
        self.before = state, blocks[:, : self.config.replan_every, : self.run.model.action_dim]
        return actions[:, : self.executed].cpu()

    def _observed(self, frames: Tensor) -> Tensor:
        """Return the state [E, D + Z] after new frames, uint8 [E, T, C, H, W].

        It remembers the segments of the episode so far, which the state of the last decision and the frames show.
        """
        model, segments = self.run.model, self._segments(frames)
        if self.before is None or not self.remembers:
            return model.observe(segments[-1])
        state, taken = self.before
        for segment, action in zip(segments, taken.unbind(1), strict=True):
            state = model.follow(state, action, model.observe(segment))
        return state

    def _searched(self, state: Tensor) -> Tensor:
        """Return the actions [E, K * n, A] that the planner finds for states [E, D + Z]."""
        if self.learned:
            self.plan = self.plan._replace(mean=self._proposed(state, self.config.horizon))
        on_device = torch.Generator(self.run.device).manual_seed(
            int(torch.randint(2**62, (), generator=self.generator))
        )
        cost = LatentCost(self.run.model, self.decoder, self.config, state, self.goal, on_device)
        plan, actions, _ = self.planner.improve(self.search, self.plan, cost, self.generator)
        for _ in range(self.executed):
            plan = shift(plan)
        self.plan = plan
        return actions

    def _proposed(self, state: Tensor, horizon: int) -> Tensor:
        """Return the actions [E, horizon * n, A] of the learned policy for states [E, D + Z], by imagination."""
        assert self.learned
        return propose(self.run.model, self.learned, state, self.goal, horizon)

    def keep(self, is_running: Tensor) -> None:
        """Drop the episodes that have ended. is_running: bool [E]."""
        self.goal, self.episodes, self.seen = self.goal[is_running], self.episodes[is_running], self.seen[is_running]
        if self.before:
            self.before = self.before[0][is_running], self.before[1][is_running]
        self.plan = Plan(*(part[is_running] for part in self.plan))

    @torch.no_grad()
    def imagined(self, episode: int) -> Tensor:
        """Return the futures that the N decisions of an episode imagined for their plans: embeddings [N, S, K, D].

        They are the futures that a cost averages: S drawn ones, or the one at the prior's mean.
        """
        num_futures = max(1, self.config.num_samples)
        own = [decision.episodes == episode for decision in self.decisions]
        state = torch.cat([decision.state[rows] for decision, rows in zip(self.decisions, own, strict=True)])
        actions = torch.cat([decision.actions[rows] for decision, rows in zip(self.decisions, own, strict=True)])
        generator = torch.Generator(self.run.device).manual_seed(self.seed) if self.config.num_samples else None
        with torch.autocast(self.run.device.type, torch.bfloat16, enabled=computes_bf16(self.run.device)):
            states = imagine(
                self.run.model,
                self.decoder,
                state.repeat_interleave(num_futures, dim=0),
                actions.repeat_interleave(num_futures, dim=0),
                generator,
            )
            embeddings = [self.run.model.embedding_of(state) for state in states]
            return torch.stack(embeddings, dim=1).unflatten(0, (-1, num_futures))

    def _segments(self, frames: Tensor) -> list[Tensor]:
        """Return the segments that new frames, uint8 [E, T, C, H, W], end: float [E, data.num_frames, C, H, W] each.

        There is one after each step of the model. Of a model without a history, only the last one is returned.
        """
        data = self.run.config.data
        before = self.seen if self.seen.shape[1] else frames[:, :1].repeat_interleave(self.block, dim=1)
        seen = torch.cat([before, frames], dim=1)
        self.seen = seen[:, -self.block :]
        at = data.frame_stride * torch.arange(data.num_frames) + data.frame_stride - 1
        num_segments = max(1, frames.shape[1] // self.block) if self.remembers else 1
        windows = [seen[:, -self.block * back :][:, : self.block] for back in range(num_segments, 0, -1)]
        return [self._read(window[:, at]) for window in windows]

    def _read(self, frames: Tensor) -> Tensor:
        """Return frames of the environment, uint8 [..., C, H, W], as the model takes them."""
        return to_float(as_in_videos(frames, self.run.config.data).to(self.run.device))
