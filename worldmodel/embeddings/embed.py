"""Embed all videos of a collection into a folder of Parquet parts, by any number of processes and hosts.

The sorted list of videos is cut into parts of a fixed number of videos. A finished part is never made again, and an
unfinished one leaves nothing behind, so each segment is in the folder exactly once, whatever was interrupted.
"""

import dataclasses
import json
import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from data_pipelines.clip_decoder import clips_of
from data_pipelines.clips import ClipSpec
from data_pipelines.contents import contents_of
from data_pipelines.decoders import resolve_decoder
from data_pipelines.errors import UserError, one_line
from data_pipelines.files import replacing
from data_pipelines.index import VideoIndex
from data_pipelines.remote.stores import is_url
from data_pipelines.stream import share_of_pass
from worldmodel.config import VideosConfig
from worldmodel.embeddings.engines import Engine, make_parts
from worldmodel.embeddings.manifest import EmbeddingsFolder, Manifest, begin_or_continue, part_locks
from worldmodel.embeddings.parts import Part, RunPlace, StoredPart, Work, read_part, readable
from worldmodel.sources.source import EVALUATION_BATCH
from worldmodel.sources.videos import load_index, read_settings
from worldmodel.training.machine import fair_share_of_cores


@dataclass(frozen=True)
class EmbedOptions:
    """The division of the work. Only `videos_per_part` changes the files, and it must be the same in all commands.

    num_processes: parts that are made at a time; None: one per core, with a GPU one, with Ray as many as its cluster
        has room for.
    host_index, num_hosts: this command makes the share `host_index` of `num_hosts`, counted from 0.
    """

    engine: Engine = "processes"
    num_processes: int | None = None
    videos_per_part: int = 64
    host_index: int = 0
    num_hosts: int = 1
    progress: bool = True


class Embedded(NamedTuple):
    """The state of the folder after a command. num_bad: videos of which segments are missing."""

    num_videos: int
    num_parts: int
    num_finished: int
    num_rows: int
    num_bad: int


def embed_collection(
    place: RunPlace, step: int, data: VideosConfig, out: Path, options: EmbedOptions | None = None
) -> Embedded:
    """Embed a share of the videos of `data.root`, all segments one after the other, and write what is missing in `out`.

    place: the run, whose checkpoint is of `step`.
    data: how the videos are read. Segments are data.clip_step frames apart; None: they follow each other as in a clip.

    Raises:
        UserError: the videos cannot be read, or more of them than data.max_bad_fraction; `out` was begun with another
            run, other settings or other videos, or cannot be written; another process writes the same parts; or as
            `make_parts`.
    """
    options = options or EmbedOptions()
    data = dataclasses.replace(data, root=_absolute(data.root))
    place = dataclasses.replace(place, folder=place.folder.absolute())
    step_frames = data.clip_step or data.num_frames * data.frame_stride  # as segments follow each other in a clip
    spec = ClipSpec(1, data.num_frames, data.frame_stride, step_frames, data.fps)
    index = load_index(data, None)
    manifest = Manifest(
        root=data.place,
        run=str(place.folder),
        step=step,
        weights=place.weights,
        settings=settings_of(data, spec, place),
        videos_per_part=options.videos_per_part,
        num_videos=len(index.videos),
        videos_hash=index.content_hash,
    )
    collection = Collection(EmbeddingsFolder(out.absolute()), manifest, index, spec)
    try:
        with part_locks(collection.folder) as locks:
            with locks.of_manifest():
                begin_or_continue(collection.folder, manifest, contents_of(index, ()))
            share = share_of_pass(manifest.num_parts, options.host_index, options.num_hosts)
            numbers = range(manifest.num_parts)[share]
            locks.take(numbers)
            _remove_unfinished(collection, numbers)
            try:
                _make_missing(collection, numbers, place, data, options)
            finally:
                stored = _write_bad(collection)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {one_line(error)}") from error
    left_out = {readable(entry.path) for entry in index.bad}.union(*(part.left_out for part in stored))
    num_rows = sum(part.num_rows for part in stored)
    return Embedded(len(index.videos), manifest.num_parts, len(stored), num_rows, len(left_out))


