"""The report of a run: its scores and pictures as one self-contained HTML file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import one_line_logger
from data_pipelines.files import write_text
from worldmodel.config import to_yaml
from worldmodel.report import figures, tables
from worldmodel.report.figures import Line, Picture
from worldmodel.report.illustrations import NO_ILLUSTRATIONS, Illustrations, PlannedEpisode
from worldmodel.report.illustrations_file import ILLUSTRATIONS_NAME, PLANNED_NAME, load_parts
from worldmodel.runs.checkpoint import load_run_config
from worldmodel.runs.metrics import METRICS_NAME, PLANNING_NAME, read_metrics_file
from worldmodel.runs.tracking import read_metrics, versions

logger = one_line_logger(__name__)

CURVES = {
    "loss": "Loss",
    "kl_nats": "KL of posterior from prior, nats",
    "effective_rank": "Effective rank of the embedding",
    "energy_score": "Energy Score at evaluations",
}
LEVELS = (50, 80, 90)


def report_of_run(run: Path) -> Path:
    """Write the report.html of a run folder from what evaluations left in it -> its path.

    metrics.json and illustrations.safetensors are of scripts/evaluate.py, planning.json and planning.safetensors of
    scripts/plan.py; what is not there is left out. Raises UserError: one of them is damaged.
    """
    metrics, planning = (read_metrics_file(run / name) for name in (METRICS_NAME, PLANNING_NAME))
    drawn = load_parts(run / ILLUSTRATIONS_NAME, Illustrations) if metrics else []
    if metrics and not drawn:
        logger.warning("%s has no %s: evaluate the run again for the report's pictures", run, ILLUSTRATIONS_NAME)
    path = run / "report.html"
    write_report(
        path,
        title=run.name,
        metrics=(metrics or {}) | ({"planning": planning} if planning else {}),
        config_yaml=to_yaml(load_run_config(run)),
        history=read_metrics(run),
        illustrations=drawn[0] if drawn else NO_ILLUSTRATIONS,
        episodes=load_parts(run / PLANNED_NAME, PlannedEpisode) if planning else [],
        versions=versions(),
    )
    return path


def write_report(
    path: Path,
    *,
    title: str,
    metrics: Mapping[str, Any],
    config_yaml: str,
    history: Sequence[Mapping[str, Any]],
    illustrations: Illustrations,
    versions: Mapping[str, str],
    episodes: Sequence[PlannedEpisode] = (),
) -> None:
    """Write the report of a run to `path`, one HTML file that needs nothing else.

    `metrics` is what metrics.json holds, with what planning.json does as "planning", `history` the rows of
    metrics.jsonl and `episodes` what is shown of the planning; what they lack is left out,
    and a missing number is shown as a dash. The file appears whole or not at all. Raises OSError when
    it cannot be written.
    """
    segments, remainder = divmod(illustrations.frames.shape[1], illustrations.num_frames)
    assert illustrations.frames.dtype == np.uint8 and segments >= 2 and remainder == 0, illustrations.frames.shape
    plain_metrics = plain(metrics)
    write_page(
        path,
        "run_page.html.j2",
        title=title,
        headline=tables.headline(plain_metrics),
        tiles=tables.tiles(plain_metrics),
        metrics=plain_metrics,
        table=tables.score_table(plain_metrics),
        explained=explained(plain_metrics),
        has_oracle="simulator_oracle" in tables.forecast_names(plain_metrics),
        futures=future_pictures(illustrations, plain_metrics),
        fans=illustrations.fans,
        horizon_charts=horizon_charts(plain_metrics),
        calibration=calibration_charts(plain_metrics),
        latents=figures.latent_charts(illustrations.latents) if illustrations.latents is not None else [],
        change_name=illustrations.latents.change_name if illustrations.latents is not None else "",
        retrieval=tables.retrieval_table(plain_metrics),
        retrieval_chart=retrieval_chart(plain_metrics),
        neighbours=neighbour_pictures(illustrations),
        timeline=timeline_pictures(illustrations),
        planning=tables.planning_table(plain_metrics),
        protocol=tables.protocol_facts(plain_metrics),
        episodes=planning_pictures(episodes, plain_metrics),
        has_ways=any(episode.way_px is not None for episode in episodes),
        has_imagined=any(episode.imagined_px is not None for episode in episodes),
        labels_chart=labels_chart(plain_metrics),
        curves=curve_pictures(history),
        probes=tables.probe_tables(plain_metrics),
        embedding_table=tables.score_table(plain_metrics, "embedding.forecasts")
        if plain_metrics.get("quantity")
        else None,
        facts=tables.facts(plain_metrics),
        versions=versions,
        config_yaml=config_yaml,
        metrics_json=json.dumps(plain_metrics, indent=1, ensure_ascii=False),
    )


def write_page(path: Path, template: str, **content: Any) -> None:
    """Render a template of this folder into a file that appears whole or not at all."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("worldmodel.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    colours = {f"{name}_{key}": colour for name, theme in figures.THEMES.items() for key, colour in theme.items()}
    page = environment.get_template(template).render(
        colours={"fan": figures.FAN, "followed": figures.TRUTH, "goal": figures.GOAL, **colours},
        dash=tables.DASH,
        **content,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page.encode("utf-8", "backslashreplace").decode())  # a file name may hold bytes that are not UTF-8


