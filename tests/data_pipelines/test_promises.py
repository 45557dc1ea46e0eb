"""The promises of the stream, in processes that import our modules afresh and with shuffling.

For any number of ranks and workers the same clips come in the same global batches, each once an epoch; a batch number
is enough to resume anywhere, with other numbers of both. The same for plain files and for shards fetched by HTTP.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.clip_decoder import make_clip_set
from data_pipelines.clips import ClipSpec, ClipTable, epoch_order, lanes_of_worker
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.readers.pyav import PyAVReader
from data_pipelines.shards.packing import pack_videos
from data_pipelines.workers import PARTS_AHEAD
from tests.conftest import run_python
from tests.data_pipelines.shard_server import ShardServer
from tests.data_pipelines.streams import make_stream

SPEC = ClipSpec(clip_step=3)  # overlapping clips
# 24 lanes: 1, 2, 3, 4 and 8 divide them.
SETTINGS: dict[str, Any] = {
    "size_px": None,
    "channels": 1,
    "batch_size": 24,
    "num_lanes": 24,
    "pool_clips": 96,
    "seed": 5,
}
WORLD_SIZES = (1, 2, 3, 4, 8)
WORKERS = (0, 1, 2, 3, 4)

# Prints, for each batch, [clip id, hash of its pixels] pairs; then which process opened which files.
RANK = r"""
import hashlib, json, os, sys
from itertools import islice
from pathlib import Path
from data_pipelines import clip_decoder
from data_pipelines.clips import ClipSpec
from data_pipelines.formats.registry import load_videos
from tests.data_pipelines.streams import make_stream

root, settings, jobs, log = json.loads(sys.argv[1])
open_video = clip_decoder.open_video

def logged(path, video, **more):
    with open(log, "a") as lines:
        lines.write(f"{job} {os.getpid()} {video.path}\n")
    return open_video(path, video, **more)

clip_decoder.open_video = logged
index = load_videos(root, progress=False, cache_dir=Path(f"{log}.cache"), cache_mb=8)
for job, (rank, world_size, num_workers, start, count) in enumerate(jobs):
    parallel = {"rank": rank, "world_size": world_size, "num_workers": num_workers}
    batches = make_stream(index, ClipSpec(clip_step=3), **settings, **parallel).batches(start)
    shown = []
    for batch in islice(batches, count):
        digests = [hashlib.sha256(video.numpy().tobytes()).hexdigest()[:16] for video in batch["video"]]
        shown.append(list(zip(batch["clip_id"].tolist(), digests)))
    batches.close()
    print(json.dumps(shown))
