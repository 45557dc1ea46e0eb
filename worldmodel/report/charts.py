"""Charts of a report: scores over the horizon, calibration, ranks, learning curves, rates, fans and latents.

Legend: N transitions, Q queries, S samples, M draws of the law, K dimensions of the quantity, R latent dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from worldmodel.evaluation.illustrations import Fans, Latents
from worldmodel.report.drawing import SIDE_IN, Picture, Theme, chart, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 1500  # of a scatter plot
HEIGHT_IN = 2.9
ROW_IN = 0.19  # height of a name in a legend or at the end of a line
MAX_BESIDE = 6  # names in a legend beside or inside a chart; more are below it
MAX_ENDS = 11  # names at the ends of lines; a chart with more is higher
LABEL_DISTANCE = 0.085  # of these names, of the height, in a chart that is not higher

# Colours of series without a fixed colour, in this order.
SERIES_COLOURS = ("model", "truth", "teal", "violet", "olive", "pink", "sky", "brown", "law")
SERIES_DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = ("-", (0, (6, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)))


@dataclass(frozen=True)
class Line:
    """A line of a chart; `colour` is a name of the themes. An emphasised line is drawn last, and its name bold."""

    label: str
    values: np.ndarray
    colour: str
    dashes: str | tuple[int, tuple[float, ...]] = "-"
    width: float = 1.5
    emphasised: bool = False


# Colour, dashes and width of each forecast.
FORECAST_LINES: dict[str, tuple[str, str | tuple[int, tuple[float, ...]], float]] = {
    "model": ("model", "-", 2.6),
    "model_recalibrated": ("model", (0, (4, 2)), 2.0),
    "prior_mean": ("violet", "-", 1.4),
    "shuffled_r": ("sky", "-", 1.4),
    "no_latent": ("pink", "-", 1.4),
    "pixel_constant_velocity": ("teal", "-", 1.4),
    "constant_velocity": ("teal", "-", 1.4),
    "label_persistence": ("brown", (0, (1, 1)), 1.4),
    "persistence": ("brown", "-", 1.4),
    "climatology": ("olive", "-", 1.4),
    "training_climatology": ("olive", (0, (1, 1)), 1.4),
    "linear_gaussian": ("truth", "-", 1.4),
    "encode_decode_oracle": ("text", (0, (4, 2)), 1.4),
    "simulator_oracle": ("text", "-", 1.8),
}


def forecast_line(name: str, label: str, values: np.ndarray) -> Line:
    """Return the line of a forecast in its own style."""
    colour, dashes, width = FORECAST_LINES.get(name, ("law", "-", 1.4))
    return Line(label, values, colour, dashes, width, emphasised=colour == "model")


def series_style(index: int) -> tuple[str, str | tuple[int, tuple[float, ...]]]:
    """Return the colour and the dashes of the series with this index: other dashes once all colours are used."""
    turn, colour = divmod(index, len(SERIES_COLOURS))
    return SERIES_COLOURS[colour], SERIES_DASHES[turn % len(SERIES_DASHES)]


def add_legend(figure: Figure, axes: Axes, count: int, **beside: Any) -> None:
    """Name `count` series in a legend with these settings; below the axes if there are many."""
    if count <= MAX_BESIDE:
        axes.legend(fontsize=8.5, **beside)
    else:
        figure.legend(loc="outside lower center", fontsize=8.5, labelspacing=0.2, handlelength=3)


def height_with_legend(height_in: float, count: int) -> float:
    """Return the height of a chart in inches whose legend names `count` series."""
    return height_in if count <= MAX_BESIDE else height_in + ROW_IN * count


def spread_labels(places: Sequence[float], gap: float) -> list[float]:
    """Move labels at `places` from 0 to 1 as little as possible, so that they are `gap` apart."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    placed = [0.0] * len(places)
    floor = -math.inf
    for i in order:
        placed[i] = floor = max(places[i], floor + gap)
    ceiling = max(1.0, gap * (len(places) - 1))
    for i in reversed(order):
        placed[i] = ceiling = min(placed[i], ceiling)
        ceiling -= gap
    return placed


