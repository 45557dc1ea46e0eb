"""The files of an output folder: settings, rows of finished episodes, shards.

An output folder holds `convert.json`, the settings, and in it or in each split the videos and their `metadata.jsonl`.
Until a split is finished, its rows are appended to `.metadata.jsonl.partial`. A row states where the episode comes from
and a digest of its frames.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_pipelines.convert.episodes import PROVENANCE
from data_pipelines.errors import UserError
from data_pipelines.files import bounded_lines, read_text, remove, replacing, write_bytes, write_text
from data_pipelines.indexing.index_file import INDEX_NAME
from data_pipelines.labels import METADATA_NAME
from data_pipelines.shards.index_file import SHARDS_NAME, read_shards
from data_pipelines.shards.packing import pack_videos
from data_pipelines.splits import SPLITS

SETTINGS_NAME = "convert.json"
PARTIAL_NAME = f".{METADATA_NAME}.partial"
ROWS_NAME = ".converted.jsonl"  # of the videos in shards
SETTINGS_BYTES = 2**20

Row = dict[str, Any]


def start_output(place: Path, out: Path, facts: Mapping[str, Any], *, overwrite: bool) -> None:
    """Make the folder with its convert.json, or find the same one. Raises UserError: it holds something else."""
    ours = [folder for folder in dict.fromkeys([place, out]) if overwrite and (folder / SETTINGS_NAME).is_file()]
    if out in ours and place != out and (foreign := _foreign_file(out)):
        raise UserError(f"'{out}' also holds '{foreign}', which is not of the conversion: move it away first")
    for folder in ours:
        if folder == out:
            _remove(folder)
        else:
            discard_videos(folder)
    begun = (place / SETTINGS_NAME).is_file()
    for folder in {place, out} - ({place} if place in ours else set()):
        if not begun and folder.exists() and (folder.is_file() or any(folder.iterdir())):
            raise UserError(f"'{folder}' is not empty and holds no conversion: name another folder")
    path = place / SETTINGS_NAME
    if begun:
        try:
            stored = json.loads(read_text(path, SETTINGS_BYTES))
        except (ValueError, RecursionError):
            stored = None
        if stored != facts:
            raise UserError(
                f"'{place}' holds a conversion with other settings: name another folder, or overwrite it ({path.name})"
            )
        return
    place.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(facts, indent=1) + "\n")


def _written(folder: Path) -> Iterator[Path]:
    """Yield the files of a conversion: the videos that its rows name, the rows, shards, indices, and its settings."""
    for split in ("", *SPLITS):
        for name in (METADATA_NAME, PARTIAL_NAME, ROWS_NAME):
            for row in read_rows(folder / split / name):
                with suppress(OSError):
                    yield _video_path(folder / split, row)
            yield folder / split / name
        if (folder / split / SHARDS_NAME).is_file():
            yield from [*(folder / split).glob("shard-*.tar"), folder / split / SHARDS_NAME]
        yield folder / split / INDEX_NAME
    yield folder / SETTINGS_NAME


def _remove(folder: Path) -> None:
    for path in list(_written(folder)):
        path.unlink(missing_ok=True)
    for split in SPLITS:
        with suppress(OSError):  # it is not there, or holds other files
            (folder / split).rmdir()


def _foreign_file(folder: Path) -> str | None:
    """Return the path of a file in the folder that its conversion did not write; None if there is none."""
    written = set(_written(folder))
    others = (path for path in sorted(folder.rglob("*")) if path not in written and not path.is_dir())
    return next((path.relative_to(folder).as_posix() for path in others), None)


def _video_path(folder: Path, row: Row) -> Path:
    """Return the path of the video of a row. Raises OSError: the row names a file elsewhere."""
    path = folder / row["file_name"]
    if not path.resolve().is_relative_to(folder.resolve()) or path.suffix != ".mp4":
        raise OSError("leads out of the folder")
    return path


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a metadata.jsonl, or of the written part of one. An incomplete last line is dropped."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        for line in bounded_lines(file):
            try:
                row = json.loads(line)
                if isinstance(row["file_name"], str) and all(isinstance(row[key], str) for key in PROVENANCE[:4]):
                    yield row
            except (ValueError, KeyError, TypeError, RecursionError):
                continue


@contextmanager
def appending(path: Path) -> Iterator[Callable[[Row], None]]:
    """Open a file of rows, and return the function that appends one. A line that a kill left incomplete is ended."""
    if path.is_symlink():
        path.unlink()
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")

        def note(row: Row) -> None:
            file.write(f"{json.dumps(row)}\n".encode())
            file.flush()

        yield note


def write_rows(folder: Path, name: str, rows: Iterable[Row]) -> None:
    """Replace a file of rows, in place of the one that was appended to. Raises OSError."""
    with replacing(folder / name) as file:
        file.writelines(f"{json.dumps(row)}\n".encode() for row in rows)
    (folder / PARTIAL_NAME).unlink(missing_ok=True)


def pack_output(place: Path, out: Path, splits: Sequence[str], shard_mb: float) -> None:
    """Pack the videos of a finished conversion into shards, and remove them; the rows remain with the shards.

    Shards of an earlier call, which was stopped, are kept if they hold these videos. If the source has got more
    episodes since, they are packed again.
    """
    for split in splits:
        rows, packed_rows = place / split / METADATA_NAME, out / split / ROWS_NAME
        if not _hold_videos(out / split, rows):
            if packed_rows.is_file():
                _remove(out / split)
            siblings = [place / name for name in splits] if split else []
            pack_videos(place / split, out / split, siblings=siblings, shard_mb=shard_mb)
        shutil.copyfile(rows, packed_rows)
    write_bytes(out / SETTINGS_NAME, (place / SETTINGS_NAME).read_bytes())
    discard_videos(place)


def _hold_videos(shards: Path, rows: Path) -> bool:
    """Return whether a folder of shards exists and holds the videos of these rows, and no others."""
    if not (shards / SHARDS_NAME).is_file():
        return False
    _, entries = read_shards(shards / SHARDS_NAME)
    packed = {(video.path, str(video.size_bytes)) for video, _ in entries}
    return packed == {(row["file_name"], row["video_bytes"]) for row in read_rows(rows)}


def discard_videos(place: Path) -> None:
    """Remove the folder of the videos that are in shards, if there is one.

    Its settings are the last file: a removal that was stopped is recognised by them, and continued.
    """
    if (place / SETTINGS_NAME).is_file() and not place.is_symlink():
        for path in place.iterdir():
            if path.name != SETTINGS_NAME:
                remove(path)
        shutil.rmtree(place)
