"""Decoding processes: they make parts of batches, are watched, and are replaced if they fail.

A part is a pure function of its number. So a process that replaces another one delivers the same clips.
"""

import gc
import os
import signal
import socket
import traceback
from collections.abc import Collection, Generator, Iterator, Mapping
from itertools import cycle
from multiprocessing.util import Finalize
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipelines.errors import UserError, one_line_logger
from data_pipelines.index import VideoIndex
from data_pipelines.messages import Inbox, Numbers, Outbox, is_waiting, receive_numbers, share_numbers
from data_pipelines.processes import POLL_S, Parent, Patience, is_stopped, worker_context

log = one_line_logger(__name__)

Place = tuple[int, int]  # a video's number in the index (VideoIndex.all_videos), and a frame

OPENING = -1  # instead of a frame
NO_VIDEO = -1
PARTS_AHEAD = 4  # that a worker makes before they are requested; with 2, workers often wait for each other
MAX_DEATHS = 3  # of consecutive workers that deliver nothing
OTHER_WORK_S = 30.0  # additional time for work other than decoding, such as starting
DECODE_TIMEOUT_S = 60.0


class Part(NamedTuple):
    """The contribution of one worker to a batch, b clips.

    video: uint8 [b, T, C, H, W]. clip_id, row: int64 [b], as in data_pipelines.batches.Batch.
    failures: as Faults.found.
    """

    video: NDArray[np.uint8]
    clip_id: NDArray[np.int64]
    row: NDArray[np.int64]
    failures: dict[int, str]


class Progress:
    """The current task of a worker, in memory that the main process watches.

    The memory holds the number of the video in the index or NO_VIDEO, the frame or OPENING, the number of the task, and
    the seconds that the task may take in addition to decode_timeout_s.
    """

    BLANK = (NO_VIDEO, OPENING, 0, OTHER_WORK_S)

    def __init__(self, shared: Numbers = None) -> None:
        self._shared: Numbers = list(self.BLANK) if shared is None else shared

    def decode(self, video: int, extra_s: float = 0.0) -> None:
        """Begin to decode a clip of the video with this number in the index."""
        self._begin(video, extra_s)

    def at_frame(self, video: int, frame: int) -> None:
        """Begin to decode a frame of the same clip, in one of its cameras."""
        self._shared[0] = video
        self._shared[1] = frame

    def work(self, extra_s: float = OTHER_WORK_S) -> None:
        """Begin something other than decoding."""
        self._begin(NO_VIDEO, extra_s)

    def _begin(self, video: int, extra_s: float) -> None:
        shared = self._shared  # set one by one: this runs several times per clip
        shared[0] = video
        shared[1] = OPENING
        shared[2] += 1
        shared[3] = extra_s

    @property
    def place(self) -> Place | None:
        """The video and the frame that are being decoded; None if there are none."""
        video, frame = int(self._shared[0]), int(self._shared[1])
        return None if video == NO_VIDEO else (video, frame)

    @property
    def task(self) -> tuple[int, float]:
        """The number of the task, and the seconds that it may take in addition to decode_timeout_s."""
        return int(self._shared[2]), float(self._shared[3])


class Faults:
    """The videos that one worker cannot use.

    found: the reason, as a predicate, by the number of the video in the index.
    judged: by path, for files whose size or time stamp differs from the index: both, and the change or "".
    fatal: (video, frame) pairs at which an earlier worker hung or crashed.
    """

    def __init__(self, fatal: Collection[Place] = (), progress: Progress | None = None) -> None:
        self.found: dict[int, str] = {}
        self.judged: dict[str, tuple[tuple[int, int], str]] = {}
        self.progress = progress or Progress()
        self._fatal: dict[int, list[int]] = {}
        for video, frame in fatal:
            self._fatal.setdefault(video, []).append(frame)

    def is_known_fatal(self, video: int, keyframe: int, stop: int) -> bool:
        """Return whether decoding `video` from `keyframe` up to frame `stop` includes a fatal frame."""
        return any(frame == OPENING or keyframe <= frame < stop for frame in self._fatal.get(video, ()))

    def report(self) -> dict[int, str]:
        """Return the faults that were found since the last call."""
        found, self.found = self.found, {}
        return found


class Failures:
    """Counts the videos that fail while streaming. Reports each file once; raises UserError when there are too many.

    reasons: by path, as predicates.
    """

    def __init__(self, index: VideoIndex, max_bad_fraction: float) -> None:
        self._index, self._max_bad_fraction = index, max_bad_fraction
        self._failed: set[int] = set()
        self.reasons: dict[str, str] = {}

    def add(self, failures: Mapping[int, str]) -> None:
        """Add failures, as in Faults.found. Raises UserError: too many videos have failed."""
        for video, reason in failures.items():
            if video in self._failed:
                continue
            self._failed.add(video)
            path, num_rows = self._index.video(video).path, len(self._index.videos)
            if path not in self.reasons:
                self.reasons[path] = reason
                log.warning("video '%s' %s: its clips are left out", path, reason)
            num_failed = len({number % num_rows for number in self._failed})
            if num_failed > self._max_bad_fraction * num_rows:
                raise UserError(
                    f"{num_failed} of {num_rows} videos do not decode or have changed, more than "
                    f"max_bad_fraction={self._max_bad_fraction:g} allows; the last is '{path}', which {reason}"
                )


class MakeParts(Protocol):
    """The parts that a worker delivers: a pure function of these numbers, so that one worker can replace another."""

    def __call__(self, worker: int, num_workers: int, first_part: int, faults: Faults) -> Iterator[Part]: ...


