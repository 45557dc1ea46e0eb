"""The interface of a format, and the options of loading a data set."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_pipelines.facts import MAX_FRAME_PX
from data_pipelines.index import VideoIndex
from data_pipelines.remote.stores import Store


@dataclass(frozen=True)
class LoadOptions:
    """Options of load_videos. A format reads those that concern it.

    camera: the camera whose videos to take, for formats with several; None: the first by name. Several names: the
        videos of these cameras together, in this order (VideoIndex.views).
    siblings: folders of the other splits: classes are numbered over all of them.
    max_bad_fraction: a larger fraction of unreadable files is an error; a smaller one is named in a warning.
    max_frame_px: files with larger frames are bad files.
    num_workers: processes that index; None: one per core; 0: none.
    cache_dir: folder for shards from a URL; None: in the user's cache.
    cache_mb: size limit of that folder in MiB; the least recently used shards are evicted.
    store: reads the URL of shards; None: a Store with its defaults.
    progress: show progress bars.
    """

    camera: str | Sequence[str] | None = None
    siblings: Sequence[Path] = ()
    max_bad_fraction: float = 0.1
    max_frame_px: int = MAX_FRAME_PX
    num_workers: int | None = None
    cache_dir: Path | None = None
    cache_mb: int = 0
    store: Store | None = None
    progress: bool = True

    @property
    def cameras(self) -> tuple[str, ...]:
        """The named cameras; none: the first by name."""
        return named_cameras(self.camera)


def named_cameras(camera: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the names in an option that is one name, several, or None: no name."""
    return () if camera is None else (camera,) if isinstance(camera, str) else tuple(camera)


class Format(Protocol):
    """A format of data sets.

    name: a noun phrase with its article, such as "a LeRobot data set".
    has_cameras: whether a data set may hold the same episodes as seen by several cameras, chosen by options.camera. A
        format that cannot take several together raises UserError for several names.
    """

    @property
    def name(self) -> str: ...

    @property
    def has_cameras(self) -> bool: ...

    def detect(self, root: str) -> bool:
        """Return whether `root`, a folder or a URL, is of this format. Cheap: decodes nothing, writes nothing."""

    def load(self, root: str, options: LoadOptions) -> VideoIndex:
        """Return the videos and labels of a data set. Raises UserError: it cannot be used."""
