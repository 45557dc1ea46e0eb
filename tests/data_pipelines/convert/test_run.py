"""Conversions that are stopped, repeated, or begun again: nothing is done twice, and a changed source is noticed."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import pytest
from PIL import Image

from data_pipelines.convert import run, video_files
from data_pipelines.convert.episodes import Keys
from data_pipelines.convert.output import PARTIAL_NAME, read_rows
from data_pipelines.convert.run import Conversion, convert
from data_pipelines.errors import UserError
from data_pipelines.files import replacing
from data_pipelines.indexing.index_file import INDEX_NAME
from data_pipelines.labels import METADATA_NAME
from data_pipelines.split_folders import load_split
from data_pipelines.stream import open_videos
from tests.conftest import REPO, script_environment
from tests.data_pipelines.conftest import ReadNumbers
from tests.data_pipelines.convert.conftest import (
    LENGTHS,
    columns_of,
    painted,
    write_animations,
    write_image_folders,
    write_lerobot,
    write_npz,
    write_robomimic,
    write_stable_worldmodel,
)
from tests.data_pipelines.convert.test_layouts import frames_of, index_of

Source = Callable[[str], Path]


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.*") if path.is_file()}


def without_index(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name.endswith((".mp4", ".jsonl", ".json"))}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the videos that are written from now on."""
    names: list[str] = []
    write = run.write_clip

    def note(path: Path, *arguments: Any) -> Any:
        names.append(path.name)
        return write(path, *arguments)

    monkeypatch.setattr(run, "write_clip", note)
    return names


def test_finished_episodes_are_kept(source_of: Source, tmp_path: Path, counted: list[str]) -> None:
    source, out = source_of("stable-worldmodel"), tmp_path / "out"
    assert convert(source, out, Conversion()).num_kept == 0 and len(counted) == 4
    before = contents(out)
    assert convert(source, out, Conversion()).num_kept == 4 and len(counted) == 4
    assert contents(out) == before
    (out / "000001.mp4").unlink()
    (out / "000002.mp4").write_bytes(b"half")
    assert convert(source, out, Conversion()).num_kept == 2
    assert counted[4:] == ["000001.mp4", "000002.mp4"] and contents(out) == before


SLOW = """
import sys, time
from pathlib import Path
from data_pipelines.convert import run
from data_pipelines.convert.episodes import Keys
from data_pipelines.convert.video_files import write_clip

def slow(*arguments):
    done = write_clip(*arguments)
    print("written", flush=True)
    time.sleep(0.5)
    return done

run.write_clip = slow
run.convert(Path(sys.argv[1]), Path(sys.argv[2]), run.Conversion())
"""


def test_a_kill_in_the_middle_costs_nothing_but_time(source_of: Source, tmp_path: Path, counted: list[str]) -> None:
    source = source_of("robomimic")
    convert(source, tmp_path / "whole", Conversion())
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(source), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=REPO,
        env=script_environment() | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdout is not None
    for _ in range(3):  # two are noted, the third is being noted
        assert child.stdout.readline() == b"written\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    rows = list(read_rows(tmp_path / "out" / PARTIAL_NAME))
    assert len(rows) == 2 and not (tmp_path / "out" / METADATA_NAME).exists()
    with open(tmp_path / "out" / PARTIAL_NAME, "ab") as file:
        file.write(b'{"file_name": "demo_2.mp4", "sou')  # what a kill while writing a row leaves
    counted.clear()
    assert convert(source, tmp_path / "out", Conversion()).num_kept == 2
    assert counted == ["demo_2.mp4", "demo_3.mp4"]
    assert without_index(contents(tmp_path / "out")) == without_index(contents(tmp_path / "whole"))


def test_a_source_that_changed_is_noticed(tmp_path: Path, counted: list[str]) -> None:
    source, out = write_image_folders(tmp_path / "images"), tmp_path / "out"
    convert(source, out, Conversion())
    counted.clear()
    os.utime(source / "clip_1" / "003.png", (time.time() + 10, time.time() + 10))
    assert convert(source, out, Conversion()).num_kept == 3 and not counted  # it was only touched
    assert convert(source, out, Conversion()).num_kept == 4
    Image.fromarray(painted(1)[4]).save(source / "clip_1" / "003.png")
    with pytest.raises(
        UserError, match=r"the source has changed .*: 'clip_1' has other frames or labels\. Name another"
    ):
        convert(source, out, Conversion())
    counted.clear()
    assert convert(source, out, Conversion(overwrite=True)).num_videos == 4 and len(counted) == 4
    assert np.array_equal(frames_of(out / "clip_1.mp4")[3], painted(1)[4])
    shutil.rmtree(source / "clip_2")
    with pytest.raises(UserError, match=r"the source has changed .*: it no longer has the episode of 'clip_2.mp4'"):
        convert(source, out, Conversion())


