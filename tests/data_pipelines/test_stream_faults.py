"""Files that fail while they are streamed, and decoding processes that hang, crash or are killed."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines import clip_decoder
from data_pipelines import stream as stream_module
from data_pipelines import workers as workers_module
from data_pipelines.batches import Batch
from data_pipelines.clip_decoder import clips_of
from data_pipelines.errors import UserError
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from tests.data_pipelines.streams import SETTINGS, SPEC, batch_hash, mixed_stream, read_clips, take

pytestmark = pytest.mark.usefixtures("no_other_workers")


@pytest.fixture(scope="module")
def index(mixed_folder: Path) -> VideoIndex:
    return load_videos(mixed_folder, progress=False)


@pytest.fixture
def damaged(index: VideoIndex, tmp_path: Path) -> tuple[VideoIndex, set[str]]:
    """Four files that were good when they were indexed: empty, cut, gone, and damaged inside by a failing disk, which
    changes neither size nor time."""
    root = tmp_path / "damaged"
    shutil.copytree(index.root, root)
    (root / "a01.mp4").write_bytes(b"")
    data = (root / "a02.mp4").read_bytes()
    (root / "a02.mp4").write_bytes(data[: len(data) // 2])
    (root / "a03.mp4").unlink()
    long = root / "long" / "32.mp4"
    data = long.read_bytes()
    long.write_bytes(data[: len(data) // 2] + bytes(200) + data[len(data) // 2 + 200 :])
    os.utime(long, ns=(0, index.videos[32].mtime_ns))
    return VideoIndex(root, index.videos), {"a01.mp4", "a02.mp4", "a03.mp4", "long/32.mp4"}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_files_that_fail_while_streaming_are_left_out_and_named_once(
    index: VideoIndex,
    damaged: tuple[VideoIndex, set[str]],
    read_numbers: Any,
    caplog: pytest.LogCaptureFixture,
    num_workers: int,
) -> None:
    broken, names = damaged
    good = mixed_stream(index)
    total = 2 * good.batches_per_epoch
    whole = take(good, total)
    batches = take(mixed_stream(broken, num_workers=num_workers, max_bad_fraction=0.2), total)
    lost: set[int] = set()
    for expected, batch in zip(whole, batches, strict=True):
        missing = set(expected["clip_id"].tolist()) - set(batch["clip_id"].tolist())
        kept = torch.tensor([clip not in missing for clip in expected["clip_id"].tolist()])
        assert torch.equal(expected["clip_id"][kept], batch["clip_id"])  # dropped, not replaced nor moved
        assert torch.equal(expected["video"][kept], batch["video"])  # no frame that only looks right
        lost |= missing
    lost_videos = {broken.videos[video].path for video in clips_of(index, SPEC).videos_of(np.array(sorted(lost)))}
    assert lost_videos == names
    for name in names:
        what = "has changed" if name in ("a01.mp4", "a02.mp4") else "does not decode"
        assert sum(f"'{name}' {what}" in record.message for record in caplog.records) == 1
    # of the long file only what lies in the damaged keyframe intervals
    of_long = clips_of(index, SPEC).first_clip[32:34]
    assert 1 <= sum(of_long[0] <= clip < of_long[1] for clip in lost) < (of_long[1] - of_long[0]) / 2


def test_what_fails_does_not_depend_on_where_the_run_was_resumed(
    damaged: tuple[VideoIndex, set[str]],
) -> None:
    stream = mixed_stream(damaged[0], max_bad_fraction=0.2)
    whole = [batch_hash(batch) for batch in take(stream, stream.batches_per_epoch)]
    for start in range(1, stream.batches_per_epoch, 2):
        assert batch_hash(take(stream, 1, start)[0]) == whole[start]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_failing_files_stop_the_run_with_one_line(
    damaged: tuple[VideoIndex, set[str]], num_workers: int
) -> None:
    stream = mixed_stream(damaged[0], num_workers=num_workers, max_bad_fraction=0.05)
    with pytest.raises(UserError, match=r"2 of 34 videos do not decode.*max_bad_fraction=0.05") as caught:
        take(stream, stream.batches_per_epoch)
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()
    with pytest.raises(UserError, match="do not decode"):
        list(
            read_clips(
                damaged[0],
                SPEC,
                size_px=None,
                channels=1,
                batch_size=8,
                num_workers=num_workers,
                max_bad_fraction=0,
            )
        )


def _started(index: VideoIndex, num_workers: int) -> tuple[Iterator[Batch], list[Any]]:
    batches = mixed_stream(index, num_workers=num_workers).batches()
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == num_workers
    return batches, workers


def test_closing_the_iterator_ends_the_workers(index: VideoIndex) -> None:
    batches, workers = _started(index, 2)
    batches.close()  # type: ignore[attr-defined]
    assert not any(worker.is_alive() for worker in workers)


def test_workers_are_no_more_than_the_lanes_of_the_rank(index: VideoIndex) -> None:
    batches = mixed_stream(index, num_workers=8, world_size=4, rank=1).batches()
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()


def test_workers_leave_ctrl_c_to_the_main_process(index: VideoIndex) -> None:
    batches, workers = _started(index, 1)
    os.kill(workers[0].pid, signal.SIGINT)
    assert len(list(islice(batches, 10))) == 10
    batches.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_killed_workers_are_replaced_and_no_batch_changes(index: VideoIndex, num_workers: int) -> None:
    total = mixed_stream(index).batches_per_epoch + 4
    whole = [batch_hash(batch) for batch in take(mixed_stream(index), total)]
    rng = random.Random(0)
    batches = mixed_stream(index, num_workers=num_workers).batches()
    hashes = []
    for number in range(total):
        if number % 7 == 3:
            victim = rng.choice(multiprocessing.active_children())
            time.sleep(rng.uniform(0, 0.05))
            victim.kill()
        hashes.append(batch_hash(next(batches)))
    batches.close()
    assert hashes == whole
    assert not multiprocessing.active_children()


class _FaultyReader:
    """Does something terrible before it reads one frame of one video."""

    def __init__(self, reader: Any, frame: int, act: Callable[[], Any]) -> None:
        self._reader, self._frame, self._act = reader, frame, act
        self.close = reader.close

    def read(self, frame: int) -> Any:
        if frame == self._frame:
            self._act()
        return self._reader.read(frame)


def _make_faulty(monkeypatch: pytest.MonkeyPatch, name: str, frame: int | None, act: Callable[[], Any]) -> None:
    """frame None: the file cannot even be opened."""
    open_video = clip_decoder.open_video

    def faulty(path: str, *arguments: Any, **more: Any) -> Any:
        if not path.endswith(name):
            return open_video(path, *arguments, **more)
        if frame is None:
            act()
        return _FaultyReader(open_video(path, *arguments, **more), -1 if frame is None else frame, act)

    monkeypatch.setattr(clip_decoder, "open_video", faulty)


@pytest.mark.parametrize("frame", [None, 130])
@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda: time.sleep(1000), "took more than decode_timeout_s=1"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "ended two processes"),
    ],
    ids=["hangs", "crashes"],
)
def test_a_frame_at_which_workers_hang_or_crash_is_left_out(
    index: VideoIndex,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    frame: int | None,
    act: Callable[[], Any],
    reason: str,
) -> None:
    name = "long/32.mp4"
    [video] = [row for row, facts in enumerate(index.videos) if facts.path == name]
    table = clips_of(index, SPEC)
    total = 2 * mixed_stream(index).batches_per_epoch
    whole = take(mixed_stream(index), total)
    monkeypatch.setattr(workers_module, "POLL_S", 0.05)
    _make_faulty(monkeypatch, name, frame, act)
    batches = take(mixed_stream(index, num_workers=2, decode_timeout_s=1.0), total)
    lost = set()
    for expected, batch in zip(whole, batches, strict=True):
        ids = batch["clip_id"].tolist()
        missing = [clip for clip in expected["clip_id"].tolist() if clip not in ids]
        kept = torch.tensor([clip not in missing for clip in expected["clip_id"].tolist()])
        assert torch.equal(expected["clip_id"][kept], batch["clip_id"])
        assert torch.equal(expected["video"][kept], batch["video"])
        lost.update(missing)
    clips = np.arange(table.first_clip[video], table.first_clip[video + 1])
    starts = table.starts_of(clips)
    keyframes = np.asarray(index.videos[video].keyframes)
    if frame is not None:
        behind = keyframes[np.searchsorted(keyframes, starts, side="right") - 1]
        clips = clips[(behind <= frame) & (frame < starts + SPEC.span)]
        assert 0 < len(clips) < len(starts)
    delivered = np.concatenate([batch["clip_id"].numpy() for batch in whole])
    assert lost == set(clips.tolist()) & set(delivered.tolist()) != set()
    place = "opening it" if frame is None else f"decoding frame {frame}"
    assert sum(f"'{name}' does not decode ({place} {reason})" in record.message for record in caplog.records) == 1


def test_workers_that_die_again_and_again_are_one_clear_line(
    index: VideoIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(stream_module, "stack_clips", die)
    with pytest.raises(UserError, match=r"a decoding process died 4 times in a row \(exit code -9\)") as caught:
        take(mixed_stream(index, num_workers=2), 1)
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


def test_an_error_in_a_worker_arrives_with_its_traceback(index: VideoIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(stream_module, "stack_clips", fail)
    with pytest.raises(RuntimeError, match=r"in fail(.|\n)*a mistake of ours"):
        take(mixed_stream(index, num_workers=1), 1)


ORPHAN = """
import json, multiprocessing, sys, time
from data_pipelines.clips import ClipSpec
from data_pipelines.formats.registry import load_videos
from data_pipelines.stream import VideoStream
from tests.data_pipelines.streams import make_stream

root, settings = json.loads(sys.argv[1])
batches = make_stream(load_videos(root, progress=False), ClipSpec(), **settings, num_workers=1).batches()
next(batches)
print(multiprocessing.active_children()[0].pid, flush=True)
time.sleep(1000)
"""


def test_workers_end_with_a_main_process_that_was_killed(index: VideoIndex) -> None:
    command = [sys.executable, "-c", ORPHAN, json.dumps([str(index.root), SETTINGS])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as main:
        assert main.stdout is not None
        worker = int(main.stdout.readline())
        main.kill()
    for _ in range(200):
        try:
            os.kill(worker, 0)
            if Path(f"/proc/{worker}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z":
                return  # it ended; nobody has asked for its exit code yet
        except OSError:
            return
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker lives on")
