"""Pack a folder of video files into tar shards, in the layout of WebDataset: KEY.mp4 and KEY.json (labels)."""

import io
import json
import math
import os
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm.auto import tqdm

from data_pipelines.errors import UserError, one_line
from data_pipelines.facts import SHARD_NAME, Video
from data_pipelines.files import MAX_LINE_BYTES
from data_pipelines.formats.registry import detect_format, load_videos
from data_pipelines.formats.video_folder import VideoFolder
from data_pipelines.index import VideoIndex
from data_pipelines.shards.index_file import SHARDS_NAME, Entry, write_shards

MAX_MEMBER_BYTES = 2**33
"""The size of a file that the header of a tar archive cannot state."""
MAX_LABELS_BYTES = MAX_LINE_BYTES - 2**25
"""Of a video. The line of the index that holds them also holds the facts of the video."""


def pack_videos(
    source: Path,
    out: Path,
    *,
    siblings: Sequence[Path] = (),
    shard_mb: float = 64,
    seed: int = 0,
    progress: bool = True,
) -> VideoIndex:
    """Pack a folder of video files and their labels into shards. `out` appears when it is complete.

    The videos are shuffled by `seed`: shards are read one at a time, so each of them should be a sample of the whole.
    The same source and seed give the same bytes.

    siblings: folders of other splits, as for load_videos.
    shard_mb: MiB of video per shard; a larger video has a shard to itself.

    Raises UserError: no readable videos, another format than a folder of video files, `out` exists and is not empty or
    cannot be replaced, labels are too large, a file changes meanwhile, or a shard cannot be written.
    """
    check_shard_mb(shard_mb)
    if seed < 0:
        raise UserError(f"seed={seed} must be at least 0")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"'{out}' is not an empty folder: name another one for the shards")
    place = replaced_folder(out)
    found = detect_format(str(source))
    if not isinstance(found, VideoFolder):
        raise UserError(f"'{source}' is {found.name}: only a folder of video files can be packed; it is read as it is")
    index = load_videos(source, format=found, siblings=siblings, progress=progress)
    if large := [video.path for video in index.videos if video.size_bytes >= MAX_MEMBER_BYTES]:
        raise UserError(f"'{large[0]}' has more than 8 GiB, the most in a tar archive: cut it into parts")
    rows = np.argsort(np.random.Generator(np.random.PCG64(seed)).random(len(index.videos)), kind="stable").tolist()
    aside = place.with_name(f".{place.name}.packing")
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
        write_shards(aside, entries, progress)
        if place.exists():
            place.rmdir()
        os.replace(aside, place)
    except OSError as error:
        raise UserError(f"cannot write shards to '{out}': {one_line(error)}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return load_videos(out, progress=progress)


def check_shard_mb(shard_mb: float, stated: str = "shard_mb=") -> None:
    """Raise UserError unless a size of shards is more than 0 and finite. stated: what precedes it in the message."""
    if not 0 < shard_mb < math.inf:
        raise UserError(f"{stated}{shard_mb:g} must be more than 0, and finite")


def replaced_folder(out: Path) -> Path:
    """Return the folder that shards replace when they are complete: `out`, or the one that it is a link to.

    Raises UserError: it cannot be replaced, as it is the current folder or a mount point.
    """
    place = out.resolve()
    if place == Path.cwd() or place.is_mount():
        raise UserError(
            f"shards replace their folder '{out}', which must not be the current one or a mount point: name another "
            "folder, for example one in it"
        )
    return place


def _make_packing_folder(aside: Path) -> None:
    """Make an empty folder, in place of the one that a killed process left.

    Raises UserError: it holds anything but shards and their index, or is a link, or cannot be made.
    """
    try:
        if aside.is_dir() and not aside.is_symlink():
            if not all(SHARD_NAME.fullmatch(path.name) or SHARDS_NAME in path.name for path in aside.iterdir()):
                raise UserError(f"'{aside}' holds files other than shards: move it away")
            shutil.rmtree(aside)
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"'{aside}' cannot be made ({one_line(error)}): move it away, or name another folder") from None


def _fill_shards(index: VideoIndex, rows: Iterable[int], shard_bytes: int) -> Iterator[list[int]]:
    """Yield rows of the index per shard: at most shard_bytes of video, or one larger video."""
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
    """Append a video and its labels to a tar. Returns its entry of the index.

    Raises UserError: the file changed, or its labels are too large.
    """
    video = index.videos[row]
    path = PurePosixPath(video.path)
    # A key ends at the first dot. The number distinguishes paths that are equal without odd characters.
    key = f"{row:08d}_{re.sub(r'[^A-Za-z0-9-]+', '_', str(path.with_suffix('')))[-60:]}"
    labels = {name: values[row].tolist() for name, values in index.labels.items()}
    if index.frame_label_offsets is not None:
        first = int(index.frame_label_offsets[row])
        frames = slice(first, first + video.num_frames)
        labels |= {name: values[frames].tolist() for name, values in index.frame_labels.items()}
    described = json.dumps({"file_name": video.path, **labels}).encode()
    if len(described) > MAX_LABELS_BYTES:  # float32 takes up to 20 characters, more than in most metadata
        raise UserError(
            f"the labels of '{index.root / video.path}' take {len(described):,} bytes in an index of shards: at most "
            f"{MAX_LABELS_BYTES:,} are read, so keep fewer labels"
        )
    with open(index.root / video.path, "rb") as file:
        if os.fstat(file.fileno()).st_size != video.size_bytes:
            raise UserError(f"'{index.root / video.path}' changed while it was packed: start again")
        offset = tar.offset + tarfile.BLOCKSIZE
        tar.addfile(_member(key + path.suffix.lower(), video.size_bytes), file)
    tar.addfile(_member(f"{key}.json", len(described)), io.BytesIO(described))
    fields = asdict(video) | {"mtime_ns": 0, "shard": shard, "offset_bytes": offset}
    return Video(**fields), labels


def _member(name: str, size_bytes: int) -> tarfile.TarInfo:
    """Return a member without times and owners, so that equal videos make equal shards."""
    member = tarfile.TarInfo(name)
    member.size = size_bytes
    return member
