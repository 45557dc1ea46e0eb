"""The folder of a collection's embeddings: the names of its files, and the facts that all of its parts share.

    OUT/_manifest.json                 run, weights, settings, number of videos and of parts
    OUT/_videos.jsonl                  path and hash of the content of each video
    OUT/part-00000-of-00157.parquet    the rows of the first videos (worldmodel/embeddings/parts.py)
    OUT/_bad.jsonl                     videos of which segments are missing, with the reason
    OUT/.lock                          locked by the processes that write parts

Readers of Parquet folders skip names that begin with a dot or an underscore.
"""

import dataclasses
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.contents import Contents, read_contents
from data_pipelines.errors import UserError, one_line, one_line_logger
from data_pipelines.files import read_text, replacing
from data_pipelines.text_files import shown

log = one_line_logger(__name__)

FORMAT = {"format": "worldmodel-embeddings", "version": 1}
MAX_MANIFEST_BYTES = 2**20
MANIFEST_BYTE = 0  # of the lock file; part k is byte 1 + k


class EmbeddingsFolder:
    """Paths of the files in a folder of embeddings. The files need not exist."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = path / "_manifest.json"
        self.videos = path / "_videos.jsonl"
        self.bad = path / "_bad.jsonl"
        self.lock = path / ".lock"

    def part(self, number: int, num_parts: int) -> Path:
        """Return the file of a part, counted from 0."""
        return self.path / f"part-{number:05d}-of-{num_parts:05d}.parquet"


@dataclass(frozen=True)
class Manifest:
    """The facts that the parts of a folder share.

    root, run: as the first command named them; another host may have them at another path.
    weights: hash of the weights.
    settings: the keys that fix the rows, with their values.
    videos_hash: VideoIndex.content_hash.
    """

    root: str
    run: str
    step: int
    weights: str
    settings: Mapping[str, Any]
    videos_per_part: int
    num_videos: int
    videos_hash: str

    @property
    def num_parts(self) -> int:
        """The number of parts."""
        return -(-self.num_videos // self.videos_per_part)

    def check_same(self, begun: "Manifest", out: Path) -> None:
        """Check that this command makes the parts that a folder was begun with.

        Raises:
            UserError: the run or a setting differs. Differences of the videos are those of their list.
        """
        if self.weights != begun.weights:
            raise UserError(
                f"{out} was begun with step {begun.step} of the run {begun.run} (weights {begun.weights}), not with "
                f"step {self.step} of {self.run} (weights {self.weights}): take that run, or another folder"
            )
        own = {**self.settings, "videos_per_part": self.videos_per_part}
        theirs = {**begun.settings, "videos_per_part": begun.videos_per_part}
        for key in sorted(own.keys() | theirs.keys()):
            if own.get(key) != theirs.get(key):
                raise UserError(
                    f"{out} was begun with {key}={shown(theirs.get(key))}, not {shown(own.get(key))}: take the same "
                    "value, or another folder"
                )


def begin_or_continue(folder: EmbeddingsFolder, manifest: Manifest, contents: Contents) -> None:
    """Write the manifest and the list of videos of a new folder, or compare them with those of a begun one.

    Hold the lock of the manifest meanwhile (`PartLocks.of_manifest`).

    Raises:
        UserError: the folder was begun with another run, other settings or other videos, is damaged, or holds Parquet
            files without a manifest. OSError: it cannot be written.
    """
    if not os.path.lexists(folder.manifest):
        if other := next(folder.path.glob("*.parquet"), None):
            raise UserError(f"{folder.path} holds {other.name}, but no embeddings: name another folder")
        with replacing(folder.videos, is_shared=True) as file:
            file.writelines(f"{line}\n".encode() for line in contents.lines())
        with replacing(folder.manifest, is_shared=True) as file:
            file.write(f"{json.dumps(FORMAT | dataclasses.asdict(manifest), indent=1)}\n".encode())
        return
    begun = read_manifest(folder)
    manifest.check_same(begun, folder.path)
    before = read_contents(folder.videos)
    change = contents.change_since(before) if before is not None else ""
    if not change and manifest.videos_hash != begun.videos_hash:
        change = "their order, shards or episodes differ"
    if change:
        raise UserError(
            f"the videos of {manifest.root} have changed since {folder.path} was begun: {change}: restore "
            "them, or name another folder"
        )


def read_manifest(folder: EmbeddingsFolder) -> Manifest:
    """Return the manifest of a folder.

    Raises:
        UserError: it is damaged, or of another version.
    """
    try:
        fields = json.loads(read_text(folder.manifest, MAX_MANIFEST_BYTES))
        if {name: fields.pop(name) for name in FORMAT} != FORMAT:
            raise ValueError("another format or version")
        manifest = Manifest(**fields)
        for field in dataclasses.fields(Manifest):
            value = getattr(manifest, field.name)
            if type(value) is not (dict if field.name == "settings" else field.type):
                raise ValueError(f"{field.name} is {shown(value)}")
        return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{folder.manifest} is damaged ({one_line(error)}): restore it, or name another folder"
        ) from None


class PartLocks:
    """Locks on the manifest and on the parts of a folder.

    They are POSIX record locks. The system releases them when the process ends, by whatever signal, and when it closes
    any descriptor of the file, so nothing else opens it.
    """

    def __init__(self, folder: EmbeddingsFolder, number: int) -> None:
        self._folder, self._number = folder, number

    @contextmanager
    def of_manifest(self) -> Iterator[None]:
        """Wait for the lock of the manifest, and hold it. Without locks in the file system, hold nothing."""
        self._lock(fcntl.LOCK_EX, MANIFEST_BYTE, 1)
        try:
            yield
        finally:
            self._lock(fcntl.LOCK_UN, MANIFEST_BYTE, 1)

    def take(self, parts: range) -> None:
        """Lock parts until this process ends, or the locks are closed.

        Raises:
            UserError: another process writes some of them.
        """
        if parts and not self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB, MANIFEST_BYTE + 1 + parts.start, len(parts)):
            raise UserError(
                f"another process writes parts from {parts.start} to {parts.stop - 1} of {self._folder.path}: wait "
                "until it ends, stop it, or give each host its own number"
            )

    def _lock(self, kind: int, first: int, count: int) -> bool:
        """Return whether nobody holds what was to be locked."""
        try:
            fcntl.lockf(self._number, kind, count, first)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            log.warning("%s: the file system has no locks (%s)", self._folder.path, error.strerror)
        return True


@contextmanager
def part_locks(folder: EmbeddingsFolder) -> Iterator[PartLocks]:
    """Open the locks of a folder. Raises OSError: the lock file is not a regular file, or cannot be written."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    number = os.open(folder.lock, flags, 0o666)
    try:
        yield PartLocks(folder, number)
    finally:
        os.close(number)
