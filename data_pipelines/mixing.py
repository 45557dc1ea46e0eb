"""The order of the clips of several roots with weights: pure arithmetic, no I/O. clips.py has that of one root.

An epoch has as many batches as all clips together fill. Every lane takes the same number of clips from each root, in
proportion to the weights, rounded to whole clips. The clips of one root are those at successive positions of an endless
sequence: its clips permuted, then permuted anew, and so on. An epoch continues the sequence of the last one.
So no clip of a root comes again before every other clip of it has come, and the number of times that they have come
differs by at most one after each epoch.

Within a lane the roots alternate evenly by runs of successive clips of a group, which one pass of the decoder reads;
the pool then shuffles. The order of an epoch is a function of (seed, epoch) alone.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from data_pipelines.clips import ClipTable, EpochOrder, Ints, concatenate_ranges, pool_shuffle
from data_pipelines.errors import UserError


def mixed_epoch_order(
    table: ClipTable, *, seed: int, epoch: int, shuffle: bool, batch_size: int, num_lanes: int, pool_clips: int
) -> EpochOrder:
    """Return the order of one epoch of a table with several roots. Arguments: as for clips.epoch_order."""
    lane_clips = table.num_clips // batch_size * batch_size // num_lanes
    counts = clips_per_lane(table.weights, lane_clips)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch if shuffle else 0])))
    jitter = rng.random((num_lanes, len(counts))) - 0.5
    clips, keys = [], []
    for root, count in enumerate(counts):
        start = epoch * num_lanes * count if shuffle else 0
        of_root = _sequence_of(table, root, start, num_lanes * count, seed if shuffle else None).reshape(-1, count)
        clips.append(of_root)
        keys.append((_middles(of_root, table) + jitter[:, root, None]) / count)
    order = np.argsort(np.concatenate(keys, axis=1), axis=1, kind="stable")
    decoded = np.take_along_axis(np.concatenate(clips, axis=1), order, axis=1)
    if not shuffle:
        return EpochOrder(decoded, np.tile(np.arange(lane_clips), (num_lanes, 1)))
    return EpochOrder(decoded, pool_shuffle(rng.random((num_lanes, lane_clips)), max(1, pool_clips // num_lanes)))


def clips_per_lane(weights: Sequence[float], lane_clips: int) -> list[int]:
    """Divide the clips of a lane among roots by weight: at least one each, by largest remainders.

    Raises UserError: there are fewer clips than roots.
    """
    free = lane_clips - len(weights)
    if free < 0:
        raise UserError(
            f"an epoch has {lane_clips} clips per lane, fewer than the {len(weights)} roots: lower num_lanes or "
            "clip_step, or add videos"
        )
    total = sum(map(Fraction, weights))
    exact = [max(Fraction(0), Fraction(weight) / total * lane_clips - 1) for weight in weights]
    shares = [share * free / sum(exact) if any(exact) else Fraction(free, len(weights)) for share in exact]
    counts = [1 + int(share) for share in shares]
    by_remainder = sorted(range(len(weights)), key=lambda root: int(shares[root]) - shares[root])
    for root in by_remainder[: lane_clips - sum(counts)]:
        counts[root] += 1
    return counts


def _sequence_of(table: ClipTable, root: int, start: int, count: int, seed: int | None) -> Ints:
    """Return positions [start, start + count) of the endless sequence of a root's clips; in order without a seed."""
    assert table.first_clip_of_root is not None
    first, stop = table.first_clip_of_root[root : root + 2].tolist()
    if first == stop:
        raise UserError(f"root number {root + 1} has no video that is as long as one clip: leave it out")
    parts, total = [], stop - first
    for round_ in range(start // total, -(-(start + count) // total)):
        clips = np.arange(first, stop) if seed is None else _permuted(table, root, first, stop, seed, round_)
        parts.append(clips[max(0, start - round_ * total) : start + count - round_ * total])
    return np.concatenate(parts)


def _permuted(table: ClipTable, root: int, first: int, stop: int, seed: int, round_: int) -> Ints:
    """Return the clips of a root, its groups permuted; those of a shard remain together."""
    groups = table.first_clip_of_group
    begin, end = np.searchsorted(groups, (first, stop)).tolist()
    starts, counts = groups[begin:end], np.diff(groups[begin : end + 1])
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, round_, root, 1])))
    keys = rng.random(len(starts))
    shards = np.zeros(len(starts), dtype=np.int64)
    if table.first_clip_of_shard is not None:
        shards = np.searchsorted(table.first_clip_of_shard, starts, side="right") - 1
        shards -= shards[0]
    chosen = np.lexsort((keys, rng.random(int(shards[-1]) + 1)[shards]))
    return concatenate_ranges(starts[chosen], counts[chosen])


def _middles(clips: Ints, table: ClipTable) -> np.ndarray:
    """Return for each clip the middle, in its lane, of its run of successive clips of a group, [lanes, n]."""
    groups = table.groups_of(clips)
    begins = np.ones(clips.shape, dtype=bool)
    begins[:, 1:] = (np.diff(clips, axis=1) != 1) | (np.diff(groups, axis=1) != 0)
    flat = np.append(np.flatnonzero(begins.ravel()), clips.size)
    lengths = np.diff(flat)
    middle = (flat[:-1] + flat[1:]) / 2
    column = np.repeat(middle, lengths).reshape(clips.shape)
    return column - np.arange(clips.shape[0])[:, None] * clips.shape[1]