def horizon_chart(
    lines: Sequence[Line],
    *,
    ylabel: str,
    xlabel: str,
    alt: str,
    levels: Sequence[float] = (),
    ylim: tuple[float | None, float | None] = (None, None),
) -> Picture:
    """Draw lines against the horizon, each named at its right end; `levels` are dashed reference lines."""
    from matplotlib.ticker import MaxNLocator

    count = max(MAX_ENDS, len(lines))
    gap = LABEL_DISTANCE * MAX_ENDS / count

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        for level in levels:
            axes.axhline(level, color=theme["law"], linewidth=1, linestyle=(0, (2, 2)), zorder=1)
        ends = []
        for line in lines:
            steps = np.arange(1, len(line.values) + 1)
            order = 3 if line.emphasised else 2
            axes.plot(
                *(steps, line.values),
                color=theme[line.colour],
                linestyle=line.dashes,
                linewidth=line.width,
                marker="o",
                markersize=line.width + 1.6,
                zorder=order,
            )
            finite = line.values[np.isfinite(line.values)]
            ends.append(finite[-1] if len(finite) else math.nan)
        axes.set_ylim(*ylim)
        axes.set(xlabel=short(xlabel, 40), ylabel=short(ylabel, 40))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        low, high = axes.get_ylim()
        named = [(line, (end - low) / (high - low)) for line, end in zip(lines, ends, strict=True)]
        named = [(line, place) for line, place in named if -0.02 <= place <= 1.02]
        places = spread_labels([place for _, place in named], gap)
        for (line, _), place in zip(named, places, strict=True):
            bold = "bold" if line.emphasised else "normal"
            axes.annotate(
                short(line.label),
                (1.02, place),
                xycoords="axes fraction",
                color=theme[line.colour],
                fontsize=8.5,
                va="center",
                fontweight=bold,
            )

    return chart(draw, alt, size_in=(SIDE_IN, HEIGHT_IN + ROW_IN * (count - MAX_ENDS)))


def calibration_chart(curves: Sequence[tuple[str, Sequence[float], Sequence[float]]], alt: str) -> Picture:
    """Draw the coverage of intervals against their nominal level: `curves` are (name, nominal, empirical)."""

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=theme["law"], linewidth=1, linestyle=(0, (2, 2)))
        axes.annotate("calibrated", (0.13, 0.15), color=theme["text"], fontsize=8.5, rotation=45, ha="left")
        for i, (name, nominal, empirical) in enumerate(curves):
            colour, dashes = series_style(i)
            axes.plot(
                *(nominal, empirical),
                color=theme[colour],
                linestyle=dashes,
                marker="os^Dv"[i % 5],
                markersize=5,
                label=short(name),
            )
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="nominal level", ylabel="share within", box_aspect=1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
        add_legend(figure, axes, len(curves), loc="center left", bbox_to_anchor=(1.02, 0.5), handlelength=1.4)

    return chart(draw, alt, size_in=(SIDE_IN, height_with_legend(HEIGHT_IN, len(curves))))


def rank_chart(histograms: Sequence[tuple[str, np.ndarray]], alt: str) -> Picture:
    """Draw histograms of the rank of the truth among the samples: (name, shares); flat is calibrated."""

    def draw(figure: Figure, theme: Theme) -> None:
        panels = figure.subplots(len(histograms), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, shares) in zip(panels, histograms, strict=True):
            edges = np.linspace(0, 1, len(shares) + 1)
            axes.bar(edges[:-1], shares, width=0.88 / len(shares), align="edge", color=theme["model"], alpha=0.85)
            axes.axhline(1 / len(shares), color=theme["truth"], linewidth=1.2, linestyle=(0, (4, 2)))
            axes.set_ylabel(f"share\n{short(name)}" if name else "share")
            axes.set_ylim(0, max(2 / len(shares), 1.08 * float(np.nanmax(shares))))
            axes.grid(axis="x", visible=False)
            axes.set_xticks([0, 0.5, 1], ["lowest", "middle", "highest"])
        panels[-1].set_xlabel("rank of the truth among the samples")

    return chart(draw, alt, size_in=(SIDE_IN, HEIGHT_IN))


