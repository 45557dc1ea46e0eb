import json
from pathlib import Path

import pytest
import torch

from benchmarks.rollout import bench
from tests.conftest import REPO, run_here
from tests.worldmodel.commands.test_scripts import assert_one_line

REDUCED = ["--queries", "2", "--samples", "4", "--steps", "2", "--repeats", "1"]


def test_reports_latency_and_the_ratio_of_batch_and_loop(trained_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = run_here("benchmarks/rollout.py", "--run", str(trained_run), *REDUCED, "--out", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["clip"] == [3, 1, 64, 64] and result["latency_ms"] > 0
    assert result["throughput"][0]["num_threads"] == 1
    assert result["machine"]["cores"] >= 1
    for row in result["throughput"]:
        assert row["batched_per_s"] * row["batched_s"][0] == pytest.approx(2 * 4 * 2)
        assert row["ratio"] == pytest.approx(row["loop_s"][0] / row["batched_s"][0])
        assert f"{row['ratio']:.1f} x" in done.stdout
    assert f"{result['latency_ms']:.1f} ms for 4 rollouts of 2 segments" in done.stdout


def test_a_model_that_is_conditioned_on_actions_gets_some() -> None:
    taken: list[tuple[int, ...]] = []

    class Conditioned:
        action_dim = 2

        def rollout(self, video: torch.Tensor, horizon: int, num_samples: int, *, actions: torch.Tensor) -> None:
            assert len(video) == len(actions) and -1 <= actions.min() <= actions.max() <= 1
            taken.append(tuple(actions.shape))

    bench(Conditioned(), torch.zeros(3, 1, 1, 4, 4), samples=2, steps=5, repeats=1)  # type: ignore[arg-type]
    assert set(taken) == {(1, 5, 2), (3, 5, 2)}


def test_senseless_numbers_and_worlds_end_with_one_line(tmp_path: Path) -> None:
    assert_one_line("benchmarks/rollout.py", "--samples", "0", tells="--samples must be at least 1, not 0")
    causal = str(REPO / "configs" / "causal" / "isotropic.yaml")
    assert_one_line("benchmarks/rollout.py", "--config", causal, tells="has data.source=causal")
