"""Several cameras of a LeRobot data set: their frames of the same moment are side by side in the channels of a clip."""

import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines import decoders
from data_pipelines.batches import Batch
from data_pipelines.clip_decoder import ClipDecoder, make_clip_set
from data_pipelines.clips import ClipSpec
from data_pipelines.contents import contents_of
from data_pipelines.errors import UserError
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.roots import WeightedRoot, load_roots
from data_pipelines.splits import SPLITS, split_index
from data_pipelines.stream import open_videos
from data_pipelines.workers import Faults
from tests.data_pipelines.formats.lerobot_sets import (
    FPS,
    FRONT,
    LENGTHS,
    STARTS,
    WRIST,
    episode_columns,
    files_of,
    write_camera,
    write_cameras,
    write_table,
)
from tests.data_pipelines.streams import make_stream, read_clips

pytest.importorskip("pyarrow")

BOTH = (FRONT, WRIST)
SPEC = ClipSpec(num_segments=2, num_frames=2, frame_stride=2, clip_step=3)
SETTINGS: dict[str, Any] = {"size_px": None, "channels": 1, "batch_size": 8, "num_lanes": 4, "pool_clips": 16}
ALL_CLIPS = {
    (episode, first) for episode, length in enumerate(LENGTHS) for first in range(0, length - SPEC.span + 1, SPEC.step)
}
VERSIONS = ("v2.1", "v3.0")


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory, write_video: Any) -> dict[str, Path]:
    """A data set of each version."""
    folder = tmp_path_factory.mktemp("cameras")
    return {version: write_cameras(folder / version, write_video, version) for version in VERSIONS}


@pytest.fixture(params=VERSIONS)
def root(request: pytest.FixtureRequest, roots: dict[str, Path]) -> Path:
    return roots[request.param]


@pytest.fixture
def own(root: Path, tmp_path: Path) -> Path:
    """A copy of a data set to change."""
    return Path(shutil.copytree(root, tmp_path / root.name))


def _index(root: Path, camera: str | Sequence[str] | None = BOTH, **options: Any) -> VideoIndex:
    return load_videos(root, camera=camera, progress=False, num_workers=0, **options)


def _clips(batches: list[Batch], cameras: Sequence[int], read_numbers: Any) -> list[tuple[int, int]]:
    """Check that each camera shows the rows of the labels. -> (episode, first frame in it) of each clip"""
    clips = []
    for batch in batches:
        assert batch["video"].shape[1:3] == (SPEC.length, len(cameras))
        for video, action in zip(batch["video"], batch["labels"]["action"], strict=True):
            for place, camera in enumerate(cameras):
                shown = [read_numbers(frame[place : place + 1]) for frame in video]
                assert shown == [(camera, int(row)) for row, _ in action.tolist()]
            (episode,) = set(action[:, 1].int().tolist())
            clips.append((episode, int(action[0, 0]) - int(STARTS[episode])))
    return clips


@pytest.mark.parametrize(("names", "cameras"), [(BOTH, (0, 1)), ((WRIST, FRONT), (1, 0)), ((WRIST,), (1,))])
def test_every_clip_shows_the_same_rows_in_each_camera_in_the_named_order(
    root: Path, names: Sequence[str], cameras: Sequence[int], read_numbers: Any
) -> None:
    batches = list(read_clips(_index(root, names), SPEC, size_px=None, channels=1, batch_size=32))
    clips = _clips(batches, cameras, read_numbers)
    assert len(clips) == len(ALL_CLIPS) and set(clips) == ALL_CLIPS


def test_three_channels_of_each_camera_are_those_of_the_camera_alone(root: Path) -> None:
    def video(camera: str | Sequence[str], decoder: str) -> torch.Tensor:
        settings: dict[str, Any] = {"size_px": 32, "channels": 3, "batch_size": 64, "decoder": decoder}
        return torch.cat([batch["video"] for batch in read_clips(_index(root, camera), SPEC, **settings)])

    for decoder in ("pyav", *filter(_is_usable, ("decord", "torchcodec"))):
        both = video(BOTH, decoder)
        assert both.shape[2:] == (6, 32, 32)
        assert torch.equal(both[:, :, :3], video(FRONT, decoder)) and torch.equal(both[:, :, 3:], video(WRIST, decoder))


