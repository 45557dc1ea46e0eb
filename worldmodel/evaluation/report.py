"""A run's scores as a Markdown table and as one self-contained HTML file with pictures.

Pictures are WebP in data URIs. Charts are drawn twice, for a light and a dark page, and the browser picks;
frames of the video are drawn once. Matplotlib and Jinja are imported where they are used.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASH = "–"
MAX_FRAMES_SHOWN = 4  # of each segment, so that a frame stays large on a phone
TARGET_TILE_PX, CONTEXT_TILE_PX, NEIGHBOUR_TILE_PX = 256, 160, 96
STRIP_DPI, CHART_DPI = 100, 200

# Over frames of a video, whatever the page's colours.
FAN, TRUTH = "#5cb8ff", "#ffb020"
THEMES = {
    "light": {"model": "#1f5fd6", "law": "#9aa1ab", "truth": "#d9480f", "text": "#4a525c", "grid": "#e3e6ea"},
    "dark": {"model": "#7ab2ff", "law": "#8a94a0", "truth": "#ff9a4d", "text": "#aab3bd", "grid": "#2b323b"},
}

# In the order of the table: label, what it is.
FORECASTS = {
    "model": ("This run", "{model}"),
    "prior_mean": (
        "Prior mean",
        "The same model with the latent fixed at its prior's mean: one future, not many.",
    ),
    "no_latent": ("No latent", "The compared run, trained without a latent: one forecast for each query."),
    "pixel_constant_velocity": (
        "Pixel constant velocity",
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
    "digit_accuracy": "Digit accuracy",
    "velocity_r2": "Velocity R²",
    "kl_nats": "KL, nats",
    "velocity_after_r2": "Target's velocity, R²",
    "strength": "Ridge strength",
    "beyond_fit_norm_99": "Predictions beyond the 99th percentile norm of real features",
    "energy_score": "Energy Score",
    "persistence_energy_score": "Energy Score of persistence",
    "effective_rank": "Effective rank",
    "std": "Standard deviation",
}
CURVES = {
    "loss": "Loss",
    "kl_nats": "KL of posterior from prior, nats",
    "effective_rank": "Effective rank of the embedding",
    "energy_score": "Energy Score at evaluations",
}


@dataclass(frozen=True)
class ForecastExamples:
    """A handful (at most 6) of queries to draw. Positions: x right, y down, pixel centres at integers."""

    frames: np.ndarray  # uint8 [Q, T, C, H, W], the whole clip: T is a multiple of num_frames, C is 1 or 3
    num_frames: int  # frames in a segment
    velocity_samples: np.ndarray | None  # [Q, K, 2] px/frame, sampled forecasts; None without labels
    velocity_law: np.ndarray | None  # [Q, M, 2] px/frame, draws of the true law
    velocity_true: np.ndarray | None  # [Q, 2] px/frame
    last_centre: np.ndarray | None  # [Q, 2] px, centre of the digit in the last context frame
    neighbours: np.ndarray | None  # uint8 [Q, N, num_frames, C, H, W], real targets nearest to N sampled futures


@dataclass(frozen=True)
class Picture:
    """An image for the page: `light` and `dark` are data URIs, equal when one serves both."""

    light: str
    dark: str
    alt: str
    width_px: int
    height_px: int


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


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _forecasts(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The forecasts of `metrics` in the order of the table; names we do not know come before the oracles."""
    given = _mapping(metrics.get("forecasts"))
    known = [name for name in FORECASTS if name in given]
    ours = [name for name in known if name not in ORACLES]
    return {
        name: _mapping(given[name])
        for name in [*ours, *(n for n in given if n not in FORECASTS), *(n for n in known if n in ORACLES)]
    }


def _score(forecast: Mapping[str, Any]) -> float:
    score = forecast.get("energy_score")
    return math.nan if score is None or not math.isfinite(score) else float(score)


def _has_law(metrics: Mapping[str, Any]) -> bool:
    """Whether forecasts were scored in px/frame against a known law, or in embedding space."""
    return "simulator_oracle" in _mapping(metrics.get("forecasts"))


def _unit(metrics: Mapping[str, Any]) -> str:
    return "px/frame" if _has_law(metrics) else "embedding space"


