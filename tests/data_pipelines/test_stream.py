"""Every clip once, in the same order for any number of ranks and workers; resumable."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines import clip_decoder
from data_pipelines.batches import Batch
from data_pipelines.clip_decoder import clips_of
from data_pipelines.clips import ClipSpec
from data_pipelines.errors import UserError
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.stream import open_videos
from tests.conftest import run_python
from tests.data_pipelines.conftest import DECODERS
from tests.data_pipelines.streams import SETTINGS, SPEC, batch_hash, mixed_stream, read_clips, take

pytestmark = pytest.mark.usefixtures("no_other_workers")


@pytest.fixture(scope="module")
def index(mixed_folder: Path) -> VideoIndex:
    return load_videos(mixed_folder, progress=False)


def _check_pixels(index: VideoIndex, spec: ClipSpec, batches: list[Batch], read_numbers: Any) -> None:
    """Each clip shows the frames of the video that its id stands for, in order of time."""
    table = clips_of(index, spec)
    for batch in batches:
        clips = batch["clip_id"].numpy()
        for row, (video, start) in enumerate(zip(table.videos_of(clips), table.starts_of(clips), strict=True)):
            shown = [read_numbers(frame) for frame in batch["video"][row]]
            assert shown == [(video, start + i * spec.frame_stride) for i in range(spec.length)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_clip_once_an_epoch_with_the_right_pixels(index: VideoIndex, read_numbers: Any, num_workers: int) -> None:
    stream = mixed_stream(index, num_workers=num_workers)
    num_clips = clips_of(index, SPEC).num_clips
    assert stream.batches_per_epoch == num_clips // 16
    batches = take(stream, 2 * stream.batches_per_epoch)
    epochs = [batches[: stream.batches_per_epoch], batches[stream.batches_per_epoch :]]
    for epoch in epochs:
        delivered = torch.cat([batch["clip_id"] for batch in epoch]).tolist()
        assert len(set(delivered)) == len(delivered) == num_clips - num_clips % 16
    assert [batch_hash(batch) for batch in epochs[0]] != [batch_hash(batch) for batch in epochs[1]]
    _check_pixels(index, SPEC, epochs[0][::2], read_numbers)
    assert batches[0]["video"].shape == (16, 9, 1, 48, 64)
    assert batches[0]["video"].dtype == torch.uint8


@pytest.mark.parametrize(
    "spec",
    [
        ClipSpec(num_segments=3, num_frames=1, frame_stride=3, clip_step=2),
        ClipSpec(num_segments=2, num_frames=1, frame_stride=1, clip_step=1),
        ClipSpec(num_segments=2, num_frames=2, frame_stride=2, clip_step=60),
    ],
)
@pytest.mark.parametrize("decoder", DECODERS)
def test_overlapping_spread_and_sparse_clips(
    index: VideoIndex, read_numbers: Any, spec: ClipSpec, decoder: str
) -> None:
    stream = mixed_stream(index, spec, batch_size=8, num_lanes=4, decoder=decoder)
    _check_pixels(index, spec, take(stream, min(25, stream.batches_per_epoch)), read_numbers)


TIMES_MS: dict[str, list[float]] = {
    "a_30fps.mp4": [i * 1000 / 30 for i in range(90)],
    "b_24fps.mkv": [i * 1000 / 24 for i in range(150)],
    "c_late.mkv": [7000 + 40 * i for i in range(80)],
    "d_varying.mp4": [
        500,
        *(512 + i % 2 * 8 + cell * 100 / 3 for i, cell in enumerate(np.cumsum([1, 0, 3, 1, 7, 2] * 25))),
    ],
    "e_slow.mp4": [250 * i for i in range(20)],
    "f_short.mp4": [0],
}  # files round them to milliseconds


@pytest.fixture(scope="module")
def timed_index(tmp_path_factory: pytest.TempPathFactory, write_video: Any) -> VideoIndex:
    root = tmp_path_factory.mktemp("timed")
    for video, (name, times_ms) in enumerate(TIMES_MS.items()):
        write_video(
            root / name, video=video, times_ms=[round(time) for time in times_ms], options={"g": "25", "bf": "2"}
        )
    return load_videos(root, progress=False)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("spec", [ClipSpec(3, 1, clip_step=1, fps=10.0), ClipSpec(2, 2, frame_stride=2, fps=15.0)])
def test_clips_by_time_show_what_is_on_screen_then(
    timed_index: VideoIndex, read_numbers: Any, spec: ClipSpec, decoder: str
) -> None:
    """Frame k of a video at fps shows the last source frame at k / fps after the first, whatever the file's pace."""
    assert spec.fps is not None
    shown: dict[int, list[list[int]]] = {}
    for batch in read_clips(timed_index, spec, size_px=None, channels=1, batch_size=16, decoder=decoder, num_workers=2):
        for clip in batch["video"]:
            numbers = [read_numbers(frame) for frame in clip]
            assert len({video for video, _ in numbers}) == 1
            shown.setdefault(numbers[0][0], []).append([frame for _, frame in numbers])
    for video, times_ms in enumerate(TIMES_MS.values()):
        times = np.array(times_ms) - times_ms[0]
        mean_ms = times[-1] / max(1, len(times) - 1)
        count = int(np.ceil((times[-1] + mean_ms - 1e-6) * spec.fps / 1000))
        at = [int(np.flatnonzero(times <= k * 1000 / spec.fps + 1e-6)[-1]) for k in range(count)]
        starts = range(0, count - spec.span + 1, spec.step)
        assert shown.get(video, []) == [at[start : start + spec.span : spec.frame_stride] for start in starts], video
    assert sorted(shown) == [0, 1, 2, 3, 4]


