"""The file that stores the index of a folder, and the files of its parts, as JSON lines.

First a header with format, version and content hash, then the bad files with reasons, then the videos. The file is
next to the data, or in the user's cache if that folder is read-only.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipelines.errors import UserError, one_line, one_line_logger
from data_pipelines.facts import BadFile, Video, entry_from_fields
from data_pipelines.files import bounded_lines, check_regular, replacing, user_cache_dir
from data_pipelines.index import VideoIndex

log = one_line_logger(__name__)

INDEX_NAME = ".worldmodel_index.jsonl"
INDEX_HEADER = {"format": "worldmodel-video-index", "version": 4}
DAMAGE = (OSError, ValueError, TypeError, KeyError, RecursionError)  # what reading a damaged index file raises


class _OtherVersion(Exception):
    """A file of entries that another version wrote, or another program."""


def index_path(root: Path) -> Path | None:
    """Return the file that stores the index of root; None: there is none."""
    return next((path for path in _newest_first(_possible_paths(root)) if path.is_file()), None)


def read_index_file(root: Path) -> dict[str, Video | BadFile]:
    """Return the stored entries of a folder by path; none if there is no index file, or it cannot be used."""
    for path in _newest_first(_possible_paths(root)):
        try:
            return {entry.path: entry for entry in _read_entries(path)[1]}
        except FileNotFoundError:
            continue
        except _OtherVersion as error:
            log.info("the stored index '%s' is %s: building it again", path, error)
        except DAMAGE as error:
            log.warning("the stored index '%s' is unreadable (%s): building it again", path, one_line(error))
    return {}


def write_index_file(
    root: Path, entries: Sequence[Video | BadFile], stem: str = "", extra: Mapping[str, str] | None = None
) -> None:
    """Store the entries of a folder. If that is impossible, it is logged.

    stem: of the name of a part, as part_stem returns it.
    extra: further fields of the header.
    """
    header = INDEX_HEADER | {"content_hash": _hash_of_entries(entries), **(extra or {})}
    bad_first = sorted(entries, key=lambda entry: (isinstance(entry, Video), entry.path))
    for path in _possible_paths(root, stem):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, is_shared=True) as out:
                for line in (header, *map(asdict, bad_first)):
                    out.write(f"{json.dumps(line)}\n".encode())
            return
        except OSError as error:
            log.info("cannot write the index to '%s' (%s)", path, one_line(error))
    log.warning("the index of '%s' could not be stored: the next run builds it again", root)


def part_stem(k: int, n: int) -> str:
    """Return the stem of the file of part k of n, k from 1 to n."""
    assert 1 <= k <= n, f"part {k} of {n}"
    return f".part-{k}-of-{n}"


def part_paths(root: Path) -> dict[tuple[int, int], Path]:
    """Return the stored parts of an index by (k, n)."""
    parts: dict[tuple[int, int], Path] = {}
    for folder, name in _possible_places(root):
        for path in folder.glob(f"{name}.part-*-of-*.jsonl"):
            k, _, n = path.name.removeprefix(f"{name}.part-").removesuffix(".jsonl").partition("-of-")
            if k.isdecimal() and n.isdecimal():
                parts.setdefault((int(k), int(n)), path)
    return parts


def read_part(path: Path) -> tuple[dict[str, Any], list[Video | BadFile]]:
    """Return the header and the entries of a part. Raises UserError: it is damaged, or of another version."""
    try:
        return _read_entries(path)
    except _OtherVersion as error:
        raise UserError(f"'{path}' is {error}: build it again with the version that merges") from None
    except DAMAGE as error:
        raise UserError(f"'{path}' is unreadable ({one_line(error)}): build it again") from None


def hash_of_paths(paths: Iterable[str]) -> str:
    """Return a hash of the files that a folder holds."""
    return hashlib.sha256(os.fsencode("\0".join(paths))).hexdigest()[:16]


def _possible_places(root: Path) -> list[tuple[Path, str]]:
    """Return folder and stem of the index file, in order of preference: next to the data, in the user's cache."""
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    own = user_cache_dir()
    return [(root, INDEX_NAME.removesuffix(".jsonl")), *([(own, f"index-{name}")] if own else [])]


def _possible_paths(root: Path, stem: str = "") -> list[Path]:
    return [folder / f"{name}{stem}.jsonl" for folder, name in _possible_places(root)]


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    """Sort paths by time. An index in the user's cache is newer than one in a folder that cannot be written since."""

    def time_ns(path: Path) -> int:
        try:
            return path.stat().st_mtime_ns
        except OSError:
            return 0

    return sorted(paths, key=time_ns, reverse=True)


def _read_entries(path: Path) -> tuple[dict[str, Any], list[Video | BadFile]]:
    """Return the header and the entries of a file. Raises _OtherVersion, or one of DAMAGE."""
    check_regular(path)
    with open(path, "rb") as file:
        lines = bounded_lines(file)
        header = json.loads(next(lines, b"null").decode())
        if not isinstance(header, dict) or {name: header.get(name) for name in INDEX_HEADER} != INDEX_HEADER:
            raise _OtherVersion(f"not of version {INDEX_HEADER['version']}")
        entries = [entry_from_fields(json.loads(line.decode())) for line in lines]
    if any(isinstance(entry, Video) and entry.shard for entry in entries):
        raise ValueError("it lists videos in shards")
    if header.get("content_hash") != _hash_of_entries(entries):
        raise ValueError("content_hash does not fit its content")
    return header, entries


def _hash_of_entries(entries: Iterable[Video | BadFile]) -> str:
    return VideoIndex(Path(), [entry for entry in entries if isinstance(entry, Video)]).content_hash
