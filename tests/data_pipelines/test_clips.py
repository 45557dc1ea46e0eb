"""The arithmetic of clips, groups, lanes and orders."""

import numpy as np
import pytest

from data_pipelines.clips import (
    GROUP_FRAMES,
    ClipSpec,
    check_lanes,
    epoch_order,
    frames_on_screen,
    group_starts,
    lanes_of_worker,
    make_clip_table,
    pool_shuffle,
    resample,
    with_shards,
)
from data_pipelines.errors import UserError
from data_pipelines.facts import Video


def whole(*num_frames: int) -> list[tuple[int, int]]:
    return [(0, count) for count in num_frames]


def test_spec_counts_frames() -> None:
    assert (ClipSpec().length, ClipSpec().span, ClipSpec().step) == (9, 9, 9)
    spec = ClipSpec(num_segments=2, num_frames=2, frame_stride=5, clip_step=3)
    assert (spec.length, spec.span, spec.step, spec.grid) == (4, 16, 3, 1)
    assert ClipSpec(frame_stride=4, clip_step=6).grid == 2
    with pytest.raises(UserError, match="frame_stride=0"):
        ClipSpec(frame_stride=0)
    for fps in (0.0, -1.0, float("nan"), 2000.0):
        with pytest.raises(UserError, match=r"fps=\S+ must be above 0 and at most 1000"):
            ClipSpec(fps=fps)


def test_clips_are_all_that_fit_numbered_in_order_of_time() -> None:
    spec = ClipSpec(num_segments=1, num_frames=3, clip_step=2)
    table = make_clip_table(whole(2, 3, 8, 4), [(0,)] * 4, spec)
    clips = np.arange(table.num_clips)
    assert table.videos_of(clips).tolist() == [1, 2, 2, 2, 3]
    assert table.starts_of(clips).tolist() == [0, 0, 2, 4, 0]
    assert table.groups_of(clips).tolist() == [0, 1, 1, 1, 2]


