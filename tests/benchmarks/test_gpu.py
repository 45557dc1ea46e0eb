"""What is asked of a GPU runs on a CPU at reduced size, goes on where it stopped and says what failed."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import Part, run_parts, summary
from data_pipelines.errors import UserError
from tests.conftest import TINY, run_here, run_script
from tests.worldmodel.commands.test_scripts import assert_one_line


@pytest.mark.slow
def test_it_times_trains_and_scores_and_does_nothing_twice(tmp_path: Path) -> None:
    arguments = [
        "benchmarks/gpu.py",
        "--out",
        str(tmp_path),
        *TINY,
        "data.source=moving_mnist",
        "data.mnist_dir=null",
        "train.warmup_steps=0",
    ]
    done = run_script(*arguments, "--seeds", "0", "1", timeout_s=400)
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert list(parts) == ["step-auto", "paper", "best_gpu-0", "best_gpu-1"]
    assert parts["step-auto"]["speedup"] > 0
    for name in ("paper", "best_gpu-0", "best_gpu-1"):
        assert parts[name]["updates"] == 6 and parts[name]["x_oracle"] > 1 and parts[name]["seconds"] > 0
    assert parts["best_gpu-0"]["energy_score"] != parts["best_gpu-1"]["energy_score"]

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.log")}
    again = run_script(*arguments, "--seeds", "0", "1")
    assert again.returncode == 0
    assert f"best_gpu-1         6 updates in {parts['best_gpu-1']['seconds']:.0f} s" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.log")} == before


@pytest.mark.slow
def test_a_part_that_fails_is_told_and_tried_again(tmp_path: Path) -> None:
    trained = {"updates": 5, "seconds": 2.0, "energy_score": 0.66, "oracle_energy_score": 0.6, "x_oracle": 1.1}
    fails = Part("one", [["scripts/train.py", "--config", "nowhere.yaml"]], dict)
    parts = [fails, Part("two", [["scripts/train.py", "--help"]], lambda: trained)]
    results = run_parts(parts, tmp_path)
    assert results["parts"]["one"]["failed"] == "scripts/train.py ended with 2"
    assert "nowhere.yaml" in (tmp_path / "one.log").read_text()
    assert "one                failed: scripts/train.py ended with 2\n" in summary(results)
    assert "two                5 updates in 2 s; Energy Score 0.660, 1.100 x the oracle's" in summary(results)
    mended = [Part("one", fails.commands[:0], lambda: trained), parts[1]]
    assert "failed" not in run_parts(mended, tmp_path)["parts"]["one"]


@pytest.mark.slow
def test_a_failure_is_one_line(tmp_path: Path) -> None:
    arguments = "model.encoder.width=none", "--out", str(tmp_path), "--parts", "paper"
    assert_one_line("benchmarks/gpu.py", *arguments, tells=f"paper failed: see {tmp_path / 'paper.log'}")


def test_a_mode_of_compilation_is_one_of_the_config() -> None:
    """Overrides after the modes were taken for modes."""
    assert set(gpu.MODES) == {"none", "default", "max-autotune", "auto"}
    done = run_here("benchmarks/gpu.py", "--compile", "none", "data.mnist_dir=null")
    assert done.returncode == 2 and "argument --compile: invalid choice: 'data.mnist_dir=null'" in done.stderr


def test_parts_are_of_the_machine_that_they_ran_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = {"updates": 5, "seconds": 2.0, "energy_score": 0.66, "oracle_energy_score": 0.6, "x_oracle": 1.1}
    parts = [Part(name, [], lambda: trained) for name in ("one", "two", "three")]
    for name, part in zip(("slow", "slow", "fast"), parts, strict=True):
        monkeypatch.setattr(gpu, "machine_description", lambda name=name: {"gpu": name, "torch": "2"})
        run_parts([part], tmp_path)
    results = run_parts(parts, tmp_path)
    assert [part["machine"]["gpu"] for part in results["parts"].values()] == ["slow", "slow", "fast"]
    lines = [line.split()[0] for line in summary(results).splitlines()]
    assert lines == ["slow,", "one", "two", "fast,", "three"]

    # A part of an earlier version, which failed, is neither of this call nor of a machine.
    (tmp_path / "gpu.json").write_text('{"machine": {"gpu": "other"}, "parts": {"old": {"failed": "x"}}}')
    monkeypatch.setattr(gpu, "make_parts", lambda args: parts)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    assert gpu.main() == 0
    assert capsys.readouterr().out.split("\n")[1:3] == ["on an unknown machine", f"{'old':<18} failed: x"]


@pytest.mark.parametrize("content", ["{", "[]", '{"parts": [1]}', '{"parts": {"paper": 1}}', "{}"])
def test_damaged_results_are_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "gpu.json").write_text(content)
    with pytest.raises(UserError, match=r"gpu\.json is damaged: remove it, or choose another --out"):
        run_parts([], tmp_path)
