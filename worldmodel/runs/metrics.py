"""metrics.json and planning.json of a run folder, which may come from a stranger: read once, and checked there.

Whoever formats or draws the numbers relies on these types. Any part may be missing, and further keys may hold any
plain value.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any, Required

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from data_pipelines.errors import UserError
from data_pipelines.text_files import read_small, shown

METRICS_NAME, PLANNING_NAME = "metrics.json", "planning.json"
MAX_BYTES, MAX_DEPTH, MAX_VALUES = 16 << 20, 16, 2**20
MAX_INT, MAX_SCORE = 2**63, 1e100
MAX_HORIZON, MAX_NAMES = 1_024, 100


def _drawable(value: float) -> float:
    if math.isfinite(value) and abs(value) > MAX_SCORE:
        raise ValueError(f"a score is at most {MAX_SCORE:g}")
    return value


Score = Annotated[float, Field(strict=True), AfterValidator(_drawable)] | None
Rate = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
Whole = Annotated[int, Field(strict=True)] | None
Short = Annotated[str, Field(strict=True, max_length=1_000)]
Scores = Annotated[list[Score], Field(max_length=MAX_HORIZON)]
Series = Annotated[list[Score | Scores], Field(max_length=MAX_HORIZON)]
"""A score for each horizon step, or one for each of several dimensions there."""
Levels = Annotated[dict[str, Series], Field(max_length=MAX_NAMES)]


class _Part(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]


class Forecast(_Part, total=False):
    energy_score: Series
    ratio_to_oracle: Series | None
    crps: Series | None
    best_of: Series | None
    spread_skill: Series | None
    coverage: Levels | None
    width: Levels | None
    rank_histogram: Annotated[list[Scores | None], Field(max_length=MAX_HORIZON)] | None


Forecasts = Annotated[dict[str, Forecast], Field(max_length=MAX_NAMES)]


class Retrieval(_Part, total=False):
    forecasts: Annotated[dict[str, Levels], Field(max_length=MAX_NAMES)]


class Embedding(_Part, total=False):
    forecasts: Forecasts
    retrieval: Retrieval | None


class Quantity(_Part, total=False):
    name: Short
    unit: Short | None
    dimensions: Annotated[list[Short], Field(max_length=MAX_HORIZON)]


class Training(_Part, total=False):
    seconds: Score
    steps: Whole


Probes = Annotated[dict[str, Score], Field(max_length=MAX_NAMES)]
Targets = Annotated[dict[str, Probes], Field(max_length=MAX_NAMES)]


class Metrics(_Part, total=False):
    """The content of metrics.json."""

    queries: Whole
    queries_sha256: Short
    num_samples: Whole
    train: Training
    kl_nats: Score
    expected_l0: Score
    horizon: Annotated[int, Field(strict=True, ge=1)]
    segment_s: Score
    quantity: Quantity | None
    forecasts: Forecasts
    embedding: Embedding
    beyond_fit_norm_99: Series
    probes: Annotated[dict[str, Targets], Field(max_length=MAX_NAMES)]


class Planned(_Part, total=False):
    success_rate: Score
    ci95: Annotated[list[Score], Field(min_length=2, max_length=2)]
    per_seed: Annotated[list[Score], Field(max_length=10_000)]
    path_ratio: Score
    steps: Score
    ms_per_decision: Score


class OfLabels(_Part, total=False):
    labels: Required[Annotated[int, Field(strict=True, ge=1)]]
    success_rate: Required[Rate]
    ci95: Required[tuple[Rate, Rate]]
    ms_per_decision: Score
    per_seed: Annotated[list[Score], Field(max_length=10_000)]


class Protocol(_Part, total=False):
    budget: Whole
    labels: Whole


class Planning(Planned, total=False):
    """The content of planning.json."""

    random_floor: Planned | None
    oracle_ceiling: Planned | None
    protocol: Protocol
    curve: Annotated[list[OfLabels], Field(max_length=1_000)]


def read_metrics_file(path: Path) -> dict[str, Any] | None:
    """Return the content of a metrics.json or planning.json, as `json` gives it; None where there is no such file.

    Raises:
        UserError: the file is not JSON of the types above, or claims more horizon steps than it has scores for.
    """
    if not path.exists():
        return None
    text = read_small(path, MAX_BYTES)
    try:
        content = json.loads(text)
        _check_plain(content)
        TypeAdapter(Planning if path.name == PLANNING_NAME else Metrics).validate_python(content)
        _check_horizon(content)
    except ValidationError as error:
        raise _damaged(path, _explained(error.errors(include_url=False)[0])) from error
    except RecursionError as error:
        raise _damaged(path, "values nested too deep") from error
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    return content


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(f"{path} is damaged, write it again by the script that did: {problem}")


def _explained(entry: Any) -> str:
    place = ".".join(str(part) for part in entry["loc"] if str(part).isidentifier() or isinstance(part, int))
    message = entry["msg"].removeprefix("Value error, ")
    return f"{place[:200]}={shown(entry['input'])}: {message[0].lower()}{message[1:]}"


def _check_plain(content: Any) -> None:
    """Raises ValueError: more values, deeper nesting or larger integers than the file of an evaluation has."""
    level, num_values = [content], 0
    for _ in range(MAX_DEPTH):
        num_values += len(level)
        if num_values > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES:,} values")
        for value in level:
            if isinstance(value, int) and abs(value) > MAX_INT:
                raise ValueError(f"the number {shown(value)} is out of range")
        level = [
            part
            for value in level
            if isinstance(value, dict | list)
            for part in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise ValueError(f"values nested more than {MAX_DEPTH} deep")


def _check_horizon(metrics: dict[str, Any]) -> None:
    """Raises ValueError: `horizon` is beyond the longest list of scores."""
    scored = [
        *metrics.get("forecasts", {}).values(),
        *metrics.get("embedding", {}).get("forecasts", {}).values(),
    ]
    steps = max((len(forecast.get("energy_score", ())) for forecast in scored), default=0)
    if metrics.get("horizon", 1) > max(1, steps):
        raise ValueError(f"horizon={metrics['horizon']}, but there are scores of {steps} steps")
