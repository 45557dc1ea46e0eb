"""Relations between the images of a split: which image may be the target of which.

A relation lists contexts. The target of a context is one of several images, and a uniform number chooses it. So the
pair is a pure function of the context and that number.

Legend: N images, M contexts, B drawn pairs, P listed pairs.
"""

import csv
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipelines.clips import Ints
from data_pipelines.errors import UserError, one_line, one_line_logger
from data_pipelines.index import VideoIndex
from data_pipelines.text_files import shown

log = one_line_logger(__name__)

COLUMNS = ("first", "second")
"""The columns of a file of pairs: the context and the target, as paths below the root of the images."""


@dataclass(frozen=True)
class Relation:
    """The contexts of a split and the possible targets of each.

    contexts: int64 [M], images, each by its number in the index. An image may be in several places.
    first, count: int64 [M]: the targets of context m are targets[first[m] : first[m] + count[m]].
    targets: int64, images.
    skips_self: the context is one of its own targets, at `place` [M] among them, and is never drawn.
    """

    contexts: Ints
    first: Ints
    count: Ints
    targets: Ints
    place: Ints | None = None

    @property
    def num_pairs(self) -> int:
        """M."""
        return len(self.contexts)

    def draw(self, numbers: Ints, uniform: NDArray[np.float64]) -> Ints:
        """Return the targets [B] of the contexts with these numbers [B], by uniform numbers [B] in [0, 1)."""
        count = self.count[numbers] - (self.place is not None)
        chosen = np.minimum((uniform * count).astype(np.int64), count - 1)
        if self.place is not None:
            chosen += chosen >= self.place[numbers]
        return self.targets[self.first[numbers] + chosen]

    def content_hash(self) -> str:
        """Return a hash of all contexts and targets."""
        digest = hashlib.sha256(str(self.place is not None).encode())
        for values in (self.contexts, self.first, self.count, self.targets):
            digest.update(np.ascontiguousarray(values, dtype="<i8").tobytes())
        return digest.hexdigest()[:16]


def same_image(num_images: int) -> Relation:
    """Relate each of N images to itself: the pair is two views of it."""
    numbers = np.arange(num_images)
    return Relation(numbers, numbers, np.ones_like(numbers), numbers)


def same_class(classes: Ints) -> Relation:
    """Relate each image to all others of its class. classes: int64 [N]. The only image of a class is left out."""
    order = np.argsort(classes, kind="stable")
    _, first, group, size = np.unique(classes[order], return_index=True, return_inverse=True, return_counts=True)
    place = np.empty_like(order)
    place[order] = np.arange(len(order)) - first[group]
    group_of = np.empty_like(order)
    group_of[order] = group
    contexts = np.flatnonzero(size[group_of] > 1)
    if left_out := len(classes) - len(contexts):
        log.warning("%d of %d images are the only ones of their class, and are left out", left_out, len(classes))
    groups = group_of[contexts]
    return Relation(contexts, first[groups], size[groups], order, place[contexts])


def listed_pairs(pairs: Ints) -> Relation:
    """Relate images as listed: pairs int64 [P, 2] of a context and its target. Each pair is a context of its own."""
    numbers = np.arange(len(pairs))
    return Relation(pairs[:, 0], numbers, np.ones_like(numbers), pairs[:, 1])


# ------------------------------------------------------------------------------------------------- from an index


def classes_of(index: VideoIndex, label: str) -> Ints:
    """Return the class of each image of an index, [N], from a label of whole numbers.

    Raises:
        UserError: there is no such label, or it is not a whole number of each image.
    """
    if label in index.label_faults:
        raise UserError(f"the label {label!r} cannot be used: {index.label_faults[label]}")
    if label not in index.labels:
        has = ", ".join(sorted(index.labels)) or "none"
        raise UserError(
            f"the images of '{index.root}' have no label {label!r} (they have {has}): put them into a folder for each "
            "class, or give metadata.csv this column"
        )
    values = index.labels[label]
    if values.ndim != 1 or values.dtype != torch.int64:
        raise UserError(f"the label {label!r} of '{index.root}' is not a class: it must be one whole number per image")
    return values.numpy()


def pairs_of_file(path: Path, root: Path, index: VideoIndex) -> Ints:
    """Return the pairs [P, 2] of a CSV file whose images are both in an index, in the order of the file.

    root: the folder that paths in the file are relative to. Pairs of images of other splits are not of this index.
    Pairs across two splits, and those of an image that cannot be read, are left out with a warning.

    Raises:
        UserError: the file cannot be read, has other columns, or names an image that is not below the root.
    """
    prefix = os.path.relpath(index.root, root).replace(os.sep, "/")
    before = "" if prefix == "." else f"{prefix}/"
    number_of = {f"{before}{image.path}": number for number, image in enumerate(index.videos)}
    found: list[tuple[int, int]] = []
    split_apart = 0
    known_elsewhere: set[str] = set()
    for line, names in _rows(path):
        numbers = [number_of.get(name) for name in names]
        for name, number in zip(names, numbers, strict=True):
            if number is None and name not in known_elsewhere:
                leads_out = os.path.isabs(name) or name.split(os.sep)[0] == os.pardir
                if leads_out or not os.path.isfile(root / name):
                    raise UserError(
                        f"'{path}' line {line}: {shown(name)} is not an image below '{root}', as a path in it"
                    )
                known_elsewhere.add(name)
        first, second = numbers
        if first is not None and second is not None:
            found.append((first, second))
        else:
            split_apart += first is not None or second is not None
    if split_apart:
        log.warning("'%s': %d pairs have one image in another split or unreadable, and are left out", path, split_apart)
    if not found:
        raise UserError(
            f"'{path}' has no pair within the {len(index.videos)} images of a split: each split needs pairs"
        )
    return np.array(found, dtype=np.int64)


def _rows(path: Path) -> Sequence[tuple[int, tuple[str, str]]]:
    """Return the line and the two paths of each row of a file of pairs, with forward slashes."""
    rows = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or [])]:
                raise UserError(f"'{path}' has no column {missing[0]}: a file of pairs has the columns first,second")
            for row in reader:
                names = row[COLUMNS[0]], row[COLUMNS[1]]
                if not all(names):
                    raise UserError(f"'{path}' line {reader.line_num} lacks a path: give first,second in each line")
                rows.append((reader.line_num, (os.path.normpath(names[0]), os.path.normpath(names[1]))))
    except UnicodeDecodeError:
        raise UserError(f"'{path}' is not UTF-8 text: save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read '{path}': {one_line(error)}") from None
    except csv.Error as error:
        raise UserError(f"'{path}' line {reader.line_num} is not valid CSV: {error}") from None
    return rows
