"""Properties of the parsers: whatever they are given, they accept it and keep its values, or refuse it in one line."""

import csv
import json
from dataclasses import asdict, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from data_pipelines.clips import EARLY_S, MAX_HOLD_S, ClipSpec, frames_on_screen, make_clip_table
from data_pipelines.errors import UserError
from data_pipelines.facts import Video, entry_from_fields
from data_pipelines.labels import read_labels, stack_labels
from data_pipelines.shards.index_file import SHARDS_HEADER, parse_shards
from tests.data_pipelines.generated import EXAMPLES, JSON, result_or_refusal, videos

PATHS = ("a.mp4", "sub/b.mp4")
FACTS = Video("a.mp4", 1000, 0, 4, 25.0, 64, 48, 0.16, (0, 2), (0, 1024), False, tick_s=1 / 12800)
VIDEOS = [replace(FACTS, path=path, num_frames=count) for path, count in zip(PATHS, (3, 4), strict=True)]
SHARD = {"name": "s.tar", "size_bytes": 10_000, "sha256": "0" * 64}


# --------------------------------------------------------------------------------------------------- index entries


@EXAMPLES
@given(videos())
def test_an_entry_survives_the_index_file(video: Video) -> None:
    assert entry_from_fields(json.loads(json.dumps(asdict(video)))) == video


@EXAMPLES
@given(JSON)
def test_other_objects_are_no_entries(fields: Any) -> None:
    assume(not isinstance(fields, dict) or not {"path", "reason"} <= fields.keys())
    with pytest.raises((TypeError, ValueError, KeyError)):
        entry_from_fields(fields)


# -------------------------------------------------------------------------------------------------------- metadata


@EXAMPLES
@given(st.lists(st.tuples(st.integers(-(2**62), 2**62), st.floats(-1e6, 1e6, width=32)), min_size=2, max_size=2))
def test_numbers_in_metadata_are_kept(tmp_path: Path, numbers: list[tuple[int, float]]) -> None:
    """Of JSON lines and of CSV alike."""
    rows = [{"file_name": path, "count": i, "size": x} for path, (i, x) in zip(PATHS, numbers, strict=True)]
    for suffix in (".jsonl", ".csv"):
        folder = tmp_path / suffix[1:]
        folder.mkdir(exist_ok=True)
        with open(folder / f"metadata{suffix}", "w", encoding="utf-8", newline="") as out:
            if suffix == ".jsonl":
                out.writelines(json.dumps(row) + "\n" for row in rows)
            else:
                writer = csv.DictWriter(out, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        labels = read_labels(folder, VIDEOS, []).of_videos
        assert labels["count"].tolist() == [i for i, _ in numbers]
        assert labels["size"].tolist() == pytest.approx([x for _, x in numbers])


@EXAMPLES
@given(st.lists(st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=2), min_size=7, max_size=7))
def test_lists_for_each_frame_label_the_frames(frames: list[list[float]]) -> None:
    videos = [replace(FACTS, num_frames=count) for count in (3, 4)]
    labels = stack_labels([{"pose": frames[:3]}, {"pose": frames[3:]}], videos)
    assert labels.of_videos == {} and labels.offsets is not None and labels.offsets.tolist() == [0, 3]
    assert torch.equal(labels.of_frames["pose"], torch.tensor(frames))


# ----------------------------------------------------------------------------------------------------- shards.jsonl


def shards_text(*rows: Any) -> bytes:
    """The bytes of a shards.jsonl with these lines below its header."""
    return "".join(json.dumps(row) + "\n" for row in (SHARDS_HEADER, *rows)).encode()


@EXAMPLES
@given(videos("s.tar/a.mp4"), st.dictionaries(st.text(max_size=5), st.integers(-9, 9), max_size=3))
def test_a_video_in_a_shard_survives_shards_jsonl(video: Video, labels: dict[str, int]) -> None:
    inside = replace(video, size_bytes=500, shard="s.tar", offset_bytes=512)
    shards, entries = parse_shards(shards_text(SHARD, asdict(inside) | {"labels": labels}), "here")
    assert asdict(shards["s.tar"]) == SHARD and entries == [(inside, labels)]


