"""Videos that change after they were indexed: left out and named, never other frames in silence."""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines import clip_decoder
from data_pipelines.batches import Batch
from data_pipelines.clip_decoder import ClipDecoder, make_clip_set
from data_pipelines.clips import ClipSpec
from data_pipelines.contents import contents_of, read_contents
from data_pipelines.errors import UserError
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.shards.packing import pack_videos
from data_pipelines.workers import Faults
from tests.data_pipelines.conftest import WriteVideo
from tests.data_pipelines.streams import make_stream, read_clips

SPEC = ClipSpec(num_segments=3, num_frames=3)
NUM_VIDEOS = 12
LATER_NS = 10**10


@pytest.fixture
def folder(tmp_path: Path, write_video: WriteVideo) -> Path:
    for number in range(NUM_VIDEOS):
        write_video(tmp_path / "videos" / f"v{number:02d}.mp4", video=number, num_frames=27)
    return tmp_path / "videos"


def _pad(path: Path, size_bytes: int) -> None:
    """Make an MP4 file longer without changing what it shows, by a box that players pass over."""
    missing = size_bytes - path.stat().st_size
    assert missing >= 8
    with open(path, "ab") as file:
        file.write(missing.to_bytes(4, "big") + b"free" + bytes(missing - 8))


def _twins(folder: Path, write_video: WriteVideo) -> tuple[Path, Path]:
    """The first video of the folder, and another one of the same size in bytes and number of frames."""
    first = folder / "v00.mp4"
    other = write_video(folder.parent / "other.mp4", video=999, num_frames=27)
    size_bytes = max(path.stat().st_size for path in (first, other)) + 100
    for path in (first, other):
        _pad(path, size_bytes)
    os.utime(first, ns=(LATER_NS, LATER_NS))  # clocks of file systems are coarse
    return first, other


def _clips(index: VideoIndex, **changes: Any) -> dict[int, str]:
    """Clip id -> hash of its pixels, of an epoch without shuffling."""
    settings: dict[str, Any] = {"batch_size": 2, "num_lanes": 2, "pool_clips": 4, "seed": 0, "max_bad_fraction": 0.2}
    stream = make_stream(index, SPEC, size_px=None, channels=1, shuffle=False, **settings | changes)
    batches = stream.batches()
    try:
        return dict(_hashes(islice(batches, stream.batches_per_epoch)))
    finally:
        batches.close()


def _hashes(batches: Iterator[Batch]) -> Iterator[tuple[int, str]]:
    for batch in batches:
        for clip_id, video in zip(batch["clip_id"].tolist(), batch["video"], strict=True):
            yield clip_id, hashlib.sha256(video.numpy().tobytes()).hexdigest()


def _replace(first: Path, other: Path) -> None:
    os.replace(other, first)


def _replace_and_keep_an_older_time(first: Path, other: Path) -> None:
    _replace(first, other)
    os.utime(first, ns=(1, 1))


def _overwrite(first: Path, other: Path) -> None:
    first.write_bytes(other.read_bytes())


def _append(first: Path, other: Path) -> None:
    first.write_bytes(first.read_bytes() + other.read_bytes())


def _cut(first: Path, other: Path) -> None:
    os.truncate(first, first.stat().st_size // 2)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_replace, "has changed since it was indexed (its content differs)"),
        (_replace_and_keep_an_older_time, "has changed since it was indexed (its content differs)"),
        (_overwrite, "has changed since it was indexed (its content differs)"),
        (_append, " bytes, "),
        (_cut, "has changed since it was indexed ("),
        (lambda first, other: first.unlink(), "does not decode (No such file or directory)"),
    ],
    ids=["replaced", "older", "overwritten", "appended", "cut", "removed"],
)
def test_a_changed_file_is_left_out_and_named_once(
    folder: Path,
    write_video: WriteVideo,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[Path, Path], None],
    reason: str,
    num_workers: int,
) -> None:
    twins = _twins(folder, write_video)
    index = load_videos(folder, progress=False)
    before = _clips(index)
    change(*twins)
    after = _clips(index, num_workers=num_workers)
    assert after == {clip: pixels for clip, pixels in before.items() if clip >= 3}  # a video has three clips
    [message] = [record.message for record in caplog.records if "v00.mp4" in record.message]
    assert message.startswith("video 'v00.mp4' ") and message.endswith(": its clips are left out")
    assert reason in message


def test_a_touched_or_copied_file_changes_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = load_videos(folder, progress=False)
    before = _clips(index)
    for path in folder.glob("*.mp4"):
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(LATER_NS, LATER_NS))
    assert _clips(index) == _clips(index, num_workers=2) == before
    assert not caplog.records


def test_too_many_changed_files_end_the_run_with_one_line(folder: Path, write_video: WriteVideo) -> None:
    index = load_videos(folder, progress=False)
    for number in range(6):
        write_video(folder / f"v{number:02d}.mp4", video=100 + number, num_frames=27)
    with pytest.raises(UserError, match=r"3 of 12 videos do not decode or have changed.*max_bad_fraction=0\.2") as line:
        _clips(index)
    assert "\n" not in str(line.value)


