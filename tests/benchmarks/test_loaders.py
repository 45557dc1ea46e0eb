"""The comparison of loaders: its files are data sets of each kind, its check of frames, its clock."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import loaders, peer_loaders
from benchmarks.loaders import Case, Row, check_frames, difference_from, verdicts, write_case, write_clips
from benchmarks.peer_loaders import LOADERS, Job, Loader, OurStream, cropped, resized, resumes, timed
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.stream import ReadSettings, read_all

CASE = Case("small", "", 2, 36, 12, episodes=2, as_lerobot=True, distinct=1, pool_clips=16)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, VideoIndex]:
    out = tmp_path_factory.mktemp("loaders")
    return out, write_case(CASE, out)


def make_job(written: tuple[Path, VideoIndex], folder: Path, **changes: Any) -> Job:
    out, index = written
    write_clips(CASE, index, folder)
    root = out / CASE.name
    job = Job(
        loader="worldmodel", what="speed", root=str(root), videos=str(root), paths=str(folder / "paths.npy"),
        clips=str(folder / "clips.npy"), num_frames=9, fps=25, scaled=(64, 85), size_px=64, batch_size=4,
        pool_clips=16, workers=0, seconds=0.0, frames=str(folder / "frames.npz"), result=str(folder / "result.json"),
    )  # fmt: skip
    return replace(job, **changes)


def test_a_case_is_a_folder_of_videos_a_lerobot_set_and_one_of_stable_worldmodel(
    written: tuple[Path, VideoIndex], tmp_path: Path
) -> None:
    out, index = written
    root = out / CASE.name
    assert index.frame_ranges == [(0, 18), (18, 36)] * 2
    assert index.labels["episode_index"].tolist() == [0, 1, 2, 3]
    assert len(load_videos(str(root / "video")).videos) == 2
    assert np.load(root / "ep_len.npz")["arr_0"].tolist() == [36, 36]
    assert np.load(root / "ep_offset.npz")["arr_0"].tolist() == [0, 36]
    job = make_job(written, tmp_path)
    assert job.rows.tolist() == [[file, start, 36 * file + start] for file in (0, 1) for start in (0, 9, 18, 27)]
    assert [Path(path).name for path in job.path_of] == ["ep_0.mp4", "ep_1.mp4"]


def test_our_loader_delivers_each_clip_and_resumes(written: tuple[Path, VideoIndex], tmp_path: Path) -> None:
    job = make_job(written, tmp_path, batch_size=2)
    ours = LOADERS["worldmodel"]
    batches = [numbers for numbers, _ in islice(OurStream(job), 8)]
    for epoch in (batches[:4], batches[4:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(8))
    found = timed(ours, job)
    assert found["clips_per_s"] > 0 and 0 < found["first_batch_s"] < 60
    assert check_frames(CASE, written[1], Path(job.frames)) == 0.0
    assert resumes(ours, job)


def test_frames_are_compared_with_ours(written: tuple[Path, VideoIndex], tmp_path: Path) -> None:
    _, index = written
    job = make_job(written, tmp_path)
    [batch] = read_all(index, loaders.SPEC, ReadSettings(batch_size=8, size_px=64))
    order = torch.tensor([5, 0, 3])
    video = batch["video"][order]
    peer_loaders.save_frames(job, order, video)
    assert check_frames(CASE, index, Path(job.frames)) == 0.0
    peer_loaders.save_frames(job, order, video.float() / 255)
    assert check_frames(CASE, index, Path(job.frames)) == 0.0
    peer_loaders.save_frames(job, order.flip(0), video)
    assert check_frames(CASE, index, Path(job.frames)) != 0.0
    peer_loaders.save_frames(job, order, video.roll(1, dims=1))
    assert check_frames(CASE, index, Path(job.frames)) == float("inf")


def test_a_clip_one_frame_late_is_other_frames() -> None:
    clip = np.arange(9, dtype=np.float32)[None, :, None, None, None] * np.ones((1, 9, 3, 4, 4), dtype=np.float32)
    assert difference_from(clip, clip + 0.25) == pytest.approx(0.25)
    assert difference_from(clip, clip + 1) == float("inf")
    assert difference_from(clip, clip - 1) == float("inf")
    assert difference_from(clip, clip[:, :8]) == float("inf")


def test_frames_are_resized_and_cropped_in_the_centre(written: tuple[Path, VideoIndex], tmp_path: Path) -> None:
    job = make_job(written, tmp_path)
    columns = torch.arange(85, dtype=torch.float32).expand(9, 3, 64, 85)
    assert cropped(job, columns)[0, 0, 0].tolist() == list(range(10, 74))
    constant = torch.full((9, 3, 480, 640), 7, dtype=torch.uint8)
    assert resized(job, constant).unique().tolist() == [7] and resized(job, constant).shape == (9, 3, 64, 64)


class Clock:
    """Time in seconds that passes only where a loader says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


