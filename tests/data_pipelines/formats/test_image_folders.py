"""Folders of images are videos: frames in name order, labels, changes, damage, and both ways through a folder."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.clips import ClipSpec
from data_pipelines.decoders import read_frames
from data_pipelines.errors import UserError
from data_pipelines.facts import BadFile, Video
from data_pipelines.formats.image_folders import ImageFolders
from data_pipelines.formats.registry import detect_format, load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.indexing import parallel
from data_pipelines.indexing.folder import index_folder, merge_parts, verify_folder
from data_pipelines.indexing.index_file import INDEX_NAME
from data_pipelines.indexing.probe import index_file
from data_pipelines.shards.packing import pack_videos
from tests.data_pipelines.streams import read_clips

STEP = 20  # grey values from one frame to the next


def _write(folder: Path, values: Iterable[int], suffix: str = "png", size: tuple[int, int] = (24, 32)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, value in enumerate(values):
        Image.fromarray(np.full((*size, 3), value, np.uint8)).save(folder / f"frame_{number:03d}.{suffix}")


def _index(root: Path, **options: Any) -> VideoIndex:
    return load_videos(root, progress=False, num_workers=0, **options)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    _write(root / "run" / "b%03d [x]{1}", range(0, 240, STEP))
    _write(root / "walk" / "a.mp4", range(5, 185, STEP), "jpg")
    _write(root / "walk" / "c", range(10, 250, STEP), "jpeg")
    (root / "walk" / "c" / "notes.txt").write_text("no image")
    (root / "walk" / "c" / ".hidden.jpeg").write_bytes(b"")
    return root


@pytest.mark.parametrize("channels", [1, 3])
def test_frames_come_in_the_order_of_their_names(root: Path, channels: int) -> None:
    assert isinstance(detect_format(str(root)), ImageFolders)
    index = _index(root)
    assert [video.path for video in index.videos] == ["run/b%03d [x]{1}", "walk/a.mp4", "walk/c"]
    assert [(video.num_frames, video.fps) for video in index.videos] == [(12, 0.0), (9, 0.0), (12, 0.0)]
    assert index.labels["label"].tolist() == [0, 1, 1]  # run, walk
    spec = ClipSpec(num_segments=1, num_frames=3, frame_stride=2, clip_step=1)
    starts = [start for start in (0, 5, 10)]
    for batch in read_clips(index, spec, size_px=None, channels=channels, batch_size=100, num_workers=0):
        for clip, video in enumerate(batch["video"]):
            row, first = next(
                (row, clip - before)
                for row, before, num_clips in ((0, 0, 8), (1, 8, 5), (2, 13, 8))
                if clip < before + num_clips
            )
            expected = [starts[row] + STEP * (first + 2 * step) for step in range(3)]
            assert np.abs(video.float().mean((1, 2, 3)).numpy() - expected).max() < 2


def test_seeking_gives_the_frame_that_was_asked_for(tmp_path: Path) -> None:
    from data_pipelines.containers import video_url
    from data_pipelines.decoders import open_video

    _write(tmp_path / "a", range(200))
    video = index_file(tmp_path, "a")
    assert isinstance(video, Video)
    reader = open_video(video_url(tmp_path, video), video, channels=1, size_px=None, decoder="pyav")
    for frame in (150, 3, 100, 199, 0):
        assert abs(int(reader.read(frame).mean()) - frame) <= 1
    reader.close()


def test_every_image_of_a_folder_is_turned_in_the_same_way(tmp_path: Path) -> None:
    for folder, orientations in (("alike", (6, 6, 6)), ("mixed", (6, 6, 8))):
        _write(tmp_path / folder, range(0, 60, STEP), "jpg")
        for path, orientation in zip(sorted((tmp_path / folder).iterdir()), orientations, strict=True):
            exif = Image.Exif()
            exif[0x0112] = orientation
            with Image.open(path) as image:
                image.save(path, exif=exif)
    frames = list(read_frames(tmp_path / "alike", channels=1, size_px=None))
    assert [frame.shape for frame in frames] == 3 * [(1, 32, 24)]
    with pytest.raises(UserError, match="frame 2: to be turned in another way than the first image"):
        list(read_frames(tmp_path / "mixed", channels=1, size_px=None))


def test_metadata_names_the_folders(root: Path) -> None:
    (root / "metadata.csv").write_text("file_name,mass\nwalk/c,3\nwalk/a.mp4,2\nrun/b%03d [x]{1},1\n")
    assert _index(root).labels["mass"].tolist() == [1, 2, 3]


def test_classes_are_numbered_over_all_splits(tmp_path: Path) -> None:
    for name in ("train/run/a", "train/walk/b", "test/walk/c"):
        _write(tmp_path / name, range(3))
    splits = [tmp_path / "train", tmp_path / "test"]
    assert [_index(split, siblings=splits).labels["label"].tolist() for split in splits] == [[0, 1], [1]]


def test_only_changed_folders_are_read_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def spy(root: str, path: str, *limit: int) -> Video | BadFile:
        read.append(path)
        return index_file(root, path, *limit)

    monkeypatch.setattr(parallel, "index_file", spy)
    first = _index(root)
    assert _index(root).videos == first.videos and len(read) == 3
    image = root / "walk" / "c" / "frame_003.jpeg"
    status = image.stat()
    Image.fromarray(np.zeros((24, 32, 3), np.uint8)).save(image)  # in place: the folder keeps its time stamp
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    second = _index(root)
    assert read[3:] == ["walk/c"] and second.videos[2].digest != first.videos[2].digest
    assert second.videos[:2] == first.videos[:2]
    (root / "walk" / "c" / "frame_011.jpeg").unlink()
    assert verify_folder(root, num_workers=0, progress=False)[0].startswith("'walk/c' has changed (")


def test_parts_merge(root: Path) -> None:
    whole = index_folder(root, num_workers=0, progress=False)
    expected = (root / INDEX_NAME).read_bytes()
    (root / INDEX_NAME).unlink()
    for k in (1, 2):
        index_folder(root, part=(k, 2), num_workers=0, progress=False)
    assert merge_parts(root) == whole and (root / INDEX_NAME).read_bytes() == expected


def test_folders_that_cannot_be_used_are_bad_files(root: Path) -> None:
    _write(root / "mixed", range(3))
    _write(root / "mixed", range(3), "jpg")
    _write(root / "text", range(2))
    (root / "text" / "frame_000.png").write_text("no image")
    _write(root / "fifo", range(2))
    os.mkfifo(root / "fifo" / "frame_002.png")
    reasons = {entry.path: entry.reason for entry in _index(root, max_bad_fraction=0.6).bad}
    assert reasons.keys() == {"mixed", "text", "fifo"}
    assert reasons["mixed"] == "images of several kinds (.jpg, .png)"
    assert reasons["fifo"] == "frame_002.png is not a regular file"


def test_images_next_to_videos_are_not_the_data(root: Path, write_video: Any) -> None:
    write_video(root / "deep" / "down" / "v.mkv")
    assert [video.path for video in _index(root).videos] == ["deep/down/v.mkv"]


def test_image_folders_have_no_cameras_and_are_not_packed(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder of image folders, which has no cameras"):
        _index(root, camera="front")
    with pytest.raises(UserError, match="is a folder of image folders: only a folder of video files can be packed"):
        pack_videos(root, tmp_path / "out", progress=False)


def test_a_rate_cannot_be_asked_of_images(root: Path) -> None:
    with pytest.raises(UserError) as caught:
        list(read_clips(_index(root), ClipSpec(fps=5), size_px=None, channels=1, batch_size=4))
    assert re.search("fps|rate", str(caught.value))
