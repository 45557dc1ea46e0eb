import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import two_outcomes
from benchmarks.two_outcomes import draw_queries, scores_of, table
from data_pipelines.worlds.commands import ENV_ID
from tests.conftest import REPO, TINY
from worldmodel.commands.main import main


def test_scores_are_expectations_over_both_outcomes() -> None:
    now, both = torch.zeros(2, 2), torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]).expand(2, -1, -1)
    probability = torch.tensor([0.25, 0.5])
    count = 4000
    draws = torch.rand(2, count, generator=torch.Generator().manual_seed(0)) < probability[:, None]
    samples = torch.where(draws[..., None], both[:, :1], both[:, 1:])
    found = scores_of(samples, now, both, probability, base_rate=0.5)
    assert found["law"] == pytest.approx(5 * (0.1875 + 0.25) / 2)
    assert found["model"] == pytest.approx(found["law"], abs=0.02)
    assert found["persistence"] == pytest.approx((0.25 * 3 + 0.75 * 4 + 3.5) / 2)
    assert found["mean_of_samples"] > 1.5 * found["law"]
    assert found["brier_law"] == pytest.approx((0.1875 + 0.25) / 2)
    assert found["brier_model"] == pytest.approx(found["brier_law"], abs=1e-3)
    assert found["brier_base_rate"] == pytest.approx((0.1875 + 0.0625 + 0.25) / 2)
    certain = scores_of(both[:, :1].expand(-1, 2, -1), now, both, probability, base_rate=0.5)
    assert certain["brier_model"] == pytest.approx((0.75 + 0.5) / 2)  # the expected square of 1 - {0, 1}


@pytest.mark.parametrize("num_samples", [4, 64])
def test_samples_of_the_law_have_its_brier_score_however_few_they_are(num_samples: int) -> None:
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(2000, generator=generator)
    both = torch.tensor([[[1.0], [0.0]]]).expand(2000, -1, -1)
    samples = (torch.rand(2000, num_samples, generator=generator) < probability[:, None]).float()[..., None]
    found = scores_of(samples, both[:, 0], both, probability, base_rate=0.5)
    of_few = found["brier_law"] / num_samples  # by which the score of the share is above the law's
    assert found["brier_model"] == pytest.approx(found["brier_law"], abs=0.2 * of_few)
    one = scores_of(samples[:, :1], both[:, 0], both, probability, base_rate=0.5)
    assert one["brier_model"] == pytest.approx(2 * found["brier_law"], rel=0.1)


def test_the_columns_of_the_table_are_below_their_heads() -> None:
    names = ("law", "model", "mean_of_samples", "persistence", "brier_law", "brier_model", "brier_base_rate")
    lines = table({kind: dict.fromkeys(names, 0.5) for kind in ("seen", "unseen")}).splitlines()
    assert {len(line) for line in lines} == {34 + 2 * 20}


def test_a_seed_that_no_generator_takes_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["two_outcomes.py", "--run", "nowhere", "--seed", "-1"])
    with pytest.raises(SystemExit) as end:
        two_outcomes.main()
    assert end.value.code == 2 and "error: --seed must be from 0 to" in capsys.readouterr().err


def test_queries_are_drawn_from_the_combinations() -> None:
    queries = draw_queries("unseen", 5, seed=0)
    assert queries.frames.shape == (5, 1, 3, 64, 64) and queries.outcomes.shape == (5, 2, 3, 64, 64)
    assert queries.actions.shape == (5, 1, 4) and (queries.actions.sum(dim=2) == 1).all()
    assert queries.probability.min() >= 0.1 and queries.probability.max() <= 0.9
    assert (queries.outcomes[:, 0] - queries.outcomes[:, 1]).abs().amax(dim=(1, 2, 3)).min() > 0.1
    assert queries.frames.min() >= 0 and queries.frames.max() <= 1


def test_a_run_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    env = f"data_pipelines.worlds.commands:{ENV_ID}"
    counts = ["--train", "24", "--selection", "4", "--test", "4", "--num-processes", "1"]
    assert main(["record", "--env", env, "--steps", "6", "--policy", "uniform", *counts, "--out", str(data)]) == 0
    small = [*TINY, "train.refine_steps=2", "train.refine_clips=8", f"data.root={data}", f"run_dir={run}"]
    assert main(["train", "--config", str(REPO / "configs" / "commands.yaml"), *small]) == 0
    monkeypatch.setattr(sys, "argv", ["two_outcomes.py", "--run", str(run), "--queries", "6", "--samples", "4"])
    assert two_outcomes.main() == 0
    printed = capsys.readouterr().out
    written = json.loads((run / "two_outcomes.json").read_text())
    assert written["seen"]["law"] > 0 and f"{written['unseen']['model']:.4f}" in printed
