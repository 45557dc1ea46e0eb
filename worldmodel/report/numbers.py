"""Numbers of metrics.json as text with their places in the file, and the names of forecasts and scores.

Metrics may lack any part: a missing number is left out or shown as a dash.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from worldmodel.runs.metrics import BASELINES, Metrics, value_at

DASH = "–"
FEW_BLOCKS = 10  # fewer give intervals that are too narrow

# Label and explanation of each forecast, in the order of the tables.
FORECASTS = {
    "model": ("This run", "Futures from draws of the latent's prior."),
    "model_recalibrated": (
        "This run, recalibrated",
        "The same futures with another spread, and some of them replaced by training climatology; both were fitted to "
        "selection clips.",
    ),
    "prior_mean": (
        "Prior mean",
        "The same model with the latent fixed at its prior's mean: a single future.",
    ),
    "shuffled_r": (
        "Shuffled r",
        "The same model with the latents of other queries: tests whether r adds more than spread.",
    ),
    "no_latent": ("No latent", "The compared run, trained without a latent: one forecast for each query."),
    "pixel_constant_velocity": (
        "Constant velocity",
        "The motion seen in the context continues unchanged.",
    ),
    "constant_velocity": (
        "Constant velocity of the label",
        "The motion of the label in the frames of the context continues unchanged.",
    ),
    "label_persistence": ("Persistence of the label", "The label keeps its value in the last frame of the context."),
    "persistence": (
        "Persistence",
        "Nothing changes: the embedding of the context is used as that of the target.",
    ),
    "climatology": (
        "Climatology",
        "Real futures of other test clips, of the same video if it has enough: it ignores the context, but knows the "
        "time of the test.",
    ),
    "training_climatology": (
        "Training climatology",
        "Real futures of training clips, of the same video if it has enough: it knows only what came before.",
    ),
    "linear_gaussian": (
        "Linear-Gaussian",
        "A linear forecast of the next embedding with normal errors, fitted to training clips and repeated over the "
        "horizon.",
    ),
    "encode_decode_oracle": (
        "Encode-decode oracle",
        "True futures, rendered, encoded and read out: the limit set by encoder and readout.",
    ),
    "simulator_oracle": ("Simulator oracle", "Draws of the true law. No forecast is expected to score lower."),
}
ORACLES = ("encode_decode_oracle", "simulator_oracle")
LABELS = {
    "kl_nats": "KL, nats",
    "r": "r",
    "embedding_and_r": "Embedding and r",
    "r2": "Readout's R²",
    "strength": "Ridge strength",
    "beyond_fit_norm_99": "Predictions beyond the 99th percentile norm of real features",
    "effective_rank": "Effective rank",
    "std": "Standard deviation",
    "digit": "Digit, accuracy",
    "velocity": "Velocity, R²",
    "velocity_change": "Velocity change, R²",
    "position": "Position, R²",
    "knn": "k-NN",
    "mlp": "MLP",
    "few_shot_1": "Linear, 1% of clips",
    "few_shot_5": "Linear, 5% of clips",
    "few_shot_10": "Linear, 10% of clips",
    "mrr": "MRR",
    "hit_1": "hit@1",
    "hit_5": "hit@5",
    "hit_10": "hit@10",
}


@dataclass(frozen=True)
class Number:
    """A number as text, and its dotted path in metrics.json with list indices; the path is empty if it is missing."""

    text: str
    path: str = ""


Numbers = Sequence[Number]
"""The numbers of several dimensions, shown together."""


def number(value: Any, digits: int = 3) -> str:
    """Format a value: floats to `digits` decimals, sequences joined by ' / ', a dash for None and NaN.

    Below 0.001, three decimals would be zeros: such a number is written as 6.10e-05, and likewise with more decimals.
    """
    if isinstance(value, list | tuple | np.ndarray):
        return " / ".join(number(v, digits) for v in value) if len(value) else DASH
    if value is None or (isinstance(value, float | np.floating) and not math.isfinite(value)):
        return DASH
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    return format(float(value), spec_for(float(value), digits))


def spec_for(value: float, digits: int) -> str:
    """Return the format of a number with so many decimals, as `number` writes it."""
    return ".2e" if digits >= 3 and 0 < abs(value) < 10**-digits else f".{digits}f"


def digits_for(values: Iterable[Any], digits: int = 3) -> int:
    """Return the decimals of numbers that are shown together.

    They are `digits`, or as many as give the largest number three significant digits if all are below 0.1. Below 0.001
    they are at least three, with which `number` writes powers of ten.
    """
    finite = [abs(float(value)) for value in _flat(values) if isinstance(value, int | float) and math.isfinite(value)]
    largest = max(finite, default=0.0)
    if not 0 < largest < 0.1:
        return digits
    return max(digits, 3 if largest < 10**-3 else 2 - math.floor(math.log10(largest)))


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def duration(seconds: Any) -> str:
    """Format seconds as '3 min 31 s'; a dash if missing."""
    if number(seconds) == DASH:
        return DASH
    minutes, rest = divmod(round(float(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def mapping(value: Any) -> Mapping[str, Any]:
    """Return the value if it is a mapping, otherwise an empty one."""
    return value if isinstance(value, Mapping) else {}


def numbers_at(metrics: Any, path: str, digits: int = 3) -> list[Number]:
    """Return the number at a place, or the numbers of the list there; a dash if it is missing."""
    value = value_at(metrics, path)
    if isinstance(value, list | tuple) and value:
        return [number_at(metrics, f"{path}.{i}", digits) for i in range(len(value))]
    return [number_at(metrics, path, digits)]


def number_at(metrics: Any, path: str, digits: int = 3) -> Number:
    """Return the number at a place; a dash if it is missing or not a number."""
    value = value_at(metrics, path)
    text = DASH if isinstance(value, Mapping | list | tuple) else number(value, digits)
    return Number(text, path if isinstance(value, int | float) and text != DASH else "")


def series(metrics: Any, path: str) -> np.ndarray:
    """Return the list at a place as floats, one per horizon step; NaN if missing, the mean over several dimensions."""
    values = value_at(metrics, path)
    return np.array([_mean(value) for value in values] if isinstance(values, list | tuple) else [], dtype=float)


def _mean(value: Any) -> float:
    finite = [float(v) for v in (value if isinstance(value, list | tuple) else [value]) if number(v) != DASH]
    return sum(finite) / len(finite) if finite else math.nan


def text_of(cell: Numbers) -> str:
    """Return the numbers of several dimensions as one text."""
    return " / ".join(part.text for part in cell)


def joined(groups: Sequence[Sequence[Number]], word: str) -> list[Number]:
    """Return the parts of all groups, with a word between neighbouring groups."""
    return [part for i, group in enumerate(groups) for part in ([Number(word)] if i else []) + list(group)]


def between(parts: Sequence[Number], word: str) -> list[Number]:
    """Return the parts with a word between neighbours."""
    return joined([[part] for part in parts], word)


def consecutive(numbers: Iterable[int]) -> list[list[int]]:
    """Return numbers in ascending order as runs that rise by 1: 0, 1, 2, 4 -> [[0, 1, 2], [4]]."""
    runs: list[list[int]] = []
    for each in sorted(numbers):
        if runs and runs[-1][-1] == each - 1:
            runs[-1].append(each)
        else:
            runs.append([each])
    return runs


def factor_text(value: Any) -> str:
    """Return the value of a factor of variation as text, a number as it was given."""
    return f"{value:g}" if isinstance(value, int | float) else str(value)


# ---------------------------------------------------------------------------------------------- content of the file


def horizon(metrics: Metrics) -> int:
    """Return the number of horizon steps."""
    stated = metrics.get("horizon")
    return stated if isinstance(stated, int) else max(1, len(series(metrics, "forecasts.model.energy_score")))


def marked_steps(num_steps: int) -> list[int]:
    """Return the indices of the first, a middle and the last horizon step."""
    return sorted({0, (num_steps - 1) // 2, num_steps - 1})


def unit(metrics: Metrics) -> str:
    """Return 'px', the quantity's name if it has no unit, or 'embedding space' without a quantity."""
    quantity = mapping(metrics.get("quantity"))
    return str(quantity.get("unit") or quantity.get("name") or "embedding space")


