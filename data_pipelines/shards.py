"""Videos in tar shards, laid out as WebDataset has it: KEY.mp4 and KEY.json (labels) side by side.

Beside the shards stands one index, shards.jsonl: a header; for each shard its name, size and sha256; for each video its
facts and labels, its shard, and where its bytes start in it. With that a shard is read in place, or fetched from afar,
and never unpacked.
"""

import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from hashlib import file_digest, sha256
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from tqdm.auto import tqdm

from data_pipelines.errors import UserError, one_line_logger
from data_pipelines.facts import MAX_INT, SHARD_NAME
from data_pipelines.files import bounded_lines, written_whole
from data_pipelines.index import (
    VIDEO_EXTENSIONS,
    VideoIndex,
    judge_bad_files,
    load_or_build_index,
    video_paths,
    within_limit,
)
from data_pipelines.labels import stack_labels
from data_pipelines.probe import MAX_FRAME_PX, BadFile, Video, entry_from_fields, index_member, one_line
from data_pipelines.remote import RemoteShards, default_cache_dir
from data_pipelines.stores import Shard, Store, is_url

log = one_line_logger(__name__)

SHARDS_NAME = "shards.jsonl"
SHARDS_HEADER = {"format": "worldmodel-shards", "version": 1}
MAX_FRAMES_OF_ALL = 2**32  # of an index: 4.5 years at 30 frames a second
MAX_LISTS = 2**26  # of an index: one for each 16 of the most bytes that are read of it
MAX_LABELS_BYTES = 2**20
MAX_HEADER_BYTES = 2**20  # of one member of a tar
MAX_GLOBAL_HEADERS = 1000  # of pax, which each member of a tar inherits

Entry = tuple[Video | BadFile, Mapping[str, Any]]  # and its labels


def load_videos(
    root: str | Path,
    *,
    camera: str | None = None,
    siblings: Sequence[Path] = (),
    max_bad_fraction: float = 0.1,
    cache_dir: Path | None = None,
    cache_mb: int = 0,
    store: Store | None = None,
    progress: bool = True,
    max_frame_px: int = MAX_FRAME_PX,
) -> VideoIndex:
    """Index a folder of videos, a folder of shards, or the URL of one (data_pipelines.stores.SCHEMES).

    camera, siblings, max_bad_fraction, max_frame_px: as for load_or_build_index. Shards know no cameras.
    cache_dir, cache_mb: where shards from a URL are kept, by default in the user's cache, and how much of it is used.
    store: how to read the URL, to change more than that.

    Raises UserError: as load_or_build_index; a damaged index of shards, one that does not fit them; a URL without one.
    """
    in_shards = is_url(root) or holds_shards(Path(root))
    if camera is not None and in_shards:
        raise UserError(f"camera={camera!r}: '{root}' holds shards, not a LeRobot data set: leave camera out")
    if is_url(root):
        store = store or Store(str(root).rstrip("/"))
        text = store.read(SHARDS_NAME)
        if text is None:
            raise UserError(
                f"'{store.url}' holds no {SHARDS_NAME}: run scripts/make_shards.py --index on a copy of the shards and "
                "put the file that it writes beside them (shards of plain videos: scripts/make_shards.py SOURCE OUT)"
            )
        shards, entries = _parse(text, f"{store.url}/{SHARDS_NAME}")
        cache_dir = (cache_dir or default_cache_dir()).absolute()
        folder = cache_dir / sha256(text).hexdigest()[:16]
        remote = RemoteShards(store, shards, cache_dir, folder, cache_mb * 2**20)
        return _make_index(folder, entries, store.url, max_bad_fraction, max_frame_px, remote)
    if not in_shards:
        return load_or_build_index(
            root,
            camera=camera,
            siblings=siblings,
            max_bad_fraction=max_bad_fraction,
            progress=progress,
            max_frame_px=max_frame_px,
        )
    root = Path(root)
    if not (root / SHARDS_NAME).is_file():
        index_shards(root, progress=progress)
    shards, entries = _parse_file(root / SHARDS_NAME)
    listed = {name: shard.size_bytes for name, shard in shards.items()}
    found = {path.name: path.stat().st_size for path in _tars(root)}
    for name in sorted(listed | found):
        if listed.get(name) != found.get(name):
            raise UserError(
                f"'{root / name}' has {_bytes(found.get(name))}, but {SHARDS_NAME} says {_bytes(listed.get(name))}: "
                f"copy the shards again, or delete {SHARDS_NAME} to index those that are here"
            )
    return _make_index(root, entries, str(root), max_bad_fraction, max_frame_px, None)


