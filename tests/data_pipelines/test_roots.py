"""Several roots with weights: the order of their clips, their splits, labels and formats, resuming, and mistakes."""

import os
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines.clips import ClipSpec, make_clip_table
from data_pipelines.contents import contents_of
from data_pipelines.errors import UserError
from data_pipelines.index import VideoIndex
from data_pipelines.mixing import clips_per_lane, mixed_epoch_order
from data_pipelines.roots import WeightedRoot, load_roots
from data_pipelines.shards.index_file import SHARDS_NAME
from data_pipelines.shards.packing import pack_videos
from data_pipelines.stream import ReadSettings, open_videos, read_all
from tests.data_pipelines.conftest import ReadNumbers, WriteVideo
from tests.data_pipelines.streams import make_stream

SPEC = ClipSpec(num_segments=1, num_frames=3, clip_step=2)
STREAM: dict[str, Any] = {"size_px": None, "channels": 1, "batch_size": 12, "num_lanes": 4, "pool_clips": 16}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory, write_video: WriteVideo) -> list[WeightedRoot]:
    """6 short files (videos 0 to 5) and 2 long ones (videos 10 and 11) with labels; weights 1 and 3."""
    base = tmp_path_factory.mktemp("roots")
    for folder, videos, count in (("short", range(6), 9), ("deep/long", (10, 11), 150)):
        rows = []
        for video in videos:
            write_video(base / folder / f"{video}.mp4", video=video, num_frames=count, options={"g": "40"})
            frames = [[frame, float(video)] for frame in range(count)]
            rows.append(f'{{"file_name": "{video}.mp4", "number": {video}, "frame": {frames}}}\n')
        (base / folder / "metadata.jsonl").write_text("".join(rows))
    return [WeightedRoot(str(base / "short"), 1), WeightedRoot(str(base / "deep" / "long"), 3)]


@pytest.fixture
def index(roots: list[WeightedRoot]) -> VideoIndex:
    return load_roots(roots, None)


def table_of(lengths: list[list[int]], weights: tuple[float, ...], step: int = 1) -> Any:
    """Return the table of roots whose videos have these numbers of frames."""
    from dataclasses import replace

    frames = [length for root in lengths for length in root]
    table = make_clip_table([(0, n) for n in frames], [range(0, n, 50) for n in frames], ClipSpec(1, 4, clip_step=step))
    firsts = np.cumsum([0, *(len(root) for root in lengths)])
    return replace(table, first_clip_of_root=table.first_clip[firsts], weights=weights)


def order_of(table: Any, epoch: int, **settings: Any) -> Any:
    given = {"seed": 3, "shuffle": True, "batch_size": 16, "num_lanes": 8, "pool_clips": 64} | settings
    return mixed_epoch_order(table, epoch=epoch, **given)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 5.0, 2.0), (0.001, 1.0, 1.0)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_lane_keeps_the_weights_and_every_root_its_epochs(weights: tuple[float, ...], shuffle: bool) -> None:
    table = table_of([[20] * 9, [400, 130], [40] * 5], weights, step=3)
    per_lane = table.num_clips // 16 * 16 // 8
    counts = clips_per_lane(weights, per_lane)
    assert all(abs(c - w / sum(weights) * per_lane) <= 1 for c, w in zip(counts, weights, strict=True))
    seen: Counter[int] = Counter()
    for epoch in range(7):
        order = order_of(table, epoch, shuffle=shuffle)
        assert order.decoded.shape == (8, per_lane)
        assert all(sorted(lane) == list(range(per_lane)) for lane in order.delivered.tolist())
        of_root = np.searchsorted(table.first_clip_of_root, order.decoded, side="right") - 1
        assert all(np.bincount(lane, minlength=3).tolist() == counts for lane in of_root)
        if shuffle:
            seen.update(order.decoded.ravel().tolist())
            for first, stop in zip(table.first_clip_of_root[:-1], table.first_clip_of_root[1:], strict=True):
                times = [seen[clip] for clip in range(first, stop)]
                assert max(times) - min(times) <= 1  # no clip comes again before all others of its root have come


