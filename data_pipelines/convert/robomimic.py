"""robomimic data sets: an HDF5 file with a group data/demo_K for each episode, and lists of names in mask/.

data/demo_0/obs/agentview_image   the frames, uint8 [T, H, W, 3], of one of several cameras
data/demo_0/actions, states, rewards
mask/train, mask/valid            names of episodes: the splits. Episodes in none of them are left out.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.convert.columns import Column, choose_frames, choose_labels, clip_of_rows
from data_pipelines.convert.episodes import ALL_KEYS, Clip, Keys, checked_name, source_files
from data_pipelines.convert.hdf5 import SUFFIXES, Group, open_hdf5
from data_pipelines.errors import UserError, one_line_logger
from data_pipelines.split_folders import SPLIT_NAMES
from data_pipelines.splits import Split

log = one_line_logger(__name__)

USUAL_CAMERA = "obs/agentview_image"


class Robomimic:
    """HDF5 files with a group data/ of episodes."""

    name = "a robomimic data set"
    keys = ALL_KEYS - {"bounds"}

    def detect(self, source: Path) -> bool:
        for _, path in source_files(source, SUFFIXES):
            with naming(path), open_hdf5(path) as file:
                return file.is_group("data") and any(name.startswith("demo") for name in file.at("data").names())
        return False

    def episodes(self, source: Path, keys: Keys, siblings: Sequence[Path]) -> "list[DemoEpisode]":
        found: list[DemoEpisode] = []
        for name, path in source_files(source, SUFFIXES):
            prefix = "" if path == source else f"{name.rpartition('.')[0]}/"
            with naming(path), open_hdf5(path) as file:
                found += _episodes_of(file, name, prefix, path, keys)
        return found


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to a UserError of the block that does not name it."""
    try:
        yield
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"'{path}': {error}") from None


@dataclass(frozen=True)
class DemoEpisode:
    """The group data/DEMO of a file. columns: the data set of each label, below the group."""

    place: str
    name: str
    path: Path
    files: tuple[Path, ...]
    demo: str
    frames: str
    columns: Mapping[str, str]
    split: Split | None

    @contextmanager
    def open(self) -> Iterator[Clip]:
        with open_hdf5(self.path) as file:
            group = file.at(f"data/{self.demo}")
            columns = group.columns()
            if missing := {self.frames, *self.columns.values()} - columns.keys():
                raise UserError(f"it has no {min(missing)}")
            yield clip_of_rows(group, self.frames, self.columns, 0, columns[self.frames].shape[0])


def _episodes_of(file: Group, name: str, prefix: str, path: Path, keys: Keys) -> list[DemoEpisode]:
    demos = sorted(file.at("data").names(), key=lambda demo: [int(x) if x.isdigit() else 0 for x in _words(demo)])
    if not demos:
        raise UserError("data/ has no episodes")
    columns = next(filter(None, (_columns_of(file, demo) for demo in demos)), {})
    cameras = [key for key, column in columns.items() if key.startswith("obs/") and len(column.shape) == 4]
    key = keys.frames
    if key is None and len(cameras) > 1:
        key = USUAL_CAMERA if USUAL_CAMERA in cameras else cameras[0]
        log.info("'%s' has the cameras %s: taking %s", path, ", ".join(cameras), key)
    in_obs = {key: column for key, column in columns.items() if not key.startswith("next_obs/")}
    frames = choose_frames(in_obs if key is None else columns, key)
    labels = choose_labels(columns, keys, frames, path)
    split_of = _splits(file)
    left_out = [demo for demo in demos if split_of and demo not in split_of]
    if left_out:
        log.warning(
            "'%s': %d episodes are in no split of mask/ and left out, %s first", path, len(left_out), left_out[0]
        )
    return [
        DemoEpisode(
            f"{name}:data/{demo}", checked_name(f"{prefix}{demo}", f"{name}:data/{demo}"), path, (path,), demo, frames,
            labels, split_of.get(demo),
        )
        for demo in demos
        if not split_of or demo in split_of
    ]  # fmt: skip


def _columns_of(file: Group, demo: str) -> Mapping[str, Column]:
    """Return the data sets of an episode; none if it is damaged, which is found when it is opened."""
    return file.at(f"data/{demo}").columns() if file.is_group(f"data/{demo}") else {}


def _words(name: str) -> list[str]:
    return re.findall(r"\d+", name)


def _splits(file: Group) -> dict[str, Split]:
    """Return the split of each episode that mask/ names; empty without a list for training and another one."""
    if not file.holds("mask"):
        return {}
    names = set(file.at("mask").names())
    found = {split: next((name for name in usual if name in names), None) for split, usual in SPLIT_NAMES.items()}
    if found["train"] is None or sum(name is not None for name in found.values()) < 2:
        return {}
    return {demo: split for split, name in found.items() if name for demo in file.texts(f"mask/{name}")}
