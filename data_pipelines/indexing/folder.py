"""A folder -> the facts of all its videos, stored for the next time; in parts on several machines; verified.

The videos of a folder are its video files. A folder without any may hold folders of images: each is one video.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data_pipelines.containers import IMAGE_EXTENSIONS, is_image
from data_pipelines.errors import UserError, one_line, one_line_logger
from data_pipelines.facts import MAX_FRAME_PX, BadFile, Video
from data_pipelines.index import LIMIT_KEY, difference_of, within_limit
from data_pipelines.indexing.index_file import (
    hash_of_paths,
    part_paths,
    part_stem,
    read_index_file,
    read_part,
    write_index_file,
)
from data_pipelines.indexing.parallel import index_files
from data_pipelines.indexing.probe import stamp_of

log = one_line_logger(__name__)

VIDEO_EXTENSIONS = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"),
    *(".ts", ".mts", ".m2ts", ".wmv", ".flv", ".3gp", ".ogv"),
)

# ------------------------------------------------------------------------------------------------- finding the videos


def is_video_name(name: str) -> bool:
    """Return whether a file of this name is a video, by its extension; hidden files are none."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in VIDEO_EXTENSIONS


def is_image_name(name: str) -> bool:
    """Return whether a file of this name is an image, by its extension; hidden files are none."""
    return not name.startswith(".") and is_image(name)


def video_paths(root: Path, *, warn: bool = False) -> Iterator[str]:
    """Yield the paths of video files under root, relative to it and unsorted.

    Links are followed, and each folder is visited once. Hidden files and folders are skipped.
    warn: name folders that cannot be read in warnings.
    """
    for prefix, names in _folders(root, warn):
        yield from (f"{prefix}{name}" for name in names if is_video_name(name))


def image_paths(root: Path) -> Iterator[str]:
    """Yield the paths of image files under root, as video_paths does."""
    for prefix, names in _folders(root, warn=True):
        yield from (f"{prefix}{name}" for name in names if is_image_name(name))


def image_folders(root: Path) -> Iterator[str]:
    """Yield the paths of subfolders of root that hold images, as video_paths does."""
    for prefix, names in _folders(root):
        if prefix and any(map(is_image_name, names)):
            yield prefix.removesuffix("/")


