"""A folder of videos -> an index: frames, keyframes, size and labels of each file; cached; bad files listed."""

import hashlib
import json
import logging
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from tqdm.auto import tqdm

from data_pipelines.errors import UserError
from data_pipelines.labels import read_labels
from data_pipelines.probe import BadFile, Video, index_file, one_line

if TYPE_CHECKING:
    from data_pipelines.remote import RemoteShards

log = logging.getLogger(__name__)

VIDEO_EXTENSIONS = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"),
    *(".ts", ".mts", ".m2ts", ".wmv", ".flv", ".3gp", ".ogv"),
)
INDEX_NAME = ".worldmodel_index.jsonl"
INDEX_HEADER = {"format": "worldmodel-video-index", "version": 1}
FILES_PER_TASK = 64
MIN_VIDEOS_TO_DEAL = 10


@dataclass(frozen=True)
class VideoIndex:
    """What a folder holds. videos are sorted by path; labels (first dimension len(videos)) follow them.

    share: the part of each video's length that clips may come from, as fractions [start, stop) of its frames.
    remote: fetches the shards that hold the videos into root, where they are not there to begin with. Videos in shards
    are sorted by shard and by place in it.
    """

    root: Path
    videos: Sequence[Video]
    bad: Sequence[BadFile] = ()
    labels: dict[str, torch.Tensor] = field(default_factory=dict)
    share: tuple[float, float] = (0.0, 1.0)
    remote: "RemoteShards | None" = None

    @property
    def frame_ranges(self) -> list[tuple[int, int]]:
        """The frames [start, stop) of each video that clips may come from."""
        start, stop = self.share
        return [(round(start * video.num_frames), round(stop * video.num_frames)) for video in self.videos]

    @cached_property
    def content_hash(self) -> str:
        """Changes when a file is added, removed, renamed or has another size or number of frames."""
        digest = hashlib.sha256(repr(self.share).encode())
        for video in self.videos:
            digest.update(f"{video.path}\0{video.size_bytes}\0{video.num_frames}\n".encode())
            if video.shard:  # the order of clips depends on it
                digest.update(f"{video.shard}\0{video.offset}\n".encode())
        return digest.hexdigest()[:16]


def load_or_build_index(
    root: str | Path,
    *,
    num_workers: int | None = None,
    progress: bool = True,
    max_bad_fraction: float = 0.1,
) -> VideoIndex:
    """Index every video under root (recursively), reusing the cached entries of files that did not change.

    root: folder of videos; a metadata.jsonl in it (`file_name` first) gives labels.
    num_workers: processes; None takes one a core.
    max_bad_fraction: more unreadable files than this share of all is an error; fewer are named in a warning.

    Raises UserError: root is missing or holds no (readable) video; too many bad files; bad metadata.jsonl.
    """
    try:
        import av  # noqa: F401
    except ImportError:
        raise UserError("indexing videos needs PyAV, which is not installed: pip install av") from None
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"data root '{root}' is not a folder: give a folder that holds videos")
    paths = sorted(_video_paths(root))
    if not paths:
        raise UserError(f"data root '{root}' holds no video files ({' '.join(sorted(VIDEO_EXTENSIONS))})")

    cached = _read_cache(root)
    known, stale = _split_by_freshness(root, paths, cached)
    fresh = {entry.path: entry for entry in _index_files(root, stale, num_workers, progress)}
    entries = [known.get(path) or fresh[path] for path in paths]
    if fresh or len(cached) != len(entries):
        _write_cache(root, entries)

    videos = [entry for entry in entries if isinstance(entry, Video)]
    bad = [entry for entry in entries if isinstance(entry, BadFile)]
    judge_bad_files(root, bad, len(entries), max_bad_fraction)
    return VideoIndex(root=root, videos=videos, bad=bad, labels=read_labels(root, videos))


def judge_bad_files(root: str | Path, bad: Sequence[BadFile], num_files: int, max_bad_fraction: float) -> None:
    if not bad:
        return
    first = f"the first is '{bad[0].path}' ({bad[0].reason})"
    if len(bad) == num_files:
        raise UserError(f"data root '{root}': none of {num_files} video files is readable; {first}")
    if len(bad) > max_bad_fraction * num_files:
        raise UserError(
            f"data root '{root}': {len(bad)} of {num_files} video files are bad, more than max_bad_fraction="
            f"{max_bad_fraction:g} allows; {first}: remove or repair them, or raise the limit"
        )
    named = ", ".join(f"'{entry.path}' ({entry.reason})" for entry in bad[:10])
    more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
    log.warning("%d of %d video files are bad and left out: %s%s", len(bad), num_files, named, more)


