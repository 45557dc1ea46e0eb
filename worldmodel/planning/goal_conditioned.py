"""A goal-conditioned policy: pi(a | f(x), f(goal)), learned by inverse dynamics from the run's own clips.

Of a state x_t of a clip, any later state x_{t+k} is a goal that was reached, and a_t the action that began the way
(hindsight; Ghosh et al., arXiv 1912.06088; on frozen embeddings of a world model, GC-IDM, arXiv 2605.08732). No reward
is read, and the world model does not change. The policy decides by one pass of a small network, without any search.

The same start and goal are often followed by different actions. A mean of these may lead nowhere, such as into the wall
between two ways around it. Continuous actions therefore have a mixture of Gaussians, and the policy takes the mean of
its largest component.

Legend: N clips of L segments, B examples, D embedding dimensions, P numbers of a scene code's persistent part, n
actions of a step of the model, A numbers of them all, M components.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn
from tqdm.auto import tqdm

from data_pipelines.errors import UserError
from data_pipelines.files import check_regular, write_bytes
from worldmodel.config import PlanningConfig
from worldmodel.data import actions_of, segments_of, without_history
from worldmodel.evaluation.embed import counted, frozen
from worldmodel.nets.encoders import mlp
from worldmodel.planning.planners import project_
from worldmodel.runs.folder import RunFolder
from worldmodel.runs.trained_run import TrainedRun
from worldmodel.training.optimisation import learning_rate, set_lr
from worldmodel.training.refine import encode_segments

COMPONENTS = 4
WARMUP_STEPS = 100
BATCH = 512
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-4
MIN_CLIPS = 10

ActionSet = Literal["ball", "box", "one_hot"]


class GoalConditionedPolicy(nn.Module):
    """pi(a | f(x), f(goal)): states [B, D + P] without what a step forgets, and goals [B, D] in the space of targets.

    Discrete actions have a softmax, others a mixture of Gaussians with one standard deviation for all of them. The
    `block` actions of a step of the model are decided together.
    """

    state_mean: Tensor
    state_std: Tensor
    goal_mean: Tensor
    goal_std: Tensor

    def __init__(
        self,
        state_dim: int,
        goal_dim: int,
        action_dim: int,
        action_set: ActionSet,
        block: int = 1,
        *,
        hidden_dim: int = 256,
    ) -> None:
        super().__init__()
        self.action_dim, self.action_set, self.block = action_dim, action_set, block
        self.num_components = 0 if action_set == "one_hot" else COMPONENTS
        for name, dim in (("state", state_dim), ("goal", goal_dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(dim))
            self.register_buffer(f"{name}_std", torch.ones(dim))
        outputs = self.num_components * (1 + action_dim) or action_dim
        self.net = mlp([state_dim + goal_dim, hidden_dim, hidden_dim, hidden_dim, outputs], norm="none")
        self.log_std = nn.Parameter(torch.tensor(-1.0))

    def standardise(self, states: Tensor, goals: Tensor) -> None:
        """Scale inputs by the mean and standard deviation of states [..., D + P] and goals [..., D]."""
        for name, values in (("state", states.flatten(0, -2)), ("goal", goals.flatten(0, -2))):
            getattr(self, f"{name}_mean").copy_(values.mean(dim=0))
            getattr(self, f"{name}_std").copy_(values.std(dim=0).clamp(min=1e-6))

    def forward(self, state: Tensor, goal: Tensor) -> Tensor:
        """Return the policy's actions [B, A], each in the action set, for states [B, D + P] and goals [B, D]."""
        actions = self._outputs(state, goal)
        if self.num_components:
            weights, means = self._mixture(actions)
            actions = means[torch.arange(len(means), device=means.device), weights.argmax(dim=-1)]
        return project_(self._single(actions).clone(), self.action_set).flatten(1)

    def loss(self, state: Tensor, goal: Tensor, action: Tensor) -> Tensor:
        """Return the mean negative log likelihood of actions [B, A], a scalar."""
        outputs = self._outputs(state, goal)
        if not self.num_components:
            log_odds = self._single(outputs).log_softmax(dim=-1)
            return -(log_odds * self._single(action)).sum(dim=(-2, -1)).mean()
        weights, means = self._mixture(outputs)
        squared = ((action[:, None] - means) / self.log_std.exp()).square().sum(dim=-1)
        normaliser = self.action_dim * (self.log_std + 0.5 * math.log(2 * math.pi))
        return -(weights.log_softmax(dim=-1) - 0.5 * squared - normaliser).logsumexp(dim=-1).mean()

    def _outputs(self, state: Tensor, goal: Tensor) -> Tensor:
        scaled = [(state - self.state_mean) / self.state_std, (goal - self.goal_mean) / self.goal_std]
        return self.net(torch.cat(scaled, dim=-1))

    def _single(self, actions: Tensor) -> Tensor:
        """Return the actions of a step one by one: [B, A] -> [B, n, A / n]."""
        return actions.unflatten(-1, (self.block, -1))

    def _mixture(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [B, M] and the means [B, M, A] of the components."""
        logits, means = outputs.tensor_split([self.num_components], dim=-1)
        return logits, means.unflatten(-1, (self.num_components, self.action_dim))


# --------------------------------------------------------------------------------------------------------------- fit


@dataclass(frozen=True)
class GoalClips:
    """N clips of L segments after the frozen encoders.

    states [N, L, D + P], goals [N, L, D] in the space of targets, and the actions [N, L - 1, A] between segments.
    """

    states: Tensor
    goals: Tensor
    actions: Tensor


def goal_conditioned_policy(run: TrainedRun, config: PlanningConfig) -> GoalConditionedPolicy:
    """Return the policy of a run: the one in its folder, if it has the same checkpoint and settings, or a new one.

    Raises:
        UserError: the training split has too few clips of planning.goal_steps steps, or the policy cannot be written
            into the folder.
    """
    settings = {
        "step": run.num_updates,
        "seed": run.config.seed,
        "goal_steps": config.goal_steps,
        "clips": config.policy_clips,
        "updates": config.policy_updates,
    }
    state_dim = run.model.embedding_dim + run.model.scene.scene_dim
    action_dim, block = run.model.action_dim, run.networks.layout.span
    policy = GoalConditionedPolicy(
        state_dim,
        run.model.embedding_dim,
        action_dim,
        config.action_set,
        block,
        hidden_dim=config.policy_hidden_dim,
    ).to(run.device)
    if not load_policy(run.folder, policy, settings):
        steps = config.goal_steps
        run.source.check_split("train", steps, set(), "planning.goal_steps")
        fit_policy(policy, embed_clips(run, steps, config.policy_clips), run.config.seed, config.policy_updates)
        save_policy(run.folder, policy, settings)
    return policy.eval().requires_grad_(False)


def embed_clips(run: TrainedRun, num_steps: int, num_clips: int) -> GoalClips:
    """Embed num_clips clips of num_steps + 1 segments, spread over the training split, or all if there are fewer.

    A goal is one picture: of a segment of several frames, the last one, as if nothing moved.

    Raises:
        UserError: the videos have no actions, or there are fewer than MIN_CLIPS clips.
    """
    model, layout, parts = run.model, run.networks.layout, []
    batches = run.source.evaluation_batches("train", num_clips, num_steps)
    with frozen(model, run.target_encoder):
        for batch in counted(batches, num_clips, "embedding for the policy"):
            segments = segments_of(batch, layout.segments_for(num_steps), run.device)
            segments = segments[:, layout.history_segments :][:, : num_steps + 1]
            state = model.state_of(encode_segments(model.embedder.features, segments).flatten(0, 1)).float()
            if run.networks.shares_encoder and layout.num_frames == 1:
                goals = model.embedding_of(state).unflatten(0, segments.shape[:2])
            else:
                still = segments[:, :, -1:].expand_as(segments)
                goals = encode_segments(run.target_encoder, still).float()
            states = model.persistent(state).unflatten(0, segments.shape[:2])
            parts.append((states, goals, actions_of(without_history(batch, layout), layout, num_steps, run.device)))
    clips = GoalClips(*(torch.cat(part) for part in zip(*parts, strict=True)))
    if len(clips.states) < MIN_CLIPS:
        raise UserError(
            f"the training split has {len(clips.states)} clips of planning.goal_steps={num_steps} steps: a policy "
            f"needs {MIN_CLIPS}: add videos, or lower planning.goal_steps"
        )
    return clips


def fit_policy(policy: GoalConditionedPolicy, clips: GoalClips, seed: int, updates: int) -> None:
    """Fit a policy with fresh weights.

    No clips are held out to stop earlier: where their loss rises, success still does too (docs/experiments.md).
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in policy.net:
        if isinstance(layer, nn.Linear):
            drawn = torch.empty(layer.weight.shape)  # on the CPU, as the generator is
            nn.init.kaiming_uniform_(drawn, math.sqrt(5), generator=generator)
            layer.weight.data.copy_(drawn)
            nn.init.zeros_(layer.bias)
    policy.standardise(clips.states, clips.goals)
    optimizer = torch.optim.AdamW(policy.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for step in tqdm(range(updates), desc="fitting the policy", unit="step"):
        set_lr(optimizer, learning_rate(step, LEARNING_RATE, WARMUP_STEPS, updates))
        loss = policy.loss(*draw_examples(clips, BATCH, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def draw_examples(clips: GoalClips, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw states [B, D + P], goals [B, D] that were reached later in the same clip, and actions [B, A].

    The step is uniform in its clip, and the goal is uniform over the later segments.
    """
    num_steps = clips.actions.shape[1]
    clip = torch.randint(len(clips.states), (count,), generator=generator)
    start = torch.randint(num_steps, (count,), generator=generator)
    later = 1 + (torch.rand(count, generator=generator) * (num_steps - start)).long()
    return clips.states[clip, start], clips.goals[clip, start + later], clips.actions[clip, start]


# -------------------------------------------------------------------------------------------------------------- file


def save_policy(run: str | Path, policy: GoalConditionedPolicy, settings: Mapping[str, object]) -> None:
    """Write a policy and what it was fitted to into a run folder. Raises UserError if it cannot be written."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in policy.state_dict().items()}
    path = RunFolder(run).goal_policy
    try:
        write_bytes(path, serialise(tensors, _described(policy, settings)))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def load_policy(run: str | Path, policy: GoalConditionedPolicy, settings: Mapping[str, object]) -> bool:
    """Load the weights of the policy in a run folder; False if there is none for these settings, or it is damaged."""
    path = RunFolder(run).goal_policy
    if not path.exists():
        return False
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            if file.metadata() != _described(policy, settings):
                return False
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            return False
        policy.load_state_dict(tensors)
    except (OSError, SafetensorError, RuntimeError):
        return False
    return True


def _described(policy: GoalConditionedPolicy, settings: Mapping[str, object]) -> dict[str, str]:
    sizes = {name: list(tensor.shape) for name, tensor in policy.state_dict().items()}
    facts = {**settings, "action_set": policy.action_set, "block": policy.block, "sizes": sizes}
    return {"fitted_to": json.dumps(facts, sort_keys=True)}
