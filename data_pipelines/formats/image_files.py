"""Image files as videos of one frame, for the source of image pairs.

    root/heron/0001.png, root/owl/0002.jpg, ...     classes are the subfolders
    root/0001.png, ..., root/metadata.csv           classes and attributes are columns of metadata

It is not in the registry of formats: there, a folder of images is one video.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_pipelines.containers import IMAGE_EXTENSIONS
from data_pipelines.errors import UserError
from data_pipelines.facts import BadFile, Video
from data_pipelines.formats.base import LoadOptions
from data_pipelines.formats.video_folder import labelled_index, names_of_classes
from data_pipelines.index import VideoIndex
from data_pipelines.indexing.folder import image_paths, index_folder, is_image_name
from data_pipelines.labels import labels_of_classes


class ImageFiles:
    """JPEG and PNG files in a folder or its subfolders (data_pipelines.formats.base.Format).

    The label "label" is the number of an image's subfolder, unless metadata states it.
    """

    name = "a folder of image files"
    has_cameras = False

    def detect(self, root: str) -> bool:
        return Path(root).is_dir() and any(image_paths(Path(root)))

    def load(self, root: str, options: LoadOptions) -> VideoIndex:
        folder = Path(root)
        if not folder.is_dir():
            raise UserError(f"data root '{root}' is not a folder: give a folder that holds images")
        paths = sorted(image_paths(folder))
        if not paths:
            raise UserError(f"data root '{root}' holds no image files ({' '.join(IMAGE_EXTENSIONS)})")
        entries = index_folder(
            folder,
            paths=paths,
            num_workers=options.num_workers,
            progress=options.progress,
            max_frame_px=options.max_frame_px,
        )
        class_names = names_of_classes([folder, *options.siblings], is_image_name)
        index = labelled_index(folder, _stills(entries), class_names, options)
        return replace(index, labels=labels_of_classes(index.videos, class_names) | index.labels)


def _stills(entries: Sequence[Video | BadFile]) -> list[Video | BadFile]:
    """Return the entries with a bad file in place of each animation."""
    return [
        BadFile(entry.path, entry.size_bytes, entry.mtime_ns, f"{entry.num_frames} frames: an animation, not an image")
        if isinstance(entry, Video) and entry.num_frames > 1
        else entry
        for entry in entries
    ]