def test_clips_by_time_decode_no_frame_twice(timed_index: VideoIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    num_opened = 0
    open_video = clip_decoder.open_video

    def spy(path: str, *arguments: Any, **more: Any) -> Any:
        nonlocal num_opened
        number = num_opened = num_opened + 1
        reader = open_video(path, *arguments, **more)
        decode = reader.read

        def counted(frame: int) -> Any:
            read.append((number, frame))
            return decode(frame)

        monkeypatch.setattr(reader, "read", counted)
        return reader

    monkeypatch.setattr(clip_decoder, "open_video", spy)
    spec = ClipSpec(3, 1, clip_step=1, fps=50.0)  # each frame more than once in a clip and in several clips
    list(read_clips(timed_index, spec, size_px=None, channels=1, batch_size=10_000))
    assert len(read) == len(set(read)) > 400


def test_resized_colour_clips_keep_their_layout(index: VideoIndex) -> None:
    batch = take(mixed_stream(index, size_px=32, channels=3), 1)[0]
    assert batch["video"].shape == (16, 9, 3, 32, 32)


def _assemble(per_rank: list[Batch], num_lanes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ranks' parts of one batch -> the global batch, in lane order."""
    world_size = len(per_rank)
    rows = []
    for lane in range(num_lanes):
        batch, at = per_rank[lane % world_size], lane // world_size
        per_lane = len(batch["clip_id"]) * world_size // num_lanes
        rows.append((batch["video"][at * per_lane :][:per_lane], batch["clip_id"][at * per_lane :][:per_lane]))
    return torch.cat([video for video, _ in rows]), torch.cat([clip_id for _, clip_id in rows])


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (4, 0), (4, 2)])
def test_global_batches_do_not_depend_on_ranks_and_workers(
    index: VideoIndex, world_size: int, num_workers: int
) -> None:
    start = mixed_stream(index).batches_per_epoch - 3
    whole = take(mixed_stream(index), 6, start)  # across the end of an epoch
    per_rank = [
        take(mixed_stream(index, rank=rank, world_size=world_size, num_workers=num_workers), 6, start)
        for rank in range(world_size)
    ]
    for expected, *parts in zip(whole, *per_rank, strict=True):
        video, clip_id = _assemble(parts, num_lanes=8)
        assert torch.equal(clip_id, expected["clip_id"])
        assert torch.equal(video, expected["video"])


RESUME = """
import json, sys
from data_pipelines.clips import ClipSpec
from data_pipelines.formats.registry import load_videos
from data_pipelines.stream import VideoStream
from tests.data_pipelines.streams import batch_hash, make_stream, take

root, settings, runs = json.loads(sys.argv[1])
for num_workers, start_batch, count in runs:
    index = load_videos(root, progress=False)
    stream = make_stream(index, ClipSpec(), **settings, num_workers=num_workers)
    for batch in take(stream, count, start_batch):
        print(batch_hash(batch))
"""


def test_resume_in_a_fresh_process_continues_identically(index: VideoIndex) -> None:
    """A fork of a process that holds none of our modules (`tests.forked`), with another hash seed than this one."""
    stream = mixed_stream(index)
    total = 2 * stream.batches_per_epoch + 2
    whole = [batch_hash(batch) for batch in take(stream, total)]
    assert len(set(whole)) == total
    middle, late = stream.batches_per_epoch // 2, stream.batches_per_epoch + 1
    runs = [(2, middle, total - middle), (0, late, total - late), (1, stream.batches_per_epoch, 3)]
    done = run_python("-c", RESUME, json.dumps([str(index.root), SETTINGS, runs]))
    assert done.returncode == 0, done.stderr
    continued = done.stdout.split()
    expected = [whole[start : start + count] for _, start, count in runs]
    assert continued == [digest for run in expected for digest in run]