def test_short_keyframe_intervals_are_merged_and_long_ones_are_not() -> None:
    assert group_starts(range(0, 1000, 50)) == [0, 150, 300, 450, 600, 750, 900]
    assert group_starts((0, 250, 500)) == [0, 250, 500]
    spec = ClipSpec()
    table = make_clip_table(whole(1000, 9), [tuple(range(0, 1000, 2)), (0,)], spec)
    first_starts = table.starts_of(table.first_clip_of_group[:-1])
    assert np.all(np.diff(first_starts[:-1]) >= GROUP_FRAMES - spec.span)
    # a group's first clip starts at the first clip boundary at or after the group's keyframe
    assert first_starts.tolist() == [0, *(-(-k // 9) * 9 for k in range(128, 1000, 128)), 0]


def test_clips_stay_within_a_range_of_frames() -> None:
    """Frames [250, 700) of 1,000, a keyframe every 200: groups start at the keyframes inside, and at the first clip."""
    table = make_clip_table([(250, 700)], [tuple(range(0, 1000, 200))], ClipSpec())
    starts = table.starts_of(np.arange(table.num_clips))
    assert starts[0] == 250 and starts[-1] + 9 <= 700 < starts[-1] + 18
    assert table.starts_of(table.first_clip_of_group[:-1]).tolist() == [250, 403, 601]


def _facts(num_frames: int, fps: float, frame_ms: tuple[int, ...] = (), keyframes: tuple[int, ...] = (0,)) -> Video:
    return Video(
        path="v.mp4",
        size_bytes=1,
        mtime_ns=0,
        num_frames=num_frames,
        fps=fps,
        width=64,
        height=64,
        duration_s=0.0,
        keyframes=keyframes,
        keyframe_pts=(),
        open_gop=False,
        frame_ms=frame_ms,
    )


@pytest.mark.parametrize(
    ("num_frames", "source_fps", "fps", "expected"),
    [
        (9, 30.0, 15.0, [0, 2, 4, 6, 8]),
        (4, 25.0, 50.0, [0, 0, 1, 1, 2, 2, 3, 3]),
        (5, 24.0, 24.0, [0, 1, 2, 3, 4]),
        (10, 25.0, 10.0, [0, 2, 5, 7]),
        (8, 30000 / 1001, 30.0, [0, 1, 2, 3, 4, 5, 6, 7]),
        (9, 1000.0, 500.0, [0, 2, 4, 6, 8]),
        (1, 0.0, 15.0, [0]),
    ],
)
def test_resampled_frames_of_a_constant_rate(
    num_frames: int, source_fps: float, fps: float, expected: list[int]
) -> None:
    assert frames_on_screen(_facts(num_frames, source_fps), fps).tolist() == expected
    assert frames_on_screen(_facts(num_frames, source_fps), None).tolist() == list(range(num_frames))


@pytest.mark.parametrize("source_fps", [24000 / 1001, 25.0, 30000 / 1001, 30.0, 59.94, 60.0])
def test_every_second_frame_of_a_long_video_whatever_its_rounding(source_fps: float) -> None:
    """Half the rate is every second frame to the end, though a header's rate may be off by a millisecond in all."""
    num_frames = 200_000
    for error_s in (-0.001, 0.0, 0.001):
        rate = num_frames / (num_frames / source_fps + error_s)
        assert np.array_equal(frames_on_screen(_facts(num_frames, rate), source_fps / 2), np.arange(0, num_frames, 2))


def test_resampled_frames_of_a_varying_rate() -> None:
    """Frames at 0, 100, 133, 400 and 440 ms; the last one stays for 110, the mean."""
    video = _facts(5, 10.0, (100, 33, 267, 40))
    assert frames_on_screen(video, 10.0).tolist() == [0, 1, 2, 2, 3, 4]
    assert frames_on_screen(video, 30.0).tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 4, 4, 4]
    # what lasts for a day is a hole
    assert len(frames_on_screen(_facts(3, 10.0, (100, 86_400_000)), 10.0)) == 152


def test_ranges_and_keyframes_in_resampled_frames() -> None:
    videos = [_facts(300, 30.0, keyframes=(0, 100, 201, 299)), _facts(4, 5.0)]
    ranges, keyframes = resample(videos, [(0, 240), (3, 4)], 10.0)
    assert ranges == [(0, 80), (6, 8)]
    assert keyframes == [[0, 34, 67, 100], [0]]  # the first that show the keyframe or a later frame
    rest, _ = resample(videos, [(240, 300), (0, 3)], 10.0)
    assert rest == [(80, 100), (0, 6)]


def test_a_video_of_unknown_rate_cannot_be_resampled() -> None:
    with pytest.raises(UserError, match=r"fps=10 needs videos of known times: 'v.mp4' states no frame rate"):
        frames_on_screen(_facts(7, 0.0), 10.0)
    assert len(frames_on_screen(_facts(7, 0.0), None)) == 7


def test_groups_without_clips_vanish() -> None:
    table = make_clip_table(whole(300), [(0, 140, 295)], ClipSpec(clip_step=100))
    assert table.first_clip_of_group.tolist() == [0, 2, 3]


def test_no_video_as_long_as_a_clip_names_the_span_and_the_longest() -> None:
    with pytest.raises(UserError, match=r"clips span 9 frames .*longest video has 8"):
        make_clip_table(whole(8, 3), [(0,), (0,)], ClipSpec())
    with pytest.raises(UserError, match=r"frame_stride=1, fps=7.5\) but the longest"):
        make_clip_table(whole(8, 3), [(0,), (0,)], ClipSpec(fps=7.5))


@pytest.mark.parametrize(
    ("num_clips", "batch_size", "num_lanes", "world_size", "message"),
    [
        (99, 12, 8, 1, "batch_size=12 is not a multiple of num_lanes=8"),
        (99, 12, 6, 4, "num_lanes=6 is not a multiple of the 4 processes"),
        (11, 12, 6, 1, "holds 11 clips, fewer than one batch: lower batch_size=12"),
    ],
)
def test_sizes_that_do_not_fit_are_named(
    num_clips: int, batch_size: int, num_lanes: int, world_size: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_lanes(num_clips, batch_size=batch_size, num_lanes=num_lanes, world_size=world_size)


FIRST_CLIP_OF_GROUP = np.concatenate([[0], np.cumsum([1, 20, 3, 1, 1, 40, 7, 1, 9, 14])])


def _order(epoch: int, seed: int = 5, pool_clips: int = 32, shuffle: bool = True) -> tuple[np.ndarray, np.ndarray]:
    order = epoch_order(
        FIRST_CLIP_OF_GROUP,
        seed=seed,
        epoch=epoch,
        shuffle=shuffle,
        batch_size=8,
        num_lanes=4,
        pool_clips=pool_clips,
    )
    return order.decoded, order.delivered


def test_an_epoch_holds_every_clip_once_but_for_a_tail_shorter_than_a_batch() -> None:
    tails = set()
    for epoch in range(20):
        decoded, delivered = _order(epoch)
        assert decoded.shape == delivered.shape == (4, 97 // 8 * 2)
        assert len(np.unique(decoded)) == decoded.size
        assert np.array_equal(np.sort(delivered, axis=1), np.tile(np.arange(24), (4, 1)))
        tails.add(frozenset(range(97)) - frozenset(decoded.ravel().tolist()))
    assert all(len(tail) == 97 % 8 for tail in tails)
    assert len(tails) > 3  # each epoch leaves out others


def test_groups_stay_whole_and_ordered_but_across_lanes() -> None:
    decoded, _ = _order(epoch=1)
    sequence = decoded.ravel()
    groups = np.searchsorted(FIRST_CLIP_OF_GROUP, sequence, side="right") - 1
    runs = 1 + np.count_nonzero(np.diff(groups))
    assert runs == len(np.unique(groups))
    within = np.diff(groups) == 0
    assert np.all(np.diff(sequence)[within] == 1)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    same = [np.array_equal(a, b) for a, b in zip(_order(3), _order(3), strict=True)]
    assert same == [True, True]
    assert not np.array_equal(_order(3)[0], _order(4)[0])
    assert not np.array_equal(_order(3)[0], _order(3, seed=6)[0])
    decoded, delivered = _order(3, shuffle=False)
    assert np.array_equal(decoded.ravel(), np.arange(96))
    assert np.array_equal(delivered[0], np.arange(24))


def test_order_of_today_is_the_order_of_tomorrow() -> None:
    """A checkpoint's cursor is worth nothing if an upgrade changes the order: do not adapt these numbers."""
    decoded, delivered = _order(epoch=0)
    assert decoded[0, :6].tolist() == [73, 74, 75, 76, 77, 78]
    assert delivered[0, :6].tolist() == [1, 0, 2, 6, 9, 3]


# Groups 0-2, 3-5, 6, 7-9; the last shard but one is empty.
FIRST_CLIP_OF_SHARD = FIRST_CLIP_OF_GROUP[[0, 3, 6, 7, 7, 10]]


def test_groups_of_a_shard_stay_together_in_an_order_that_changes() -> None:
    shard_orders, group_orders = set(), set()
    for epoch in range(20):
        order = epoch_order(
            FIRST_CLIP_OF_GROUP,
            seed=5,
            epoch=epoch,
            shuffle=True,
            batch_size=1,
            num_lanes=1,
            pool_clips=8,
            first_clip_of_shard=FIRST_CLIP_OF_SHARD,
        )
        clips = order.decoded[0]
        assert np.array_equal(np.sort(clips), np.arange(97))
        shards = np.searchsorted(FIRST_CLIP_OF_SHARD, clips, side="right") - 1
        runs = shards[np.flatnonzero(np.diff(shards, prepend=-1))].tolist()
        assert sorted(runs) == [0, 1, 2, 4]
        shard_orders.add(tuple(runs))
        groups = np.searchsorted(FIRST_CLIP_OF_GROUP, clips, side="right") - 1
        group_orders.add(tuple(dict.fromkeys(groups[shards == 4].tolist())))
    assert len(shard_orders) > 8 and len(group_orders) == 6
    assert runs == [4, 2, 0, 1]  # as above: the order of today is the order of tomorrow


def test_shards_are_found_from_the_names_that_videos_carry() -> None:
    table = make_clip_table(whole(9, 18, 8, 9, 27), [(0,)] * 5, ClipSpec())
    assert table.first_clip_of_shard is None
    shards = with_shards(table, ["a", "a", "b", "c", "c"]).first_clip_of_shard
    assert shards is not None and shards.tolist() == [0, 3, 3, 7]


@pytest.mark.parametrize("pool", [1, 2, 16, 64])
def test_pool_bounds_the_clips_that_wait_and_shuffles_within_it(pool: int) -> None:
    num_items = 500
    noise = np.random.default_rng(0).random((3, num_items))
    for order in pool_shuffle(noise, pool):
        assert np.array_equal(np.sort(order), np.arange(num_items))
        decoded = np.maximum.accumulate(order) + 1
        waiting = decoded - np.arange(num_items)  # the one being delivered counted
        assert waiting.max() <= pool
        if pool > 1:
            assert waiting.max() > pool / 2
            assert np.abs(order - np.arange(num_items)).mean() > pool / 10


def test_a_lane_within_its_pool_is_permuted_uniformly() -> None:
    noise = np.random.default_rng(0).random((6000, 3))
    orders, counts = np.unique(pool_shuffle(noise, 3), axis=0, return_counts=True)
    assert len(orders) == 6
    assert counts.min() > 850  # 1,000 each expected, SD 29


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 1), (1, 3), (2, 2), (4, 0), (3, 4)])
def test_lanes_are_dealt_once_each(world_size: int, num_workers: int) -> None:
    dealt = [
        lane
        for rank in range(world_size)
        for worker in range(max(1, num_workers))
        for lane in lanes_of_worker(
            num_lanes=12, rank=rank, world_size=world_size, worker=worker, num_workers=max(1, num_workers)
        )
    ]
    assert sorted(dealt) == list(range(12))
    assert all(
        lane % world_size == 1
        for lane in lanes_of_worker(num_lanes=12, rank=1, world_size=world_size, worker=0, num_workers=2)
        if world_size > 1
    )
