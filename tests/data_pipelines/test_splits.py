"""An index is divided into disjoint splits, by video or by time."""

from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.errors import UserError
from data_pipelines.facts import Video
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.splits import share_of_split, split_index


def _facts(name: str, num_frames: int = 100) -> Video:
    return Video(
        path=name,
        size_bytes=1,
        mtime_ns=0,
        num_frames=num_frames,
        fps=10.0,
        width=64,
        height=64,
        duration_s=num_frames / 10,
        keyframes=(0,),
        keyframe_pts=(0,),
        open_gop=False,
    )


def test_many_videos_are_split_by_video() -> None:
    videos = [_facts(f"{row}.mp4") for row in range(45)]
    index = VideoIndex(Path("x"), videos, labels={"row": torch.arange(45)})
    train, selection, test = (split_index(index, split) for split in ("train", "selection", "test"))
    assert [len(part.videos) for part in (train, selection, test)] == [37, 4, 4]
    paths = [video.path for part in (train, selection, test) for video in part.videos]
    assert sorted(paths) == sorted(video.path for video in videos)
    for part in (train, selection, test):
        assert [video.path for video in part.videos] == [f"{row}.mp4" for row in part.labels["row"].tolist()]
    assert len({part.content_hash for part in (train, selection, test)}) == 3


def test_a_split_that_does_not_exist() -> None:
    with pytest.raises(UserError, match=r"split='trian' is not one of train, selection, test \(did you mean train\?\)"):
        split_index(VideoIndex(Path("x"), [_facts("a.mp4")]), "trian")  # type: ignore[arg-type]


def test_few_videos_are_split_by_time() -> None:
    index = VideoIndex(Path("x"), [_facts("a.mp4", 100), _facts("b.mp4", 50)])
    ranges = {split: split_index(index, split).frame_ranges for split in ("train", "selection", "test")}
    assert ranges == {
        "train": [(0, 80), (0, 40)],
        "selection": [(80, 90), (40, 45)],
        "test": [(90, 100), (45, 50)],
    }
    assert split_index(index, "train").content_hash != index.content_hash


def test_episodes_are_rows_of_their_own() -> None:
    files = [_facts("a.mp4", 100), _facts("b.mp4", 60)]
    index = VideoIndex(
        Path("x"),
        [files[row // 8] for row in range(12)],
        labels={"row": torch.arange(12)},
        episodes=[(10 * (row % 8), 10 * (row % 8) + 10) for row in range(12)],
        frame_labels={"action": torch.arange(160)},
        frame_label_offsets=torch.arange(12),
    )
    assert index.frame_ranges[9] == (10, 20)
    assert VideoIndex(Path("x"), index.videos, episodes=[(0, 5)] * 12).content_hash != index.content_hash
    parts = [split_index(index, split) for split in ("train", "selection", "test")]
    assert [len(part.videos) for part in parts] == [10, 1, 1]
    for part in parts:
        for row, number in enumerate(part.labels["row"].tolist()):
            assert part.videos[row] == index.videos[number]
            assert part.frame_ranges[row] == index.frame_ranges[number]
            assert part.frame_label_offsets is not None and part.frame_label_offsets[row] == number
    one_file = VideoIndex(
        Path("x"),
        files[:1] * 50,
        labels={"row": torch.arange(50)},
        episodes=[(2 * row, 2 * row + 2) for row in range(50)],
    )
    held_out = split_index(one_file, "test").labels["row"]
    assert len(held_out) == 5 and (held_out.diff() > 1).any()  # from anywhere in it
    few = split_index(index.rows([8, 9]), "selection")
    assert few.frame_ranges == [(8, 9), (18, 19)]


def test_parts_of_a_folder_are_disjoint_and_all(tmp_path: Path, write_video: Any) -> None:
    for number in range(12):
        write_video(tmp_path / f"{number:02d}.mp4", video=number)
    index = load_videos(tmp_path, progress=False)
    for shares in ((0.9, 0.1), (0.5, 0.5), (0.8, 0.1, 0.1)):
        parts = [{video.path for video in share_of_split(index, part, shares).videos} for part in range(len(shares))]
        assert sum(map(len, parts)) == 12 == len(set().union(*parts)) and all(parts)
    few = index.rows([0, 1])
    assert [share_of_split(few, part, (0.5, 0.5)).share for part in (0, 1)] == [(0.0, 0.5), (0.5, 1.0)]
