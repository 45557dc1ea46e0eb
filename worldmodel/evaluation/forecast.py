"""The forecast protocol: sampled futures of held-out clips over a horizon, scored as a probability forecast.

A ridge readout from embeddings of real target segments to a physical quantity is fitted on training identities and its
regularisation chosen on selection identities, never on forecasts. Rollouts from test identities are then read through
it and scored at each step of the horizon, against fresh draws of the true law where it is known and otherwise against
what came, beside controls. In embedding space forecasts are always scored, with or without labels.

Legend: N clips, Q queries, S sampled futures, M draws of the law, H horizon steps, F frames in a segment, D embedding
dimensions, K dimensions of the quantity.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from einops import repeat
from torch import Tensor, nn
from tqdm.auto import tqdm

from data_pipelines.errors import UserError
from data_pipelines.splits import Split
from data_pipelines.stream import share_of_pass
from data_pipelines.worlds.law import Law, Quantity
from worldmodel.config import Config, VideosConfig
from worldmodel.data import actions_of, check_splits, evaluation_uses, num_segments, oracle_r, segments_of
from worldmodel.evaluation.probes import Splits, probe_all
from worldmodel.evaluation.readout import Readout, choose_readout, fit_ridge
from worldmodel.evaluation.scores import effective_rank, energy_score, forecast_scores, r_squared, retrieval_scores
from worldmodel.nets.parallel import global_batch
from worldmodel.nets.world_model import WorldModel
from worldmodel.report.illustrations import Fans, Illustrations, Latents
from worldmodel.sources import make_source
from worldmodel.sources.source import EVALUATION_BATCH, Source

ENCODE_BATCH = 512
BANK_CLIPS = 512
NUM_EXAMPLES = 6
NUM_NEIGHBOURS = 4
MAX_CLIMATOLOGY = 64
# Every future of the encode-decode oracle is rendered and encoded; the score is unbiased at any number.
ENCODE_DECODE_SAMPLES = 16
MAX_CLASSES = 1024  # of a label that is probed for
DEVELOPMENT_FIT_CLIPS = 2048
DEVELOPMENT_QUERIES = 256


@dataclass(frozen=True)
class EmbeddedClips:
    """Clips of one split after the encoders. All on the CPU.

    state [N, D + Z] is what the student predicts from, its embedding of x and a scene code if it has one, and backbone
    [N, features] what its encoder made of x;
    persistence [N, D] and targets [N, H, D] are embeddings of x and of each later segment in the space of targets;
    r [N, R] is inferred as in training, at a penalty [N] that is None where none is paid. actions [N, H, A] are those
    that the model is conditioned on, None for a passive one. frames holds pixels of the
    first clips, uint8 [<= N, (1 + H) * F, C, H, W]. extrapolated [N, H, K] is where the motion seen in the pixels of x
    leads, None where no law is known.
    """

    state: Tensor
    backbone: Tensor
    persistence: Tensor
    targets: Tensor
    r: Tensor
    penalty: Tensor | None
    actions: Tensor | None
    clip_id: Tensor
    labels: dict[str, Tensor]
    frames: Tensor
    extrapolated: Tensor | None

    def __len__(self) -> int:
        return len(self.state)

    @property
    def embedding(self) -> Tensor:
        """The student's embedding of x, [N, D]."""
        return self.state[:, : self.targets.shape[-1]]


@dataclass(frozen=True)
class Evaluation:
    """metrics is what metrics.json holds, illustrations what the report draws; readout and quantity are None where
    there are no labels."""

    metrics: dict[str, Any]
    illustrations: Illustrations
    readout: Readout | None
    quantity: Quantity | None


