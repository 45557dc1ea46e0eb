"""Forecasts of held-out clips in the space of targets: the model's sampled futures, controls and baselines.

Legend: Q queries, S samples, D embedding dimensions, Z numbers of scene code and history, A numbers of an action.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from einops import repeat
from torch import Tensor
from tqdm.auto import tqdm

from data_pipelines.worlds.law import Law
from worldmodel.evaluation.baselines import MAX_MOMENTS, LinearGaussian, moments_for, other_clips, training_clips
from worldmodel.evaluation.embed import EmbeddedSplit, Networks
from worldmodel.nets.parallel import global_batch
from worldmodel.nets.world_model import WorldModel

ROLLOUT_BATCH = 512
# The encode-decode oracle renders and encodes every future. Its score is unbiased for any number of them.
ENCODE_DECODE_SAMPLES = 16


@dataclass(frozen=True)
class ForecastClips:
    """The law of the queries, if it is known; the queries; and the clips on which readouts and baselines are fitted.

    `fit` are training clips with one later segment, and the strength of a fit is chosen on `selection`. Fits of whole
    forecasts are chosen on `selection_futures`, which have the horizon of the queries.
    """

    law: Law | None
    queries: EmbeddedSplit
    fit: EmbeddedSplit
    selection: EmbeddedSplit
    selection_futures: EmbeddedSplit


def all_forecasts(
    networks: Networks, clips: ForecastClips, num_samples: int, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the samples [Q, S, horizon, D] of each forecast, one at a time because they are large.

    `num_samples` is S of the model's futures.
    """
    model, device, law, queries = networks.model, networks.device, clips.law, clips.queries
    yield "model", roll_out(networks, queries.state, queries.actions, num_samples, generator)
    if model.latent.latent_dim:
        yield "shuffled_r", roll_out(networks, queries.state, queries.actions, num_samples, generator, shuffle=True)
        state, actions = queries.state.to(device), queries.actions.to(device)
        yield "prior_mean", model.prior_mean_rollout(state, queries.horizon, actions)[:, None].cpu()
    yield "persistence", repeat(queries.persistence, "q d -> q 1 h d", h=queries.horizon)
    yield "climatology", climatology(queries, generator)
    if law:
        yield "encode_decode_oracle", encode_decode(networks, law, queries, generator)
    yield "training_climatology", training_climatology(clips.fit, queries, moments_for(num_samples), generator)
    yield (
        "linear_gaussian",
        linear_gaussian(clips).roll_out(queries.persistence, queries.actions, MAX_MOMENTS, generator),
    )


def num_forecasts(law: Law | None) -> int:
    """Return the largest number of forecasts that `all_forecasts` yields."""
    return 7 + (law is not None)


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
    for rows in _chunks(len(state)):
        taken = actions[rows].to(device)
        futures = model.rollout_embedding(
            state[rows].to(device), horizon, num_samples, on_device, actions=taken, shuffle=shuffle
        )
        chunks.append(futures.cpu())
    return torch.cat(chunks)


def _chunks(count: int) -> Iterator[slice]:
    """Yield the rows of chunks of at most ROLLOUT_BATCH clips; the last is not a single one, which has no other r."""
    start = 0
    while start < count:
        stop = min(start + ROLLOUT_BATCH, count)
        if stop == count - 1 and stop - start > 2:
            stop -= 1
        yield slice(start, stop)
        start = stop


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
    return queries.targets[other_clips(queries.places, generator)]


def training_climatology(
    fit: EmbeddedSplit, queries: EmbeddedSplit, num_moments: int, generator: torch.Generator
) -> Tensor:
    """Return targets of training clips for each query, drawn anew at each step: [Q, num_moments, horizon, D]."""
    steps = [training_clips(fit.places, queries.places, num_moments, generator) for _ in range(queries.horizon)]
    return fit.targets[torch.stack(steps, dim=2), 0]


def linear_gaussian(clips: ForecastClips) -> LinearGaussian:
    """Fit the linear-Gaussian forecast to training clips, and choose it on selection clips."""
    fit, selection = clips.fit, clips.selection_futures
    context = torch.cat([fit.persistence, fit.actions[:, 0]], dim=1)
    return LinearGaussian.fitted(
        context, fit.targets[:, 0], selection.persistence, selection.actions, selection.targets
    )


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
