"""Videos in tar shards, in a folder or behind a URL, with the index of data_pipelines/shards alongside."""

from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from data_pipelines.errors import UserError, one_line_logger
from data_pipelines.facts import BadFile, Video
from data_pipelines.formats.base import LoadOptions
from data_pipelines.index import VideoIndex, check_bad_fraction, within_limit
from data_pipelines.indexing.folder import VIDEO_EXTENSIONS, video_paths
from data_pipelines.labels import stack_labels
from data_pipelines.remote.cache import RemoteShards, default_cache_dir
from data_pipelines.remote.stores import Store, is_url
from data_pipelines.shards.index_file import SHARDS_NAME, Entry, parse_shards, read_shards, tars_in
from data_pipelines.shards.scan import index_shards

log = one_line_logger(__name__)


class ShardFolder:
    """A folder of shards. They are indexed first if there is no index."""

    name = "a folder of shards"
    has_cameras = False

    def detect(self, root: str) -> bool:
        folder = Path(root)
        if (folder / SHARDS_NAME).is_file():
            return True
        # Tars next to videos, or above them, are not the data set.
        return folder.is_dir() and bool(tars_in(folder)) and not any(video_paths(folder))

    def load(self, root: str, options: LoadOptions) -> VideoIndex:
        folder = Path(root)
        if not (folder / SHARDS_NAME).is_file():
            index_shards(folder, progress=options.progress)
        shards, entries = read_shards(folder / SHARDS_NAME)
        listed = {name: shard.size_bytes for name, shard in shards.items()}
        found = {path.name: path.stat().st_size for path in tars_in(folder)}
        for name in sorted(listed | found):
            if listed.get(name) != found.get(name):
                raise UserError(
                    f"'{folder / name}' has {_bytes(found.get(name))}, but {SHARDS_NAME} lists "
                    f"{_bytes(listed.get(name))}: copy the shards again, or delete {SHARDS_NAME} to index those that "
                    "are here"
                )
        return _make_index(folder, entries, root, options, None)


class ShardUrl:
    """The URL of a folder of shards with an index. The shards are fetched when they are needed."""

    name = "a URL of shards"
    has_cameras = False

    def detect(self, root: str) -> bool:
        return is_url(root)

    def load(self, root: str, options: LoadOptions) -> VideoIndex:
        store = options.store or Store(root.rstrip("/"))
        text = store.read(SHARDS_NAME)
        if text is None:
            raise UserError(
                f"'{store.shown}' holds no {SHARDS_NAME}: index a copy of the shards, and upload the {SHARDS_NAME} "
                "that this writes to the same folder"
            )
        shards, entries = parse_shards(text, f"{store.shown}/{SHARDS_NAME}")
        cache_dir = (options.cache_dir or default_cache_dir()).absolute()
        folder = cache_dir / sha256(text).hexdigest()[:16]
        remote = RemoteShards(store, shards, cache_dir, folder, options.cache_mb * 2**20)
        return _make_index(folder, entries, store.shown, options, remote)


def _bytes(size_bytes: int | None) -> str:
    return "no file" if size_bytes is None else f"{size_bytes:,} bytes"


def _make_index(
    root: Path, entries: Iterable[Entry], where: str, options: LoadOptions, remote: RemoteShards | None
) -> VideoIndex:
    """Make the index of the entries that shards.jsonl lists; messages call the data set `where`. Raises UserError."""
    entries = [(within_limit(entry, options.max_frame_px), labels) for entry, labels in entries]
    videos = [(video, labels) for video, labels in entries if isinstance(video, Video)]
    bad = [video for video, _ in entries if isinstance(video, BadFile)]
    if not entries:
        raise UserError(f"the shards of '{where}' hold no videos ({' '.join(sorted(VIDEO_EXTENSIONS))})")
    check_bad_fraction(where, bad, len(entries), options.max_bad_fraction)
    videos.sort(key=lambda entry: (entry[0].shard, entry[0].offset_bytes))
    rows = [labels for _, labels in videos]
    all_names = set().union(*rows)
    if missing := [video.path for video, labels in videos if not labels.keys() >= all_names]:
        log.warning("'%s': labels that some videos lack are left out, '%s' lacks some", where, missing[0])
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