def evaluate_forecasts(
    config: Config, student: WorldModel, target_encoder: nn.Module, device: torch.device
) -> Evaluation:
    """Score a trained model on the test split: in physical space where there are labels, in embedding space always.

    Raises:
        UserError: a split has too few clips, or no such label as evaluation.label.
    """
    source = make_source(config)
    check_splits(source, config, evaluation_uses(config))
    sizes = config.evaluation
    law = source.known_law("test", sizes.horizon)
    with frozen(student, target_encoder):

        def embed(split: Split, num_clips: int, horizon: int = 1, frames: int = 0) -> EmbeddedClips:
            return embed_clips(
                config, student, target_encoder, split, num_clips, device, source=source, horizon=horizon, frames=frames
            )

        queries = embed("test", sizes.queries, sizes.horizon, frames=NUM_EXAMPLES)
        selection = embed("selection", sizes.selection_clips, frames=BANK_CLIPS)
        fit = embed("train", sizes.fit_clips) if law or sizes.label else None
        generator = torch.Generator().manual_seed(sizes.seed)
        quantity = quantity_of(config, law, queries.labels)
        physical = Physical.fitted(config, law, fit, selection, queries, generator) if fit and quantity else None
        targets = queries.targets[:, None]
        retrievals, in_embedding, values = {}, {}, {}
        samples_shown = torch.empty(0)
        beyond: list[float] = []
        futures = _futures(config, law, student, target_encoder, queries, generator, device)
        for name, samples in tqdm(futures, desc="scoring forecasts", unit="forecast", total=5 + (law is not None)):
            in_embedding[name] = forecast_scores(samples, targets, mean_over_dimensions=True)
            retrievals[name] = retrieval_scores(samples, queries.targets)
            if name == "model":
                samples_shown = samples[: len(queries.frames), :NUM_NEIGHBOURS].clone()
                beyond = physical.beyond_fit(samples) if physical else []
            if physical and name != "climatology":
                values[name] = physical.readout(samples)
    metrics: dict[str, Any] = {
        "seed": config.seed,
        "queries": len(queries),
        "queries_sha256": _queries_hash(queries),
        "num_samples": num_futures(config, student),
        "horizon": sizes.horizon,
        "segment_frames": config.data.num_frames,
        **mean_penalty(student, queries.penalty),
        "embedding": {
            "forecasts": in_embedding,
            "retrieval": {"distractors": len(queries) - 1, "forecasts": retrievals},
            "effective_rank": effective_rank(queries.targets[:, 0]),
            "std": float(queries.targets[:, 0].std(dim=0).mean()),
        },
    }
    if physical is None or quantity is None or fit is None:
        metrics |= {"space": "embedding", "quantity": None, "forecasts": in_embedding}
    else:
        metrics |= {
            "space": f"{quantity.name}, {quantity.unit}" if quantity.unit else quantity.name,
            "quantity": {"name": quantity.name, "unit": quantity.unit, "dimensions": list(quantity.dimensions)},
            "forecasts": physical.scores(values),
            "beyond_fit_norm_99": beyond,
            "readout": {"strength": physical.readout.strength, "r2": physical.readout_r2},
            "probes": _probes(law, fit, selection, queries),
        }
    illustrations = Illustrations(
        frames=queries.frames.numpy(),
        num_frames=config.data.num_frames,
        fans=physical.fans(values["model"], len(queries.frames)) if physical else None,
        **_neighbours(config, selection, samples_shown),
        latents=_latents(law, quantity, queries),
        timeline=None,
    )
    return Evaluation(metrics, illustrations, physical.readout if physical else None, quantity)


def development_scores(
    config: Config,
    student: WorldModel,
    target_encoder: nn.Module,
    device: torch.device,
    *,
    source: Source,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, float]:
    """A quick score on selection identities, for choosing checkpoints and for learning curves.

    relative_energy_score is the Energy Score over that of the true law, or, where no law is known, over that of
    climatology (other clips' targets) in embedding space; both are means over the horizon. Lower is better.

    All `world_size` processes call it, each decodes, encodes and forecasts its share of the clips, and all get the
    same.
    """
    sizes = config.evaluation
    shared: dict[str, Any] = {"source": source, "progress": False, "rank": rank, "world_size": world_size}
    law = source.known_law("selection", sizes.horizon)
    num_queries = min(DEVELOPMENT_QUERIES, sizes.selection_clips)
    with frozen(student, target_encoder):
        queries = embed_clips(
            config, student, target_encoder, "selection", num_queries, device, horizon=sizes.horizon, **shared
        )
        num_fit = min(DEVELOPMENT_FIT_CLIPS, sizes.fit_clips)
        fit = embed_clips(config, student, target_encoder, "train", num_fit, device, **shared) if law else None
        if len(queries) < world_size:
            rank, world_size = 0, 1  # each forecasts all
        share = share_of_pass(len(queries), rank, world_size)
        generator = torch.Generator().manual_seed(sizes.seed)
        num_samples = num_futures(config, student)
        samples = _roll_out_share(student, queries, share, sizes.horizon, num_samples, generator, device)
        scores = {"effective_rank": effective_rank(queries.targets[:, 0]), **mean_penalty(student, queries.penalty)}
        if law is None or fit is None:
            observed = queries.targets[share, None]
            forecasts = samples, _climatology(queries, generator)[share]
        else:
            readout = fit_ridge(fit.targets[:, 0], law.truth(fit.labels, 1)[:, 0], strength=1.0)
            observed, truth = (
                _draw(law, queries.labels, sizes.horizon, count, generator)[share]
                for count in (sizes.law_samples, sizes.num_samples)
            )
            forecasts = readout(samples), truth
    score, reference = (mean_score(values, observed, world_size) for values in forecasts)
    return scores | {"energy_score": score, "relative_energy_score": score / max(reference, 1e-9)}


