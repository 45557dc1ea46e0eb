"""Forecasts that need no world model, which a trained one must beat.

Legend: N clips, Q queries, S samples, D embedding dimensions, K numbers of a label, T frames of a segment.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from worldmodel.evaluation.readout import Readout, fit_ridges
from worldmodel.evaluation.scores import energy_scores
from worldmodel.sources.source import ClipPlaces

MAX_MOMENTS = 64
"""Most samples of a climatology."""
MIN_MOMENTS = 16
"""Fewest other clips of a video of which a climatology of its own is made."""
STRENGTHS = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
"""Ridge strengths of the linear-Gaussian forecast. The largest one forecasts little more than the mean."""

HARDLY_VARIES = 0.1
"""Spread of a dimension, relative to the root mean square of all, below which it counts as one that hardly varies."""
CHOICE_SAMPLES = 32
"""Futures per selection clip by which the strength is chosen."""
VELOCITY_FRAMES = 5
"""Last frames of a context from which the velocity of a label is estimated."""


# ------------------------------------------------------------------------------------------------------- climatology


def other_clips(places: ClipPlaces, generator: torch.Generator) -> Tensor:
    """Draw other queries for each query, of the same video if it has MIN_MOMENTS others: int64 [Q, S].

    S is MAX_MOMENTS, or the number of other queries if that is smaller. The forecast by targets of other clips is the
    climatology. Over several videos it must be that of the same video: the skill over a mixture of climates rewards
    whoever knows the climate (Hamill and Juras 2006, "Measuring forecast skill: is it real skill or is it the varying
    climatology?").
    """
    count = len(places.video)
    num_moments = min(MAX_MOMENTS, count - 1)
    drawn = torch.empty(count, num_moments, dtype=torch.int64)
    everybody = torch.arange(count)
    for candidates, rows in _candidates(places, places, MIN_MOMENTS + 1):
        # A query is never drawn for itself.
        shift = 1 + torch.randint(len(candidates) - 1, (len(rows), num_moments), generator=generator)
        at = torch.searchsorted(candidates, rows)[:, None]
        drawn[rows] = candidates[(at + shift) % len(candidates)]
    assert (drawn != everybody[:, None]).all()
    return drawn


def moments_for(num_samples: int) -> int:
    """Return the number of draws of training climatology to pool with samples: one each, or MAX_MOMENTS with one."""
    return num_samples if num_samples > 1 else MAX_MOMENTS


def training_clips(bank: ClipPlaces, places: ClipPlaces, num_moments: int, generator: torch.Generator) -> Tensor:
    """Draw clips of a bank for each query, of the same video if the bank has MIN_MOMENTS of it: int64 [Q, num_moments].

    The forecast by their targets is the climatology of what is known beforehand.
    """
    drawn = torch.empty(len(places.video), num_moments, dtype=torch.int64)
    for candidates, rows in _candidates(bank, places, MIN_MOMENTS):
        drawn[rows] = candidates[torch.randint(len(candidates), (len(rows), num_moments), generator=generator)]
    return drawn


def _candidates(bank: ClipPlaces, places: ClipPlaces, fewest: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield clips of the bank with the queries that draw from them: all of one video, or all for the other videos."""
    pooled = []
    for video in places.video.unique():
        rows = (places.video == video).nonzero().squeeze(1)
        candidates = (bank.video == video).nonzero().squeeze(1)
        if len(candidates) >= fewest:
            yield candidates, rows
        else:
            pooled.append(rows)
    if pooled:
        yield torch.arange(len(bank.video)), torch.cat(pooled).sort().values


# --------------------------------------------------------------------------------------------------- linear-Gaussian


@dataclass(frozen=True)
class LinearGaussian:
    """The forecast y = f(x, a) + e, repeated over the horizon: f is linear and e is normal with covariance C.

    `factor` [D, D] is a root of C. x and y, the embeddings of a segment and of the next, are in the same space. a are
    the actions in between, for models that are conditioned on them.
    """

    mean: Readout
    factor: Tensor

    @classmethod
    def fitted(
        cls, context: Tensor, target: Tensor, start: Tensor, actions: Tensor, futures: Tensor
    ) -> "LinearGaussian":
        """Fit the forecast of target [N, D] from context [N, D + A] to training clips; choose it on selection clips.

        f is a ridge, and its strength has the lowest mean Energy Score of the futures [M, horizon, D] of selection
        clips, which begin at `start` [M, D] under actions [M, horizon, A]. C has the shape of the covariance of the
        residuals on training clips, shrunk (Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional
        covariance matrices") except for the size of dimensions that hardly vary, and the size of the residuals on
        selection clips: those on training clips are too small if the fit or the embedding has learned the clips by
        heart.
        """
        best: tuple[float, LinearGaussian] | None = None
        for mean in fit_ridges(context, target, STRENGTHS):
            held_out = futures[:, 0] - mean(torch.cat([start, actions[:, 0]], dim=1))
            forecast = cls(mean, _root_of_covariance(target - mean(context), held_out))
            generator = torch.Generator().manual_seed(0)
            samples = forecast.roll_out(start, actions, CHOICE_SAMPLES, generator)
            score = float(energy_scores(samples, futures[:, None]).mean())
            if best is None or score < best[0]:
                best = score, forecast
        assert best is not None
        return best[1]

    def roll_out(self, start: Tensor, actions: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
        """Draw futures of embeddings [Q, D] under actions [Q, horizon, A]: [Q, num_samples, horizon, D]."""
        state, futures = start[:, None].expand(-1, num_samples, -1), []
        for action in actions[:, None].expand(-1, num_samples, -1, -1).unbind(2):
            noise = torch.randn(state.shape, generator=generator) @ self.factor.T
            state = self.mean(torch.cat([state, action], dim=2)) + noise
            futures.append(state)
        return torch.stack(futures, dim=2)


def _root_of_covariance(residuals: Tensor, held_out: Tensor) -> Tensor:
    """Return a root [D, D] of the shrunk covariance of residuals [N, D], as large as those that were held out.

    Shrinkage draws variances towards their mean. Dimensions that hardly vary are brought to that size before it, and
    back after it: they would take their noise from the others.
    """
    from sklearn.covariance import ledoit_wolf

    if not (residuals.isfinite().all() and held_out.isfinite().all()):
        return torch.full((residuals.shape[1],) * 2, torch.nan)
    spread = residuals.double().square().mean(dim=0).sqrt()
    relative = spread / spread.square().mean().sqrt().clamp(min=1e-12)
    scale = torch.where(relative < HARDLY_VARIES, relative.clamp(min=1e-12), 1.0)
    shrunk = torch.from_numpy(ledoit_wolf((residuals / scale).numpy(), assume_centered=True)[0])
    covariance = shrunk * scale[:, None] * scale
    size = held_out.double().square().mean() / covariance.diagonal().mean().clamp(min=1e-12)
    values, vectors = torch.linalg.eigh(covariance * size)
    return (vectors * values.clamp(min=0).sqrt()).float()


# ------------------------------------------------------------------------------------------------------------ labels


def constant_velocity(context: Tensor, horizon: int) -> Tensor:
    """Continue the motion of a label in the T frames of the context, [Q, T, K], T at least 2: [Q, horizon, K].

    The velocity is the slope of the least-squares line through the last VELOCITY_FRAMES frames. The forecast is for the
    last frame of each following segment of T frames, and starts at the last known value.
    """
    num_frames = context.shape[1]
    known = context[:, -VELOCITY_FRAMES:].double()
    time = torch.arange(known.shape[1], dtype=known.dtype)
    time -= time.mean()
    velocity = torch.einsum("t, q t k -> q k", time, known) / time.square().sum()
    ahead = num_frames * torch.arange(1, horizon + 1, dtype=known.dtype)
    return (known[:, -1, None] + ahead[:, None] * velocity[:, None]).float()
