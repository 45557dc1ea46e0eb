import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import influence
from benchmarks.influence import BAD, OF_QUERY, Scores, Sizes, check_videos, found, plant, write_videos
from data_pipelines.errors import UserError


def test_planted_clips_are_what_their_kind_says() -> None:
    sizes = Sizes(clean=3, queries=2, bad=4, held_out=2)
    videos, queries, digits = plant(sizes, seed=0)
    assert len(digits) == 3 + 3 * 2 + 3 * 4 and torch.equal(digits[3:5], digits[5:7])
    assert {kind: len(each) for kind, each in videos.items()} == {
        "clean": 3, **dict.fromkeys(OF_QUERY, 2), **dict.fromkeys(BAD, 4)
    }  # fmt: skip
    assert queries.shape == (2, 9, 64, 64) and queries.dtype == torch.uint8
    assert (videos["copy"] == queries).all()
    assert (videos["other_future"][:, :3] == queries[:, :3]).all()
    assert (videos["other_future"][:, 3:] != queries[:, 3:]).any()
    assert 0 < videos["altered"].max() < 0.9 * queries.max()
    assert videos["noise"].float().mean() > 2 * videos["clean"].float().mean()
    assert (plant(sizes, seed=0).videos["noise"] == videos["noise"]).all()


def test_scores_rank_the_clip_of_each_query() -> None:
    kinds = ["clean", "clean", "copy", "copy", "altered", "altered", "other_future", "other_future", *BAD]
    of_queries = torch.tensor(
        [[0.0, 1.0, 9.0, 0.0, 0.5, 9.0, -1.0, 9.0, 0, 0, 0], [0.0, 1.0, 9.0, 8.0, 9.0, 0.5, 9.0, 2.0, 0, 0, 0]]
    )
    of_clips = torch.tensor([0.0, 1.0, *[9.0] * 6, 2.0, 0.5, -1.0])
    scores = found(Scores({"one": of_queries}, {"other": of_clips}, {}), kinds)
    assert scores["duplicates"]["one"] == {"copy": 1.0, "altered": 0.5, "other_future": 0.5, "first": 0.5}
    assert scores["bad"]["other"] == dict(zip(BAD, (1.0, 0.5, 0.0), strict=True))


def test_videos_of_an_earlier_call_are_continued_with_the_same_sizes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, sizes = tmp_path / "seed_1", Sizes(clean=2, queries=1, bad=1, held_out=1)
    check_videos(folder, sizes, seed=1)
    write_videos(folder, plant(sizes, seed=1), sizes, seed=1)
    check_videos(folder, sizes._replace(halves=3), seed=1)
    with pytest.raises(UserError, match=r"seed_1 has videos of other sizes, .*: choose another --out"):
        check_videos(folder, sizes, seed=2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(influence, "keep_freed_memory", lambda: None)  # would be for all tests to come
    given = ["--clean", "1", "--queries", "2", "--bad", "1", "--held-out", "1"]  # as many videos, of other kinds
    monkeypatch.setattr(sys, "argv", ["influence.py", "--out", str(tmp_path), "--seeds", "0", "1", *given])
    with pytest.raises(SystemExit) as end:
        influence.main()
    assert end.value.code == 2 and "choose another --out" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    (folder / "planted.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*planted\.json"):
        check_videos(folder, sizes, seed=1)
    (folder / "planted.json").unlink()
    with pytest.raises(UserError, match=r"no planted\.json that states their sizes"):
        check_videos(folder, sizes, seed=1)


def test_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(influence, "keep_freed_memory", lambda: None)  # would be for all tests to come
    sizes = ["--clean", "60", "--queries", "2", "--bad", "2", "--held-out", "8", "--halves", "2", "--steps", "1"]
    monkeypatch.setattr(influence, "HEAD_STEPS", 2)
    monkeypatch.setattr(influence, "SETTINGS", (*influence.SETTINGS, "model.encoder.width=0.125", "data.num_lanes=1"))
    monkeypatch.setattr(sys, "argv", ["influence.py", "--out", str(tmp_path), "--seeds", "0", *sizes])
    assert influence.main() == 0
    written = json.loads((tmp_path / "seed_0" / "influence.json").read_text())
    assert written["sizes"]["clean"] == 60 and written["duplicates"]["influence"]["copy"] > 0.9
    assert -1 <= written["effect"]["similar_clip"]["lds"] <= 1
    assert json.loads((tmp_path / "seed_0" / "data" / "test" / "metadata.jsonl").read_text().splitlines()[7])[
        "digit"
    ] in range(10)
    assert f"{written['bad']['loss']['noise']:.3f}" in capsys.readouterr().out
