"""A folder of videos -> an index: frames, keyframes, size and labels of each file; cached; bad files listed.

The index file is JSON lines: a header with format, version and content hash, the bad files with reasons, the videos.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipelines.errors import UserError, one_line_logger
from data_pipelines.files import bounded_lines, check_regular, user_cache_dir, written_whole
from data_pipelines.index_engines import Engine, index_files
from data_pipelines.labels import read_labels
from data_pipelines.lerobot import Episodes, frames_of_episode, is_lerobot, read_episodes
from data_pipelines.probe import MAX_FRAME_PX, BadFile, Video, entry_from_fields, one_line

if TYPE_CHECKING:
    from data_pipelines.remote import RemoteShards

log = one_line_logger(__name__)

VIDEO_EXTENSIONS = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"),
    *(".ts", ".mts", ".m2ts", ".wmv", ".flv", ".3gp", ".ogv"),
)
INDEX_NAME = ".worldmodel_index.jsonl"
INDEX_HEADER = {"format": "worldmodel-video-index", "version": 3}
MIN_VIDEOS_TO_DEAL = 10
LIMIT_KEY = "data.max_frame_px"
DAMAGE = (OSError, ValueError, TypeError, KeyError, RecursionError)  # what reading a damaged index file raises


@dataclass(frozen=True)
class VideoIndex:
    """What a folder holds: rows, each of them a video file or an episode in one.

    videos: the file of each row. Those of a plain folder are sorted by path; a file with several episodes is in
        several rows.
    labels: first dimension len(videos).
    share: the part of each row's length that clips may come from, as fractions [start, stop) of its frames.
    episodes: the frames [start, stop) of its file that each row consists of; None: all.
    frame_labels: labels of single frames, [label frames, ...].
    frame_label_offsets: int64 [len(videos)]; frame f of a row's file has the label frame offset + f.
    label_faults: labels that are left out, and why.
    remote: fetches the shards that hold the videos into root, where they are not there to begin with. Videos in shards
        are sorted by shard and by place in it.
    """

    root: Path
    videos: Sequence[Video]
    bad: Sequence[BadFile] = ()
    labels: dict[str, torch.Tensor] = field(default_factory=dict)
    share: tuple[float, float] = (0.0, 1.0)
    episodes: Sequence[tuple[int, int]] | None = None
    frame_labels: dict[str, torch.Tensor] = field(default_factory=dict)
    frame_label_offsets: torch.Tensor | None = None
    remote: "RemoteShards | None" = None
    label_faults: Mapping[str, str] = field(default_factory=dict)

    @property
    def frame_ranges(self) -> list[tuple[int, int]]:
        """The frames [start, stop) of each row's file that clips may come from."""
        rows = [(0, video.num_frames) for video in self.videos] if self.episodes is None else self.episodes
        first, last = self.share
        return [(a + round(first * (b - a)), a + round(last * (b - a))) for a, b in rows]

    @cached_property
    def content_hash(self) -> str:
        """Changes when a file or episode is added, removed, renamed or has another size or number of frames."""
        digest = hashlib.sha256(repr(self.share).encode())
        for video in self.videos:
            digest.update(f"{video.path}\0{video.size_bytes}\0{video.num_frames}\n".encode("utf-8", "surrogateescape"))
            if video.shard:  # the order of clips depends on it
                digest.update(f"{video.shard}\0{video.offset_bytes}\n".encode())
        if self.episodes is not None:
            digest.update(repr(list(self.episodes)).encode())
        return digest.hexdigest()[:16]

    def rows(self, rows: Sequence[int]) -> "VideoIndex":
        """An index of these rows only."""
        offsets = self.frame_label_offsets
        return replace(
            self,
            videos=[self.videos[row] for row in rows],
            labels={name: values[rows] for name, values in self.labels.items()},
            episodes=None if self.episodes is None else [self.episodes[row] for row in rows],
            frame_label_offsets=None if offsets is None else offsets[rows],
        )


