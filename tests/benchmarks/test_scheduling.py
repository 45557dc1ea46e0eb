"""SVT-AV1 makes a program that root runs a real-time one, which slows the wakes of what it starts."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import check_frames
from benchmarks.fuzz import media
from benchmarks.loaders import Case, write_case
from benchmarks.scheduling import kept_scheduling

AV1 = "libsvtav1"


def write_for_loaders(folder: Path) -> None:
    assert len(write_case(Case("short", "", 1, 12, 2, AV1, distinct=1, pool_clips=16), folder).videos) == 1


def write_for_the_fuzzer(folder: Path) -> None:
    [codec] = [codec for codec in media.CODECS if codec.name == AV1]
    media.write_video(folder / "short.mkv", codec)


def write_for_the_comparison_with_ffmpeg(folder: Path) -> None:
    [codec] = [codec for codec in check_frames.CODECS if codec.encoder == AV1]
    check_frames.encode(folder / "short.mkv", codec)


@pytest.mark.parametrize("write", [write_for_loaders, write_for_the_fuzzer, write_for_the_comparison_with_ffmpeg])
def test_writing_av1_changes_no_scheduling(write: Callable[[Path], None], tmp_path: Path) -> None:
    before = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority
    with kept_scheduling():  # one that fails leaves the others theirs
        write(tmp_path)
        assert any(path.stat().st_size > 0 for path in tmp_path.rglob("*.m*") if path.is_file())
        assert (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority) == before
