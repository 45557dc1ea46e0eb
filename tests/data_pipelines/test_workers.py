"""Workers that are stopped, stuck or out of shared memory: replaced or named, no clip lost, nothing left behind."""

import errno
import json
import logging
import math
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines import clip_decoder, messages, processes
from data_pipelines import stream as stream_module
from data_pipelines import workers as workers_module
from data_pipelines.clip_decoder import ClipDecoder, _CameraVideo, make_clip_set
from data_pipelines.clips import ClipSpec
from data_pipelines.errors import UserError
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.messages import Inbox, Outbox
from data_pipelines.processes import Parent, Patience, environment_int
from data_pipelines.stream import VideoStream
from data_pipelines.workers import Part
from tests.conftest import REPO, script_environment
from tests.data_pipelines.streams import SETTINGS, SPEC, batch_hash, make_stream, mixed_stream, take

pytestmark = pytest.mark.usefixtures("no_other_workers")
PART = Part(np.zeros((1, 3, 1, 2, 2), np.uint8), np.zeros(1, np.int64), np.zeros(1, np.int64), {})
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc and prctl are Linux's")


@pytest.fixture(scope="module")
def index(mixed_folder: Path) -> VideoIndex:
    return load_videos(mixed_folder, progress=False)


@pytest.fixture
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "POLL_S", 0.05)


def _hashes(stream: VideoStream, count: int) -> list[str]:
    return [batch_hash(batch) for batch in take(stream, count)]