def _label(name: str) -> str:
    if name in FORECASTS:
        return FORECASTS[name][0]
    return LABELS.get(name, name.replace("_", " ").capitalize())


def _best(forecasts: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The name with the lowest score among what could be forecast; the oracles know the law."""
    scores = {n: _score(f) for n, f in forecasts.items() if n not in ORACLES and math.isfinite(_score(f))}
    return min(scores, key=lambda n: scores[n]) if scores else None


def markdown_table(metrics: dict) -> str:
    """The forecasts of `metrics` as an aligned Markdown table, also for a console; the best in bold."""
    forecasts = _forecasts(metrics)
    best = _best(forecasts)
    rows = [["forecast", f"ES {_unit(metrics)}", "x oracle", "90% coverage x / y"]]
    for name, forecast in forecasts.items():
        score = number(forecast.get("energy_score"))
        rows.append(
            [
                _label(name).replace("|", "\\|"),
                f"**{score}**" if name == best else score,
                number(forecast.get("ratio_to_oracle"), 2),
                number(forecast.get("coverage_90"), 2),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in [rows[0], rule, *rows[1:]]
    ]
    return "\n".join(line + " |" for line in lines)


def headline(metrics: dict) -> str:
    """One sentence: the score, and what it is relative to the oracle, or without one to a plain forecast."""
    forecasts = _forecasts(metrics)
    model = _score(forecasts.get("model", {}))
    if not math.isfinite(model):
        return "This run has no forecast score."
    if _has_law(metrics):
        oracle = _score(forecasts["simulator_oracle"])
        ratio = forecasts["model"].get("ratio_to_oracle")
        if number(ratio) == DASH:
            ratio = model / oracle if oracle > 0 else math.nan
        return (
            f"Forecasts reach an Energy Score of {number(model)} px/frame, {number(ratio, 2)} times the "
            f"{number(oracle)} of the true law itself."
        )
    sentence = f"Forecasts reach an Energy Score of {number(model)} in embedding space"
    for name, what in {
        "climatology": "of other clips' futures",
        "persistence": "of assuming that nothing changes",
    }.items():
        reference = _score(forecasts.get(name, {}))
        if reference > 0:
            sentence += f", {number(model / reference, 2)} times the {number(reference)} {what}"
            break
    return sentence + "."


# ------------------------------------------------------------------------------------------------------ pictures


def _data_uri(figure: Figure, *, dpi: int, lossless: bool) -> tuple[str, int, int]:
    """The figure as a WebP data URI, with its width and height in pixels."""
    buffer = BytesIO()
    options = {"lossless": True} if lossless else {"quality": 82}
    figure.savefig(buffer, format="webp", dpi=dpi, transparent=True, pil_kwargs=options)
    width_px, height_px = (round(float(side) * dpi) for side in figure.get_size_inches())
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode(), width_px, height_px


@contextmanager
def _style(theme: Mapping[str, str]) -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(
        {
            "font.size": 9,
            "text.color": theme["text"],
            "axes.labelcolor": theme["text"],
            "axes.edgecolor": theme["law"],
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": theme["grid"],
            "grid.linewidth": 0.8,
            "xtick.color": theme["text"],
            "ytick.color": theme["text"],
            "xtick.major.size": 0,
            "ytick.major.size": 0,
            "lines.linewidth": 1.6,
            "legend.frameon": False,
        }
    ):
        yield


def _chart(
    draw: Callable[[Axes, Mapping[str, str]], None], alt: str, *, size_in: tuple[float, float] = (4.2, 2.7)
) -> Picture:
    """A chart in both themes; `draw(axes, colours)` draws it."""
    from matplotlib.figure import Figure

    uris = {}
    for name, theme in THEMES.items():
        with _style(theme):
            figure = Figure(figsize=size_in, layout="constrained")
            draw(figure.add_subplot(), theme)
            uris[name], width_px, height_px = _data_uri(figure, dpi=CHART_DPI, lossless=True)
    return Picture(uris["light"], uris["dark"], alt, width_px, height_px)


def _shown(num_frames: int) -> list[int]:
    """Indices of the frames of a segment to draw: all, or a few from the first to the last."""
    if num_frames <= MAX_FRAMES_SHOWN:
        return list(range(num_frames))
    return [round(i * (num_frames - 1) / (MAX_FRAMES_SHOWN - 1)) for i in range(MAX_FRAMES_SHOWN)]


def _strip(
    frames: np.ndarray,
    alt: str,
    *,
    tile_px: int,
    origin_px: tuple[int, int] = (0, 0),
    overlay: Callable[[Axes, int], None] | None = None,
) -> Picture:
    """Frames uint8 [n, C, H, W] side by side, each about `tile_px` wide; `overlay(axes, i)` draws on frame i.

    `origin_px` is the (x, y) of the first pixel, for frames cut out of larger ones. Small frames are enlarged
    by a whole factor with nearest neighbours, so that their pixels stay crisp.
    """
    from matplotlib.figure import Figure

    num, channels, height, width = frames.shape
    factor = tile_px / max(width, height)
    factor = float(max(1, round(factor))) if factor >= 0.75 else factor
    tile_w, tile_h, gap = width * factor, height * factor, max(4.0, width * factor / 32)
    total_w = num * tile_w + (num - 1) * gap
    left, top = origin_px[0] - 0.5, origin_px[1] - 0.5  # pixel centres are at integers
    # A style of our own, so that a user's matplotlibrc changes nothing.
    with _style(THEMES["light"]):
        figure = Figure(figsize=(total_w / STRIP_DPI, tile_h / STRIP_DPI))
        for i, frame in enumerate(frames):
            axes = figure.add_axes((i * (tile_w + gap) / total_w, 0, tile_w / total_w, 1))
            axes.set_axis_off()
            axes.imshow(
                frame[0] if channels == 1 else np.moveaxis(frame, 0, -1),
                cmap="gray",
                vmin=0,
                vmax=255,
                extent=(left, left + width, top + height, top),
                interpolation="nearest" if factor >= 1 else "antialiased",
                aspect="auto",
            )
            if overlay is not None:
                overlay(axes, i)
            axes.set(xlim=(left, left + width), ylim=(top + height, top))
        uri, width_px, height_px = _data_uri(figure, dpi=STRIP_DPI, lossless=channels == 1)
    return Picture(uri, uri, alt, width_px, height_px)


def _points(velocity: np.ndarray | None, query: int) -> np.ndarray:
    """[n, 2] finite velocities of a query; none when there are none."""
    if velocity is None:
        return np.zeros((0, 2))
    points = np.asarray(velocity[query], dtype=float).reshape(-1, 2)
    return points[np.isfinite(points).all(axis=1)]


def _window(points: np.ndarray, height: int, width: int) -> tuple[int, int, int]:
    """x, y and side in px of the square cut of a frame that holds `points` [n, 2] and what moves there."""
    low, high = points.min(axis=0), points.max(axis=0)
    margin = max(height, width) * 9.5 / 64  # a 16 px digit in a frame of 64 px, and some air
    side = min(math.ceil((high - low).max() + 2 * margin), height, width)
    corner = np.round((low + high) / 2 - side / 2).astype(int)
    x, y = np.clip(corner, 0, [width - side, height - side])
    return int(x), int(y), side


def _numbers(indices: Sequence[int], first: int) -> str:
    """'frames 4, 5, 6' for indices 0, 1, 2 of a segment whose first frame is number 4."""
    return ("frame " if len(indices) == 1 else "frames ") + ", ".join(str(first + i) for i in indices)


def _frame_picture(examples: ForecastExamples, query: int) -> dict[str, Any]:
    """The context frames, and the target frames with the predicted paths over them, and captions for both."""
    n, shown = examples.num_frames, _shown(examples.num_frames)
    context = examples.frames[query, :n][shown]
    target = examples.frames[query, n : 2 * n][shown]
    seen, followed = _numbers(shown, 1), _numbers(shown, n + 1)
    pictures: dict[str, Any] = {
        "context_caption": f"Seen: {seen}",
        "target_caption": f"What followed: {followed}",
    }
    alt = f"Example {query + 1}: {followed}, as they happened"
    context_alt = f"Example {query + 1}: {seen}, which the model sees."
    samples, truth = _points(examples.velocity_samples, query), _points(examples.velocity_true, query)
    if examples.last_centre is None or not len(samples):
        pictures["context"] = _strip(context, context_alt, tile_px=CONTEXT_TILE_PX)
        pictures["target"] = _strip(target, alt + ".", tile_px=TARGET_TILE_PX)
        return pictures

    from matplotlib.collections import LineCollection
    from matplotlib.patches import Rectangle

    centre = np.asarray(examples.last_centre[query], dtype=float)
    height, width = target.shape[-2:]
    reach = np.concatenate([np.percentile(samples, [3, 97], axis=0), truth]) * n
    x, y, side = _window(np.concatenate([centre[None], centre + reach]), height, width)

    def mark_window(axes: Axes, i: int) -> None:
        if i == len(shown) - 1:
            axes.add_patch(Rectangle((x, y), side - 1, side - 1, fill=False, edgecolor="#8a94a0", linestyle=":"))

    def draw_paths(axes: Axes, i: int) -> None:
        steps = np.arange(shown[i] + 2)[:, None]  # frames since the last context frame: 0, 1, ... up to this one
        ends = centre + steps[-1] * samples
        paths = np.stack([np.broadcast_to(centre, ends.shape), ends], axis=1)
        alpha = float(np.clip(22 / len(samples), 0.1, 0.9))
        axes.add_collection(LineCollection(list(paths), colors=FAN, linewidths=1.0, alpha=alpha))
        axes.scatter(ends[:, 0], ends[:, 1], s=16, color=FAN, alpha=min(0.9, 2.5 * alpha), linewidths=0)
        if len(truth):
            path = centre + steps * truth[0]
            axes.plot(path[:, 0], path[:, 1], color=TRUTH, linewidth=1.6, marker="o", markersize=3.5)
            axes.plot(*path[-1], color=TRUTH, marker="o", markersize=15, markerfacecolor="none", markeredgewidth=2)

    mean = samples.mean(axis=0)
    alt += f", under {len(samples)} predicted paths from ({centre[0]:.0f}, {centre[1]:.0f}) px"
    alt += f", on average {mean[0]:+.1f} px a frame in x and {mean[1]:+.1f} in y"
    if len(truth):
        alt += f"; the true path goes {truth[0, 0]:+.1f} and {truth[0, 1]:+.1f}"
    dimmed = (target[..., y : y + side, x : x + side] * 0.5).astype(np.uint8)
    pictures["context"] = _strip(context, context_alt, tile_px=CONTEXT_TILE_PX, overlay=mark_window)
    pictures["target"] = _strip(dimmed, alt + ".", tile_px=TARGET_TILE_PX, origin_px=(x, y), overlay=draw_paths)
    if side < max(height, width):
        pictures["target_caption"] += ", enlarged (the dotted square) and dimmed"
    return pictures


def _velocity_pictures(examples: ForecastExamples) -> list[Picture]:
    """For each query a scatter of sampled velocities over draws of the true law; one scale for all."""
    if examples.velocity_samples is None:
        return []
    num = len(examples.frames)
    every = [
        np.concatenate([_points(v, q) for v in (examples.velocity_samples, examples.velocity_law)]) for q in range(num)
    ]
    truths = [_points(examples.velocity_true, q) for q in range(num)]
    # The law has heavy tails: the scale shows all but the outermost 1% of each query, and every true outcome.
    inner = [np.percentile(points, [0.5, 99.5], axis=0) for points in every if len(points)]
    bounds = np.concatenate([*inner, *truths]) if inner or any(len(t) for t in truths) else np.zeros((1, 2))
    low, high = bounds.min(axis=0), bounds.max(axis=0)
    half = max(float((high - low).max()) / 2 * 1.08, 0.5)
    middle = (low + high) / 2
    return [_velocity_picture(examples, query, middle, half) for query in range(num)]


def _velocity_picture(examples: ForecastExamples, query: int, middle: np.ndarray, half: float) -> Picture:
    samples, law, truth = (
        _points(v, query) for v in (examples.velocity_samples, examples.velocity_law, examples.velocity_true)
    )

    def draw(axes: Axes, theme: Mapping[str, str]) -> None:
        if len(law):
            axes.scatter(law[:, 0], law[:, 1], s=26, color=theme["law"], alpha=0.45, linewidths=0)
        if len(samples):
            axes.scatter(samples[:, 0], samples[:, 1], s=11, color=theme["model"], alpha=0.85, linewidths=0)
        if len(truth):
            axes.plot(*truth[0], marker="x", color=theme["truth"], markersize=11, markeredgewidth=2.6)
        axes.set(xlabel="velocity x, px/frame", ylabel="velocity y (down), px/frame", aspect="equal")
        axes.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] + half, middle[1] - half))

    alt = f"Example {query + 1}: {len(samples)} predicted velocities"
    if len(samples):
        alt += f" around ({samples[:, 0].mean():.2f}, {samples[:, 1].mean():.2f}) px/frame"
    if len(law):
        alt += f" over {len(law)} draws of the true law around ({law[:, 0].mean():.2f}, {law[:, 1].mean():.2f})"
    if len(truth):
        alt += f"; the true outcome is ({truth[0, 0]:.2f}, {truth[0, 1]:.2f})"
    return _chart(draw, alt + ".", size_in=(3.6, 3.4))


def _neighbour_pictures(examples: ForecastExamples) -> list[dict[str, Any]]:
    """For each query its actual target frames, and the real ones nearest to sampled future embeddings."""
    if examples.neighbours is None:
        return []
    n, shown = examples.num_frames, _shown(examples.num_frames)
    return [
        {
            "actual": _strip(
                clip[n : 2 * n][shown],
                f"Example {query + 1}: what actually followed.",
                tile_px=NEIGHBOUR_TILE_PX,
            ),
            "nearest": [
                _strip(
                    strip[shown],
                    f"Example {query + 1}: the real frames nearest to sampled future {i + 1}.",
                    tile_px=NEIGHBOUR_TILE_PX,
                )
                for i, strip in enumerate(neighbours)
            ],
        }
        for query, (clip, neighbours) in enumerate(zip(examples.frames, examples.neighbours, strict=True))
    ]


def _series(history: Sequence[Mapping[str, Any]], key: str, *, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of `key` in training rows or in all others; the later row of a step counts."""
    values = {
        int(row["step"]): float(row[key])
        for row in history
        if (row.get("split") == "train") == train and "step" in row and number(row.get(key)) != DASH
    }
    steps = sorted(values)
    return np.array(steps), np.array([values[step] for step in steps])


def _curve_pictures(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, Picture]]:
    """A title and a chart for each curve that `history` has."""
    pictures = []
    for key, title in CURVES.items():
        train, evaluation = _series(history, key, train=True), _series(history, key, train=False)
        if not len(train[0]) and not len(evaluation[0]):
            continue

        def draw(axes: Axes, theme: Mapping[str, str], train: Any = train, evaluation: Any = evaluation) -> None:
            steps, values = train
            width = len(steps) // 40
            if width > 1:  # a moving average over the noise of single batches
                axes.plot(steps, values, color=theme["law"], linewidth=0.8, alpha=0.55)
                mean = np.convolve(values, np.ones(width) / width, mode="valid")
                axes.plot(steps[width // 2 : width // 2 + len(mean)], mean, color=theme["model"], label="training")
            elif len(steps):
                axes.plot(steps, values, color=theme["model"], label="training")
            if len(evaluation[0]):
                colour = theme["truth" if len(steps) else "model"]
                axes.plot(*evaluation, marker="o", markersize=4, color=colour, label="evaluation")
            if len(steps) and len(evaluation[0]):
                axes.legend(fontsize=8)
            axes.set_xlabel("step")

        last_step, last = [(s[-1], v[-1]) for s, v in (train, evaluation) if len(s)][-1]
        alt = f"{title} against training step; {number(last)} at step {last_step:,}, the last one drawn."
        pictures.append((title, _chart(draw, alt)))
    return pictures


# ---------------------------------------------------------------------------------------------------------- page


def _table(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    forecasts = _forecasts(metrics)
    best = _best(forecasts)
    longest = max((s for s in map(_score, forecasts.values()) if math.isfinite(s)), default=0.0)
    samples = number(metrics.get("num_samples"))
    model = (
        "One forecast for each query: this run has no latent."
        if metrics.get("kl_nats") is None
        else f"{samples} futures for each query, from draws of the latent's prior."
        if samples != DASH
        else "Futures from draws of the latent's prior."
    )
    return [
        {
            "label": _label(name),
            "about": FORECASTS[name][1].format(model=model) if name in FORECASTS else "",
            "score": number(forecast.get("energy_score")),
            "bar_percent": round(max(0.0, 100 * _score(forecast) / longest), 1)
            if longest > 0 and math.isfinite(_score(forecast))
            else 0.0,
            "ratio": number(forecast.get("ratio_to_oracle"), 2),
            "coverage": number(forecast.get("coverage_90"), 2),
            "width": number(forecast.get("width_90"), 2),
            "best": name == best,
            "oracle": name in ORACLES,
            "model": name == "model",
        }
        for name, forecast in forecasts.items()
    ]


def _facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and value of every entry of `values`; nested mappings are flattened."""
    facts = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            facts += [(f"{_label(key)}: {label}", text) for label, text in _facts(value)]
        else:
            facts.append((_label(key), number(value)))
    return facts


def _embedding(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is known about the embedding; its own forecasts only where the table does not show them."""
    embedding = dict(_mapping(metrics.get("embedding")))
    forecasts = _forecasts({"forecasts": embedding.pop("forecasts", None)}) if _has_law(metrics) else {}
    embedding.pop("forecasts", None)
    return _facts(embedding) + [
        (f"Energy Score, {_label(name)}", number(forecast.get("energy_score"))) for name, forecast in forecasts.items()
    ]


def _probes(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What linear readouts recover, and how far predictions stray from what those were fitted on."""
    facts = _facts(_mapping(metrics.get("probes"))) + _facts(_mapping(metrics.get("readout")))
    beyond = {key: metrics[key] for key in ("beyond_fit_norm_99",) if key in metrics}
    return facts + _facts(beyond)


def _tiles(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The few numbers at the top of the page; those that are missing are left out."""
    model = _mapping(_mapping(metrics.get("forecasts")).get("model"))
    train = _mapping(metrics.get("train"))
    tiles = [
        (f"Energy Score, {_unit(metrics)}", number(model.get("energy_score"))),
        ("times the oracle's", number(model.get("ratio_to_oracle"), 2)),
        ("covered by 90% intervals, x / y", number(model.get("coverage_90"), 2)),
        ("KL, nats", number(metrics.get("kl_nats"), 2)),
        (f"of training, {number(train.get('steps'))} steps", duration(train.get("seconds"))),
        ("held-out queries", number(metrics.get("queries"))),
    ]
    return [(label, value) for label, value in tiles if DASH not in value]


def _plain(value: Any) -> Any:
    """`value` as strict JSON can hold it: NaN and infinities become null, arrays lists."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def write_report(
    path: Path,
    *,
    title: str,
    metrics: dict,
    config_yaml: str,
    history: list[dict],
    examples: ForecastExamples,
    versions: dict[str, str],
) -> None:
    """Write the report of a run to `path`, one HTML file that needs nothing else.

    `metrics` is what metrics.json holds and `history` the rows of metrics.jsonl; what they lack is left out,
    and a missing number is shown as a dash. The file appears whole or not at all. Raises OSError when
    it cannot be written.
    """
    from jinja2 import Environment, StrictUndefined

    segments, remainder = divmod(examples.frames.shape[1], examples.num_frames)
    assert examples.frames.dtype == np.uint8 and segments >= 2 and remainder == 0, examples.frames.shape
    template = files("worldmodel.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template).render(
        title=title,
        headline=headline(metrics),
        tiles=_tiles(metrics),
        has_law=_has_law(metrics),
        unit=_unit(metrics),
        table=_table(metrics),
        has_fan=examples.velocity_samples is not None and examples.last_centre is not None,
        frames=[_frame_picture(examples, query) for query in range(len(examples.frames))],
        velocities=_velocity_pictures(examples),
        neighbours=_neighbour_pictures(examples),
        curves=_curve_pictures(history),
        probes=_probes(metrics),
        embedding=_embedding(metrics),
        seed=number(metrics.get("seed")),
        versions=versions,
        config_yaml=config_yaml,
        metrics_json=json.dumps(_plain(metrics), indent=2, ensure_ascii=False),
        colours={
            "fan": FAN,
            "truth": TRUTH,
            **{f"{n}_{k}": c for n, t in THEMES.items() for k, c in t.items()},
        },
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    try:
        aside.write_text(page, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
