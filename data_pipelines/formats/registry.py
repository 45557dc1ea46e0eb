"""The formats of data sets, and loading a data set of any of them.

To add a format: write one file in this folder with a class that has the members of `Format` (base.py), and add an
instance to FORMATS. `detect` should look for a file that only this format has; the first format that detects a data
set loads it. `load` returns a VideoIndex: each row is a video file that FFmpeg can open, with labels. index_folder
(data_pipelines/indexing) indexes the video files of a folder; formats/lerobot.py is an example with tables, and
formats/video_folder.py the simplest one.

A format from outside this package needs no entry: pass an instance as load_videos(root, format=...), or name its class
in a config as data.format=package.module:Class.
"""

from pathlib import Path
from typing import Any

from data_pipelines.errors import UserError
from data_pipelines.files import check_reachable
from data_pipelines.formats.base import Format, LoadOptions
from data_pipelines.formats.image_folders import ImageFolders
from data_pipelines.formats.lerobot import LeRobot
from data_pipelines.formats.tar_shards import ShardFolder, ShardUrl
from data_pipelines.formats.video_folder import VideoFolder
from data_pipelines.index import VideoIndex

FORMATS: tuple[Format, ...] = (ShardUrl(), ShardFolder(), LeRobot(), ImageFolders(), VideoFolder())
"""In the order of detection. VideoFolder takes any folder, and its messages say what is missing."""


def detect_format(root: str) -> Format:
    """Return the format of a data set: a folder, or a URL."""
    return next(format for format in FORMATS if format.detect(root))


def load_videos(root: str | Path, *, format: Format | None = None, **options: Any) -> VideoIndex:
    """Load a data set: a folder, or the URL of one.

    format: None detects it.
    options: the fields of LoadOptions.

    Raises UserError: the folder is missing, cannot be read, holds no readable video or too many bad files; its metadata
    is broken; a package that the format needs is not installed; the data set has no such camera, or none at all.
    """
    check_reachable(root)
    chosen, loading = format or detect_format(str(root)), LoadOptions(**options)
    if loading.cameras and not chosen.has_cameras:
        named = ", ".join(map(repr, loading.cameras))
        raise UserError(f"camera={named}: '{root}' is {chosen.name}, which has no cameras: leave camera out")
    return chosen.load(str(root), loading)
