"""The records of planning.json. metrics.py writes and reads the file."""

from typing import Annotated, Any, Required

from pydantic import Field

from worldmodel.runs.record_types import Part, Rate, Score, Short, Whole


class Planned(Part, total=False):
    """Success over the episodes of all seeds of one policy."""

    success_rate: Score
    ci95: Annotated[list[Score], Field(min_length=2, max_length=2)]
    per_seed: Annotated[list[Score], Field(max_length=10_000)]
    path_ratio: Score
    steps: Score
    ms_per_decision: Score


class PlannedWithLabels(Part, total=False):
    """A point of the curve of success against the number of labelled transitions."""

    labels: Required[Annotated[int, Field(strict=True, ge=1)]]
    success_rate: Required[Rate]
    ci95: Required[tuple[Rate, Rate]]
    per_seed: Annotated[list[Score], Field(max_length=10_000)]
    ms_per_decision: Score


FactorValue = Annotated[float, Field(strict=True, ge=-1e9, le=1e9, allow_inf_nan=False)] | Short


class VariedValue(Planned, total=False):
    """Success with one value of a factor of variation, all others at their present values."""

    value: Required[FactorValue]


class VariedFactor(Part, total=False):
    """Success against the values of a factor. present: its value in all other results."""

    factor: Required[Short]
    present: Required[FactorValue]
    values: Required[Annotated[list[VariedValue], Field(max_length=1_000)]]


class ProtocolFacts(Part, total=False):
    """Everything that a success rate depends on, besides the weights of the checkpoint.

    protocol is "drawn", or "recorded" with the number of frames from start to goal (offset) and the number of starts
    that were left out since they met the goal already (left_out). block: steps of the environment in one of the model.
    policy: "search", or "gc" for a goal-conditioned policy alone.
    """

    protocol: Short
    offset: Whole
    left_out: Whole
    env: Short
    env_kwargs: dict[str, Any]
    seeds: Whole
    episodes: Whole
    budget: Whole
    block: Whole
    first_seed: Whole
    planning: dict[str, Any]
    step: Whole
    labels: Whole
    policy: Short


class Planning(Planned, total=False):
    """The content of planning.json.

    do_nothing and replay, of actions of zero and of the recorded ones, belong to the protocol "recorded".
    """

    random_floor: Planned | None
    do_nothing: Planned | None
    replay: Planned | None
    oracle_ceiling: Planned | None
    protocol: ProtocolFacts
    curve: Annotated[list[PlannedWithLabels], Field(max_length=1_000)]
    factors: Annotated[list[VariedFactor], Field(max_length=100)]