"""

Pairs = list[list[Any]]  # of one batch: [clip id, hash]


@dataclass(frozen=True)
class Job:
    """What one rank is asked for."""

    rank: int
    world_size: int
    num_workers: int
    start: int
    count: int


def _run(root: str, jobs: list[Job], log: Path) -> list[list[Pairs]]:
    """Run jobs one after the other in one new process -> for each job its batches."""
    asked = [[job.rank, job.world_size, job.num_workers, job.start, job.count] for job in jobs]
    done = run_python("-c", RANK, json.dumps([root, SETTINGS, asked, str(log)]), timeout_s=240)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def _of_all_ranks(world_size: int, num_workers: int, start: int, count: int) -> list[Job]:
    return [Job(rank, world_size, num_workers, start, count) for rank in range(world_size)]


def _global_batches(per_rank: list[list[Pairs]]) -> list[Pairs]:
    """The ranks' parts -> global batches in order of lanes (one clip a lane)."""
    world_size = len(per_rank)
    return [
        [parts[lane % world_size][lane // world_size] for lane in range(SETTINGS["num_lanes"])]
        for parts in zip(*per_rank, strict=True)
    ]


@pytest.fixture(scope="module")
def server(mixed_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShardServer]:
    shards = tmp_path_factory.mktemp("shards")
    index = pack_videos(mixed_folder, shards, shard_mb=0.004, progress=False)
    assert len({video.shard for video in index.videos}) > 10
    with ShardServer(shards) as server:
        yield server


@pytest.fixture(scope="module", params=["files", "http"])
def root(request: pytest.FixtureRequest, mixed_folder: Path, server: ShardServer) -> str:
    return str(mixed_folder) if request.param == "files" else server.url


@pytest.fixture(scope="module")
def index(root: str, tmp_path_factory: pytest.TempPathFactory) -> VideoIndex:
    return load_videos(root, progress=False, cache_dir=tmp_path_factory.mktemp("cache"), cache_mb=8)


@pytest.fixture(scope="module")
def table(index: VideoIndex) -> ClipTable:
    return make_clip_set(index, SPEC, size_px=None, channels=1, decoder="pyav").table


@pytest.fixture(scope="module")
def whole(root: str, table: ClipTable, tmp_path_factory: pytest.TempPathFactory) -> list[Pairs]:
    """Two epochs and two batches, by one rank without workers."""
    log = tmp_path_factory.mktemp("whole") / "opened.txt"
    [batches] = _run(root, [Job(0, 1, 0, 0, 2 * _per_epoch(table) + 2)], log)
    return batches


def _per_epoch(table: ClipTable) -> int:
    return table.num_clips // SETTINGS["batch_size"]


def _check_epoch(epoch: list[Pairs], table: ClipTable) -> None:
    clips = Counter(clip for batch in epoch for clip, _ in batch)
    assert set(clips.values()) == {1}
    tail = table.num_clips - len(clips)
    assert tail == table.num_clips % SETTINGS["batch_size"]


def test_every_clip_comes_once_an_epoch_but_for_the_stated_tail(whole: list[Pairs], table: ClipTable) -> None:
    per_epoch = _per_epoch(table)
    assert per_epoch >= 10
    epochs = whole[:per_epoch], whole[per_epoch : 2 * per_epoch]
    for epoch in epochs:
        _check_epoch(epoch, table)
    assert epochs[0] != epochs[1]
    assert len({digest for batch in epochs[0] for _, digest in batch}) > 0.9 * per_epoch * SETTINGS["batch_size"]


def _check_parallel(
    combinations: list[tuple[int, int]], root: str, whole: list[Pairs], table: ClipTable, log: Path
) -> None:
    """One epoch by all ranks of each (world size, workers), in a new process."""
    per_epoch = _per_epoch(table)
    jobs = [job for world_size, workers in combinations for job in _of_all_ranks(world_size, workers, 0, per_epoch)]
    answers = iter(_run(root, jobs, log))
    for world_size, _ in combinations:
        batches = _global_batches(list(islice(answers, world_size)))
        _check_epoch(batches, table)
        assert batches == whole[:per_epoch]


def test_ranks_and_workers_change_no_global_batch(
    root: str, whole: list[Pairs], table: ClipTable, tmp_path: Path
) -> None:
    _check_parallel([(1, 2), (2, 1), (3, 0), (8, 0)], root, whole, table, tmp_path / "log")


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", WORKERS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_any_number_of_ranks_and_workers_changes_no_global_batch(
    root: str, whole: list[Pairs], table: ClipTable, tmp_path: Path, world_size: int, num_workers: int
) -> None:
    _check_parallel([(world_size, num_workers)], root, whole, table, tmp_path / "log")


def _check_resume(
    before: tuple[int, int], after: tuple[int, int], stop: int, root: str, whole: list[Pairs], tmp_path: Path
) -> None:
    """Stop after `stop` batches, continue in other processes with other numbers of ranks and workers."""
    first = _run(root, _of_all_ranks(*before, 0, stop), tmp_path / "first")
    rest = _run(root, _of_all_ranks(*after, stop, len(whole) - stop), tmp_path / "rest")
    assert _global_batches(first) + _global_batches(rest) == whole


def test_a_run_resumes_with_other_numbers_of_ranks_and_workers(
    root: str, whole: list[Pairs], table: ClipTable, tmp_path: Path
) -> None:
    _check_resume((2, 1), (3, 1), _per_epoch(table) - 2, root, whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 5, -1, 0, 1000])
@pytest.mark.parametrize(("before", "after"), [((1, 0), (8, 1)), ((8, 2), (1, 3)), ((2, 4), (4, 0)), ((3, 1), (2, 2))])
def test_a_run_resumes_anywhere_with_any_numbers(
    root: str,
    whole: list[Pairs],
    table: ClipTable,
    tmp_path: Path,
    before: tuple[int, int],
    after: tuple[int, int],
    stop: int,
) -> None:
    stop = {-1: _per_epoch(table) - 1, 0: _per_epoch(table), 1000: _per_epoch(table) + 3}.get(stop, stop)
    _check_resume(before, after, stop, root, whole, tmp_path)


