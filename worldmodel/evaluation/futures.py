"""Forecasts of held-out clips in the space of targets: the model's sampled futures, controls and baselines.

Legend: Q queries, S samples, D embedding dimensions, Z numbers of a scene code, A numbers of an action.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from einops import repeat
from torch import Tensor
from tqdm.auto import tqdm

from data_pipelines.worlds.law import Law
from worldmodel.evaluation.embed import EmbeddedSplit, Networks
from worldmodel.nets.parallel import global_batch
from worldmodel.nets.world_model import WorldModel

ROLLOUT_BATCH = 512
MAX_CLIMATOLOGY = 64
# The encode-decode oracle renders and encodes every future. Its score is unbiased for any number of them.
ENCODE_DECODE_SAMPLES = 16


def all_forecasts(
    networks: Networks, law: Law | None, queries: EmbeddedSplit, num_samples: int, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the samples [Q, S, horizon, D] of each forecast, one at a time because they are large.

    `num_samples` is S of the model's futures.
    """
    model, device = networks.model, networks.device
    yield "model", roll_out(networks, queries.state, queries.actions, num_samples, generator)
    if model.latent.latent_dim:
        yield "shuffled_r", roll_out(networks, queries.state, queries.actions, num_samples, generator, shuffle=True)
        state, actions = queries.state.to(device), queries.actions.to(device)
        yield "prior_mean", model.prior_mean_rollout(state, queries.horizon, actions)[:, None].cpu()
    yield "persistence", repeat(queries.persistence, "q d -> q 1 h d", h=queries.horizon)
    yield "climatology", climatology(queries, generator)
    if law:
        yield "encode_decode_oracle", encode_decode(networks, law, queries, generator)


def num_forecasts(law: Law | None) -> int:
    """Return the largest number of forecasts that `all_forecasts` yields."""
    return 5 + (law is not None)


def num_futures(model: WorldModel, num_samples: int) -> int:
    """Return the number of futures to draw per query: one without a latent, otherwise `num_samples`."""
    return num_samples if model.latent.latent_dim else 1


def roll_out(
    networks: Networks,
    state: Tensor,
    actions: Tensor,
    num_samples: int,
    generator: torch.Generator,
    *,
    shuffle: bool = False,
) -> Tensor:
    """Draw futures from states [Q, D + Z] under actions [Q, horizon, A]: [Q, S, horizon, D] on the CPU.

    `shuffle` as in WorldModel.rollout_embedding.
    """
    model, device, horizon = networks.model, networks.device, actions.shape[1]
    on_device = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
    chunks = []
    for start in range(0, len(state), ROLLOUT_BATCH):
        rows = slice(start, start + ROLLOUT_BATCH)
        taken = actions[rows].to(device)
        futures = model.rollout_embedding(
            state[rows].to(device), horizon, num_samples, on_device, actions=taken, shuffle=shuffle
        )
        chunks.append(futures.cpu())
    return torch.cat(chunks)


def roll_out_share(
    networks: Networks, queries: EmbeddedSplit, rows: slice, num_samples: int, generator: torch.Generator
) -> Tensor:
    """Draw futures of one process's `rows` of at most ROLLOUT_BATCH queries.

    The random numbers are those that `roll_out` of all queries would use.
    """
    count = len(queries)
    samples = torch.arange(rows.start * num_samples, rows.stop * num_samples, device=networks.device)
    actions = queries.actions[rows]
    with global_batch(samples, count * num_samples) if rows.stop - rows.start < count else nullcontext():
        return roll_out(networks, queries.state[rows], actions, num_samples, generator)


def climatology(queries: EmbeddedSplit, generator: torch.Generator) -> Tensor:
    """Return targets of other queries at the same horizon step, [Q, S, horizon, D]."""
    count = len(queries)
    num_others = min(MAX_CLIMATOLOGY, count - 1)
    shift = 1 + torch.randint(count - 1, (count, num_others), generator=generator)
    return queries.targets[(torch.arange(count)[:, None] + shift) % count]


def encode_decode(networks: Networks, law: Law, queries: EmbeddedSplit, generator: torch.Generator) -> Tensor:
    """Render and encode true futures, the forecast of a perfect forecaster in this embedding: [Q, S, horizon, D]."""
    horizon = queries.horizon
    centres = law.sample(queries.labels, horizon, ENCODE_DECODE_SAMPLES, generator)
    per_chunk = max(1, 4 * ROLLOUT_BATCH // (ENCODE_DECODE_SAMPLES * horizon))
    encoded = []
    for start in tqdm(range(0, len(queries), per_chunk), desc="encode-decode oracle", unit="batch"):
        rows = slice(start, start + per_chunk)
        labels = {name: values[rows] for name, values in queries.labels.items()}
        video = law.render(labels, centres[rows]).flatten(0, 1).unflatten(1, (horizon, -1)).flatten(0, 1)
        embeddings = networks.target_encoder(video.to(networks.device)).cpu()
        encoded.append(embeddings.unflatten(0, (-1, ENCODE_DECODE_SAMPLES, horizon)))
    return torch.cat(encoded)
