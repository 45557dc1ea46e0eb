"""Several roots with weights as one data set: one index of all their videos.

Each root has its own splits, so a split of the whole is that split of every root. mixing.py has the order of the clips.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipelines.errors import UserError, one_line_logger
from data_pipelines.index import IndexPart, VideoIndex, View
from data_pipelines.remote.stores import is_url
from data_pipelines.split_folders import load_split
from data_pipelines.splits import Split
from data_pipelines.text_files import shown

log = one_line_logger(__name__)


@dataclass(frozen=True)
class WeightedRoot:
    """A root of a data set, and its share of the training clips relative to the weights of the others."""

    path: str
    weight: float = 1.0


def load_roots(roots: Sequence[WeightedRoot], split: Split | None, **options: Any) -> VideoIndex:
    """Index a split of several roots.

    options: arguments of load_split, for every root.

    Raises UserError: as load_split; a root is a URL, or is in another root.
    """
    places = [os.path.abspath(root.path) for root in roots]
    for number, (root, place) in enumerate(zip(roots, places, strict=True)):
        if is_url(root.path):
            raise UserError(f"'{root.path}' is a URL: of several roots, each must be a folder")
        if not 0 < root.weight < float("inf"):
            raise UserError(f"weight={root.weight} of '{root.path}' must be above 0")
        for other in places[:number] + places[number + 1 :]:
            if place == other or place.startswith(f"{other}{os.sep}"):
                raise UserError(f"the root '{root.path}' is in the root '{other}': each video must be in one root")
    indexes = [load_split(root.path, split, **options) for root in roots]
    return merge_indexes(indexes, [root.weight for root in roots])


def merge_indexes(indexes: Sequence[VideoIndex], weights: Sequence[float]) -> VideoIndex:
    """Return one index of the videos of several local indexes, root after root.

    A label that not every root has in the same shape is left out, as a fault.
    """
    base = Path(os.path.commonpath([os.path.abspath(index.root) for index in indexes]))
    prefixes = [_prefix(base, index) for index in indexes]
    counts = [len(index.videos) for index in indexes]
    first_rows = np.cumsum([0, *counts[:-1]]).tolist()
    labels, faults = _merged_labels([index.labels for index in indexes], indexes)
    frame_labels, frame_faults = _merged_labels([index.frame_labels for index in indexes], indexes)
    if left_out := sorted((faults | frame_faults).keys()):
        log.warning("labels that not all roots have alike are left out: %s", ", ".join(map(shown, left_out)))
    return VideoIndex(
        root=base,
        videos=[
            _moved(video, prefix) for index, prefix in zip(indexes, prefixes, strict=True) for video in index.videos
        ],
        bad=[_moved(entry, prefix) for index, prefix in zip(indexes, prefixes, strict=True) for entry in index.bad],
        labels=labels,
        episodes=[frames for index in indexes for frames in index.frame_ranges],
        frame_labels=frame_labels,
        frame_label_offsets=_merged_offsets(indexes) if frame_labels else None,
        label_faults={name: fault for index in indexes for name, fault in index.label_faults.items()}
        | faults
        | frame_faults,
        parts=[
            IndexPart(row, prefix, weight, index.content_hash)
            for row, prefix, weight, index in zip(first_rows, prefixes, weights, indexes, strict=True)
        ],
        views=_merged_views(indexes, prefixes),
    )


def _merged_views(indexes: Sequence[VideoIndex], prefixes: Sequence[str]) -> list[View]:
    """Return the further cameras of all rows. Raises UserError: not every root has the same number."""
    if differing := [index for index in indexes if index.num_cameras != indexes[0].num_cameras]:
        raise UserError(
            f"the root '{indexes[0].root}' has {indexes[0].num_cameras} cameras and '{differing[0].root}' "
            f"{differing[0].num_cameras}: several roots need the same cameras"
        )
    merged = []
    for of_roots in zip(*(index.views for index in indexes), strict=True):
        pairs = zip(of_roots, prefixes, strict=True)
        videos = [_moved(video, prefix) for view, prefix in pairs for video in view.videos]
        merged.append(View(videos, [shift for view in of_roots for shift in view.shifts]))
    return merged


def _prefix(base: Path, index: VideoIndex) -> str:
    relative = os.path.relpath(os.path.abspath(index.root), base)
    return "" if relative == "." else f"{Path(relative).as_posix()}/"


def _moved(entry: Any, prefix: str) -> Any:
    """Return a video or a bad file with its path, and its shard, below another folder."""
    shard = getattr(entry, "shard", "")
    return replace(entry, path=f"{prefix}{entry.path}", **({"shard": f"{prefix}{shard}"} if shard else {}))


def _merged_labels(
    of_roots: Sequence[dict[str, Tensor]], indexes: Sequence[VideoIndex]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the labels that all roots have in one shape, and the faults of the others."""
    merged: dict[str, Tensor] = {}
    faults: dict[str, str] = {}
    for name in dict.fromkeys(name for labels in of_roots for name in labels):
        lacking = [index for index, labels in zip(indexes, of_roots, strict=True) if name not in labels]
        if lacking:
            faults[name] = lacking[0].label_faults.get(name, f"'{lacking[0].root}' has no such label")
            continue
        tensors = [labels[name] for labels in of_roots]
        if len({tensor.shape[1:] for tensor in tensors}) > 1:
            faults[name] = f"'{indexes[0].root}' and another root have it in different sizes"
            continue
        is_float = any(tensor.is_floating_point() for tensor in tensors)
        merged[name] = torch.cat([tensor.float() if is_float else tensor for tensor in tensors])
    return merged, faults


def _merged_offsets(indexes: Sequence[VideoIndex]) -> Tensor:
    """Return the offsets of all rows; every index has labels of frames."""
    offsets, before = [], 0
    for index in indexes:
        assert index.frame_label_offsets is not None
        offsets.append(index.frame_label_offsets + before)
        before += len(next(iter(index.frame_labels.values())))
    return torch.cat(offsets)