def _is_usable(decoder: str) -> bool:
    try:
        return decoders.resolve_decoder(decoder) == decoder
    except UserError:
        return False


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_delivers_each_clip_once_and_resumes_exactly(root: Path, read_numbers: Any, num_workers: int) -> None:
    stream = make_stream(_index(root), SPEC, seed=0, num_workers=num_workers, cache_mb=1, **SETTINGS)
    batches = stream.batches()
    seen = list(islice(batches, stream.batches_per_epoch + 3))
    batches.close()
    clips = _clips(seen, (0, 1), read_numbers)[: 8 * stream.batches_per_epoch]
    assert len(clips) == len(set(clips)) == len(ALL_CLIPS) // 8 * 8

    for start in (1, 5, stream.batches_per_epoch - 1):
        again = make_stream(_index(root), SPEC, seed=0, num_workers=1, **SETTINGS).batches(start)
        for before, now in zip(seen[start : start + 3], again, strict=False):
            assert torch.equal(before["video"], now["video"]) and torch.equal(before["clip_id"], now["clip_id"])
        again.close()


def test_the_order_of_clips_is_that_of_the_first_camera_alone(root: Path) -> None:
    streams = [make_stream(_index(root, names), SPEC, seed=0, **SETTINGS) for names in (BOTH, FRONT)]
    orders = [[batch["clip_id"].tolist() for batch in islice(stream.batches(), 9)] for stream in streams]
    assert orders[0] == orders[1]
    assert len({stream.fingerprint for stream in streams}) == 2


def test_ranks_share_the_batches_of_one_process(root: Path) -> None:
    index = _index(root)
    whole = list(islice(make_stream(index, SPEC, seed=1, **SETTINGS).batches(), 4))
    parts = [
        list(islice(make_stream(index, SPEC, seed=1, rank=rank, world_size=2, **SETTINGS).batches(), 4))
        for rank in range(2)
    ]
    for batch, *of_ranks in zip(whole, *parts, strict=True):
        rows = torch.cat([part["row"] for part in of_ranks])
        assert torch.equal(torch.cat([part["video"] for part in of_ranks])[rows.argsort()], batch["video"])


def test_splits_are_those_of_the_first_camera_alone(root: Path, read_numbers: Any) -> None:
    for split in SPLITS:
        both, alone = (split_index(_index(root, names), split) for names in (BOTH, FRONT))
        assert both.frame_ranges == alone.frame_ranges
        batches = list(read_clips(both, SPEC, size_px=None, channels=1, batch_size=32))
        assert _clips(batches, (0, 1), read_numbers)


def test_the_rows_of_an_index_keep_their_cameras(root: Path, read_numbers: Any) -> None:
    index = _index(root).rows([4, 1])
    clips = _clips(list(read_clips(index, SPEC, size_px=None, channels=1, batch_size=32)), (0, 1), read_numbers)
    assert {episode for episode, _ in clips} == {1, 4}


def test_cameras_of_several_roots_stay_together(roots: dict[str, Path], read_numbers: Any) -> None:
    index = load_roots([WeightedRoot(str(root)) for root in roots.values()], None, camera=BOTH)
    clips = _clips(list(read_clips(index, SPEC, size_px=None, channels=1, batch_size=32)), (0, 1), read_numbers)
    assert len(clips) == 2 * len(ALL_CLIPS) and set(clips) == ALL_CLIPS
    assert len(contents_of(index, set()).videos) == len({video.path for video in index.all_videos})


def test_resampled_cameras_show_the_same_moments(root: Path, read_numbers: Any) -> None:
    spec = replace(SPEC, frame_stride=1, fps=FPS / 2)
    batches = list(read_clips(_index(root), spec, size_px=None, channels=1, batch_size=32))
    clips = _clips(batches, (0, 1), read_numbers)
    assert len(clips) > 50


def test_frames_of_different_sizes_are_resized(tmp_path: Path, write_video: Any) -> None:
    root = write_cameras(tmp_path / "sizes", write_video, "v3.0", sizes=((48, 64), (64, 96)))
    with pytest.raises(UserError, match=r"videos differ in size .* set size_px"):
        next(read_clips(_index(root), SPEC, size_px=None, channels=1, batch_size=8))
    stream = open_videos(root, camera=[WRIST, FRONT], num_frames=4, batch_size=4, size_px=24, num_workers=0)
    assert next(iter(stream))["video"].shape == (4, 4, 6, 24, 24)


# ------------------------------------------------------------------------------------------------------- faulty files


def _file_with(root: Path, camera: str, row: int) -> tuple[Path, range]:
    """Return the file of a camera that shows a row, and all rows that it shows."""
    places = files_of(root.name, camera)
    return next((root / path, rows) for path, rows in places.items() if row in rows)