def load_or_build_index(
    root: str | Path,
    *,
    camera: str | None = None,
    siblings: Sequence[Path] = (),
    num_workers: int | None = None,
    progress: bool = True,
    max_bad_fraction: float = 0.1,
    max_frame_px: int = MAX_FRAME_PX,
) -> VideoIndex:
    """Index every video under root (recursively), reusing the cached entries of files that did not change.

    root: a folder of videos, with labels as read_labels finds them; or a LeRobot data set (read_episodes).
    camera: which one's videos of a LeRobot data set; None: the first by name.
    siblings: folders of other splits: classes are numbered over all of them.
    num_workers: processes; None takes one a core.
    max_bad_fraction: more unreadable files than this share of all is an error; fewer are named in a warning.
    max_frame_px: files with larger frames are bad files.

    Raises UserError: root is missing or holds no (readable) video; too many bad files; bad metadata.
    """
    root = Path(root)
    episodes = read_episodes(root, camera) if is_lerobot(root) else None
    if camera is not None and episodes is None:
        raise UserError(f"camera={camera!r}: '{root}' is no LeRobot data set (no meta/info.json): leave camera out")
    entries = index_folder(root, num_workers=num_workers, progress=progress, max_frame_px=max_frame_px)
    if episodes is not None:
        return _index_of_episodes(root, entries, episodes, max_bad_fraction)
    videos = [entry for entry in entries if isinstance(entry, Video)]
    bad = [entry for entry in entries if isinstance(entry, BadFile)]
    judge_bad_files(root, bad, len(entries), max_bad_fraction)
    class_names = _class_names([root, *siblings])
    labels = read_labels(root, videos, class_names, is_split=bool(siblings))
    return VideoIndex(
        root=root,
        videos=videos,
        bad=bad,
        labels=labels.of_videos,
        frame_labels=labels.of_frames,
        frame_label_offsets=labels.offsets,
        label_faults=labels.faults,
    )


def index_folder(
    root: Path,
    *,
    part: tuple[int, int] | None = None,
    engine: Engine = "local",
    num_workers: int | None = None,
    progress: bool = True,
    max_frame_px: int = MAX_FRAME_PX,
) -> list[Video | BadFile]:
    """Index every video under root, or bring its index up to date -> entries sorted by path.

    part: (k, n) indexes only every n-th file, from the k-th (k = 1 to n) on, for merge_parts.

    Raises UserError: root is missing or holds no video (all of them unreadable is no error here).
    """
    try:
        import av  # noqa: F401
    except ImportError:
        raise UserError("indexing videos needs PyAV, which is not installed: pip install av") from None
    if not root.is_dir():
        raise UserError(f"data root '{root}' is not a folder: give a folder that holds videos")
    paths = sorted(video_paths(root))
    if not paths:
        raise UserError(f"data root '{root}' holds no video files ({' '.join(sorted(VIDEO_EXTENSIONS))})")
    cached = _read_cache(root)
    stem, extra = "", {}
    if part is not None:
        stem, extra = _part_stem(*part), {"folder": _hash_of_paths(paths)}
        paths = paths[part[0] - 1 :: part[1]]
        if not paths:
            raise UserError(f"part {part[0]} of {part[1]} of '{root}' is empty: use fewer parts")
    known, stale = _split_by_freshness(root, paths, cached, max_frame_px)
    new = index_files(root, stale, engine=engine, num_workers=num_workers, progress=progress, max_frame_px=max_frame_px)
    fresh = {entry.path: entry for entry in new}
    entries = [known.get(path) or fresh[path] for path in paths]
    if part is not None or fresh or len(cached) != len(entries):
        _write_cache(root, entries, stem, extra)
    return [within_limit(entry, max_frame_px) for entry in entries]