def dimensions(metrics: Metrics) -> str:
    """Return ' x / y', the names of several dimensions; an empty text for a single one."""
    names = mapping(metrics.get("quantity")).get("dimensions") or []
    return " " + " / ".join(map(str, names)) if len(names) > 1 else ""


def forecast_names(metrics: Metrics, folder: str = "forecasts") -> list[str]:
    """Return the names of the forecasts in the order of the tables; unknown names come before the oracles."""
    given = mapping(value_at(metrics, folder))
    known = [name for name in FORECASTS if name in given]
    return [
        *(name for name in known if name not in ORACLES),
        *(name for name in given if name not in FORECASTS),
        *(name for name in known if name in ORACLES),
    ]


def label(name: str, *, inside: bool = False) -> str:
    """Return the label of a forecast, score, target or representation; `inside` of a sentence in lower case."""
    own = name if name != name.lower() else name.replace("_", " ").capitalize()  # such as pH, a label of the user's
    text = FORECASTS[name][0] if name in FORECASTS else LABELS.get(name, own)
    return text[:1].lower() + text[1:] if inside and text != name else text


def interval_words(metrics: Metrics) -> str:
    """Return '90% interval', by the level of the intervals of skill scores, with a warning if blocks are few."""
    level, blocks = value_at(metrics, "intervals.level"), value_at(metrics, "intervals.num_blocks")
    words = f"{level:.0%} interval" if isinstance(level, int | float) and 0 < level < 1 else "interval"
    few = isinstance(blocks, int) and blocks < FEW_BLOCKS
    return f"{words}, too narrow: {blocks} block{'s' * (blocks != 1)}" if few else words