def test_a_file_that_is_replaced_while_it_is_read_gives_no_further_clip(
    folder: Path, write_video: WriteVideo, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, other = _twins(folder, write_video)
    index = load_videos(folder, progress=False)
    before = _clips(index)
    open_video = clip_decoder.open_video

    def replaced_at_frame(path: str, *arguments: Any, **more: Any) -> Any:
        reader = open_video(path, *arguments, **more)
        read = reader.read

        def replace_and_read(frame: int) -> Any:
            if path.endswith("v00.mp4") and frame == 13:  # in the second clip of three
                _overwrite(first, other)
            return read(frame)

        monkeypatch.setattr(reader, "read", replace_and_read)
        return reader

    monkeypatch.setattr(clip_decoder, "open_video", replaced_at_frame)
    after = _clips(index)
    assert after == {clip: pixels for clip, pixels in before.items() if clip not in (1, 2)}
    assert sum("'v00.mp4' has changed" in record.message for record in caplog.records) == 1


def test_evaluation_leaves_changed_files_out_too(folder: Path, write_video: WriteVideo) -> None:
    first, other = _twins(folder, write_video)
    index = load_videos(folder, progress=False)
    arguments: dict[str, Any] = {"size_px": None, "channels": 1, "batch_size": 5}
    before = dict(_hashes(read_clips(index, SPEC, **arguments)))
    _replace(first, other)
    after = dict(_hashes(read_clips(index, SPEC, **arguments)))
    assert after == {clip: pixels for clip, pixels in before.items() if clip >= 3}


def test_a_file_of_several_episodes_is_named_once(
    folder: Path, write_video: WriteVideo, caplog: pytest.LogCaptureFixture
) -> None:
    first, other = _twins(folder, write_video)
    files = load_videos(folder, progress=False)
    rows = [0, 0, 0, *range(1, NUM_VIDEOS)]
    frames = [(0, 9), (9, 18), (18, 27), *[(0, 27)] * (NUM_VIDEOS - 1)]
    index = VideoIndex(folder, [files.videos[row] for row in rows], episodes=frames)
    _replace(first, other)
    assert sorted(_clips(index, max_bad_fraction=0.3)) == list(range(3, 3 * NUM_VIDEOS))
    assert sum("v00.mp4" in record.message for record in caplog.records) == 1


@pytest.fixture
def shards(folder: Path, tmp_path: Path, write_video: WriteVideo) -> tuple[Path, Path]:
    """Shards of the folder, and the same with one video replaced; shard by shard of the same size."""
    first, other = _twins(folder, write_video)
    pack_videos(folder, tmp_path / "shards", shard_mb=0.02, progress=False)
    first.write_bytes(other.read_bytes())
    pack_videos(folder, tmp_path / "others", shard_mb=0.02, progress=False)
    return tmp_path / "shards", tmp_path / "others"


@pytest.mark.parametrize("when", ["before the start", "while streaming"])
def test_a_replaced_shard_loses_only_what_differs(
    shards: tuple[Path, Path], caplog: pytest.LogCaptureFixture, when: str
) -> None:
    shards_dir, others = shards
    index = load_videos(shards_dir, progress=False)
    row = [video.path for video in index.videos].index("v00.mp4")
    shard = index.videos[row].shard
    assert sum(video.shard == shard for video in index.videos) > 1
    assert (shards_dir / shard).stat().st_size == (others / shard).stat().st_size
    before = _clips(index)

    def replace() -> None:
        shutil.copyfile(others / shard, shards_dir / shard)
        later_ns = (shards_dir / "shards.jsonl").stat().st_mtime_ns + LATER_NS
        os.utime(shards_dir / shard, ns=(later_ns, later_ns))

    if when == "before the start":
        replace()
        after = _clips(load_videos(shards_dir, progress=False))
    else:
        stream = make_stream(
            index, SPEC, size_px=None, channels=1, batch_size=2, num_lanes=2, pool_clips=4, seed=0, shuffle=False
        )
        replace()
        after = dict(_hashes(islice(stream.batches(), stream.batches_per_epoch)))
    assert after == {clip: pixels for clip, pixels in before.items() if clip // 3 != row}
    assert sum("'v00.mp4' has changed" in record.message for record in caplog.records) == 1


def test_a_touched_shard_changes_nothing(shards: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    index = load_videos(shards[0], progress=False)
    before = _clips(index)
    for path in shards[0].glob("*.tar"):
        os.utime(path)
    assert _clips(load_videos(shards[0], progress=False)) == _clips(index) == before
    assert not caplog.records


# -------------------------------------------------------------------------------------------------- between sessions


def _contents(folder: Path, *labels: str) -> Any:
    return contents_of(load_videos(folder, progress=False), labels)


def test_contents_name_what_has_changed(folder: Path, write_video: WriteVideo, tmp_path: Path) -> None:
    first, other = _twins(folder, write_video)
    before = _contents(folder)
    (tmp_path / "stored").write_text("\n".join(before.lines()), encoding="utf-8")
    stored = read_contents(tmp_path / "stored")
    assert stored is not None and before.change_since(stored) == ""
    for path in folder.glob("*.mp4"):
        os.utime(path, ns=(LATER_NS, LATER_NS))
    assert _contents(folder).change_since(stored) == "" and _contents(folder).hash() == before.hash()
    _replace(first, other)
    assert _contents(folder).change_since(stored) == "'v00.mp4' has other content"
    (folder / "v05.mp4").unlink()
    assert _contents(folder).change_since(stored) == "'v00.mp4' has other content (and 1 more)"
    first.unlink()
    assert _contents(folder).change_since(stored) == "'v00.mp4' is gone (and 1 more)"
    first.write_bytes(b"no video")
    assert _contents(folder).change_since(stored).startswith("'v00.mp4' is left out now (Invalid data")
    write_video(folder / "new.mp4")
    assert _contents(folder).change_since(_contents(folder)) == ""
    assert _contents(folder).change_since(stored).startswith("'new.mp4' is new (and 2")


def test_contents_cover_the_labels_that_matter(folder: Path) -> None:
    index = load_videos(folder, progress=False)
    labels = {name: torch.arange(NUM_VIDEOS) + number for number, name in enumerate(("used", "other"))}
    frames = {"action": torch.zeros(27 * NUM_VIDEOS, 2)}
    offsets = torch.arange(NUM_VIDEOS) * 27

    def contents(**changes: Any) -> Any:
        given = {"labels": labels, "frame_labels": frames} | changes
        return contents_of(
            VideoIndex(folder, index.videos, frame_label_offsets=offsets, **given), {"used", "action", "missing"}
        )

    edited = frames["action"].clone()
    edited[77, 1] = 0.5
    assert contents().change_since(contents()) == ""
    assert contents(labels=labels | {"other": labels["other"] + 1}).change_since(contents()) == ""
    assert contents(labels=labels | {"used": labels["used"] + 1}).change_since(contents()) == (
        "label 'used' has other values"
    )
    assert contents(frame_labels={"action": edited}).change_since(contents()) == "label 'action' has other values"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "no JSON",
        '{"format": "worldmodel-contents", "version": 2, "labels": {}}',
        '{"format": "worldmodel-contents", "version": 1, "labels": []}',
        '{"format": "worldmodel-contents", "version": 1, "labels": {}}\n["a.mp4"]',
        '{"format": "worldmodel-contents", "version": 1, "labels": {}}\n["a.mp4", 1]',
        '{"format": "worldmodel-contents", "version": 1, "labels": {}}\n' + "[" * 100_000,
        "\udcff",
    ],
    ids=range(9),
)
def test_damaged_contents_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "videos.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"videos\.jsonl' is damaged") as line:
        read_contents(tmp_path / "videos.jsonl")
    assert "\n" not in str(line.value)


def test_no_contents_are_none(tmp_path: Path) -> None:
    assert read_contents(tmp_path / "videos.jsonl") is None


@pytest.fixture(autouse=True)
def warnings_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)


