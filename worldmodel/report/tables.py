"""Tables of a run: Markdown for a console, and the tables of its page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_pipelines.errors import printable
from worldmodel.report.numbers import (
    DASH,
    FORECASTS,
    ORACLES,
    Number,
    Numbers,
    best_at,
    digits_for,
    dimensions,
    factor_text,
    forecast_names,
    horizon,
    interval_words,
    label,
    mapping,
    marked_steps,
    number,
    number_at,
    numbers_at,
    score,
    text_of,
    unit,
)
from worldmodel.runs.metrics import OWN_FORECASTS, Metrics, RunMetrics, value_at
from worldmodel.runs.planning_metrics import Planning

NOT_OF_CURVE = ("path_ratio", "steps")  # points of the curve of planning lack these
LOWER_IS_BETTER = ("energy_score", "ratio_to_oracle")
WITH_UNIT = ("energy_score", "width")
PROBES = ("linear", "knn", "mlp", "few_shot_1", "few_shot_5", "few_shot_10")


@dataclass(frozen=True)
class TableRow:
    """A row with its cells; `kind` is "model", "oracle" or empty. The bar shows the score of a single horizon step.

    best: the numbers of the cells that are the best of their column.
    """

    label: str
    cells: Sequence[Numbers]
    kind: str = ""
    best: frozenset[int] = frozenset()
    bar_percent: float | None = None


@dataclass(frozen=True)
class Table:
    """Columns are (group, title); columns of one group share a heading."""

    columns: Sequence[tuple[str, str]]
    rows: Sequence[TableRow]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Return the headings of groups and the number of columns that each spans."""
        spans: list[tuple[str, int]] = []
        for group, _ in self.columns:
            if spans and spans[-1][0] == group:
                spans[-1] = (group, spans[-1][1] + 1)
            else:
                spans.append((group, 1))
        return spans


# ---------------------------------------------------------------------------------------------------------- Markdown


