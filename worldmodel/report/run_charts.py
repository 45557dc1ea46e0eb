"""Charts of a run's scores and learning curves, each with a title and a hint for the reader."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from worldmodel.report import charts, numbers
from worldmodel.report.charts import Line
from worldmodel.report.drawing import Picture
from worldmodel.report.page import CURVES, HORIZON_LABEL, LEVELS, Card, history_series, line_words
from worldmodel.runs.metrics import RunMetrics, value_at
from worldmodel.runs.planning_metrics import FactorValue, Planning, VariedValue


def forecast_lines(metrics: RunMetrics, key: str, folder: str = "forecasts") -> list[Line]:
    """Return a line for each forecast with the score `key` at two or more horizon steps."""
    lines = [
        charts.forecast_line(name, numbers.label(name), numbers.series(metrics, f"{folder}.{name}.{key}"))
        for name in numbers.forecast_names(metrics, folder)
    ]
    return [line for line in lines if np.isfinite(line.values).sum() > 1]


def horizon_cards(metrics: RunMetrics) -> list[Card]:
    """Return a chart of each score over the horizon; none for a single step."""
    unit, last = numbers.unit(metrics), numbers.horizon(metrics)
    floor = "The simulator oracle is the floor." if "simulator_oracle" in numbers.forecast_names(metrics) else ""
    cards = []
    for title, key, ylabel, hint, levels in (
        ("Energy Score", "energy_score", unit, floor, ()),
        (
            "Energy Score over the oracle's",
            "ratio_to_oracle",
            "× oracle",
            "Zoomed in on the run: worse forecasts may lie above.",
            (1,),
        ),
        ("CRPS", "crps", unit, "Mean over the dimensions of the CRPS of each.", ()),
        ("Best sample", "best_of", unit, "Error of the best sampled future.", ()),
        ("Spread over skill", "spread_skill", "ratio", "1 is calibrated, below 1 is overconfident.", (1,)),
    ):
        lines = forecast_lines(metrics, key)
        if not lines:
            continue
        ylim: tuple[float | None, float | None] = (None, None)
        if key == "ratio_to_oracle":
            model = next((line.values for line in lines if line.colour == "model"), lines[0].values)
            ylim = (min(0.95, float(np.nanmin(model)) - 0.05), 1 + 2.2 * max(0.1, float(np.nanmax(model)) - 1))
        elif key != "spread_skill":
            ylim = (0, None)
        alt = f"{title} from horizon 1 to {last}: {line_words(lines)}."
        picture = charts.horizon_chart(lines, ylabel=ylabel, xlabel=HORIZON_LABEL, alt=alt, levels=levels, ylim=ylim)
        cards.append(Card(title, hint, picture))
    return cards


def coverage(metrics: RunMetrics, level: int) -> np.ndarray:
    """Return the share of true outcomes within the central interval per horizon step, averaged over dimensions."""
    return numbers.series(metrics, f"forecasts.model.coverage.{level}")


def calibration_curves(metrics: RunMetrics) -> list[tuple[str, list[float], list[float]]]:
    """Return the name, nominal and empirical levels at the marked horizon steps."""
    num_steps = numbers.horizon(metrics)
    curves = []
    for step in numbers.marked_steps(num_steps):
        points = [
            (level / 100, float(values[step]))
            for level in LEVELS
            if len(values := coverage(metrics, level)) > step and math.isfinite(values[step])
        ]
        if points:
            curves.append((f"h = {step + 1}", [x for x, _ in points], [y for _, y in points]))
    return curves


def rank_histograms(metrics: RunMetrics) -> list[tuple[str, np.ndarray]]:
    """Return the name and the shares of the model's ranks at the first and the last horizon step."""
    every = value_at(metrics, "forecasts.model.rank_histogram")
    if not isinstance(every, list) or not every:
        return []
    steps = sorted({0, len(every) - 1})
    found = [(f"h = {step + 1}" if len(steps) > 1 else "", np.array(every[step] or [], dtype=float)) for step in steps]
    return [(name, shares) for name, shares in found if len(shares) and np.isfinite(shares).all()]


def calibration_cards(metrics: RunMetrics) -> list[Card]:
    """Return the charts of coverage over the horizon, the calibration curve and the rank histogram."""
    found = (_coverage_card(metrics), _calibration_card(metrics), _rank_card(metrics))
    return [card for card in found if card is not None]


def _coverage_card(metrics: RunMetrics) -> Card | None:
    lines = [
        Line(f"{level}%", values, colour, width=2)
        for level, colour in zip(LEVELS, ("sky", "teal", "model"), strict=True)
        if np.isfinite(values := coverage(metrics, level)).sum() > 1
    ]
    if not lines:
        return None
    picture = charts.horizon_chart(
        lines,
        ylabel="share within",
        xlabel=HORIZON_LABEL,
        alt=f"Share of true outcomes within central intervals, from horizon 1 to the last: {line_words(lines)}.",
        levels=[level / 100 for level in LEVELS],
        ylim=(0, 1.02),
    )
    return Card("Coverage", "Dashed: the nominal levels of the intervals.", picture)


def _calibration_card(metrics: RunMetrics) -> Card | None:
    curves = calibration_curves(metrics)
    if not curves:
        return None
    words = "; ".join(
        f"{name}: " + ", ".join(f"{x:.0%} intervals cover {y:.0%}" for x, y in zip(nominal, empirical, strict=True))
        for name, nominal, empirical in curves
    )
    picture = charts.calibration_chart(curves, f"Calibration curve. {words}.")
    return Card("Calibration", "Below the diagonal is overconfident.", picture)


