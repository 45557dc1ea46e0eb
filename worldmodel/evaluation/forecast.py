"""The Energy Score protocol: sampled futures of held-out clips, scored as a probability forecast beside controls.

A ridge readout from embeddings of real target segments to the velocity in them is fitted on training identities and its
regularisation chosen on selection identities, never on forecasts. Forecasts of test identities are then read through it
and scored against fresh draws of the true law. Where no law is known, forecasts are scored in embedding space.

Legend: N clips, Q queries, S sampled futures, M draws of the law, D embedding dimensions.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from data_pipelines.errors import UserError
from data_pipelines.sources.moving_mnist import (
    MovingMnistLaw,
    Split,
    centroid_velocity,
    last_context_centre,
)
from data_pipelines.transforms import to_float
from worldmodel.config import Config
from worldmodel.data import evaluation_batches, known_law, oracle_r, segments_of
from worldmodel.evaluation.probes import fit_mlp
from worldmodel.evaluation.readout import Readout, choose_readout, fit_ridge
from worldmodel.evaluation.report import ForecastExamples
from worldmodel.model import WorldModel
from worldmodel.scores import (
    effective_rank,
    energy_score,
    interval_coverage,
    interval_width,
    r_squared,
)

INTERVAL_LEVEL = 0.9
ENCODE_BATCH = 512
BANK_CLIPS = 512
NUM_EXAMPLES = 6
NUM_NEIGHBOURS = 4
DEVELOPMENT_FIT_CLIPS = 2048
DEVELOPMENT_QUERIES = 256


@dataclass(frozen=True)
class EmbeddedClips:
    """Clips of one split after the encoders. All on the CPU.

    context [N, D] is the student's embedding of x; persistence and target [N, D] are those of x and x+ in the space of
    targets, prior_mean [N, D] is the forecast of x+ at the prior's mean; r [N, R] is inferred as in training, at a
    penalty [N] that is None where none is paid. frames holds pixels of the first clips, uint8 [<= N, T, C, H, W].
    centroid_velocity [N, 2] px/frame is what the pixels of x show, where the law is known.
    """

    context: Tensor
    persistence: Tensor
    target: Tensor
    prior_mean: Tensor
    r: Tensor
    penalty: Tensor | None
    clip_id: Tensor
    labels: dict[str, Tensor]
    frames: Tensor
    centroid_velocity: Tensor | None

    def __len__(self) -> int:
        return len(self.context)


@dataclass(frozen=True)
class Evaluation:
    """metrics is what metrics.json holds; examples is what the report draws."""

    metrics: dict[str, Any]
    examples: ForecastExamples


def evaluate_forecasts(
    config: Config, student: WorldModel, target_encoder: nn.Module, device: torch.device
) -> Evaluation:
    """Score a trained model on the test split, by the known law where there is one, and in embedding space always.

    Raises:
        UserError: a split has too few clips.
    """
    sizes = config.evaluation
    law = known_law(config)
    with frozen(student, target_encoder):
        queries = embed_clips(config, student, target_encoder, "test", sizes.queries, device, frames=NUM_EXAMPLES)
        selection = embed_clips(
            config, student, target_encoder, "selection", sizes.selection_clips, device, frames=BANK_CLIPS
        )
        generator = torch.Generator().manual_seed(sizes.seed)
        samples = sample_futures(student, queries.context, sizes.num_samples, generator, device)
        embedding = embedding_scores(queries, samples, generator)
        metrics: dict[str, Any] = {
            "seed": config.seed,
            "queries": len(queries),
            "queries_sha256": _queries_hash(queries),
            "num_samples": samples.shape[1],
            **mean_penalty(student, queries.penalty),
            "embedding": embedding,
        }
        examples = _examples(config, queries, selection, samples)
        if law is None:
            metrics |= {"space": "embedding", "forecasts": embedding["forecasts"]}
            return Evaluation(metrics, examples)
        fit = embed_clips(config, student, target_encoder, "train", sizes.fit_clips, device)
        readout = choose_readout(
            fit.target, fit.labels["velocity_after"], selection.target, selection.labels["velocity_after"]
        )
        draws = law.sample(queries.labels, sizes.law_samples, generator)
        velocities = readout(samples)
        forecasts = {
            "model": velocities,
            "prior_mean": readout(queries.prior_mean)[:, None],
            "persistence": readout(queries.persistence)[:, None],
            "encode_decode_oracle": _encode_decode(
                law, queries, readout, target_encoder, sizes.num_samples, generator, device
            ),
            "simulator_oracle": law.sample(queries.labels, sizes.num_samples, generator),
        }
        if queries.centroid_velocity is not None:
            forecasts["pixel_constant_velocity"] = queries.centroid_velocity[:, None]
    oracle = float(energy_score(forecasts["simulator_oracle"], draws).mean())
    limit = readout.standardised_norm(fit.target).quantile(0.99)
    metrics |= {
        "space": "velocity, px/frame",
        "forecasts": {name: velocity_scores(values, draws, oracle) for name, values in forecasts.items()},
        "beyond_fit_norm_99": float((readout.standardised_norm(samples) > limit).float().mean()),
        "readout": {
            "strength": readout.strength,
            "velocity_after_r2": r_squared(readout(queries.target), queries.labels["velocity_after"]),
        },
        "probes": _probes(fit, selection, queries),
    }
    return Evaluation(metrics, _with_velocities(examples, queries, velocities, draws))


def development_scores(
    config: Config, student: WorldModel, target_encoder: nn.Module, device: torch.device
) -> dict[str, float]:
    """A quick score on selection identities, for choosing checkpoints and for learning curves.

    relative_energy_score is the Energy Score over that of the true law, or, where no law is known, over that of
    climatology (other clips' targets) in embedding space. Lower is better.
    """
    sizes = config.evaluation
    law = known_law(config)
    num_queries = min(DEVELOPMENT_QUERIES, sizes.selection_clips)
    with frozen(student, target_encoder):
        queries = embed_clips(config, student, target_encoder, "selection", num_queries, device, progress=False)
        generator = torch.Generator().manual_seed(sizes.seed)
        samples = sample_futures(student, queries.context, sizes.num_samples, generator, device)
        scores = {"effective_rank": effective_rank(queries.target), **mean_penalty(student, queries.penalty)}
        if law is None:
            forecasts = embedding_scores(queries, samples, generator)["forecasts"]
            score, reference = (forecasts[name]["energy_score"] for name in ("model", "climatology"))
        else:
            num_fit = min(DEVELOPMENT_FIT_CLIPS, sizes.fit_clips)
            fit = embed_clips(config, student, target_encoder, "train", num_fit, device, progress=False)
            readout = fit_ridge(fit.target, fit.labels["velocity_after"], strength=1.0)
            draws = law.sample(queries.labels, sizes.law_samples, generator)
            truth = law.sample(queries.labels, sizes.num_samples, generator)
            score = float(energy_score(readout(samples), draws).mean())
            reference = float(energy_score(truth, draws).mean())
    return scores | {"energy_score": score, "relative_energy_score": score / max(reference, 1e-9)}


# ----------------------------------------------------------------------------------------------------- forecasts


def embed_clips(
    config: Config,
    student: WorldModel,
    target_encoder: nn.Module,
    split: Split,
    num_clips: int,
    device: torch.device,
    *,
    frames: int = 0,
    progress: bool = True,
) -> EmbeddedClips:
    """Encode the first clips of a split, keeping the pixels of the first `frames` of them."""
    parts: dict[str, list[Tensor]] = {
        name: []
        for name in (
            *("context", "persistence", "target", "prior_mean", "r", "penalty"),
            *("clip_id", "frames", "centroid_velocity"),
        )
    }
    labels: dict[str, list[Tensor]] = {}
    has_law = known_law(config) is not None
    generator = torch.Generator(device).manual_seed(config.evaluation.seed)
    batches = tqdm(
        evaluation_batches(config, split, num_clips),
        desc=f"encoding {split}",
        unit="batch",
        disable=not progress,
    )
    kept = 0
    for batch in batches:
        segments = segments_of(batch, config.data.num_segments, device)
        context = student.encode(segments.x)
        inference = student.infer(context, segments, oracle_r(batch, config, device), generator)
        parts["context"].append(context.cpu())
        parts["prior_mean"].append(student.prior_mean_forecast(context).cpu())
        parts["r"].append(inference.r.cpu())
        if inference.penalty is not None:
            parts["penalty"].append(inference.penalty.cpu())
        parts["persistence"].append(target_encoder(segments.x).cpu())
        parts["target"].append(target_encoder(segments.target).cpu())
        parts["clip_id"].append(batch["clip_id"])
        if kept < frames:
            video = batch["video"][: frames - kept]
            parts["frames"].append((to_float(video) * 255).round().byte())
            kept += len(video)
        if has_law:
            parts["centroid_velocity"].append(centroid_velocity(segments.x).cpu())
        for name, values in batch["labels"].items():
            labels.setdefault(name, []).append(values)
    if sum(len(part) for part in parts["context"]) < 2:
        raise UserError(
            f"the {split} split of {config.data.root} has fewer than 2 clips: add videos or lower data.clip_step"
        )
    whole = {name: torch.cat(values) for name, values in parts.items() if values}
    return EmbeddedClips(
        context=whole["context"],
        persistence=whole["persistence"],
        target=whole["target"],
        prior_mean=whole["prior_mean"],
        r=whole["r"],
        penalty=whole.get("penalty"),
        clip_id=whole["clip_id"],
        labels={name: torch.cat(values) for name, values in labels.items()},
        frames=whole.get("frames", torch.empty(0)),
        centroid_velocity=whole.get("centroid_velocity"),
    )


def sample_futures(
    student: WorldModel, context: Tensor, num_samples: int, generator: torch.Generator, device: torch.device
) -> Tensor:
    """One-step futures: context [Q, D] -> [Q, S, D] on the CPU; S is 1 for a model without a latent."""
    if student.latent is None:
        num_samples = 1
    on_device = _generator_on(device, generator)
    chunks = [
        student.rollout_embedding(chunk.to(device), 1, num_samples, on_device)[:, :, 0].cpu()
        for chunk in context.split(ENCODE_BATCH)
    ]
    return torch.cat(chunks)


def velocity_scores(forecast: Tensor, draws: Tensor, oracle: float) -> dict[str, Any]:
    """Scores of velocities: forecast [Q, S, 2], draws of the law [Q, M, 2], oracle's Energy Score in px/frame."""
    score = float(energy_score(forecast, draws).mean())
    spread = forecast.shape[1] > 1
    return {
        "energy_score": score,
        "ratio_to_oracle": score / oracle,
        "coverage_90": interval_coverage(forecast, draws, INTERVAL_LEVEL).tolist() if spread else None,
        "width_90": interval_width(forecast, INTERVAL_LEVEL).tolist() if spread else None,
    }


def embedding_scores(queries: EmbeddedClips, samples: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Scores in embedding space against the one future that came: samples [Q, S, D]."""
    num_others = min(samples.shape[1] if samples.shape[1] > 1 else 64, len(queries) - 1)
    shift = 1 + torch.randint(len(queries) - 1, (len(queries), num_others), generator=generator)
    others = (torch.arange(len(queries))[:, None] + shift) % len(queries)
    forecasts = {
        "model": samples,
        "prior_mean": queries.prior_mean[:, None],
        "persistence": queries.persistence[:, None],
        "climatology": queries.target[others],
    }
    observed = queries.target[:, None]
    return {
        "forecasts": {
            name: {"energy_score": float(energy_score(values, observed).mean())} for name, values in forecasts.items()
        },
        "effective_rank": effective_rank(queries.target),
        "std": float(queries.target.std(dim=0).mean()),
    }


def _generator_on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """A generator on `device` that the next number of a CPU generator seeds."""
    return torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))


def mean_penalty(student: WorldModel, penalty: Tensor | None) -> dict[str, float]:
    """The mean of what the latent paid [N], by its name, such as {"kl_nats": 1.5}; nothing where it pays nothing."""
    if penalty is None:
        return {}
    assert student.latent is not None and student.latent.penalty_name is not None
    return {student.latent.penalty_name: float(penalty.mean())}


def _encode_decode(
    law: MovingMnistLaw,
    queries: EmbeddedClips,
    readout: Readout,
    target_encoder: nn.Module,
    num_samples: int,
    generator: torch.Generator,
    device: torch.device,
) -> Tensor:
    """True futures rendered, encoded and read: what a perfect forecaster in this embedding would score. [Q, S, 2]"""
    futures = law.sample(queries.labels, num_samples, generator)
    per_chunk = max(1, ENCODE_BATCH // num_samples)
    read = []
    for start in tqdm(range(0, len(queries), per_chunk), desc="encode-decode oracle", unit="batch"):
        rows = slice(start, start + per_chunk)
        labels = {name: values[rows] for name, values in queries.labels.items()}
        embeddings = target_encoder(law.render_targets(labels, futures[rows]).to(device)).cpu()
        read.append(readout(embeddings).unflatten(0, (-1, num_samples)))
    return torch.cat(read)


# -------------------------------------------------------------------------------------------------------- probes


def _probes(fit: EmbeddedClips, selection: EmbeddedClips, queries: EmbeddedClips) -> dict[str, Any]:
    """What can be read off frozen embeddings of held-out clips.

    From the context, linearly: accuracy of the digit, R^2 of the velocity. From what stands for the future (context and
    r, or the one prediction of a model without a latent): R^2 of the change of velocity, by a linear and an MLP probe.
    """

    def linear(inputs: Callable[[EmbeddedClips], Tensor], outputs: Callable[[EmbeddedClips], Tensor]) -> Tensor:
        readout = choose_readout(inputs(fit), outputs(fit), inputs(selection), outputs(selection))
        return readout(inputs(queries))

    def context(clips: EmbeddedClips) -> Tensor:
        return clips.context

    def future(clips: EmbeddedClips) -> Tensor:
        return torch.cat([clips.context, clips.r], dim=1) if clips.r.shape[1] else clips.prior_mean

    def change(clips: EmbeddedClips) -> Tensor:
        return clips.labels["velocity_after"] - clips.labels["velocity"]

    digit = linear(context, lambda clips: F.one_hot(clips.labels["digit"].long(), 10).float())
    velocity = linear(context, lambda clips: clips.labels["velocity"])
    truth = change(queries)
    return {
        "digit_accuracy": float((digit.argmax(dim=1) == queries.labels["digit"]).float().mean()),
        "velocity_r2": r_squared(velocity, queries.labels["velocity"]),
        "velocity_change_r2": {
            "linear": r_squared(linear(future, change), truth),
            "mlp": r_squared(fit_mlp(future(fit), change(fit))(future(queries)), truth),
        },
    }


# ------------------------------------------------------------------------------------------------------ pictures


def _examples(config: Config, queries: EmbeddedClips, bank: EmbeddedClips, samples: Tensor) -> ForecastExamples:
    """Queries to draw, each with the real target segments of the bank nearest to its first sampled futures."""
    count = len(queries.frames)
    num_frames = config.data.num_frames
    shown = samples[:count, :NUM_NEIGHBOURS]
    bank_targets = bank.target[: len(bank.frames)]
    nearest = torch.cdist(shown, bank_targets[None].expand(count, -1, -1)).argmin(dim=-1)
    return ForecastExamples(
        frames=queries.frames.numpy(),
        num_frames=num_frames,
        velocity_samples=None,
        velocity_law=None,
        velocity_true=None,
        last_centre=None,
        neighbours=bank.frames[nearest][:, :, num_frames : 2 * num_frames].numpy(),
    )


def _with_velocities(
    examples: ForecastExamples, queries: EmbeddedClips, velocities: Tensor, draws: Tensor
) -> ForecastExamples:
    count = len(examples.frames)
    return ForecastExamples(
        frames=examples.frames,
        num_frames=examples.num_frames,
        velocity_samples=velocities[:count].numpy(),
        velocity_law=draws[:count].numpy(),
        velocity_true=queries.labels["velocity_after"][:count].numpy(),
        last_centre=last_context_centre(queries.labels)[:count].numpy(),
        neighbours=examples.neighbours,
    )


def _queries_hash(queries: EmbeddedClips) -> str:
    """Two evaluations with the same hash scored the same clips."""
    digest = hashlib.sha256(queries.clip_id.numpy().tobytes())
    for name in sorted(queries.labels):
        digest.update(queries.labels[name].numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; modes restored after."""
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)