def within_limit(entry: Video | BadFile, max_frame_px: int) -> Video | BadFile:
    """The same entry, or a bad file in place of a video with larger frames, which another limit let in."""
    if isinstance(entry, BadFile) or entry.width * entry.height <= max_frame_px:
        return entry
    reason = f"frames of {entry.width}x{entry.height}, more than {LIMIT_KEY}={max_frame_px}"
    return BadFile(entry.path, entry.size_bytes, entry.mtime_ns, reason)


def difference_of(before: Video, now: Video | BadFile) -> str:
    """What differs between two sets of facts about a file other than its time stamp; "" if nothing does."""
    if isinstance(now, BadFile):
        return now.reason
    for name, unit in (("size_bytes", "bytes"), ("num_frames", "frames")):
        was, has = getattr(before, name), getattr(now, name)
        if was != has:
            return f"{has:,} {unit}, {was:,} before"
    as_before = replace(now, mtime_ns=before.mtime_ns, digest=before.digest)  # an older index may have no digest
    if as_before != before or (before.digest and before.digest != now.digest):
        return "its content differs"
    return ""


def verify_folder(root: Path, *, num_workers: int | None = None, progress: bool = True) -> list[str]:
    """Read all files again and compare them with the stored index -> a sentence for each one that has changed.

    This finds what size and time do not tell. The index stays as it is.

    Raises UserError: root has no videos, or no index.
    """
    if not root.is_dir():
        raise UserError(f"data root '{root}' is not a folder: give a folder that holds videos")
    stored = _read_cache(root)
    if not stored:
        raise UserError(f"'{root}' has no index to compare with: run scripts/index_videos.py without --verify first")
    here = set(video_paths(root))
    paths = sorted(here & stored.keys())
    sizes_px = [entry.width * entry.height for entry in stored.values() if isinstance(entry, Video)]
    limit_px = max([MAX_FRAME_PX, *sizes_px])
    found = index_files(
        root,
        paths,
        engine="local",
        num_workers=num_workers,
        progress=progress,
        max_frame_px=limit_px,
    )
    changes = {path: "is gone" for path in stored.keys() - here} | {path: "is new" for path in here - stored.keys()}
    for now in found:
        before = stored[now.path]
        if isinstance(before, Video):
            if difference := difference_of(before, now):
                changes[now.path] = f"has changed ({difference})"
        elif isinstance(now, Video):
            changes[now.path] = "is readable now"
    return [f"'{path}' {changes[path]}" for path in sorted(changes)]


def merge_parts(root: Path) -> list[Video | BadFile]:
    """The parts that index_folder wrote -> the index, the same file that one run writes; the parts are removed.

    Raises UserError: parts are missing, unreadable, of another version, of different divisions, or of another
    state of the folder.
    """
    parts: dict[tuple[int, int], Path] = {}
    for folder, name in _cache_places(root):
        for path in folder.glob(f"{name}.part-*-of-*.jsonl"):
            k, _, n = path.name.removeprefix(f"{name}.part-").removesuffix(".jsonl").partition("-of-")
            if k.isdecimal() and n.isdecimal():
                parts.setdefault((int(k), int(n)), path)
    if not parts:
        raise UserError(f"'{root}' has no parts of an index: build them with --part 1/N to --part N/N")
    divisions = sorted({n for _, n in parts})
    if len(divisions) > 1:
        raise UserError(f"'{root}' has parts of {divisions[0]} and parts of {divisions[1]}: remove the older ones")
    [num_parts] = divisions
    missing = [k for k in range(1, num_parts + 1) if (k, num_parts) not in parts]
    if missing:
        raise UserError(
            f"'{root}' lacks part {missing[0]} of {num_parts}: build it with --part {missing[0]}/{num_parts}"
        )
    contents = [_read_part(path) for path in parts.values()]
    if len({header.get("folder") for header, _ in contents}) > 1:
        raise UserError(f"the {num_parts} parts of '{root}' saw different files in it: build them all anew")
    merged = sorted((entry for _, entries in contents for entry in entries), key=lambda entry: entry.path)
    _write_cache(root, merged)
    for path in parts.values():
        path.unlink()
    return merged


