"""The layouts that can be converted, and finding the layout and the episodes of a source.

To add a layout: write one file in this folder with a class that has the members of `Layout` (episodes.py), and add an
instance to LAYOUTS. A layout of files of arrays is a `Table` (columns.py): it only needs a function that opens a file.
animations.py is a simple example, lerobot.py one with tables.
"""

from collections.abc import Sequence
from pathlib import Path

from data_pipelines.convert.animations import SUFFIXES as ANIMATION_SUFFIXES
from data_pipelines.convert.animations import Animations
from data_pipelines.convert.episodes import ALL_KEYS, Episode, Keys, Layout, source_files
from data_pipelines.convert.hdf5 import HDF5_TABLE
from data_pipelines.convert.image_folders import ImageFolders
from data_pipelines.convert.lance import Lance
from data_pipelines.convert.lerobot import LeRobotV2
from data_pipelines.convert.npz import NPZ_TABLE
from data_pipelines.convert.robomimic import Robomimic
from data_pipelines.errors import UserError, one_line_logger, printable
from data_pipelines.formats.registry import detect_format
from data_pipelines.indexing.folder import video_paths
from data_pipelines.split_folders import split_folders
from data_pipelines.splits import SPLITS, Split

log = one_line_logger(__name__)

LAYOUTS: tuple[Layout, ...] = (
    LeRobotV2(), Lance(), Robomimic(), HDF5_TABLE, NPZ_TABLE, ImageFolders(), Animations(),
)  # fmt: skip
"""In the order of detection."""

SUFFIXES = (*HDF5_TABLE.suffixes, *NPZ_TABLE.suffixes, *ANIMATION_SUFFIXES)
"""Of files that hold episodes in one of the layouts."""


def detect_layout(source: Path) -> Layout:
    """Return the layout of a file or folder. Raises UserError: there is none, or training reads it as it is."""
    if not source.exists():
        raise UserError(f"'{source}' does not exist")
    for layout in LAYOUTS:
        if layout.detect(source):
            return layout
    known = ", ".join(layout.name for layout in LAYOUTS)
    if source.is_dir():
        found = detect_format(str(source))
        if found.name != "a folder of video files" or any(video_paths(source)):
            raise UserError(f"'{source}' is {found.name}, which is read as it is: data.root={source}")
    raise UserError(f"'{source}' has no layout that is known: {known}")


def find_episodes(source: Path, keys: Keys) -> tuple[Layout, dict[str, list[Episode]]]:
    """Return the layout, and the episodes of each folder of the output: "" or the splits. Raises UserError."""
    folders = split_folders(source) if source.is_dir() else None
    found: list[tuple[Split | None, Episode]] = []
    if folders:
        named = {folder: split for split, folder in reversed([(split, folders[split]) for split in SPLITS])}
        for folder, split in sorted(named.items(), key=lambda item: SPLITS.index(item[1])):
            layout = detect_layout(Path(folder))
            siblings = [Path(name) for name in named]
            found += [(split, episode) for episode in layout.episodes(Path(folder), keys, siblings)]
    else:
        layout = detect_layout(source)
        found = [(episode.split, episode) for episode in layout.episodes(source, keys, ())]
    _check_keys(layout, keys)
    splits = {split for split, _ in found}
    if not ("train" in splits and len(splits - {None}) > 1):
        episodes = {"": [episode for _, episode in found]}
    else:
        episodes = {split: [e for s, e in found if s == split] for split in SPLITS if split in splits}
        if None in splits:
            log.warning("'%s': episodes that are in none of its splits are left out", source)
    for group in episodes.values():
        _check_names(group)
    if not found:
        raise UserError(f"'{source}' has no episodes")
    used = {path for _, episode in found for path in episode.files}
    if others := [name for name, path in source_files(source, SUFFIXES) if path not in used]:
        more = f" and {len(others) - 1:,} more are" if len(others) > 1 else " is"
        log.warning("'%s' is converted as %s: '%s'%s left out", source, layout.name, printable(others[0]), more)
    return layout, episodes


def _check_keys(layout: Layout, keys: Keys) -> None:
    for name in sorted(ALL_KEYS - layout.keys):
        if value := getattr(keys, name):
            raise UserError(f"{name}={value!r}: {layout.name} has no such key: leave it out")


def _check_names(episodes: Sequence[Episode]) -> None:
    places: dict[str, str] = {}
    for episode in episodes:
        other = places.setdefault(episode.name.casefold(), episode.place)
        if other is not episode.place:
            raise UserError(f"'{other}' and '{episode.place}' would have the same name '{episode.name}': rename one")
