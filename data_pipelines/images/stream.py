"""Batches of image pairs: drawn by a relation, decoded by worker processes.

A clip is the context, the target and, with three segments, the target again, for another augmentation of it. A batch is
a pure function of (index, relation, seed, batch number). It depends neither on the number of ranks and workers nor on
resumes.

Legend: N images, M contexts, B pairs of a batch, S segments of a clip, C channels, H = W pixels.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipelines.batches import Batch, BatchStream
from data_pipelines.clip_decoder import ClipCache, ClipSet, lane_clips, make_clip_set
from data_pipelines.clips import ClipSpec, Ints
from data_pipelines.errors import UserError
from data_pipelines.images.relations import Relation
from data_pipelines.index import VideoIndex
from data_pipelines.stream import ReadSettings, clips_of_pass
from data_pipelines.workers import Failures, Faults, Part, run_workers
from data_pipelines.worlds.fresh import share_of_rank

ORDER_VERSION = 1  # increase it with any change to the drawn pairs
EPOCH, TARGETS = 0, 1
"""Uses of random numbers, which are part of their seed."""


@dataclass(frozen=True)
class PairSettings(ReadSettings):
    """ReadSettings, and the form of pairs.

    num_segments: S: 2, the context and the target, or 3, the target again.
    cache_mb: MiB of decoded images that the workers of a rank keep together: the first that fit.
    """

    num_segments: int = 3
    cache_mb: int = 0


class PairBatch(NamedTuple):
    """The drawn pairs of a batch: their numbers [B] in the relation, their rows [B], and their images [B, S]."""

    numbers: Ints
    rows: Ints
    images: Ints


Draw = Callable[[int], PairBatch | None]
"""Batch number -> its pairs; None after the last one. It is sent to workers by pickle."""


@dataclass(frozen=True)
class EpochDraws:
    """The pairs of one rank in an endless stream, whose first batch is number `start_batch`."""

    relation: Relation
    settings: PairSettings
    seed: int
    rows: slice
    start_batch: int = 0

    def __call__(self, number: int) -> PairBatch:
        """Return the pairs of this rank in global batch `start_batch` + number."""
        size, batch = self.settings.batch_size, self.start_batch + number
        epoch, place = divmod(batch, self.relation.num_pairs // size)
        order = _order_of_epoch(self.relation.num_pairs, self.seed, epoch)
        numbers = order[place * size : (place + 1) * size][self.rows]
        uniform = _random(self.seed, TARGETS, batch).random(size)[self.rows]
        rows = np.arange(self.rows.start, self.rows.stop)
        return _pairs(self.relation, numbers, rows, uniform, self.settings.num_segments)


@dataclass(frozen=True)
class PassDraws:
    """The pairs of one rank in a single pass: those with these numbers, whose targets `uniform` chooses."""

    relation: Relation
    settings: PairSettings
    numbers: Ints
    uniform: NDArray[np.float64]

    def __call__(self, number: int) -> PairBatch | None:
        """Return the pairs of batch `number` of the pass."""
        rows = slice(number * self.settings.batch_size, (number + 1) * self.settings.batch_size)
        if not len(numbers := self.numbers[rows]):
            return None
        return _pairs(self.relation, numbers, np.arange(len(numbers)), self.uniform[rows], self.settings.num_segments)


class PairStream(BatchStream):
    """Shuffled pairs of images without end, the same for any number of ranks and workers.

    An epoch takes each context once, in an order of its own, but for num_pairs % batch_size of them. Targets are drawn
    again for each batch. Pairs with an image that does not decode are dropped and not replaced.

    Raises:
        UserError: there are fewer pairs than one batch, or the number of ranks does not divide a batch.
    """

    def __init__(
        self,
        index: VideoIndex,
        relation: Relation,
        settings: PairSettings,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._images, self._settings = _clip_set(index, settings), settings
        self._draws = EpochDraws(relation, settings, seed, share_of_rank(settings.batch_size, rank, world_size))
        self.batches_per_epoch = relation.num_pairs // settings.batch_size
        if not self.batches_per_epoch:
            raise UserError(
                f"{relation.num_pairs} pairs are fewer than one batch of {settings.batch_size}: add images, or lower "
                "data.batch_size"
            )
        self._failures = Failures(index, settings.max_bad_fraction)
        facts = [ORDER_VERSION, index.content_hash, relation.content_hash(), settings.batch_size, seed]
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def batches(self, start_batch: int = 0) -> Generator[Batch, None, None]:
        """Yield batches from number `start_batch` on, with video uint8 [B, S, C, H, W] and `labels_of_pairs`.

        Raises:
            UserError: too many images do not decode.
        """
        draws = replace(self._draws, start_batch=start_batch)
        yield from _decoded(self._images, draws, self._settings, self._failures)


def read_pairs(
    index: VideoIndex,
    relation: Relation,
    settings: PairSettings,
    *,
    seed: int,
    max_pairs: int,
    rank: int = 0,
    world_size: int = 1,
) -> Generator[Batch, None, None]:
    """Yield every pair once, or `max_pairs` of them spread evenly, in the order of contexts, as `PairStream.batches`.

    The target of a context does not depend on `max_pairs`. A rank gets its share; rank after rank, the shares are all
    pairs. The last batch may be short.
    """
    numbers = clips_of_pass(relation.num_pairs, max_pairs, rank, world_size)
    uniform = _random(seed, TARGETS, 0).random(relation.num_pairs)[numbers]
    draws = PassDraws(relation, settings, numbers, uniform)
    yield from _decoded(_clip_set(index, settings), draws, settings, Failures(index, settings.max_bad_fraction))


def labels_of_pairs(index: VideoIndex, images: Ints) -> dict[str, Tensor]:
    """Return the labels of pairs with images [B, S]: classes [B] of the context, and measures [B, S, K] of all images.

    A whole number of each image is a class. All other labels are measures.
    """
    rows = torch.from_numpy(images)
    labels = {}
    for name, values in index.labels.items():
        is_class = values.ndim == 1 and not values.is_floating_point()
        labels[name] = values[rows[:, 0]] if is_class else values.float().reshape(len(values), -1)[rows]
    return labels


@lru_cache(maxsize=2)
def _order_of_epoch(num_pairs: int, seed: int, epoch: int) -> Ints:
    """Return the contexts in the order of an epoch, [M]."""
    return np.argsort(_random(seed, EPOCH, epoch).random(num_pairs), kind="stable")


def _random(seed: int, use: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, use, number])))


def _clip_set(index: VideoIndex, settings: PairSettings) -> ClipSet:
    """Return the images as clips of one frame. The id of a clip is the number of its image."""
    return make_clip_set(
        index, ClipSpec(1, 1), size_px=settings.size_px, channels=settings.channels, decoder=settings.decoder
    )


def _pairs(relation: Relation, numbers: Ints, rows: Ints, uniform: NDArray[np.float64], num_segments: int) -> PairBatch:
    contexts, targets = relation.contexts[numbers], relation.draw(numbers, uniform)
    return PairBatch(numbers, rows, np.stack([contexts, *[targets] * (num_segments - 1)], axis=1))


def _decoded(images: ClipSet, draw: Draw, settings: PairSettings, failures: Failures) -> Generator[Batch, None, None]:
    """Yield the batches that `draw` names, decoded by the workers."""
    make_parts = partial(_parts, images, draw, settings.cache_mb * 2**20)
    parts = run_workers(make_parts, settings.num_workers, settings.decode_timeout_s, failures)
    with closing(parts):
        for number, part in enumerate(parts):
            failures.add(part.failures)
            drawn = draw(number)
            assert drawn is not None, "a part is one of a drawn batch"
            shown = drawn.images[np.isin(drawn.rows, part.row)]
            yield {
                "video": torch.from_numpy(part.video),
                "clip_id": torch.from_numpy(part.clip_id),
                "row": torch.from_numpy(part.row),
                "labels": labels_of_pairs(images.index, shown),
            }


def _parts(
    images: ClipSet, draw: Draw, cache_bytes: int, worker: int, num_workers: int, first_part: int, faults: Faults
) -> Iterator[Part]:
    """Yield whole batches: worker w decodes the batches w, w + num_workers, ... An image is decoded once per batch."""
    cache = ClipCache(cache_bytes // num_workers)
    for number in count(worker + first_part * num_workers, num_workers):
        drawn = draw(number)
        if drawn is None:
            return
        needed, place = np.unique(drawn.images, return_inverse=True)
        decoded = [
            frames for _, frames in lane_clips(images, needed, np.arange(len(needed)), 0, faults, cache, _no_shard)
        ]
        place = place.reshape(drawn.images.shape)
        good = np.array([all(decoded[image] is not None for image in clip) for clip in place], dtype=bool)
        video = np.empty((int(good.sum()), drawn.images.shape[1], *images.clip_shape[1:]), dtype=np.uint8)
        for clip, shown in zip(video, place[good], strict=True):
            for segment, image in enumerate(shown):
                frames = decoded[image]
                assert frames is not None
                clip[segment] = frames[0]
        yield Part(video, drawn.numbers[good], drawn.rows[good], faults.report())


def _no_shard(name: str) -> bool:
    """Images are plain files."""
    return False
