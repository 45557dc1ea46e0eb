"""Shared parts of the pages of runs and of comparisons: rendering, learning curves, and words for lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from data_pipelines.files import write_text
from worldmodel.report.charts import Line
from worldmodel.report.drawing import FAN, GOAL, THEMES, TRUTH, Picture
from worldmodel.report.numbers import DASH, digits_for, number

if TYPE_CHECKING:
    from jinja2 import Template

CURVES = {
    "loss": "Loss",
    "kl_nats": "KL of the posterior from the prior, nats",
    "effective_rank": "Effective rank of the embedding",
    "energy_score": "Energy Score at evaluations",
}
LEVELS = (50, 80, 90)
HORIZON_LABEL = "horizon, segments"


class Card(NamedTuple):
    """A chart with its title and a hint for the reader."""

    title: str
    hint: str
    picture: Picture


def write_page(path: Path, template: str, **content: Any) -> None:
    """Render a template of this folder into a file that appears whole or not at all."""
    colours = {f"{name}_{key}": colour for name, theme in THEMES.items() for key, colour in theme.items()}
    page = _compiled(template).render(
        colours={"fan": FAN, "followed": TRUTH, "goal": GOAL, **colours},
        **content,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page.encode("utf-8", "backslashreplace").decode())  # a file name may hold bytes that are not UTF-8


@cache
def _compiled(template: str) -> Template:
    """Return a template of this folder, compiled once in a process."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("worldmodel.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template)


def plain(value: Any) -> Any:
    """Convert a value to strict JSON: NaN and infinities become null, arrays become lists."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def line_words(lines: Sequence[Line], digits: int = 2) -> str:
    """Return 'This run 0.66 to 2.10, Prior mean 0.91 to 3.00', from the first horizon step to the last."""
    ends = [(line.label, float(line.values[0]), float(line.values[-1])) for line in lines]
    digits = digits_for([value for _, *values in ends for value in values], digits)
    return ", ".join(f"{label} {number(first, digits)} to {number(last, digits)}" for label, first, last in ends)


def history_series(
    history: Sequence[Mapping[str, Any]], key: str, split: Literal["train", "selection"]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and finite values of `key` in the rows of training, or in those of selection clips.

    A later row replaces an earlier one of the same step.
    """
    values = {
        int(row["step"]): float(row[key])
        for row in history
        if row.get("split") == split and "step" in row and number(row.get(key)) != DASH
    }
    steps = sorted(values)
    return np.array(steps), np.array([values[step] for step in steps])