class Collection:
    """The videos of a collection, and their division into parts.

    Raises:
        UserError: no video is as long as a segment, or `spec.fps` is set and a video states no frame rate.
    """

    def __init__(self, folder: EmbeddingsFolder, manifest: Manifest, index: VideoIndex, spec: ClipSpec) -> None:
        self.folder, self.manifest, self.index, self.spec = folder, manifest, index, spec
        self._num_segments = np.diff(clips_of(index, spec).first_clip)
        self._unlabelled = dataclasses.replace(
            index, labels={}, frame_labels={}, frame_label_offsets=None, label_faults={}, bad=()
        )

    def path(self, number: int) -> Path:
        """Return the file of a part, counted from 0."""
        return self.folder.part(number, self.manifest.num_parts)

    def rows(self, number: int) -> range:
        """Return the rows of the index in a part."""
        size = self.manifest.videos_per_part
        return range(self.manifest.num_videos)[number * size : (number + 1) * size]

    def part(self, number: int) -> Part:
        """Return a part as processes make it."""
        rows = self.rows(number)
        long = [row for row in rows if self._num_segments[row]]
        short = sorted({readable(self.index.videos[row].path) for row in rows if not self._num_segments[row]})
        reason = f"is shorter than a segment, which takes {self.spec.span} frames"
        return Part(self.path(number), self._unlabelled.rows(long), len(rows), dict.fromkeys(short, reason))


def settings_of(data: VideosConfig, spec: ClipSpec, place: RunPlace) -> dict[str, Any]:
    """Return the settings that fix the rows of a collection, by key, as JSON holds them."""
    names = ("num_frames", "frame_stride", "fps", "size_px", "channels", "camera")
    settings = {f"data.{name}": getattr(data, name) for name in names}
    settings |= {"data.clip_step": spec.step, "data.decoder": resolve_decoder(data.decoder)}
    settings["device"] = torch.device(place.device).type
    return json.loads(json.dumps(settings))


def _absolute(root: Any) -> str:
    assert isinstance(root, str), "a collection has one root"
    return root if is_url(root) else os.path.abspath(root)


def _remove_unfinished(collection: Collection, numbers: range) -> None:
    """Remove the files that killed processes have left of these parts, whose locks this process holds."""
    names = {collection.path(number).name for number in numbers}
    for path in collection.folder.path.glob(".part-*.partial"):
        if path.name.removeprefix(".").rsplit(".", 2)[0] in names:
            path.unlink(missing_ok=True)


def _make_missing(
    collection: Collection, numbers: range, place: RunPlace, data: VideosConfig, options: EmbedOptions
) -> None:
    """Make the parts with these numbers that do not exist, with a progress bar."""
    missing = [number for number in numbers if not collection.path(number).exists()]
    uses_gpu = torch.device(place.device).type != "cpu"
    here = options.num_processes or (1 if uses_gpu else fair_share_of_cores())
    count = options.num_processes if options.engine == "ray" else max(1, min(here, len(missing)))
    # Each batch is embedded as a whole, so its size fixes the last bits.
    settings = dataclasses.replace(read_settings(data, EVALUATION_BATCH), decoder=resolve_decoder(data.decoder))
    work = Work(place, collection.spec, settings, here)
    counts = {number: len(collection.rows(number)) for number in numbers}
    total, done = sum(counts.values()), sum(counts.values()) - sum(counts[number] for number in missing)
    failed = _failed_before(collection, set(numbers) - set(missing))
    num_videos = collection.manifest.num_videos
    bar = tqdm(total=total, initial=done, desc="embedding", unit="video", disable=not options.progress)

    def check_failed() -> None:
        if len(failed) > data.max_bad_fraction * num_videos:
            path, reason = list(failed.items())[-1]
            raise UserError(
                f"{len(failed)} of {num_videos} videos do not decode or have changed, more than "
                f"data.max_bad_fraction={data.max_bad_fraction:g} allows; the last is '{path}', which {reason}: "
                f"delete the parts that {collection.folder.bad} names to embed them again, or raise the limit"
            )

    check_failed()
    with bar, closing(make_parts(options.engine, work, map(collection.part, missing), count)) as made:
        for finished in made:
            bar.update(finished.num_videos)
            failed |= finished.failed
            check_failed()


def _failed_before(collection: Collection, numbers: set[int]) -> dict[str, str]:
    """Return the reasons of the videos that failed in finished parts, by path. Short videos have not failed."""
    return {
        path: reason
        for number in sorted(numbers)
        for path, reason in read_part(collection.path(number)).left_out.items()
        if path not in collection.part(number).too_short
    }


def _write_bad(collection: Collection) -> list[StoredPart]:
    """Write the list of videos of which segments are missing. Return the facts of all finished parts, of all hosts."""
    paths = map(collection.path, range(collection.manifest.num_parts))
    stored = {path.name: read_part(path) for path in paths if path.exists()}
    rows: list[dict[str, str | None]] = [
        {"file_name": readable(entry.path), "reason": entry.reason, "part": None} for entry in collection.index.bad
    ]
    for name, part in stored.items():
        rows += [{"file_name": path, "reason": reason, "part": name} for path, reason in part.left_out.items()]
    with replacing(collection.folder.bad, is_shared=True) as file:
        file.writelines(f"{json.dumps(row)}\n".encode() for row in rows)
    return list(stored.values())
