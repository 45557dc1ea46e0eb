"""Index many files in parallel, in processes of this machine.

A file that crashes or hangs the process that reads it becomes a bad file; a new process continues after it.
"""

import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from data_pipelines.facts import MAX_FRAME_PX, BadFile, Video
from data_pipelines.indexing.probe import Stamp, index_file, stamp_of
from data_pipelines.processes import POLL_S, Parent, Patience, is_stopped, worker_context

FILES_PER_PROCESS = 64  # fewer are not worth one
FILE_TIMEOUT_S = 60.0
SLOWEST_BYTES_PER_S = 5e6  # a long file takes longer: all of it is read


def index_files(
    root: Path,
    paths: Sequence[str],
    *,
    num_workers: int | None,
    progress: bool,
    max_frame_px: int = MAX_FRAME_PX,
) -> Iterator[Video | BadFile]:
    """Index each of `paths` (relative to root) once, in any order, with a progress bar.

    num_workers: processes; None: one per core; 0: none, the files are read in this process.
    max_frame_px: files with larger frames are bad files.
    """
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    entries = _in_processes(root, paths, min(num_workers, -(-len(paths) // FILES_PER_PROCESS)), max_frame_px)
    with tqdm(total=len(paths), desc="indexing", unit="file", disable=not (progress and paths)) as bar:
        for entry in entries:
            bar.update()
            yield entry


def _in_processes(root: Path, paths: Sequence[str], num_processes: int, max_frame_px: int) -> Iterator[Video | BadFile]:
    if num_processes == 0:
        yield from (index_file(root, path, max_frame_px) for path in paths)
        return
    processes: list[_Process] = []
    try:
        for number in range(num_processes):
            processes.append(_Process(root, paths[number::num_processes], max_frame_px))
        while processes:
            ready = wait([process.pipe for process in processes], timeout=POLL_S)
            for process in list(processes):
                entry = process.receive() if process.pipe in ready else process.give_up_if_hanging()
                if entry is not None:
                    yield entry
                if not process.left:
                    process.end()
                    processes.remove(process)
    finally:
        for process in processes:
            process.end()


class _Process:
    """A process that indexes its share of the files one by one, as seen by the main process.

    If it dies or hangs, it is replaced. A file is tried twice before it is held responsible for a death: the memory
    may have run out.
    """

    def __init__(self, root: Path, paths: Sequence[str], max_frame_px: int) -> None:
        self._root, self._max_frame_px = root, max_frame_px
        self.left = deque(paths)  # the first one is being read
        self._suspect: str | None = None
        self._start()

    def _start(self) -> None:
        context = worker_context()
        self.pipe, entries = context.Pipe(duplex=False)
        what = (self._root, tuple(self.left), self._max_frame_px, entries, Parent.here())
        self._process = context.Process(target=_work, args=what, daemon=True)
        self._process.start()
        entries.close()  # the process has the only other end: when it ends, so does the pipe
        self._patience = Patience()

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()

    def receive(self) -> Video | BadFile | None:
        """Return the next entry; None if the process has died and a new one tries the same file again."""
        try:
            entry = self.pipe.recv()
        except (EOFError, OSError):  # OSError: it died in the middle of a message
            if self.left[0] == self._suspect:
                return self._give_up("crashes the process that reads it")
            self._suspect = self.left[0]
            self.end()
            self._start()
            return None
        self.left.popleft()
        return entry

    def give_up_if_hanging(self) -> BadFile | None:
        """Return the entry of a file that takes too long to read, or None. A stopped process is only replaced."""
        waited_s = self._patience.waited_s(len(self.left))
        if waited_s < FILE_TIMEOUT_S:
            return None
        if is_stopped(self._process.pid):
            self.end()
            self._start()
            return None
        if waited_s < FILE_TIMEOUT_S + self._stat()[0] / SLOWEST_BYTES_PER_S:
            return None
        return self._give_up(f"not read within {waited_s:.0f} s")

    def _give_up(self, reason: str) -> BadFile:
        """Continue after the file that is being read."""
        self.end()
        entry = BadFile(self.left[0], *self._stat(), reason)
        self.left.popleft()
        self._start()
        return entry

    def _stat(self) -> Stamp:
        """Return size and time stamp of the file that is being read."""
        with suppress(OSError):
            return stamp_of(self._root / self.left[0])
        return 0, 0


def _work(root: Path, paths: Sequence[str], max_frame_px: int, entries: Any, parent: Parent) -> None:
    """Run a process: index the files and send the entries."""
    parent.take_along()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    with suppress(BrokenPipeError):  # nobody is left to receive
        for path in paths:
            entries.send(index_file(root, path, max_frame_px))