def test_the_roots_alternate_within_a_lane() -> None:
    table = table_of([[4] * 300, [4] * 100], (1.0, 1.0))  # every clip is a group
    order = order_of(table, 0, pool_clips=1)
    is_first = np.take_along_axis(order.decoded, order.delivered, axis=1) < 300
    drift = np.cumsum(is_first, axis=1) - np.arange(1, is_first.shape[1] + 1) / 2
    assert np.abs(drift).max() <= 1
    shares = is_first.T.reshape(-1, 16).mean(axis=1)  # of every batch
    assert abs(shares.mean() - 0.5) < 0.01 and shares.std() < 0.2


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    table = table_of([[50] * 9, [400]], (2.0, 1.0))
    for settings in ({"seed": 4}, {}):
        assert np.array_equal(order_of(table, 2, **settings).decoded, order_of(table, 2, **settings).decoded)
    assert not np.array_equal(order_of(table, 2, seed=4).decoded, order_of(table, 2).decoded)
    assert not np.array_equal(order_of(table, 1).decoded, order_of(table, 2).decoded)


def test_clips_per_lane_add_up() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        weights = tuple(rng.exponential(size=rng.integers(1, 7)).tolist())
        total = int(rng.integers(len(weights), 60))
        counts = clips_per_lane(weights, total)
        assert sum(counts) == total and min(counts) >= 1
    with pytest.raises(UserError, match="an epoch has 2 clips per lane, fewer than the 3 roots"):
        clips_per_lane((1.0, 1.0, 1.0), 2)


# ----------------------------------------------------------------------------------------------------------- streams


def test_frames_and_labels_are_those_of_their_root(index: VideoIndex, read_numbers: ReadNumbers) -> None:
    stream = make_stream(index, SPEC, **STREAM)
    shares = []
    for batch in islice(stream, 2 * stream.batches_per_epoch):
        assert len(batch["video"]) == 12
        for clip, video in enumerate(batch["video"]):
            numbers = [read_numbers(frame) for frame in video]
            assert batch["labels"]["number"][clip] == numbers[0][0]
            assert batch["labels"]["frame"][clip].tolist() == [[frame, number] for number, frame in numbers]
        shares.append((batch["labels"]["number"] < 10).float().mean().item())
    assert np.mean(shares) == pytest.approx(1 / 4, abs=0.02)


def test_batches_do_not_depend_on_ranks_and_workers(index: VideoIndex) -> None:
    expected = list(islice(make_stream(index, SPEC, **STREAM), 18))
    for world_size, num_workers in ((1, 2), (2, 0), (4, 1)):
        streams = [
            make_stream(index, SPEC, rank=rank, world_size=world_size, num_workers=num_workers, **STREAM)
            for rank in range(world_size)
        ]
        of_ranks = [list(islice(stream, 18)) for stream in streams]
        for number, batch in enumerate(expected):
            rows = torch.cat([batches[number]["row"] for batches in of_ranks])
            ids = torch.cat([batches[number]["clip_id"] for batches in of_ranks])
            video = torch.cat([batches[number]["video"] for batches in of_ranks])
            assert torch.equal(ids[rows.argsort()], batch["clip_id"])
            assert torch.equal(video[rows.argsort()], batch["video"])


def test_a_state_continues_exactly_across_epochs(roots: list[WeightedRoot]) -> None:
    options: dict[str, Any] = {"num_frames": 3, "clip_step": 2, "batch_size": 12, "size_px": 32, "num_workers": 0}
    whole = open_videos(roots, **options)
    expected = list(islice(whole, 3 * whole.batches_per_epoch))
    first = open_videos(roots, **options)
    stop = whole.batches_per_epoch + 2
    list(islice(first, stop))
    second = open_videos(roots, **options)
    second.load_state_dict(first.state_dict())
    for batch, known in zip(islice(second, len(expected) - stop), expected[stop:], strict=True):
        assert torch.equal(batch["video"], known["video"]) and torch.equal(batch["clip_id"], known["clip_id"])


