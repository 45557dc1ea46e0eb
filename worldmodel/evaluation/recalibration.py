"""Recalibration of sampled forecasts: another spread, and a pool with climatology, both fitted to selection clips.

At each horizon step the samples are scaled around their mean, and some of them are replaced by draws of training
climatology. Both numbers minimise the Energy Score of selection clips. Scaling the spread is the simplest form of
ensemble recalibration (Gneiting, Raftery, Westveld and Goldman 2005, "Calibrated probabilistic forecasting using
ensemble model output statistics"). The pool is a linear opinion pool of two forecasts (Ranjan and Gneiting 2010,
"Combining probability forecasts"). A forecast that knows nothing gets the weight 1 and becomes climatology.

Legend: Q queries, S samples, M moments or training clips, D embedding dimensions, K dimensions of a space.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_pipelines.errors import UserError
from worldmodel.evaluation.baselines import MAX_MOMENTS, moments_for, training_clips
from worldmodel.evaluation.stored_tensors import damage_reported, read_tensors, save_tensors
from worldmodel.runs.folder import RunFolder
from worldmodel.runs.metrics import RecalibrationFacts
from worldmodel.sources.source import ClipPlaces

SPREADS = tuple(2 ** (power / 4) for power in range(-8, 17))
"""Factors of the spread that are tried: from 1/4 to 16."""
IMAGINED_BLOCKS = 1.0
"""Weight of climatology as its own outcome, in blocks of selection clips (fit_recalibration)."""


@dataclass(frozen=True)
class Recalibration:
    """The factor of the spread, and the weight of climatology in the pool, at each horizon step."""

    spread: tuple[float, ...]
    weight: tuple[float, ...]

    def __call__(
        self, samples: Tensor, moments: Tensor, generator: torch.Generator, mean: Tensor | None = None
    ) -> Tensor:
        """Return recalibrated samples, of which each is replaced by a moment with the probability of the weight.

        samples and moments [Q, S, horizon, K], draws of climatology. A sample that is replaced at one step remains so
        at the steps with the same or a larger weight. A single sample is repeated for all moments. The samples are
        scaled around `mean` [Q, 1, horizon, K], by default their own.
        """
        samples = samples.expand_as(moments)
        spread, weight = (samples.new_tensor(values)[: samples.shape[2]] for values in (self.spread, self.weight))
        mean = samples.mean(dim=1, keepdim=True) if mean is None else mean
        chance = torch.rand(samples.shape[:2], generator=generator, device=samples.device)
        scaled = samples + (spread - 1)[:, None] * (samples - mean)
        return torch.where((chance[:, :, None] < weight)[..., None], moments, scaled)


def fit_recalibration(samples: Tensor, moments: Tensor, observed: Tensor, num_blocks: int) -> Recalibration:
    """Fit the spread and the weight at each horizon step to selection clips.

    samples [Q, S, horizon, K] of the model, moments [Q, M, horizon, K] of climatology, M at least 2, and the futures
    that followed, observed [Q, horizon, K]. num_blocks is the number of independent blocks that the clips make.

    Few clips may show skill by chance. IMAGINED_BLOCKS more blocks shrink the fit towards climatology: their futures
    are draws of climatology itself.
    """
    share = IMAGINED_BLOCKS / (num_blocks + IMAGINED_BLOCKS)
    steps = [
        _fit_step(samples[:, :, step], moments[:, :, step], observed[:, step], share)
        for step in range(observed.shape[1])
    ]
    spreads, weights = zip(*steps, strict=True)
    return Recalibration(spreads, weights)


def _fit_step(samples: Tensor, moments: Tensor, observed: Tensor, share: float) -> tuple[float, float]:
    """Return the spread and the weight with the smallest score at one step; `share` is that of imagined clips.

    The score of the pool (1 - w) A + w B of the forecasts A, of the model, and B, of climatology, is

        (1 - w) E|A - Y| + w E|B - Y| - (1/2) [(1 - w)^2 E|A - A'| + 2 w (1 - w) E|A - B| + w^2 E|B - B'|]

    It is a convex parabola in w, as 2 E|A - B| - E|A - A'| - E|B - B'| is at least 0 (Szekely and Rizzo 2013, "Energy
    statistics").
    """
    mean = samples.mean(dim=1, keepdim=True)
    deviations, climate, truth = samples - mean, moments - mean, observed[:, None] - mean
    to_climate, to_truth = (_Distances(deviations, points) for points in (climate, truth))
    within_model, within_climate = _mean_within(deviations), _mean_within(climate)
    climate_to_truth = float(torch.cdist(climate, truth).mean())
    best: tuple[float, float, float, float] | None = None
    for spread in SPREADS:
        between, own = float(to_climate.mean(spread)), spread * within_model
        to_outcome = (1 - share) * float(to_truth.mean(spread)) + share * between
        climate_to_outcome = (1 - share) * climate_to_truth + share * within_climate
        curvature = 2 * between - own - within_climate
        slope = climate_to_outcome - to_outcome + own - between
        weight = 1.0 if curvature <= 0 else min(1.0, max(0.0, -slope / curvature))
        score = (1 - weight) * to_outcome + weight * climate_to_outcome
        score -= ((1 - weight) ** 2 * own + 2 * weight * (1 - weight) * between + weight**2 * within_climate) / 2
        found = (score, abs(spread - 1), spread, weight)
        best = found if best is None or found < best else best
    assert best is not None
    return best[2], best[3]


class _Distances:
    """Mean distance from samples, scaled around zero, to points: deviations [Q, S, K], points [Q, M, K]."""

    def __init__(self, deviations: Tensor, points: Tensor) -> None:
        self._squared = deviations.square().sum(dim=2)[:, :, None]
        self._product = deviations @ points.transpose(1, 2)
        self._points = points.square().sum(dim=2)[:, None]

    def mean(self, spread: float) -> Tensor:
        """Return the mean over queries and pairs with the deviations multiplied by `spread`."""
        squares = spread**2 * self._squared - 2 * spread * self._product + self._points
        return squares.clamp(min=0).sqrt().mean()


def _mean_within(points: Tensor) -> float:
    """Return the mean distance of two different ones of the points [Q, M, K]; 0 for a single one."""
    count = points.shape[1]
    return float(torch.cdist(points, points).mean()) * count / max(1, count - 1)


# ------------------------------------------------------------------------------------------------- forecasts of a run


@dataclass(frozen=True)
class Recalibrated:
    """The recalibration of forecasts in one space, with the climatology that it pools them with.

    past [M, horizon, K] are the futures of training clips at `places`.
    """

    fitted: Recalibration
    past: Tensor
    places: ClipPlaces

    @classmethod
    def fit(
        cls,
        samples: Tensor,
        observed: Tensor,
        selection_places: ClipPlaces,
        past: Tensor,
        places: ClipPlaces,
        num_blocks: int,
        generator: torch.Generator,
    ) -> "Recalibrated":
        """Fit the recalibration to forecasts [Q, S, horizon, K] of selection clips, and to what followed them."""
        moments = past[training_clips(places, selection_places, MAX_MOMENTS, generator)]
        return cls(fit_recalibration(samples, moments, observed, num_blocks), past, places)

    def __call__(self, samples: Tensor, mean: Tensor, places: ClipPlaces, generator: torch.Generator) -> Tensor:
        """Recalibrate samples [Q, S, horizon, K] of clips at these places, on the CPU.

        mean [Q, 1, horizon, K] is that of as many samples as the recalibration was fitted to.
        """
        num_samples, horizon = samples.shape[1:3]
        moments = self.past[training_clips(self.places, places, moments_for(num_samples), generator)]
        return self.fitted(samples, moments[:, :, :horizon], generator, mean)[:, :num_samples]

    @property
    def facts(self) -> RecalibrationFacts:
        """The fitted numbers for metrics.json."""
        return RecalibrationFacts(spread=[*self.fitted.spread], weight=[*self.fitted.weight])


# -------------------------------------------------------------------------------------------------------------- file

_PARTS = ("spread", "weight", "past", "video")


def save_recalibration(run: str | Path, spaces: dict[str, Recalibrated], step: int) -> None:
    """Write the recalibration of each space, "embedding" and "quantity", of the checkpoint at `step` into the run."""
    tensors: dict[str, Tensor] = {}
    for name, space in spaces.items():
        fitted = torch.tensor(space.fitted.spread), torch.tensor(space.fitted.weight)
        parts = zip(_PARTS, (*fitted, space.past, space.places.video), strict=True)
        tensors |= {f"{name}.{part}": tensor.clone().contiguous() for part, tensor in parts}
    save_tensors(RunFolder(run).recalibration, tensors, step)


def load_recalibrations(run: str | Path, step: int) -> dict[str, Recalibrated]:
    """Return the recalibration of each space that an evaluation of the checkpoint at `step` stored, by its name.

    An empty dictionary if the run was not evaluated with evaluation.recalibrate.

    Raises:
        UserError: the file is damaged, or was fitted to another checkpoint.
    """
    path = RunFolder(run).recalibration
    if not path.is_file():
        return {}
    with damage_reported(path):
        tensors, fitted_step = read_tensors(path)
        spaces = {name.partition(".")[0] for name in tensors}
        found = {space: _recalibrated(*(tensors[f"{space}.{part}"] for part in _PARTS)) for space in spaces}
    if fitted_step != step:
        raise UserError(
            f"the recalibration of {run} was fitted at step {fitted_step}, but the loaded checkpoint is from step "
            f"{step}: evaluate that checkpoint"
        )
    return found


def _recalibrated(spread: Tensor, weight: Tensor, past: Tensor, video: Tensor) -> Recalibrated:
    if past.ndim != 3 or not len(spread) == len(weight) == past.shape[1] or not 0 < len(past) == len(video):
        raise ValueError("the sizes of its tensors do not fit")
    fitted = Recalibration(tuple(spread.tolist()), tuple(weight.tolist()))
    return Recalibrated(fitted, past, ClipPlaces(video, torch.zeros_like(video), 1))
