"""The files from which figures are read, by name, with the types of their content."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from data_pipelines.errors import UserError
from data_pipelines.text_files import read_small
from worldmodel.runs.metrics import MAX_BYTES, DecoderFacts, Metrics, find_value
from worldmodel.runs.planning_metrics import Planning
from worldmodel.runs.record_types import MAX_NAMES, Part, Score, Whole


class Alarms(Part, total=False):
    """Shares of transitions above the threshold at a rate of false alarms: of normal videos, and at each event."""

    rate: Score
    threshold: Score
    normal: Score
    normal_ci95: list[Score]
    detected: Annotated[dict[str, Score], Field(max_length=MAX_NAMES)]


class PairShare(Part, total=False):
    """The share of pairs whose impossible video surprises more."""

    share: Score
    ci95: list[Score]


class SurpriseEvents(Part, total=False):
    """The content of surprise_events.json: the AUROC of each measure for each event, and alarms; or pairs."""

    num_videos: Whole
    seed: Whole
    step: Whole
    auroc: Annotated[dict[str, dict[str, Score]], Field(max_length=MAX_NAMES)]
    alarms: Alarms
    pairs: Annotated[dict[str, PairShare], Field(max_length=MAX_NAMES)]


class OutcomeScores(Part, total=False):
    """Scores of forecasts of two outcomes (benchmarks/two_outcomes.py)."""

    law: Score
    model: Score
    mean_of_samples: Score
    persistence: Score
    brier_law: Score
    brier_model: Score
    brier_base_rate: Score


class TwoOutcomes(Part, total=False):
    """The content of two_outcomes.json: scores for seen and for unseen combinations."""

    queries: Whole
    samples: Whole
    seed: Whole
    step: Whole
    seen: OutcomeScores
    unseen: OutcomeScores


Methods = Annotated[dict[str, dict[str, Score]], Field(max_length=MAX_NAMES)]
"""A score of each method for each kind."""


class InfluenceScores(Part, total=False):
    """The content of influence.json (benchmarks/influence.py)."""

    seed: Whole
    steps: Whole
    duplicates: Methods
    bad: Methods
    effect: Methods


class Spread(Part, total=False):
    """A mean and a standard deviation."""

    mean: Score
    sd: Score


class FewLabels(Part, total=False):
    """The content of few_labels.json (benchmarks/few_labels.py): accuracy of each method for each number of labels."""

    draws: Whole
    seed: Whole
    step: Whole
    accuracy: Annotated[dict[str, dict[str, Spread]], Field(max_length=MAX_NAMES)]


class Throughput(Part, total=False):
    """Rollouts on a number of threads; ratio: batched over a loop."""

    num_threads: Whole
    batched_per_s: Score
    loop_per_s: Score
    ratio: Score


class RolloutTimes(Part, total=False):
    """The content of rollout.json (benchmarks/rollout.py)."""

    latency_ms: Score
    throughput: list[Throughput]


class TrainStepTimes(Part, total=False):
    """The content of train_step.json (benchmarks/train_step.py)."""

    baseline_step_s: Score
    step_s: Score
    speedup: Score
    loss_max_diff: Score
    loss_max_diff_as_timed: Score


class ProcessTimes(Part, total=False):
    """The steps of a number of processes."""

    processes: Whole
    step_s: Score
    speedup: Score
    quick_step_s: Score
    quick_speedup: Score


class ScalingTimes(Part, total=False):
    """The content of scaling.json (benchmarks/scaling.py)."""

    rows: list[ProcessTimes]


class NeighbourTimes(Part, total=False):
    """The step of a training with one neighbour; to_alone is relative to the same training without any."""

    step_s: Score
    to_alone: Score
    fair_share: Score
    to_fair_share: Score


class NeighbouredTraining(Part, total=False):
    """A training, with its times by neighbour."""

    training: Annotated[str, Field(max_length=100)]
    num_threads: Whole
    cases: Annotated[dict[str, NeighbourTimes], Field(max_length=MAX_NAMES)]


class Neighbours(Part, total=False):
    """The content of neighbours.json (benchmarks/neighbours.py)."""

    rows: list[NeighbouredTraining]


class QueryScores(Part, total=False):
    """Probe accuracy within a budget, mean and standard deviation over seeds, queries asked, related pairs found."""

    queries: Whole
    random: Score
    random_std: Score
    random_asked: Score
    random_related: Score
    active: Score
    active_std: Score
    active_asked: Score
    active_related: Score


class PairQueries(Part, total=False):
    """The content of pair_queries.json (benchmarks/pair_queries.py). all_pairs: the accuracy if all pairs are known."""

    seeds: Whole
    images: Whole
    dim: Whole
    all_pairs: Score
    rows: list[QueryScores]


RECORDS: dict[str, Any] = {
    "metrics.json": Metrics,
    "planning.json": Planning,
    "decoder.json": DecoderFacts,
    "surprise_events.json": SurpriseEvents,
    "two_outcomes.json": TwoOutcomes,
    "influence.json": InfluenceScores,
    "few_labels.json": FewLabels,
    "rollout.json": RolloutTimes,
    "train_step.json": TrainStepTimes,
    "scaling.json": ScalingTimes,
    "neighbours.json": Neighbours,
    "pair_queries.json": PairQueries,
}


def read_record(path: Path) -> Mapping[str, Any] | None:
    """Return the content of a JSON file; None if there is no such file.

    Raises:
        UserError: the file is not JSON with keys and values.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(read_small(path, MAX_BYTES))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold keys and values, not {type(content).__name__}")
    return content


def number_at(record: Mapping[str, Any] | None, path: str) -> float | None:
    """Return the number at a dotted path, or the largest at several, separated by " | "; None if there is no number."""
    found = [find_value(record, one) for one in path.split(" | ")]
    numbers = [float(value) for value in found if isinstance(value, int | float) and not isinstance(value, bool)]
    return max(numbers, default=None)
