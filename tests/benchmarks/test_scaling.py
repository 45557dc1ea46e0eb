import json
from pathlib import Path

import pytest

from tests.conftest import run_script
from tests.worldmodel.commands.test_scripts import assert_one_line

REDUCED = [
    "--rounds=2",
    "--steps=2",
    "model.encoder.width=0.125",
    "model.hidden_dim=16",
    "data.batch_size=8",
]


@pytest.mark.slow
def test_tells_the_speedup_of_two_processes_over_one(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = run_script("benchmarks/scaling.py", *REDUCED, "--out", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    one, two = result["rows"]
    assert (one["processes"], one["speedup"], one["efficiency"]) == (1, 1, 1) and two["processes"] == 2
    for row in (one, two):
        assert row["clips_per_s"] * row["step_s"] == pytest.approx(8)
        assert row["efficiency"] == pytest.approx(row["clips_per_s"] / one["clips_per_s"] / row["processes"])
        assert f"{row['clips_per_s']:.1f}" in done.stdout
        assert row["quick_step_s"] <= row["step_s"]
        assert row["quick_speedup"] == pytest.approx(one["quick_step_s"] / row["quick_step_s"])
    assert result["machine"]["cores"] >= 1


def test_senseless_numbers_end_with_one_line() -> None:
    assert_one_line("benchmarks/scaling.py", "--processes", "0", tells="--processes must be at least 1, not 0")
    for counted in ("--steps", "--rounds"):
        assert_one_line("benchmarks/scaling.py", counted, "0", tells=f"{counted} must be at least 1, not 0")


@pytest.mark.slow
def test_processes_that_do_not_get_through_end_it() -> None:
    done = run_script("benchmarks/scaling.py", *REDUCED, "data.mnist_dir=nowhere", "--processes", "2")
    assert done.returncode == 2 and "Traceback" not in done.stderr.splitlines()[-1]
    assert "in nowhere: the MNIST folder" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: 2 processes did not get through")