def index_path(root: Path) -> Path | None:
    """Where the index of root is stored; None: nowhere."""
    return next((path for path in _cache_paths(root) if path.is_file()), None)


def _index_of_episodes(
    root: Path, entries: Iterable[Video | BadFile], episodes: Episodes, max_bad_fraction: float
) -> VideoIndex:
    """Of all cameras' files, those that hold the episodes."""
    entry_of = {entry.path: entry for entry in entries}
    videos: list[Video] = []
    rows: list[int] = []
    frames: list[tuple[int, int]] = []
    bad: dict[str, BadFile] = {}
    shown_s: dict[str, NDArray[np.float64]] = {}
    for row, (path, start_s, length) in enumerate(
        zip(episodes.paths, episodes.starts_s.tolist(), episodes.lengths.tolist(), strict=True)
    ):
        entry = entry_of.get(path, BadFile(path, 0, 0, "no such file"))
        if isinstance(entry, Video):
            if path not in shown_s:
                shown_s[path] = entry.shown_s()
            start, stop = frames_of_episode(start_s, length, shown_s[path])
            if stop > entry.num_frames:
                reason = f"has {entry.num_frames} frames, but an episode in it ends at frame {stop}"
                entry = BadFile(path, entry.size_bytes, entry.mtime_ns, reason)
        if isinstance(entry, Video):
            videos.append(entry)
            rows.append(row)
            frames.append((start, stop))
        else:
            bad[path] = entry
    judge_bad_files(root, list(bad.values()), len(set(episodes.paths)), max_bad_fraction)
    offsets = episodes.first_rows[rows] - np.array([start for start, _ in frames], dtype=np.int64)
    return VideoIndex(
        root=root,
        videos=videos,
        bad=list(bad.values()),
        labels={name: values[rows] for name, values in episodes.labels.items()},
        episodes=frames,
        frame_labels=episodes.frame_labels,
        frame_label_offsets=torch.from_numpy(offsets),
        label_faults=episodes.label_faults,
    )


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


