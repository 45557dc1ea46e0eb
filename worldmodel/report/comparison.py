"""Runs of several objectives, latents and seeds compared: means and SDs over seeds, a Markdown table, a figure.

Everything here is a function of the runs' metrics. Worlds differ in their metrics: a column or a panel without numbers
is left out. Matplotlib is imported where it is used.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import TYPE_CHECKING, Any

from worldmodel.report.drawing import PLAIN_TEXT, save, short
from worldmodel.report.numbers import DASH, digits_for, mapping, number, spec_for
from worldmodel.report.tables import aligned_table
from worldmodel.runs.metrics import Metrics, place

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RATIO = place("forecasts.model.ratio_to_oracle")
ENERGY_SCORE = place("forecasts.model.energy_score")
CONSTANT_VELOCITY_RATIO = place("forecasts.pixel_constant_velocity.ratio_to_oracle")


@dataclass(frozen=True)
class Column:
    """A number of every run: `path` is its dotted place in metrics.json with list indices, `digits` its decimals.

    LAST in a path is the index of the last horizon step. Such a column is for runs with several steps. DIMENSION is the
    index of a dimension of the quantity, and each has a column.
    """

    title: str
    path: str
    digits: int

    def __post_init__(self) -> None:
        place(self.path)


LAST = "{last}"
DIMENSION = "{dimension}"
MAX_DIMENSIONS = 8  # with columns of their own; those after them are left out
COLUMNS = (
    Column("Energy Score", f"{ENERGY_SCORE}.0", 3),
    Column("Energy Score at horizon {horizon}", f"{ENERGY_SCORE}.{LAST}", 3),
    Column("x oracle", f"{RATIO}.0", 3),
    Column("x oracle at horizon {horizon}", f"{RATIO}.{LAST}", 3),
    Column("encode-decode x oracle", "forecasts.encode_decode_oracle.ratio_to_oracle.0", 3),
    Column("90% coverage", f"forecasts.model.coverage.90.0.{DIMENSION}", 2),
    Column("KL, nats", "kl_nats", 2),
    Column("expected L0", "expected_l0", 2),
    Column("digit accuracy", "probes.embedding.digit.linear", 3),
    Column("velocity R²", "probes.embedding.velocity.linear", 3),
    Column("velocity change R², linear", "probes.embedding_and_r.velocity_change.linear", 3),
    Column("velocity change R², MLP", "probes.embedding_and_r.velocity_change.mlp", 3),
    Column("factors R², in distribution", "factors.in_distribution_r2", 3),
    Column("factors R², out of distribution", "factors.out_of_distribution_r2", 3),
    Column("disentanglement", "dci.disentanglement", 3),
    Column("completeness", "dci.completeness", 3),
    Column("disentanglement of r", "dci_of_r.disentanglement", 3),
    Column("training, s", "train.seconds", 0),
)

# Label and name of the forecasts that no run makes. A sentence below the table states their scores.
REFERENCES = (("Simulator oracle", "simulator_oracle"), ("Constant velocity", "pixel_constant_velocity"))


@dataclass(frozen=True)
class RunScores:
    """One trained and evaluated run; `numbers` are its metrics by dotted path, None if not finite.

    dimensions: the names of those of its quantity.
    """

    objective: str
    latent: str
    seed: int
    numbers: Mapping[str, float | None]
    dimensions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stat:
    """Mean and sample SD (n - 1) of `n` finite values; no SD for a single value."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class RunGroup:
    """The runs of one objective and latent; `stats` over their seeds by dotted path.

    dimensions: the names of those of the quantity, none if runs differ.
    """

    objective: str
    latent: str
    seeds: tuple[int, ...]
    stats: Mapping[str, Stat]
    dimensions: tuple[str, ...] = ()

    def stat(self, path: str) -> Stat | None:
        """Return the numbers at a place of metrics.json; None if no run has one."""
        return self.stats.get(place(path))


# ------------------------------------------------------------------------------------------------------- numbers


