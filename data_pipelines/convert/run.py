"""Convert a data set: list its episodes, write those that are missing, note each as it is finished (output.py).

A conversion that was stopped continues, and a source that changed is noticed: by the sizes and times of its files, and
then by its frames and labels.
"""

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from data_pipelines.convert.episodes import PROVENANCE, Episode, Keys, Layout, label_fields
from data_pipelines.convert.output import (
    PARTIAL_NAME,
    ROWS_NAME,
    SETTINGS_NAME,
    Row,
    appending,
    discard_videos,
    pack_output,
    read_rows,
    start_output,
    write_rows,
)
from data_pipelines.convert.registry import find_episodes
from data_pipelines.convert.video_files import source_digest, write_clip
from data_pipelines.errors import UserError, one_line_logger, printable
from data_pipelines.files import MAX_LINE_BYTES, check_reachable, write_errors
from data_pipelines.indexing.probe import stamp_of
from data_pipelines.labels import METADATA_NAME
from data_pipelines.processes import ending, spawned_pool
from data_pipelines.shards.packing import check_shard_mb, replaced_folder

log = one_line_logger(__name__)

DEFAULT_FPS = 10
MAX_PENDING = 16


@dataclass(frozen=True)
class Conversion:
    """The settings of a conversion.

    fps: frames per second where the source states none.
    crf: quality of x264, 0 to 51; None: lossless.
    in_shards: pack the videos into tar shards.
    skip_bad: leave out episodes that cannot be converted.
    overwrite: replace a conversion with other settings or of a source that has changed.
    num_processes: processes that write videos; with 1, this process writes them.
    """

    keys: Keys = field(default_factory=Keys)
    fps: float = DEFAULT_FPS
    crf: int | None = None
    in_shards: bool = False
    shard_mb: float = 64
    skip_bad: bool = False
    overwrite: bool = False
    num_processes: int = 1

    def __post_init__(self) -> None:
        if not 0.001 <= self.fps <= 1000:
            raise UserError(f"fps={self.fps:g} must be from 0.001 to 1000")
        if self.crf is not None and not 0 <= self.crf <= 51:
            raise UserError(f"crf={self.crf} must be from 0 (best) to 51")
        check_shard_mb(self.shard_mb)
        if self.num_processes < 1:
            raise UserError(f"num_processes={self.num_processes} must be at least 1")


class Converted(NamedTuple):
    """The result.

    num_kept: videos of an earlier run that were kept.
    bad: the episodes that were left out, and the reasons.
    psnr_db: for each episode that was not stored lossless.
    """

    layout: str
    num_videos: int
    num_kept: int
    bad: Mapping[str, str]
    psnr_db: Mapping[str, float]


MORE_EPISODES = "it has more episodes than the shards"


class SourceChangedError(UserError):
    """The source is not the one that the output was begun with."""

    def __init__(self, how: str) -> None:
        super().__init__(
            f"the source has changed since its conversion was begun: {how}. Name another folder, or overwrite this one"
        )
        self.how = how

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return type(self), (self.how,)


def convert(source: Path, out: Path, settings: Conversion) -> Converted:
    """Convert a data set into a folder of videos with metadata.jsonl, or of shards.

    A finished output stays as it is. An interrupted one is continued.

    Raises UserError: the source cannot be read, has no known layout or nothing that can be converted; it has changed
    since the output was begun; `out` holds something else; episodes are bad and skip_bad is not given; a file cannot be
    written.
    """
    check_reachable(source)
    if source.is_dir() and out.absolute().resolve().is_relative_to(source.absolute().resolve()):
        raise UserError(f"'{out}' is in the source '{source}': name a folder outside of it")
    layout, episodes = find_episodes(source, settings.keys)
    try:
        with write_errors(out):
            beside = _beside(out) if settings.in_shards else out
            is_packed = settings.in_shards and (out / SETTINGS_NAME).is_file() and not settings.overwrite
            place, rows_name = (out, ROWS_NAME) if is_packed else (beside, METADATA_NAME)
            if settings.in_shards and not is_packed:
                for split in episodes:
                    replaced_folder(out / split)
            start_output(place, out, _facts(layout, settings), overwrite=settings.overwrite)
            if is_packed:
                discard_videos(beside)
            result = _convert_all(place, episodes, settings, layout.name, rows_name)
            if place != out:
                pack_output(place, out, list(episodes), settings.shard_mb)
            return result
    except BrokenProcessPool:
        raise UserError(
            f"a process that read '{source}' has died: a file of it crashes a decoder, or memory ran out; use fewer "
            "processes, or find the file by converting parts"
        ) from None


def _beside(out: Path) -> Path:
    """Return the folder of the videos that become shards. Raises UserError: shards would replace the current folder."""
    if out.resolve() == Path.cwd():
        raise UserError("shards replace their folder, which must not be the current one: name another folder")
    return out.with_name(f".{out.name}.videos")


def _facts(layout: Layout, settings: Conversion) -> dict[str, Any]:
    """Return what convert.json states: all that decides about the content of the videos and labels."""
    facts = {"layout": layout.name, "keys": asdict(settings.keys), "fps": settings.fps, "crf": settings.crf,
             "shards": settings.in_shards}  # fmt: skip
    return json.loads(json.dumps(facts))


class _Job(NamedTuple):
    """An episode to write, or to compare with the row of an earlier run, if there is one."""

    episode: Episode
    folder: Path
    fps: Fraction
    crf: int | None
    row: Row | None
    in_shards: bool

    @property
    def name(self) -> str:
        return f"{self.episode.name}.mp4"

    @property
    def has_video(self) -> bool:
        """True if the video of the row exists."""
        path = self.folder / self.name
        is_file = self.row is not None and path.is_file() and str(path.stat().st_size) == self.row["video_bytes"]
        return self.in_shards or is_file

    @property
    def is_done(self) -> bool:
        """True if the episode is finished, and its files have their old sizes and times."""
        return self.row is not None and self.row["source_stamp"] == _stamp(self.episode) and self.has_video


