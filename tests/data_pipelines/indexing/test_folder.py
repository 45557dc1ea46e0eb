"""The index: facts about good files, reasons for bad ones, the cache, labels."""

import json
import logging
import os
import tracemalloc
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from data_pipelines import containers, files
from data_pipelines.decoders import read_frames
from data_pipelines.errors import UserError
from data_pipelines.facts import BadFile, Video
from data_pipelines.files import user_cache_dir
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.indexing import index_file as index_file_module
from data_pipelines.indexing import parallel, probe
from data_pipelines.indexing.folder import index_folder, merge_parts
from data_pipelines.indexing.index_file import INDEX_HEADER, INDEX_NAME, index_path
from data_pipelines.indexing.probe import index_file
from data_pipelines.shards.packing import pack_videos


def _index(root: Path, **arguments: Any) -> VideoIndex:
    return load_videos(root, **({"progress": False, "num_workers": 0} | arguments))


def test_facts_of_a_video_with_b_frames(tmp_path: Path, write_video: Any) -> None:
    options = {"g": "12", "bf": "3", "sc_threshold": "0"}
    write_video(tmp_path / "v.mp4", num_frames=50, size=(47, 63), pix_fmt="yuv444p", options=options, fps=25)
    video = index_file(tmp_path, "v.mp4")
    assert isinstance(video, Video)
    assert (video.num_frames, video.fps, video.height, video.width) == (50, 25, 47, 63)
    assert video.duration_s == pytest.approx(2.0)
    assert video.keyframes == (0, 12, 24, 36, 48)
    assert len(video.keyframe_pts) == 5


def test_times_are_kept_only_where_they_vary(tmp_path: Path, write_video: Any) -> None:
    """A constant rate is one number, though Matroska rounds to milliseconds and a file may start late."""
    steady = [5000 + round(i * 1001 / 30) for i in range(200)]
    for name in ("v.mp4", "v.mkv"):
        write_video(tmp_path / name, times_ms=steady)
        video = index_file(tmp_path, name)
        assert isinstance(video, Video)
        assert video.frame_ms == ()
        assert video.fps == pytest.approx(30000 / 1001, rel=1e-4)
        assert video.shown_s() == pytest.approx(np.array(steady) / 1000 - 5, abs=0.0011)
        write_video(tmp_path / name, times_ms=[100, 133, 166, 300, 333])
        video = index_file(tmp_path, name)
        assert isinstance(video, Video)
        assert video.frame_ms == (33, 33, 134, 33)
        assert video.shown_s() == pytest.approx([0, 0.033, 0.066, 0.2, 0.233])
    (tmp_path / "v.mp4").unlink()
    index = _index(tmp_path)
    assert index.videos == [video] == _index(tmp_path).videos  # the second time from the cache


@pytest.mark.parametrize("name", ["v.mkv", "v.mov", "v.ts", "v.avi", "v.webm"])
def test_containers(tmp_path: Path, write_video: Any, name: str) -> None:
    codec = {"v.webm": "libvpx", "v.avi": "mpeg4"}.get(name, "libx264")
    write_video(tmp_path / name, num_frames=30, codec=codec)
    video = index_file(tmp_path, name)
    assert isinstance(video, Video), video
    assert (video.num_frames, video.height, video.width) == (30, 48, 64)
    assert video.fps == pytest.approx(10)
    assert video.keyframes[0] == 0


def test_a_file_in_another_format_than_its_name_says(tmp_path: Path, write_video: Any) -> None:
    write_video(tmp_path / "v.mkv", num_frames=20).rename(tmp_path / "v.mp4")
    video = index_file(tmp_path, "v.mp4")
    assert isinstance(video, Video)
    assert video.num_frames == 20


