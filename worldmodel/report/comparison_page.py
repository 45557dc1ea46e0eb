"""Several runs side by side as one self-contained HTML file, in the look of a run's report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.report import figures, tables
from worldmodel.report.comparison import (
    RATIO,
    Cell,
    Run,
    format_stat,
    num_steps,
    references,
    summarise_cells,
    table_rows,
)
from worldmodel.report.figures import Line, Picture
from worldmodel.report.run_page import CURVES, LEVELS, history_series, line_words, write_page
from worldmodel.report.tables import Number, Row, Table

History = Sequence[Mapping[str, Any]]


def write_comparison_page(path: Path, *, title: str, runs: Sequence[Run], histories: Sequence[History]) -> None:
    """Write the comparison of `runs`, whose rows of metrics.jsonl are `histories`, to `path`.

    What no run has is left out. The file appears whole or not at all. Raises OSError when it cannot be written.
    """
    cells = summarise_cells(runs)
    head, *rows = table_rows(cells)
    write_page(
        path,
        "comparison_page.html.j2",
        title=title,
        headline=headline(cells),
        table=Table(
            [("", name) for name in head[2:]],
            [Row(name_of(cell), [[Number(text)] for text in row[2:]]) for cell, row in zip(cells, rows, strict=True)],
        ),
        references=references(runs),
        horizon=horizon_charts(runs, cells),
        calibration=calibration_charts(cells),
        ranks=rank_charts(cells),
        curves=curve_charts(runs, cells, histories),
        probes=probe_tables(cells),
        seeds=", ".join(map(str, sorted({run.seed for run in runs}))),
    )


def name_of(cell: Cell) -> str:
    return f"{cell.objective}, {cell.latent}"


def colour_of(index: int) -> str:
    return figures.SERIES_COLOURS[index % len(figures.SERIES_COLOURS)]


def headline(cells: Sequence[Cell]) -> str:
    """Which cell forecasts best one segment ahead, if any does."""
    path = "forecasts.model.energy_score.0"
    scored = [cell for cell in cells if path in cell.stats]
    if not scored:
        return f"{len(cells)} kinds of runs side by side."
    best = min(scored, key=lambda cell: cell.stats[path].mean)
    sentence = f"{name_of(best)} forecasts best at horizon 1: an Energy Score of {best.stats[path].mean:.3f}"
    ratio = best.stats.get(f"{RATIO}.0")
    return sentence + (f", {ratio.mean:.2f} times the true law's own." if ratio else ".")


def means(cell: Cell, pattern: str, count: int) -> np.ndarray:
    """[count] means over seeds at the paths of `pattern`, whose {} is the index; NaN where there is none."""
    stats = [cell.stats.get(pattern.format(i)) for i in range(count)]
    return np.array([np.nan if stat is None else stat.mean for stat in stats])


def horizon_charts(runs: Sequence[Run], cells: Sequence[Cell]) -> list[tuple[str, str, Picture]]:
    """Title, what to look for, and chart, with a line a cell and the oracle's; none for one horizon step."""
    steps = num_steps(runs)
    charts = []
    for title, key, about in (
        ("Energy Score", "energy_score", "Means over seeds; the simulator oracle is the floor."),
        ("Energy Score over the oracle's", "ratio_to_oracle", "Means over seeds; one is the oracle."),
    ):
        lines = [
            Line(name_of(cell), means(cell, f"forecasts.model.{key}.{{}}", steps), colour_of(i), width=2)
            for i, cell in enumerate(cells)
        ]
        oracle = summarise_cells([Run("", "", run.seed, run.numbers) for run in runs])[0]
        lines.append(
            Line(
                "Simulator oracle", means(oracle, f"forecasts.simulator_oracle.{key}.{{}}", steps), "text", (0, (4, 2))
            )
        )
        lines = [line for line in lines if np.isfinite(line.values).sum() > 1]
        if lines:
            alt = f"{title} from horizon 1 to {steps}, mean over seeds: {line_words(lines)}."
            picture = figures.horizon_chart(lines, ylabel=title, xlabel="horizon, segments", alt=alt)
            charts.append((title, about, picture))
    return charts