def aligned_table(rows: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """Format a Markdown table, also for a console.

    The first row is the head. The first `num_left` columns hold words and are aligned to the left.
    """
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


def markdown_table(metrics: Metrics) -> str:
    """Format the forecasts: one table, or one per score over a horizon of several steps, then the skill scores.

    The lowest Energy Score and ratio of each column are bold, without those of oracles. Coverage has no best: forecasts
    that know nothing cover as well.
    """
    steps = range(horizon(metrics))
    kinds = {
        f"Energy Score, {unit(metrics)}": ("energy_score", 3),
        "x oracle": ("ratio_to_oracle", 2),
        f"90% coverage{dimensions(metrics)}": ("coverage.90", 2),
    }
    names = forecast_names(metrics)
    cells = {
        title: {name: [_bold_if_best(metrics, name, f"{key}.{step}", digits) for step in steps] for name in names}
        for title, (key, digits) in kinds.items()
    }
    labels = {name: label(name) for name in names}
    if len(steps) == 1 or not names:
        rows = [[labels[name], *(cells[title][name][0] for title in kinds)] for name in names]
        return "\n\n".join([aligned_table([["forecast", *kinds], *rows]), *_skill_tables(metrics)])
    tables = []
    for title, by_name in cells.items():
        rows = [[labels[name], *texts] for name, texts in by_name.items() if set(texts) != {DASH}]
        if rows:
            tables.append(aligned_table([[title, *(f"h = {step + 1}" for step in steps)], *rows]))
    return "\n\n".join(tables + _skill_tables(metrics))


def column_digits(metrics: Metrics, key: str, digits: int, folder: str = "forecasts") -> int:
    """Return the decimals of a column of scores: `digits`, or more if the numbers have a unit and all are small."""
    if not key.startswith(WITH_UNIT):
        return digits
    return digits_for([value_at(metrics, f"{folder}.{name}.{key}") for name in forecast_names(metrics, folder)], digits)


def _bold_if_best(metrics: Metrics, name: str, key: str, digits: int) -> str:
    text = text_of(numbers_at(metrics, f"forecasts.{name}.{key}", column_digits(metrics, key, digits)))
    return f"**{text}**" if key.startswith(LOWER_IS_BETTER) and name in best_at(metrics, key) else text


def _skill_tables(metrics: Metrics) -> list[str]:
    """Return a table of the run's skill over each baseline with its interval, for each of the run's forecasts."""
    steps = range(horizon(metrics))
    tables = []
    for own in OWN_FORECASTS:
        rows = [
            [label(name), *(_skill_text(metrics, f"forecasts.{own}.skill.{name}", step) for step in steps)]
            for name in forecast_names(metrics, f"forecasts.{own}.skill")
        ]
        comma = "," if "," in label(own) else ""
        title = f"Skill of {label(own, inside=True)}{comma} over ({interval_words(metrics)})"
        if rows:
            tables.append(aligned_table([[title, *(f"h = {step + 1}" for step in steps)], *rows]))
    return tables


def _skill_text(metrics: Metrics, folder: str, step: int) -> str:
    value, low, high = (number_at(metrics, f"{folder}.{key}.{step}", 2).text for key in ("value", "low", "high"))
    return DASH if value == DASH else f"{value} ({low} to {high})"


# -------------------------------------------------------------------------------------------------------------- page


def explained(metrics: Metrics) -> list[tuple[str, str]]:
    """Return the label and an explanation of each forecast in the tables."""
    names = dict.fromkeys([*forecast_names(metrics), *forecast_names(metrics, "embedding.forecasts")])
    about = {name: FORECASTS[name] for name in names if name in FORECASTS}
    if "model" in about and metrics.get("num_samples") == 1:
        about["model"] = (about["model"][0], "One forecast per query: this run has no latent.")
    return list(about.values())


def score_table(metrics: Metrics, folder: str = "forecasts") -> Table:
    """Return a row per forecast: Energy Score, ratio to the oracle and coverage at the marked horizon steps."""
    last = horizon(metrics) - 1
    space = "embedding space" if folder.startswith("embedding") else unit(metrics)
    names_of_dimensions = "" if folder.startswith("embedding") else dimensions(metrics)
    wanted = [(f"Energy Score, {space}", "energy_score", 3, marked_steps(last + 1))]
    wanted += [("× oracle", "ratio_to_oracle", 2, marked_steps(last + 1))]
    wanted += [(f"90% coverage{names_of_dimensions}", "coverage.90", 2, sorted({0, last}))]
    if not last:
        wanted += [(f"90% width{names_of_dimensions}", "width.90", 2, [0])]
    columns = [
        (
            title,
            f"h = {step + 1}" if last else "",
            f"{key}.{step}",
            column_digits(metrics, f"{key}.{step}", digits, folder),
        )
        for title, key, digits, steps in wanted
        for step in steps
    ]
    names = forecast_names(metrics, folder)
    best = [
        best_at(metrics, key, folder) if key.startswith(LOWER_IS_BETTER) else frozenset() for _, _, key, _ in columns
    ]
    longest = max((s for name in names if math.isfinite(s := score(metrics, name, 0, folder))), default=0.0)
    return table_of_numbers(
        [(group, title) for group, title, _, _ in columns],
        [
            TableRow(
                label(name),
                [numbers_at(metrics, f"{folder}.{name}.{key}", digits) for _, _, key, digits in columns],
                kind="model" if name in OWN_FORECASTS else "oracle" if name in ORACLES else "",
                best=frozenset(i for i, best_names in enumerate(best) if name in best_names),
                bar_percent=None if last or not longest else _percent(score(metrics, name, 0, folder), longest),
            )
            for name in names
        ],
    )


def skill_table(metrics: Metrics, folder: str = "forecasts") -> Table:
    """Return a row per forecast of the run and baseline: skill at the marked horizon steps, with its interval."""
    steps = marked_steps(horizon(metrics))
    ends = (("skill", "value"), ("from", "low"), ("to", "high"))
    columns = [
        (f"h = {step + 1}, {interval_words(metrics)}", title, key, step) for step in steps for title, key in ends
    ]
    return table_of_numbers(
        [(group, title) for group, title, _, _ in columns],
        [
            TableRow(
                f"{label(own)} over {label(name, inside=True)}",
                [numbers_at(metrics, f"{folder}.{own}.skill.{name}.{key}.{step}", 2) for _, _, key, step in columns],
            )
            for own in OWN_FORECASTS
            for name in forecast_names(metrics, f"{folder}.{own}.skill")
        ],
    )


def _percent(part: float, whole: float) -> float:
    return round(max(0.0, 100 * part / whole), 1) if math.isfinite(part) else 0.0


def retrieval_table(metrics: Metrics) -> Table:
    """Return MRR and hits of the real future among distractors, per forecast, at the marked horizon steps."""
    folder = "embedding.retrieval.forecasts"
    steps = marked_steps(horizon(metrics))
    columns = [(key, step) for key in ("mrr", "hit_1", "hit_5", "hit_10") for step in steps]
    return table_of_numbers(
        [(label(key), f"h = {step + 1}" if len(steps) > 1 else "") for key, step in columns],
        [
            TableRow(
                label(name),
                [numbers_at(metrics, f"{folder}.{name}.{key}.{step}", 2) for key, step in columns],
                kind="model" if name in OWN_FORECASTS else "",
            )
            for name in forecast_names(metrics, folder)
        ],
    )


def probe_tables(metrics: Metrics) -> list[tuple[str, Table]]:
    """Return a title and a table of representations against probes for each target."""
    probes = {name: mapping(targets) for name, targets in mapping(metrics.get("probes")).items()}
    targets = dict.fromkeys(target for by_target in probes.values() for target in by_target)
    return [
        (
            label(target),
            table_of_numbers(
                [("", label(probe)) for probe in PROBES],
                [
                    TableRow(label(name), [numbers_at(metrics, f"probes.{name}.{target}.{probe}") for probe in PROBES])
                    for name, by_target in probes.items()
                    if target in by_target
                ],
            ),
        )
        for target in targets
    ]


def table_of_numbers(columns: Sequence[tuple[str, str]], rows: Sequence[TableRow]) -> Table:
    """Return the table without the columns and rows that have no number."""
    kept = [i for i in range(len(columns)) if any(text_of(row.cells[i]) != DASH for row in rows)]
    return Table(
        [columns[i] for i in kept],
        [
            TableRow(
                row.label,
                [row.cells[i] for i in kept],
                row.kind,
                frozenset(place for place, i in enumerate(kept) if i in row.best),
                row.bar_percent,
            )
            for row in rows
            if any(text_of(cell) != DASH for cell in row.cells)
        ],
    )


CONTROLS = {
    "random_floor": ("random", "Random actions", ""),
    "do_nothing": ("do nothing", "Actions of zero", ""),
    "oracle_ceiling": ("privileged", "Privileged planner", "oracle"),
    "replay": ("recorded actions", "Recorded actions", "oracle"),
}
"""Policies beside the run in planning.json: their names on a console and in the report, and the kind of row."""


PLANNED = (
    ("", "Success", "success_rate", 3),
    ("95% interval", "from", "ci95.0", 3),
    ("95% interval", "to", "ci95.1", 3),
    ("", "Path ratio", "path_ratio", 2),
    ("", "Steps", "steps", 1),
    ("", "ms per decision", "ms_per_decision", 2),
    ("", "Success per seed", "per_seed", 2),
)
"""Columns of tables of planning: group, title, key in planning.json and number of decimals."""


def planning_table(metrics: RunMetrics) -> Table:
    """Return a row for the run, or one per number of labels, then the floors and the ceilings."""
    curve = value_at(metrics, "planning.curve") or []
    return _table_of_planning(
        metrics,
        [
            *((_with_labels(entry.get("labels")), f"planning.curve.{i}", "") for i, entry in enumerate(curve[:-1])),
            (_with_labels(value_at(metrics, "planning.protocol.labels")), "planning", "model"),
            *((name, f"planning.{key}", kind) for key, (_, name, kind) in CONTROLS.items()),
        ],
    )


def factor_table(metrics: RunMetrics) -> Table:
    """Return a row for each value of each factor of variation, after the undisturbed run; no rows without factors."""
    rows = _rows_of_factors(metrics)
    undisturbed = [("Undisturbed", "planning", "model")] if rows else []
    return _table_of_planning(metrics, [*undisturbed, *((name, part, "") for name, part in rows)])


def _table_of_planning(metrics: RunMetrics, rows: Sequence[tuple[str, str, str]]) -> Table:
    """Return the table with the columns PLANNED. Rows are a label, a place in the metrics, and a kind."""
    return table_of_numbers(
        [(group, title) for group, title, _, _ in PLANNED],
        [
            TableRow(
                name,
                [
                    [Number(DASH)]
                    if part.startswith("planning.curve") and key in NOT_OF_CURVE
                    else numbers_at(metrics, f"{part}.{key}", digits)
                    for _, _, key, digits in PLANNED
                ],
                kind,
            )
            for name, part, kind in rows
        ],
    )


def success_table(planning: Planning) -> str:
    """Format the success of the run, the floors and the ceilings for a console, then that of the factors' values."""
    metrics = RunMetrics(planning=planning)
    rows = [(f"{entry['labels']} labels", f"planning.curve.{i}") for i, entry in enumerate(planning.get("curve", []))]
    labels = value_at(metrics, "planning.protocol.labels")
    rows = [*rows[:-1], ("model" if labels is None else f"{labels} labels", "planning")]
    tables = [
        _console_table(
            metrics, "policy", [*rows, *((name, f"planning.{key}") for key, (name, _, _) in CONTROLS.items())]
        )
    ]
    if factors := _rows_of_factors(metrics):
        tables.append(_console_table(metrics, "factor", [("undisturbed", "planning"), *factors]))
    return "\n\n".join(tables)


def _rows_of_factors(metrics: RunMetrics) -> list[tuple[str, str]]:
    """Return the label of each value of each factor of variation, and its place in the metrics."""
    return [
        (printable(f"{varied['factor']} = {factor_text(entry['value'])}"), f"planning.factors.{i}.values.{j}")
        for i, varied in enumerate(value_at(metrics, "planning.factors") or [])
        for j, entry in enumerate(varied["values"])
    ]


def _console_table(metrics: RunMetrics, heading: str, rows: Sequence[tuple[str, str]]) -> str:
    """Format success for a console. Rows are a label and a place in the metrics; those without success are left out."""
    width = max(19, *(len(name) for name, _ in rows))
    lines = [f"{heading:<{width}} {'success':>8} {'95 % interval':>16} {'steps':>6} {'path':>6} {'ms':>7}  per seed"]
    for name, part in rows:
        low, high, success, ms = (
            value_at(metrics, f"{part}.{key}") for key in ("ci95.0", "ci95.1", "success_rate", "ms_per_decision")
        )
        if success is None:
            continue
        is_point = part.startswith("planning.curve")
        steps = None if is_point else value_at(metrics, f"{part}.steps")
        ratio = None if is_point else value_at(metrics, f"{part}.path_ratio")
        seeds = " ".join(f"{value:.2f}" for value in value_at(metrics, f"{part}.per_seed"))
        lines.append(
            f"{name:<{width}} {success:>8.3f} {f'{low:.3f} - {high:.3f}':>16} "
            f"{'-' if steps is None else f'{steps:.1f}':>6} {'-' if ratio is None else f'{ratio:.2f}':>6} {ms:>7.2f}  "
            f"{seeds}"
        )
    return "\n".join(lines)


def _with_labels(count: Any) -> str:
    return "This run" if count is None else f"This run, {number(count)} labels"