def _folders(root: Path, warn: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder under root as its relative path, "" or "a/b/", with the names of its files."""
    on_error = _warn_of_folder if warn else None
    visited = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=on_error):
        try:
            status = os.stat(folder)
        except FileNotFoundError:  # removed meanwhile
            continue
        if (status.st_dev, status.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        prefix = Path(folder).relative_to(root).as_posix()
        yield ("" if prefix == "." else f"{prefix}/"), names


def _warn_of_folder(error: OSError) -> None:
    log.warning("folder '%s' cannot be read and is left out: %s", error.filename, one_line(error))


def _all_paths(root: Path) -> list[str]:
    """Return the sorted paths of the videos under root. Raises UserError: it is not a folder."""
    if not root.is_dir():
        where = "" if root.is_absolute() else f" below {Path.cwd()}"
        raise UserError(f"data root '{root}' is not a folder{where}: give a folder that holds videos")
    return sorted(video_paths(root, warn=True)) or sorted(image_folders(root))


# ----------------------------------------------------------------------------------------------------------- indexing


def index_folder(
    root: Path,
    *,
    paths: Sequence[str] | None = None,
    part: tuple[int, int] | None = None,
    num_workers: int | None = None,
    progress: bool = True,
    max_frame_px: int = MAX_FRAME_PX,
) -> list[Video | BadFile]:
    """Index every video under root, or update its index. Returns the entries sorted by path.

    paths: sorted paths of other files to index, such as images, in place of the videos; None: the videos.
    part: (k, n) indexes only every n-th file, from the k-th (k = 1 to n), and stores the result for merge_parts.
    num_workers: processes; None: one per core; 0: none, the files are read in this process.
    progress: shows a bar.
    max_frame_px: files with larger frames are bad files.

    Raises UserError: root is missing or holds no video. (If none is readable, that is no error here.)
    """
    if paths is None:
        paths = _all_paths(root)
    if not paths:
        extensions = " ".join(sorted(VIDEO_EXTENSIONS))
        raise UserError(
            f"data root '{root}' holds no video files ({extensions}) and no folders of images "
            f"({' '.join(IMAGE_EXTENSIONS)})"
        )
    stored = read_index_file(root)
    stem, extra = "", {}
    if part is not None:
        stem, extra = part_stem(*part), {"folder": hash_of_paths(paths)}
        paths = paths[part[0] - 1 :: part[1]]
    known, stale = _split_by_freshness(root, paths, stored, max_frame_px)
    new = index_files(root, stale, num_workers=num_workers, progress=progress, max_frame_px=max_frame_px)
    fresh = {entry.path: entry for entry in new}
    entries = [known.get(path) or fresh[path] for path in paths]
    if part is not None or fresh or len(stored) != len(entries):
        write_index_file(root, entries, stem, extra)
    return [within_limit(entry, max_frame_px) for entry in entries]


def merge_parts(root: Path) -> list[Video | BadFile]:
    """Merge the parts that index_folder stored into the index file that one run writes, and remove them.

    Raises UserError: parts are missing, unreadable, of another version, of different divisions, or of another
    state of the folder.
    """
    parts = part_paths(root)
    if not parts:
        raise UserError(f"'{root}' has no parts of an index: build all parts first")
    divisions = sorted({n for _, n in parts})
    if len(divisions) > 1:
        raise UserError(f"'{root}' has parts of {divisions[0]} and parts of {divisions[1]}: remove the older ones")
    [num_parts] = divisions
    missing = next((k for k in range(1, num_parts + 1) if (k, num_parts) not in parts), None)
    if missing is not None:
        raise UserError(f"'{root}' lacks part {missing} of {num_parts} of its index: build it first")
    contents = [read_part(path) for path in parts.values()]
    if len({header.get("folder") for header, _ in contents}) > 1:
        raise UserError(f"the {num_parts} parts of '{root}' list different files: build all of them again")
    merged = sorted((entry for _, entries in contents for entry in entries), key=lambda entry: entry.path)
    write_index_file(root, merged)
    for path in parts.values():
        path.unlink()
    return merged


def verify_folder(root: Path, *, num_workers: int | None = None, progress: bool = True) -> list[str]:
    """Read all files again and compare them with the stored index. Returns a sentence for each change.

    This finds changes that size and time stamp do not show. The index file stays as it is.
    num_workers, progress: as for index_folder.

    Raises UserError: root is not a folder, or has no index.
    """
    here = set(_all_paths(root))
    stored = read_index_file(root)
    if not stored:
        raise UserError(f"'{root}' has no index to compare with: index it first")
    sizes_px = [entry.width * entry.height for entry in stored.values() if isinstance(entry, Video)]
    limit_px = max([MAX_FRAME_PX, *sizes_px])
    changes = {path: "is gone" for path in stored.keys() - here} | {path: "is new" for path in here - stored.keys()}
    both = sorted(here & stored.keys())
    for now in index_files(root, both, num_workers=num_workers, progress=progress, max_frame_px=limit_px):
        before = stored[now.path]
        if isinstance(before, Video):
            if difference := difference_of(before, now):
                changes[now.path] = f"has changed ({difference})"
        elif isinstance(now, Video):
            changes[now.path] = "is readable now"
    return [f"'{path}' {changes[path]}" for path in sorted(changes)]


def _split_by_freshness(
    root: Path, paths: Iterable[str], stored: dict[str, Video | BadFile], max_frame_px: int
) -> tuple[dict[str, Video | BadFile], list[str]]:
    """Return the stored entries that still hold, by path, and the paths to read again."""
    known: dict[str, Video | BadFile] = {}
    stale: list[str] = []
    for path in paths:
        entry = stored.get(path)
        if entry is not None and not _refused_by_another_limit(entry, max_frame_px):
            try:
                if (entry.size_bytes, entry.mtime_ns) == stamp_of(os.path.join(root, path)):
                    known[path] = entry
                    continue
            except OSError:  # a broken link or a file just deleted: index_file reports it
                pass
        stale.append(path)
    return known, stale


def _refused_by_another_limit(entry: Video | BadFile, max_frame_px: int) -> bool:
    if not isinstance(entry, BadFile):
        return False
    return f"{LIMIT_KEY}=" in entry.reason and not entry.reason.endswith(f"{LIMIT_KEY}={max_frame_px}")
