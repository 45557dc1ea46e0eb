"""Folders of images: each subfolder with images is a video, and its images in name order are the frames.

    root/a/0001.png, root/a/0002.png, ...      the video "a"
    root/walk/b/0001.jpg, ...                  the video "walk/b", of the class "walk" if there are several

The images of a folder must have one extension, one size and one orientation (in EXIF). The frame rate is unknown, so
every image is one frame and cannot be resampled by time (data.fps).
"""

import posixpath
from pathlib import Path

from data_pipelines.formats.base import LoadOptions
from data_pipelines.formats.video_folder import load_labelled
from data_pipelines.index import VideoIndex
from data_pipelines.indexing.folder import image_folders, video_paths


class ImageFolders:
    """Folders of images below a folder without video files. Metadata names the folders: {"file_name": "walk/b"}."""

    name = "a folder of image folders"
    has_cameras = False

    def detect(self, root: str) -> bool:
        folder = Path(root)
        return folder.is_dir() and not any(video_paths(folder)) and any(image_folders(folder))

    def load(self, root: str, options: LoadOptions) -> VideoIndex:
        videos = {path for folder in [Path(root), *options.siblings] for path in image_folders(folder)}
        class_names = sorted({posixpath.dirname(path) for path in videos if path.count("/") == 1})
        return load_labelled(Path(root), class_names, options)
