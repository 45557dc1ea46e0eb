"""Index shards of other origin, in the layout of WebDataset, by the headers of the tars and by probing the videos."""

import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from data_pipelines.errors import UserError, one_line, one_line_logger
from data_pipelines.facts import SHARD_NAME, BadFile, Video
from data_pipelines.files import check_reachable
from data_pipelines.indexing.folder import VIDEO_EXTENSIONS
from data_pipelines.indexing.probe import index_member
from data_pipelines.shards.index_file import SHARDS_NAME, Entry, tars_in, write_shards

log = one_line_logger(__name__)

MAX_LABELS_BYTES = 2**24  # of one video: 800,000 numbers as packing writes them
MAX_HEADER_BYTES = 2**20  # of one member of a tar
MAX_GLOBAL_HEADERS = 1000  # of pax, which each member of a tar inherits


def index_shards(folder: Path, progress: bool = True) -> None:
    """Index the shards in a folder and write shards.jsonl there.

    Members that are not videos are skipped. Those that cannot be used are listed with the reason.

    Raises UserError: no shards, names that a URL would need to quote, or a folder that cannot be written.
    """
    check_reachable(folder)
    tars = tars_in(folder) if folder.is_dir() else []
    if not tars:
        raise UserError(f"'{folder}' holds no shards (*.tar)")
    for path in tars:
        if not SHARD_NAME.fullmatch(path.name):
            raise UserError(f"shard '{path}': rename it to letters, digits, '.', '-' and '_', ending in .tar")
    entries = [
        entry
        for path in tqdm(tars, desc="indexing", unit="shard", disable=not progress)
        for entry in _scan_shard(folder, path.name)
    ]
    if not any(isinstance(video, Video) for video, _ in entries) and not any(
        path.endswith(VIDEO_EXTENSIONS) for path in (video.path.lower() for video, _ in entries)
    ):
        raise UserError(f"the shards of '{folder}' hold no videos ({' '.join(sorted(VIDEO_EXTENSIONS))})")
    try:
        write_shards(folder, entries, progress)
    except OSError as error:
        raise UserError(
            f"'{folder / SHARDS_NAME}' cannot be written ({one_line(error)}): index a copy of the shards"
        ) from None


def _scan_shard(folder: Path, shard: str) -> Iterator[Entry]:
    """Yield each video of a shard, with the path SHARD/MEMBER (keys are unique per shard only), and its labels."""
    videos: dict[str, tuple[str, Video | BadFile]] = {}  # by path
    labels: dict[str, dict[str, Any]] = {}
    too_large: list[str] = []
    size_bytes = os.path.getsize(folder / shard)
    damage = ""
    try:
        with _Headers(folder / shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in _members(tar, file):
                key, suffix = _split_name(member.name)
                path = f"{shard}/{member.name}"
                if suffix == ".json" and member.isreg() and member.size > MAX_LABELS_BYTES:
                    too_large.append(path)
                elif suffix == ".json" and member.isreg() and member.size >= 0:
                    file.budget += 2 * MAX_LABELS_BYTES
                    labels[key] = _read_object(tar, member)
                elif suffix in VIDEO_EXTENSIONS and not os.path.basename(member.name).startswith("."):
                    if path in videos:  # of members with one name, the first counts
                        continue
                    if reason := _why_refused(member, size_bytes):
                        videos[path] = key, BadFile(path, max(0, member.size), 0, reason)
                    else:
                        videos[path] = key, index_member(folder, shard, path, member.offset_data, member.size)
            if not _ends_well(folder / shard, tar.offset):
                damage = f"damaged or cut off at byte {tar.offset:,}"
    except (tarfile.TarError, OSError, EOFError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        damage = f"not a readable tar: {one_line(error)}"
    if too_large:
        log.warning(
            "labels of more than %d MiB are left out: those in '%s' and in %d other members of '%s'",
            MAX_LABELS_BYTES // 2**20, too_large[0], len(too_large) - 1, shard,
        )  # fmt: skip
    if damage:
        yield BadFile(shard, size_bytes, 0, damage), {}
    for key, video in videos.values():
        yield video, labels.get(key, {})


class _Headers(io.FileIO):
    """A tar of which at most `budget` bytes are read until it is set again: tarfile trusts the length of a header."""

    budget = MAX_HEADER_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= self.budget:
            raise tarfile.ReadError(f"a member's header is longer than {MAX_HEADER_BYTES:,} bytes")
        self.budget -= size
        return super().read(size) or b""


def _members(tar: tarfile.TarFile, file: _Headers) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar without keeping them. Raises tarfile.ReadError: one does not lead forwards."""
    offset = -1
    while True:
        file.budget = MAX_HEADER_BYTES
        member = tar.next()
        tar.members = []  # type: ignore[attr-defined]
        if member is None:
            return
        if tar.offset <= offset or len(tar.pax_headers) > MAX_GLOBAL_HEADERS:
            raise tarfile.ReadError(f"member {member.name!r} has an impossible size, or there are too many headers")
        offset = tar.offset
        yield member


def _split_name(name: str) -> tuple[str, str]:
    """Split 'a/b.left.mp4' into 'a/b' and '.mp4': the key of WebDataset ends at the first dot of the last part."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}", os.path.splitext(base)[1].lower()


def _why_refused(member: tarfile.TarInfo, shard_bytes: int) -> str:
    """Return why a member of a tar is not read, or ""."""
    if member.name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", member.name):
        return "its name leads out of the archive"
    if not member.isreg() or member.issparse():
        return "a link or no regular file in the archive"
    if member.size <= 0:
        return f"empty file ({member.size} bytes)"
    if member.offset_data + member.size > shard_bytes:
        return "cut off by the end of the archive"
    return ""


def _ends_well(path: Path, offset: int) -> bool:
    """Return whether a tar's end mark is where the next header was expected: tarfile ends silently at damage."""
    with open(path, "rb") as tar:
        tar.seek(offset)
        return tar.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _read_object(tar: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, Any]:
    """Return the JSON object in a member; {} if it holds none."""
    file = tar.extractfile(member)
    assert file is not None, f"{member.name} is regular"
    try:
        value = json.loads(file.read())
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
