"""How well frozen embeddings tell the factors of a causal world, in and out of the distribution of training.

Legend: N observations, D embedding dimensions, F factors.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_pipelines.worlds.causal import WIDER
from worldmodel.config import Config
from worldmodel.data import oracle_r, segments_of
from worldmodel.evaluation.forecast import frozen, mean_penalty
from worldmodel.evaluation.readout import Readout, choose_readout
from worldmodel.evaluation.scores import dci, r_squared
from worldmodel.nets.world_model import WorldModel
from worldmodel.sources import make_source

DEVELOPMENT_CLIPS = 2048


def evaluate_factors(config: Config, student: WorldModel, device: torch.device) -> dict[str, Any]:
    """Linear R^2 of the factors from the embedding of x, in distribution and out of it, and DCI.

    A ridge readout is fitted on `evaluation.fit_clips` fresh observations, its strength chosen on `selection_clips`
    others, and scored on `queries` more: from the distribution of training, and from a box WIDER times as wide.
    """
    sizes = config.evaluation
    with frozen(student):
        generator = torch.Generator().manual_seed(sizes.seed)
        fit = _embed(config, student, sizes.fit_clips, generator, device)
        selection = _embed(config, student, sizes.selection_clips, generator, device)
        inside = _embed(config, student, sizes.queries, generator, device)
        outside = _embed(config, student, sizes.queries, generator, device, width=WIDER)
    readout = choose_readout(fit.embedding, fit.factors, selection.embedding, selection.factors)
    disentanglement, completeness = dci(tree_importance(fit.embedding, fit.factors))
    return {
        "seed": config.seed,
        "queries": sizes.queries,
        "space": "factors",
        "factors": {
            "in_distribution_r2": _score(readout, inside),
            "out_of_distribution_r2": _score(readout, outside),
        },
        "dci": {"disentanglement": disentanglement, "completeness": completeness},
        **mean_penalty(student, inside.penalty),
    }


def development_scores(config: Config, student: WorldModel, device: torch.device) -> dict[str, float]:
    """A quick score on fresh observations: R^2 of the factors in distribution."""
    with frozen(student):
        generator = torch.Generator().manual_seed(config.evaluation.seed + 1)
        fit = _embed(config, student, DEVELOPMENT_CLIPS, generator, device)
        held_out = _embed(config, student, DEVELOPMENT_CLIPS, generator, device)
    readout = choose_readout(fit.embedding, fit.factors, held_out.embedding, held_out.factors)
    return {"factors_r2": _score(readout, held_out)}


class _Embedded(NamedTuple):
    """Observations as embeddings of x [N, D], their factors [N, F], and what the latent paid [N], if it did."""

    embedding: Tensor
    factors: Tensor
    penalty: Tensor | None


def _embed(
    config: Config,
    student: WorldModel,
    count: int,
    generator: torch.Generator,
    device: torch.device,
    width: float = 1.0,
) -> _Embedded:
    world = make_source(config).factors
    assert world is not None, config.data.source
    batch = world.draw_batch(count, generator, width)
    segments = segments_of(batch, config.data.num_segments, device)
    state = student.observe(segments[:, 0])
    on_device = torch.Generator(device).manual_seed(config.evaluation.seed)
    penalty = student.infer(state, segments, oracle_r(batch, config, device), on_device).penalty
    return _Embedded(
        student.embedding_of(state).cpu(), batch["labels"]["factors"], None if penalty is None else penalty.cpu()
    )


def _score(readout: Readout, embedded: _Embedded) -> float:
    return r_squared(readout(embedded.embedding), embedded.factors)


def tree_importance(codes: Tensor, factors: Tensor) -> Tensor:
    """How much each dimension says of each factor, by random forests: [N, D], [N, F] -> [D, F], columns of sum 1."""
    from sklearn.ensemble import RandomForestRegressor

    forest = RandomForestRegressor(50, max_depth=10, random_state=0)
    columns = [forest.fit(codes.numpy(), factor.numpy()).feature_importances_ for factor in factors.T]
    return torch.stack([torch.from_numpy(column) for column in columns], dim=1)


def factors_table(metrics: dict[str, Any]) -> str:
    """The scores as a Markdown table."""
    rows = {
        "linear R² of the factors, in distribution": metrics["factors"]["in_distribution_r2"],
        "linear R² of the factors, out of distribution": metrics["factors"]["out_of_distribution_r2"],
        "DCI disentanglement": metrics["dci"]["disentanglement"],
        "DCI completeness": metrics["dci"]["completeness"],
    }
    return "\n".join(["| score | |", "|---|---:|", *(f"| {name} | {value:.3f} |" for name, value in rows.items())])
