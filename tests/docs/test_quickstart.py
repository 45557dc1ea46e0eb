"""The notebook of the quickstart, cell by cell in a fresh process."""

import json
import subprocess
import sys

import pytest

from tests.conftest import REPO, script_environment

NOTEBOOK = REPO / "docs" / "quickstart.ipynb"
# As in a notebook, __main__ has no file: processes that it spawns do not run it again.
EXECUTE = """
import json, sys
cells = json.load(open(sys.argv[1], encoding="utf-8"))["cells"]
for cell in cells:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"), globals())
import matplotlib.pyplot as plt
assert len(plt.get_fignums()) == 2
"""


@pytest.mark.slow
def test_the_notebook_runs_and_its_model_beats_persistence() -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, str(NOTEBOOK)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=REPO,
        env=script_environment() | {"MPLBACKEND": "Agg"},
    )
    assert done.returncode == 0, done.stderr
    rows = (line.split() for line in done.stdout.splitlines())
    scores = {row[0]: float(row[1]) for row in rows if len(row) == 2 and row[1].replace(".", "", 1).isdigit()}
    assert scores["simulator_oracle"] < scores["model"] < scores["persistence"]
    assert "torch.Size([4, 64, 1, 2])" in done.stdout


def test_the_notebook_is_stored_without_output() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