def test_a_camera_with_fewer_frames_is_named_with_its_episode(own: Path, write_video: Any) -> None:
    path, rows = _file_with(own, WRIST, STARTS[-1] - 1)
    write_camera(path, write_video, WRIST, rows[:-1])
    with pytest.raises(UserError) as caught:
        _index(own)
    words = (
        f"cameras {FRONT}, {WRIST} do not show the same frames of episode 4: '{path.relative_to(own)}' has 60 frames"
    )
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert len(_index(own, FRONT).videos) == 5


def test_a_frame_that_is_missing_within_a_file_is_noticed(own: Path, write_video: Any) -> None:
    path, rows = _file_with(own, WRIST, 50)
    write_camera(path, write_video, WRIST, [row for row in rows if row != 100])
    with pytest.raises(UserError, match=r"do not show the same frames of episode 1: .* frames, but (its|the table)"):
        _index(own)


def test_another_frame_rate_is_named_with_its_episode(own: Path, write_video: Any) -> None:
    path, rows = _file_with(own, WRIST, 0)
    write_camera(path, write_video, WRIST, rows, fps=FPS + 5)
    with pytest.raises(UserError) as caught:
        _index(own)
    assert f"episode 0: its frames are up to 0.967 s apart in {FRONT} and {WRIST}, over half a frame" in str(
        caught.value
    )


def test_a_pause_in_one_camera_is_named_with_its_episode(own: Path, write_video: Any) -> None:
    path, rows = _file_with(own, WRIST, STARTS[4])
    times_ms = [100 * place + 80 * (place >= 50) for place in range(len(rows))]
    write_camera(path, write_video, WRIST, rows, times_ms=times_ms)
    with pytest.raises(UserError, match=r"of episode 4: its frames are up to 0\.08 s apart in .*, over half a frame"):
        _index(own)
    times_ms = [100 * place + 30 * (place >= 50) for place in range(len(rows))]  # below half a frame
    write_camera(path, write_video, WRIST, rows, times_ms=times_ms)
    assert len(_index(own).videos) == 5


def test_an_unreadable_file_leaves_out_its_episodes_in_all_cameras(
    own: Path, read_numbers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = _file_with(own, WRIST, STARTS[4])
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"1 of \d+ video files are bad"):
        _index(own, max_bad_fraction=0.0)
    index = _index(own, max_bad_fraction=0.5)
    assert index.labels["episode_index"].tolist() == [0, 1, 2, 3] and str(path.relative_to(own)) in caplog.text
    clips = _clips(list(read_clips(index, SPEC, size_px=None, channels=1, batch_size=32)), (0, 1), read_numbers)
    assert set(clips) == {clip for clip in ALL_CLIPS if clip[0] != 4}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_clips_with_damage_in_one_camera_are_left_out_wherever_a_pass_begins(
    own: Path, read_numbers: Any, caplog: pytest.LogCaptureFixture, num_workers: int
) -> None:
    path, _ = _file_with(own, WRIST, STARTS[1])
    content = bytearray(path.read_bytes())
    middle = content.index(b"mdat") + (len(content) - content.index(b"mdat")) // 2
    content[middle : middle + 600] = bytes(600)
    path.write_bytes(content)  # before it is indexed: its packets are as stated, and do not decode
    index = _index(own, max_bad_fraction=0.5)
    settings: dict[str, Any] = SETTINGS | {"max_bad_fraction": 0.9, "num_workers": num_workers, "decoder": "pyav"}
    stream = make_stream(index, SPEC, seed=0, **settings)
    seen = list(islice(stream.batches(), stream.batches_per_epoch))
    clips = _clips(seen, (0, 1), read_numbers)
    lost = {clip for clip in ALL_CLIPS if clip not in clips}
    assert 8 < len(lost) < len(ALL_CLIPS) / 2 and {episode for episode, _ in lost} >= {1}
    assert f"video '{path.relative_to(own)}' does not decode" in caplog.text and FRONT not in caplog.text
    again = make_stream(index, SPEC, seed=0, **settings).batches(10)
    for before, now in zip(seen[10:], again, strict=False):
        assert torch.equal(before["video"], now["video"]) and torch.equal(before["row"], now["row"])


