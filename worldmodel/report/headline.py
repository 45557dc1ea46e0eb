"""The message of a run in words, the numbers at the top of its page, and its facts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from worldmodel.report.numbers import (
    DASH,
    Number,
    between,
    consecutive,
    digits_for,
    dimensions,
    duration,
    equal_to,
    forecast_names,
    horizon,
    joined,
    label,
    mapping,
    number,
    number_at,
    numbers_at,
    score,
    series,
    unit,
    worse_than,
)
from worldmodel.runs.metrics import BASELINES, OWN_FORECASTS, Metrics, RunMetrics, value_at

FACTS = (("embedding", "effective_rank"), ("embedding", "std"), ("readout", "strength"), ("readout", "r2"))
DECODER_ERRORS = {
    "mse": "Decoder, squared error per pixel of test clips",
    "mean_picture_mse": "Mean picture",
    "last_frame_mse": "Last frame before the segment",
    "other_embedding_mse": "Decoder, with embeddings of other clips",
}


def headline(metrics: RunMetrics) -> list[Number]:
    """Return the message of the page in parts.

    It begins with the baselines that are better than the run, if there are any. Then it has the score, its ratio to the
    oracle or otherwise to a baseline, and the success rate of planning.
    """
    worse = [Number(sentence) for sentence in [" ".join(_defeats(metrics))] if sentence]
    sentences = [part for part in (worse, _forecast_sentence(metrics), planning_sentence(metrics)) if part]
    return joined(sentences, " ") or [Number("This run has no forecast score.")]


def verdict(metrics: Metrics) -> str:
    """Return in a line which baselines are better than the run in each space, or not clearly worse.

    Empty without a forecast.
    """
    compared = any(name in BASELINES for name in forecast_names(metrics))
    if not compared or not len(series(metrics, "forecasts.model.energy_score")):
        return ""
    if worse := _defeats(metrics):
        return " ".join(worse)
    if missing := _missing(metrics):
        return f"This run has no finite Energy Score at {'; '.join(missing)}."
    if equals := _equals(metrics):
        return f"No baseline is better than this run at any horizon (Energy Score); equal to it: {'; '.join(equals)}."
    clear = "This run is better than every baseline at every horizon (Energy Score)"
    return f"{'; '.join([clear, *_ties(metrics)])}."


def _spaces(metrics: Metrics) -> dict[str, str]:
    """Return the name of each space in which forecasts are scored, by its place in the metrics."""
    spaces = {"forecasts": unit(metrics), "embedding.forecasts": "embedding space"}
    if spaces["forecasts"] == "embedding space":
        del spaces["embedding.forecasts"]
    return spaces


def _ties(metrics: Metrics) -> list[str]:
    """Return a phrase for each space in which the intervals of some skill scores of the run reach 0."""
    found = []
    for folder, space in _spaces(metrics).items():
        ties = {
            name: [
                step
                for step, low in enumerate(value_at(metrics, f"{folder}.model.skill.{name}.low") or (), start=1)
                if low is not None and low <= 0
            ]
            for name in forecast_names(metrics, f"{folder}.model.skill")
        }
        names = [f"{label(name, inside=True)} at {_horizons(steps)}" for name, steps in ties.items() if steps]
        if names:
            found.append(f"not clearly better than {', '.join(names)} ({space}): the interval of the skill reaches 0")
    return found


def _defeats(metrics: Metrics) -> list[str]:
    """Return a sentence for each space and forecast of the run that some baseline beats."""
    found = []
    for own in OWN_FORECASTS:
        for folder, space in _spaces(metrics).items():
            if worse := worse_than(metrics, own, folder):
                names = "; ".join(f"{label(name, inside=True)} at {_horizons(steps)}" for name, steps in worse.items())
                comma = "," if "," in label(own) else ""
                found.append(f"{label(own)}{comma} is worse than {names} (Energy Score, {space}).")
    return found


def _missing(metrics: Metrics) -> list[str]:
    """Return a phrase for each space in which the run's scores are not finite at some horizon steps."""
    found = []
    for folder, space in _spaces(metrics).items():
        scores = series(metrics, f"{folder}.model.energy_score")
        if steps := [step for step, value in enumerate(scores, start=1) if not math.isfinite(value)]:
            found.append(f"{_horizons(steps)} ({space})")
    return found