def plain(value: Any) -> Any:
    """`value` as strict JSON can hold it: NaN and infinities become null, arrays lists."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


# ---------------------------------------------------------------------------------------------------------- scores


def explained(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What each forecast of the tables is."""
    names = dict.fromkeys([*tables.forecast_names(metrics), *tables.forecast_names(metrics, "embedding.forecasts")])
    about = {name: tables.FORECASTS[name] for name in names if name in tables.FORECASTS}
    if "model" in about and metrics.get("num_samples") == 1:
        about["model"] = (about["model"][0], "One forecast for each query: this run has no latent.")
    return list(about.values())


def horizon_label(metrics: Mapping[str, Any]) -> str:
    segment_s = metrics.get("segment_s")
    return "horizon, segments" + (f" of {segment_s:g} s" if isinstance(segment_s, int | float) else "")


def forecast_lines(metrics: Mapping[str, Any], key: str, folder: str = "forecasts") -> list[Line]:
    """A line for each forecast that has the score `key` at two horizon steps or more."""
    lines = [
        figures.forecast_line(name, tables.label(name), tables.series(metrics, f"{folder}.{name}.{key}"))
        for name in tables.forecast_names(metrics, folder)
    ]
    return [line for line in lines if np.isfinite(line.values).sum() > 1]


def line_words(lines: Sequence[Line], digits: int = 2) -> str:
    """'This run 0.66 to 2.10, Prior mean 0.91 to 3.00': from the first horizon step to the last."""
    return ", ".join(
        f"{line.label} {tables.number(line.values[0], digits)} to {tables.number(line.values[-1], digits)}"
        for line in lines
    )