def test_labels_that_changed_are_noticed(tmp_path: Path) -> None:
    source, out = write_stable_worldmodel(tmp_path / "a.h5"), tmp_path / "out"
    convert(source, out, Conversion())
    with h5py.File(source, "r+") as file:
        file["action"][LENGTHS[0] + 2, 0] += 1
    with pytest.raises(UserError, match=r"'a.h5:9-21' has other frames or labels"):
        convert(source, out, Conversion())


def test_labels_of_image_folders_that_changed_are_noticed(tmp_path: Path) -> None:
    source, out = write_image_folders(tmp_path / "images"), tmp_path / "out"
    convert(source, out, Conversion())
    rows = (source / METADATA_NAME).read_text().replace('"number": 2', '"number": 20')
    (source / METADATA_NAME).write_text(rows)
    with pytest.raises(UserError, match=r"'clip_2' has other frames or labels"):
        convert(source, out, Conversion())


def test_a_source_may_grow(tmp_path: Path, counted: list[str]) -> None:
    source, out = write_image_folders(tmp_path / "images"), tmp_path / "out"
    shutil.move(source / "clip_3", tmp_path / "later")
    convert(source, out, Conversion())
    shutil.move(tmp_path / "later", source / "clip_3")
    counted.clear()
    assert convert(source, out, Conversion()).num_videos == 4 and counted == ["clip_3.mp4"]
    assert index_of(out).labels["number"].tolist() == [0, 1, 2, 3]


def test_several_processes_write_the_same_bytes(source_of: Source, tmp_path: Path) -> None:
    for count in (1, 2):
        convert(source_of("npz"), tmp_path / str(count), Conversion(num_processes=count))
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_other_settings_or_files_are_not_touched(source_of: Source, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source_of("npz"), out, Conversion())
    before = contents(out)
    with pytest.raises(UserError, match="holds a conversion with other settings: name another folder, or overwrite it"):
        convert(source_of("npz"), out, Conversion(crf=20))
    assert contents(out) == before
    (out / "mine.txt").write_text("mine")
    convert(source_of("npz"), out, Conversion(crf=20, overwrite=True))
    assert (out / "mine.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.mp4").write_bytes(b"mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is not empty and holds no conversion: name another folder"):
            convert(source_of("npz"), tmp_path / "other", Conversion(overwrite=overwrite))
    assert (tmp_path / "other" / "mine.mp4").read_bytes() == b"mine"


def test_rows_that_name_files_elsewhere_remove_nothing(source_of: Source, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source_of("npz"), out, Conversion())
    (tmp_path / "mine.mp4").write_bytes(b"mine")
    rows = list(read_rows(out / METADATA_NAME))
    with open(out / METADATA_NAME, "a") as file:
        for name in ("../mine.mp4", str(tmp_path / "mine.mp4")):
            file.write(json.dumps(rows[0] | {"file_name": name}) + "\n")
    convert(source_of("npz"), out, Conversion(overwrite=True))
    assert (tmp_path / "mine.mp4").read_bytes() == b"mine" and len(index_of(out).videos) == 4


# ---------------------------------------------------------------------------------------------------------- quality


def test_lossy_quality_is_measured(source_of: Source, tmp_path: Path) -> None:
    qualities = {}
    for crf in (5, 45):
        result = convert(source_of("robomimic"), tmp_path / str(crf), Conversion(crf=crf))
        qualities[crf] = result.psnr_db
        for place, psnr_db in result.psnr_db.items():
            episode = int(place[-1])
            difference = frames_of(tmp_path / str(crf) / f"demo_{episode}.mp4").astype(float) - painted(episode)
            assert psnr_db == pytest.approx(20 * np.log10(255 / np.sqrt(np.square(difference).mean())), abs=0.01)
    assert len(qualities[5]) == 4 and all(qualities[5][place] > qualities[45][place] > 15 for place in qualities[5])


