"""The registry: which format a data set has, and formats from outside."""

import os
from pathlib import Path
from typing import Any

import pytest

from data_pipelines import split_folders as split_folders_module
from data_pipelines.convert.run import Conversion, convert
from data_pipelines.errors import UserError
from data_pipelines.formats.base import Format, LoadOptions
from data_pipelines.formats.image_folders import ImageFolders
from data_pipelines.formats.lerobot import LeRobot
from data_pipelines.formats.registry import FORMATS, detect_format, load_videos
from data_pipelines.formats.tar_shards import ShardFolder, ShardUrl
from data_pipelines.formats.video_folder import VideoFolder
from data_pipelines.index import VideoIndex
from data_pipelines.shards.index_file import SHARDS_NAME
from data_pipelines.shards.scan import index_shards
from data_pipelines.split_folders import load_split, split_folders


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], VideoFolder),
        (["a.mp4", "b/c.png"], VideoFolder),
        (["b/c.png"], ImageFolders),
        (["c.png"], VideoFolder),  # no folder of its own: a message says what is missing
        (["a.tar"], ShardFolder),
        (["a.tar", "b/c.mp4"], VideoFolder),
        ([SHARDS_NAME, "a.mp4"], ShardFolder),
        (["meta/info.json", "videos/a.mp4"], LeRobot),
        (["meta/info.json", SHARDS_NAME], ShardFolder),
    ],
)
def test_the_first_format_that_fits_is_taken(tmp_path: Path, files: list[str], expected: type) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert type(detect_format(str(tmp_path))) is expected


def test_a_url_is_a_url_of_shards_whatever_it_is() -> None:
    assert type(detect_format("https://localhost/videos")) is ShardUrl


def test_every_format_has_a_name_for_messages() -> None:
    assert len({format.name for format in FORMATS}) == len(FORMATS)
    assert all(format.name.split()[0] in ("a", "an") for format in FORMATS)


class FirstVideoOnly:
    """A format from outside this package."""

    name = "a test"
    has_cameras = True

    def detect(self, root: str) -> bool:
        return False

    def load(self, root: str, options: LoadOptions) -> VideoIndex:
        assert options.camera == "front"
        return load_videos(root, progress=options.progress).rows([0])


def test_a_format_is_passed_as_an_object(tmp_path: Path, write_video: Any) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name)
    own: Format = FirstVideoOnly()
    index = load_videos(tmp_path, format=own, camera="front", progress=False)
    assert [video.path for video in index.videos] == ["a.mp4"]
    with pytest.raises(UserError, match="is a folder of video files, which has no cameras: leave camera out"):
        load_videos(tmp_path, camera="front", progress=False)


def test_a_root_that_the_system_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = os.stat

    def refuse(path: Any, **options: Any) -> os.stat_result:
        if "locked/" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    reasons = {tmp_path / "locked": "Permission denied", tmp_path / ("long" * 70): "File name too long"}
    for root, reason in reasons.items():
        for use in (
            lambda root: load_split(str(root), "train"),
            lambda root: load_split(str(root), None),
            lambda root: load_videos(root, format=VideoFolder()),
            lambda root: convert(root, tmp_path / "out", Conversion()),
            index_shards,
            split_folders,
        ):
            with pytest.raises(UserError, match=f"{root.name}' cannot be read: {reason}"):
                use(root)


@pytest.mark.parametrize(("named", "taken"), [("/", "/"), ("/a/b//", "/a/b"), ("a/", "a")])
def test_the_root_of_the_file_system_is_a_root(monkeypatch: pytest.MonkeyPatch, named: str, taken: str) -> None:
    taken_roots: list[str] = []
    monkeypatch.setattr(split_folders_module, "load_videos", lambda root, **options: taken_roots.append(root))
    load_split(named, None)
    assert taken_roots == [taken]


def test_a_folder_without_videos_and_one_that_is_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no video files .* and no folders of images"):
        load_videos(tmp_path, progress=False)
    with pytest.raises(UserError, match="missing' is not a folder"):
        load_videos(tmp_path / "missing", progress=False)
