"""The benchmark of neighbours: its ratios, and that it runs; no test looks at a clock."""

import json
from pathlib import Path

import pytest

from benchmarks.neighbours import ALONE, BUSY, KINDS, NEIGHBOURS, TRAINING, fair_share, row_of
from tests.conftest import run_script
from tests.worldmodel.commands.test_scripts import assert_one_line


@pytest.mark.parametrize(
    ("num_threads", "num_others", "num_cores", "share"), [(2, 0, 2, 1), (2, 1, 2, 1.5), (2, 2, 2, 2), (2, 2, 8, 1)]
)
def test_the_fair_share(num_threads: int, num_others: int, num_cores: int, share: float) -> None:
    assert fair_share(num_threads, num_others, num_cores) == share


def test_ratios_are_to_the_time_alone_and_the_slower_training_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.neighbours.CORES", [0, 1])
    times = {ALONE: [[1.0, 2.0, 3.0], []], BUSY: [[6.0], []], TRAINING: [[4.0, 4.0], [5.0, 5.0, 5.0]]}
    cases = row_of(KINDS[0], {ALONE: 2, BUSY: 1, TRAINING: 2}, times)["cases"]
    assert [cases[neighbour]["step_s"] for neighbour in NEIGHBOURS] == [2, 6, 5]
    assert [cases[neighbour]["to_alone"] for neighbour in NEIGHBOURS] == [1, 3, 2.5]
    assert [cases[neighbour]["to_fair_share"] for neighbour in NEIGHBOURS] == [1, 2, 1.25]


def test_senseless_numbers_and_other_models_end_with_one_line() -> None:
    assert_one_line("benchmarks/neighbours.py", "--steps", "0", tells="--steps must be at least 1, not 0")
    assert_one_line("benchmarks/neighbours.py", "model.latent=none", tells="for model.latent.name=gaussian alone")


@pytest.mark.slow
def test_it_times_each_training_with_each_neighbour(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = run_script(
        *("benchmarks/neighbours.py", "--rounds", "2", "--steps", "2", "--out", str(out)),
        *("model.encoder.width=0.125", "model.hidden_dim=16", "data.batch_size=8", "train.num_threads=1"),
        timeout_s=600,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["training"] for row in rows] == [kind.name for kind in KINDS]
    for row in rows:
        assert list(row["cases"]) == list(NEIGHBOURS)
        for neighbour, case in row["cases"].items():
            own, of_second = case["steps_s"]
            assert case["num_threads"] == 1
            assert len(own) == 4 and (len(of_second) >= 2) == (neighbour == TRAINING)
            assert f"{case['step_s']:.4f}" in done.stdout
