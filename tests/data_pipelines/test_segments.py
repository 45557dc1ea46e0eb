"""Segments that are decoded alone are those of the clips, and have keys by content and first frame."""

import shutil
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.clip_decoder import make_clip_set
from data_pipelines.clips import ClipSpec
from data_pipelines.roots import WeightedRoot, load_roots
from data_pipelines.segments import segments_of_clips
from data_pipelines.split_folders import load_split
from data_pipelines.stream import ReadSettings, StreamSettings, VideoStream, read_all, read_clips
from data_pipelines.transforms import split_segments

SPECS = [
    ClipSpec(3, 2),
    ClipSpec(3, 2, clip_step=2),
    ClipSpec(2, 3, frame_stride=2, clip_step=3),
    ClipSpec(3, 2, frame_stride=3),
    ClipSpec(2, 2, frame_stride=2, clip_step=1, fps=7.0),
]


@pytest.mark.parametrize("spec", SPECS)
def test_segments_alone_have_the_pixels_of_the_clips(mixed_folder: Path, spec: ClipSpec) -> None:
    index = load_split(str(mixed_folder), None)
    clip_set = make_clip_set(index, spec, size_px=32, channels=3, decoder="pyav")
    segments = segments_of_clips(clip_set)
    settings = ReadSettings(batch_size=4, size_px=32, decoder="pyav")
    batches = list(read_all(index, spec, settings))
    clips = torch.cat([batch["clip_id"] for batch in batches]).numpy()
    video = split_segments(torch.cat([batch["video"] for batch in batches]), spec.num_segments)
    ids = segments.ids(clips)
    assert ids.shape == (len(clips), spec.num_segments) and len(clips) > 4
    needed = np.unique(ids)
    alone = list(read_clips(segments.alone, needed, settings))
    found = {
        int(number): frames for batch in alone for number, frames in zip(batch["clip_id"], batch["video"], strict=True)
    }
    assert sorted(found) == needed.tolist()
    for row, of_clip in enumerate(ids.tolist()):
        for segment, number in enumerate(of_clip):
            assert torch.equal(found[number], video[row, segment])
    assert len(np.unique(segments.keys(needed))) == len(needed)


def test_keys_are_those_of_the_content_however_clips_are_cut(mixed_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(mixed_folder, tmp_path / "a")
    shutil.copytree(mixed_folder, tmp_path / "b")
    for path in list((tmp_path / "b").iterdir()):
        path.rename(path.with_name(f"other_{path.name}"))

    def keys_of(spec: ClipSpec, root: Path) -> set[int]:
        index = load_split(str(root), None)
        segments = segments_of_clips(make_clip_set(index, spec, size_px=32, channels=3, decoder="pyav"))
        clips = np.arange(segments.clip_set.table.num_clips)
        return set(segments.keys(segments.ids(clips)).ravel().tolist())

    tiled = keys_of(ClipSpec(3, 2), tmp_path / "a")
    assert tiled == keys_of(ClipSpec(3, 2), tmp_path / "b")
    assert tiled < keys_of(ClipSpec(2, 2, clip_step=2), tmp_path / "a")
    several = load_roots([WeightedRoot(str(tmp_path / "a"), 1), WeightedRoot(str(tmp_path / "b"), 2)], None)
    segments = segments_of_clips(make_clip_set(several, ClipSpec(3, 2), size_px=32, channels=3, decoder="pyav"))
    clips = np.arange(segments.clip_set.table.num_clips)
    assert set(segments.keys(segments.ids(clips)).ravel().tolist()) == tiled


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("start", [0, 7])
def test_places_are_those_of_the_decoded_batches(mixed_folder: Path, start: int, world_size: int) -> None:
    index = load_split(str(mixed_folder), None)
    settings = StreamSettings(batch_size=4, size_px=32, num_lanes=4, pool_clips=8)
    for rank in range(world_size):
        stream = VideoStream(index, ClipSpec(2, 2), settings, rank=rank, world_size=world_size)
        count = 2 * stream.batches_per_epoch + 1
        with closing(stream.batches(start)) as batches:
            decoded = [(batch["clip_id"].tolist(), batch["row"].tolist()) for batch in islice(batches, count)]
        places = [(ids.tolist(), rows.tolist()) for ids, rows in islice(stream.places(start), count)]
        assert places == decoded
