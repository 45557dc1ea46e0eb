"""Files in folders that a stranger may have made: never written through a link, read only if they are regular files."""

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from data_pipelines.errors import UserError, one_line

MAX_TEXT_BYTES = 2**28
MAX_LINE_BYTES = 2**27


def write_text(path: Path, text: str) -> None:
    """Replace a file as write_bytes does, with text in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file as `replacing` does. Raises OSError."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path, *, is_shared: bool = False) -> Iterator[BinaryIO]:
    """Open a new file that replaces `path` when the block ends without an exception. Raises OSError.

    Readers see the old content or the new one, also after a crash. A link at `path` is replaced, and its target stays
    as it is.

    is_shared: several processes may write the file at once, so the unfinished file has a random name. Otherwise it is
        `.NAME.partial`, and replaces the one that a killed process left.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial" if is_shared else f".{path.name}.partial")
    with suppress(FileNotFoundError):
        aside.unlink()  # of a link, only the link
    number = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        with os.fdopen(number, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise


@contextmanager
def write_errors(out: Path) -> Iterator[None]:
    """Raise an OSError of the block, which writes files into the folder, as a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to '{out}': {one_line(error)}") from error


def check_writable(folder: Path) -> None:
    """Raise OSError unless files can be made in the folder. Several processes may check it at once."""
    probe = folder / ".writable"
    with replacing(probe, is_shared=True):
        pass
    probe.unlink(missing_ok=True)


def check_regular(path: Path) -> None:
    """Raise OSError if there is no file, or one that can block on opening: a FIFO, a device, a socket."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(f"{path.name} is not a regular file")


def check_reachable(place: str | Path) -> None:
    """Raise UserError if the system refuses to look for a file or into a folder: for rights, or for a long name.

    A missing place is not an error.
    """
    try:
        os.stat(f"{place}/.")  # the point asks for the right to enter the folder
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        pass
    except OSError as error:
        raise UserError(f"'{place}' cannot be read: {one_line(error)}") from None


def user_cache_dir() -> Path | None:
    """Return the folder for files that can be made again; None: this user has no home."""
    if not os.environ.get("HOME", "home"):
        return None
    try:
        return Path.home() / ".cache" / "worldmodel"
    except RuntimeError:  # no HOME, and no entry in the list of users, as in a container
        return None


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Read a text file in UTF-8; a byte order mark is dropped.

    Raises OSError: it is not a regular file, or too large; UnicodeDecodeError.
    """
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(f"{path.name} is larger than {max_bytes:,} bytes")
    return content.decode("utf-8-sig")


def bounded_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file. Raises ValueError: one is longer than MAX_LINE_BYTES."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"the next line is longer than {MAX_LINE_BYTES:,} bytes")
        yield line


def remove(path: Path) -> None:
    """Remove a file, a folder with its content, or a link (not its target). Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
