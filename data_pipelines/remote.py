"""Shards behind a URL, fetched whole into a folder that all processes of a host share.

A shard is written aside, checked against the index (size, sha256) and renamed. Locks of the operating system, which end
with the process that holds them, see to it that no two processes fetch the same shard at the same time and that no
shard is removed while one decodes from it.

A shard that cannot be fetched ends the run with one line. Its videos are not dropped instead: what is delivered would
then depend on the weather of the network. Nothing has been skipped, so that the run can be resumed where it stopped.
"""

import errno
import hashlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from data_pipelines.errors import UserError
from data_pipelines.probe import one_line

log = logging.getLogger(__name__)

TRIES = 8
FIRST_PAUSE_S = 1.0  # doubles from try to try, up to
LONGEST_PAUSE_S = 30.0
STALL_S = 30.0  # without a byte
CHUNK_BYTES = 2**20
NOT_WORTH_A_RETRY = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    ValueError,
    NotImplementedError,
    ImportError,
)
TRANSIENT_STATUS = (408, 429)  # besides 5xx

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """A tar of videos as its index describes it."""

    name: str
    size_bytes: int
    sha256: str


def is_url(root: str | Path) -> bool:
    return "://" in str(root)


def default_cache_dir() -> Path:
    return Path.home() / ".cache" / "worldmodel" / "shards"


@dataclass(frozen=True)
class Store:
    """Files behind a URL of any kind that fsspec knows, read with patience."""

    url: str
    sleep: Callable[[float], None] = time.sleep
    stall_s: float = STALL_S

    def read(self, name: str) -> bytes | None:
        """A small file's bytes, or None if there is none. Raises UserError when it cannot be had."""

        def attempt() -> bytes | None:
            try:
                with self._open(name, None) as source:
                    return b"".join(iter(lambda: source.read(CHUNK_BYTES), b""))
            except FileNotFoundError:
                return None

        return self._try(name, attempt)

    def holds(self, name: str) -> bool:
        """Whether there is such a file. Raises UserError when that cannot be found out."""

        def attempt() -> bool:
            try:
                with self._open(name, None):
                    return True
            except FileNotFoundError:
                return False

        return self._try(name, attempt)

    def fetch(self, shard: Shard, out: FileIO) -> None:
        """Write a shard to `out`, from its beginning. Raises UserError when it cannot be had."""
        self._try(shard.name, lambda: self._copy(shard, out))

    def _copy(self, shard: Shard, out: FileIO) -> None:
        digest, size_bytes = hashlib.sha256(), 0
        out.seek(0)
        with self._open(shard.name, shard.size_bytes) as source:
            while chunk := source.read(CHUNK_BYTES):
                size_bytes += len(chunk)
                if size_bytes > shard.size_bytes:
                    break
                digest.update(chunk)
                with _local_errors():
                    _write_all(out, chunk)
        if size_bytes != shard.size_bytes:
            more = "more than " if size_bytes > shard.size_bytes else f"{size_bytes:,} of "
            raise OSError(f"it sends {more}{shard.size_bytes:,} bytes")
        if digest.hexdigest() != shard.sha256:
            raise OSError("its bytes are not those that were indexed (sha256 differs)")
        with _local_errors():
            os.fsync(out.fileno())  # else a loss of power could leave a file of the right size without its content

    def _try(self, name: str, attempt: Callable[[], T]) -> T:
        """Call `attempt` until it succeeds, with pauses that double; jitter keeps processes from coming in step."""
        jitter = random.Random(f"{name} {os.getpid()}")
        for tries in range(1, TRIES + 1):
            try:
                return attempt()
            except (UserError, _LocalError):
                raise
            except Exception as error:  # each kind of store has exceptions of its own
                reason = one_line(error)
                if not _may_pass(error) or tries == TRIES:
                    break
                pause_s = min(FIRST_PAUSE_S * 2 ** (tries - 1), LONGEST_PAUSE_S) * jitter.uniform(0.5, 1.0)
                log.warning("'%s/%s': %s: trying again in %.1f s", self.url, name, reason, pause_s)
                self.sleep(pause_s)
        times = "once" if tries == 1 else f"{tries} times"
        raise UserError(
            f"'{self.url}/{name}' could not be fetched, tried {times}: {reason}: mend that and resume: nothing was "
            "skipped"
        )

    @contextmanager
    def _open(self, name: str, size_bytes: int | None) -> Iterator[Any]:
        """A remote file as a stream of bytes."""
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise UserError(f"'{self.url}' needs fsspec, not installed: pip install 'worldmodel[remote]'") from None
        try:
            files, path = url_to_fs(f"{self.url}/{name}", **self._options())
        except (ImportError, ValueError) as error:
            hint = "pip install 'worldmodel[remote]', or fsspec's package for it"
            raise UserError(f"'{self.url}' cannot be opened: {one_line(error)}: {hint}") from None
        more = {"block_size": 4 * CHUNK_BYTES}
        if "http" in files.protocol:  # one request: no question for the size, no ranges
            more = {"block_size": 0, "size": size_bytes or 1}
        with files.open(path, "rb", **more) as source:
            yield source

    def _options(self) -> dict[str, Any]:
        """A stalled connection is an error. Stores other than these have time limits of their own."""
        protocol = self.url.partition("://")[0]
        if protocol in ("http", "https"):
            from aiohttp import ClientTimeout

            limits = ClientTimeout(total=None, sock_connect=self.stall_s, sock_read=self.stall_s)
            return {"client_kwargs": {"timeout": limits}}
        if protocol in ("s3", "s3a"):
            return {"config_kwargs": {"connect_timeout": self.stall_s, "read_timeout": self.stall_s}}
        return {}


