"""The cache of shards from a URL: a folder that all processes of a host share, into which shards are fetched whole.

A shard is written under another name, checked against the index (size, sha256) and renamed. Locks of the operating
system ensure that no two processes fetch a shard at the same time, and that no shard is removed while a process decodes
from it. These locks end with the process that holds them.

A shard that cannot be fetched ends the run with one line. Its videos are not dropped, because the delivered clips would
then depend on the state of the network. Nothing has been skipped, so the run can be resumed where it stopped.
"""

import errno
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from data_pipelines.errors import UserError, one_line, one_line_logger
from data_pipelines.facts import Shard
from data_pipelines.files import user_cache_dir
from data_pipelines.remote.stores import LocalError, Store, local_errors

log = one_line_logger(__name__)

FOLDER_NAME = re.compile(r"[0-9a-f]{16}")  # of a data set, within the cache


def default_cache_dir() -> Path:
    """Return the folder for shards in the user's cache. Raises UserError: this user has no home."""
    folder = user_cache_dir()
    if folder is None:
        raise UserError("this user has no home folder for shards from a URL: set data.remote_cache_dir")
    return folder / "shards"


@dataclass(frozen=True)
class RemoteShards:
    """The shards behind a URL, and the folder that holds some of them.

    folder: of this data set, within cache_dir.
    max_bytes: the size limit of cache_dir. Shards in use are never removed: if those of other runs fill the cache, the
        limit is exceeded, with a warning.
    """

    store: Store
    shards: Mapping[str, Shard]
    cache_dir: Path
    folder: Path
    max_bytes: int

    def check_room(self, num_held: int) -> None:
        """Raise UserError unless the cache can hold any `num_held` shards at a time."""
        sizes = sorted((shard.size_bytes for shard in self.shards.values()), reverse=True)[:num_held]
        if sum(sizes) > self.max_bytes:
            raise UserError(
                f"remote_cache_mb={self.max_bytes // 2**20} cannot hold the {len(sizes)} shards in use at a time "
                f"(one per lane, one ahead per worker): set at least {-(-sum(sizes) // 2**20)}, or lower num_lanes"
            )

    def pin(self, name: str) -> BinaryIO:
        """Keep a shard in the folder until the returned file is closed, fetching it if necessary. Raises UserError."""
        shard, path = self.shards[name], self.folder / name
        while True:
            with suppress(FileNotFoundError, NotADirectoryError):
                pin = self._open(path)
                if self._locked(pin, path, shared=True):
                    if os.fstat(pin.fileno()).st_size == shard.size_bytes:
                        with suppress(OSError):  # the cache of another user
                            os.utime(path)  # the least recently used one is evicted first
                        return pin
                    self._remove(path)
                pin.close()
            self._fetch(shard, path)

    def is_pinned(self, name: str, pin: BinaryIO) -> bool:
        """Return whether a shard is still the file that `pin` keeps: a user may have removed the folder."""
        try:
            return os.path.samestat(os.fstat(pin.fileno()), os.stat(self.folder / name))
        except OSError:
            return False

    def _open(self, path: Path) -> BinaryIO:
        try:
            return open(path, "rb", opener=_no_links)
        except OSError as error:
            if isinstance(error, FileNotFoundError | NotADirectoryError):
                raise
            raise self._unusable(error) from None

    def _locked(self, file: BinaryIO, path: Path, *, shared: bool = False) -> bool:
        """Lock as `_lock` does. Raises UserError, and closes the file: the file system has no locks."""
        try:
            return _lock(file, path, shared=shared)
        except OSError as error:
            file.close()
            raise self._unusable(error) from None

    def _unusable(self, error: OSError) -> UserError:
        return UserError(f"remote_cache_dir='{self.cache_dir}' cannot be used ({one_line(error)}): name another folder")

    def _remove(self, path: Path) -> None:
        """Remove a file. Raises UserError."""
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise self._unusable(error) from None

    def _fetch(self, shard: Shard, path: Path) -> None:
        """Fetch a shard, or wait for the process that is fetching it.

        If the folder is removed meanwhile, there may be no shard afterwards. Raises UserError.
        """
        aside, turn = path.with_name(f"{path.name}.partial"), path.with_name(f"{path.name}.lock")
        try:
            self.cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            if self.folder.is_symlink():
                raise OSError(errno.ELOOP, f"{self.folder.name} in it is a link")
            fetching = open(turn, "ab", opener=_no_links)  # noqa: SIM115 (closed below)
        except OSError as error:
            raise self._unusable(error) from None
        # The lock is a separate file: a lock on the shard itself would wait for the processes that decode from it.
        with fetching:
            if not self._locked(fetching, turn) or path.exists():
                return
            try:
                for is_last in (False, True):
                    try:
                        self._make_room(aside, shard.size_bytes, everything=is_last)
                        with open(aside, "r+b", buffering=0, opener=_no_links) as out:
                            self.store.fetch(shard, out)
                            written = os.fstat(out.fileno())
                        break
                    except LocalError as failed:
                        if isinstance(failed.error, FileNotFoundError):
                            raise failed.error from None
                        if is_last or failed.error.errno not in (errno.ENOSPC, errno.EDQUOT):
                            raise UserError(
                                f"remote_cache_dir='{self.cache_dir}': shard '{shard.name}' of {shard.size_bytes:,} "
                                f"bytes cannot be written ({failed}): make room there, or name another folder"
                            ) from None
                if os.path.samestat(written, os.stat(aside)):  # otherwise it is of a process with another lock
                    os.replace(aside, path)
            except FileNotFoundError:
                return  # the folder was removed
            except OSError as error:
                raise self._unusable(error) from None
            finally:
                aside.unlink(missing_ok=True)

    def _make_room(self, aside: Path, size_bytes: int, everything: bool) -> None:
        """Evict shards that are not in use, the least recently used first, and reserve `size_bytes` for `aside`.

        everything: evict all that are not in use. Raises LocalError: the file system is full or fails.
        """
        turn = self.cache_dir / "lock"
        with local_errors(), open(turn, "ab", opener=_no_links) as making_room:
            _lock(making_room, turn)
            aside.unlink(missing_ok=True)
            files = []
            for path in self._removable():
                with suppress(FileNotFoundError):
                    stat = path.lstat()
                    files.append((path.suffix == ".tar", stat.st_mtime_ns, path, stat.st_size))
            room = self.max_bytes - size_bytes - sum(size for *_, size in files)
            for is_whole, _, path, size in sorted(files):
                # A process that fetches a shard locks its .lock; one that reads from it locks the shard itself.
                lock = path if is_whole else path.with_suffix(".lock")
                if (room < 0 or everything or not is_whole) and _remove_if_unused(path, lock):
                    room += size
            if room < 0:
                log.warning(
                    "'%s' holds %d MiB more than remote_cache_mb=%d: all of it is in use",
                    self.cache_dir, -(room // 2**20), self.max_bytes // 2**20,
                )  # fmt: skip
            with open(aside, "xb", opener=_no_links) as out:
                out.truncate(size_bytes)

    def _removable(self) -> Iterator[Path]:
        """Yield the shards in the cache, and unfinished ones: files with a lock, in a folder named like a data set's.

        A config may name any folder as the cache: nothing else in it is touched.
        """
        for folder in self.cache_dir.iterdir():
            if FOLDER_NAME.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
                for lock in folder.glob("*.tar.lock"):
                    shard = lock.with_suffix("")
                    yield from (path for path in (shard, shard.with_name(f"{shard.name}.partial")) if path.exists())


def _no_links(path: str, flags: int) -> int:
    """Open a file in a folder that others may write to: follow no link, and do not block on a FIFO."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def _lock(file: BinaryIO, path: Path, *, shared: bool = False, wait: bool = True) -> bool:
    """Lock an open file until it is closed. Returns False if another process holds it, or it left `path`."""
    import fcntl

    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        return False


def _remove_if_unused(path: Path, lock: Path) -> bool:
    """Remove a file unless `lock` is held. Returns whether it was removed."""
    try:
        with open(lock, "rb", opener=_no_links) as file:
            if _lock(file, lock, wait=False):
                path.unlink()
                return True
    except OSError:
        pass  # another process removed it, or another user owns it
    return False


@dataclass
class HeldShards:
    """The remote shards that a worker keeps: one per lane, and the next one that is needed, fetched by a thread.

    With remote=None, for local videos, nothing has any effect.
    """

    remote: RemoteShards | None
    _pins: dict[int, BinaryIO] = field(default_factory=dict)  # by lane
    _holds: dict[int, str] = field(default_factory=dict)
    _plan: list[tuple[int, str]] = field(default_factory=list)
    _ahead: tuple[str, "Future[BinaryIO]"] | None = None

    def expect(self, plan: Sequence[tuple[int, str]]) -> None:
        """Announce the shards that will be held, as (lane, shard), in approximate order."""
        self._plan = list(plan)

    def hold(self, lane: int, shard: str) -> bool:
        """Keep `shard` for a lane, in place of the one that the lane held before.

        Returns False if the lane holds it already. A shard that was removed from the cache, by anyone but us, is
        fetched again. Raises UserError.
        """
        if self.remote is None:
            return False
        is_planned = (lane, shard) in self._plan
        if is_planned:
            self._plan.remove((lane, shard))
        if self._holds.get(lane) == shard and self.remote.is_pinned(shard, self._pins[lane]):
            # An epoch may begin with the shard that ended the one before.
            if is_planned:
                self._look_ahead(self.remote)
            return False
        self.release(lane)
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == shard:
            pin = ahead[1].result()
            if not self.remote.is_pinned(shard, pin):
                pin.close()
                pin = self.remote.pin(shard)
        else:
            self._ahead = ahead
            pin = self.remote.pin(shard)
        self._pins[lane], self._holds[lane] = pin, shard
        self._look_ahead(self.remote)
        return True

    def release(self, lane: int) -> None:
        """Let go of the shard of a lane."""
        if pin := self._pins.pop(lane, None):
            pin.close()
            del self._holds[lane]

    def close(self) -> None:
        """Let go of all shards."""
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
