"""metrics.json, planning.json and decoder.json of a run folder: their records, and how they are written and read.

The evaluation builds these records; reports and comparisons read them. A value deep inside has a place, its dotted path
such as "forecasts.model.energy_score.0". `value_at` and `place` accept only places that the records declare, so that a
key that was renamed in one file alone fails at once.

The files may come from a stranger: they are checked when they are read. Any part may be missing. Further keys may hold
any plain value.

Legend: H horizon steps, K dimensions of the quantity.
"""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, cast, get_args, get_origin

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import get_type_hints, is_typeddict

from data_pipelines.errors import UserError
from data_pipelines.files import write_text
from data_pipelines.text_files import read_small, shown
from worldmodel.runs.folder import RunFolder
from worldmodel.runs.planning_metrics import Planning
from worldmodel.runs.record_types import (
    MAX_HORIZON,
    MAX_NAMES,
    Levels,
    Part,
    Score,
    Scores,
    Series,
    Short,
    Whole,
)

MAX_BYTES, MAX_DEPTH, MAX_VALUES = 16 << 20, 16, 2**20
MAX_INT = 2**63

OWN_FORECASTS = ("model", "model_recalibrated")
"""The names of the forecasts that the run itself makes."""
BASELINES = (
    "persistence",
    "label_persistence",
    "constant_velocity",
    "pixel_constant_velocity",
    "climatology",
    "training_climatology",
    "linear_gaussian",
)
"""The names of the forecasts that need no world model, which the run must beat."""


# ------------------------------------------------------------------------------------------------------ metrics.json


class Skill(Part, total=False):
    """1 - ES / ES of a baseline at each horizon step, and the ends of its interval; None if the baseline never errs."""

    value: Series
    low: Series
    high: Series


class Intervals(Part, total=False):
    """How the intervals of skill scores were made: by resampling blocks of successive queries.

    num_blocks blocks of at most block_clips queries of one video hold all queries. level is the nominal coverage.
    """

    level: Score
    block_clips: Whole
    num_blocks: Whole
    resamples: Whole


class Forecast(Part, total=False):
    """Scores of one forecast at each horizon step.

    crps [H][K], coverage and width {level: [H][K]} have K = 1 in embedding space. spread_skill, coverage, width and
    rank_histogram are None for a single sample. ratio_to_oracle needs a known law. skill is that over each baseline, by
    the baseline's name; only the run's own forecasts have it.
    """

    energy_score: Series
    crps: Series | None
    best_of: Series | None
    coverage: Levels | None
    width: Levels | None
    spread_skill: Series | None
    rank_histogram: Annotated[list[Scores | None], Field(max_length=MAX_HORIZON)] | None
    ratio_to_oracle: Series | None
    skill: Annotated[dict[str, Skill], Field(max_length=MAX_NAMES)] | None


Forecasts = Annotated[dict[str, Forecast], Field(max_length=MAX_NAMES)]


class RetrievalScores(Part, total=False):
    """Rank of the real future among the targets of all queries, at each horizon step."""

    mrr: Series
    hit_1: Series
    hit_5: Series
    hit_10: Series


class Retrieval(Part, total=False):
    distractors: Whole
    forecasts: Annotated[dict[str, RetrievalScores], Field(max_length=MAX_NAMES)]


class Embedding(Part, total=False):
    """Scores in embedding space; std is the mean standard deviation of the target embeddings."""

    forecasts: Forecasts
    retrieval: Retrieval | None
    effective_rank: Score
    std: Score


class RecalibrationFacts(Part, total=False):
    """The factor of the spread and the weight of climatology at each horizon step."""

    spread: Series
    weight: Series


class Recalibrations(Part, total=False):
    """The recalibration in each space; quantity is None if there is none."""

    embedding: RecalibrationFacts
    quantity: RecalibrationFacts | None


class QuantityFacts(Part, total=False):
    name: Short
    unit: Short | None
    dimensions: Annotated[list[Short], Field(max_length=MAX_HORIZON)]