def _stopped_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: Any, name: str) -> None:
    """The third call of a function in a worker stops the whole process, the first time that it happens."""
    function, calls = getattr(module, name), 0

    def stopping(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3 and multiprocessing.parent_process() and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return function(*arguments, **more)

    monkeypatch.setattr(module, name, stopping)


@linux
@pytest.mark.parametrize(
    ("module", "name"),
    [(clip_decoder, "open_video"), (stream_module, "stack_clips")],
    ids=["decoding", "not decoding"],
)
def test_a_stopped_worker_is_replaced_and_no_clip_is_lost(
    index: VideoIndex,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    quick_polls: None,
    module: Any,
    name: str,
) -> None:
    whole = _hashes(mixed_stream(index), 12)
    _stopped_once(monkeypatch, tmp_path, module, name)
    assert _hashes(mixed_stream(index, num_workers=1, decode_timeout_s=0.3), 12) == whole
    assert (tmp_path / "stopped").exists()
    assert [record.message[:34] for record in caplog.records] == ["a decoding process was stopped for"]


@linux
def test_a_worker_that_is_stopped_while_it_waits_for_its_turn_is_replaced(index: VideoIndex, quick_polls: None) -> None:
    whole = _hashes(mixed_stream(index), 12)
    batches = mixed_stream(index, num_workers=2, decode_timeout_s=0.3).batches()
    hashes = []
    for number, batch in enumerate(islice(batches, 12)):
        hashes.append(batch_hash(batch))
        if number == 4:
            time.sleep(0.2)  # both are ahead and wait
            for worker in multiprocessing.active_children():
                os.kill(worker.pid or 0, signal.SIGSTOP)
    batches.close()
    assert hashes == whole
    assert not multiprocessing.active_children()


def test_a_worker_that_is_stuck_while_not_decoding_is_replaced(
    index: VideoIndex,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    quick_polls: None,
) -> None:
    whole = _hashes(mixed_stream(index), 4)
    monkeypatch.setattr(workers_module.Progress.work, "__defaults__", (0.2,))
    stack_clips = stream_module.stack_clips

    def stuck_once(*arguments: Any) -> Any:
        if not (tmp_path / "stuck").exists():
            (tmp_path / "stuck").touch()
            time.sleep(1000)
        return stack_clips(*arguments)

    monkeypatch.setattr(stream_module, "stack_clips", stuck_once)
    assert _hashes(mixed_stream(index, num_workers=1, decode_timeout_s=0.3), 4) == whole
    assert [record.message[:37] for record in caplog.records] == ["a decoding process made no progress fo"[:37]]


def test_the_process_that_replaces_a_hanging_one_gets_the_whole_time_limit(
    index: VideoIndex, caplog: pytest.LogCaptureFixture, quick_polls: None
) -> None:
    """Even for the task that has the same number as the one at which the other process hung."""

    def make_parts(worker: int, num_workers: int, first_part: int, faults: workers_module.Faults) -> Iterator[Part]:
        replaces = faults.is_known_fatal(0, 0, 1)
        faults.progress.decode(1 if replaces else 0)
        time.sleep(0.4 if replaces else 1000)
        yield PART

    failures = workers_module.Failures(index, 1.0)
    assert len(list(workers_module.run_workers(make_parts, 1, 1.0, failures))) == 1
    first = index.videos[0].path
    reason = "does not decode (opening it took more than decode_timeout_s=1)"
    assert failures.reasons == {first: reason}
    assert [record.message for record in caplog.records] == [f"video '{first}' {reason}: its clips are left out"]


class _SlowOnTheWay:
    """Takes its time for each frame that is decoded and not asked for."""

    def __init__(self, reader: Any, pause_s: float) -> None:
        self._reader, self._pause_s, self._next = reader, pause_s, 0
        self.close = reader.close

    def read(self, frame: int) -> Any:
        time.sleep(self._pause_s * (frame - self._next))
        self._next = frame + 1
        return self._reader.read(frame)


def test_frames_on_the_way_to_a_clip_do_not_count_for_its_time_limit(
    tmp_path: Path,
    write_video: Any,
    read_numbers: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    quick_polls: None,
) -> None:
    """A stream begins at clip 25 of a video with one keyframe, 100 frames behind it."""
    write_video(tmp_path / "long.mp4", num_frames=120, options={"g": "1000", "sc_threshold": "0"})
    index = load_videos(tmp_path, progress=False)
    assert list(index.videos[0].keyframes) == [0]
    open_video = clip_decoder.open_video
    monkeypatch.setattr(
        clip_decoder, "open_video", lambda *args, **more: _SlowOnTheWay(open_video(*args, **more), 0.014)
    )
    settings = SETTINGS | {"batch_size": 1, "num_lanes": 1, "shuffle": False, "num_workers": 1}
    stream = make_stream(index, ClipSpec(1, 4), **settings, decode_timeout_s=0.8, max_bad_fraction=1.0)
    assert stream.batches_per_epoch == 30
    batches = stream.batches(25)
    shown = [[read_numbers(frame)[1] for video in next(batches)["video"] for frame in video] for _ in range(5)]
    batches.close()
    assert shown == [[4 * clip + frame for frame in range(4)] for clip in range(25, 30)]
    assert not caplog.records


@pytest.mark.parametrize(
    ("first", "last", "num_skipped"),
    [
        (10, -math.inf, 10),  # from frame 0 of the first camera on; the second one has begun with frame 10 of the first
        (45, -math.inf, 15),  # from frames 40 and 30 on
        (70, -math.inf, 10),  # from frames 60 and 70 on
        (45, 35, 10),  # from the last frame that was read on
        (70, 50, 10),  # that is before the keyframes
    ],
)
def test_frames_on_the_way_are_those_of_the_camera_with_most(
    index: VideoIndex, first: int, last: float, num_skipped: int
) -> None:
    decoder = ClipDecoder(
        make_clip_set(index, SPEC, size_px=None, channels=1, decoder="pyav"), workers_module.Faults(), lambda _: False
    )
    one = replace(index.videos[0], num_frames=100, keyframes=(0, 40, 60))
    other = replace(index.videos[0], num_frames=100, keyframes=(0, 20, 60))
    decoder._cameras = [_CameraVideo(0, one, shift=0), _CameraVideo(1, other, shift=-10)]
    decoder._last = last
    assert decoder._num_skipped(first) == num_skipped
    decoder._cameras = [_CameraVideo(0, replace(one, num_frames=200, keyframes=(0,)), shift=100)]
    assert decoder._num_skipped(first) == min(first + 100, first - last)


def test_workers_that_are_stuck_again_and_again_are_one_line(
    index: VideoIndex, monkeypatch: pytest.MonkeyPatch, quick_polls: None
) -> None:
    monkeypatch.setattr(workers_module.Progress.work, "__defaults__", (0.1,))
    monkeypatch.setattr(stream_module, "stack_clips", lambda *_: time.sleep(1000))
    with pytest.raises(UserError, match=r"a decoding process made no progress 4 times in a row for \d+ s: "):
        _hashes(mixed_stream(index, num_workers=1, decode_timeout_s=0.1), 1)
    assert not multiprocessing.active_children()


def test_fetching_a_shard_may_take_any_time(
    index: VideoIndex, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, quick_polls: None
) -> None:
    whole = _hashes(mixed_stream(index), 1)
    hold, calls = stream_module.HeldShards.hold, 0

    def slow_once(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            time.sleep(1.0)
        hold(*arguments)

    monkeypatch.setattr(workers_module.Progress.work, "__defaults__", (0.1,))
    monkeypatch.setattr(stream_module.HeldShards, "hold", slow_once)
    assert _hashes(mixed_stream(index, num_workers=1, decode_timeout_s=0.2), 1) == whole
    assert not caplog.records


def test_time_in_which_the_main_process_was_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(processes.time, "monotonic", lambda: now_s)
    patience = Patience()
    seen = []
    for task, passed_s in [(1, 1.0), (1, 1.0), (1, 3600.0), (1, 1.0), (2, 1.0), (2, 1.0)]:
        now_s += passed_s
        seen.append(patience.waited_s(task))
    assert seen == [0.0, 1.0, 3.0, 4.0, 0.0, 1.0]


STREAM = """
import json, multiprocessing, sys, time
from collections.abc import Iterator
from itertools import islice
from data_pipelines import workers
from data_pipelines.clips import ClipSpec
from data_pipelines.formats.registry import load_videos
from data_pipelines.stream import VideoStream
from tests.data_pipelines.streams import batch_hash, make_stream

root, settings, pause_s = json.loads(sys.argv[1])
workers.POLL_S = 0.05
batches = make_stream(load_videos(root, progress=False), ClipSpec(), **settings).batches()
for number, batch in enumerate(islice(batches, 12)):
    if number == 3:
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(pause_s)
    print(batch_hash(batch), flush=True)
batches.close()
"""


def _start(index: VideoIndex, pause_s: float = 0.0, **settings: Any) -> "subprocess.Popen[str]":
    arguments = json.dumps([str(index.root), SETTINGS | settings, pause_s])
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    return subprocess.Popen(
        [sys.executable, "-c", STREAM, arguments], env=environment, start_new_session=True, cwd=REPO, **pipes
    )


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@linux
def test_stopping_all_processes_for_a_while_loses_nothing(index: VideoIndex) -> None:
    """Ctrl-Z and fg: no process is taken for one that hangs."""
    whole = _hashes(mixed_stream(index), 12)
    with _start(index, pause_s=0.05, num_workers=2, decode_timeout_s=0.5) as main:
        assert main.stdout is not None and main.stderr is not None
        for _ in range(4):
            main.stdout.readline()
        os.killpg(main.pid, signal.SIGSTOP)
        time.sleep(1.2)
        os.killpg(main.pid, signal.SIGCONT)
        assert main.stdout.read().split() == whole[-9:]
        assert main.stderr.read() == ""


@linux
def test_a_stopped_worker_ends_with_a_main_process_that_is_killed(index: VideoIndex) -> None:
    with _start(index, pause_s=0.2, num_workers=2) as main:
        assert main.stdout is not None
        for _ in range(3):
            main.stdout.readline()
        pids = [int(pid) for pid in main.stdout.readline().split()]
        assert len(pids) == 2
        os.kill(pids[0], signal.SIGSTOP)
        main.kill()
        main.stdout.read()
    for _ in range(100):
        if not any(map(_is_running, pids)):
            return
        time.sleep(0.05)
    for pid in filter(_is_running, pids):
        os.kill(pid, signal.SIGKILL)
    pytest.fail("a worker lives on")


HELD = """
import sys
from data_pipelines.stream import open_videos

def start():
    batches = iter(open_videos(sys.argv[1], num_frames=3, batch_size=2, size_px=32, num_workers=1))
    next(batches)
    return batches

def main():
    others = start()  # the traceback keeps them
    print("the end", flush=True)
    raise ValueError("a mistake of the user")

batches = start()
main()
"""


def test_a_script_that_holds_an_iterator_of_a_stream_ends(index: VideoIndex) -> None:
    """A fresh process: forks of tests.forked end without the functions that other packages registered."""
    arguments = [sys.executable, "-c", HELD, str(index.root / "long")]
    done = subprocess.run(
        arguments, capture_output=True, text=True, cwd=REPO, env=script_environment(), timeout=30, check=False
    )
    assert done.returncode == 1 and done.stdout == "the end\n"
    assert done.stderr.rstrip().endswith("ValueError: a mistake of the user")


def test_workers_of_another_thread_are_not_tied_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal would come when that thread ends, while others may still use the workers."""
    monkeypatch.setattr(processes.ctypes, "CDLL", lambda name: pytest.fail("prctl is called"))
    Parent(os.getppid(), in_main_thread=False).take_along()


# ---------------------------------------------------------------------------------------------------- shared memory


def _small_shm() -> bool:
    return shutil.which("unshare") is not None and not subprocess.run(["unshare", "-m", "true"]).returncode


@linux
@pytest.mark.skipif(not _small_shm(), reason="mounting takes root")
@pytest.mark.parametrize(
    "options",
    ["size=64k", *(pytest.param(options, marks=pytest.mark.slow) for options in ("size=4k,nr_inodes=1", "ro"))],
)
def test_a_small_dev_shm_is_enough(index: VideoIndex, options: str) -> None:
    """As in a container: batches of 442 kB do not need it at all."""
    arguments = json.dumps([str(index.root), SETTINGS | {"num_workers": 2}, 0.0])
    mount = f'mount -t tmpfs -o {options} tmpfs /dev/shm && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, "-c", STREAM, arguments],
        capture_output=True, text=True, timeout=60, cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    whole = _hashes(mixed_stream(index), 12)
    assert [line for line in done.stdout.splitlines() if " " not in line] == whole


def test_memory_that_cannot_be_had_is_one_line(index: VideoIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite

    def into_a_full_memory(file: int, part: memoryview, start: int) -> int:
        if start + part.nbytes > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(file, part, start)

    monkeypatch.setattr(messages.os, "pwrite", into_a_full_memory)
    with pytest.raises(UserError, match=r"gets no memory for its part of a batch \(No space left on device\): lower"):
        _hashes(mixed_stream(index, num_workers=1), 1)
    assert not multiprocessing.active_children()


MESSAGE: dict[str, Any] = {
    "video": np.arange(3 * 5 * 7, dtype=np.uint8).reshape(3, 5, 7),
    "empty": np.empty((0, 4), dtype=np.int64),
    "odd": np.arange(7, dtype=np.float32),
    "text": {3: "has changed"},
}


def assert_is_message(received: dict[str, Any]) -> None:
    assert received.keys() == MESSAGE.keys() and received["text"] == MESSAGE["text"]
    for name in ("video", "empty", "odd"):
        np.testing.assert_array_equal(received[name], MESSAGE[name])
        assert received[name].dtype == MESSAGE[name].dtype and received[name].flags.writeable
        assert received[name].ctypes.data % messages.ALIGNMENT == 0


@pytest.fixture
def ends() -> Iterator[tuple[Outbox, Inbox, socket.socket]]:
    """Two slots, and the sender's end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Outbox(ours, 2), Inbox(theirs), ours


@pytest.mark.parametrize(("has_memfd", "bytes_at_once"), [(True, 2**31), (True, 50), (False, 2**31)])
def test_messages_arrive_as_they_were_sent(
    monkeypatch: pytest.MonkeyPatch, ends: tuple[Outbox, Inbox, socket.socket], has_memfd: bool, bytes_at_once: int
) -> None:
    """Also where the system writes less at once than it is asked to."""
    outbox, inbox, ours = ends
    pwrite = os.pwrite
    monkeypatch.setattr(messages.os, "pwrite", lambda file, part, start: pwrite(file, part[:bytes_at_once], start))
    if not has_memfd:
        monkeypatch.delattr(messages.os, "memfd_create", raising=False)
    outbox.send(MESSAGE)
    outbox.send(None)
    ours.close()  # what was sent outlives the sender
    assert_is_message(inbox.receive())
    assert inbox.receive() is None
    with pytest.raises(EOFError):
        inbox.receive()


def test_slots_are_used_again_and_grow(ends: tuple[Outbox, Inbox, socket.socket]) -> None:
    """Later messages do not change those that were received."""
    outbox, inbox, _ = ends
    received = []
    for number in range(12):
        size = 1000 * 3**number if number < 6 else 10
        outbox.send(np.full(size, number))
        received.append(inbox.receive())
        assert outbox.has_room(0)
    assert [(len(values), set(values.tolist())) for values in received] == [
        (1000 * 3**number if number < 6 else 10, {number}) for number in range(12)
    ]
    outbox.send(MESSAGE)
    assert_is_message(inbox.receive())


def test_there_is_room_for_as_many_messages_as_slots(ends: tuple[Outbox, Inbox, socket.socket]) -> None:
    outbox, inbox, _ = ends
    for number in range(2):
        assert outbox.has_room(0)
        outbox.send(number)
    assert not outbox.has_room(0) and not outbox.has_room(0.01)
    assert inbox.receive() == 0
    assert outbox.has_room(10)
    outbox.send(2)
    assert not outbox.has_room(0)
    assert [inbox.receive(), inbox.receive()] == [1, 2]


@linux
@pytest.mark.parametrize("sizes", [[3], [10, 100_000]], ids=["a first message", "a larger one in the same slot"])
def test_a_message_whose_descriptor_is_dropped_is_one_line(sizes: list[int]) -> None:
    """The system drops it where the receiver has as many files open as it may."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        outbox, inbox = Outbox(ours, 1), Inbox(theirs)
        *before, last = sizes
        for size in before:
            outbox.send(np.zeros(size))
            assert len(inbox.receive()) == size and outbox.has_room(0)
        outbox.send(np.ones(last))
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(ours.fileno())  # all lower numbers are taken
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            with pytest.raises(UserError, match=r"^too many open files: raise the limit .*, or lower num_workers$"):
                inbox.receive()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# ------------------------------------------------------------------------------------------------------ environment


@pytest.mark.parametrize("text", ["x", "", "-1", "0", "1.5", "1e3", "9" * 5000], ids=range(7))
def test_numbers_in_the_environment_are_checked(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", text)
    with pytest.raises(UserError, match=r"LOCAL_WORLD_SIZE='.*' is not a whole number of at least 1") as line:
        environment_int("LOCAL_WORLD_SIZE", 1, least=1)
    assert len(str(line.value)) < 300
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert environment_int("LOCAL_WORLD_SIZE", 1, least=1) == 4
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert environment_int("LOCAL_WORLD_SIZE", 7) == 7


def test_the_allowance_of_a_fetch_is_endless() -> None:
    progress = workers_module.Progress()
    progress.work(math.inf)
    assert progress.task[1] == math.inf and progress.place is None


@pytest.fixture(autouse=True)
def warnings_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
