"""The physical quantity that is forecast, read from embeddings by a ridge readout.

The readout is fitted on real target segments of training identities, never on forecasts. Forecasts are scored against
fresh draws of the true law if it is known, otherwise against the one future that followed.

Legend: N clips, Q queries, S samples, M draws of the law, D embedding dimensions, K dimensions of the quantity.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipelines.errors import UserError
from data_pipelines.worlds.law import Law, Quantity
from worldmodel.evaluation.baselines import constant_velocity, moments_for, other_clips, training_clips
from worldmodel.evaluation.embed import EmbeddedSplit
from worldmodel.evaluation.illustrations import Fans
from worldmodel.evaluation.readout import RIDGE_STRENGTHS, Readout, choose_readout
from worldmodel.evaluation.recalibration import Recalibration
from worldmodel.evaluation.scores import energy_scores, forecast_scores, r_squared
from worldmodel.runs.metrics import Forecasts
from worldmodel.runs.record_types import MAX_HORIZON
from worldmodel.sources.source import ClipPlaces

CLIMATOLOGIES = ("climatology", "training_climatology")
"""Forecasts by real moments. They have true values, which no readout must read."""


@dataclass(frozen=True)
class FrameLabel:
    """The per-frame label evaluation.label, which is forecast if no law is known. `num_frames` is that of a segment."""

    name: str
    num_frames: int

    def quantity(self, labels: Mapping[str, Tensor]) -> Quantity:
        """Return the quantity in the labels of clips.

        Raises:
            UserError: the clips have no such per-frame label.
        """
        check_label(self.name, {key: values.shape[-1] for key, values in labels.items() if values.ndim == 3})
        return Quantity(self.name, "", tuple(str(k) for k in range(labels[self.name].shape[-1])))

    def truth(self, labels: dict[str, Tensor], horizon: int) -> Tensor:
        """Return the values at the end of each target segment, [N, horizon, K]."""
        return labels[self.name].float()[:, 2 * self.num_frames - 1 :: self.num_frames][:, :horizon]

    def origin(self, labels: dict[str, Tensor]) -> Tensor:
        """Return the values in the last context frame, [N, K]."""
        return labels[self.name].float()[:, self.num_frames - 1]

    def baselines(self, labels: dict[str, Tensor], horizon: int) -> dict[str, Tensor]:
        """Return the forecasts that the label's values in the context allow, [N, 1, horizon, K] each."""
        context = labels[self.name].float()[:, : self.num_frames]
        found = {"label_persistence": context[:, -1:, None].expand(-1, -1, horizon, -1)}
        if self.num_frames > 1:
            found["constant_velocity"] = constant_velocity(context, horizon)[:, None]
        return found


def check_label(name: str, of_frames: Mapping[str, int]) -> None:
    """Check that evaluation.label is one of the labels of frames, given with their sizes.

    Raises:
        UserError: it is not, or it has too many numbers.
    """
    if name not in of_frames:
        has = ", ".join(sorted(of_frames)) or "none"
        raise UserError(f"evaluation.label={name!r} is not a per-frame label: these videos have {has}")
    if of_frames[name] > MAX_HORIZON:
        raise UserError(
            f"evaluation.label={name!r} has {of_frames[name]:,} numbers per frame: at most {MAX_HORIZON:,} are forecast"
        )


KnownTruth = Law | FrameLabel
"""Source of the true values of the quantity."""


def known_truth(law: Law | None, label: str | None, num_frames: int) -> KnownTruth | None:
    """Return the law, or the label if no law is known; None for videos without either."""
    return law or (FrameLabel(label, num_frames) if label else None)


def quantity_of(known: KnownTruth, labels: Mapping[str, Tensor]) -> Quantity:
    """Return the quantity to forecast, given the labels of clips.

    Raises:
        UserError: the clips have no per-frame label evaluation.label.
    """
    return known.quantity(labels) if isinstance(known, FrameLabel) else known.quantity


def fitted_readout(
    known: KnownTruth,
    fit: EmbeddedSplit,
    selection: EmbeddedSplit,
    strengths: Sequence[float] = RIDGE_STRENGTHS,
) -> Readout:
    """Fit the readout from embeddings of real targets on one split, and choose its strength on another."""
    outputs = [known.truth(clips.labels, 1)[:, 0] for clips in (fit, selection)]
    return choose_readout(fit.targets[:, 0], outputs[0], selection.targets[:, 0], outputs[1], strengths)


def draw(law: Law, labels: dict[str, Tensor], horizon: int, num_draws: int, generator: torch.Generator) -> Tensor:
    """Draw the quantity in fresh futures of the true law, [Q, M, horizon, K]."""
    return law.measure(labels, law.sample(labels, horizon, num_draws, generator))


