"""What is written beside videos: labels."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from data_pipelines.errors import UserError
from data_pipelines.probe import Video

log = logging.getLogger(__name__)


def read_labels(root: Path, videos: Sequence[Video]) -> dict[str, torch.Tensor]:
    """Labels from root/metadata.jsonl: the numeric and list-of-number fields that every video has."""
    metadata = root / "metadata.jsonl"
    if not metadata.is_file():
        return {}
    rows: dict[str, dict[str, Any]] = {}
    with open(metadata, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                rows[row.pop("file_name")] = row
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(
                    f"'{metadata}' line {number} is not a JSON object with a file_name: {line.strip()[:80]!r}"
                ) from None
    missing = [video.path for video in videos if video.path not in rows]
    if missing:
        log.warning(
            "'%s' has no line for %d of %d videos, '%s' for one: labels are left out",
            metadata, len(missing), len(videos), missing[0],
        )  # fmt: skip
        return {}
    return stack_labels([rows[video.path] for video in videos])


def stack_labels(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """One row of labels a video -> the numeric and list-of-number fields that every row has."""
    labels = {}
    for name in rows[0]:
        values = [row.get(name) for row in rows]
        tensor = _numbers_to_tensor(values)
        if tensor is not None:
            labels[name] = tensor
    return labels


def _numbers_to_tensor(values: Sequence[Any]) -> torch.Tensor | None:
    """Numbers or equally long lists of numbers -> int64 or float32 [N] or [N, K]; anything else -> None."""
    if isinstance(values[0], list):
        flat = [x for row in values if isinstance(row, list) and len(row) == len(values[0]) for x in row]
        shape: tuple[int, ...] = (len(values), len(values[0]))
    else:
        flat, shape = list(values), (len(values),)
    if len(flat) != math.prod(shape) or not all(isinstance(x, int | float) for x in flat):
        return None
    is_integer = all(isinstance(x, int) and abs(x) < 2**63 for x in flat)
    return torch.tensor(flat, dtype=torch.int64 if is_integer else torch.float32).reshape(shape)
