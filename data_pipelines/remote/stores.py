"""Files behind a URL, read with retries and within bounds.

Only the schemes in SCHEMES are opened. fsspec knows many more, and chains of them: some read local files, and one ran
code from a file. The author of a config may not be its user.
"""

import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any, TypeVar

from data_pipelines.errors import UserError, one_line, one_line_logger
from data_pipelines.facts import Shard

log = one_line_logger(__name__)

SCHEMES = ("http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf")
MAX_INDEX_BYTES = 2**30
TRIES = 8
FIRST_PAUSE_S = 1.0  # doubles from try to try, up to
LONGEST_PAUSE_S = 30.0
STALL_S = 30.0  # without a byte, or with fewer than
MIN_BYTES_PER_S = 4096
CHUNK_BYTES = 2**20
NOT_WORTH_A_RETRY = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    ValueError,
    NotImplementedError,
    ImportError,
    MemoryError,
)
FORBIDDEN = 403
TRANSIENT_STATUS = (408, 429)  # besides 5xx

T = TypeVar("T")


def is_url(root: str | Path) -> bool:
    """Return whether a data root is a URL."""
    return "://" in str(root)


def check_url(url: str) -> None:
    """Raise UserError unless a URL has a scheme that is opened, is not a chain of several, and names a folder.

    The names of files are appended to the URL. After a "?" or "#", a server of http would not see them, and answer
    each request with the same page.
    """
    is_http = url.startswith(("http://", "https://"))
    address = re.split("[?#]", url)[0] if is_http else url  # a query may hold a key
    shown = repr(without_password(address)[:200])
    if not re.match(rf"({'|'.join(SCHEMES)})://", url):
        raise UserError(f"{shown} is not opened: give a folder, or a URL that begins with {'://, '.join(SCHEMES)}://")
    if "::" in url or not url.isprintable():
        raise UserError(f"{shown} is not opened: a URL has no '::' and no control characters in it")
    if address != url:
        raise UserError(f"{shown} is not opened with a '?' or '#' after it: give the URL of a folder alone")


def without_password(url: str) -> str:
    """Return a URL without a user and a password. What precedes the host of abfs is a container."""
    return url if re.match("abfss?://", url) else re.sub(r"://[^/?#]*@", "://", url, count=1)