def _damage(root: Path, write_video: Any) -> dict[str, str]:
    """Bad files, and a part of the reason that the index must give for each."""
    good = write_video(root / "good.mp4", num_frames=60, container_options={"movflags": "faststart"})
    data = good.read_bytes()
    (root / "zero.mp4").write_bytes(b"")
    (root / "text.mp4").write_text("this is no video\n" * 100)
    (root / "cut.mp4").write_bytes(data[: len(data) * 3 // 4])
    plain = write_video(root / "plain.mp4", num_frames=60).read_bytes()
    (root / "headless.mp4").write_bytes(plain[: len(plain) // 2])
    (root / "dangling.mp4").symlink_to(root / "nowhere.mp4")
    _write_audio(root / "audio.mp4")
    return {
        "zero.mp4": "0 bytes",
        "text.mp4": "Invalid data",
        "cut.mp4": "truncated",
        "headless.mp4": "Invalid data",
        "dangling.mp4": "No such file",
        "audio.mp4": "no video stream",
    }


def _write_audio(path: Path) -> None:
    import av
    import numpy as np

    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("aac", rate=16000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        frame.pts = 0
        out.mux(stream.encode(frame))
        out.mux(stream.encode())


def test_bad_files_are_listed_with_reasons_and_named_in_a_warning(
    tmp_path: Path, write_video: Any, caplog: pytest.LogCaptureFixture
) -> None:
    reasons = _damage(tmp_path, write_video)
    with caplog.at_level(logging.WARNING):
        index = _index(tmp_path, max_bad_fraction=0.9)
    assert [video.path for video in index.videos] == ["good.mp4", "plain.mp4"]
    found = {entry.path: entry.reason for entry in index.bad}
    assert found.keys() == reasons.keys()
    for path, reason in reasons.items():
        assert reason in found[path], path
        assert path in caplog.text
    assert "6 of 8 video files are bad" in caplog.text
    with pytest.raises(UserError, match=r"6 of 8 .*max_bad_fraction=0.1.*'audio.mp4' \(no video stream\)"):
        _index(tmp_path)


def test_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing' is not a folder"):
        _index(tmp_path / "missing")
    with pytest.raises(UserError, match="holds no video files"):
        _index(tmp_path)
    (tmp_path / "bad.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of 1 video files is readable; the first is 'bad.mp4'"):
        _index(tmp_path, max_bad_fraction=1.0)


def test_subfolders_are_walked_sorted_and_hidden_files_left_alone(tmp_path: Path, write_video: Any) -> None:
    for name in ("b/2.mp4", "a.mp4", "b/10.MP4", ".hidden/x.mp4", "._a.mp4"):
        write_video(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no video")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    assert [video.path for video in _index(tmp_path).videos] == ["a.mp4", "b/10.MP4", "b/2.mp4"]


def test_cache_is_reused_and_only_what_changed_is_read_again(
    tmp_path: Path, write_video: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        write_video(tmp_path / name)
    read: list[str] = []

    def spy(root: str, path: str, *limit: int) -> Video | BadFile:
        read.append(path)
        return index_file(root, path, *limit)

    monkeypatch.setattr(parallel, "index_file", spy)
    first = _index(tmp_path)
    assert read == ["a.mp4", "b.mp4", "c.mp4"]
    assert _index(tmp_path) == first
    assert len(read) == 3
    write_video(tmp_path / "b.mp4", num_frames=12)
    write_video(tmp_path / "d.mp4")
    (tmp_path / "a.mp4").unlink()
    second = _index(tmp_path)
    assert read[3:] == ["b.mp4", "d.mp4"]
    assert [(video.path, video.num_frames) for video in second.videos] == [
        ("b.mp4", 12),
        ("c.mp4", 9),
        ("d.mp4", 9),
    ]
    assert second.content_hash != first.content_hash
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied"),
        OSError(24, "Too many open files"),
        av.error.MemoryError(12, "No memory"),
    ],
)
def test_a_file_that_the_system_refused_is_read_again(
    tmp_path: Path, write_video: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(path: str) -> Any:
        if path.endswith("b.mp4"):
            raise error
        return containers.open_container(path)

    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name)
    with monkeypatch.context() as refusing:
        refusing.setattr(probe, "open_container", refuse)
        assert [entry.path for entry in _index(tmp_path, max_bad_fraction=0.5).bad] == ["b.mp4"]
    assert [video.path for video in _index(tmp_path).videos] == ["a.mp4", "b.mp4"]


def test_content_hash_does_not_depend_on_time_stamps(tmp_path: Path, write_video: Any) -> None:
    write_video(tmp_path / "a.mp4")
    before = _index(tmp_path).content_hash
    os.utime(tmp_path / "a.mp4", (1, 1))
    assert _index(tmp_path).content_hash == before


@pytest.mark.parametrize("text", ['{"format": "worldmodel-video-index", "version": 0}\n', "garbage\n", "", None])
def test_a_cache_of_another_version_or_a_broken_one_is_built_anew(
    tmp_path: Path, write_video: Any, text: str | None
) -> None:
    write_video(tmp_path / "a.mp4")
    first = _index(tmp_path)
    cache = tmp_path / INDEX_NAME
    cut_off = cache.read_text()[:-20]
    cache.write_text(cut_off if text is None else text)
    assert _index(tmp_path) == first
    header = json.loads(cache.read_text().splitlines()[0])
    assert header == INDEX_HEADER | {"content_hash": first.content_hash}


def test_a_folder_that_cannot_be_written_is_cached_at_home(
    tmp_path: Path, write_video: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, home = tmp_path / "data", tmp_path / "home"
    home.mkdir()
    monkeypatch.setattr(Path, "home", lambda: home)
    write_video(root / "a.mp4")
    (root / INDEX_NAME).mkdir()  # stands in the way (a read-only folder does not stop a superuser)
    first = _index(root)
    assert len(list((home / ".cache" / "worldmodel").iterdir())) == 1
    monkeypatch.setattr(parallel, "index_file", None)
    assert _index(root) == first


def test_an_outdated_index_that_cannot_be_written_does_not_hide_the_one_at_home(
    tmp_path: Path, write_video: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, home, read = tmp_path / "data", tmp_path / "home", []
    monkeypatch.setattr(Path, "home", lambda: home)

    def spy(folder: Path, path: str, *limit: int) -> Video | BadFile:
        read.append(path)
        return index_file(folder, path, *limit)

    def refuse(path: Path, **options: Any) -> Any:
        if path.is_relative_to(root):
            raise PermissionError(13, "Permission denied")
        return files.replacing(path, **options)

    write_video(root / "a.mp4")
    _index(root)
    os.utime(root / INDEX_NAME, ns=(0, 10**18))
    monkeypatch.setattr(parallel, "index_file", spy)
    with monkeypatch.context() as unwritable:
        unwritable.setattr(index_file_module, "replacing", refuse)
        for name in ("b.mp4", "c.mp4"):
            write_video(root / name)
            for _ in range(2):
                found = _index(root)
        assert read == ["b.mp4", "c.mp4"] and len(found.videos) == 3
        stored = index_path(root)
        assert stored is not None and stored.is_relative_to(home)
    os.utime(stored, ns=(0, 15 * 10**17))
    write_video(root / "d.mp4")
    assert len(_index(root).videos) == len(_index(root).videos) == 4
    assert read == ["b.mp4", "c.mp4", "d.mp4"] and index_path(root) == root / INDEX_NAME


def test_processes_give_the_same_index(tmp_path: Path, write_video: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_video(tmp_path / "0.mp4").read_bytes()
    for i in range(1, 12):
        (tmp_path / f"{i}.mp4").write_bytes(data if i != 7 else b"")
    serial = _index(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    monkeypatch.setattr(parallel, "FILES_PER_PROCESS", 2)
    assert _index(tmp_path, num_workers=2) == serial
    assert [entry.path for entry in serial.bad] == ["7.mp4"]


def test_the_index_file_begins_with_its_hash_and_the_bad_files(tmp_path: Path, write_video: Any) -> None:
    for name in ("a.mp4", "c.mp4"):
        write_video(tmp_path / name)
    (tmp_path / "b.mp4").write_bytes(b"")
    index = _index(tmp_path, max_bad_fraction=0.5)
    header, bad, *videos = map(json.loads, (tmp_path / INDEX_NAME).read_text().splitlines())
    assert header == {"format": "worldmodel-video-index", "version": 4, "content_hash": index.content_hash}
    assert (bad["path"], bad["reason"]) == ("b.mp4", "empty file (0 bytes)")
    assert [video["path"] for video in videos] == ["a.mp4", "c.mp4"]


def test_a_changed_index_file_is_noticed(tmp_path: Path, write_video: Any, caplog: pytest.LogCaptureFixture) -> None:
    write_video(tmp_path / "a.mp4")
    first = _index(tmp_path)
    cache = tmp_path / INDEX_NAME
    cache.write_text(cache.read_text().replace('"num_frames": 9', '"num_frames": 8'))
    assert _index(tmp_path) == first
    assert "content_hash does not fit" in caplog.text


def _folder_of_seven(root: Path, write_video: Any) -> None:
    data = write_video(root / "0.mp4").read_bytes()
    for i in range(1, 7):
        (root / f"{i}.mp4").write_bytes(data if i != 3 else b"")


def _index_parts(root: Path, num_parts: int) -> None:
    for k in range(1, num_parts + 1):
        index_folder(root, part=(k, num_parts), num_workers=0, progress=False)


def test_parts_merge_into_the_file_that_one_run_writes(tmp_path: Path, write_video: Any) -> None:
    _folder_of_seven(tmp_path, write_video)
    whole = index_folder(tmp_path, num_workers=0, progress=False)
    cache = tmp_path / INDEX_NAME
    expected = cache.read_bytes()
    cache.unlink()
    _index_parts(tmp_path, 3)
    assert not cache.exists()
    assert len(list(tmp_path.glob(".worldmodel_index.part-*-of-3.jsonl"))) == 3
    assert merge_parts(tmp_path) == whole
    assert cache.read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".mp4"] == [INDEX_NAME]


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path, write_video: Any) -> None:
    with pytest.raises(UserError, match=r"has no parts of an index: build all parts first"):
        merge_parts(tmp_path)
    _folder_of_seven(tmp_path, write_video)
    _index_parts(tmp_path, 3)
    second = tmp_path / ".worldmodel_index.part-2-of-3.jsonl"
    text = second.read_text()

    second.unlink()
    with pytest.raises(UserError, match=r"lacks part 2 of 3 of its index: build it first"):
        merge_parts(tmp_path)
    second.write_text(text.replace('"version": 4', '"version": 1'))
    with pytest.raises(UserError, match=r"part-2-of-3.jsonl' is not of version 4: build it again"):
        merge_parts(tmp_path)
    second.write_text(text[:-20])
    with pytest.raises(UserError, match=r"part-2-of-3.jsonl' is unreadable \("):
        merge_parts(tmp_path)

    (tmp_path / "00.mp4").write_bytes((tmp_path / "0.mp4").read_bytes())
    index_folder(tmp_path, part=(2, 3), num_workers=0, progress=False)
    with pytest.raises(UserError, match=r"the 3 parts of .* list different files: build all of them again"):
        merge_parts(tmp_path)

    index_folder(tmp_path, part=(1, 2), num_workers=0, progress=False)
    with pytest.raises(UserError, match=r"has parts of 2 and parts of 3: remove the older ones"):
        merge_parts(tmp_path)
    assert not (tmp_path / INDEX_NAME).exists()


def test_a_part_of_very_many_takes_no_memory(tmp_path: Path) -> None:
    """The name of a part states how many there are."""
    (tmp_path / ".worldmodel_index.part-1-of-300000.jsonl").touch()
    tracemalloc.start()
    with pytest.raises(UserError, match=r"lacks part 2 of 300000 of its index: build it first"):
        merge_parts(tmp_path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2**20


def test_more_parts_than_files_are_merged(tmp_path: Path, write_video: Any) -> None:
    """As where several splits are indexed in as many parts."""
    for number in range(2):
        write_video(tmp_path / f"{number}.mp4", video=number)
    for part in range(1, 5):
        assert len(index_folder(tmp_path, part=(part, 4), num_workers=0, progress=False)) == (part <= 2)
    assert [entry.path for entry in merge_parts(tmp_path)] == ["0.mp4", "1.mp4"]


@pytest.mark.parametrize("packed", [False, True], ids=["files", "shards"])
def test_files_with_large_frames_are_left_out_and_read_again_when_the_limit_changes(
    tmp_path: Path, write_video: Any, caplog: pytest.LogCaptureFixture, packed: bool
) -> None:
    root = tmp_path / "videos"
    for number in range(3):
        write_video(root / f"{number}.mp4", size=(48, 64))
    write_video(root / "large.mp4", size=(96, 128))

    def paths(max_frame_px: int) -> list[str]:
        return [video.path for video in load_videos(root, max_frame_px=max_frame_px, **settings).videos]

    settings: dict[str, Any] = {"progress": False, "max_bad_fraction": 0.5}
    small, everything = [f"{number}.mp4" for number in range(3)], ["0.mp4", "1.mp4", "2.mp4", "large.mp4"]
    if packed:
        pack_videos(root, tmp_path / "shards", progress=False)
        root = tmp_path / "shards"
    for limit, found in ((96 * 128 - 1, small), (96 * 128, everything), (5000, small), (48 * 64, small)):
        caplog.clear()
        assert sorted(paths(limit)) == found
        named = f"'large.mp4' (frames of 128x96, more than data.max_frame_px={limit})"
        assert (named in caplog.text) == (found == small)
    with pytest.raises(UserError, match=rf"none of 4 .*data\.max_frame_px={48 * 64 - 1}"):
        paths(48 * 64 - 1)


def test_a_file_name_that_is_not_utf8_is_read(tmp_path: Path, write_video: Any) -> None:
    write_video(tmp_path / "a.mp4").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n.mp4"))
    write_video(tmp_path / "b.mp4")
    for _ in range(2):  # found, and read from the cached index
        index = load_videos(tmp_path, progress=False)
        assert [video.path for video in index.videos] == ["b.mp4", "caf\udce9\n.mp4"] and len(index.content_hash) == 16
    frames = list(read_frames(tmp_path / index.videos[1].path, channels=1, size_px=None))
    assert len(frames) == 9
    (tmp_path / "b.mp4").write_bytes(b"nothing")
    os.rename(tmp_path / "b.mp4", os.fsencode(tmp_path) + b"/\xff.mp4")
    with pytest.raises(UserError, match=r"1 of 2 video files are bad.*'\\udcff.mp4'") as caught:
        load_videos(tmp_path, progress=False)
    assert str(caught.value).isprintable()


def test_a_user_without_a_home_needs_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write_video: Any) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    write_video(tmp_path / "a.mp4")
    for home in ("", None):
        monkeypatch.setattr(Path, "home", no_home)
        monkeypatch.setenv("HOME", "") if home == "" else monkeypatch.delenv("HOME")
        assert user_cache_dir() is None
        assert len(load_videos(tmp_path, progress=False).videos) == 1


def test_a_subfolder_that_cannot_be_read_is_named(
    tmp_path: Path, write_video: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_video(tmp_path / "a.mp4")
    write_video(tmp_path / "locked" / "b.mp4")
    scan, list_names = os.scandir, os.listdir

    def refuse(call: Any, path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return call(path)

    monkeypatch.setattr(os, "scandir", lambda path: refuse(scan, path))
    monkeypatch.setattr(os, "listdir", lambda path: refuse(list_names, path))
    assert [video.path for video in _index(tmp_path).videos] == ["a.mp4"]
    assert f"folder '{tmp_path}/locked' cannot be read and is left out: Permission denied" in caplog.text
    with pytest.raises(UserError, match="locked' cannot be read: Permission denied"):
        _index(tmp_path, siblings=[tmp_path / "locked"])
