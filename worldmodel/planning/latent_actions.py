"""Latent actions: a decoder from actions to r, for a model that was trained on video alone.

A passive model explains each transition by an inferred r. From a few labelled transitions a small network learns the r
of an action, g(f(x), a), while the model stays frozen. Plans can then be imagined with the model.

Legend: N transitions, A numbers of an action, D embedding dimensions, Z numbers of scene code and history, R latent
dimensions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipelines.errors import UserError
from worldmodel.data import labelled_actions
from worldmodel.evaluation.embed import embed_batches
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
    """g(f(x), a), the r of an action: states [N, D + Z] and actions [N, A] -> [N, R]."""

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
    """Fit a decoder to `num_transitions` labelled transitions of the training split.

    It minimises the squared error between t(f(x), g(f(x), a)) and the target's embedding. The weights with the smallest
    error on a held-out tenth of the transitions are kept.

    Raises:
        UserError: the run is not a passive run with a latent, or the videos lack the label or have too few transitions.
    """
    if run.model.action_dim or not run.model.latent.latent_dim:
        raise UserError(
            f"labelled transitions are for a passive run with a latent, which {run.folder} is not: leave labels out"
        )
    if num_transitions < MIN_TRANSITIONS:
        raise UserError(f"labels={num_transitions}: at least {MIN_TRANSITIONS} transitions are needed")
    state, action, target = labelled_transitions(run, num_transitions)
    if len(state) < num_transitions:
        raise UserError(f"labels={num_transitions}: the training split has {len(state)} transitions")
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
    """Return the mean squared error of the embeddings that actions lead to, a scalar.

    state [N, D + Z], action [N, A], target [N, D].
    """
    return F.mse_loss(model.embedding_of(model.edit(state, decoder(state, action))), target)


@torch.no_grad()
def labelled_transitions(run: TrainedRun, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return transitions spread over the training split.

    Returns: states [N, D + Z], actions [N, A] and target embeddings [N, D].
    """
    layout = run.networks.layout
    parts = []
    for embedded in embed_batches(run.networks, run.source.evaluation_batches("train", count), steps=1):
        action = labelled_actions(embedded.batch, layout, 1)[:, 0].to(run.device)
        parts.append((embedded.state, action, embedded.targets(1)[:, 0]))
    state, actions, target = (torch.cat(part) for part in zip(*parts, strict=True))
    return state, actions, target