def host_of(url: str) -> str:
    """Return the host or bucket that a URL names, with its scheme and without a password."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{re.split('[/?#]', rest)[0].rpartition('@')[2]}"


@dataclass(frozen=True)
class Store:
    """Files behind a URL. Raises UserError: the URL is refused (check_url).

    url: of a folder.
    sleep: called between tries with the seconds to wait.
    stall_s: seconds without a byte, or with too few, after which a try ends.
    max_index_bytes: the most that is read of an index.
    """

    url: str
    sleep: Callable[[float], None] = time.sleep
    stall_s: float = STALL_S
    max_index_bytes: int = MAX_INDEX_BYTES

    def __post_init__(self) -> None:
        check_url(self.url)

    @property
    def shown(self) -> str:
        """The URL as messages show it."""
        return without_password(self.url)

    def read(self, name: str) -> bytes | None:
        """Return an index's bytes, or None if there is none. Raises UserError: it cannot be fetched, or is too long."""

        def attempt() -> bytes | None:
            text = BytesIO()
            try:
                with self._open(name) as source:
                    for chunk in self._chunks(source):
                        if text.write(chunk) and text.tell() > self.max_index_bytes:
                            raise UserError(
                                f"'{self.shown}/{name}' is longer than {self.max_index_bytes:,} bytes, the limit of an "
                                "index: divide the shards into several folders"
                            )
            except FileNotFoundError:
                return None
            return text.getvalue()

        return self._try(name, attempt)

    def holds(self, name: str) -> bool:
        """Return whether there is such a file that may be read. Raises UserError: the store does not say.

        A bucket that may not be listed forbids files that it does not have: S3 then answers 403 in place of 404.
        """

        def attempt() -> bool:
            try:
                with self._open(name):
                    return True
            except FileNotFoundError:
                return False
            except Exception as error:  # each kind of store raises its own exceptions
                if isinstance(error, PermissionError) or getattr(error, "status", None) == FORBIDDEN:
                    log.info("'%s/%s' may not be read: taken as missing", self.shown, name)
                    return False
                raise

        return self._try(name, attempt)

    def fetch(self, shard: Shard, out: FileIO) -> None:
        """Write a shard to `out`, from the start of the file. Raises UserError: it cannot be fetched; LocalError."""
        self._try(shard.name, lambda: self._copy(shard, out))

    def _copy(self, shard: Shard, out: FileIO) -> None:
        digest, size_bytes = hashlib.sha256(), 0
        out.seek(0)
        with self._open(shard.name) as source:
            for chunk in self._chunks(source):
                size_bytes += len(chunk)
                if size_bytes > shard.size_bytes:
                    break
                digest.update(chunk)
                with local_errors():
                    write_all(out, chunk)
        if size_bytes != shard.size_bytes:
            more = "more than " if size_bytes > shard.size_bytes else f"{size_bytes:,} of "
            raise OSError(f"it sends {more}{shard.size_bytes:,} bytes")
        if digest.hexdigest() != shard.sha256:
            raise OSError("its bytes differ from those that were indexed (sha256)")
        with local_errors():
            os.fsync(out.fileno())  # otherwise a loss of power could leave a file of the right size without its content

    def _chunks(self, source: Any) -> Iterator[bytes]:
        """Yield the bytes of a stream. Raises OSError: fewer than MIN_BYTES_PER_S arrive over stall_s seconds."""
        begin_s, num_bytes = time.monotonic(), 0
        while chunk := source.read(CHUNK_BYTES):
            yield chunk
            num_bytes += len(chunk)
            seconds = time.monotonic() - begin_s
            if seconds > self.stall_s:
                if num_bytes < MIN_BYTES_PER_S * seconds:
                    raise OSError(f"it sends fewer than {MIN_BYTES_PER_S:,} bytes a second")
                begin_s, num_bytes = time.monotonic(), 0

    def _try(self, name: str, attempt: Callable[[], T]) -> T:
        """Call `attempt` until it succeeds, with pauses that double, and jitter. Raises UserError."""
        jitter = random.Random(f"{name} {os.getpid()}")
        for tries in range(1, TRIES + 1):
            try:
                return attempt()
            except (UserError, LocalError):
                raise
            except Exception as error:  # each kind of store raises its own exceptions
                reason = self._reason(error, name)
                if not _may_pass(error) or tries == TRIES:
                    break
                pause_s = min(FIRST_PAUSE_S * 2 ** (tries - 1), LONGEST_PAUSE_S) * jitter.uniform(0.5, 1.0)
                log.warning("'%s/%s': %s: trying again in %.1f s", self.shown, name, reason, pause_s)
                self.sleep(pause_s)
        times = "once" if tries == 1 else f"{tries} times"
        raise UserError(
            f"'{self.shown}/{name}' could not be fetched, tried {times}: {reason}: nothing was skipped, so the run "
            "can be resumed"
        )

    def _reason(self, error: Exception, name: str) -> str:
        """Return why a try failed. The text of a FileNotFoundError is often no more than the URL or a part of it."""
        text = one_line(error)
        if isinstance(error, FileNotFoundError) and text in f"{self.url}/{name}":
            text = "there is no such file"
        return text.replace(self.url, self.shown)

    @contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        """Open a remote file as a stream of bytes. Raises UserError, and the exceptions of the store."""
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise UserError(f"'{self.shown}' needs fsspec, not installed: pip install 'worldmodel[remote]'") from None
        try:
            files, path = url_to_fs(f"{self.url}/{name}", **self._options())
            if "http" in files.protocol:
                from data_pipelines.remote.http_bodies import HttpBody
        except (ImportError, ValueError) as error:
            hint = "pip install 'worldmodel[remote]', or fsspec's package for it"
            raise UserError(f"'{self.shown}' cannot be opened: {one_line(error)}: {hint}") from None
        if "http" in files.protocol:
            opened = HttpBody(files, path, self.stall_s)
        else:
            opened = files.open(path, "rb", block_size=4 * CHUNK_BYTES)
        with opened as source:
            yield source

    def _options(self) -> dict[str, Any]:
        """Return options that make a stalled connection to S3 an error. Other stores have their own limits."""
        if self.url.startswith(("s3://", "s3a://")):
            return {"config_kwargs": {"connect_timeout": self.stall_s, "read_timeout": self.stall_s}}
        return {}


def write_all(out: FileIO, chunk: bytes) -> None:
    """Write all of `chunk`, in several calls if the system writes less. Raises OSError."""
    left = memoryview(chunk)
    while left:
        left = left[out.write(left) :]


class LocalError(Exception):
    """Writing to the local disk failed, so fetching again is of no use."""

    def __init__(self, error: OSError) -> None:
        super().__init__(one_line(error))
        self.error = error


@contextmanager
def local_errors() -> Iterator[None]:
    """Raise an OSError of the block as a LocalError."""
    try:
        yield
    except OSError as error:
        raise LocalError(error) from None


def _may_pass(error: Exception) -> bool:
    """Return whether another try may succeed."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in TRANSIENT_STATUS
    no_credentials = type(error).__name__ == "NoCredentialsError"  # of botocore, which is not imported for this
    return not no_credentials and not isinstance(error, NOT_WORTH_A_RETRY)