def test_the_fingerprint_covers_roots_and_weights(roots: list[WeightedRoot]) -> None:
    options: dict[str, Any] = {"num_frames": 3, "batch_size": 4, "num_workers": 0}
    known = open_videos(roots, **options).fingerprint
    assert open_videos(roots, **options).fingerprint == known
    heavier = [roots[0], WeightedRoot(roots[1].path, 4)]
    for other in (heavier, roots[::-1], roots[:1]):
        assert open_videos(other, **options).fingerprint != known
    with pytest.raises(UserError, match="the state is of another stream"):
        open_videos(heavier, **options).load_state_dict(open_videos(roots, **options).state_dict())


def test_an_evaluation_pools_the_roots(index: VideoIndex) -> None:
    batches = list(read_all(index, SPEC, ReadSettings(batch_size=32, channels=1)))
    ids = torch.cat([batch["clip_id"] for batch in batches])
    assert ids.tolist() == list(range(6 * 4 + 2 * 74))


def test_one_root_keeps_its_order(roots: list[WeightedRoot]) -> None:
    """A list of one root is a stream of its own, and a text has the order that it always had."""
    options: dict[str, Any] = {"num_frames": 3, "clip_step": 2, "batch_size": 12, "num_workers": 0}
    one = next(iter(open_videos(roots[1].path, **options)))
    assert len(set(one["clip_id"].tolist())) == 12
    listed = open_videos(roots[1:], **options)
    seen = [clip for batch in islice(listed, listed.batches_per_epoch) for clip in batch["clip_id"].tolist()]
    assert len(set(seen)) == len(seen)


# ------------------------------------------------------------------------------------- splits, formats, changes


def test_each_root_has_its_own_splits(tmp_path: Path, write_video: WriteVideo) -> None:
    for split, video in (("train", 1), ("test", 2)):
        write_video(tmp_path / "named" / split / "a.mp4", video=video, num_frames=20)
    write_video(tmp_path / "one" / "b.mp4", video=3, num_frames=100)
    several = [WeightedRoot(str(tmp_path / "named")), WeightedRoot(str(tmp_path / "one"))]
    expected = {"train": [(0, 18), (0, 80)], "selection": [(18, 20), (80, 90)], "test": [(0, 20), (90, 100)]}
    for split, ranges in expected.items():
        index = load_roots(several, split)  # type: ignore[arg-type]
        assert index.frame_ranges == ranges
        assert index.names[1] == "2:b.mp4" and index.videos[1].path == "one/b.mp4"


def test_shards_and_files_are_mixed(
    roots: list[WeightedRoot], tmp_path: Path, write_video: WriteVideo, read_numbers: ReadNumbers
) -> None:
    for video in range(20, 26):
        write_video(tmp_path / "plain" / f"{video}.mp4", video=video, num_frames=20)
    pack_videos(tmp_path / "plain", tmp_path / "shards", shard_mb=0.004, progress=False)
    index = load_roots([WeightedRoot(str(tmp_path / "shards"), 2), roots[0]], None)
    assert len({video.shard for video in index.videos}) > 2
    for num_workers in (0, 2):
        stream = make_stream(index, SPEC, num_workers=num_workers, **STREAM)
        seen = Counter(
            read_numbers(video[0])[0] >= 20
            for batch in islice(stream, 4 * stream.batches_per_epoch)
            for video in batch["video"]
        )
        assert seen[True] / seen.total() == pytest.approx(2 / 3, abs=0.03)