def test_a_file_of_a_further_camera_that_changes_is_noticed(own: Path, write_video: Any) -> None:
    index = _index(own)
    before = contents_of(index, set())
    path, rows = _file_with(own, WRIST, STARTS[4])
    write_camera(path, write_video, WRIST, [0] * len(rows))
    batches = list(read_clips(index, SPEC, size_px=None, channels=1, batch_size=32, max_bad_fraction=0.9))
    assert 4 not in torch.cat([batch["labels"]["episode_index"] for batch in batches]).tolist()
    change = contents_of(_index(own), set()).change_since(before)
    assert change == f"'{path.relative_to(own)}' has other content"
    assert _index(own, FRONT).content_hash == _index(own, FRONT).content_hash != index.content_hash


# ------------------------------------------------------------------------------------------------------- bad input


def test_names_of_cameras_that_are_wrong_are_one_line(root: Path, tmp_path: Path, write_video: Any) -> None:
    with pytest.raises(UserError, match=rf"camera='top' is unknown: .* has {FRONT}, {WRIST}$"):
        _index(root, [FRONT, "top"])
    with pytest.raises(UserError, match=rf"camera='{FRONT}' is named twice"):
        _index(root, [FRONT, WRIST, FRONT])
    write_video(tmp_path / "plain" / "a.mp4")
    with pytest.raises(
        UserError, match=r"camera='front', 'wrist': .*plain' is a folder of video files, which has no cameras"
    ):
        _index(tmp_path / "plain", ["front", "wrist"])


def test_a_time_of_one_camera_before_its_file_is_one_line(roots: dict[str, Path], tmp_path: Path) -> None:
    own = Path(shutil.copytree(roots["v3.0"], tmp_path / "v3.0"))
    columns = episode_columns()
    columns[f"videos/{WRIST}/from_timestamp"][1] = -1.0
    write_table(own / "meta" / "episodes" / "chunk-000" / "file-000.parquet", columns)
    with pytest.raises(UserError, match="one that starts before 0 s"):
        _index(own)
    assert len(_index(own, FRONT).videos) == 5


def test_rows_of_version_2_that_are_not_all_there_are_one_line(roots: dict[str, Path], tmp_path: Path) -> None:
    own = Path(shutil.copytree(roots["v2.1"], tmp_path / "v2.1"))
    next((own / "data").glob("*/episode_000003.parquet")).unlink()
    with pytest.raises(UserError, match=r"data/ does not hold the episodes 0 to 4 one after the other"):
        _index(own)


def test_a_file_of_version_2_with_more_frames_than_rows_is_bad(
    roots: dict[str, Path], tmp_path: Path, write_video: Any, caplog: pytest.LogCaptureFixture
) -> None:
    own = Path(shutil.copytree(roots["v2.1"], tmp_path / "v2.1"))
    path, rows = _file_with(own, WRIST, 0)
    write_camera(path, write_video, WRIST, [*rows, 0])
    with pytest.raises(UserError, match=r"of episode 0: .* has 31 frames, but the table of its episode has 30 rows"):
        _index(own)
    index = _index(own, WRIST, max_bad_fraction=0.5)
    assert index.labels["episode_index"].tolist() == [1, 2, 3, 4] and "has 31 frames, but the table" in caplog.text
    assert np.array_equal(index.labels["episode_index"], torch.arange(1, 5))


def test_a_frame_at_which_a_process_hung_is_left_out_in_its_camera_alone(root: Path) -> None:
    """The workers name the video and the frame of the camera that was being decoded, as the file counts it."""
    index, row = _index(root), 1
    (_, _), (number, shift) = index.cameras_of(row)
    keyframes, first_frame = index.video(number).keyframes, index.frame_ranges[row][0]
    clip_set = make_clip_set(index, SPEC, size_px=None, channels=1, decoder="pyav")
    table, fatal = clip_set.table, first_frame + shift + 100
    clips = np.arange(table.first_clip[row], table.first_clip[row + 1])
    delivered = []
    with closing(ClipDecoder(clip_set, Faults({(number, fatal)}), lambda shard: False)) as decoder:
        for group, start in zip(table.groups_of(clips).tolist(), table.starts_of(clips).tolist(), strict=True):
            if decoder.decode(row, group, start) is not None:
                delivered.append(start)
    expected = []
    for start in table.starts_of(clips).tolist():
        keyframe = max(frame for frame in keyframes if frame <= start + shift)
        if not keyframe <= fatal <= start + shift + SPEC.span - 1:
            expected.append(start)
    assert delivered == expected and 0 < len(clips) - len(delivered) < 10
