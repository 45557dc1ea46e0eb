"""The comparison of several runs as one self-contained HTML file, styled like a run's report."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from worldmodel.report import charts
from worldmodel.report.charts import Line
from worldmodel.report.comparison import (
    ENERGY_SCORE,
    RATIO,
    RunGroup,
    RunScores,
    format_stat,
    num_steps,
    references,
    summarise_groups,
    table_rows,
)
from worldmodel.report.numbers import Number, consecutive, digits_for, label, number
from worldmodel.report.page import CURVES, HORIZON_LABEL, LEVELS, Card, history_series, line_words, write_page
from worldmodel.report.tables import Table, TableRow
from worldmodel.runs.metrics import place

History = Sequence[Mapping[str, Any]]


def write_comparison_page(
    path: Path, *, title: str, runs: Sequence[RunScores], histories: Sequence[History], caution: str = ""
) -> None:
    """Write the comparison of `runs` to `path`; `histories` are their rows of metrics.jsonl.

    caution: a sentence that says why the forecasts cannot be compared, in place of the one that names the best.

    Parts that no run has are left out. The file appears whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    groups = summarise_groups(runs)
    head, *rows = table_rows(groups)
    write_page(
        path,
        "comparison_page.html.j2",
        title=title,
        headline=caution or best_group_sentence(groups),
        table=Table(
            [("", name) for name in head[2:]],
            [
                TableRow(name_of(group), [[Number(text)] for text in row[2:]])
                for group, row in zip(groups, rows, strict=True)
            ],
        ),
        references=references(runs),
        horizon=group_horizon_cards(runs, groups),
        has_scores=num_steps(runs) > 0,
        calibration=group_calibration_cards(groups),
        ranks=group_rank_cards(groups),
        curves=group_curve_cards(runs, groups, histories),
        probes=group_probe_tables(groups),
        seeds=ranges({run.seed for run in runs}),
    )


def name_of(group: RunGroup) -> str:
    """Return the name of a group in charts and tables."""
    return f"{group.objective}, {group.latent}"


def ranges(numbers: Collection[int]) -> str:
    """Return whole numbers in order, with runs of more than two as '0 to 4'."""
    texts = (f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in consecutive(numbers))
    return ", ".join(texts)


def best_group_sentence(groups: Sequence[RunGroup]) -> str:
    """Return the message of the page: the group with the best forecasts one segment ahead."""
    path = f"{ENERGY_SCORE}.0"
    scored = [group for group in groups if path in group.stats]
    if not scored:
        return f"Comparison of {len(groups)} groups of runs."
    best = min(scored, key=lambda group: group.stats[path].mean)
    mean = best.stats[path].mean
    sentence = f"{name_of(best)} forecasts best at horizon 1: an Energy Score of {number(mean, digits_for([mean]))}"
    ratio = best.stat(f"{RATIO}.0")
    return sentence + (f", {ratio.mean:.2f} times that of the true law." if ratio else ".")


def means(group: RunGroup, pattern: str, count: int) -> np.ndarray:
    """Return the means over seeds at `count` paths of `pattern`, in which {} is the index; NaN if missing."""
    stats = [group.stat(pattern.format(i)) for i in range(count)]
    return np.array([np.nan if stat is None else stat.mean for stat in stats])


def group_horizon_cards(runs: Sequence[RunScores], groups: Sequence[RunGroup]) -> list[Card]:
    """Return charts with a line per group and one for the oracle; none for a single horizon step."""
    steps = num_steps(runs)
    cards: list[Card] = []
    has_oracle = any(group.stat("forecasts.simulator_oracle.energy_score.0") for group in groups)
    floor = "; the simulator oracle is the floor" if has_oracle else ""
    for title, key, hint in (
        ("Energy Score", "energy_score", f"Means over seeds{floor}."),
        ("Energy Score over the oracle's", "ratio_to_oracle", "Means over seeds; 1 is the oracle."),
    ):
        lines = [
            Line(
                name_of(group),
                means(group, f"forecasts.model.{key}.{{}}", steps),
                *charts.series_style(i),
                width=2,
            )
            for i, group in enumerate(groups)
        ]
        oracle = summarise_groups([RunScores("", "", run.seed, run.numbers) for run in runs])[0]
        of_oracle = means(oracle, f"forecasts.simulator_oracle.{key}.{{}}", steps)
        lines.insert(0, Line("Simulator oracle", of_oracle, "text", (0, (4, 2))))
        lines = [line for line in lines if np.isfinite(line.values).sum() > 1]
        if lines:
            alt = f"{title} from horizon 1 to {steps}, mean over seeds: {line_words(lines)}."
            picture = charts.horizon_chart(lines, ylabel=title, xlabel=HORIZON_LABEL, alt=alt)
            cards.append(Card(title, hint, picture))
    return cards