def coverage(cell: Cell, level: int, step: int) -> float:
    """Mean over seeds and dimensions of what the intervals hold; NaN where there are none."""
    place = re.compile(rf"forecasts\.model\.coverage\.{level}\.{step}\.\d+")
    found = [stat.mean for path, stat in cell.stats.items() if place.fullmatch(path)]
    return sum(found) / len(found) if found else float("nan")


def calibration_charts(cells: Sequence[Cell]) -> list[tuple[str, str, Picture]]:
    """A calibration curve a cell, at the first and the last horizon step."""
    steps = num_steps(cells)
    charts = []
    for step in sorted({0, max(0, steps - 1)}):
        curves = []
        for cell in cells:
            held = [coverage(cell, level, step) for level in LEVELS]
            if np.isfinite(held).all():
                curves.append((name_of(cell), [level / 100 for level in LEVELS], held))
        if curves:
            words = "; ".join(f"{name}: 90% intervals hold {held[-1]:.0%}" for name, _, held in curves)
            picture = figures.calibration_chart(curves, f"Calibration at horizon {step + 1}. {words}.")
            charts.append((f"Calibration at horizon {step + 1}", "Below the diagonal is overconfident.", picture))
    return charts


def rank_charts(cells: Sequence[Cell]) -> list[tuple[str, str, Picture]]:
    """The rank histogram of each cell, at the first and the last horizon step."""
    steps = num_steps(cells)
    charts = []
    for cell in cells:
        histograms = []
        for step in sorted({0, max(0, steps - 1)}):
            prefix = f"forecasts.model.rank_histogram.{step}."
            shares = means(cell, prefix + "{}", sum(path.startswith(prefix) for path in cell.stats))
            if len(shares):
                histograms.append((f"h = {step + 1}", shares))
        if histograms:
            words = "; ".join(
                f"{name}: lowest {shares[0]:.3f}, highest {shares[-1]:.3f}, flat is {1 / len(shares):.3f}"
                for name, shares in histograms
            )
            picture = figures.rank_chart(histograms, f"Ranks of the truth, {name_of(cell)}. {words}.")
            charts.append((name_of(cell), "", picture))
    return charts


def curve_charts(
    runs: Sequence[Run], cells: Sequence[Cell], histories: Sequence[History]
) -> list[tuple[str, str, Picture]]:
    """Learning curves over each other: a line a cell, the mean over those seeds that reached a step."""
    charts = []
    for key, title in CURVES.items():
        curves = []
        for i, cell in enumerate(cells):
            values: dict[int, list[float]] = {}
            for run, history in zip(runs, histories, strict=True):
                if (run.objective, run.latent) != (cell.objective, cell.latent):
                    continue
                for step, value in zip(*history_series(history, key, train=key != "energy_score"), strict=True):
                    values.setdefault(int(step), []).append(float(value))
            if values:
                steps = np.array(sorted(values))
                curves.append((name_of(cell), colour_of(i), steps, np.array([np.mean(values[s]) for s in steps])))
        if curves:
            words = ", ".join(f"{name} {values[-1]:.3f} at step {steps[-1]:,}" for name, _, steps, values in curves)
            charts.append((title, "", figures.curve_chart(curves, f"{title} against training step: {words}.")))
    return charts


def probe_tables(cells: Sequence[Cell]) -> list[tuple[str, Table]]:
    """For each target a title and a table of cells against representations, by linear probes."""
    place = re.compile(r"probes\.(\w+)\.(\w+)\.linear")
    found = list(dict.fromkeys(m.groups() for cell in cells for path in cell.stats if (m := place.fullmatch(path))))
    made = []
    for target in dict.fromkeys(target for _, target in found):
        names = [name for name, of in found if of == target]
        rows = [
            Row(
                name_of(cell),
                [
                    [Number(format_stat(cell.stats.get(f"probes.{name}.{target}.linear"), ".3f", len(cell.seeds)))]
                    for name in names
                ],
            )
            for cell in cells
        ]
        made.append((tables.label(target), Table([("", tables.label(name)) for name in names], rows)))
    return made