class Training(Part, total=False):
    """The training of the weights: its duration, its steps, and the updates of refinement."""

    seconds: Score
    steps: Whole
    refine_steps: Whole


class ReadoutFacts(Part, total=False):
    strength: Score
    r2: Score | Scores


class FactorScores(Part, total=False):
    in_distribution_r2: Score
    out_of_distribution_r2: Score


class Dci(Part, total=False):
    disentanglement: Score
    completeness: Score


class ProbeScores(Part, total=False):
    """Accuracy of a class, or R^2 of a measure, by each probe."""

    linear: Score
    knn: Score
    mlp: Score
    few_shot_1: Score
    few_shot_5: Score
    few_shot_10: Score


Targets = Annotated[dict[str, ProbeScores], Field(max_length=MAX_NAMES)]


class Metrics(Part, total=False):
    """The content of metrics.json.

    A run on videos has forecasts, a run on a causal world has factors, dci, and dci_of_r if there is a latent.
    kl_nats or expected_l0 is the mean penalty of the latent.
    """

    run: Short | None
    train: Training
    seed: Whole
    queries: Whole
    queries_sha256: Short
    num_samples: Whole
    horizon: Annotated[int, Field(strict=True, ge=1)]
    segment_frames: Whole
    intervals: Intervals
    kl_nats: Score
    expected_l0: Score
    embedding: Embedding
    space: Short | None
    quantity: QuantityFacts | None
    forecasts: Forecasts
    beyond_fit_norm_99: Series
    readout: ReadoutFacts | None
    recalibration: Recalibrations | None
    probes: Annotated[dict[str, Targets], Field(max_length=MAX_NAMES)]
    factors: FactorScores
    dci: Dci
    dci_of_r: Dci


# ------------------------------------------------------------------------------------------------------ decoder.json


class DecoderFacts(Part, total=False):
    """The content of decoder.json.

    step counts the updates of the run's checkpoint. Errors are mean squared ones of held-out frames in [0, 1].
    """

    step: Whole
    decoder_steps: Whole
    clips: Whole
    seed: Whole
    seconds: Score
    held_out_clips: Whole
    mse: Score
    mean_picture_mse: Score
    last_frame_mse: Score
    other_embedding_mse: Score


class RunMetrics(Metrics, total=False):
    """The content of a report: metrics.json, with planning.json as "planning" and decoder.json as "decoder"."""

    planning: Planning
    decoder: DecoderFacts


# ------------------------------------------------------------------------------------------------------------ places


def place(path: str) -> str:
    """Return the path, a place in RunMetrics. A placeholder in braces counts as an index of a list."""
    assert is_declared(path), f"metrics.json has no place {path!r}"
    return path


@lru_cache(maxsize=4096)
def is_declared(path: str, kind: Any = RunMetrics) -> bool:
    """True if the records declare the dotted path. Names of forecasts, targets and labels are free.

    kind: the record at which the path begins.
    """
    return _leads_on(kind, tuple(path.split(".")))


def _leads_on(kind: Any, parts: tuple[str, ...]) -> bool:
    """True if the parts of a path are declared below a type."""
    if not parts or kind is Any:
        return True
    if is_typeddict(kind):
        hints = get_type_hints(kind)
        return parts[0] in hints and _leads_on(hints[parts[0]], parts[1:])
    origin, arguments = get_origin(kind), [part for part in get_args(kind) if part is not NoneType]
    if origin is dict:
        # A free name may itself hold dots. A path ends with a name only if a score or a list belongs to it.
        is_record = is_typeddict(arguments[1]) or get_origin(arguments[1]) is dict
        ends_here = len(parts) == 1 and not is_record
        return ends_here or any(_leads_on(arguments[1], parts[n:]) for n in range(1, len(parts)))
    if origin in (list, tuple):
        return re.fullmatch(r"[0-9]+|\{.*\}", parts[0]) is not None and _leads_on(arguments[0], parts[1:])
    return any(_leads_on(option, parts) for option in arguments)


