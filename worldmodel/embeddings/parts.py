"""A part of a collection's embeddings: some consecutive videos -> one Parquet file.

A part is a pure function of its videos, the run and the settings. It does not depend on the process or host that makes
it: its batches hold the same clips, and each process computes with one thread. The file appears when it is complete.

Each row is a segment of a video:

    file_name     path of the video below the root, as in metadata.jsonl
    first_frame   number of the segment's first frame in the file
    time_s        time of that frame in the file, in seconds; null if the file states no frame rate
    embedding     float32 [D]

Legend: B segments of a batch, N rows, T frames, C channels, H = W pixels, D embedding dimensions.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from data_pipelines.clip_decoder import ClipSet, frames_of, make_clip_set
from data_pipelines.clips import ClipSpec, Ints
from data_pipelines.errors import UserError, one_line
from data_pipelines.files import check_regular, replacing
from data_pipelines.index import VideoIndex
from data_pipelines.stream import ReadSettings, read_clips
from data_pipelines.workers import Failures
from worldmodel.runs.checkpoint import hash_of_tensors
from worldmodel.runs.trained_run import TrainedRun, load

if TYPE_CHECKING:
    import pyarrow

ROWS_PER_GROUP = 8192  # of a row group, all of whose rows are in memory at once
METADATA_KEY = b"worldmodel"


@dataclass(frozen=True)
class RunPlace:
    """A trained run as processes load it.

    weights: the hash that its weights must have, as weights_of returns it.
    """

    folder: Path
    checkpoint: Literal["latest", "best"]
    device: str
    trust_code: bool
    weights: str


@dataclass(frozen=True)
class Work:
    """Everything that the parts of a collection have in common.

    spec: of clips of one segment.
    processes: how many read videos on this host at the same time.
    """

    run: RunPlace
    spec: ClipSpec
    settings: ReadSettings
    processes: int


@dataclass(frozen=True)
class Part:
    """The videos of one part, and the file to write.

    index: of those videos that have a segment.
    num_videos: of all videos of the part.
    too_short: the others, with the reason.
    """

    path: Path
    index: VideoIndex
    num_videos: int
    too_short: Mapping[str, str]


class Finished(NamedTuple):
    """A part that was written. failed: the videos that did not decode, at least in part, with the reason."""

    num_videos: int
    failed: Mapping[str, str]


class StoredPart(NamedTuple):
    """The facts in a part's file. left_out: videos of which segments are missing, with the reason."""

    num_rows: int
    left_out: Mapping[str, str]


def weights_of(run: TrainedRun) -> str:
    """Return a hash of the weights of a run."""
    return hash_of_tensors(run.model.state_dict())


@lru_cache(maxsize=1)
def load_same(place: RunPlace) -> TrainedRun:
    """Load a run, once in each process.

    Raises:
        UserError: it cannot be loaded, or has other weights by now.
    """
    run = load(place.folder, which=place.checkpoint, device=place.device, trust_code=place.trust_code)
    if weights_of(run) != place.weights:
        raise UserError(
            f"the {place.checkpoint} checkpoint of {place.folder} has changed since this command was started: export "
            "the run, and embed with the exported folder"
        )
    return run


def embed_part(work: Work, part: Part) -> Finished:
    """Embed the videos of a part and write its file. Files that do not decode are left out.

    Raises:
        UserError: the run cannot be loaded or does not fit the clips, shards cannot be fetched, or the file cannot be
            written.
    """
    from pyarrow import ArrowException, parquet

    torch.set_num_threads(1)  # sums of several threads differ in their last bits
    run = load_same(work.run)
    failures = Failures(part.index, max_bad_fraction=1.0)
    try:
        with replacing(part.path, is_shared=True) as file, parquet.ParquetWriter(file, schema_of(run)) as writer:
            for table in in_groups(_tables(run, work, part.index, failures)):
                writer.write_table(table)
            left_out = dict(part.too_short) | {readable(path): reason for path, reason in failures.reasons.items()}
            writer.add_key_value_metadata({METADATA_KEY: json.dumps({"left_out": left_out}).encode()})
    except (OSError, ArrowException) as error:
        raise UserError(f"cannot write {part.path}: {one_line(error)}") from error
    return Finished(part.num_videos, failures.reasons)


def schema_of(run: TrainedRun) -> "pyarrow.Schema":
    """Return the columns of a part and their types."""
    import pyarrow

    embedding = pyarrow.list_(pyarrow.float32(), run.model.embedding_dim)
    columns = {"file_name": pyarrow.string(), "first_frame": pyarrow.int64(), "time_s": pyarrow.float64()}
    return pyarrow.schema(columns | {"embedding": embedding})


def _tables(run: TrainedRun, work: Work, index: VideoIndex, failures: Failures) -> Iterator["pyarrow.Table"]:
    """Yield the rows of an index, batch after batch."""
    import pyarrow

    if not index.videos:
        return
    settings, schema = work.settings, schema_of(run)
    clip_set = make_clip_set(
        index, work.spec, size_px=settings.size_px, channels=settings.channels, decoder=settings.decoder
    )
    clips = np.arange(clip_set.table.num_clips)
    for batch in read_clips(clip_set, clips, settings, ranks=work.processes, failures=failures):
        if len(batch["video"]):
            embedding = run.encode(batch["video"]).float().cpu().numpy()
            values = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(embedding.ravel()), embedding.shape[1])
            columns = _places(clip_set, batch["clip_id"].numpy()) | {"embedding": values}
            yield pyarrow.table(columns, schema)


def _places(clip_set: ClipSet, clips: Ints) -> dict[str, Any]:
    """Return the columns that say where clips with these ids [B] are."""
    rows, first_frame = clip_set.table.videos_of(clips), frames_of(clip_set, clips)[:, 0]
    videos = clip_set.index.videos
    time_s: list[float | None] = [None] * len(clips)
    for row in np.unique(rows).tolist():
        shown_s = videos[row].shown_s() if videos[row].fps else None
        for place in np.flatnonzero(rows == row).tolist():
            time_s[place] = None if shown_s is None else float(shown_s[first_frame[place]])
    names = [readable(videos[row].path) for row in rows.tolist()]
    return {"file_name": names, "first_frame": first_frame, "time_s": time_s}


def readable(path: str) -> str:
    r"""Return a path with bytes that are not UTF-8 as \xff, as Parquet and JSON files hold it."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def in_groups(tables: Iterable["pyarrow.Table"]) -> Iterator["pyarrow.Table"]:
    """Yield the rows of tables in groups of at least ROWS_PER_GROUP rows, except for the last one."""
    import pyarrow

    group: list[pyarrow.Table] = []
    for table in tables:
        group.append(table)
        if sum(map(len, group)) >= ROWS_PER_GROUP:
            yield pyarrow.concat_tables(group)
            group = []
    if group:
        yield pyarrow.concat_tables(group)


def read_part(path: Path) -> StoredPart:
    """Return the facts in the file of a part.

    Raises:
        UserError: the file is damaged, or was written by another program.
    """
    from pyarrow import ArrowException, parquet

    try:
        check_regular(path)
        metadata = parquet.read_metadata(path)
        left_out = json.loads((metadata.metadata or {})[METADATA_KEY])["left_out"]
        return StoredPart(metadata.num_rows, {str(name): str(reason) for name, reason in left_out.items()})
    except (OSError, ArrowException, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): delete it, and start again") from None
