"""The benchmark of the stream runs, on a few files, and writes what it prints."""

import json
from pathlib import Path

import pytest

from tests.conftest import run_here, run_script

SCRIPT = "benchmarks/stream.py"


@pytest.mark.slow
def test_it_measures_the_stream_against_decoding_in_order(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    arguments = ["--out", str(out), "--data", str(tmp_path / "videos")]
    arguments += ["--cases", "tiny", "--fraction", "0.02", "--repeats", "1", "--methods", "stream", "in_order_pyav"]
    done = run_script(SCRIPT, *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["machine"]["cores"] >= 1
    rows = result["rows"]
    assert [(row["method"], row["workers"]) for row in rows] == [("stream", 1), ("stream", 2), ("in_order_pyav", 0)]
    for row in rows:
        assert row["case"] == "tiny"
        assert abs(row["frames_per_s"] - 9 * row["clips_per_s"]) < 1
        assert row["clips_per_s"] > 0 and 50 < row["peak_rss_mb"] < 5000
        assert f"{row['clips_per_s']:,.1f}" in done.stdout
    ratio = rows[0]["clips_per_s"] / rows[2]["clips_per_s"]
    assert f"{ratio:.2f} x decoding in order by PyAV" in done.stdout


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "mine.txt").write_text("keep", encoding="utf-8")
    done = run_here(SCRIPT, "--data", str(tmp_path), "--cases", "tiny", "--fraction", "0.01")
    assert done.returncode == 2
    assert done.stderr.startswith("error:") and "is not empty" in done.stderr
