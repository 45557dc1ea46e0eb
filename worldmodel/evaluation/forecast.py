"""The forecast protocol: sampled futures of held-out clips over a horizon, scored as a probability forecast.

Forecasts are always scored in embedding space. With a known law or a label they are also scored in physical space: a
ridge readout, fitted on training identities and chosen on selection identities, reads the quantity from embeddings.
Controls and baselines are scored alongside.

Legend: N clips, Q queries, S samples, M observed draws, D embedding dimensions, K dimensions of the quantity, L horizon
steps that are shown, P neighbours, T frames of a segment, C channels, H = W pixels.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from tqdm.auto import tqdm

from data_pipelines.stream import share_of_pass
from data_pipelines.worlds.law import Law, Quantity
from worldmodel.config import EvaluationConfig
from worldmodel.data import check_splits, evaluation_uses
from worldmodel.evaluation.embed import (
    ALONE,
    EmbeddedSplit,
    Networks,
    Share,
    concat_processes,
    embed_split,
    frozen,
    mean_penalty,
)
from worldmodel.evaluation.futures import (
    ForecastClips,
    all_forecasts,
    climatology,
    num_forecasts,
    num_futures,
    roll_out,
    roll_out_share,
)
from worldmodel.evaluation.illustrations import Illustrations, Latents, side_by_side
from worldmodel.evaluation.images import score_images
from worldmodel.evaluation.intervals import add_skill, interval_facts, resample
from worldmodel.evaluation.probes import probe_clips
from worldmodel.evaluation.quantity import (
    CLIMATOLOGIES,
    KnownTruth,
    ScoredQuantity,
    draw,
    fitted_readout,
    known_truth,
    quantity_of,
)
from worldmodel.evaluation.readout import Readout
from worldmodel.evaluation.recalibration import Recalibrated
from worldmodel.evaluation.scores import (
    effective_rank,
    energy_score,
    energy_scores,
    forecast_scores,
    retrieval_scores,
)
from worldmodel.runs.metrics import (
    Embedding,
    Forecasts,
    Metrics,
    QuantityFacts,
    ReadoutFacts,
    Recalibrations,
    Retrieval,
    RetrievalScores,
)

BANK_CLIPS = 512
MAX_FUTURES = 512
NUM_EXAMPLES = 6
NUM_NEIGHBOURS = 4
DEVELOPMENT_FIT_CLIPS = 2048
DEVELOPMENT_QUERIES = 256
DEVELOPMENT_STRENGTHS = (1.0,)


@dataclass(frozen=True)
class Evaluation:
    """Scores, arrays for the report, the readout of the quantity, and the recalibration in each space.

    readout and quantity are None without labels. recalibrated is empty without evaluation.recalibrate.
    """

    metrics: Metrics
    illustrations: Illustrations
    readout: Readout | None
    quantity: Quantity | None
    recalibrated: dict[str, Recalibrated]


def embed_forecast_clips(networks: Networks, config: EvaluationConfig) -> ForecastClips:
    """Embed the clips of the protocol."""
    law = networks.source.known_law("test", config.horizon)
    embed = partial(embed_split, networks, seed=config.seed)
    selection = embed("selection", config.selection_clips, num_framed=BANK_CLIPS)
    num_futures = min(MAX_FUTURES, config.selection_clips)
    return ForecastClips(
        law=law,
        queries=embed("test", config.queries, horizon=config.horizon, law=law, num_framed=NUM_EXAMPLES),
        fit=embed("train", config.fit_clips),
        selection=selection,
        selection_futures=selection if config.horizon == 1 else embed("selection", num_futures, horizon=config.horizon),
    )


def evaluate_forecasts(networks: Networks, config: EvaluationConfig) -> Evaluation:
    """Score a trained model on the test split: in physical space if there are labels, in embedding space always.

    Raises:
        UserError: a split has too few clips, or lacks the label evaluation.label.
    """
    layout, label = networks.layout, config.label
    uses = evaluation_uses(config.horizon, config.recalibrate)
    check_splits(networks.source, layout.labels | ({label} if label else set()), uses)
    num_samples = num_futures(networks.model, config.num_samples)
    with frozen(networks.model, networks.target_encoder):
        clips = embed_forecast_clips(networks, config)
        law, queries = clips.law, clips.queries
        generator = torch.Generator().manual_seed(config.seed)
        quantity, scored = None, None
        known = known_truth(law, label, layout.num_frames)
        if known:
            quantity = quantity_of(known, queries.labels)
            draws = {"law_samples": config.law_samples, "num_samples": config.num_samples}
            scored = ScoredQuantity.fitted(known, clips.fit, clips.selection, queries, generator, **draws)
        forecasts = tqdm(
            all_forecasts(networks, clips, num_samples, generator),
            desc="scoring forecasts",
            unit="forecast",
            total=num_forecasts(law),
        )
        found = _score_all(forecasts, queries, scored)
        recalibrated = {}
        if config.recalibrate:
            # The other forecasts are the same without it, and have other random numbers.
            apart = torch.Generator().manual_seed(config.seed + 1)
            recalibrated = fit_recalibrations(networks, config, clips.selection_futures, known, scored, apart)
            # With the same draws of climatology as that row, a weight of 1 has exactly its score.
            pooled = recalibrated["embedding"].fitted(found.samples, found.past, apart)
            _score_embedding("model_recalibrated", pooled, queries, found)
    resampling = resample(queries.places, torch.Generator().manual_seed(config.seed))
    add_skill(found.in_embedding, found.energy, resampling)
    metrics = _metrics(networks, queries, num_samples, found)
    metrics["intervals"] = interval_facts(resampling)
    if scored is None or quantity is None:
        metrics["space"], metrics["quantity"], metrics["forecasts"] = "embedding", None, found.in_embedding
    else:
        forecasts_of_quantity, energy = scored.scores(
            found.values, generator, recalibrated["quantity"].fitted if recalibrated else None
        )
        add_skill(forecasts_of_quantity, energy, resampling)
        _add_quantity(metrics, quantity, scored, found, forecasts_of_quantity)
        if not layout.of_images:
            metrics["probes"] = probe_clips(law, clips.fit, clips.selection, queries)
    if layout.of_images:
        metrics.update(score_images(clips.fit, clips.selection, queries))
    if recalibrated:
        metrics["recalibration"] = Recalibrations(
            embedding=recalibrated["embedding"].facts,
            quantity=recalibrated["quantity"].facts if "quantity" in recalibrated else None,
        )
    neighbours, steps = nearest_segments(clips.selection, found.shown, layout.num_frames)
    illustrations = Illustrations(
        frames=side_by_side(queries.frames, layout.num_cameras),
        num_frames=layout.num_frames,
        fans=scored.fans(found.values["model"], len(queries.frames)) if scored else None,
        neighbours=side_by_side(neighbours, layout.num_cameras),
        neighbour_steps=steps,
        latents=latents_to_draw(law, queries),
        timeline=None,
    )
    return Evaluation(metrics, illustrations, scored.readout if scored else None, quantity, recalibrated)


def fit_recalibrations(
    networks: Networks,
    config: EvaluationConfig,
    selection: EmbeddedSplit,
    known: KnownTruth | None,
    scored: ScoredQuantity | None,
    generator: torch.Generator,
) -> dict[str, Recalibrated]:
    """Fit the recalibration in embedding space, and in that of the quantity, to selection clips alone.

    The climatology is that of at most MAX_FUTURES training clips. All clips have the whole horizon.
    """
    num_past = min(MAX_FUTURES, config.fit_clips)
    past = embed_split(networks, "train", num_past, seed=config.seed, horizon=config.horizon)
    num_samples = num_futures(networks.model, config.num_samples)
    samples = roll_out(networks, selection.state, selection.actions, num_samples, generator)
    num_blocks = resample(selection.places, generator, 1).num_blocks
    parts = {"embedding": (samples, selection.targets, past.targets)}
    if scored and known:
        values = [known.truth(clips.labels, config.horizon) for clips in (selection, past)]
        parts["quantity"] = (scored.readout(samples), values[0], values[1])
    return {
        space: Recalibrated.fit(forecast, observed, selection.places, futures, past.places, num_blocks, generator)
        for space, (forecast, observed, futures) in parts.items()
    }


@dataclass
class _Found:
    """Scores of all forecasts in embedding space; values [Q, S, horizon, K] of the quantity by forecast.

    energy [Q, horizon] are the Energy Scores of each query in embedding space, by forecast. samples [Q, S, horizon, D]
    are those of the model, past those of training climatology, shown [Q, P, horizon, D] some of the model for the first
    queries. beyond_fit is empty without a quantity.
    """

    in_embedding: Forecasts
    energy: dict[str, Tensor]
    retrievals: dict[str, RetrievalScores]
    values: dict[str, Tensor]
    samples: Tensor
    past: Tensor
    shown: Tensor
    beyond_fit: list[float]


def _score_all(
    forecasts: Iterable[tuple[str, Tensor]], queries: EmbeddedSplit, scored: ScoredQuantity | None
) -> _Found:
    found = _Found({}, {}, {}, {}, torch.empty(0), torch.empty(0), torch.empty(0), [])
    for name, samples in forecasts:
        _score_embedding(name, samples, queries, found)
        if name == "model":
            found.samples = samples
            found.shown = samples[: len(queries.frames), :NUM_NEIGHBOURS].clone()
            found.beyond_fit = scored.beyond_fit(samples) if scored else []
        if name == "training_climatology":
            found.past = samples
        if scored and name not in CLIMATOLOGIES:
            found.values[name] = scored.readout(samples)
    return found


def _score_embedding(name: str, samples: Tensor, queries: EmbeddedSplit, found: _Found) -> None:
    targets = queries.targets[:, None]
    energy = found.energy[name] = energy_scores(samples, targets)
    found.in_embedding[name] = forecast_scores(samples, targets, energy=energy, mean_over_dimensions=True)
    found.retrievals[name] = retrieval_scores(samples, queries.targets)


def _metrics(networks: Networks, queries: EmbeddedSplit, num_samples: int, found: _Found) -> Metrics:
    """Return the part of metrics.json that needs no labels."""
    metrics = Metrics(
        queries=len(queries),
        queries_sha256=queries_hash(queries),
        num_samples=num_samples,
        horizon=queries.horizon,
        segment_frames=networks.layout.num_frames,
    )
    metrics.update(mean_penalty(networks.model, queries.penalty))
    metrics["embedding"] = Embedding(
        forecasts=found.in_embedding,
        retrieval=Retrieval(distractors=len(queries) - 1, forecasts=found.retrievals),
        effective_rank=effective_rank(queries.targets[:, 0]),
        std=float(queries.targets[:, 0].std(dim=0).mean()),
    )
    return metrics


def _add_quantity(
    metrics: Metrics, quantity: Quantity, scored: ScoredQuantity, found: _Found, forecasts: Forecasts
) -> None:
    metrics["space"] = f"{quantity.name}, {quantity.unit}" if quantity.unit else quantity.name
    metrics["quantity"] = QuantityFacts(name=quantity.name, unit=quantity.unit, dimensions=list(quantity.dimensions))
    metrics["forecasts"] = forecasts
    metrics["beyond_fit_norm_99"] = [*found.beyond_fit]
    metrics["readout"] = ReadoutFacts(strength=scored.readout.strength, r2=scored.readout_r2)


def development_scores(networks: Networks, config: EvaluationConfig, share: Share = ALONE) -> dict[str, float]:
    """Score a model quickly on selection identities, for learning curves and to choose checkpoints.

    relative_energy_score is the Energy Score divided by that of the true law. Without a known law it is divided by that
    of climatology, targets of other clips, in embedding space. Both are means over the horizon. Lower is better.

    All processes call it. Each decodes, encodes and forecasts its share of the clips, and all get the same scores.
    """
    law = networks.source.known_law("selection", config.horizon)
    with frozen(networks.model, networks.target_encoder):
        queries = selection_queries(networks, config, law, share)
        fit = None
        if law:
            num_fit = min(DEVELOPMENT_FIT_CLIPS, config.fit_clips)
            fit = embed_split(networks, "train", num_fit, seed=config.seed, progress=False, share=share)
        if len(queries) < share.world_size:
            share = ALONE  # each process forecasts all queries
        rows = share_of_pass(len(queries), share.rank, share.world_size)
        generator = torch.Generator().manual_seed(config.seed)
        num_samples = num_futures(networks.model, config.num_samples)
        samples = roll_out_share(networks, queries, rows, num_samples, generator)
        if law is None or fit is None:
            observed = queries.targets[rows, None]
            forecasts = samples, climatology(queries, generator)[rows]
        else:
            readout = fitted_readout(law, fit, queries, DEVELOPMENT_STRENGTHS)
            observed, truth = (
                draw(law, queries.labels, config.horizon, count, generator)[rows]
                for count in (config.law_samples, config.num_samples)
            )
            forecasts = readout(samples), truth
    score, reference = (mean_score(values, observed, share.world_size) for values in forecasts)
    return {
        "effective_rank": effective_rank(queries.targets[:, 0]),
        **mean_penalty(networks.model, queries.penalty),
        "energy_score": score,
        "relative_energy_score": score / max(reference, 1e-9),
    }


def selection_scorer(networks: Networks, config: EvaluationConfig) -> Callable[[], float]:
    """Return a function that scores the forecasts of selection clips by the networks as they are, in embedding space.

    It returns the geometric mean of the Energy Scores of the steps, in which far steps count no more than near ones.
    The clips are embedded once, when it is first called; the embedders must not change.
    """

    queries = cache(partial(selection_queries, networks, config))

    def score() -> float:
        with frozen(networks.model, networks.target_encoder):
            clips, generator = queries(), torch.Generator().manual_seed(config.seed)
            num_samples = num_futures(networks.model, config.num_samples)
            futures = roll_out(networks, clips.state, clips.actions, num_samples, generator)
            scores = energy_scores(futures, clips.targets[:, None]).mean(dim=0)
            return float(scores.clamp(min=1e-12).log().mean().exp())

    return score


def selection_queries(
    networks: Networks, config: EvaluationConfig, law: Law | None = None, share: Share = ALONE
) -> EmbeddedSplit:
    """Embed the selection clips that scores during training are of; `law` and `share` as for embed_split."""
    return embed_split(
        networks,
        "selection",
        min(DEVELOPMENT_QUERIES, config.selection_clips),
        seed=config.seed,
        horizon=config.horizon,
        law=law,
        progress=False,
        share=share,
    )


def mean_score(samples: Tensor, observed: Tensor, world_size: int = 1) -> float:
    """Return the mean Energy Score over the horizon and the queries of all processes.

    samples [Q, S, horizon, K], observed [Q, M, horizon, K].
    """
    steps = enumerate(zip(samples.unbind(2), observed.unbind(2), strict=True))
    scores = {str(step): [energy_score(forecast, truth)] for step, (forecast, truth) in steps}
    return float(torch.stack([step.mean() for step in concat_processes(scores, world_size).values()]).mean())


def queries_hash(queries: EmbeddedSplit) -> str:
    """Return a hash of the queries; two evaluations with the same hash scored the same clips."""
    digest = hashlib.sha256(queries.clip_id.numpy().tobytes())
    for name in sorted(queries.labels):
        digest.update(queries.labels[name].numpy().tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------- pictures


def nearest_segments(bank: EmbeddedSplit, samples: Tensor, num_frames: int) -> tuple[Tensor, tuple[int, ...]]:
    """Find the real target segments of the bank, of `num_frames`, nearest to sampled futures [Q, P, horizon, D].

    Returns: their frames [Q, L, P, T, C, H, W] at a few horizon steps, and these steps, counted from 1.
    """
    horizon = samples.shape[2]
    steps = tuple(sorted({1, (horizon + 1) // 2, horizon}))
    bank_targets = bank.targets[: len(bank.frames), 0]
    shown = samples[:, :, [step - 1 for step in steps]].transpose(1, 2)
    nearest = torch.cdist(shown, bank_targets.expand(*shown.shape[:2], -1, -1)).argmin(dim=-1)
    return bank.frames[nearest][:, :, :, num_frames : 2 * num_frames], steps


def latents_to_draw(law: Law | None, queries: EmbeddedSplit) -> Latents | None:
    """Return the inferred r of the queries, with the true change of velocity if the law knows it."""
    if not queries.r.shape[1]:
        return None
    targets = law.probe_targets(queries.labels) if law else {}
    if "velocity_change" not in targets:
        return Latents(queries.r.numpy(), None, "")
    return Latents(queries.r.numpy(), targets["velocity_change"].numpy(), "velocity change, px/frame")
