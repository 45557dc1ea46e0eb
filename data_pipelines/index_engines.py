"""Index many files at once: in processes of this machine, or on a Ray cluster.

A file that crashes or hangs the process that reads it becomes a bad file; another process goes on behind it.
"""

import logging
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from data_pipelines.errors import UserError
from data_pipelines.probe import MAX_FRAME_PX, BadFile, Video, index_file, one_line
from data_pipelines.processes import POLL_S, Parent, Patience, is_stopped, worker_context

Engine = Literal["local", "ray"]

FILES_PER_TASK = 64  # fewer are not worth a process, or a task on Ray
FILE_TIMEOUT_S = 60.0
SLOWEST_BYTES_PER_S = 5e6  # a long file takes longer: all of it is read


def index_files(
    root: Path,
    paths: Sequence[str],
    *,
    engine: Engine,
    num_workers: int | None,
    progress: bool,
    max_frame_px: int = MAX_FRAME_PX,
) -> Iterator[Video | BadFile]:
    """Index each of paths (relative to root) once, in any order, with a progress bar.

    engine: "local" for processes of this machine, "ray" for the cluster that RAY_ADDRESS names (without one, for
        a Ray of this machine).
    num_workers: processes of this machine; None takes one a core; 0 reads all files in this process.
    max_frame_px: files with larger frames are bad files.

    Raises UserError: Ray is not installed or fails.
    """
    if engine == "ray":
        entries = _on_ray(root, paths, num_workers, max_frame_px)
    else:
        if num_workers is None:
            num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        entries = _in_processes(root, paths, min(num_workers, -(-len(paths) // FILES_PER_TASK)), max_frame_px)
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
    """A process that indexes its share of the files one by one, as the main process sees it.

    One that dies or hangs is replaced. A file is tried twice before it is blamed for a death: the memory may have
    run out.
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
        entries.close()  # the process holds the only other end: when it ends, so does the pipe
        self._patience = Patience()

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()

    def receive(self) -> Video | BadFile | None:
        """The next entry; None if the process had died and another one tries the same file again."""
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
        """The entry of a file that takes too long to read. A process that is stopped is replaced without blame."""
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
        """Go on behind the file that is being read."""
        self.end()
        entry = BadFile(self.left[0], *self._stat(), reason)
        self.left.popleft()
        self._start()
        return entry

    def _stat(self) -> tuple[int, int]:
        """Size and time stamp of the file that is being read."""
        with suppress(OSError):
            stat = os.stat(self._root / self.left[0])
            return stat.st_size, stat.st_mtime_ns
        return 0, 0


def _work(root: Path, paths: Sequence[str], max_frame_px: int, entries: Any, parent: Parent) -> None:
    """The main function of a process."""
    parent.take_along()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    with suppress(BrokenPipeError):  # nobody is left to receive
        for path in paths:
            entries.send(index_file(root, path, max_frame_px))


def _on_ray(root: Path, paths: Sequence[str], num_workers: int | None, max_frame_px: int) -> Iterator[Video | BadFile]:
    try:
        import ray
    except ImportError:
        raise UserError("engine=ray needs Ray, which is not installed: pip install 'worldmodel[ray]'") from None
    if not paths:
        return
    # Workers get this very package, wherever it is installed here and whatever is installed there.
    settings: dict[str, Any] = {"runtime_env": {"py_modules": [str(Path(__file__).parent)]}}
    if "RAY_ADDRESS" in os.environ:
        settings |= {"address": "auto"}
    else:
        settings |= {"address": "local", "num_cpus": num_workers, "include_dashboard": False}
    try:
        ray.init(logging_level=logging.WARNING, **settings)
        task = ray.remote(_index_chunk)
        chunks = [paths[i : i + FILES_PER_TASK] for i in range(0, len(paths), FILES_PER_TASK)]
        for result in [task.remote(root.resolve(), chunk, max_frame_px) for chunk in chunks]:
            yield from ray.get(result)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError) else error from None
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise UserError(f"indexing '{root}' on Ray failed: {one_line(error)}") from None
    finally:
        ray.shutdown()


def _index_chunk(root: Path, paths: Sequence[str], max_frame_px: int) -> list[Video | BadFile]:
    """A task on Ray. Raises UserError: this machine does not see the folder."""
    if not root.is_dir():
        raise UserError(f"'{root}' is not a folder on the Ray node {os.uname().nodename}: mount it on every node")
    return list(_in_processes(root, paths, 1, max_frame_px))