def test_a_video_that_does_not_decode_to_its_source_is_an_error(
    source_of: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipelines.convert.video_files.LOSSLESS", {"crf": "30"})
    with pytest.raises(UserError, match=r"4 of 4 episodes cannot be converted; .*frame 0 of the written file does not"):
        convert(source_of("npz"), tmp_path / "out", Conversion())
    assert not list((tmp_path / "out").glob("*.mp4"))


# ----------------------------------------------------------------------------------------------- splits and shards


def test_splits_of_the_source_are_kept(tmp_path: Path, write_video: Any, read_numbers: ReadNumbers) -> None:
    convert(write_robomimic(tmp_path / "a.hdf5", masks=True), tmp_path / "masks", Conversion())
    assert {path.relative_to(tmp_path / "masks").as_posix() for path in (tmp_path / "masks").rglob("*.mp4")} == {
        "train/demo_0.mp4", "train/demo_3.mp4", "selection/demo_2.mp4",
    }  # fmt: skip
    source = write_lerobot(tmp_path / "lerobot", write_video)
    info = json.loads((source / "meta" / "info.json").read_text())
    info["splits"] = {"train": "0:2", "val": "2:3", "test": "3:4"}
    (source / "meta" / "info.json").write_text(json.dumps(info))
    convert(source, tmp_path / "ranges", Conversion())
    root = tmp_path / "splits"
    for split, episodes in {"train": [0, 1], "test": [2, 3]}.items():
        (root / split).mkdir(parents=True)
        arrays: dict[str, Any] = columns_of(episodes) | {"ends": np.cumsum([LENGTHS[e] for e in episodes])}
        np.savez(root / split / "a.npz", **arrays)
    convert(root, tmp_path / "folders", Conversion(keys=Keys(bounds=("ends",), labels=("number",))))
    for out in ("ranges", "folders"):
        found = {split: load_split(str(tmp_path / out), split) for split in ("train", "test")}
        numbers = {
            split: {read_numbers(frames_of(index.root / video.path)[0].transpose(2, 0, 1))[0] for video in index.videos}
            for split, index in found.items()
        }
        assert numbers["test"] == ({3} if out == "ranges" else {2, 3}) and numbers["train"] <= {0, 1}


@pytest.mark.parametrize("splits", [False, True])
def test_shards_hold_the_same_frames_and_labels(
    splits: bool, tmp_path: Path, read_numbers: ReadNumbers, counted: list[str]
) -> None:
    source, out = write_robomimic(tmp_path / "a.hdf5", masks=splits), tmp_path / "shards"
    settings = Conversion(in_shards=True)
    num_videos = convert(source, out, settings).num_videos
    assert num_videos == (3 if splits else 4) and not (tmp_path / ".shards.videos").exists()
    stream = open_videos(
        out, split="train" if splits else None, num_frames=3, batch_size=2, size_px=None, num_workers=0
    )
    for _, batch in zip(range(5), stream, strict=False):
        for clip, video in enumerate(batch["video"]):
            numbers = [read_numbers(frame) for frame in video]
            action = batch["labels"]["action"][clip].tolist()
            assert action == [[frame, episode] for episode, frame in numbers]
    before = contents(out)
    counted.clear()
    assert convert(source, out, settings).num_kept == num_videos and not counted and contents(out) == before
    with h5py.File(source, "r+") as file:
        file["data/demo_0/actions"][0, 0] += 1
    with pytest.raises(UserError, match=r"'a.hdf5:data/demo_0' has other frames or labels"):
        convert(source, out, settings)


def test_packing_that_was_stopped_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipelines.convert import output

    source, out = write_robomimic(tmp_path / "a.hdf5", masks=True), tmp_path / "shards"
    pack = output.pack_videos

    def stop_at_second(folder: Path, *arguments: Any, **options: Any) -> Any:
        if folder.name == "selection":
            raise KeyboardInterrupt
        return pack(folder, *arguments, **options)

    monkeypatch.setattr(output, "pack_videos", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, Conversion(in_shards=True))
    monkeypatch.setattr(output, "pack_videos", pack)
    assert convert(source, out, Conversion(in_shards=True)).num_kept == 3
    assert len(load_split(str(out), "train").videos) == 2


def test_packing_that_was_stopped_takes_episodes_that_are_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a split whose shards are complete."""
    from data_pipelines.convert import output

    source, out = tmp_path / "in", tmp_path / "out"
    for split in ("train", "val", "test"):
        write_animations(source / split, "gif")
    pack = output.pack_videos

    def stop_at_test(folder: Path, *arguments: Any, **options: Any) -> Any:
        return (_stop if folder.name == "test" else pack)(folder, *arguments, **options)

    with monkeypatch.context() as stopped:
        stopped.setattr(output, "pack_videos", stop_at_test)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, Conversion(in_shards=True))
    shutil.copy(source / "train" / "clip_0.gif", source / "train" / "new.gif")
    tar = out / "selection" / "shard-000000.tar"
    packed_ns = tar.stat().st_mtime_ns
    assert convert(source, out, Conversion(in_shards=True)).num_videos == 13
    assert [len(load_split(str(out), split).videos) for split in ("train", "selection", "test")] == [5, 4, 4]
    assert tar.stat().st_mtime_ns == packed_ns


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_removal_of_packed_videos_that_was_stopped_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    from data_pipelines.convert import output

    source, out = write_npz(tmp_path / "a.npz"), tmp_path / "out"
    rmtree = shutil.rmtree

    def stop_at_videos(path: Path, **options: Any) -> None:
        (_stop if path.name == ".out.videos" else rmtree)(path, **options)

    with monkeypatch.context() as stopped:
        stopped.setattr(shutil, "rmtree", stop_at_videos)
        stopped.setattr(output, "remove", _stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, Conversion(in_shards=True))
    assert (tmp_path / ".out.videos").exists()
    (tmp_path / ".out.videos" / METADATA_NAME).unlink()
    kept = convert(source, out, Conversion(in_shards=True, overwrite=overwrite)).num_kept
    assert kept == (0 if overwrite else 4) and len(index_of(out).videos) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"a.npz", "out"}


def _stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


# --------------------------------------------------------------------------------------------------------- bad data


def test_bad_episodes_are_named_and_may_be_left_out(tmp_path: Path, counted: list[str]) -> None:
    source, out = write_image_folders(tmp_path / "images"), tmp_path / "out"
    (source / "clip_2" / "005.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"^1 of 4 episodes cannot be converted; the first is 'clip_2' \("):
        convert(source, out, Conversion())
    assert not (out / METADATA_NAME).exists()
    counted.clear()
    result = convert(source, out, Conversion(skip_bad=True))
    assert list(result.bad) == ["clip_2"] and result.num_videos == 3 and result.num_kept == 3
    assert counted in ([], ["clip_2.mp4"]) and len(index_of(out).videos) == 3


@pytest.mark.parametrize(
    "bounds", [{"ep_len": [9, 0, 33]}, {"episode_ends": [9, 9, 42]}, {"ep_len": [9, 0, 33], "ep_offset": [0, 9, 9]}]
)
def test_an_episode_without_frames_is_a_bad_one(bounds: dict[str, list[int]], tmp_path: Path) -> None:
    source, out = tmp_path / "a.npz", tmp_path / "out"
    arrays: dict[str, Any] = {name: np.array(values) for name, values in bounds.items()}
    np.savez(source, pixels=columns_of()["pixels"], **arrays)
    message = r"^1 of 3 episodes cannot be converted; the first is 'a.npz:9-9' \(it has no frames\)"
    with pytest.raises(UserError, match=message):
        convert(source, out, Conversion())
    assert list(convert(source, out, Conversion(skip_bad=True)).bad) == ["a.npz:9-9"]
    assert [(video.path, video.num_frames) for video in index_of(out).videos] == [("000000.mp4", 9), ("000002.mp4", 33)]


def test_files_of_another_layout_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "source"
    source.mkdir()
    np.savez(source / "a.npz", pixels=painted(0))
    np.savez(source / "b.npz", pixels=painted(1))
    assert convert(source, tmp_path / "all", Conversion()).num_videos == 2 and not caplog.records
    write_animations(source / "old", "gif")
    assert convert(source, tmp_path / "out", Conversion()).num_videos == 2
    (record,) = caplog.records
    assert record.getMessage() == (
        f"'{source}' is converted as an .npz archive of frames: 'old/clip_0.gif' and 3 more are left out"
    )


def test_shards_without_bad_episodes_are_kept(tmp_path: Path) -> None:
    """Until one of them is mended, which shards cannot take."""
    source, out = write_image_folders(tmp_path / "images"), tmp_path / "out"
    good = (source / "clip_2" / "005.png").read_bytes()
    (source / "clip_2" / "005.png").write_bytes(b"no picture")
    settings = Conversion(skip_bad=True, in_shards=True)
    assert convert(source, out, settings).num_videos == 3
    again = convert(source, out, settings)
    assert again.num_videos == again.num_kept == 3 and list(again.bad) == ["clip_2"]
    (source / "clip_2" / "005.png").write_bytes(good)
    with pytest.raises(UserError, match="it has more episodes than the shards"):
        convert(source, out, settings)


def test_a_conversion_becomes_shards(tmp_path: Path) -> None:
    """With the index that training left there; a user's own file is not in the way of the first conversion."""
    source, out = write_image_folders(tmp_path / "images"), tmp_path / "out"
    convert(source, out, Conversion())
    index_of(out)
    assert (out / INDEX_NAME).is_file()
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    with pytest.raises(UserError, match=r"also holds 'notes\.txt', which is not of the conversion: move it away"):
        convert(source, out, Conversion(in_shards=True, overwrite=True))
    assert contents(out) == before
    (out / "notes.txt").unlink()
    assert convert(source, out, Conversion(in_shards=True, overwrite=True)).num_videos == 4
    assert len(index_of(out).videos) == 4 and not list(out.glob("*.mp4"))


def test_shards_do_not_replace_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_npz(tmp_path / "a.npz")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="must not be the current one"):
        convert(source, Path("."), Conversion(in_shards=True))
    assert convert(source, Path("."), Conversion()).num_videos == 4


