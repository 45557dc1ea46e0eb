"""open_videos: from a folder to batches in one call; a state that resumes exactly; use in a DataLoader."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from data_pipelines.errors import UserError
from data_pipelines.stream import open_videos
from data_pipelines.worlds.causal import CausalStream, CausalWorld
from tests.conftest import run_python
from tests.data_pipelines.streams import batch_hash

OPTIONS: dict[str, Any] = {"num_frames": 4, "batch_size": 12, "size_px": 32, "channels": 1, "num_workers": 0}


def test_a_folder_is_opened_in_one_call(mixed_folder: Path) -> None:
    stream = open_videos(mixed_folder, num_workers=0)
    assert isinstance(stream, IterableDataset)
    [batch] = islice(stream, 1)
    assert batch["video"].shape == (16, 16, 3, 64, 64) and batch["video"].dtype == torch.uint8
    assert batch["row"].tolist() == list(range(16)) and len(set(batch["clip_id"].tolist())) == 16
    assert open_videos(mixed_folder, num_workers=1).fingerprint == stream.fingerprint
    assert open_videos(mixed_folder, seed=1, num_workers=0).fingerprint != stream.fingerprint


def test_a_split_is_a_share_of_a_folder_without_splits(mixed_folder: Path) -> None:
    sizes = {
        split: open_videos(mixed_folder, split=split, num_frames=2, batch_size=1, num_workers=0).batches_per_epoch
        for split in (None, "train", "selection", "test")
    }
    whole = sizes.pop(None)
    assert sum(sizes.values()) == whole and min(sizes.values()) > 0


RESUME = """
import json, sys
from itertools import islice
from data_pipelines.stream import open_videos
from tests.data_pipelines.streams import batch_hash

root, options, state, count = json.loads(sys.argv[1])
stream = open_videos(root, **options)
stream.load_state_dict(state)
print(json.dumps([batch_hash(batch) for batch in islice(stream, count)]))
"""


def test_a_state_continues_in_a_fresh_process(mixed_folder: Path) -> None:
    """A fork of a process that holds none of our modules (`tests.forked`), with another hash seed than this one."""
    stream = open_videos(mixed_folder, **OPTIONS)
    total = stream.batches_per_epoch + 3
    whole = [batch_hash(batch) for batch in islice(stream.batches(), total)]
    assert len(set(whole)) == total
    middle = stream.batches_per_epoch - 2  # the rest crosses the end of an epoch
    assert [batch_hash(batch) for batch in islice(stream, middle)] == whole[:middle]
    state = stream.state_dict()
    job = json.dumps([str(mixed_folder), OPTIONS | {"num_workers": 2}, state, total - middle])
    done = run_python("-c", RESUME, job)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == whole[middle:]
    continued = [batch_hash(batch) for batch in islice(stream, total - middle)]
    assert continued == whole[middle:]  # so does the stream itself


def test_a_state_of_another_stream_is_refused(mixed_folder: Path) -> None:
    state = open_videos(mixed_folder, **OPTIONS).state_dict()
    other = open_videos(mixed_folder, **OPTIONS | {"seed": 1})
    with pytest.raises(UserError, match="the state is of another stream"):
        other.load_state_dict(state)
    with pytest.raises(UserError, match=r"\{'epoch': 3\} is not the state of a stream: give what"):
        other.load_state_dict({"epoch": 3})


def test_generated_streams_have_a_state_too() -> None:
    streams = [CausalStream(CausalWorld("isotropic", 0), batch_size=4, seed=5) for _ in range(2)]
    batches = list(islice(streams[0], 3))
    streams[1].load_state_dict(streams[0].state_dict())
    assert next(iter(streams[1]))["clip_id"].tolist() == [12, 13, 14, 15]
    assert batches[2]["clip_id"].tolist() == [8, 9, 10, 11]


def test_a_loader_without_workers_gives_the_batches(mixed_folder: Path) -> None:
    stream = open_videos(mixed_folder, **OPTIONS)
    expected = [batch_hash(batch) for batch in islice(stream.batches(), 3)]
    loader = DataLoader(stream, batch_size=None, num_workers=0)
    assert [batch_hash(batch) for batch in islice(loader, 3)] == expected


def test_a_loader_with_workers_is_refused(mixed_folder: Path) -> None:
    loader = DataLoader(open_videos(mixed_folder, **OPTIONS), batch_size=None, num_workers=1)
    with pytest.raises(UserError, match=r"use DataLoader\(stream, batch_size=None, num_workers=0\)"):
        next(iter(loader))


@pytest.mark.parametrize(
    ("batch_size", "world_size", "num_lanes"),
    [(12, 1, 12), pytest.param(64, 1, 32, marks=pytest.mark.slow), (96, 4, 32), (7, 1, 7), (74, 2, 2)],
)
def test_lanes_divide_a_batch_and_ranks_divide_the_lanes(
    mixed_folder: Path, batch_size: int, world_size: int, num_lanes: int
) -> None:
    options = OPTIONS | {"num_frames": 2, "batch_size": batch_size, "world_size": world_size}
    [batch] = islice(open_videos(mixed_folder, rank=world_size - 1, **options), 1)
    rows = batch["row"].tolist()
    per_lane = batch_size // num_lanes
    own = [row for row in range(batch_size) if row // per_lane % world_size == world_size - 1]
    assert rows == own


def test_mistakes_are_named(mixed_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch_size=10 must be a positive multiple of the 4 processes"):
        open_videos(mixed_folder, batch_size=10, world_size=4)
    with pytest.raises(UserError, match="longest video has"):
        open_videos(mixed_folder, num_frames=5000)
    with pytest.raises(UserError):
        open_videos(tmp_path / "nothing")