@dataclass(frozen=True)
class ScoredQuantity:
    """The readout of the quantity, and the values that forecasts of the queries are scored against.

    baselines [Q, S, horizon, K] are forecasts without a readout, by name, from the labels of the context. past [N, K]
    are the true values after the training clips at `past_places`. observed [Q, M, horizon, K] are draws of the law, or
    the one future that followed. oracle [Q, S, horizon, K] are further draws of the law. origin [Q, K] is the quantity
    in the last context frame.
    """

    law: Law | None
    queries: EmbeddedSplit
    readout: Readout
    readout_r2: float
    fit_norm_99: Tensor
    observed: Tensor
    oracle: Tensor | None
    truth: Tensor
    origin: Tensor
    baselines: dict[str, Tensor]
    past: Tensor
    past_places: ClipPlaces

    @classmethod
    def fitted(
        cls,
        known: KnownTruth,
        fit: EmbeddedSplit,
        selection: EmbeddedSplit,
        queries: EmbeddedSplit,
        generator: torch.Generator,
        *,
        law_samples: int,
        num_samples: int,
    ) -> "ScoredQuantity":
        """Fit the readout, and draw futures of the queries from the law: `law_samples` to score forecasts against, and
        `num_samples` as the forecast of an oracle."""
        readout = fitted_readout(known, fit, selection)
        labels, horizon = queries.labels, queries.horizon
        truth = known.truth(labels, horizon)
        law, observed, oracle = None, truth[:, None], None
        baselines = {}
        if isinstance(known, FrameLabel):
            baselines = known.baselines(labels, horizon)
        else:
            law = known
            if queries.extrapolated is not None:
                baselines["pixel_constant_velocity"] = queries.extrapolated[:, None]
            observed = draw(law, labels, horizon, law_samples, generator)
            oracle = draw(law, labels, horizon, num_samples, generator)
        return cls(
            law=law,
            queries=queries,
            readout=readout,
            readout_r2=r_squared(readout(queries.targets[:, 0]), truth[:, 0]),
            fit_norm_99=readout.standardised_norm(fit.targets[:, 0]).quantile(0.99),
            observed=observed,
            oracle=oracle,
            truth=truth,
            origin=known.origin(labels),
            baselines=baselines,
            past=known.truth(fit.labels, 1)[:, 0],
            past_places=fit.places,
        )

    def scores(
        self, values: dict[str, Tensor], generator: torch.Generator, recalibration: Recalibration | None = None
    ) -> tuple[Forecasts, dict[str, Tensor]]:
        """Score forecasts that were read, [Q, S, horizon, K] each, and those that need no readout.

        recalibration: adds the model's forecast recalibrated with it, pooled with the scored training climatology.

        Returns: the scores of each forecast, and its Energy Score of each query [Q, horizon].
        """
        forecasts = values | self.baselines | self._climatologies(values["model"].shape[1], generator)
        if recalibration:
            moments = forecasts["training_climatology"]
            forecasts["model_recalibrated"] = recalibration(values["model"], moments, generator)
        if self.oracle is not None:
            forecasts["simulator_oracle"] = self.oracle
        energy = {name: energy_scores(part, self.observed) for name, part in forecasts.items()}
        oracle = None if self.oracle is None else energy["simulator_oracle"].mean(dim=0).tolist()
        scores = {
            name: forecast_scores(part, self.observed, oracle, energy=energy[name]) for name, part in forecasts.items()
        }
        return scores, energy

    def _climatologies(self, num_samples: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return real values of other queries, and of training clips, [Q, S, horizon, K] each."""
        places, horizon = self.queries.places, self.truth.shape[1]
        past = [training_clips(self.past_places, places, moments_for(num_samples), generator) for _ in range(horizon)]
        found = self.truth[other_clips(places, generator)], self.past[torch.stack(past, dim=2)]
        return dict(zip(CLIMATOLOGIES, found, strict=True))

    def beyond_fit(self, samples: Tensor) -> list[float]:
        """Return the share of predicted embeddings [Q, S, horizon, D] longer than 99% of those of the fit, per step."""
        return [
            float((self.readout.standardised_norm(step) > self.fit_norm_99).float().mean())
            for step in samples.unbind(2)
        ]

    def fans(self, values: Tensor, count: int) -> Fans:
        """Return the forecasts of the first `count` queries for the report: values [Q, S, horizon, K]."""
        labels = {name: label[:count] for name, label in self.queries.labels.items()}

        def shown(part: Tensor) -> np.ndarray:
            return (self.law.positions(labels, part[:count]) if self.law else part[:count]).numpy()

        return Fans(
            samples=shown(values),
            law=shown(self.observed) if self.law else None,
            true=shown(self.truth[:, None])[:, 0],
            origin=self.origin[:count].numpy(),
            on_frames=self.law is not None and self.origin.shape[1] > 1,
        )
