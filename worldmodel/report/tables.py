"""The numbers of metrics.json for people: text with its place in the file, Markdown tables, and the tables of a page.

Metrics may lack any part: what is missing is left out or shown as a dash.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipelines.errors import printable

DASH = "–"

# In the order of the table: label, what it is.
FORECASTS = {
    "model": ("This run", "Futures from draws of the latent's prior."),
    "prior_mean": (
        "Prior mean",
        "The same model with the latent fixed at its prior's mean: one future, not many.",
    ),
    "shuffled_r": ("Shuffled r", "The same model with the latents of other queries: what r adds beyond its spread."),
    "no_latent": ("No latent", "The compared run, trained without a latent: one forecast for each query."),
    "pixel_constant_velocity": (
        "Constant velocity",
        "The motion measured in the context's pixels goes on unchanged.",
    ),
    "persistence": (
        "Persistence",
        "Nothing changes: the context's embedding is read as if it were the target's.",
    ),
    "climatology": (
        "Climatology",
        "Real futures of other clips: what can be said without seeing this one's context.",
    ),
    "encode_decode_oracle": (
        "Encode-decode oracle",
        "True futures, rendered, encoded and read: what the encoder and the readout allow.",
    ),
    "simulator_oracle": ("Simulator oracle", "Draws of the true law. Nothing is expected to score lower."),
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
    "few_shot_1": "1 shot",
    "few_shot_5": "5 shots",
    "few_shot_10": "10 shots",
    "mrr": "MRR",
    "hit_1": "hit@1",
    "hit_5": "hit@5",
    "hit_10": "hit@10",
}


@dataclass(frozen=True)
class Number:
    """A number as text, and its dotted path in metrics.json, list indices included; no path where it is not there."""

    text: str
    path: str = ""


Cell = Sequence[Number]  # of several dimensions


@dataclass(frozen=True)
class Row:
    label: str
    cells: Sequence[Cell]
    kind: str = ""  # "model", "oracle" or nothing
    best: bool = False
    bar_percent: float | None = None


@dataclass(frozen=True)
class Table:
    """`columns` are (group, title): columns of one group stand below one heading."""

    columns: Sequence[tuple[str, str]]
    rows: Sequence[Row]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The headings of groups and how many columns each spans."""
        spans: list[tuple[str, int]] = []
        for group, _ in self.columns:
            if spans and spans[-1][0] == group:
                spans[-1] = (group, spans[-1][1] + 1)
            else:
                spans.append((group, 1))
        return spans


# ------------------------------------------------------------------------------------------------------- numbers


def number(value: Any, digits: int = 3) -> str:
    """`value` for people: floats to `digits` decimals, sequences joined by ' / ', a dash for None and NaN."""
    if isinstance(value, list | tuple | np.ndarray):
        return " / ".join(number(v, digits) for v in value) if len(value) else DASH
    if value is None or (isinstance(value, float | np.floating) and not math.isfinite(value)):
        return DASH
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    return f"{float(value):.{digits}f}"