def _rank_card(metrics: RunMetrics) -> Card | None:
    histograms = rank_histograms(metrics)
    if not histograms:
        return None
    words = "; ".join(
        f"{name or 'one step'}: lowest bin {shares[0]:.3f}, highest {shares[-1]:.3f}, flat is {1 / len(shares):.3f}"
        for name, shares in histograms
    )
    picture = charts.rank_chart(histograms, f"Ranks of the truth among the samples. {words}.")
    return Card("Ranks of the truth", "Flat is calibrated, a valley overconfident, a hill underconfident.", picture)


def retrieval_chart(metrics: RunMetrics) -> Picture | None:
    """Return the mean reciprocal rank over the horizon; None for a single step."""
    lines = forecast_lines(metrics, "mrr", "embedding.retrieval.forecasts")
    if not lines:
        return None
    return charts.horizon_chart(
        lines,
        ylabel="MRR",
        xlabel=HORIZON_LABEL,
        alt=f"Mean reciprocal rank of the real future, from horizon 1 to the last: {line_words(lines)}.",
        ylim=(0, None),
    )


def labels_chart(metrics: RunMetrics) -> Picture | None:
    """Return success against the number of labels; None for a single number."""
    planning = metrics.get("planning") or Planning()
    curve = planning.get("curve") or []
    if len(curve) < 2:
        return None
    points = [(entry["labels"], entry["success_rate"], *entry["ci95"]) for entry in curve]
    levels = _levels(metrics, random="random_floor", privileged="oracle_ceiling")
    words = "; ".join(f"{n:,} labels {rate:.3f} ({low:.3f} to {high:.3f})" for n, rate, low, high in points)
    alt = f"Success against labels, with 95% intervals: {words}.{_level_words(levels)}"
    ticks = [f"{n:,}" for n, *_ in points]
    return charts.interval_chart(points, ticks, levels, xlabel="labelled transitions", alt=alt, scale="log")


def factor_cards(metrics: RunMetrics) -> list[Card]:
    """Return a chart of success against the values of each factor of variation, the undisturbed one included."""
    cards = []
    levels = _levels(metrics, random="random_floor")
    planning = metrics.get("planning") or Planning()
    for varied in planning.get("factors") or []:
        entries, present = varied["values"], varied["present"]
        if all(entry["value"] != present for entry in entries):
            undisturbed = VariedValue(value=present, success_rate=planning.get("success_rate"))
            undisturbed["ci95"] = planning.get("ci95") or [None, None]
            entries = [undisturbed, *entries]
        rated = _rated(entries)
        if not rated:
            continue
        ticks = [numbers.factor_text(value) for value, *_ in rated]
        places = [float(value) for value, *_ in rated if not isinstance(value, str)]
        is_scale = len(places) == len(rated)
        if not is_scale:
            places = [float(place) for place in range(len(rated))]
        points = [(place, rate, low, high) for place, (_, rate, low, high) in zip(places, rated, strict=True)]
        words = "; ".join(
            f"{tick} {rate:.3f} ({low:.3f} to {high:.3f})"
            for tick, (_, rate, low, high) in zip(ticks, points, strict=True)
        )
        alt = f"Success against {varied['factor']}, with 95% intervals: {words}.{_level_words(levels)}"
        picture = charts.interval_chart(
            points, ticks, levels, xlabel=varied["factor"], alt=alt, scale="linear" if is_scale else "names"
        )
        cards.append(Card(numbers.label(varied["factor"]), f"Undisturbed: {numbers.factor_text(present)}.", picture))
    return cards


def _rated(entries: Sequence[VariedValue]) -> list[tuple[FactorValue, float, float, float]]:
    """Return the value, success and its interval of each entry that has them."""
    rated = []
    for entry in entries:
        rate, (low, high) = entry.get("success_rate"), entry.get("ci95") or (None, None)
        if rate is not None and low is not None and high is not None:
            rated.append((entry["value"], rate, low, high))
    return rated


def _levels(metrics: RunMetrics, **keys: str) -> dict[str, float]:
    """Return the success of policies beside the run, by name; `keys` are their places in planning.json."""
    return {
        name: value
        for name, key in keys.items()
        if isinstance(value := value_at(metrics, f"planning.{key}.success_rate"), int | float)
    }


def _level_words(levels: Mapping[str, float]) -> str:
    return "".join(f" {name.capitalize()}: {level:.3f}." for name, level in levels.items())


CURVE_SPLITS: Sequence[tuple[str, str, Literal["train", "selection"]]] = (
    ("training", "model", "train"),
    ("evaluation", "truth", "selection"),
)
"""The names, the colours and the rows of curves."""


def curve_pictures(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, Picture]]:
    """Return a title and a chart for each curve in `history`."""
    pictures = []
    for key, title in CURVES.items():
        found = [(name, colour, *history_series(history, key, split)) for name, colour, split in CURVE_SPLITS]
        drawn = [(Line(name, values, colour), steps) for name, colour, steps, values in found if len(steps)]
        if drawn:
            last, steps = drawn[-1]
            value = numbers.number(last.values[-1], numbers.digits_for([last.values[-1]]))
            alt = f"{title} against training step; {value} at step {steps[-1]:,}, the last one drawn."
            pictures.append((title, charts.curve_chart(drawn, alt)))
    return pictures