def flat_numbers(metrics: Any, prefix: str = "") -> dict[str, float | None]:
    """Flatten {"a": {"b": [1, nan]}, "name": "x"} to {"a.b.0": 1.0, "a.b.1": None}, without texts and flags."""
    if isinstance(metrics, Mapping):
        children = list(metrics.items())
    elif isinstance(metrics, list | tuple):
        children = list(enumerate(metrics))
    elif metrics is None or (isinstance(metrics, int | float) and not isinstance(metrics, bool)):
        return {prefix: float(metrics) if metrics is not None and math.isfinite(metrics) else None}
    else:
        return {}
    return {
        path: value
        for key, child in children
        for path, value in flat_numbers(child, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def dimensions_of(metrics: Metrics) -> tuple[str, ...]:
    """Return the names of the dimensions of the quantity; none without a quantity."""
    return tuple(map(str, mapping(metrics.get("quantity")).get("dimensions") or ()))


def summarise(values: Iterable[float | None]) -> Stat | None:
    """Return mean and sample SD of the finite values; None if there are none."""
    finite = [value for value in values if value is not None]
    if not finite:
        return None
    return Stat(statistics.fmean(finite), statistics.stdev(finite) if len(finite) > 1 else None, len(finite))


def summarise_groups(runs: Sequence[RunScores]) -> list[RunGroup]:
    """Group runs by objective and latent, in the order of their first runs, with objectives kept together."""
    objectives = list(dict.fromkeys(run.objective for run in runs))
    keys = sorted(dict.fromkeys((run.objective, run.latent) for run in runs), key=lambda key: objectives.index(key[0]))
    groups = []
    for objective, latent in keys:
        members = [run for run in runs if (run.objective, run.latent) == (objective, latent)]
        paths = dict.fromkeys(path for run in members for path in run.numbers)
        stats = {path: summarise(run.numbers.get(path) for run in members) for path in paths}
        groups.append(
            RunGroup(
                objective,
                latent,
                tuple(run.seed for run in members),
                {path: stat for path, stat in stats.items() if stat is not None},
                _common(member.dimensions for member in members),
            )
        )
    return groups


def _common(names: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the names that all have; none if they differ."""
    found = set(names)
    return found.pop() if len(found) == 1 else ()


def num_steps(runs: Iterable[RunScores | RunGroup]) -> int:
    """Return the largest number of horizon steps of any run; 0 if none has forecasts."""
    step = re.compile(re.escape(ENERGY_SCORE) + r"\.([0-9]{1,4})")
    paths = (path for run in runs for path in (run.numbers if isinstance(run, RunScores) else run.stats))
    return max((int(found[1]) + 1 for path in paths if (found := step.fullmatch(path))), default=0)


# --------------------------------------------------------------------------------------------------------- table


def format_stat(stat: Stat | None, digits: int, num_runs: int) -> str:
    """Format '1.12 ± 0.03', '1.12' for one run, a dash for none; '(n=2)' is added if some numbers are not finite."""
    if stat is None:
        return DASH
    spec = spec_for(stat.mean, digits)
    text = format(stat.mean, spec) if stat.sd is None else f"{stat.mean:{spec}} ± {stat.sd:{spec}}"
    return text if stat.n == num_runs else f"{text} (n={stat.n})"


def _shared_digits(column: Column, groups: Sequence[RunGroup]) -> int:
    """Return the decimals of all numbers of a column: more than three if all are small, otherwise its own."""
    if column.digits != 3:
        return column.digits
    return digits_for(stat.mean for group in groups if (stat := group.stat(column.path)))


def columns_of(groups: Sequence[RunGroup]) -> list[Column]:
    """Return the columns that any group has numbers for, with their paths and titles filled in."""
    steps = num_steps(groups)
    filled = [
        Column(column.title.format(horizon=steps), column.path.replace(LAST, str(steps - 1)), column.digits)
        for column in COLUMNS
        if LAST not in column.path or steps > 1
    ]
    split = [
        part for column in filled for part in (_by_dimension(column, groups) if DIMENSION in column.path else [column])
    ]
    found = [column for column in split if any(group.stat(column.path) for group in groups)]
    return [replace(column, digits=_shared_digits(column, groups)) for column in found]


def _by_dimension(column: Column, groups: Sequence[RunGroup]) -> list[Column]:
    """Return a column for each dimension that any group has a number for, titled by its name if there are several."""
    paths = [column.path.replace(DIMENSION, str(k)) for k in range(MAX_DIMENSIONS)]
    with_numbers = [group for group in groups if any(map(group.stat, paths))]
    names = _common(group.dimensions for group in with_numbers)
    if len(names) <= 1 and not any(group.stat(path) for group in with_numbers for path in paths[1:]):
        return [replace(column, path=paths[0])]
    titles = [f" {names[k]}" if k < len(names) else f", dimension {k + 1}" for k in range(len(paths))]
    return [replace(column, title=column.title + title, path=path) for title, path in zip(titles, paths, strict=True)]


def table_rows(groups: Sequence[RunGroup]) -> list[list[str]]:
    """Return the head and a row per group: objective, latent, number of seeds, and the columns."""
    columns = columns_of(groups)
    return [
        ["objective", "latent", "seeds", *(column.title for column in columns)],
        *(
            [
                *(group.objective, group.latent, str(len(group.seeds))),
                *(format_stat(group.stat(column.path), column.digits, len(group.seeds)) for column in columns),
            ]
            for group in groups
        ),
    ]


def comparison_table(groups: Sequence[RunGroup]) -> str:
    """Format an aligned Markdown table, also for a console. An objective is named in the first of its rows."""
    head, *rows = table_rows(groups)
    named = [
        ["" if before is not None and before[0] == row[0] else row[0], *row[1:]]
        for before, row in zip([None, *rows], rows, strict=False)
    ]
    return aligned_table([head, *named], num_left=2)


def references(runs: Sequence[RunScores]) -> list[str]:
    """Return a sentence for each forecast that no run makes, with its means over all runs."""
    sentences = []
    for label, name in REFERENCES:
        score = summarise(_values(runs, f"forecasts.{name}.energy_score.0"))
        ratio = summarise(_values(runs, f"forecasts.{name}.ratio_to_oracle.0"))
        if score and ratio:
            text = number(score.mean, digits_for([score.mean]))
            sentences.append(f"{label}: Energy Score {text}, {ratio.mean:.3f} x oracle.")
    return sentences


def comparison_markdown(runs: Sequence[RunScores]) -> str:
    """Return the table with notes for its reader."""
    note = "Mean ± sample SD over seeds. Energy Score: lower is better."
    if not num_steps(runs):
        note = "Mean ± sample SD over seeds."
    return "\n\n".join([comparison_table(summarise_groups(runs)), " ".join([note, *references(runs)])])


# -------------------------------------------------------------------------------------------------------- figure

WIDTH_IN, ROW_IN, DPI = 4.2, 0.26, 200
TEXT, AXIS, GRID, SURFACE = "#4a525c", "#9aa1ab", "#e3e6ea", "#ffffff"
# Okabe and Ito's colours, safe for colour-blind readers; markers also distinguish the latents.
LATENTS = {
    "none": ("#6b6b6b", "s"),
    "gaussian": ("#0072b2", "o"),
    "sparse": ("#d55e00", "^"),
    "oracle": ("#009e73", "D"),
}
OTHER_LATENTS = (("#cc79a7", "v"), ("#e69f00", "P"), ("#56b4e9", "X"))


@dataclass(frozen=True)
class Panel:
    """A part of the figure: `series` are (path, name, filled marker), `lines` (a number or a path, name, style)."""

    label: str
    series: tuple[tuple[str, str, bool], ...]
    lines: tuple[tuple[float | str, str, str], ...] = ()


def panels_of(runs: Sequence[RunScores]) -> list[Panel]:
    """Return the panels that any run has numbers for."""
    steps = num_steps(runs)
    ratios: tuple[tuple[str, str, bool], ...] = ((f"{RATIO}.0", "", True),)
    if steps > 1:
        ratios = ((f"{RATIO}.0", "horizon 1", True), (f"{RATIO}.{steps - 1}", f"horizon {steps}", False))
    panels = (
        Panel(
            "Energy Score, x simulator oracle (lower is better)",
            ratios,
            ((1.0, "simulator oracle", "-"), (f"{CONSTANT_VELOCITY_RATIO}.0", "constant velocity", "--")),
        ),
        Panel(
            "R² of the factors (higher is better)",
            (
                ("factors.in_distribution_r2", "in distribution", True),
                ("factors.out_of_distribution_r2", "out of distribution", False),
            ),
        ),
    )
    return [panel for panel in panels if any(_values(runs, path) for path, _, _ in panel.series)]


def comparison_figure(runs: Sequence[RunScores]) -> Figure | None:
    """Draw a dot per seed and a bar at their mean, one objective below the other; None if no panel has numbers."""
    import matplotlib
    from matplotlib.figure import Figure

    panels = panels_of(runs)
    if not panels:
        return None
    groups = summarise_groups(runs)
    num_rows = len(groups) + len({group.objective for group in groups})
    with matplotlib.rc_context({**PLAIN_TEXT, "font.size": 9, "text.color": TEXT, "legend.frameon": False}):
        height_in = len(panels) * (num_rows * ROW_IN + 1.3)
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained", facecolor=SURFACE)
        for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            _draw(axes, panel, runs, groups)
    return figure


def png(figure: Figure) -> bytes:
    """Return the figure as a PNG file."""
    buffer = BytesIO()
    save(figure, buffer, "png", dpi=DPI)
    return buffer.getvalue()


def _values(runs: Iterable[RunScores], path: str) -> list[float]:
    """Return the finite numbers of runs at a place of metrics.json."""
    return [value for run in runs if (value := run.numbers.get(place(path))) is not None]


def _latent_styles(groups: Sequence[RunGroup]) -> dict[str, tuple[str, str]]:
    """Return the colour and the marker of each latent."""
    latents = list(dict.fromkeys(group.latent for group in groups))
    others = [latent for latent in latents if latent not in LATENTS]
    spare = {latent: OTHER_LATENTS[i % len(OTHER_LATENTS)] for i, latent in enumerate(others)}
    return {latent: LATENTS.get(latent) or spare[latent] for latent in latents}


def _row_positions(groups: Sequence[RunGroup]) -> list[float]:
    """Return the downward y of each group: 1 apart, 2 between objectives."""
    positions, y = [], 0.0
    for before, group in zip([None, *groups], groups, strict=False):
        y += 0 if before is None else 1 if before.objective == group.objective else 2
        positions.append(y)
    return positions


def _draw(axes: Axes, panel: Panel, runs: Sequence[RunScores], groups: Sequence[RunGroup]) -> None:
    from matplotlib.lines import Line2D

    styles, positions = _latent_styles(groups), _row_positions(groups)
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=f"latent {short(latent)}")
        for latent, (colour, marker) in styles.items()
    ]
    handles.append(
        Line2D([], [], color=TEXT, marker="|", markersize=9, markeredgewidth=2, linestyle="", label="mean over seeds")
    )
    for i, (path, name, filled) in enumerate(panel.series):
        if name:
            face = TEXT if filled else SURFACE
            handles.append(Line2D([], [], color=TEXT, marker="o", markerfacecolor=face, linestyle="", label=name))
        offset = (i - (len(panel.series) - 1) / 2) * 0.4
        for group, y in zip(groups, positions, strict=True):
            members = [run for run in runs if (run.objective, run.latent) == (group.objective, group.latent)]
            values, (colour, marker) = _values(members, path), styles[group.latent]
            if not values:
                continue
            gid, at = f"{group.objective}/{group.latent}/{path}", y + offset
            face = colour if filled else SURFACE
            axes.vlines(group.stats[path].mean, at - 0.4, at + 0.4, colors=colour, linewidth=2.0, gid=f"mean {gid}")
            axes.plot(
                values,
                [at] * len(values),
                linestyle="",
                marker=marker,
                markersize=5,
                markerfacecolor=face,
                markeredgecolor=colour,
                alpha=0.8,
                gid=f"seeds {gid}",
            )
    for value, name, style in panel.lines:
        stat = summarise(_values(runs, value)) if isinstance(value, str) else summarise([value])
        if stat is not None:
            handles.append(axes.axvline(stat.mean, color=TEXT, linestyle=style, linewidth=1.2, zorder=1, label=name))
    centres = {
        objective: statistics.fmean(
            y for group, y in zip(groups, positions, strict=True) if group.objective == objective
        )
        for objective in dict.fromkeys(group.objective for group in groups)
    }
    axes.set_yticks(list(centres.values()), [short(objective) for objective in centres])
    axes.set_ylim(positions[-1] + 0.8, -0.8)
    axes.set_xlabel(panel.label, color=TEXT)
    axes.tick_params(length=0, colors=TEXT)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(AXIS)
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, fontsize=8)