def duration(seconds: Any) -> str:
    """Seconds as '3 min 31 s'; a dash when missing."""
    if number(seconds) == DASH:
        return DASH
    minutes, rest = divmod(round(float(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def value_at(metrics: Any, path: str) -> Any:
    """What stands at a dotted path, such as 'forecasts.model.energy_score.0'; None where there is nothing."""
    for key in path.split("."):
        if isinstance(metrics, Mapping):
            metrics = metrics.get(key)
        elif isinstance(metrics, list | tuple) and re.fullmatch(r"[0-9]{1,9}", key) and int(key) < len(metrics):
            metrics = metrics[int(key)]
        else:
            return None
    return metrics


def numbers_at(metrics: Any, path: str, digits: int = 3) -> list[Number]:
    """The number at a path, or those of the list that stands there; a dash for what is missing."""
    value = value_at(metrics, path)
    if isinstance(value, list | tuple) and value:
        return [number_at(metrics, f"{path}.{i}", digits) for i in range(len(value))]
    return [number_at(metrics, path, digits)]


def number_at(metrics: Any, path: str, digits: int = 3) -> Number:
    value = value_at(metrics, path)
    text = DASH if isinstance(value, Mapping | list | tuple) else number(value, digits)
    return Number(text, path if isinstance(value, int | float) and text != DASH else "")


def series(metrics: Any, path: str) -> np.ndarray:
    """[H] the list at a path as floats, NaN where missing; lists in it, one number a dimension, count by their mean."""
    values = value_at(metrics, path)
    return np.array([_mean(value) for value in values] if isinstance(values, list | tuple) else [], dtype=float)


def _mean(value: Any) -> float:
    finite = [float(v) for v in (value if isinstance(value, list | tuple) else [value]) if number(v) != DASH]
    return sum(finite) / len(finite) if finite else math.nan


def text_of(cell: Cell) -> str:
    return " / ".join(part.text for part in cell)


# ------------------------------------------------------------------------------------------------- what there is


def horizon(metrics: Mapping[str, Any]) -> int:
    """The number of horizon steps."""
    stated = metrics.get("horizon")
    return stated if isinstance(stated, int) else max(1, len(series(metrics, "forecasts.model.energy_score")))


def marked_steps(num_steps: int) -> list[int]:
    """Indices of the first horizon step, a middle one and the last."""
    return sorted({0, (num_steps - 1) // 2, num_steps - 1})


def unit(metrics: Mapping[str, Any]) -> str:
    """'px', the quantity's name where it has no unit, or 'embedding space' where forecasts are of no quantity."""
    quantity = mapping(metrics.get("quantity"))
    return str(quantity.get("unit") or quantity.get("name") or "embedding space")


def dimensions(metrics: Mapping[str, Any]) -> str:
    """' x / y', to say what the numbers of several dimensions are; nothing where there are not several."""
    names = mapping(metrics.get("quantity")).get("dimensions") or []
    return " " + " / ".join(map(str, names)) if len(names) > 1 else ""


def forecast_names(metrics: Mapping[str, Any], folder: str = "forecasts") -> list[str]:
    """The forecasts of `metrics` in the order of the table; names we do not know come before the oracles."""
    given = mapping(value_at(metrics, folder))
    known = [name for name in FORECASTS if name in given]
    return [
        *(name for name in known if name not in ORACLES),
        *(name for name in given if name not in FORECASTS),
        *(name for name in known if name in ORACLES),
    ]


def label(name: str) -> str:
    return FORECASTS[name][0] if name in FORECASTS else LABELS.get(name, name.replace("_", " ").capitalize())


def score(metrics: Mapping[str, Any], name: str, step: int = 0, folder: str = "forecasts") -> float:
    """The Energy Score of a forecast at a horizon step; NaN where there is none."""
    scores = series(metrics, f"{folder}.{name}.energy_score")
    return float(scores[step]) if -len(scores) <= step < len(scores) else math.nan


def best_forecast(metrics: Mapping[str, Any], folder: str = "forecasts") -> str | None:
    """The name with the lowest mean score over the horizon among what could be forecast; the oracles know the law."""
    means = {
        name: float(series(metrics, f"{folder}.{name}.energy_score").mean())
        for name in forecast_names(metrics, folder)
        if name not in ORACLES and len(series(metrics, f"{folder}.{name}.energy_score"))
    }
    finite = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    return min(finite, key=lambda name: finite[name]) if finite else None


# ------------------------------------------------------------------------------------------------------ Markdown


def aligned_table(rows: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """A Markdown table, also for a console: the first row is its head, the first `num_left` columns are words."""
    rows = [[printable(text).replace("|", "\\|") for text in row] for row in rows]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    rule = ["-" * width if i < num_left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [
        [
            text.ljust(width) if i < num_left else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in [rows[0], rule, *rows[1:]]
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_table(metrics: Mapping[str, Any]) -> str:
    """The forecasts of `metrics`, the best in bold: one table, or over a horizon one for each kind of score."""
    steps = range(horizon(metrics))
    kinds = {
        f"Energy Score, {unit(metrics)}": ("energy_score", 3),
        "x oracle": ("ratio_to_oracle", 2),
        f"90% coverage{dimensions(metrics)}": ("coverage.90", 2),
    }
    names, best = forecast_names(metrics), best_forecast(metrics)
    cells = {
        title: {
            name: [text_of(numbers_at(metrics, f"forecasts.{name}.{key}.{step}", digits)) for step in steps]
            for name in names
        }
        for title, (key, digits) in kinds.items()
    }
    for title, (key, _) in kinds.items():
        if key == "energy_score" and best is not None:
            cells[title][best] = [f"**{text}**" for text in cells[title][best]]
    labels = {name: label(name) for name in names}
    if len(steps) == 1 or not names:
        return aligned_table(
            [["forecast", *kinds], *([labels[name], *(cells[title][name][0] for title in kinds)] for name in names)]
        )
    tables = []
    for title, by_name in cells.items():
        rows = [[labels[name], *texts] for name, texts in by_name.items() if set(texts) != {DASH}]
        if rows:
            tables.append(aligned_table([[title, *(f"h = {step + 1}" for step in steps)], *rows]))
    return "\n\n".join(tables)


# ---------------------------------------------------------------------------------------------------------- page


def headline(metrics: Mapping[str, Any]) -> list[Number]:
    """The message in parts: the score, and what it is relative to the oracle, or without one to a plain forecast; and
    how often planning reaches its goals, where that was asked."""
    sentences = [part for part in (_forecast_sentence(metrics), planning_sentence(metrics)) if part]
    return _joined(sentences, " ") or [Number("This run has no forecast score.")]


def _joined(groups: Sequence[Sequence[Number]], word: str) -> list[Number]:
    """The parts of all groups with a word between one group and the next."""
    return [part for i, group in enumerate(groups) for part in ([Number(word)] if i else []) + list(group)]


def _forecast_sentence(metrics: Mapping[str, Any]) -> list[Number]:
    if not math.isfinite(score(metrics, "model")):
        return []
    last = horizon(metrics) - 1
    far = last > 0 and math.isfinite(score(metrics, "model", last))
    space = "in embedding space" if unit(metrics) == "embedding space" else unit(metrics)
    parts = [Number("Forecasts reach an Energy Score of "), number_at(metrics, "forecasts.model.energy_score.0")]
    parts.append(Number(f" {space}"))
    if far:
        parts += [
            Number(" at horizon 1 and "),
            number_at(metrics, f"forecasts.model.energy_score.{last}"),
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
                parts += [Number(" times the "), number_at(metrics, f"forecasts.{name}.energy_score.0")]
                parts.append(Number(f" {what}"))
            break
    return [*parts, Number(".")]


def _ratio(metrics: Mapping[str, Any], name: str, step: int) -> Number:
    """The model's score over that of forecast `name`: from the file where it is there, else worked out."""
    stated = number_at(metrics, f"forecasts.model.ratio_to_oracle.{step}", 2)
    if name == "simulator_oracle" and stated.text != DASH:
        return stated
    reference = score(metrics, name, step)
    return Number(number(score(metrics, "model", step) / reference if reference else math.nan, 2))


def tiles(metrics: Mapping[str, Any]) -> list[tuple[str, list[Number]]]:
    """The few numbers at the top of the page, as label and parts; those that are missing are left out."""
    last = horizon(metrics) - 1
    folder = "forecasts.model"
    steps = [0, last] if last else [0]
    ahead = f", horizons 1 and {last + 1}" if last else ""
    found: list[tuple[str, list[Number]]] = [
        (
            f"Energy Score, {unit(metrics)}" + (f", horizon {step + 1}" if last else ""),
            [number_at(metrics, f"{folder}.energy_score.{step}")],
        )
        for step in steps
    ]
    ratios = [number_at(metrics, f"{folder}.ratio_to_oracle.{step}", 2) for step in steps]
    found.append((f"times the oracle's{ahead}", _between(ratios, " → ")))
    found.append(_coverage_tile(metrics, last))
    found += [
        ("KL, nats", [number_at(metrics, "kl_nats", 2)]),
        (
            f"of training, {number(value_at(metrics, 'train.steps'))} steps",
            [Number(duration(value_at(metrics, "train.seconds")))],
        ),
        ("held-out queries", [number_at(metrics, "queries")]),
        ("of goals reached by planning", [number_at(metrics, "planning.success_rate")]),
    ]
    return [(name, parts) for name, parts in found if parts and all(part.text != DASH for part in parts)]


def _coverage_tile(metrics: Mapping[str, Any], last: int) -> tuple[str, list[Number]]:
    """Coverage of the 90% intervals: of each dimension, or over a horizon the least and the most."""
    folder = "forecasts.model.coverage.90"
    if not last:
        cell = numbers_at(metrics, f"{folder}.0", 2)
        return f"covered by 90% intervals{dimensions(metrics)}", _between(cell, " / ")
    every = [
        part for step in range(last + 1) for part in numbers_at(metrics, f"{folder}.{step}", 2) if part.text != DASH
    ]
    every.sort(key=lambda part: value_at(metrics, part.path))
    return "covered by 90% intervals over the horizon", _between([every[0], every[-1]], " – ") if every else []


def _between(parts: Sequence[Number], word: str) -> list[Number]:
    """The parts with a word between them."""
    return _joined([[part] for part in parts], word)


def score_table(metrics: Mapping[str, Any], folder: str = "forecasts") -> Table:
    """A row a forecast: Energy Score, ratio to the oracle, coverage, at the marked horizon steps."""
    last = horizon(metrics) - 1
    space = "embedding space" if folder.startswith("embedding") else unit(metrics)
    names_of_dimensions = "" if folder.startswith("embedding") else dimensions(metrics)
    wanted = [(f"Energy Score, {space}", "energy_score", 3, marked_steps(last + 1))]
    wanted += [("× oracle", "ratio_to_oracle", 2, marked_steps(last + 1))]
    wanted += [(f"90% coverage{names_of_dimensions}", "coverage.90", 2, sorted({0, last}))]
    if not last:
        wanted += [(f"90% width{names_of_dimensions}", "width.90", 2, [0])]
    columns = [
        (title, f"h = {step + 1}" if last else "", f"{key}.{step}", digits)
        for title, key, digits, steps in wanted
        for step in steps
    ]
    names, best = forecast_names(metrics, folder), best_forecast(metrics, folder)
    longest = max((s for name in names if math.isfinite(s := score(metrics, name, 0, folder))), default=0.0)
    return _table(
        [(group, title) for group, title, _, _ in columns],
        [
            Row(
                label(name),
                [numbers_at(metrics, f"{folder}.{name}.{key}", digits) for _, _, key, digits in columns],
                kind="model" if name == "model" else "oracle" if name in ORACLES else "",
                best=name == best,
                bar_percent=None if last or not longest else _percent(score(metrics, name, 0, folder), longest),
            )
            for name in names
        ],
    )


def _percent(part: float, whole: float) -> float:
    return round(max(0.0, 100 * part / whole), 1) if math.isfinite(part) else 0.0


def retrieval_table(metrics: Mapping[str, Any]) -> Table:
    """MRR and hits of the real future among distractors, for each forecast at the marked horizon steps."""
    folder = "embedding.retrieval.forecasts"
    steps = marked_steps(horizon(metrics))
    columns = [(key, step) for key in ("mrr", "hit_1", "hit_5", "hit_10") for step in steps]
    return _table(
        [(label(key), f"h = {step + 1}" if len(steps) > 1 else "") for key, step in columns],
        [
            Row(
                label(name),
                [numbers_at(metrics, f"{folder}.{name}.{key}.{step}", 2) for key, step in columns],
                kind="model" if name == "model" else "",
            )
            for name in forecast_names(metrics, folder)
        ],
    )


PROBES = ("linear", "knn", "mlp", "few_shot_1", "few_shot_5", "few_shot_10")


def probe_tables(metrics: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """For each target a title and a table of representations against probes."""
    probes = {name: mapping(targets) for name, targets in mapping(metrics.get("probes")).items()}
    targets = dict.fromkeys(target for by_target in probes.values() for target in by_target)
    return [
        (
            label(target),
            _table(
                [("", label(probe)) for probe in PROBES],
                [
                    Row(label(name), [numbers_at(metrics, f"probes.{name}.{target}.{probe}") for probe in PROBES])
                    for name, by_target in probes.items()
                    if target in by_target
                ],
            ),
        )
        for target in targets
    ]


def _table(columns: Sequence[tuple[str, str]], rows: Sequence[Row]) -> Table:
    """The table without columns and rows that have no number."""
    kept = [i for i in range(len(columns)) if any(text_of(row.cells[i]) != DASH for row in rows)]
    return Table(
        [columns[i] for i in kept],
        [
            Row(row.label, [row.cells[i] for i in kept], row.kind, row.best, row.bar_percent)
            for row in rows
            if any(text_of(cell) != DASH for cell in row.cells)
        ],
    )


def facts(metrics: Mapping[str, Any]) -> list[tuple[str, list[Number]]]:
    """What is known about the embedding and the readout, as label and numbers."""
    found = [
        (label(key), _between(numbers_at(metrics, f"{folder}.{key}"), " / "))
        for folder in ("embedding", "readout")
        for key, value in mapping(metrics.get(folder)).items()
        if not isinstance(value, Mapping)
    ]
    beyond = numbers_at(metrics, "beyond_fit_norm_99")
    if len(beyond) > 1:
        found.append(
            (f"{label('beyond_fit_norm_99')}, horizons 1 → {len(beyond)}", _between(beyond[:: len(beyond) - 1], " → "))
        )
    elif "beyond_fit_norm_99" in metrics:
        found.append((label("beyond_fit_norm_99"), beyond))
    return found


# ------------------------------------------------------------------------------------------------------ planning


def planning_sentence(metrics: Mapping[str, Any]) -> list[Number]:
    """How often goals are reached, with the interval, and by chance; nothing where no planning was evaluated."""
    success, chance = (number_at(metrics, f"planning.{key}success_rate") for key in ("", "random_floor."))
    if success.text == DASH:
        return []
    interval = _between(numbers_at(metrics, "planning.ci95"), " to ")
    parts = [Number("Plans reach "), success, Number(" of their goals (95% interval "), *interval, Number(")")]
    if chance.text != DASH:
        parts += [Number(", random actions "), chance]
    return [*parts, Number(".")]


def planning_table(metrics: Mapping[str, Any]) -> Table:
    """A row for the run, or for each count of labels; then the floor and the ceiling."""
    curve = value_at(metrics, "planning.curve") or []
    rows = [
        *((_with_labels(entry.get("labels")), f"planning.curve.{i}", "") for i, entry in enumerate(curve[:-1])),
        (_with_labels(value_at(metrics, "planning.protocol.labels")), "planning", "model"),
        ("Random actions", "planning.random_floor", ""),
        ("Privileged planner", "planning.oracle_ceiling", "oracle"),
    ]
    columns = [
        ("", "Success", "success_rate", 3),
        ("95% interval", "from", "ci95.0", 3),
        ("95% interval", "to", "ci95.1", 3),
        ("", "Path ratio", "path_ratio", 2),
        ("", "Steps", "steps", 1),
        ("", "ms a decision", "ms_per_decision", 2),
        ("", "Success of each seed", "per_seed", 2),
    ]
    return _table(
        [(group, title) for group, title, _, _ in columns],
        [
            Row(name, [numbers_at(metrics, f"{folder}.{key}", digits) for _, _, key, digits in columns], kind)
            for name, folder, kind in rows
        ],
    )


def _with_labels(count: Any) -> str:
    return "This run" if count is None else f"This run, {number(count)} labels"


def protocol_facts(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Everything in the planning's protocol, by its dotted name."""

    def leaves(value: Any, name: str) -> list[tuple[str, str]]:
        if isinstance(value, Mapping) and value:
            return [leaf for key, part in value.items() for leaf in leaves(part, f"{name}.{key}")]
        if value is None or value == {}:
            return [(name, DASH)]
        return [(name, f"{value:g}" if isinstance(value, float) else str(value))]

    protocol = mapping(value_at(metrics, "planning.protocol"))
    return [leaf for key, value in protocol.items() for leaf in leaves(value, str(key))]
