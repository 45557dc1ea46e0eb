import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import influence
from benchmarks.influence import BAD, OF_QUERY, Scores, Sizes, found, plant


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