def test_a_folder_that_shards_cannot_replace_is_named_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[str]
) -> None:
    source, out = write_npz(tmp_path / "a.npz"), tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    with pytest.raises(UserError, match="must not be the current one or a mount point"):
        convert(source, out, Conversion(in_shards=True))
    assert not counted and [path.name for path in tmp_path.iterdir() if path != source] == ["out"]
    splits = write_robomimic(tmp_path / "b.hdf5", masks=True)
    assert convert(splits, out, Conversion(in_shards=True)).num_videos == 3


def test_the_disk_is_full(source_of: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "write_clip", full)
    with pytest.raises(UserError, match=r"cannot write to '.*out': No space left on device"):
        convert(source_of("npz"), tmp_path / "out", Conversion())


class _FullFile:
    """A file on a disk that has room for a few bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell, self.name = file.seek, file.tell, file.name

    def write(self, content: bytes) -> int:
        if self._file.tell() + len(content) > 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(content)


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize(
    ("layout", "when"),
    [("image folders", "writing"), ("stable-worldmodel", "writing"), ("stable-worldmodel", "opening")],
)
def test_a_full_disk_is_not_taken_for_a_bad_episode(
    layout: str, when: str, skip_bad: bool, source_of: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyAV hides what writing to the file raised, and open_hdf5 takes any OSError for one of the source."""

    @contextmanager
    def replacing_on_a_full_disk(path: Path) -> Iterator[Any]:
        is_first = path.name in ("clip_0.mp4", "000000.mp4")
        if not is_first and when == "opening":
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        with replacing(path) as file:
            yield file if is_first else _FullFile(file)

    out, settings = tmp_path / "out", Conversion(skip_bad=skip_bad)
    with monkeypatch.context() as patch:
        patch.setattr(video_files, "replacing", replacing_on_a_full_disk)
        reason = "Disk quota exceeded" if when == "opening" else "No space left on device"
        with pytest.raises(UserError, match=rf"^cannot write to '.*out': {reason}"):
            convert(source_of(layout), out, settings)
    assert not (out / METADATA_NAME).exists() and len(list(out.glob("*.mp4"))) == 1
    result = convert(source_of(layout), out, settings)
    assert (result.num_videos, result.num_kept, result.bad) == (4, 1, {})


def test_the_output_is_not_in_the_source(source_of: Source, tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz")
    for out in (tmp_path, tmp_path / "out"):
        with pytest.raises(UserError, match="is in the source"):
            convert(tmp_path, out, Conversion())