def verify_shards(root: Path, *, progress: bool = True) -> list[str]:
    """Compare all shards of a folder with the checksums in their index -> a sentence for each one that has changed.

    Raises UserError: there is no index, or it is damaged.
    """
    if not (root / SHARDS_NAME).is_file():
        raise UserError(f"'{root}' has no {SHARDS_NAME} to compare with: run scripts/make_shards.py --index first")
    shards, _ = _parse_file(root / SHARDS_NAME)
    here = {path.name for path in _tars(root)}
    changes = {name: "is gone" for name in shards.keys() - here} | {name: "is new" for name in here - shards.keys()}
    for name in tqdm(sorted(here & shards.keys()), desc="hashing", unit="shard", disable=not progress):
        with open(root / name, "rb") as tar:
            if file_digest(tar, "sha256").hexdigest() != shards[name].sha256:
                changes[name] = "has changed (its sha256 differs)"
    return [f"'{name}' {changes[name]}" for name in sorted(changes)]


def _bytes(size_bytes: int | None) -> str:
    return "no file" if size_bytes is None else f"{size_bytes:,} bytes"


def holds_shards(root: Path) -> bool:
    """Whether a folder holds shards: their index, or tars and no videos beside them or in its subfolders."""
    if (root / SHARDS_NAME).is_file():
        return True
    return root.is_dir() and bool(_tars(root)) and next(video_paths(root), None) is None


def _tars(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.suffix.lower() == ".tar" and path.is_file())


def _make_index(
    root: Path,
    entries: Iterable[Entry],
    where: str,
    max_bad_fraction: float,
    max_frame_px: int,
    remote: RemoteShards | None,
) -> VideoIndex:
    entries = [(within_limit(entry, max_frame_px), labels) for entry, labels in entries]
    videos = [(video, labels) for video, labels in entries if isinstance(video, Video)]
    bad = [video for video, _ in entries if isinstance(video, BadFile)]
    if not entries:
        raise UserError(f"the shards of '{where}' hold no videos ({' '.join(sorted(VIDEO_EXTENSIONS))})")
    judge_bad_files(where, bad, len(entries), max_bad_fraction)
    videos.sort(key=lambda entry: (entry[0].shard, entry[0].offset_bytes))
    rows = [labels for _, labels in videos]
    all_names = set().union(*rows)
    if missing := [video.path for video, labels in videos if not labels.keys() >= all_names]:
        log.warning("'%s': labels that not all videos have are left out, '%s' lacks some", where, missing[0])
    labels = stack_labels(rows, [video for video, _ in videos])
    return VideoIndex(
        root=root,
        videos=[video for video, _ in videos],
        bad=bad,
        labels=labels.of_videos,
        frame_labels=labels.of_frames,
        frame_label_offsets=labels.offsets,
        label_faults=labels.faults,
        remote=remote,
    )


# --------------------------------------------------------------------------------------------------- the index file


def _parse_file(path: Path) -> tuple[dict[str, Shard], list[Entry]]:
    """Parse a file as _parse_lines does. Raises UserError also where it cannot be read."""
    try:
        with open(path, "rb") as lines:
            return _parse_lines(lines, str(path))
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {one_line(error)}") from None


def _parse(text: bytes, where: str) -> tuple[dict[str, Shard], list[Entry]]:
    """Parse bytes as _parse_lines does."""
    return _parse_lines(io.BytesIO(text), where)