def _video_paths(root: Path) -> Iterator[str]:
    """Paths of video files under root, relative to it. Links are followed, each folder is visited once."""
    visited = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((stat.st_dev, stat.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        prefix = Path(folder).relative_to(root).as_posix()
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in VIDEO_EXTENSIONS:
                yield name if prefix == "." else f"{prefix}/{name}"


def _split_by_freshness(
    root: Path, paths: Iterable[str], cached: dict[str, Video | BadFile]
) -> tuple[dict[str, Video | BadFile], list[str]]:
    known: dict[str, Video | BadFile] = {}
    stale: list[str] = []
    for path in paths:
        entry = cached.get(path)
        if entry is not None:
            try:
                stat = os.stat(root / path)
            except OSError:  # a broken link or a file just deleted: index_file says so
                stale.append(path)
                continue
            if (entry.size_bytes, entry.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
                known[path] = entry
                continue
        stale.append(path)
    return known, stale


def _index_chunk(root: str, paths: Sequence[str]) -> list[Video | BadFile]:
    return [index_file(root, path) for path in paths]


def _ignore_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle


def _index_files(
    root: Path, paths: Sequence[str], num_workers: int | None, progress: bool
) -> Iterator[Video | BadFile]:
    """Index files, in processes if there are many, with a progress bar."""
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chunks = [paths[i : i + FILES_PER_TASK] for i in range(0, len(paths), FILES_PER_TASK)]
    num_workers = min(num_workers, len(chunks))
    with tqdm(total=len(paths), desc="indexing", unit="file", disable=not (progress and paths)) as bar:
        if num_workers <= 1:
            for chunk in chunks:
                yield from _index_chunk(str(root), chunk)
                bar.update(len(chunk))
            return
        # Forked where that is the custom, so that a script needs no __main__ guard.
        context = get_context("fork" if sys.platform == "linux" else "spawn")
        pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_ignore_sigint)
        try:
            for entries in pool.map(_index_chunk, [str(root)] * len(chunks), chunks):
                yield from entries
                bar.update(len(entries))
        except BrokenProcessPool:
            raise UserError(
                f"a process died while it indexed the {len(paths)} files of '{root}': one of them crashes "
                f"the video library, or the memory is too small for {num_workers} processes"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _cache_paths(root: Path) -> list[Path]:
    """Where the cached index may stand: next to the data, or in the user's cache if that is read-only."""
    name = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    return [root / INDEX_NAME, Path.home() / ".cache" / "worldmodel" / f"index-{name}.jsonl"]


def _read_cache(root: Path) -> dict[str, Video | BadFile]:
    for cache in _cache_paths(root):
        try:
            with open(cache, encoding="utf-8") as lines:
                if json.loads(next(lines, "null")) != INDEX_HEADER:
                    continue
                return {entry.path: entry for entry in map(_entry_from_json, lines)}
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning("the cached index '%s' is unreadable (%s): building it anew", cache, one_line(error))
    return {}


def _entry_from_json(line: str) -> Video | BadFile:
    fields = json.loads(line)
    if "reason" in fields:
        return BadFile(**fields)
    fields["keyframes"], fields["keyframe_pts"] = tuple(fields["keyframes"]), tuple(fields["keyframe_pts"])
    return Video(**fields)


def _write_cache(root: Path, entries: Iterable[Video | BadFile]) -> None:
    """Written aside, then renamed: a reader, or another process that builds it too, never sees a part."""
    for cache in _cache_paths(root):
        aside = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            with open(aside, "w", encoding="utf-8") as out:
                for line in (INDEX_HEADER, *map(asdict, entries)):
                    out.write(json.dumps(line) + "\n")
            os.replace(aside, cache)
            return
        except OSError as error:
            aside.unlink(missing_ok=True) if aside.parent.is_dir() else None
            log.info("cannot write the index to '%s' (%s)", cache, one_line(error))
    log.warning("the index of '%s' could not be cached: the next run builds it anew", root)


def split_index(index: VideoIndex, split: Literal["train", "selection", "test"]) -> VideoIndex:
    """The share of a folder without splits of its own that a split gets: 80, 10 and 10 percent.

    Whole videos, dealt by a hash of their paths; or, where there are fewer than ten, each video by time: the last
    tenth tests, the one before it selects.
    """
    if len(index.videos) < MIN_VIDEOS_TO_DEAL:
        shares = {"train": (0.0, 0.8), "selection": (0.8, 0.9), "test": (0.9, 1.0)}
        return replace(index, share=shares[split])
    order = sorted(range(len(index.videos)), key=lambda row: hashlib.sha256(index.videos[row].path.encode()).digest())
    tenth = len(order) // 10
    parts = {"test": order[:tenth], "selection": order[tenth : 2 * tenth], "train": order[2 * tenth :]}
    rows = sorted(parts[split])
    labels = {name: values[rows] for name, values in index.labels.items()}
    return replace(index, videos=[index.videos[row] for row in rows], labels=labels)