def _is_video_name(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in VIDEO_EXTENSIONS


def video_paths(root: Path) -> Iterator[str]:
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
            if _is_video_name(name):
                yield name if prefix == "." else f"{prefix}/{name}"


def _class_names(folders: Iterable[Path]) -> list[str]:
    """The sorted names of subfolders that hold videos."""
    subfolders = [path for folder in folders for path in folder.iterdir() if path.name[0] != "." and path.is_dir()]
    return sorted({path.name for path in subfolders if _holds_videos(path)})


def _holds_videos(folder: Path) -> bool:
    try:
        return any(map(_is_video_name, os.listdir(folder)))
    except OSError:  # not ours to read: os.walk passes over it too
        return False


def _split_by_freshness(
    root: Path, paths: Iterable[str], cached: dict[str, Video | BadFile], max_frame_px: int
) -> tuple[dict[str, Video | BadFile], list[str]]:
    known: dict[str, Video | BadFile] = {}
    stale: list[str] = []
    for path in paths:
        entry = cached.get(path)
        if entry is not None and not _refused_by_another_limit(entry, max_frame_px):
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


def _refused_by_another_limit(entry: Video | BadFile, max_frame_px: int) -> bool:
    if not isinstance(entry, BadFile):
        return False
    return f"{LIMIT_KEY}=" in entry.reason and not entry.reason.endswith(f"{LIMIT_KEY}={max_frame_px}")


def _cache_places(root: Path) -> list[tuple[Path, str]]:
    """Folder and stem of the index: next to the data, or in the user's cache if that is read-only."""
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    own = user_cache_dir()
    return [(root, INDEX_NAME.removesuffix(".jsonl")), *([(own, f"index-{name}")] if own else [])]


def _cache_paths(root: Path, stem: str = "") -> list[Path]:
    """Where the index (or, with its stem, a part of it) may stand."""
    return [folder / f"{name}{stem}.jsonl" for folder, name in _cache_places(root)]


def _part_stem(k: int, n: int) -> str:
    assert 1 <= k <= n, f"part {k} of {n}"
    return f".part-{k}-of-{n}"


def _read_cache(root: Path) -> dict[str, Video | BadFile]:
    for cache in _cache_paths(root):
        try:
            return {entry.path: entry for entry in _read_entries(cache)[1]}
        except FileNotFoundError:
            continue
        except _OtherVersion as error:
            log.info("the cached index '%s' is %s: building it anew", cache, error)
        except DAMAGE as error:
            log.warning("the cached index '%s' is unreadable (%s): building it anew", cache, one_line(error))
    return {}


def _read_part(path: Path) -> tuple[dict[str, Any], list[Video | BadFile]]:
    try:
        return _read_entries(path)
    except _OtherVersion as error:
        raise UserError(f"'{path}' is {error}: build it anew with the version that merges") from None
    except DAMAGE as error:
        raise UserError(f"'{path}' is unreadable ({one_line(error)}): build it anew") from None


class _OtherVersion(Exception):
    """A file of entries that another version wrote, or another program."""


def _read_entries(path: Path) -> tuple[dict[str, Any], list[Video | BadFile]]:
    """The header and the entries of a file. Raises _OtherVersion, or one of DAMAGE."""
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


def _hash_of_paths(paths: Iterable[str]) -> str:
    return hashlib.sha256(os.fsencode("\0".join(paths))).hexdigest()[:16]


def _hash_of_entries(entries: Iterable[Video | BadFile]) -> str:
    return VideoIndex(Path(), [entry for entry in entries if isinstance(entry, Video)]).content_hash


def _write_cache(
    root: Path, entries: Sequence[Video | BadFile], stem: str = "", extra: Mapping[str, str] | None = None
) -> None:
    header = INDEX_HEADER | {"content_hash": _hash_of_entries(entries), **(extra or {})}
    bad_first = sorted(entries, key=lambda entry: (isinstance(entry, Video), entry.path))
    for cache in _cache_paths(root, stem):
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(cache) as out:
                for line in (header, *map(asdict, bad_first)):
                    out.write(json.dumps(line) + "\n")
            return
        except OSError as error:
            log.info("cannot write the index to '%s' (%s)", cache, one_line(error))
    log.warning("the index of '%s' could not be cached: the next run builds it anew", root)


def split_index(index: VideoIndex, split: Literal["train", "selection", "test"]) -> VideoIndex:
    """The share of a folder without splits of its own that a split gets: 80, 10 and 10 percent.

    Whole videos (or episodes), dealt by a hash of their paths; or, where there are fewer than ten, each by time: the
    last tenth tests, the one before it selects.
    """
    order = ("train", "selection", "test")
    return share_of_split(index, order.index(split), (0.8, 0.1, 0.1))


def share_of_split(index: VideoIndex, part: int, shares: Sequence[float]) -> VideoIndex:
    """One of several parts of an index, in the proportion of shares, which add up to 1.

    Whole videos (or episodes), dealt by a hash of their paths; or, where there are fewer than ten, each by time. The
    first part gets what rounding leaves.
    """
    if len(index.videos) < MIN_VIDEOS_TO_DEAL:
        start = round(sum(shares[:part], 0.0), 6)
        return replace(index, share=(start, round(start + shares[part], 6)))
    names = [video.path for video in index.videos]
    if index.episodes is not None:
        names = [f"{path}\0{start}" for path, (start, _) in zip(names, index.episodes, strict=True)]
    order = sorted(range(len(names)), key=lambda row: hashlib.sha256(os.fsencode(names[row])).digest())
    counts = [int(len(order) * share + 1e-9) for share in shares]
    # From the last part on: the first one takes the rest.
    stop = sum(counts[part + 1 :])
    rows = order[stop:] if part == 0 else order[stop : stop + counts[part]]
    return index.rows(sorted(rows))