def _parse_lines(lines: BinaryIO, where: str) -> tuple[dict[str, Shard], list[Entry]]:
    """The shards by name and what they hold. Raises UserError unless each line means something within a shard.

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
                shard = _checked_shard(Shard(**fields))
                shards[shard.name] = shard
                continue
            labels = fields.pop("labels", {})
            if not isinstance(labels, dict):
                raise ValueError("its labels are not an object")
            entry = entry_from_fields(fields), labels
            if entry[0].path in paths:
                raise ValueError(f"'{entry[0].path}' is there twice")
            if isinstance(entry[0], Video):
                if not _lies_within(entry[0], shards):
                    raise ValueError("it lies outside of its shard")
                num_frames += entry[0].num_frames
                if num_frames > MAX_FRAMES_OF_ALL:
                    raise ValueError(f"the videos up to there have more than {MAX_FRAMES_OF_ALL:,} frames")
            paths.add(entry[0].path)
            entries.append(entry)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(
            f"'{where}' is damaged in line {number} ({one_line(error)}): make it anew with scripts/make_shards.py "
            "--index"
        ) from None
    return shards, entries


def _checked_shard(shard: Shard) -> Shard:
    """Raises ValueError: a value has another type, or is out of range."""
    if not (isinstance(shard.name, str) and SHARD_NAME.fullmatch(shard.name)):
        raise ValueError(f"name {shard.name!r} is not a valid name of a shard")
    if type(shard.size_bytes) is not int or not 0 <= shard.size_bytes <= MAX_INT:
        raise ValueError(f"size_bytes {shard.size_bytes!r} is not a possible size")
    if not (isinstance(shard.sha256, str) and re.fullmatch("[0-9a-f]{64}", shard.sha256)):
        raise ValueError(f"sha256 {shard.sha256!r} is not 64 hexadecimal digits")
    return shard


def _lies_within(video: Video, shards: Mapping[str, Shard]) -> bool:
    stop = video.offset_bytes + video.size_bytes
    return 0 <= video.offset_bytes < stop <= shards[video.shard].size_bytes


def _write_index(folder: Path, entries: Iterable[Entry], progress: bool) -> None:
    with written_whole(folder / SHARDS_NAME) as out:
        out.write(json.dumps(SHARDS_HEADER) + "\n")
        for path in tqdm(_tars(folder), desc="hashing", unit="shard", disable=not progress):
            with open(path, "rb") as tar:
                digest = file_digest(tar, "sha256").hexdigest()
            out.write(json.dumps(asdict(Shard(path.name, path.stat().st_size, digest))) + "\n")
        for video, labels in entries:
            fields = asdict(video)
            out.write(json.dumps(fields | {"labels": labels} if labels else fields) + "\n")


# ---------------------------------------------------------------------------------------------------------- packing


def pack_videos(
    source: Path,
    out: Path,
    *,
    siblings: Sequence[Path] = (),
    shard_mb: float = 64,
    seed: int = 0,
    progress: bool = True,
) -> VideoIndex:
    """Pack a folder of videos into shards, in an order shuffled by `seed`; `out` appears when it is complete.

    Shards are read one at a time: shuffled, each of them is a sample of the whole. The same source and seed give the
    same bytes. Labels go along.

    siblings: folders of other splits, as for load_or_build_index.

    Raises UserError: no readable videos, a LeRobot data set (whose files hold several episodes), `out` exists and is
    not empty, a file that changes meanwhile.
    """
    if not shard_mb > 0:
        raise UserError(f"shard_mb={shard_mb:g} must be more than 0")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"'{out}' is not an empty folder: name another one for the shards")
    index = load_or_build_index(source, siblings=siblings, progress=progress)
    if index.episodes is not None:
        raise UserError(f"'{source}' is a LeRobot data set, whose files hold several episodes: it is read as it is")
    rows = np.argsort(np.random.Generator(np.random.PCG64(seed)).random(len(index.videos)), kind="stable").tolist()
    aside = out.absolute().with_name(f".{out.name}.packing")
    _make_packing_folder(aside)
    try:
        entries: list[Entry] = []
        with tqdm(total=len(rows), desc="packing", unit="video", disable=not progress) as bar:
            for number, members in enumerate(_fill_shards(index, rows, int(shard_mb * 2**20))):
                shard = f"shard-{number:06d}.tar"
                with tarfile.open(aside / shard, "w", format=tarfile.USTAR_FORMAT) as tar:
                    for row in members:
                        entries.append(_add_sample(tar, shard, index, row))
                        bar.update()
        _write_index(aside, entries, progress)
        if out.exists():
            out.rmdir()
        os.replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return load_videos(out, progress=progress)


def _make_packing_folder(aside: Path) -> None:
    """Make an empty folder, in place of one that a pack left that was killed.

    Raises UserError: it holds anything but shards and their index, or is a link, or cannot be made.
    """
    try:
        if aside.is_dir() and not aside.is_symlink():
            if not all(SHARD_NAME.fullmatch(path.name) or SHARDS_NAME in path.name for path in aside.iterdir()):
                raise UserError(f"'{aside}' holds other files than shards: move it away")
            shutil.rmtree(aside)
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"'{aside}' cannot be made ({one_line(error)}): move it away, or name another folder") from None


def _fill_shards(index: VideoIndex, rows: Iterable[int], shard_bytes: int) -> Iterator[list[int]]:
    """Rows of the index, cut into shards of at most shard_bytes of video, or one video that is larger."""
    members: list[int] = []
    size_bytes = 0
    for row in rows:
        if members and size_bytes + index.videos[row].size_bytes > shard_bytes:
            yield members
            members, size_bytes = [], 0
        members.append(row)
        size_bytes += index.videos[row].size_bytes
    yield members


def _add_sample(tar: tarfile.TarFile, shard: str, index: VideoIndex, row: int) -> Entry:
    video = index.videos[row]
    path = PurePosixPath(video.path)
    # A key ends at the first dot; its number keeps apart what becomes equal without odd characters.
    key = f"{row:08d}_{re.sub(r'[^A-Za-z0-9-]+', '_', str(path.with_suffix('')))[-60:]}"
    labels = {name: values[row].tolist() for name, values in index.labels.items()}
    if index.frame_label_offsets is not None:
        first = int(index.frame_label_offsets[row])
        frames = slice(first, first + video.num_frames)
        labels |= {name: values[frames].tolist() for name, values in index.frame_labels.items()}
    with open(index.root / video.path, "rb") as file:
        if os.fstat(file.fileno()).st_size != video.size_bytes:
            raise UserError(f"'{index.root / video.path}' has changed while it was packed: start again")
        offset = tar.offset + tarfile.BLOCKSIZE
        tar.addfile(_member(key + path.suffix.lower(), video.size_bytes), file)
    described = json.dumps({"file_name": video.path, **labels}).encode()
    tar.addfile(_member(f"{key}.json", len(described)), io.BytesIO(described))
    fields = asdict(video) | {"mtime_ns": 0, "shard": shard, "offset_bytes": offset}
    return Video(**fields), labels


def _member(name: str, size_bytes: int) -> tarfile.TarInfo:
    """Without times and owners, so that equal videos make equal shards."""
    member = tarfile.TarInfo(name)
    member.size = size_bytes
    return member


# ------------------------------------------------------------------------------------------------- shards of others


def index_shards(folder: Path, progress: bool = True) -> None:
    """Index the shards that are in a folder, by their headers and by probing the videos; writes shards.jsonl there.

    A member that is no video is passed over; one that cannot be used is listed with the reason.
    Raises UserError: no shards, names that a URL would need to quote, a folder that cannot be written.
    """
    tars = _tars(folder) if folder.is_dir() else []
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
        _write_index(folder, entries, progress)
    except OSError as error:
        raise UserError(
            f"'{folder / SHARDS_NAME}' cannot be written ({one_line(error)}): index a copy of the shards"
        ) from None


def _scan_shard(folder: Path, shard: str) -> Iterator[Entry]:
    """Each video of a foreign shard, called SHARD/MEMBER (keys need be unique within a shard only), and its labels."""
    videos: dict[str, tuple[str, Video | BadFile]] = {}  # by path
    labels: dict[str, dict[str, Any]] = {}
    size_bytes = os.path.getsize(folder / shard)
    damage = ""
    try:
        with _Headers(folder / shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in _members(tar, file):
                key, suffix = _split_name(member.name)
                path = f"{shard}/{member.name}"
                if suffix == ".json" and member.isreg() and 0 <= member.size <= MAX_LABELS_BYTES:
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
    if damage:
        yield BadFile(shard, size_bytes, 0, damage), {}
    for key, video in videos.values():
        yield video, labels.get(key, {})


class _Headers(io.FileIO):
    """A tar of which `budget` bytes are read before it is set anew: tarfile believes any length of a header."""

    budget = MAX_HEADER_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= self.budget:
            raise tarfile.ReadError(f"a member's header is longer than {MAX_HEADER_BYTES:,} bytes")
        self.budget -= size
        return super().read(size) or b""


def _members(tar: tarfile.TarFile, file: _Headers) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, without keeping them. Raises tarfile.ReadError where it does not lead forwards."""
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
    """'a/b.left.mp4' -> 'a/b', '.mp4': WebDataset's key ends at the first dot of the last part."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}", os.path.splitext(base)[1].lower()


def _why_refused(member: tarfile.TarInfo, shard_bytes: int) -> str:
    """Why not to read a member of a tar from a stranger, or ''."""
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
    """Whether a tar's end mark stands where its last header was looked for; tarfile ends silently at damage."""
    with open(path, "rb") as tar:
        tar.seek(offset)
        return tar.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _read_object(tar: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, Any]:
    file = tar.extractfile(member)
    assert file is not None, f"{member.name} is regular"
    try:
        value = json.loads(file.read())
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