def curve_chart(curves: Sequence[tuple[Line, np.ndarray]], alt: str) -> Picture:
    """Draw learning curves with their steps; many points are smoothed by a moving average."""

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        for line, steps in curves:
            values, width = line.values, len(steps) // 40
            if width > 1:
                if len(curves) <= 2:
                    axes.plot(steps, values, color=theme["law"], linewidth=0.8, alpha=0.45)
                mean = np.convolve(values, np.ones(width) / width, mode="valid")
                steps, values = steps[width // 2 : width // 2 + len(mean)], mean
            dots = "o" if len(steps) <= 40 else ""
            axes.plot(
                *(steps, values),
                color=theme[line.colour],
                linestyle=line.dashes,
                marker=dots,
                markersize=3.5,
                label=short(line.label),
            )
        if len(curves) > 1:
            add_legend(figure, axes, len(curves))
        axes.set_xlabel("step")

    return chart(draw, alt, size_in=(SIDE_IN, height_with_legend(2.7, len(curves))))


def interval_chart(
    points: Sequence[tuple[float, float, float, float]],
    ticks: Sequence[str],
    levels: Mapping[str, float],
    *,
    xlabel: str,
    alt: str,
    scale: Literal["linear", "log", "names"] = "linear",
) -> Picture:
    """Draw rates with intervals, (x, rate, low, high), against x, with the text of each tick.

    `levels` are named reference lines. On the scale "names" ticks are slanted, and no line joins the points.
    """
    from matplotlib.ticker import NullLocator

    x, rate, low, high = np.array(points).T
    order = np.argsort(x)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        for name, level in levels.items():
            axes.axhline(level, color=theme["law"], linewidth=1, linestyle=(0, (2, 2)), zorder=1)
            axes.annotate(
                name, (0.99, level), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
                ha="right", color=theme["text"], fontsize=8.5,
            )  # fmt: skip
        axes.vlines(x, low, high, color=theme["model"], linewidth=1.6)
        line = "" if scale == "names" else "-"
        axes.plot(x[order], rate[order], color=theme["model"], marker="o", markersize=5, linestyle=line)
        axes.set(xscale="log" if scale == "log" else "linear", ylim=(0, 1.08), ylabel="success")
        axes.set_xlabel(short(xlabel, 40))
        axes.set_xticks(x, [short(text) for text in ticks])
        if scale == "names":
            for tick in axes.get_xticklabels():
                tick.set(rotation=30, ha="right", rotation_mode="anchor")
        axes.xaxis.set_minor_locator(NullLocator())

    return chart(draw, alt)


# -------------------------------------------------------------------------------------------------------------- fans


def fan_chart(fans: Fans, query: int, dimensions: Sequence[str], unit: str, alt: str) -> Picture:
    """Draw each dimension of the quantity over the horizon: 50% and 90% of the samples, 90% of the law, the truth."""
    from matplotlib.ticker import MaxNLocator

    origin = fans.origin[query]

    def bands(values: np.ndarray, k: int, level: float) -> tuple[np.ndarray, np.ndarray]:
        tail = 50 * (1 - level)
        low, high = np.nanpercentile(values[..., k], [tail, 100 - tail], axis=0)
        return np.concatenate([origin[k : k + 1], low]), np.concatenate([origin[k : k + 1], high])

    def draw(figure: Figure, theme: Theme) -> None:
        panels = figure.subplots(len(dimensions), 1, sharex=True, squeeze=False)[:, 0]
        steps = np.arange(fans.true.shape[1] + 1)
        for k, (axes, name) in enumerate(zip(panels, dimensions, strict=True)):
            if fans.law is not None:
                for edge in bands(fans.law[query], k, 0.9):
                    axes.plot(steps, edge, color=theme["text"], linewidth=1.1, linestyle=(0, (3, 2)))
            for level, alpha in ((0.9, 0.2), (0.5, 0.4)):
                axes.fill_between(
                    steps, *bands(fans.samples[query], k, level), color=theme["model"], alpha=alpha, linewidth=0
                )
            truth = np.concatenate([origin[k : k + 1], fans.true[query, :, k]])
            axes.plot(steps, truth, color=theme["truth"], marker="o", markersize=3.5)
            axes.set_ylabel(short(f"{name}, {unit}" if unit else name))
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            if fans.law is not None and name.split()[-1] == "y":
                axes.invert_yaxis()
        panels[-1].set_xlabel("horizon, segments")
        figure.align_ylabels()

    return chart(draw, alt, size_in=(SIDE_IN, 0.7 + 1.15 * len(dimensions)))


def fan_words(fans: Fans, query: int, dimensions: Sequence[str], unit: str) -> str:
    """Return mean and SD of the samples and of the law, and the truth, at the first and the last step, in words."""
    largest = float(np.nanmax(np.abs(fans.true[query]), initial=0))
    digits = 1 if not 0 < largest < 1 else (1 if largest >= 0.1 else 2) - math.floor(math.log10(largest))

    def spread(values: np.ndarray) -> str:
        return f"{np.nanmean(values):.{digits}f} ± {np.nanstd(values):.{digits}f}"

    parts = []
    for step in sorted({0, fans.true.shape[1] - 1}):
        words = []
        for k, name in enumerate(dimensions):
            law = "" if fans.law is None else f" (law {spread(fans.law[query, :, step, k])})"
            sampled = spread(fans.samples[query, :, step, k])
            words.append(f"{name} {sampled}{law}, true {fans.true[query, step, k]:.{digits}f}")
        parts.append(f"Horizon {step + 1}: {'; '.join(words)}.")
    return f"{fans.samples.shape[1]} sampled futures, mean ± SD, in {unit or 'their own unit'}. {' '.join(parts)}"


# ----------------------------------------------------------------------------------------------------------- latents


def principal_components(r: np.ndarray) -> tuple[np.ndarray, float]:
    """Project finite r [N, R] on its two leading directions: coordinates [N, 2], and the share of variance there."""
    centred = r - r.mean(axis=0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    held = float((singular[:2] ** 2).sum() / max((singular**2).sum(), 1e-12))
    plane = centred @ directions[:2].T
    return np.pad(plane, ((0, 0), (0, 2 - plane.shape[1]))), held


def latent_charts(latents: Latents) -> list[tuple[str, Picture]]:
    """Draw inferred r in its leading plane: a title and a chart per dimension of the true change, or a plain one."""
    is_finite = np.isfinite(latents.r).all(axis=1)
    if latents.change is not None:
        is_finite &= np.isfinite(latents.change).all(axis=1)
    if is_finite.sum() < 3 or latents.r.shape[1] == 0:
        return []
    changes = None if latents.change is None else latents.change[is_finite]
    plane, held = principal_components(latents.r[is_finite].astype(float))
    keep = np.linspace(0, len(plane) - 1, min(len(plane), MAX_POINTS)).round().astype(int)
    about = f"{len(plane):,} inferred r in the plane with {held:.0%} of their variance"
    if changes is None:
        return [("r", chart(lambda f, t: _scatter(f, t, plane[keep], None), f"{about}."))]
    charts = []
    inputs = np.column_stack([plane, np.ones(len(plane))])
    for k in range(changes.shape[1]):
        change = changes[:, k].astype(float)
        fit = inputs @ np.linalg.lstsq(inputs, change, rcond=None)[0]
        r2 = 1 - ((change - fit) ** 2).sum() / max(((change - change.mean()) ** 2).sum(), 1e-12)
        name = f"{latents.change_name}, dimension {k + 1}" if changes.shape[1] > 1 else latents.change_name
        alt = f"{about}, coloured by {name}: a straight line across the plane explains {max(r2, 0.0):.0%} of it."

        def draw(figure: Figure, theme: Theme, change: np.ndarray = change) -> None:
            _scatter(figure, theme, plane[keep], change[keep])

        charts.append((name, chart(draw, alt)))
    return charts


def _scatter(figure: Figure, theme: Theme, points: np.ndarray, colour: np.ndarray | None) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    axes = figure.add_subplot()
    if colour is None:
        axes.scatter(points[:, 0], points[:, 1], s=7, color=theme["model"], alpha=0.6, linewidths=0)
    else:
        # The middle is grey, not white, so that it is visible on both pages.
        diverging = LinearSegmentedColormap.from_list("change", [theme["model"], theme["law"], theme["truth"]])
        limit = max(float(np.nanpercentile(np.abs(colour), 98)), 1e-9)
        drawn = axes.scatter(
            points[:, 0], points[:, 1], s=8, c=colour, cmap=diverging, vmin=-limit, vmax=limit, alpha=0.85, linewidths=0
        )
        scale = figure.colorbar(drawn, ax=axes, fraction=0.05, pad=0.03)
        scale.outline.set_visible(False)
        scale.ax.grid(False)
    axes.set(xlabel="first component of r", ylabel="second component")