def _convert_all(
    place: Path, episodes: Mapping[str, Sequence[Episode]], settings: Conversion, layout: str, rows_name: str
) -> Converted:
    bad: dict[str, str] = {}
    all_rows: list[Row] = []
    num_kept = 0
    count = settings.num_processes
    with ending(ThreadPoolExecutor(1) if count == 1 else spawned_pool(count)) as pool:
        for split, group in episodes.items():
            rows, kept, failed = _convert_split(pool, place / split, group, settings, rows_name, split or "all")
            all_rows += rows
            num_kept += kept
            bad |= failed
    if bad and (not settings.skip_bad or not all_rows):
        place_of_first, reason = next(iter(bad.items()))
        raise UserError(
            f"{len(bad)} of {len(all_rows) + len(bad)} episodes cannot be converted; the first is '{place_of_first}' "
            f"({reason}): repair or remove them, or skip bad episodes, and start again: the others are kept"
        )
    psnr_db = {row["source"]: float(row["psnr_db"]) for row in all_rows if "psnr_db" in row}
    return Converted(layout, len(all_rows), num_kept, bad, psnr_db)


def _convert_split(
    pool: Executor, folder: Path, episodes: Sequence[Episode], settings: Conversion, rows_name: str, title: str
) -> tuple[list[Row], int, dict[str, str]]:
    """Convert the missing episodes. Return the rows, the number of those kept from before, and the bad episodes."""
    folder.mkdir(exist_ok=True)
    rows = {row["file_name"]: row for name in (rows_name, PARTIAL_NAME) for row in read_rows(folder / name)}
    fps, in_shards = Fraction(settings.fps).limit_denominator(100_000), rows_name == ROWS_NAME
    jobs = [_Job(e, folder, fps, settings.crf, rows.get(f"{e.name}.mp4"), in_shards) for e in episodes]
    if gone := rows.keys() - {job.name for job in jobs}:
        raise SourceChangedError(f"it no longer has the episode of '{min(gone)}'")
    pending = [job for job in jobs if not job.is_done]
    if in_shards and not settings.skip_bad and any(job.row is None for job in pending):
        raise SourceChangedError(MORE_EPISODES)
    bad: dict[str, str] = {}
    if pending:
        with appending(folder / PARTIAL_NAME) as note, tqdm(total=len(pending), desc=title, unit="video") as bar:
            for job, (row, reason) in _results(pool, pending):
                bar.update()
                if row is None:
                    rows.pop(job.name, None)
                    bad[job.episode.place] = reason
                    log.warning("'%s' cannot be converted: %s", job.episode.place, reason)
                else:
                    rows[job.name] = row
                    note(row)
    ordered = [rows[job.name] for job in jobs if job.name in rows]
    if ordered and (pending or not (folder / rows_name).is_file()) and (settings.skip_bad or not bad):
        write_rows(folder, rows_name, ordered)
    return ordered, len(jobs) - len(pending), bad


def _results(pool: Executor, jobs: Sequence[_Job]) -> Iterator[tuple[_Job, tuple[Row | None, str]]]:
    """Yield the jobs in order with what _work returned. Few are pending at a time."""
    pending: deque[tuple[_Job, Future[tuple[Row | None, str]]]] = deque()
    remaining = iter(jobs)
    while True:
        while len(pending) < MAX_PENDING and (job := next(remaining, None)) is not None:
            pending.append((job, pool.submit(_work, job)))
        if not pending:
            return
        job, future = pending.popleft()
        yield job, future.result()


def _stamp(episode: Episode) -> str:
    try:
        return " ".join("{}:{}".format(*stamp_of(path)) for path in episode.files)
    except OSError:
        return "missing"


def _work(job: _Job) -> tuple[Row | None, str]:
    """Write an episode, or compare it with its row. Returns its row, or None and the reason why there is none.

    Raises SourceChangedError; OSError: the video cannot be written.
    """
    stamp = _stamp(job.episode)
    failed: OSError | None = None
    try:
        with job.episode.open() as clip:
            labels = label_fields(clip)
            if job.row is None and job.in_shards:  # those that were left out must still be bad
                source_digest(clip, job.crf)
                raise SourceChangedError(MORE_EPISODES)
            if job.row is not None:
                before = {key: value for key, value in job.row.items() if key not in ("file_name", *PROVENANCE)}
                if labels != before or source_digest(clip, job.crf) != job.row["source_digest"]:
                    raise SourceChangedError(f"'{job.episode.place}' has other frames or labels")
                if job.has_video:
                    return job.row | {"source_stamp": stamp}, ""
            try:
                written = write_clip(job.folder / job.name, clip, job.fps, job.crf)
            except OSError as error:  # open_hdf5 would take it for a damaged source
                failed = error
    except SourceChangedError:
        raise
    except UserError as error:
        return None, str(error)
    if failed is not None:
        raise failed
    row = {
        "file_name": job.name,
        "source": printable(job.episode.place),
        "source_stamp": stamp,
        "source_digest": written.digest,
        "video_bytes": str(written.size_bytes),
        **({} if written.psnr_db is None else {"psnr_db": f"{written.psnr_db:.2f}"}),
        **labels,
    }
    return (row, "") if len(json.dumps(row)) < MAX_LINE_BYTES else (None, "its labels are too large: keep fewer labels")