def run_workers(
    make_parts: MakeParts, num_workers: int, decode_timeout_s: float, failures: Failures
) -> Generator[Part, None, None]:
    """Yield parts of worker 0, ..., num_workers - 1, 0, ... until one has no more. Closing it ends the workers."""
    if num_workers == 0:
        yield from make_parts(0, 1, 0, Faults())
        return
    workers: list[_Worker] = []
    try:
        for worker in range(num_workers):
            workers.append(_Worker(make_parts, worker, num_workers, decode_timeout_s, failures))
        for each in cycle(workers):
            part = each.receive()
            if part is None:
                return
            yield part
    finally:
        for each in workers:
            each.end()


class _Worker:
    """A decoding process, seen from the main process.

    A process that dies, or is killed because it is stuck, is replaced by one that continues with the part that is due.
    A frame at which one process hung, or two died, is not decoded again.
    """

    def __init__(
        self,
        make_parts: MakeParts,
        worker: int,
        num_workers: int,
        decode_timeout_s: float,
        failures: Failures,
    ) -> None:
        self._make_parts, self._worker, self._num_workers = make_parts, worker, num_workers
        self._decode_timeout_s, self._failures = decode_timeout_s, failures
        self._num_received = 0
        self._num_deaths = 0  # since the last part came
        self._died_at: Place | None = None
        self._fatal: set[Place] = set()
        self._start()

    def _start(self) -> None:
        context = worker_context()
        self._socket, theirs = socket.socketpair()
        self._inbox = Inbox(self._socket)
        self._progress = Progress(share_numbers(self._socket, Progress.BLANK))
        what = (self._make_parts, self._worker, self._num_workers, self._num_received, frozenset(self._fatal))
        self._process = context.Process(target=_work, args=(*what, theirs, Parent.here()), daemon=True)
        self._process.start()
        # At exit multiprocessing sends SIGTERM, which a worker ignores, and would wait for ever.
        self._at_exit = Finalize(None, self._process.kill, exitpriority=0)
        self._patience = Patience()  # a new process counts its tasks from the beginning
        theirs.close()  # the process holds the only other end: when it ends, the connection ends

    def end(self) -> None:
        self._at_exit.cancel()
        self._process.kill()
        self._process.join()
        self._socket.close()

    def receive(self) -> Part | None:
        """Return the next part, or None if there are no more. Raises UserError: workers keep failing."""
        self._patience.start()
        while True:
            try:
                while not is_waiting(self._socket, POLL_S):
                    self._replace_if_stuck()
                message = self._inbox.receive()
            except (EOFError, OSError):
                self._replace_dead()
                continue
            if isinstance(message, Exception):
                raise message
            self._num_received += 1
            self._num_deaths = 0
            return message

    def _replace_if_stuck(self) -> None:
        """Replace a worker whose task takes too long while a part is due."""
        task, extra_s = self._progress.task
        waited_s = self._patience.waited_s(task)
        if waited_s <= self._decode_timeout_s:
            return
        stopped = is_stopped(self._process.pid)
        if not stopped and waited_s <= self._decode_timeout_s + extra_s:
            return
        place = self._progress.place
        self.end()
        if place is not None and not stopped:
            self._leave_out(place, f"took more than decode_timeout_s={self._decode_timeout_s:g}")
        else:
            self._count_death("was stopped" if stopped else "made no progress", f"for {waited_s:.0f} s")
        self._start()

    def _replace_dead(self) -> None:
        self.end()
        place = self._progress.place
        self._count_death("died", f"(exit code {self._process.exitcode})")
        if place is not None and place == self._died_at:
            self._leave_out(place, "ended two processes")
            self._num_deaths = 0
        self._died_at = place
        self._start()

    def _count_death(self, what: str, detail: str) -> None:
        """Count the death of a process. Raises UserError: there were too many in a row."""
        self._num_deaths += 1
        if self._num_deaths <= MAX_DEATHS:
            log.warning("a decoding process %s %s; another one continues at the same part", what, detail)
            return
        raise UserError(
            f"a decoding process {what} {self._num_deaths} times in a row {detail}: if memory ran out, "
            f"lower num_workers={self._num_workers} or pool_clips; otherwise a video crashes the decoder"
        )

    def _leave_out(self, place: Place, what: str) -> None:
        video, frame = place
        self._fatal.add(place)
        action = "opening it" if frame == OPENING else f"decoding frame {frame}"
        self._failures.add({video: f"does not decode ({action} {what})"})


def _work(
    make_parts: MakeParts,
    worker: int,
    num_workers: int,
    first_part: int,
    fatal: Collection[Place],
    connection: socket.socket,
    parent: Parent,
) -> None:
    """Run a decoding process: send all parts, then None, or the error."""
    parent.take_along()
    for number in (signal.SIGINT, signal.SIGTERM):  # the main process handles them, and then ends the workers
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    gc.freeze()  # collections then skip objects from before the fork, and do not copy their pages
    progress = Progress(receive_numbers(connection))
    outbox = Outbox(connection, PARTS_AHEAD)

    def send(message: Any) -> None:
        while not outbox.has_room(POLL_S):
            if parent.is_gone():
                os._exit(1)  # no process is left to receive
        try:
            outbox.send(message)
        except BrokenPipeError:
            os._exit(1)
        except OSError as error:
            raise UserError(
                f"a decoding process gets no memory for its part of a batch ({error.strerror}): lower "
                f"num_workers={num_workers} or batch_size"
            ) from None

    try:
        for part in make_parts(worker, num_workers, first_part, Faults(fatal, progress)):
            send(part)
        send(None)
    except UserError as error:
        send(error)
    except Exception:
        send(RuntimeError(f"in a decoding process:\n{traceback.format_exc()}"))