# ------------------------------------------------------------------------------------------------- folders of images


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    for number in range(60):
        _write_image(folder / f"{number:02d}.png", number)
    return folder


def _write_image(path: Path, level: int) -> None:
    Image.fromarray(np.full((24, 32), level, np.uint8)).save(path)


def _decoder_of_images(folder: Path) -> ClipDecoder:
    index = load_videos(folder.parent, progress=False, num_workers=0)
    clip_set = make_clip_set(index, ClipSpec(1, 3), size_px=None, channels=1, decoder="pyav")
    return ClipDecoder(clip_set, Faults(), lambda shard: False)


@pytest.mark.parametrize(
    ("change", "is_noticed"),
    [
        (lambda folder: _write_image(folder / "04.png", 99), True),
        (lambda folder: (folder / "04.png").unlink(), True),
        (lambda folder: (folder / "30.png").rename(folder / "00a.png"), True),
        (lambda folder: _write_image(folder / "30.png", 99), False),  # of another clip
        (lambda folder: os.utime(folder / "04.png"), False),
        (lambda folder: (folder / "notes.txt").write_text("no image"), False),
    ],
)
def test_an_image_that_changes_while_its_folder_is_open(
    images: Path, change: Callable[[Path], Any], is_noticed: bool
) -> None:
    for path in images.iterdir():
        os.utime(path, ns=(LATER_NS, LATER_NS))
    os.utime(images, ns=(LATER_NS, LATER_NS))
    decoder = _decoder_of_images(images)
    assert decoder.decode(0, 0, 0) is not None
    change(images)
    assert (decoder.decode(0, 0, 3) is None) == is_noticed
    decoder.close()


def test_the_images_of_other_clips_are_not_looked_at_after_each_clip(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = _decoder_of_images(images)
    assert decoder.decode(0, 0, 0) is not None
    looked_at: list[str] = []
    stat = os.stat

    def spy(path: Any, **options: Any) -> os.stat_result:
        looked_at.append(str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", spy)
    assert decoder.decode(0, 0, 3) is not None
    assert looked_at == [str(images), *(str(images / f"{number:02d}.png") for number in (3, 4, 5))]
    decoder.close()
