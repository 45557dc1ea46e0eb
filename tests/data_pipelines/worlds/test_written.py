"""Written videos: without loss, at the size and colour of the frames; folders that are replaced or not writable."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import UserError
from data_pipelines.processes import ending, spawned_pool
from data_pipelines.splits import SPLITS, Split
from data_pipelines.worlds import written
from data_pipelines.worlds.digit_images import write_digit_images
from data_pipelines.worlds.moving_mnist import write_moving_mnist
from data_pipelines.worlds.recorder import Recording, record
from data_pipelines.worlds.written import WORLD_NAME, encode_h264, run_chunks, start_world

COUNTS: dict[Split, int] = {"train": 1, "selection": 1, "test": 1}
WORLD = {"world": "a", "seed": 1}


@pytest.mark.parametrize(("shape", "pixels"), [((6, 64, 64), "gray"), ((6, 48, 64, 3), "rgb24")])
def test_frames_come_back_but_for_the_rounding_of_yuv(tmp_path: Path, shape: tuple[int, ...], pixels: str) -> None:
    frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    encode_h264(tmp_path / "noise.mp4", frames)
    with av.open(str(tmp_path / "noise.mp4")) as container:
        decoded = np.stack([frame.to_ndarray(format=pixels) for frame in container.decode(video=0)])
    assert decoded.shape == shape
    assert np.abs(decoded.astype(int) - frames).max() <= 3


def test_what_stands_still_is_the_same_in_every_frame(tmp_path: Path) -> None:
    frames = np.repeat(np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8), 8, axis=0)
    frames[:, 20:24, 20:24] = np.arange(8, dtype=np.uint8)[:, None, None, None] * 30  # something must be encoded anew
    encode_h264(tmp_path / "still.mp4", frames)
    with av.open(str(tmp_path / "still.mp4")) as container:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert np.array_equal(decoded[:, 30:], np.repeat(decoded[:1, 30:], 8, axis=0))


# --------------------------------------------------------------------------------------------- folders of other content


def write_finished(out: Path, text: str) -> None:
    """Write a world of three complete splits; text: the content of world.json."""
    for split in SPLITS:
        (out / split).mkdir(parents=True)
        (out / split / "000000.mp4").write_text(split)
        (out / split / "metadata.jsonl").write_text("{}\n")
    (out / WORLD_NAME).write_text(text)


def test_splits_that_are_links_are_replaced_and_their_targets_stay(tmp_path: Path) -> None:
    disk, out = tmp_path / "disk", tmp_path / "out"
    write_finished(disk, "")
    write_finished(out, json.dumps(WORLD))
    for split in ("train", "test"):
        shutil.rmtree(out / split)
        (out / split).symlink_to(disk / split)
    assert start_world(out, WORLD, overwrite=False) == []
    assert start_world(out, WORLD | {"seed": 2}, overwrite=True) == list(SPLITS)
    assert [path.name for path in out.iterdir()] == [WORLD_NAME]
    for split in SPLITS:
        assert (disk / split / "000000.mp4").read_text() == split
        assert (disk / split / "metadata.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"seed": 1}', '{"world": 3}', "\xff", "[" * 100_000])
def test_a_damaged_world_json_is_one_line_or_replaced(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    write_finished(out, "")
    (out / WORLD_NAME).write_text(text, encoding="latin-1")
    with pytest.raises(
        UserError, match=r"^'.*world\.json' (is damaged \(.*\)|does not name a world): overwrite"
    ) as error:
        start_world(out, WORLD, overwrite=False)
    assert "\n" not in str(error.value) and (out / "test" / "000000.mp4").exists()
    assert start_world(out, WORLD, overwrite=True) == list(SPLITS)
    assert json.loads((out / WORLD_NAME).read_text()) == WORLD and not (out / "test").exists()


def test_a_removal_that_was_interrupted_leaves_no_complete_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_finished(tmp_path, json.dumps(WORLD))

    def interrupted(*_: Any, **__: Any) -> None:
        (tmp_path / "train" / "000000.mp4").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", interrupted)
        start_world(tmp_path, WORLD, overwrite=True)
    assert start_world(tmp_path, WORLD, overwrite=False) == ["train"]


# ----------------------------------------------------------------------------------------------- what cannot be written


def moving_mnist(out: Path) -> None:
    write_moving_mnist(out, COUNTS, num_processes=1)


def digit_images(out: Path) -> None:
    write_digit_images(out, COUNTS)


def recorded(out: Path) -> None:
    recording = Recording("tests.data_pipelines.worlds.tiny_env:tests/Counter-v0", num_steps=3)
    record(out, COUNTS, recording, num_processes=1)


@pytest.mark.parametrize("write", [moving_mnist, digit_images, recorded])
def test_a_folder_below_a_file_is_one_line(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"^cannot write to '.*file/out': Not a directory"):
        write(tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("write", [moving_mnist, digit_images, recorded])
def test_a_file_in_place_of_a_split_is_one_line(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "test")
    (tmp_path / "out" / "test").write_text("mine")
    with pytest.raises(UserError, match=r"^cannot write to '.*out/test': "):
        write(tmp_path / "out")


@pytest.mark.parametrize("write", [moving_mnist, digit_images, recorded])
def test_a_full_disk_is_one_line(
    tmp_path: Path, write: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(written, "encode_h264", full)  # in processes of the pool, which are forks
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(UserError, match=r"^cannot write to '.*out/train': No space left on device"):
            write(tmp_path / "out")
    write(tmp_path / "out")
    assert all((tmp_path / "out" / split / "metadata.jsonl").is_file() for split in SPLITS)


def test_what_the_encoder_cannot_write_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"^cannot write to '.*': .*No space left on device"):
        written.write_whole(tmp_path / "a.mp4", np.zeros((4, 32, 32), np.uint8))
    assert not (tmp_path / "a.mp4").exists()


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("num_rows", [1, 60])
def test_a_killed_process_of_the_pool_is_one_line(num_rows: int) -> None:
    """Also where others are to be started after it."""
    with ending(spawned_pool(1)) as pool:

        def start(_: list[int]) -> Future[None]:
            return pool.submit(be_killed)

        with pytest.raises(UserError, match=r"^a process that writes videos has died: .* start again with fewer"):
            run_chunks(start, range(num_rows), num_rows, "train", chunk_size=1)


def test_there_are_processes_to_write_videos(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="num_processes=0 must be at least 1"):
        write_moving_mnist(tmp_path / "out", COUNTS, num_processes=0)
    assert not (tmp_path / "out").exists()