def value_at(metrics: Any, path: str) -> Any:
    """Return the value at a place of RunMetrics; None if it is missing."""
    return find_value(metrics, place(path))


def find_value(content: Any, path: str) -> Any:
    """Return the value at a dotted path of nested dicts and lists; None if it is missing.

    Names below the first may hold dots.
    """
    first, *rest = path.split(".")
    return _found(content.get(first), rest) if isinstance(content, Mapping) else None


def _found(content: Any, parts: list[str]) -> Any:
    if not parts:
        return content
    if isinstance(content, Mapping):
        for n in range(1, len(parts) + 1):
            value = _found(content.get(".".join(parts[:n])), parts[n:])
            if value is not None:
                return value
    elif isinstance(content, list | tuple) and re.fullmatch(r"[0-9]{1,9}", parts[0]) and int(parts[0]) < len(content):
        return _found(content[int(parts[0])], parts[1:])
    return None


# ------------------------------------------------------------------------------------------------------------- files


def write_metrics(run: Path, metrics: Metrics) -> None:
    """Write metrics.json. Raises UserError if it cannot be written."""
    _write(RunFolder(run).metrics, metrics)


def write_planning(run: Path, planning: Planning) -> None:
    """Write planning.json. Raises UserError if it cannot be written."""
    _write(RunFolder(run).planning, planning)


def write_decoder_facts(run: Path, facts: DecoderFacts) -> None:
    """Write decoder.json. Raises UserError if it cannot be written."""
    _write(RunFolder(run).decoder_facts, facts)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    try:
        write_text(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def read_metrics(run: Path) -> Metrics | None:
    """Return the content of a run's metrics.json; None if there is no such file.

    Raises:
        UserError: the file is not JSON of the types above, or claims more horizon steps than it has scores for.
    """
    return cast(Metrics | None, _read(RunFolder(run).metrics, Metrics))


def read_planning(run: Path) -> Planning | None:
    """Return the content of a run's planning.json; None if there is no such file.

    Raises:
        UserError: the file is not JSON of the types above.
    """
    return cast(Planning | None, _read(RunFolder(run).planning, Planning))


def read_decoder_facts(run: Path) -> DecoderFacts | None:
    """Return the content of a run's decoder.json; None if there is no such file.

    Raises:
        UserError: the file is not JSON of the types above.
    """
    return cast(DecoderFacts | None, _read(RunFolder(run).decoder_facts, DecoderFacts))


def _read(path: Path, kind: Any) -> Any:
    """Return the content of a file as `json` gives it, checked to be of this kind; None if there is no such file."""
    if not path.exists():
        return None
    text = read_small(path, MAX_BYTES)
    try:
        content = json.loads(text)
        _check_plain(content)
        TypeAdapter(kind).validate_python(content)
        _check_horizon(content)
    except ValidationError as error:
        raise _damaged(path, _explained(error.errors(include_url=False)[0])) from error
    except RecursionError as error:
        raise _damaged(path, "values nested too deep") from error
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    return content


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(f"{path} is damaged, write it again by the command that wrote it: {problem}")


def _explained(entry: Any) -> str:
    place = ".".join(str(part) for part in entry["loc"] if str(part).isidentifier() or isinstance(part, int))
    message = entry["msg"].removeprefix("Value error, ")
    return f"{place[:200]}={shown(entry['input'])}: {message[0].lower()}{message[1:]}"


def _check_plain(content: Any) -> None:
    """Raise ValueError for more values, deeper nesting or larger integers than the file of an evaluation has."""
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
    """Raise ValueError if `horizon` is beyond the longest list of scores."""
    scored = [
        *metrics.get("forecasts", {}).values(),
        *metrics.get("embedding", {}).get("forecasts", {}).values(),
    ]
    steps = max((len(forecast.get("energy_score", ())) for forecast in scored), default=0)
    if metrics.get("horizon", 1) > max(1, steps):
        raise ValueError(f"horizon={metrics['horizon']}, but there are scores of {steps} steps")