def _files_of_lanes(lanes: range, batches: range, table: ClipTable, index: VideoIndex) -> set[str]:
    """The files that hold the clips which these lanes deliver in these batches, or decode for later ones."""
    first_epoch, last_epoch = batches.start // _per_epoch(table), (batches.stop - 1) // _per_epoch(table)
    order = {name: value for name, value in SETTINGS.items() if name not in ("size_px", "channels")}
    clips = [
        epoch_order(
            table.first_clip_of_group,
            epoch=epoch,
            shuffle=True,
            first_clip_of_shard=table.first_clip_of_shard,
            **order,
        )
        .decoded[list(lanes)]
        .ravel()
        for epoch in range(first_epoch, last_epoch + 1)
    ]
    return {index.videos[video].path for video in table.videos_of(np.concatenate(clips))}


@pytest.mark.parametrize("root", ["files"], indirect=True)
@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 2), (8, 1)])
def test_ranks_and_workers_open_only_their_own_videos(
    root: str, index: VideoIndex, table: ClipTable, tmp_path: Path, world_size: int, num_workers: int
) -> None:
    per_epoch = _per_epoch(table)
    log = tmp_path / "log"
    _run(root, _of_all_ranks(world_size, num_workers, 0, per_epoch), log)
    opened: dict[tuple[str, str], set[str]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        job, process, path = line.split(" ", 2)
        opened.setdefault((job, process), set()).add(path)
    assert len(opened) == world_size * num_workers
    expected = []
    for rank in range(world_size):
        for worker in range(num_workers):
            lanes = lanes_of_worker(
                num_lanes=24, rank=rank, world_size=world_size, worker=worker, num_workers=num_workers
            )
            needed = _files_of_lanes(lanes, range(per_epoch), table, index)
            ahead = _files_of_lanes(lanes, range(per_epoch + PARTS_AHEAD + 1), table, index)
            expected.append((str(rank), needed, ahead))
    for (job, _), paths in opened.items():
        assert any(job == own and needed <= paths <= ahead for own, needed, ahead in expected)
    # Whole files of one clip are dealt, not shared: in an epoch one worker has each.
    short = [{path for path in needed if not path.startswith("long/")} for _, needed, _ in expected]
    assert sum(map(len, short)) == len(set().union(*short))


@pytest.mark.parametrize("root", ["http"], indirect=True)
def test_a_host_fetches_each_shard_of_its_own_lanes_once_and_no_other(
    root: str, server: ShardServer, index: VideoIndex, table: ClipTable, tmp_path: Path
) -> None:
    """The first and the last of four ranks, of two workers each, with empty caches, as on hosts of their own."""
    shards = {video.path: video.shard for video in index.videos}
    per_epoch = _per_epoch(table)
    for job in _of_all_ranks(4, 2, 0, per_epoch)[::3]:
        server.requests.clear()
        _run(root, [job], tmp_path / f"log{job.rank}")
        fetched = [name for name in server.requests if name.endswith(".tar")]
        assert len(fetched) == len(set(fetched))
        needed, ahead = (
            {shards[path] for path in _files_of_lanes(range(24)[job.rank :: 4], range(stop), table, index)}
            for stop in (per_epoch, per_epoch + PARTS_AHEAD + 1)
        )
        assert needed <= set(fetched) <= ahead
        assert len(needed) < len(set(shards.values()))


def test_a_resume_decodes_less_than_one_pool(index: VideoIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    num_decoded = 0
    decode = PyAVReader._decode

    def counting(self: Any) -> Any:
        nonlocal num_decoded
        num_decoded += 1
        return decode(self)

    monkeypatch.setattr(PyAVReader, "_decode", counting)
    stream = make_stream(index, SPEC, **(SETTINGS | {"batch_size": 8, "num_lanes": 4}))
    pool_frames = SETTINGS["pool_clips"] * SPEC.length
    for start in range(0, 2 * stream.batches_per_epoch, 5):
        num_decoded = 0
        batches = stream.batches(start)
        next(batches)
        batches.close()
        assert 0 < num_decoded < pool_frames