def test_touched_shards_of_several_roots_change_nothing(
    tmp_path: Path, write_video: WriteVideo, caplog: pytest.LogCaptureFixture
) -> None:
    """Tars that are newer than their index: its facts are checked against them."""
    several = [WeightedRoot(str(tmp_path / "shards" / name)) for name in "ab"]
    for video in range(8):
        write_video(tmp_path / "ab"[video % 2] / f"{video}.mp4", video=video)
    for root, name in zip(several, "ab", strict=True):
        pack_videos(tmp_path / name, Path(root.path), shard_mb=0.004, progress=False)

    def pixels() -> list[bytes]:
        stream = make_stream(load_roots(several, None), SPEC, num_workers=0, **STREAM)
        return [batch["video"].numpy().tobytes() for batch in islice(stream, 2 * stream.batches_per_epoch)]

    before = pixels()
    for root in several:
        later_ns = (Path(root.path) / SHARDS_NAME).stat().st_mtime_ns + 10**10
        for tar in Path(root.path).glob("*.tar"):
            os.utime(tar, ns=(later_ns, later_ns))
    assert pixels() == before and not caplog.records


def test_labels_that_not_all_roots_have_are_left_out(tmp_path: Path, write_video: WriteVideo) -> None:
    for name, row in {"a": '"x": 1, "y": 2, "z": [1, 2]', "b": '"x": 0.5, "z": [1, 2, 3]'}.items():
        write_video(tmp_path / name / "v.mp4")
        (tmp_path / name / "metadata.jsonl").write_text(f'{{"file_name": "v.mp4", {row}}}\n')
    index = load_roots([WeightedRoot(str(tmp_path / "a")), WeightedRoot(str(tmp_path / "b"))], None)
    assert index.labels["x"].tolist() == [1.0, 0.5] and index.labels.keys() == {"x"}
    assert index.label_faults["y"].endswith("b' has no such label") and "different sizes" in index.label_faults["z"]


def test_a_root_may_move_and_a_change_is_noticed(tmp_path: Path, write_video: WriteVideo) -> None:
    for name in ("x/a", "y/b"):
        write_video(tmp_path / name / "v.mp4", video=ord(name[0]))
    before = contents_of(load_roots([WeightedRoot(str(tmp_path / name)) for name in ("x/a", "y/b")], None), set())
    (tmp_path / "y" / "b").rename(tmp_path / "moved")
    moved = load_roots([WeightedRoot(str(tmp_path / "x" / "a")), WeightedRoot(str(tmp_path / "moved"))], None)
    assert not contents_of(moved, set()).change_since(before)
    write_video(tmp_path / "moved" / "v.mp4", video=7, num_frames=12)
    now = load_roots([WeightedRoot(str(tmp_path / "x" / "a")), WeightedRoot(str(tmp_path / "moved"))], None)
    assert contents_of(now, set()).change_since(before) == "'2:v.mp4' has other content"


def test_mistakes(roots: list[WeightedRoot], tmp_path: Path, write_video: WriteVideo) -> None:
    write_video(tmp_path / "tiny" / "v.mp4", num_frames=2)
    first = roots[0].path

    def opened(*paths: str) -> Callable[[], Any]:
        several = [WeightedRoot(path) for path in paths]
        return lambda: open_videos(several, num_frames=3, batch_size=4, num_workers=0)

    cases: dict[str, Callable[[], Any]] = {
        r"'https://host/a' is a URL: of several roots, each must be a folder": opened(first, "https://host/a"),
        r"is in the root '.*short': each video must be in one root": opened(first, first + "/"),
        r"/deep/long' is in the root '.*roots\d*'": opened(roots[1].path, str(Path(first).parent)),
        r"missing' is not a folder": opened(first, str(tmp_path / "missing")),
        r"root number 2 has no video that is as long as one clip: leave it out": opened(first, str(tmp_path / "tiny")),
        r"weight=0 of '.*' must be above 0": lambda: load_roots([WeightedRoot(first, 0)], None),
    }
    for message, call in cases.items():
        with pytest.raises(UserError, match=message):
            call()
