"""Actions for a model that was trained on video alone: r as a latent action, and a decoder from actions to it.

A passive model explains each transition by an r that its posterior infers. From few labelled transitions a small
network learns which r an action amounts to, g(f(x), a), while the model stays as it is; with that it can be planned in.

Legend: N transitions, A numbers of an action, D embedding dimensions, Z numbers of a scene code, R latent
dimensions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipelines.errors import UserError
from worldmodel.data import labelled_actions, segments_of
from worldmodel.nets.world_model import WorldModel
from worldmodel.runs.trained_run import TrainedRun

HIDDEN_DIM = 128
STEPS = 1_500
BATCH = 256
LEARNING_RATE = 2e-3
CHECK_EVERY = 50
HELD_OUT_SHARE = 0.1
MIN_TRANSITIONS = 20


class ActionDecoder(nn.Module):
    """g(f(x), a): the r that an action amounts to, from states [N, D + Z] and actions [N, A] to [N, R]."""

    def __init__(self, state_dim: int, action_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.net = nn.Sequential(
            nn.Linear(state_dim + action_dim, HIDDEN_DIM), nn.ReLU(),
            nn.Linear(HIDDEN_DIM, HIDDEN_DIM), nn.ReLU(),
            nn.Linear(HIDDEN_DIM, latent_dim),
        )  # fmt: skip

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat([state, action], dim=-1))


def fit_action_decoder(run: TrainedRun, num_transitions: int, seed: int) -> ActionDecoder:
    """A decoder from `num_transitions` labelled transitions of the training split.

    It is fitted to where transitions lead: least squared error of t(f(x), g(f(x), a)) from the target's embedding; a
    tenth of the transitions, kept apart, says when to stop.

    Raises:
        UserError: the run is not a passive one with a latent, or the videos have no such label or too few transitions.
    """
    if run.model.action_dim or not run.model.latent.latent_dim:
        raise UserError(f"labels are for a passive run with a latent, and {run.folder} is not: leave --labels out")
    if num_transitions < MIN_TRANSITIONS:
        raise UserError(f"--labels {num_transitions}: at least {MIN_TRANSITIONS} transitions are needed")
    state, action, target = labelled_transitions(run, num_transitions)
    if len(state) < num_transitions:
        raise UserError(f"--labels {num_transitions}: the training split has {len(state)} transitions")
    torch.manual_seed(seed)
    decoder = ActionDecoder(state.shape[1], action.shape[1], run.model.latent.latent_dim).to(run.device)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(state), generator=generator)
    held_out, used = order.tensor_split([max(1, round(HELD_OUT_SHARE * len(order)))])
    optimizer = torch.optim.AdamW(decoder.parameters(), LEARNING_RATE, weight_decay=1e-2)
    run.model.requires_grad_(False)
    best, best_error = decoder.state_dict(), float("inf")
    for step in range(STEPS):
        rows = used[torch.randint(len(used), (min(BATCH, len(used)),), generator=generator)]
        loss = prediction_error(run.model, decoder, state[rows], action[rows], target[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % CHECK_EVERY == CHECK_EVERY - 1:
            with torch.no_grad():
                parts = (part[held_out] for part in (state, action, target))
                error = float(prediction_error(run.model, decoder, *parts))
            if error < best_error:
                best_error, best = error, {name: value.clone() for name, value in decoder.state_dict().items()}
    decoder.load_state_dict(best)
    return decoder.eval().requires_grad_(False)


def prediction_error(
    model: WorldModel, decoder: ActionDecoder, state: Tensor, action: Tensor, target: Tensor
) -> Tensor:
    """Mean squared error of the embeddings that actions lead to: state [N, D + Z], action [N, A], target [N, D] ->
    scalar."""
    return F.mse_loss(model.embedding_of(model.edit(state, decoder(state, action))), target)


@torch.no_grad()
def labelled_transitions(run: TrainedRun, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Transitions spread over the training split: states [N, D + Z], actions [N, A], embeddings of what came [N, D]."""
    parts = []
    for batch in run.source.evaluation_batches("train", count):
        segments = segments_of(batch, 2 if run.config.data.num_segments == 2 else 3, run.device)
        action = labelled_actions(batch, run.config, 1)[:, 0].to(run.device)
        parts.append((run.model.observe(segments[:, 0]), action, run.target_encoder(segments[:, 1])))
    state, actions, target = (torch.cat(part) for part in zip(*parts, strict=True))
    return state, actions, target