def batches_of_two_workers(clock: Clock) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of four clips in pairs, of which the first takes 10 s and the others 2 s."""
    for number in range(100):
        clock.now_s += (10.0 if number == 0 else 2.0) if number % 2 == 0 else 0.0
        yield torch.arange(4), torch.zeros(4, 9, 3, 64, 64, dtype=torch.uint8)


def test_the_clock_of_the_others_starts_after_each_worker_has_delivered(
    written: tuple[Path, VideoIndex], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers whose first batches take 10 s, each further pair 2 s: 8 clips in 2 s are 4 per second."""
    clock = Clock()
    monkeypatch.setattr(peer_loaders, "time", clock)

    job = make_job(written, tmp_path, loader="other", workers=2, seconds=3.0)
    found = timed(Loader(lambda _: batches_of_two_workers(clock), "torch", ("torch",)), job)
    assert found == {"first_batch_s": 10.0, "clips_per_s": 4.0}


def test_our_clock_runs_from_the_start_over_whole_epochs(
    written: tuple[Path, VideoIndex], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches an epoch of eight clips, which take 10 s, then 2 s: the epoch after 11 s ends at 12 s."""
    clock = Clock()
    monkeypatch.setattr(peer_loaders, "time", clock)
    job = make_job(written, tmp_path, loader="worldmodel", workers=2, batch_size=4, seconds=11.0)
    found = timed(Loader(lambda _: batches_of_two_workers(clock), "torch", ("torch",)), job)
    assert found == {"first_batch_s": 10.0, "clips_per_s": pytest.approx(16 / 12)}


def test_a_loader_without_a_state_does_not_resume(written: tuple[Path, VideoIndex], tmp_path: Path) -> None:
    assert not resumes(Loader(lambda job: [1, 2], "torch", ("torch",)), make_job(written, tmp_path))


def test_a_missing_library_is_reported(
    written: tuple[Path, VideoIndex], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(written, tmp_path, loader="datasets")
    (tmp_path / "job.json").write_text(json.dumps(asdict(job)))
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(sys, "argv", ["peer_loaders.py", str(tmp_path / "job.json")])
    assert peer_loaders.main() == 0
    assert "datasets" in json.loads(Path(job.result).read_text())["missing"]


def test_the_verdict_names_the_best_and_whoever_is_faster() -> None:
    case = Case("c", "", 2, 36, aim=1.5)
    ours, best, wrong = (
        Row("c", name, "1", speed, 1.0, 100, difference, difference < 6)
        for name, speed, difference in (("worldmodel", 90.0, 0.0), ("a", 60.0, 1.0), ("b", 500.0, 99.0))
    )
    assert verdicts([case], [ours, best, wrong]) == ["c: 1.50 times the best other loader, a (at least 1.5: met)"]
    faster = replace(best, loader="d", clips_per_s=180.0)
    assert verdicts([case], [ours, best, faster]) == [
        "c: 0.50 times the best other loader, d (at least 1.5: missed)",
        "c: d is faster",
    ]
    first = replace(case, what="first_batch")
    assert verdicts([first], [replace(ours, first_batch_s=3.5)]) == ["c: 3.50 s (at most 3 s: missed)"]


def test_a_mistake_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["loaders.py", "--out", str(tmp_path), "--workers", "0"])
    with pytest.raises(SystemExit) as ended:
        loaders.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --workers") and error.count("\n") == 1
