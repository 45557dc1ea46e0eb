"""The types of the values that the records of a run folder hold (metrics.py, planning_metrics.py)."""

import math
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field
from typing_extensions import TypedDict

MAX_SCORE = 1e100
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
"""A score for each horizon step, or at each step one for each dimension."""
Levels = Annotated[dict[str, Series], Field(max_length=MAX_NAMES)]


class Part(TypedDict, total=False):
    """A record, any part of which may be missing. Further keys may hold any plain value."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