def _equals(metrics: Metrics) -> list[str]:
    """Return a phrase for each baseline and space with the same scores as the run."""
    return [
        f"{label(name, inside=True)} at {_horizons(steps)} ({space})"
        for folder, space in _spaces(metrics).items()
        for name, steps in equal_to(metrics, "model", folder).items()
    ]


def _horizons(steps: Sequence[int]) -> str:
    """Return 'horizon 2' or 'horizons 1 to 3 and 5'."""
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in consecutive(steps)]
    *first, last = texts
    return ("horizon " if len(steps) == 1 else "horizons ") + (f"{', '.join(first)} and {last}" if first else last)


def _forecast_sentence(metrics: RunMetrics) -> list[Number]:
    if not math.isfinite(score(metrics, "model")):
        return []
    last = horizon(metrics) - 1
    far = last > 0 and math.isfinite(score(metrics, "model", last))
    space = "in embedding space" if unit(metrics) == "embedding space" else unit(metrics)
    parts = [Number("Forecasts reach an Energy Score of "), _score_number(metrics, "model", 0)]
    parts.append(Number(f" {space}"))
    if far:
        parts += [
            Number(" at horizon 1 and "),
            _score_number(metrics, "model", last),
            Number(f" at horizon {last + 1}"),
        ]
    for name, what in {
        "simulator_oracle": "of the true law itself",
        "climatology": "of other clips' futures",
        "persistence": "of assuming that nothing changes",
    }.items():
        if score(metrics, name) > 0:
            parts += [Number(", "), _ratio(metrics, name, 0)]
            if far:
                parts += [Number(" and "), _ratio(metrics, name, last), Number(f" times those {what}")]
            else:
                parts += [Number(" times the "), _score_number(metrics, name, 0)]
                parts.append(Number(f" {what}"))
            break
    return [*parts, Number(".")]


def _score_number(metrics: RunMetrics, name: str, step: int) -> Number:
    """Return the Energy Score of a forecast at a horizon step, with as many decimals as it needs."""
    return number_at(metrics, f"forecasts.{name}.energy_score.{step}", digits_for([score(metrics, name, step)]))


def _ratio(metrics: RunMetrics, name: str, step: int) -> Number:
    """Return the model's score divided by that of a forecast: from the file if possible, otherwise computed."""
    stated = number_at(metrics, f"forecasts.model.ratio_to_oracle.{step}", 2)
    if name == "simulator_oracle" and stated.text != DASH:
        return stated
    reference = score(metrics, name, step)
    return Number(number(score(metrics, "model", step) / reference if reference else math.nan, 2))


def planning_sentence(metrics: RunMetrics) -> list[Number]:
    """Return the success rate with its interval, and that of random actions; nothing without planning."""
    success, chance = (number_at(metrics, f"planning.{key}success_rate") for key in ("", "random_floor."))
    if success.text == DASH:
        return []
    interval = between(numbers_at(metrics, "planning.ci95"), " to ")
    parts = [
        Number(f"{_planned_earlier(metrics)}Plans reach "),
        success,
        Number(" of their goals (95% interval "),
        *interval,
        Number(")"),
    ]
    if chance.text != DASH:
        parts += [Number(", random actions "), chance]
    return [*parts, Number(".")]


def _planned_earlier(metrics: RunMetrics) -> str:
    """Return words about the updates that planning is of, if the scores are of others; otherwise nothing."""
    planned, scored = value_at(metrics, "planning.protocol.step"), num_updates(metrics)
    if not isinstance(planned, int) or scored is None or planned == scored:
        return ""
    return f"At step {planned:,} (the scores are of step {scored:,}): "


def num_updates(metrics: RunMetrics) -> int | None:
    """Return the updates of training and refinement that the scores are of; None if they are not known."""
    of_training, of_refinement = (value_at(metrics, f"train.{name}") for name in ("steps", "refine_steps"))
    return None if of_training is None else of_training + (of_refinement or 0)