def mean_score(samples: Tensor, observed: Tensor, world_size: int = 1) -> float:
    """Energy Score, the mean over horizon and queries, those of all processes: [Q, S, H, K], [Q, M, H, K]."""
    steps = enumerate(zip(samples.unbind(2), observed.unbind(2), strict=True))
    scores = {str(step): [energy_score(forecast, truth)] for step, (forecast, truth) in steps}
    return float(torch.stack([step.mean() for step in _of_all_processes(scores, world_size).values()]).mean())


# --------------------------------------------------------------------------------------------------- embedded clips


def embed_clips(
    config: Config,
    student: WorldModel,
    target_encoder: nn.Module,
    split: Split,
    num_clips: int,
    device: torch.device,
    *,
    source: Source,
    horizon: int = 1,
    frames: int = 0,
    progress: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> EmbeddedClips:
    """Encode clips of a split with `horizon` segments to forecast, keeping the pixels of the first `frames` of them.

    With several processes, all call it; each decodes and encodes its share, and gets the clips of all of them.
    """
    parts: dict[str, list[Tensor]] = {}
    labels: dict[str, list[Tensor]] = {}

    def add(name: str, values: Tensor | None) -> None:
        if values is not None:
            parts.setdefault(name, []).append(values.cpu())

    law = source.known_law(split, config.evaluation.horizon)
    batches = tqdm(
        source.evaluation_batches(split, num_clips, horizon, rank=rank, world_size=world_size),
        desc=f"encoding {split}",
        unit="batch",
        disable=not progress,
    )
    kept = 0
    for batch in batches:
        segments = segments_of(batch, num_segments(config, horizon), device)
        backbone = student.embedder.features(segments[:, 0])
        shown = segments[:, : horizon + 1]
        add("state", student.state_of(backbone))
        add("backbone", backbone.float())
        add("seen", student.seen(segments))
        add("actions", actions_of(batch, config, horizon, device))
        add("known_r", oracle_r(batch, config, device))
        add("persistence", target_encoder(segments[:, 0]))
        add("targets", target_encoder(shown[:, 1:].flatten(0, 1)).unflatten(0, (-1, horizon)))
        add("clip_id", batch["clip_id"])
        if kept < frames:
            video = shown[: frames - kept].flatten(1, 2)
            add("frames", (video * 255).round().byte())
            kept += len(video)
        if law:
            add("extrapolated", law.extrapolate(segments[:, 0], horizon))
        for name, values in batch["labels"].items():
            labels.setdefault(name, []).append(values)
    whole, all_labels = (_of_all_processes(own, world_size) for own in (parts, labels))
    if len(whole.get("clip_id", ())) < 2:
        place = config.data.root if isinstance(config.data, VideosConfig) else config.data.source
        raise UserError(
            f"the {split} split of {place} has fewer than 2 clips of {num_segments(config, horizon)} "
            "segments: add videos, or lower data.clip_step or evaluation.horizon"
        )
    r, penalty = _infer(config, student, whole, device)
    return EmbeddedClips(
        state=whole["state"],
        backbone=whole["backbone"],
        persistence=whole["persistence"],
        targets=whole["targets"],
        r=r,
        penalty=penalty,
        actions=whole.get("actions"),
        clip_id=whole["clip_id"],
        labels=all_labels,
        frames=whole.get("frames", torch.empty(0))[:frames],
        extrapolated=whole.get("extrapolated"),
    )


def _of_all_processes(parts: dict[str, list[Tensor]], world_size: int) -> dict[str, Tensor]:
    """The parts of each name put together, process after process. One that had no clip has no names."""
    of_each = gather_object([parts]) if world_size > 1 else [parts]
    names = dict.fromkeys(name for part in of_each for name in part)
    return {name: torch.cat([values for part in of_each for values in part.get(name, [])]) for name in names}


def _infer(
    config: Config, student: WorldModel, clips: dict[str, Tensor], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """r [N, R] and its penalty [N], for all clips in order, so that a clip's random numbers are the same whichever
    process encoded it."""
    generator = torch.Generator(device).manual_seed(config.evaluation.seed)
    inferences = []
    for start in range(0, len(clips["state"]), EVALUATION_BATCH):
        rows = slice(start, start + EVALUATION_BATCH)
        state, seen, known_r, actions = (
            clips[name][rows].to(device) for name in ("state", "seen", "known_r", "actions")
        )
        inferences.append(student.infer_from(state, seen, known_r, generator, action=actions[:, 0]))
    penalties = [inference.penalty.cpu() for inference in inferences if inference.penalty is not None]
    return torch.cat([inference.r.cpu() for inference in inferences]), torch.cat(penalties) if penalties else None


def mean_penalty(student: WorldModel, penalty: Tensor | None) -> dict[str, float]:
    """The mean of what the latent paid [N], by its name, such as {"kl_nats": 1.5}; nothing where it pays nothing."""
    if penalty is None:
        return {}
    assert student.latent.penalty_name is not None
    return {student.latent.penalty_name: float(penalty.mean())}


# ----------------------------------------------------------------------------------------------------- forecasts


def _futures(
    config: Config,
    law: Law | None,
    student: WorldModel,
    target_encoder: nn.Module,
    queries: EmbeddedClips,
    generator: torch.Generator,
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """Forecasts in the space of targets by name, [Q, S, H, D] each, one after the other as they are large."""
    horizon, num_samples = config.evaluation.horizon, num_futures(config, student)
    yield "model", roll_out(student, queries, horizon, num_samples, generator, device)
    if student.latent.latent_dim:
        shuffled = roll_out(student, queries, horizon, num_samples, generator, device, shuffle=True)
        yield "shuffled_r", shuffled
        actions = None if queries.actions is None else queries.actions.to(device)
        yield "prior_mean", student.prior_mean_rollout(queries.state.to(device), horizon, actions)[:, None].cpu()
    yield "persistence", repeat(queries.persistence, "q d -> q 1 h d", h=horizon)
    yield "climatology", _climatology(queries, generator)
    if law:
        yield "encode_decode_oracle", _encode_decode(law, queries, target_encoder, horizon, generator, device)


def num_futures(config: Config, student: WorldModel) -> int:
    """Futures drawn for each query: without a latent there is one."""
    return config.evaluation.num_samples if student.latent.latent_dim else 1


def roll_out(
    student: WorldModel,
    queries: EmbeddedClips,
    horizon: int,
    num_samples: int,
    generator: torch.Generator,
    device: torch.device,
    *,
    shuffle: bool = False,
) -> Tensor:
    """Sampled futures of Q queries: [Q, S, H, D] on the CPU. `shuffle` as in WorldModel.rollout_embedding."""
    on_device = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
    chunks = []
    for start in range(0, len(queries), ENCODE_BATCH):
        rows = slice(start, start + ENCODE_BATCH)
        actions = None if queries.actions is None else queries.actions[rows].to(device)
        state = queries.state[rows].to(device)
        futures = student.rollout_embedding(state, horizon, num_samples, on_device, actions=actions, shuffle=shuffle)
        chunks.append(futures.cpu())
    return torch.cat(chunks)


def _roll_out_share(
    student: WorldModel,
    queries: EmbeddedClips,
    share: slice,
    horizon: int,
    num_samples: int,
    generator: torch.Generator,
    device: torch.device,
) -> Tensor:
    """What `roll_out` says of this process's share of at most ENCODE_BATCH queries, by the same random numbers."""
    count = len(queries)
    own = replace(
        queries, state=queries.state[share], actions=None if queries.actions is None else queries.actions[share]
    )
    rows = torch.arange(share.start * num_samples, share.stop * num_samples, device=device)
    with global_batch(rows, count * num_samples) if len(own) < count else nullcontext():
        return roll_out(student, own, horizon, num_samples, generator, device)


def _climatology(queries: EmbeddedClips, generator: torch.Generator) -> Tensor:
    """Targets of other queries, at the same step of the horizon: [Q, S, H, D]."""
    count = len(queries)
    num_others = min(MAX_CLIMATOLOGY, count - 1)
    shift = 1 + torch.randint(count - 1, (count, num_others), generator=generator)
    return queries.targets[(torch.arange(count)[:, None] + shift) % count]


def _encode_decode(
    law: Law,
    queries: EmbeddedClips,
    target_encoder: nn.Module,
    horizon: int,
    generator: torch.Generator,
    device: torch.device,
) -> Tensor:
    """True futures rendered and encoded: what a perfect forecaster in this embedding would say. [Q, S, H, D]"""
    centres = law.sample(queries.labels, horizon, ENCODE_DECODE_SAMPLES, generator)
    per_chunk = max(1, 4 * ENCODE_BATCH // (ENCODE_DECODE_SAMPLES * horizon))
    encoded = []
    for start in tqdm(range(0, len(queries), per_chunk), desc="encode-decode oracle", unit="batch"):
        rows = slice(start, start + per_chunk)
        labels = {name: values[rows] for name, values in queries.labels.items()}
        video = law.render(labels, centres[rows]).flatten(0, 1).unflatten(1, (horizon, -1)).flatten(0, 1)
        embeddings = target_encoder(video.to(device)).cpu()
        encoded.append(embeddings.unflatten(0, (-1, ENCODE_DECODE_SAMPLES, horizon)))
    return torch.cat(encoded)


# ------------------------------------------------------------------------------------------------ physical space


def quantity_of(config: Config, law: Law | None, labels: Mapping[str, Tensor]) -> Quantity | None:
    """What is forecast in physical space; None for videos without labels.

    Raises:
        UserError: the clips have no such label of frames as evaluation.label.
    """
    name = config.evaluation.label
    if law:
        return law.quantity
    if name is None:
        return None
    if name not in labels or labels[name].ndim != 3:
        has = ", ".join(sorted(key for key, values in labels.items() if values.ndim == 3)) or "none"
        raise UserError(f"evaluation.label={name!r} is no label of frames: these videos have {has}")
    return Quantity(name, "", tuple(str(k) for k in range(labels[name].shape[-1])))


def outcomes(config: Config, law: Law | None, labels: dict[str, Tensor], horizon: int) -> Tensor:
    """The quantity as it came, at the end of each target segment: [N, H, K]."""
    if law:
        return law.truth(labels, horizon)
    assert config.evaluation.label is not None
    num_frames = config.data.num_frames
    return labels[config.evaluation.label].float()[:, 2 * num_frames - 1 :: num_frames][:, :horizon]


def fitted_readout(config: Config, law: Law | None, fit: EmbeddedClips, selection: EmbeddedClips) -> Readout:
    """The readout of the quantity from embeddings of real targets, fitted on one split and chosen on another."""
    outputs = [outcomes(config, law, clips.labels, 1)[:, 0] for clips in (fit, selection)]
    return choose_readout(fit.targets[:, 0], outputs[0], selection.targets[:, 0], outputs[1])


def _draw(law: Law, labels: dict[str, Tensor], horizon: int, num_samples: int, generator: torch.Generator) -> Tensor:
    """The quantity under fresh futures: [Q, M, H, K]."""
    return law.measure(labels, law.sample(labels, horizon, num_samples, generator))


@dataclass(frozen=True)
class Physical:
    """The readout of the quantity and what forecasts of it are scored against.

    observed [Q, M, H, K] are draws of the law, or the one future that came; oracle [Q, S, H, K] more draws of the law.
    origin [Q, K] is the quantity in the last context frame.
    """

    law: Law | None
    queries: EmbeddedClips
    readout: Readout
    readout_r2: float
    fit_norm_99: Tensor
    observed: Tensor
    oracle: Tensor | None
    truth: Tensor
    origin: Tensor

    @classmethod
    def fitted(
        cls,
        config: Config,
        law: Law | None,
        fit: EmbeddedClips,
        selection: EmbeddedClips,
        queries: EmbeddedClips,
        generator: torch.Generator,
    ) -> "Physical":
        sizes = config.evaluation
        readout = fitted_readout(config, law, fit, selection)
        truth = outcomes(config, law, queries.labels, queries.targets.shape[1])
        if law:
            observed = _draw(law, queries.labels, sizes.horizon, sizes.law_samples, generator)
            oracle = _draw(law, queries.labels, sizes.horizon, sizes.num_samples, generator)
            origin = law.origin(queries.labels)
        else:
            assert sizes.label is not None
            observed, oracle = truth[:, None], None
            origin = queries.labels[sizes.label].float()[:, config.data.num_frames - 1]
        return cls(
            law=law,
            queries=queries,
            readout=readout,
            readout_r2=r_squared(readout(queries.targets[:, 0]), truth[:, 0]),
            fit_norm_99=readout.standardised_norm(fit.targets[:, 0]).quantile(0.99),
            observed=observed,
            oracle=oracle,
            truth=truth,
            origin=origin,
        )

    def scores(self, values: dict[str, Tensor]) -> dict[str, Any]:
        """SCORES of forecasts that were read, [Q, S, H, K] each, and of those that need no reading."""
        forecasts = dict(values)
        oracle_score = None
        if self.oracle is not None:
            forecasts["simulator_oracle"] = self.oracle
            oracle_score = forecast_scores(self.oracle, self.observed)["energy_score"]
        if self.queries.extrapolated is not None:
            forecasts["pixel_constant_velocity"] = self.queries.extrapolated[:, None]
        return {name: forecast_scores(part, self.observed, oracle_score) for name, part in forecasts.items()}

    def beyond_fit(self, samples: Tensor) -> list[float]:
        """Share of predicted embeddings [Q, S, H, D] longer than 99% of those of the fit, at each step."""
        return [
            float((self.readout.standardised_norm(step) > self.fit_norm_99).float().mean())
            for step in samples.unbind(2)
        ]

    def fans(self, values: Tensor, count: int) -> Fans:
        """What the report draws of the first queries: values [Q, S, H, K]."""
        labels = {name: label[:count] for name, label in self.queries.labels.items()}

        def shown(part: Tensor) -> np.ndarray:
            return (self.law.positions(labels, part[:count]) if self.law else part[:count]).numpy()

        return Fans(
            samples=shown(values),
            law=shown(self.observed) if self.law else None,
            true=shown(self.truth[:, None])[:, 0],
            origin=self.origin[:count].numpy(),
            on_frames=self.law is not None,
        )


# -------------------------------------------------------------------------------------------------------- probes


def _probes(law: Law | None, fit: EmbeddedClips, selection: EmbeddedClips, queries: EmbeddedClips) -> dict[str, Any]:
    """What frozen representations tell of the labels of held-out clips."""
    parts = (fit, selection, queries)

    def of_all(measure: Callable[[EmbeddedClips], Tensor]) -> Splits:
        return measure(fit), measure(selection), measure(queries)

    representations = {
        "backbone": of_all(lambda clips: clips.backbone),
        "embedding": of_all(lambda clips: clips.embedding),
    }
    if fit.r.shape[1]:
        representations |= {
            "r": of_all(lambda clips: clips.r),
            "embedding_and_r": of_all(lambda clips: torch.cat([clips.embedding, clips.r], dim=1)),
        }
    labels = [law.probe_targets(part.labels) if law else _probe_targets(part.labels) for part in parts]
    common = [name for name in labels[0] if name in labels[1] and name in labels[2]]
    targets: dict[str, Splits] = {name: (labels[0][name], labels[1][name], labels[2][name]) for name in common}
    return probe_all(representations, targets)


def _probe_targets(labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Labels of videos that vary: whole numbers below MAX_CLASSES are classes, and larger ones nothing to be probed
    for, such as a recording's seeds; others are measures [N, K]."""
    targets = {}
    for name, values in labels.items():
        if values.ndim >= 3 or len(values.unique()) < 2:
            continue
        if values.is_floating_point() or values.ndim == 2:
            targets[name] = values.float().reshape(len(values), -1)
        elif values.min() >= 0 and values.max() < MAX_CLASSES:
            targets[name] = values
    return targets


# ------------------------------------------------------------------------------------------------------ pictures


def _neighbours(config: Config, bank: EmbeddedClips, samples: Tensor) -> dict[str, Any]:
    """The real target segments of the bank nearest to sampled futures [Q, N, H, D], at some steps of the horizon."""
    horizon, num_frames = config.evaluation.horizon, config.data.num_frames
    steps = tuple(sorted({1, (horizon + 1) // 2, horizon}))
    bank_targets = bank.targets[: len(bank.frames), 0]
    shown = samples[:, :, [step - 1 for step in steps]].transpose(1, 2)
    nearest = torch.cdist(shown, bank_targets.expand(*shown.shape[:2], -1, -1)).argmin(dim=-1)
    return {
        "neighbours": bank.frames[nearest][:, :, :, num_frames : 2 * num_frames].numpy(),
        "neighbour_steps": steps,
    }


def _latents(law: Law | None, quantity: Quantity | None, queries: EmbeddedClips) -> Latents | None:
    if not queries.r.shape[1]:
        return None
    targets = law.probe_targets(queries.labels) if law else {}
    if "velocity_change" not in targets:
        return Latents(queries.r.numpy(), None, "")
    return Latents(queries.r.numpy(), targets["velocity_change"].numpy(), "velocity change, px/frame")


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