def group_coverage(group: RunGroup, level: int, step: int) -> float:
    """Return the coverage of the intervals, averaged over seeds and dimensions; NaN if missing."""
    dimension = re.compile(re.escape(place(f"forecasts.model.coverage.{level}.{step}")) + r"\.\d+")
    found = [stat.mean for path, stat in group.stats.items() if dimension.fullmatch(path)]
    return sum(found) / len(found) if found else float("nan")


def group_calibration_cards(groups: Sequence[RunGroup]) -> list[Card]:
    """Return a calibration curve per group, at the first and the last horizon step."""
    steps = num_steps(groups)
    cards: list[Card] = []
    for step in sorted({0, max(0, steps - 1)}):
        curves = []
        for group in groups:
            covered = [group_coverage(group, level, step) for level in LEVELS]
            if np.isfinite(covered).all():
                curves.append((name_of(group), [level / 100 for level in LEVELS], covered))
        if curves:
            words = "; ".join(f"{name}: 90% intervals cover {covered[-1]:.0%}" for name, _, covered in curves)
            picture = charts.calibration_chart(curves, f"Calibration at horizon {step + 1}. {words}.")
            cards.append(Card(f"Calibration at horizon {step + 1}", "Below the diagonal is overconfident.", picture))
    return cards


def group_rank_cards(groups: Sequence[RunGroup]) -> list[Card]:
    """Return the rank histogram of each group, at the first and the last horizon step."""
    steps = num_steps(groups)
    cards: list[Card] = []
    for group in groups:
        histograms = []
        for step in sorted({0, max(0, steps - 1)}):
            prefix = place(f"forecasts.model.rank_histogram.{step}") + "."
            shares = means(group, prefix + "{}", sum(path.startswith(prefix) for path in group.stats))
            if len(shares):
                histograms.append((f"h = {step + 1}", shares))
        if histograms:
            words = "; ".join(
                f"{name}: lowest {shares[0]:.3f}, highest {shares[-1]:.3f}, flat is {1 / len(shares):.3f}"
                for name, shares in histograms
            )
            picture = charts.rank_chart(histograms, f"Ranks of the truth, {name_of(group)}. {words}.")
            cards.append(Card(name_of(group), "", picture))
    return cards


def group_curve_cards(
    runs: Sequence[RunScores], groups: Sequence[RunGroup], histories: Sequence[History]
) -> list[Card]:
    """Return learning curves with a line per group: at each step the mean over the seeds that reached it."""
    cards: list[Card] = []
    for key, title in CURVES.items():
        curves = []
        for i, group in enumerate(groups):
            values: dict[int, list[float]] = {}
            for run, history in zip(runs, histories, strict=True):
                if (run.objective, run.latent) != (group.objective, group.latent):
                    continue
                split: Literal["train", "selection"] = "selection" if key == "energy_score" else "train"
                for step, value in zip(*history_series(history, key, split), strict=True):
                    values.setdefault(int(step), []).append(float(value))
            if values:
                steps = np.array(sorted(values))
                line = Line(name_of(group), np.array([np.mean(values[s]) for s in steps]), *charts.series_style(i))
                curves.append((line, steps))
        if curves:
            digits = digits_for([line.values[-1] for line, _ in curves])
            ends = [(line.label, number(line.values[-1], digits), steps[-1]) for line, steps in curves]
            words = ", ".join(f"{name} {value} at step {step:,}" for name, value, step in ends)
            cards.append(Card(title, "", charts.curve_chart(curves, f"{title} against training step: {words}.")))
    return cards


def group_probe_tables(groups: Sequence[RunGroup]) -> list[tuple[str, Table]]:
    """Return a title and a table of groups against representations for each target, by linear probes."""
    pattern = re.escape(place("probes.NAME.TARGET.linear"))
    linear = re.compile(pattern.replace("NAME", r"(\w+)").replace("TARGET", r"(.+)"))
    found = list(dict.fromkeys(m.groups() for group in groups for path in group.stats if (m := linear.fullmatch(path))))
    made = []
    for target in dict.fromkeys(target for _, target in found):
        names = [name for name, of in found if of == target]
        rows = [
            TableRow(
                name_of(group),
                [
                    [Number(format_stat(group.stat(f"probes.{name}.{target}.linear"), 3, len(group.seeds)))]
                    for name in names
                ],
            )
            for group in groups
        ]
        made.append((label(target), Table([("", label(name)) for name in names], rows)))
    return made