def horizon_charts(metrics: Mapping[str, Any]) -> list[tuple[str, str, Picture]]:
    """Title, what to look for, and chart, of each score that changes over the horizon; none for one step."""
    unit, last = tables.unit(metrics), tables.horizon(metrics)
    floor = "The simulator oracle is the floor." if "simulator_oracle" in tables.forecast_names(metrics) else ""
    charts = []
    for title, key, ylabel, about, levels in (
        ("Energy Score", "energy_score", unit, floor, ()),
        (
            "Energy Score over the oracle's",
            "ratio_to_oracle",
            "× oracle",
            "Zoomed in on the run: worse forecasts lie above.",
            (1,),
        ),
        ("CRPS", "crps", unit, "Each dimension by itself, then their mean.", ()),
        ("Best sample", "best_of", unit, "Error of the best of the sampled futures.", ()),
        ("Spread over skill", "spread_skill", "ratio", "One is calibrated; below it is overconfident.", (1,)),
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
        picture = figures.horizon_chart(
            lines, ylabel=ylabel, xlabel=horizon_label(metrics), alt=alt, levels=levels, ylim=ylim
        )
        charts.append((title, about, picture))
    return charts


def coverage(metrics: Mapping[str, Any], level: int) -> np.ndarray:
    """[H] share of true outcomes within the central interval, mean over dimensions."""
    return tables.series(metrics, f"forecasts.model.coverage.{level}")


def calibration_curves(metrics: Mapping[str, Any]) -> list[tuple[str, list[float], list[float]]]:
    """Name, nominal and empirical levels at the marked horizon steps."""
    num_steps = tables.horizon(metrics)
    curves = []
    for step in tables.marked_steps(num_steps):
        points = [
            (level / 100, float(values[step]))
            for level in LEVELS
            if len(values := coverage(metrics, level)) > step and math.isfinite(values[step])
        ]
        if points:
            curves.append((f"h = {step + 1}", [x for x, _ in points], [y for _, y in points]))
    return curves


def rank_histograms(metrics: Mapping[str, Any]) -> list[tuple[str, np.ndarray]]:
    """Name and shares of the model's ranks at the first and the last horizon step."""
    every = tables.value_at(metrics, "forecasts.model.rank_histogram")
    if not isinstance(every, list) or not every:
        return []
    steps = sorted({0, len(every) - 1})
    found = [(f"h = {step + 1}" if len(steps) > 1 else "", np.array(every[step] or [], dtype=float)) for step in steps]
    return [(name, shares) for name, shares in found if len(shares) and np.isfinite(shares).all()]


def calibration_charts(metrics: Mapping[str, Any]) -> list[tuple[str, str, Picture]]:
    """Title, what to look for, and chart: coverage over the horizon, calibration curve, rank histogram."""
    charts = []
    lines = [
        Line(f"{level}%", values, colour, width=2)
        for level, colour in zip(LEVELS, ("sky", "teal", "model"), strict=True)
        if np.isfinite(values := coverage(metrics, level)).sum() > 1
    ]
    if lines:
        alt = f"Share of true outcomes within central intervals, from horizon 1 to the last: {line_words(lines)}."
        picture = figures.horizon_chart(
            lines,
            ylabel="share within",
            xlabel=horizon_label(metrics),
            alt=alt,
            levels=[level / 100 for level in LEVELS],
            ylim=(0, 1.02),
        )
        charts.append(("Coverage", "Dashed: what the intervals promise.", picture))
    curves = calibration_curves(metrics)
    if curves:
        words = "; ".join(
            f"{name}: " + ", ".join(f"{x:.0%} intervals hold {y:.0%}" for x, y in zip(nominal, empirical, strict=True))
            for name, nominal, empirical in curves
        )
        picture = figures.calibration_chart(curves, f"Calibration curve. {words}.")
        charts.append(("Calibration", "Below the diagonal is overconfident.", picture))
    histograms = rank_histograms(metrics)
    if histograms:
        words = "; ".join(
            f"{name or 'one step'}: lowest bin {shares[0]:.3f}, highest {shares[-1]:.3f}, flat is {1 / len(shares):.3f}"
            for name, shares in histograms
        )
        picture = figures.rank_chart(histograms, f"Ranks of the truth among the samples. {words}.")
        charts.append(("Ranks of the truth", "Flat is calibrated, a valley overconfident, a hill vague.", picture))
    return charts


def retrieval_chart(metrics: Mapping[str, Any]) -> Picture | None:
    lines = forecast_lines(metrics, "mrr", "embedding.retrieval.forecasts")
    if not lines:
        return None
    return figures.horizon_chart(
        lines,
        ylabel="MRR",
        xlabel=horizon_label(metrics),
        alt=f"Mean reciprocal rank of the real future, from horizon 1 to the last: {line_words(lines)}.",
        ylim=(0, None),
    )


# -------------------------------------------------------------------------------------------------------- pictures


def future_pictures(illustrations: Illustrations, metrics: Mapping[str, Any]) -> list[tuple[Picture, Picture | None]]:
    """For each query an animation, and a fan chart where there is more to see than paths over the frames."""
    fans, num_frames = illustrations.fans, illustrations.num_frames
    quantity = tables.mapping(metrics.get("quantity"))
    unit = str(quantity.get("unit") or "")
    pictures: list[tuple[Picture, Picture | None]] = []
    for query, frames in enumerate(illustrations.frames):
        num_steps = len(frames) // num_frames - 1
        alt = (
            f"Example {query + 1}: {num_frames} frames that the model sees, then {num_steps * num_frames} that followed"
        )
        if fans is None:
            pictures.append((figures.animation(frames, num_frames, alt + "."), None))
            continue
        dimensions = [str(name) for name in quantity.get("dimensions") or ()]
        if len(dimensions) != fans.true.shape[-1]:
            dimensions = [f"dimension {k + 1}" for k in range(fans.true.shape[-1])]
        words = figures.fan_words(fans, query, dimensions, unit)
        moving = figures.animation(
            frames,
            num_frames,
            f"{alt}, under sampled paths and the true one. {words}" if fans.on_frames else f"{alt}.",
            fans=fans if fans.on_frames else None,
            query=query,
        )
        fan = figures.fan_chart(fans, query, dimensions, unit, f"Example {query + 1} against the horizon. {words}")
        pictures.append((moving, fan))
    return pictures


def neighbour_pictures(illustrations: Illustrations) -> list[list[tuple[int, Picture, list[Picture]]]]:
    """For each query and marked step: the step, what followed, and the real segments nearest to sampled futures."""
    if not illustrations.neighbours.size:
        return []
    n, shown = illustrations.num_frames, figures.shown_frames(illustrations.num_frames)
    pictures = []
    for query, (clip, by_step) in enumerate(zip(illustrations.frames, illustrations.neighbours, strict=True)):
        rows = []
        for step, nearest in zip(illustrations.neighbour_steps, by_step, strict=True):
            about = f"Example {query + 1}, horizon {step}"
            actual = figures.strip(clip[step * n : (step + 1) * n][shown], f"{about}: what actually followed.")
            near = [
                figures.strip(frames[shown], f"{about}: the real segment nearest to sampled future {i + 1}.")
                for i, frames in enumerate(nearest)
            ]
            rows.append((step, actual, near))
        pictures.append(rows)
    return pictures


def timeline_pictures(illustrations: Illustrations) -> dict[str, Any] | None:
    """The chart of surprise against time, and the frames of each peak with when it was."""
    timeline = illustrations.timeline
    if timeline is None or not len(timeline.surprise):
        return None
    shown = figures.shown_frames(illustrations.num_frames)
    both = [*shown, *(illustrations.num_frames + i for i in shown)]
    moments = [figures.timeline_moment(timeline, peak) for peak in timeline.peaks]
    alt = (
        f"Surprise of {len(timeline.surprise):,} transitions of {timeline.video}, median "
        f"{np.nanmedian(timeline.surprise):.2f} {timeline.unit}. Peaks: {'; '.join(moments) or 'none'}."
    )

    def draw(figure: Any, theme: figures.Theme) -> None:
        figures.draw_timeline(figure.add_subplot(), theme, timeline)

    return {
        "video": timeline.video,
        "has_kl": timeline.unit == "nats",
        "has_scene": bool(timeline.scene_nats.any()),
        "chart": figures.chart(draw, alt, size_in=(5.2, 2.2)),
        "peaks": [
            (moment, figures.strip(frames[both], f"Peak {i + 1}, {moment}: the context, then what surprised."))
            for i, (moment, frames) in enumerate(zip(moments, timeline.peak_frames, strict=True))
        ],
    }


def planning_pictures(
    episodes: Sequence[PlannedEpisode], metrics: Mapping[str, Any]
) -> list[tuple[str, Picture, Picture]]:
    """For each shown episode what came of it, its animation, and the picture of its goal beside its last frame."""
    budget = tables.value_at(metrics, "planning.protocol.budget")
    pictures = []
    for episode in episodes:
        steps = len(episode.frames) - 1
        outcome = f"reached after {steps} steps" if episode.success else f"not reached in {steps} steps"
        alt = f"Episode {episode.number + 1}: the goal is {outcome}, of at most {tables.number(budget)}."
        if episode.way_px is not None and episode.goal_px is not None:
            left_px = np.linalg.norm(episode.way_px[[0, -1]] - episode.goal_px, axis=1)
            alt += f" The agent begins {left_px[0]:.1f} px from it and ends {left_px[1]:.1f} px from it."
            if episode.imagined_px is not None:
                nearest_px = np.linalg.norm(episode.imagined_px[0] - episode.goal_px, axis=-1).min(axis=-1).mean()
                alt += f" The first plan is imagined to come within {nearest_px:.1f} px of it."
        both = np.stack([episode.goal, episode.frames[-1]])
        words = f"Episode {episode.number + 1}: the picture of the goal, then the last frame."
        pictures.append(
            (
                f"Episode {episode.number + 1}: {outcome}",
                figures.planning_animation(episode, alt),
                figures.strip(both, words),
            )
        )
    return pictures


def labels_chart(metrics: Mapping[str, Any]) -> Picture | None:
    """Success against the number of labels, where there are several."""
    curve = tables.value_at(metrics, "planning.curve") or []
    if len(curve) < 2:
        return None
    points = [(entry["labels"], entry["success_rate"], *entry["ci95"]) for entry in curve]
    levels = {
        name: value
        for name, key in (("random", "random_floor"), ("privileged", "oracle_ceiling"))
        if isinstance(value := tables.value_at(metrics, f"planning.{key}.success_rate"), int | float)
    }
    words = "; ".join(f"{n:,} labels {rate:.3f} ({low:.3f} to {high:.3f})" for n, rate, low, high in points)
    others = "".join(f" {name.capitalize()}: {level:.3f}." for name, level in levels.items())
    alt = f"Success against labels, with 95% intervals: {words}.{others}"
    return figures.interval_chart(points, levels, xlabel="labelled transitions", alt=alt)


def history_series(history: Sequence[Mapping[str, Any]], key: str, *, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of `key` in training rows or in all others; the later row of a step counts."""
    values = {
        int(row["step"]): float(row[key])
        for row in history
        if (row.get("split") == "train") == train and "step" in row and tables.number(row.get(key)) != tables.DASH
    }
    steps = sorted(values)
    return np.array(steps), np.array([values[step] for step in steps])


def curve_pictures(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, Picture]]:
    """A title and a chart for each curve that `history` has."""
    pictures = []
    for key, title in CURVES.items():
        curves = [
            (name, colour, *history_series(history, key, train=train))
            for name, colour, train in (("training", "model", True), ("evaluation", "truth", False))
        ]
        drawn = [curve for curve in curves if len(curve[2])]
        if drawn:
            _, _, steps, values = drawn[-1]
            alt = f"{title} against training step; {values[-1]:.3f} at step {steps[-1]:,}, the last one drawn."
            pictures.append((title, figures.curve_chart(drawn, alt)))
    return pictures