class _Opens:
    """Counts how often each file is opened for decoding."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[str] = Counter()
        open_video = clip_decoder.open_video

        def counting(path: Path, *arguments: Any, **more: Any) -> Any:
            self.counts[Path(path).name] += 1
            return open_video(path, *arguments, **more)

        monkeypatch.setattr(clip_decoder, "open_video", counting)


def test_each_group_is_decoded_once_an_epoch(index: VideoIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    table = clips_of(index, SPEC)
    opens = _Opens(monkeypatch)
    stream = mixed_stream(index)
    batches = take(stream, stream.batches_per_epoch)
    delivered = torch.cat([batch["clip_id"] for batch in batches]).numpy()
    groups = len(np.unique(table.groups_of(delivered)))
    assert groups <= opens.counts.total() <= groups + 8 - 1  # one more where a group crosses two lanes
    assert all(opens.counts[f"a{video:02d}.mp4"] <= 1 for video in range(30))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_cache_changes_no_batch(index: VideoIndex, num_workers: int) -> None:
    plain, cached = (mixed_stream(index, num_workers=num_workers, cache_mb=megabytes) for megabytes in (0, 64))
    assert plain.fingerprint == cached.fingerprint
    total = 3 * plain.batches_per_epoch
    assert [batch_hash(batch) for batch in take(plain, total)] == [batch_hash(batch) for batch in take(cached, total)]


def test_what_is_in_the_cache_is_not_decoded_again_and_the_cache_is_bounded(
    index: VideoIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    decode = clip_decoder.ClipDecoder.decode

    def counting(self: Any, video: int, group: int, start: int) -> Any:
        decoded.append((video, start))
        return decode(self, video, group, start)

    monkeypatch.setattr(clip_decoder.ClipDecoder, "decode", counting)
    num_clips = clips_of(index, SPEC).num_clips
    for megabytes in (64, 1):
        decoded.clear()
        stream = mixed_stream(index, cache_mb=megabytes)
        batches = take(stream, 4 * stream.batches_per_epoch)
        clip_bytes = batches[0]["video"][0].numel()
        kept = min(num_clips, megabytes * 2**20 // clip_bytes)
        again = len(decoded) - len(set(decoded))
        assert kept == num_clips or kept < num_clips / 2
        assert (again == 0) == (kept == num_clips)
        assert again <= 3 * (num_clips - kept)


def test_resume_decodes_only_what_is_still_to_come(index: VideoIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = mixed_stream(index, pool_clips=8)
    opens = _Opens(monkeypatch)
    [batch] = take(stream, 1, stream.batches_per_epoch - 1)
    assert len(batch["clip_id"]) == 16
    assert opens.counts.total() <= 16


def test_the_pool_bounds_the_clips_in_memory(index: VideoIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = 0
    decode = clip_decoder.ClipDecoder.decode

    def counting(self: Any, *arguments: Any) -> Any:
        nonlocal decoded
        decoded += 1
        return decode(self, *arguments)

    monkeypatch.setattr(clip_decoder.ClipDecoder, "decode", counting)
    stream = mixed_stream(index, batch_size=4, num_lanes=2, pool_clips=32)
    batches = stream.batches()
    most = 0
    for number in range(stream.batches_per_epoch):
        next(batches)
        most = max(most, decoded - 4 * (number + 1))
    assert 8 < most <= 32


def _labelled(index: VideoIndex) -> VideoIndex:
    labels = {"video": torch.arange(len(index.videos)), "pair": torch.rand(len(index.videos), 2)}
    return VideoIndex(index.root, index.videos, labels=labels)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_labels_follow_their_videos(index: VideoIndex, num_workers: int) -> None:
    labelled = _labelled(index)
    batch = take(mixed_stream(labelled, num_workers=num_workers), 1)[0]
    videos = torch.from_numpy(clips_of(index, SPEC).videos_of(batch["clip_id"].numpy()))
    assert torch.equal(batch["labels"]["video"], videos)
    assert torch.equal(batch["labels"]["pair"], labelled.labels["pair"][videos])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_read_all_is_ordered_and_complete(index: VideoIndex, read_numbers: Any, num_workers: int) -> None:
    arguments: dict[str, Any] = {"size_px": None, "channels": 1, "batch_size": 20, "num_workers": num_workers}
    batches = list(read_clips(index, SPEC, **arguments))
    num_clips = clips_of(index, SPEC).num_clips
    assert torch.cat([batch["clip_id"] for batch in batches]).tolist() == list(range(num_clips))
    assert [len(batch["clip_id"]) for batch in batches[:-1]] == [20] * (num_clips // 20)
    _check_pixels(index, SPEC, batches, read_numbers)
    some = list(read_clips(index, SPEC, **arguments, max_clips=25))
    assert [len(batch["clip_id"]) for batch in some] == [20, 5]
    ids = torch.cat([batch["clip_id"] for batch in some])
    assert ids[0] == 0 and ids[-1] >= num_clips - -(-num_clips // 25)
    assert {int(gap) for gap in ids.diff()} <= {num_clips // 25, num_clips // 25 + 1}  # spread evenly
    whole = torch.cat([batch["video"] for batch in batches])
    assert torch.equal(torch.cat([batch["video"] for batch in some]), whole[ids])


@pytest.mark.parametrize("world_size", [2, 30])
def test_ranks_read_all_clips_once_in_order(index: VideoIndex, world_size: int) -> None:
    arguments: dict[str, Any] = {"size_px": None, "channels": 1, "batch_size": 4, "max_clips": 25}
    shares = [
        list(read_clips(index, SPEC, **arguments, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    sizes = [sum(len(batch["clip_id"]) for batch in share) for share in shares]
    assert max(sizes) - min(sizes) == 1
    for name in ("clip_id", "video"):
        whole = torch.cat([batch[name] for batch in read_clips(index, SPEC, **arguments)])
        assert torch.equal(torch.cat([batch[name] for share in shares for batch in share]), whole)


def test_fingerprint_covers_what_fixes_the_order_and_nothing_else(index: VideoIndex) -> None:
    base = mixed_stream(index).fingerprint
    same: list[dict[str, Any]] = [
        {"num_workers": 2},
        {"rank": 1, "world_size": 2},
        {"decoder": "pyav"},
        {"size_px": 32},
    ]
    assert {mixed_stream(index, **changes).fingerprint for changes in same} == {base}
    other: list[dict[str, Any]] = [
        {"seed": 4},
        {"batch_size": 32},
        {"num_lanes": 4},
        {"pool_clips": 32},
        {"shuffle": False},
        {"spec": ClipSpec(clip_step=1)},
        {"spec": ClipSpec(fps=10.0)},
        {"index": VideoIndex(index.root, index.videos[1:])},
    ]
    fingerprints = {mixed_stream(**{"index": index, **changes}).fingerprint for changes in other}
    assert len(fingerprints | {base}) == len(other) + 1


def test_mistakes_are_named(index: VideoIndex, tmp_path: Path, write_video: Any) -> None:
    with pytest.raises(UserError, match="batch_size=15 is not a multiple of num_lanes=8"):
        mixed_stream(index, batch_size=15)
    with pytest.raises(UserError, match="num_lanes=8 is not a multiple of the 3 processes"):
        mixed_stream(index, world_size=3)
    with pytest.raises(UserError, match="fewer than one batch: lower batch_size=1600"):
        mixed_stream(index, batch_size=1600)
    with pytest.raises(UserError, match=r"clips span 303 frames.*longest video has 300"):
        mixed_stream(index, ClipSpec(num_frames=101))
    with pytest.raises(UserError, match="decoder='vhs'"):
        mixed_stream(index, decoder="vhs")
    write_video(tmp_path / "a.mp4")
    write_video(tmp_path / "b.mp4", size=(32, 32))
    with pytest.raises(UserError, match=r"'a.mp4' is 64x48, 'b.mp4' 32x32\): set size_px"):
        mixed_stream(load_videos(tmp_path, progress=False), batch_size=1, num_lanes=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"world_size": 0}, "world_size=0 must be at least 1"),
        ({"rank": 2, "world_size": 2}, "rank=2 must be at least 0 and at most 1"),
        ({"rank": -1}, "rank=-1 must be at least 0"),
        ({"num_workers": -1}, "num_workers=-1 must be at least 0"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"size_px": 0}, "size_px=0 must be at least 1"),
        ({"channels": 2}, "channels=2 must be 1 or 3"),
        ({"batch_size": 0}, "batch_size=0 must be a positive multiple"),
    ],
)
def test_arguments_out_of_range_are_named(index: VideoIndex, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_videos(index.root, **arguments)


def test_open_videos_continues_on_every_number_of_processes_that_divides_its_lanes(index: VideoIndex) -> None:
    """A batch of 40 has 20 lanes."""
    settings: dict[str, Any] = {"num_frames": 3, "batch_size": 40, "size_px": None}
    prints = {
        world_size: open_videos(index.root, world_size=world_size, **settings).fingerprint
        for world_size in (1, 2, 4, 5, 10, 20, 8)
    }
    other = prints.pop(8)
    assert len(set(prints.values())) == 1 and other not in prints.values()


def test_without_shuffling_each_lane_is_in_order(index: VideoIndex) -> None:
    stream = open_videos(index.root, num_frames=3, batch_size=4, size_px=None, shuffle=False, num_workers=0)
    first, *others = [batch["clip_id"] for batch in islice(stream, stream.batches_per_epoch)]
    assert first.tolist() == [lane * stream.batches_per_epoch for lane in range(4)]
    assert all(torch.equal(clips, first + number) for number, clips in enumerate(others, start=1))