def score(metrics: Metrics, name: str, step: int = 0, folder: str = "forecasts") -> float:
    """Return the Energy Score of a forecast at a horizon step; NaN if it is missing."""
    scores = series(metrics, f"{folder}.{name}.energy_score")
    return float(scores[step]) if -len(scores) <= step < len(scores) else math.nan


def best_at(metrics: Metrics, key: str, folder: str = "forecasts") -> frozenset[str]:
    """Return the forecasts with the lowest value of a score, such as "energy_score.0": several if they are equal.

    Oracles do not take part: they know the law.
    """
    values = {name: value_at(metrics, f"{folder}.{name}.{key}") for name in forecast_names(metrics, folder)}
    finite = {
        name: value
        for name, value in values.items()
        if name not in ORACLES and isinstance(value, int | float) and math.isfinite(value)
    }
    lowest = min(finite.values(), default=math.nan)
    return frozenset(name for name, value in finite.items() if value == lowest)


def worse_than(metrics: Metrics, own: str = "model", folder: str = "forecasts") -> dict[str, list[int]]:
    """Return the baselines with a lower Energy Score than the run's forecast, and at which horizon steps, from 1.

    A forecast is worse at a step where its score is not finite.
    """
    if not len(series(metrics, f"{folder}.{own}.energy_score")):
        return {}

    def is_worse(own_score: float, other: float) -> bool:
        return math.isfinite(other) and not own_score <= other

    return _baselines_where(is_worse, metrics, own, folder)


def equal_to(metrics: Metrics, own: str = "model", folder: str = "forecasts") -> dict[str, list[int]]:
    """Return the baselines with the same Energy Score as the run's forecast, and at which horizon steps, from 1."""
    return _baselines_where(operator.eq, metrics, own, folder)


def _baselines_where(
    holds: Callable[[float, float], bool], metrics: Metrics, own: str, folder: str
) -> dict[str, list[int]]:
    steps = range(horizon(metrics))
    found = {
        name: [s + 1 for s in steps if holds(score(metrics, own, s, folder), score(metrics, name, s, folder))]
        for name in forecast_names(metrics, folder)
        if name in BASELINES
    }
    return {name: at for name, at in found.items() if at}