def _write_all(out: FileIO, chunk: bytes) -> None:
    left = memoryview(chunk)
    while left:
        left = left[out.write(left) :]


class _LocalError(Exception):
    """Writing failed, which asking the store again does not mend."""

    def __init__(self, error: OSError) -> None:
        super().__init__(one_line(error))
        self.error = error


@contextmanager
def _local_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _LocalError(error) from None


def _may_pass(error: Exception) -> bool:
    """Whether another try may succeed where this one failed."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in TRANSIENT_STATUS
    no_credentials = type(error).__name__ == "NoCredentialsError"  # of botocore, which is not imported for this
    return not no_credentials and not isinstance(error, NOT_WORTH_A_RETRY)


@dataclass(frozen=True)
class RemoteShards:
    """The shards behind a URL, and the folder that holds some of them.

    folder: this data set's, within cache_dir, which max_bytes bounds. Shards in use are never removed: if those of
        other runs fill it, the bound gives way, with a warning.
    """

    store: Store
    shards: Mapping[str, Shard]
    cache_dir: Path
    folder: Path
    max_bytes: int

    def check_room(self, num_held: int) -> None:
        """Raises UserError unless the cache holds any `num_held` shards together."""
        sizes = sorted((shard.size_bytes for shard in self.shards.values()), reverse=True)[:num_held]
        if sum(sizes) > self.max_bytes:
            raise UserError(
                f"remote_cache_mb={self.max_bytes // 2**20} cannot hold the {len(sizes)} shards in use at a time "
                f"(one a lane, one ahead a worker): set it to at least {-(-sum(sizes) // 2**20)}, or lower num_lanes"
            )

    def pin(self, name: str) -> BinaryIO:
        """Have a shard in the folder, fetched if need be, until the result is closed. Raises UserError."""
        shard, path = self.shards[name], self.folder / name
        while True:
            with suppress(FileNotFoundError, NotADirectoryError):
                pin = open(path, "rb")  # noqa: SIM115 (whoever asked for it closes it)
                if _lock(pin, path, shared=True):
                    if os.fstat(pin.fileno()).st_size == shard.size_bytes:
                        with suppress(OSError):  # a cache that is owned by somebody else
                            os.utime(path)  # the least recently used one goes first
                        return pin
                    path.unlink(missing_ok=True)
                pin.close()
            self._fetch(shard, path)

    def _fetch(self, shard: Shard, path: Path) -> None:
        """Fetch a shard, or wait for the process that does."""
        aside, turn = path.with_name(f"{path.name}.partial"), path.with_name(f"{path.name}.lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            turn.touch()
        except OSError as error:
            raise UserError(
                f"remote_cache_dir='{self.cache_dir}' cannot be written ({one_line(error)}): name another folder"
            ) from None
        # The lock has a file of its own: one on what becomes the shard would wait for those who then decode from it.
        with open(turn, "rb") as fetching:
            _lock(fetching, turn)
            if path.exists():
                return
            try:
                for is_last in (False, True):
                    try:
                        self._make_room(aside, shard.size_bytes, everything=is_last)
                        with open(aside, "r+b", buffering=0) as out:
                            self.store.fetch(shard, out)
                        break
                    except _LocalError as failed:
                        if is_last or failed.error.errno not in (errno.ENOSPC, errno.EDQUOT):
                            raise UserError(
                                f"remote_cache_dir='{self.cache_dir}': shard '{shard.name}' of {shard.size_bytes:,} "
                                f"bytes cannot be written ({failed}): make room there, or name another folder"
                            ) from None
                os.replace(aside, path)
            finally:
                aside.unlink(missing_ok=True)

    def _make_room(self, aside: Path, size_bytes: int, everything: bool) -> None:
        """Remove what is not in use, the least recently used first, and reserve `size_bytes` by making `aside` as long.

        everything: all that is not in use.
        """
        turn = self.cache_dir / "lock"
        turn.touch()
        with open(turn, "rb") as making_room:
            _lock(making_room, turn)
            aside.unlink(missing_ok=True)
            files = []
            for path in (*self.cache_dir.glob("*/*.tar"), *self.cache_dir.glob("*/*.partial")):
                with suppress(FileNotFoundError):
                    stat = path.stat()
                    files.append((path.suffix == ".tar", stat.st_mtime_ns, path, stat.st_size))
            room = self.max_bytes - size_bytes - sum(size for *_, size in files)
            for is_whole, _, path, size in sorted(files):
                # Whoever fetches a shard holds its .lock; whoever reads from it, the shard itself.
                lock = path if is_whole else path.with_suffix(".lock")
                if (room < 0 or everything or not is_whole) and _remove_if_unused(path, lock):
                    room += size
            if room < 0:
                log.warning(
                    "'%s' holds %d MiB more than remote_cache_mb=%d: all of it is in use",
                    self.cache_dir, -(room // 2**20), self.max_bytes // 2**20,
                )  # fmt: skip
            with _local_errors(), open(aside, "wb") as out:
                out.truncate(size_bytes)


def _lock(file: BinaryIO, path: Path, *, shared: bool = False, wait: bool = True) -> bool:
    """Lock an open file until it is closed. False: another process holds it, or it is no longer the one at `path`."""
    import fcntl

    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        return False


def _remove_if_unused(path: Path, lock: Path) -> bool:
    try:
        with open(lock, "rb") as file:
            if _lock(file, lock, wait=False):
                path.unlink()
                return True
    except OSError:
        pass  # somebody else removed it, or owns it
    return False


@dataclass
class HeldShards:
    """One worker's hold on remote shards: one a lane, and the next one that is needed, fetched by a thread.

    With remote=None, for videos that are here, nothing has any effect.
    """

    remote: RemoteShards | None
    _pins: dict[int, BinaryIO] = field(default_factory=dict)  # by lane
    _holds: dict[int, str] = field(default_factory=dict)
    _plan: list[tuple[int, str]] = field(default_factory=list)
    _ahead: tuple[str, "Future[BinaryIO]"] | None = None

    def expect(self, plan: Sequence[tuple[int, str]]) -> None:
        """What will be held, as (lane, shard), in about this order."""
        self._plan = list(plan)

    def hold(self, lane: int, shard: str) -> None:
        """Have `shard` at hand, and no longer the one that this lane held before. Raises UserError."""
        if self.remote is None or self._holds.get(lane) == shard:
            return
        self.release(lane)
        with suppress(ValueError):
            self._plan.remove((lane, shard))
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == shard:
            pin = ahead[1].result()
        else:
            self._ahead = ahead
            pin = self.remote.pin(shard)
        self._pins[lane], self._holds[lane] = pin, shard
        self._look_ahead(self.remote)

    def release(self, lane: int) -> None:
        if pin := self._pins.pop(lane, None):
            pin.close()
            del self._holds[lane]

    def close(self) -> None:
        self._plan = []
        self._drop_ahead()
        for lane in list(self._pins):
            self.release(lane)

    def _look_ahead(self, remote: RemoteShards) -> None:
        """Fetch the first shard of the plan that no lane holds, unless one is being fetched already."""
        if self._ahead is not None and any(shard == self._ahead[0] for _, shard in self._plan):
            return
        self._drop_ahead()
        held = set(self._holds.values())
        shard = next((shard for _, shard in self._plan if shard not in held), None)
        if shard is not None:
            future: Future[BinaryIO] = Future()
            self._ahead = shard, future
            threading.Thread(target=_pin_into, args=(future, remote, shard), daemon=True).start()

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead[1].add_done_callback(lambda future: None if future.exception() else future.result().close())
            self._ahead = None


def _pin_into(future: "Future[BinaryIO]", remote: RemoteShards, shard: str) -> None:
    try:
        future.set_result(remote.pin(shard))
    except BaseException as error:
        future.set_exception(error)
