"""The index of a folder of shards, shards.jsonl: JSON lines alongside the tars.

First a header; for each shard its name, size and sha256; for each video its facts and labels, its shard, and the offset
of its bytes. With that a shard is read in place, or fetched from a URL, and never unpacked.
"""

import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from hashlib import file_digest
from pathlib import Path
from typing import Any, BinaryIO

from tqdm.auto import tqdm

from data_pipelines.errors import UserError, one_line
from data_pipelines.facts import BadFile, Shard, Video, checked_shard, entry_from_fields
from data_pipelines.files import bounded_lines, check_regular, replacing

SHARDS_NAME = "shards.jsonl"
SHARDS_HEADER = {"format": "worldmodel-shards", "version": 1}
MAX_FRAMES_OF_ALL = 2**32  # of an index: 4.5 years at 30 frames a second
MAX_LISTS = 2**26  # of an index: one for each 16 of the most bytes that are read of it

Entry = tuple[Video | BadFile, Mapping[str, Any]]  # and its labels


def tars_in(folder: Path) -> list[Path]:
    """Return the sorted tars of a folder. Raises UserError: it cannot be read."""
    try:
        return sorted(
            folder / name
            for name in os.listdir(folder)
            if os.path.splitext(name)[1].lower() == ".tar" and (folder / name).is_file()
        )
    except OSError as error:
        raise UserError(f"'{folder}' cannot be read: {one_line(error)}") from None


def read_shards(path: Path) -> tuple[dict[str, Shard], list[Entry]]:
    """Return the shards of an index file by name, and their videos.

    Raises UserError: it cannot be read, or is damaged.
    """
    try:
        check_regular(path)
        with open(path, "rb") as lines:
            return _parse_lines(lines, str(path))
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {one_line(error)}") from None


def parse_shards(text: bytes, where: str) -> tuple[dict[str, Shard], list[Entry]]:
    """Parse an index file's bytes as read_shards does; messages call it `where`."""
    return _parse_lines(io.BytesIO(text), where)


def _parse_lines(lines: BinaryIO, where: str) -> tuple[dict[str, Shard], list[Entry]]:
    """Parse lines. Raises UserError unless each line is meaningful, and each video is within its shard.

    Videos may share bytes: each is read as it is described.
    """
    shards: dict[str, Shard] = {}
    entries: list[Entry] = []
    paths: set[str] = set()
    number, num_frames, num_lists = 1, 0, 0
    try:
        numbered = enumerate(bounded_lines(lines), start=1)
        if json.loads(next(numbered, (1, b"null"))[1].decode()) != SHARDS_HEADER:
            raise ValueError(f"it should be {json.dumps(SHARDS_HEADER)}")
        number = 2
        for number, line in numbered:  # noqa: B007 (the message below states it)
            num_lists += line.count(b"[") + line.count(b"{")
            if num_lists > MAX_LISTS:  # empty ones take 24 times the memory of their text
                raise ValueError(f"the lines up to there have more than {MAX_LISTS:,} lists and objects")
            fields = json.loads(line.decode())
            if "sha256" in fields:
                shard = checked_shard(Shard(**fields))
                shards[shard.name] = shard
                continue
            labels = fields.pop("labels", {})
            if not isinstance(labels, dict):
                raise ValueError("its labels are not an object")
            entry = entry_from_fields(fields), labels
            if entry[0].path in paths:
                raise ValueError(f"'{entry[0].path}' is listed twice")
            if isinstance(entry[0], Video):
                if not _lies_within(entry[0], shards):
                    raise ValueError("it is outside its shard")
                num_frames += entry[0].num_frames
                if num_frames > MAX_FRAMES_OF_ALL:
                    raise ValueError(f"the videos up to there have more than {MAX_FRAMES_OF_ALL:,} frames")
            paths.add(entry[0].path)
            entries.append(entry)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(f"'{where}' is damaged in line {number} ({one_line(error)}): index the shards again") from None
    return shards, entries


def _lies_within(video: Video, shards: Mapping[str, Shard]) -> bool:
    stop = video.offset_bytes + video.size_bytes
    return 0 <= video.offset_bytes < stop <= shards[video.shard].size_bytes


def write_shards(folder: Path, entries: Iterable[Entry], progress: bool) -> None:
    """Write the index of the tars in a folder, with their checksums. Raises OSError."""
    with replacing(folder / SHARDS_NAME, is_shared=True) as out:
        out.write(_line(SHARDS_HEADER))
        for path in tqdm(tars_in(folder), desc="hashing", unit="shard", disable=not progress):
            with open(path, "rb") as tar:
                digest = file_digest(tar, "sha256").hexdigest()
            out.write(_line(asdict(Shard(path.name, path.stat().st_size, digest))))
        for video, labels in entries:
            fields = asdict(video)
            out.write(_line(fields | {"labels": labels} if labels else fields))


def _line(fields: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(fields)}\n".encode()


def verify_shards(root: Path, *, progress: bool = True) -> list[str]:
    """Compare all shards of a folder with the checksums in their index. Returns a sentence for each change.

    Raises UserError: there is no index, or it is damaged.
    """
    if not (root / SHARDS_NAME).is_file():
        raise UserError(f"'{root}' has no {SHARDS_NAME} to compare with: index the shards first")
    shards, _ = read_shards(root / SHARDS_NAME)
    here = {path.name for path in tars_in(root)}
    changes = {name: "is gone" for name in shards.keys() - here} | {name: "is new" for name in here - shards.keys()}
    for name in tqdm(sorted(here & shards.keys()), desc="hashing", unit="shard", disable=not progress):
        with open(root / name, "rb") as tar:
            if file_digest(tar, "sha256").hexdigest() != shards[name].sha256:
                changes[name] = "has changed (its sha256 differs)"
    return [f"'{name}' {changes[name]}" for name in sorted(changes)]
