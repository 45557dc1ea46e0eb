"""Scores of frozen embeddings for the factors of a causal world, in and out of the distribution of training.

Legend: N observations, D embedding dimensions, V factors, R latent dimensions.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_pipelines.worlds.causal import WIDER
from worldmodel.config import EvaluationConfig
from worldmodel.data import oracle_r
from worldmodel.evaluation.embed import Networks, embed_batches, frozen, mean_penalty
from worldmodel.evaluation.readout import Readout, choose_readout
from worldmodel.evaluation.scores import dci, r_squared
from worldmodel.runs.metrics import Dci, FactorScores, Metrics, value_at

DEVELOPMENT_CLIPS = 2048


def evaluate_factors(networks: Networks, config: EvaluationConfig) -> Metrics:
    """Score the embedding of x by linear R^2 of the factors, in and out of distribution, and by DCI.

    A ridge readout is fitted on `evaluation.fit_clips` fresh observations, and its strength is chosen on
    `selection_clips` others. It is scored on `queries` further observations from the distribution of training, and on
    as many from a box WIDER times as wide. DCI of r: the importance of its dimensions for the change of each factor.
    DCI needs two dimensions.
    """
    with frozen(networks.model):
        embed = partial(_embed, networks, seed=config.seed, generator=torch.Generator().manual_seed(config.seed))
        fit = embed(config.fit_clips)
        selection = embed(config.selection_clips)
        inside = embed(config.queries)
        outside = embed(config.queries, width=WIDER)
    readout = choose_readout(fit.embedding, fit.factors, selection.embedding, selection.factors)
    metrics = Metrics(
        queries=config.queries,
        space="factors",
        factors=FactorScores(
            in_distribution_r2=_score(readout, inside), out_of_distribution_r2=_score(readout, outside)
        ),
    )
    if fit.embedding.shape[1] > 1:
        metrics["dci"] = dci_by_forests(fit.embedding, fit.factors)
    if fit.r.shape[1] > 1:
        metrics["dci_of_r"] = dci_by_forests(fit.r, fit.change)
    metrics.update(mean_penalty(networks.model, inside.penalty))
    return metrics


def development_scores(networks: Networks, seed: int) -> dict[str, float]:
    """Score the embedding quickly on fresh observations: R^2 of the factors in distribution."""
    with frozen(networks.model):
        embed = partial(_embed, networks, seed=seed, generator=torch.Generator().manual_seed(seed + 1))
        fit, held_out = embed(DEVELOPMENT_CLIPS), embed(DEVELOPMENT_CLIPS)
    readout = choose_readout(fit.embedding, fit.factors, held_out.embedding, held_out.factors)
    return {"factors_r2": _score(readout, held_out)}


class _Observations(NamedTuple):
    """Embeddings of x [N, D], factors and their change [N, V], r [N, R] as inferred, and its penalty [N], if any."""

    embedding: Tensor
    factors: Tensor
    change: Tensor
    r: Tensor
    penalty: Tensor | None


def _embed(
    networks: Networks, count: int, *, seed: int, generator: torch.Generator, width: float = 1.0
) -> _Observations:
    """Embed `count` observations that the generator draws; `seed` is that of the draws of r."""
    layout, model, device = networks.layout, networks.model, networks.device
    world = networks.source.factors
    assert world is not None, "a source of factors"
    batch = world.draw_batch(count, generator, width)
    (embedded,) = embed_batches(networks, [batch], steps=1)
    on_device = torch.Generator(device).manual_seed(seed + 2)  # `generator` has the seed itself, or the next one
    known_r = oracle_r(batch, layout, device)
    inferred = model.infer(embedded.state, embedded.segments, known_r, on_device)
    return _Observations(
        model.embedding_of(embedded.state).cpu(),
        batch["labels"]["factors"],
        batch["labels"]["change"],
        inferred.r.float().cpu(),
        None if inferred.penalty is None else inferred.penalty.cpu(),
    )


def dci_by_forests(codes: Tensor, values: Tensor) -> Dci:
    """Score codes [N, D] for values [N, V], with the importance that random forests find. D and V are at least 2."""
    disentanglement, completeness = dci(tree_importance(codes, values))
    return Dci(disentanglement=disentanglement, completeness=completeness)


def _score(readout: Readout, observations: _Observations) -> float:
    return r_squared(readout(observations.embedding), observations.factors)


def tree_importance(codes: Tensor, factors: Tensor) -> Tensor:
    """Return the importance of each dimension for each factor by random forests: [N, D], [N, V] -> [D, V].

    Columns sum to 1.
    """
    from sklearn.ensemble import RandomForestRegressor

    forest = RandomForestRegressor(50, max_depth=10, random_state=0)
    columns = [forest.fit(codes.numpy(), factor.numpy()).feature_importances_ for factor in factors.T]
    return torch.stack([torch.from_numpy(column) for column in columns], dim=1)


def factors_table(metrics: Metrics) -> str:
    """Return the scores as a Markdown table."""
    rows: dict[str, Any] = {
        "linear R² of the factors, in distribution": value_at(metrics, "factors.in_distribution_r2"),
        "linear R² of the factors, out of distribution": value_at(metrics, "factors.out_of_distribution_r2"),
    }
    if "dci" in metrics:
        rows["DCI disentanglement"] = value_at(metrics, "dci.disentanglement")
        rows["DCI completeness"] = value_at(metrics, "dci.completeness")
    if "dci_of_r" in metrics:
        rows["DCI disentanglement of r, for the changes"] = value_at(metrics, "dci_of_r.disentanglement")
        rows["DCI completeness of r"] = value_at(metrics, "dci_of_r.completeness")
    return "\n".join(["| score | |", "|---|---:|", *(f"| {name} | {value:.3f} |" for name, value in rows.items())])
