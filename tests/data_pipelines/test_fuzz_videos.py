"""The fuzzer on a few files: nothing crashes, nothing is lost without a word. scripts/fuzz_videos.py takes many."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz_videos.py"


@pytest.mark.parametrize("num_files", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_damaged_files_are_survived_and_accounted_for(num_files: int) -> None:
    command = [sys.executable, str(SCRIPT), "--files", str(num_files), "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{num_files + num_files // 5:>7,} files\n" in done.stdout
    assert "every file and every clip is accounted for" in done.stdout
    counts = {
        name: int(number.replace(",", ""))
        for number, _, name in (line.strip().partition(" ") for line in done.stdout.partition("\n\n")[0].splitlines())
    }
    assert counts["delivered"] > 0 and counts["dropped, as they do not decode"] > 0