def _training_label(metrics: RunMetrics) -> str:
    refined = value_at(metrics, "train.refine_steps")
    more = f" and {number(refined)} of refinement" if refined else ""
    return f"of training, {number(value_at(metrics, 'train.steps'))} steps{more}"


def tiles(metrics: RunMetrics) -> list[tuple[str, list[Number]]]:
    """Return the numbers at the top of the page as label and parts; missing numbers are left out."""
    last = horizon(metrics) - 1
    folder = "forecasts.model"
    steps = [0, last] if last else [0]
    ahead = f", horizons 1 and {last + 1}" if last else ""
    found: list[tuple[str, list[Number]]] = [
        (
            f"Energy Score, {unit(metrics)}" + (f", horizon {step + 1}" if last else ""),
            [_score_number(metrics, "model", step)],
        )
        for step in steps
    ]
    ratios = [number_at(metrics, f"{folder}.ratio_to_oracle.{step}", 2) for step in steps]
    found.append((f"times the oracle's{ahead}", between(ratios, " → ")))
    found.append(_coverage_tile(metrics, last))
    found += [
        ("KL, nats", [number_at(metrics, "kl_nats", 2)]),
        (_training_label(metrics), [Number(duration(value_at(metrics, "train.seconds")))]),
        ("held-out queries", [number_at(metrics, "queries")]),
        ("of goals reached by planning", [number_at(metrics, "planning.success_rate")]),
    ]
    return [(name, parts) for name, parts in found if parts and all(part.text != DASH for part in parts)]


def _coverage_tile(metrics: RunMetrics, last: int) -> tuple[str, list[Number]]:
    """Return the coverage of the 90% intervals: of each dimension, or its range over the horizon."""
    folder = "forecasts.model.coverage.90"
    if not last:
        cell = numbers_at(metrics, f"{folder}.0", 2)
        return f"covered by 90% intervals{dimensions(metrics)}", between(cell, " / ")
    every = [
        part for step in range(last + 1) for part in numbers_at(metrics, f"{folder}.{step}", 2) if part.text != DASH
    ]
    every.sort(key=lambda part: value_at(metrics, part.path))
    return "covered by 90% intervals over the horizon", between([every[0], every[-1]], " – ") if every else []


def facts(metrics: RunMetrics) -> list[tuple[str, list[Number]]]:
    """Return facts about the embedding and the readout, as label and numbers."""
    given = {"embedding": mapping(metrics.get("embedding")), "readout": mapping(metrics.get("readout"))}
    found = [
        (label(key), between(numbers_at(metrics, f"{part}.{key}"), " / ")) for part, key in FACTS if key in given[part]
    ]
    beyond = numbers_at(metrics, "beyond_fit_norm_99")
    if len(beyond) > 1:
        found.append(
            (f"{label('beyond_fit_norm_99')}, horizons 1 → {len(beyond)}", between(beyond[:: len(beyond) - 1], " → "))
        )
    elif "beyond_fit_norm_99" in metrics:
        found.append((label("beyond_fit_norm_99"), beyond))
    return found


def decoder_facts(metrics: RunMetrics) -> list[tuple[str, list[Number]]]:
    """Return the mean squared errors of the decoder and of simple pictures, as label and number."""
    return [(name, numbers_at(metrics, f"decoder.{key}", 5)) for key, name in DECODER_ERRORS.items()]


def protocol_facts(metrics: RunMetrics) -> list[tuple[str, str]]:
    """Return every value of the planning protocol by its dotted name."""

    def leaves(value: Any, name: str) -> list[tuple[str, str]]:
        if isinstance(value, Mapping) and value:
            return [leaf for key, part in value.items() for leaf in leaves(part, f"{name}.{key}")]
        if value is None or value == {}:
            return [(name, DASH)]
        return [(name, f"{value:g}" if isinstance(value, float) else str(value))]

    protocol = mapping(value_at(metrics, "planning.protocol"))
    return [leaf for key, value in protocol.items() for leaf in leaves(value, str(key))]
