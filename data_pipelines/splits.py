"""The three splits of disjoint videos, and how an index is divided into them.

"train" fits a model, "selection" chooses one, "test" reports.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from data_pipelines.errors import UserError, did_you_mean
from data_pipelines.index import VideoIndex

Split = Literal["train", "selection", "test"]
SPLITS: tuple[Split, ...] = ("train", "selection", "test")
SHARES = (0.8, 0.1, 0.1)
MIN_VIDEOS_TO_DEAL = 10


def split_index(index: VideoIndex, split: Split) -> VideoIndex:
    """Return a split's share of a folder that has no folders per split: 80, 10 and 10 percent.

    The shares are those of share_of_split. With fewer than ten videos, "test" gets the last tenth of each, and
    "selection" the tenth before it.

    Raises UserError: there is no such split.
    """
    if split not in SPLITS:
        raise UserError(f"split={split!r} is not one of {', '.join(SPLITS)}{did_you_mean(split, SPLITS)}")
    return share_of_split(index, SPLITS.index(split), SHARES)


def share_of_split(index: VideoIndex, part: int, shares: Sequence[float]) -> VideoIndex:
    """Return one of several disjoint parts of an index, in the proportion of `shares`, which add up to 1.

    Whole videos (or episodes) are dealt by a hash of their paths. Fewer than ten are each divided by time. The first
    part gets the remainder of rounding.
    """
    if len(index.videos) < MIN_VIDEOS_TO_DEAL:
        start = round(sum(shares[:part], 0.0), 6)
        return replace(index, share=(start, round(start + shares[part], 6)))
    names = [video.path for video in index.videos]
    if index.episodes is not None:
        names = [f"{path}\0{start}" for path, (start, _) in zip(names, index.episodes, strict=True)]
    order = sorted(range(len(names)), key=lambda row: hashlib.sha256(os.fsencode(names[row])).digest())
    counts = [int(len(order) * share + 1e-9) for share in shares]
    stop = sum(counts[part + 1 :])  # counted from the last part, so that the first one takes the rest
    rows = order[stop:] if part == 0 else order[stop : stop + counts[part]]
    return index.rows(sorted(rows))
