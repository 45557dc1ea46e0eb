"""The videos of one split: those of its folder, or a share of all videos."""

from collections.abc import Sequence
from pathlib import Path

from data_pipelines.errors import one_line_logger
from data_pipelines.facts import MAX_FRAME_PX
from data_pipelines.files import check_reachable
from data_pipelines.formats.base import Format
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.remote.stores import Store, is_url
from data_pipelines.shards.index_file import SHARDS_NAME
from data_pipelines.splits import SPLITS, Split, share_of_split, split_index

logger = one_line_logger(__name__)

SPLIT_NAMES: dict[Split, Sequence[str]] = {
    "train": ("train",), "selection": ("selection", "validation", "val", "valid", "dev"), "test": ("test",),
}  # fmt: skip
REMOTE_CACHE_MB = 16_384  # of shards from a URL
PARTS: dict[Split, tuple[float, float]] = {"train": (0.9, 0.1), "selection": (0.5, 0.5)}
"""The shares of two splits with a common folder, by the first of them. Without a folder for selection, it gets a tenth
of train/. Without one for test, it gets half of the held-out videos."""


def load_split(
    root: str,
    split: Split | None,
    *,
    format: Format | None = None,
    camera: str | Sequence[str] | None = None,
    max_bad_fraction: float = 0.1,
    max_frame_px: int = MAX_FRAME_PX,
    cache_dir: Path | None = None,
    cache_mb: int = REMOTE_CACHE_MB,
) -> VideoIndex:
    """Index the videos of a split: those of its folder, or a share of all videos if there are no folders per split.

    split: None: all videos under root.
    root: a folder of videos or of shards, a LeRobot data set, or the URL of shards.
    Other arguments, and errors: as for load_videos.
    """
    root = root.rstrip("/") or root[:1]  # the root of the file system
    folders = split_folders(root) if split else None
    index = load_videos(
        folders[split] if folders and split else root,
        format=format,
        camera=camera,
        siblings=[Path(folder) for folder in dict.fromkeys(folders.values())] if folders else [],
        max_bad_fraction=max_bad_fraction,
        max_frame_px=max_frame_px,
        cache_dir=cache_dir,
        cache_mb=cache_mb,
    )
    if split is None:
        return index
    if folders is None:
        return split_index(index, split)
    sharing = [other for other in SPLITS if folders[other] == folders[split]]
    if len(sharing) == 1:
        return index
    if split == sharing[0]:
        logger.info("'%s' has no folder for %s: %s share '%s'", root, sharing[1], " and ".join(sharing), folders[split])
    return share_of_split(index, sharing.index(split), PARTS[sharing[0]])


def split_folders(root: str | Path) -> dict[Split, str] | None:
    """Return the subfolder of each split; None unless there is one for training and one other.

    Names are in lower case, Capitalised or in UPPER CASE. A split without a folder shares the folder of another split.

    Raises UserError: the root cannot be read.
    """
    check_reachable(root)
    folders: dict[Split, str] = {}
    for split, names in SPLIT_NAMES.items():
        spelt = (f"{root}/{spell(name)}" for name in names for spell in (str.lower, str.capitalize, str.upper))
        if (found := next(filter(_is_folder, spelt), None)) is not None:
            folders[split] = found
    if "train" not in folders or len(folders) < 2:
        return None
    if "test" not in folders:
        folders["test"] = folders["selection"]
    if "selection" not in folders:
        folders["selection"] = folders["train"]
    return folders


def _is_folder(path: str) -> bool:
    """Return whether a folder exists. Behind a URL it must be a folder of shards."""
    return Store(path).holds(SHARDS_NAME) if is_url(path) else Path(path).is_dir()