@EXAMPLES
@given(st.integers(-2000, 20_000), st.integers(-2000, 20_000))
def test_bytes_outside_of_the_shard_are_refused(offset: int, size: int) -> None:
    fields = asdict(FACTS) | {"shard": "s.tar", "offset_bytes": offset, "size_bytes": size}
    holds_frames = size >= FACTS.num_frames
    lies_within = offset >= 0 and holds_frames and offset + size <= SHARD["size_bytes"]  # type: ignore[operator]
    parsed = result_or_refusal(lambda: parse_shards(shards_text(SHARD, fields), "here"))
    assert (parsed is not None) == lies_within


# ------------------------------------------------------------------------------------------------------ resampling


def slow_frames_on_screen(video: Video, fps: Fraction) -> list[int]:
    """frames_on_screen by its words, one frame after the other, in rational numbers."""
    if video.frame_ms:
        steps = [min(Fraction(ms, 1000), Fraction(MAX_HOLD_S)) for ms in video.frame_ms]
    else:
        steps = [min(1 / Fraction(video.fps), Fraction(MAX_HOLD_S))] * (video.num_frames - 1)
    shown = [Fraction(0)]
    for step in steps:
        shown.append(shown[-1] + step)
    mean = shown[-1] / len(steps)
    early = min(Fraction(EARLY_S), mean / 4)
    found: list[int] = []
    while not found or Fraction(len(found)) / fps < shown[-1] + mean - early:
        now = len(found) / fps + early
        assume(all(abs(time - now) > Fraction(1, 10**9) for time in shown))  # floating point may fall on either side
        found.append(max(frame for frame, time in enumerate(shown) if time <= now))
    return found


@EXAMPLES
@given(videos(), st.sampled_from([Fraction(1, 2), 1, 7, 10, 24, 25, 30, 60]))
def test_resampling_is_what_its_words_say(video: Video, fps: Fraction) -> None:
    assume(video.num_frames > 1)
    video = replace(video, fps=float(round(video.fps)))
    source = frames_on_screen(video, float(fps))
    assert source.tolist() == slow_frames_on_screen(video, Fraction(fps))
    # Not always the first frame at first: several may begin at time zero, and the last of them is on screen.
    assert source[0] >= 0 and source[-1] < video.num_frames and (np.diff(source) >= 0).all()


# ----------------------------------------------------------------------------------------------------------- clips


@EXAMPLES
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)).map(sorted), min_size=1, max_size=4),
    st.sets(st.integers(1, 299), max_size=6),
    st.tuples(*[st.integers(1, 4)] * 3, st.none() | st.integers(1, 20)),
)
def test_clips_are_all_that_fit(ranges: list[list[int]], keys: set[int], sizes: tuple[Any, ...]) -> None:
    """Against a list of every start of a clip that fits; each group is a run of clips of one video."""
    spec = ClipSpec(*sizes)
    expected = [
        (video, first)
        for video, (start, stop) in enumerate(ranges)
        for first in range(start, stop, spec.step)
        if first + spec.span <= stop
    ]
    pairs = [(start, stop) for start, stop in ranges]
    if not expected:
        with pytest.raises(UserError, match="longest video"):
            make_clip_table(pairs, [(0, *sorted(keys))] * len(ranges), spec)
        return
    table = make_clip_table(pairs, [(0, *sorted(keys))] * len(ranges), spec)
    clips = np.arange(table.num_clips)
    assert list(zip(table.videos_of(clips).tolist(), table.starts_of(clips).tolist(), strict=True)) == expected
    bounds = table.first_clip_of_group.tolist()
    assert bounds[0] == 0 and bounds[-1] == len(expected) and all(a < b for a, b in pairwise(bounds))
    assert all(len({expected[clip][0] for clip in range(a, b)}) == 1 for a, b in pairwise(bounds))
