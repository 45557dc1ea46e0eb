"""The demo's commands at reduced size where a container would run them: a user without a name or a home, a small
/dev/shm, no network, and videos that cannot be written to.

Linux namespaces stand in for the container. Making them needs root: otherwise the test is skipped.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO

USER_ID = "12345"
INSIDE = f"""
set -e
mount -t tmpfs -o size=64m tmpfs /dev/shm
mount --bind -o ro "$1" "$1"
cd "$2"
shift 2
exec unshare --user --map-user={USER_ID} --map-group={USER_ID} env -i PATH=/usr/bin:/bin PYTHONPATH={REPO} "$@"
"""

REDUCED = [
    *("model.encoder.width=0.125", "model.embedding_dim=16", "model.hidden_dim=32", "data.batch_size=64"),
    *(
        "train.steps=6",
        "train.refine_steps=6",
        "train.warmup_steps=2",
        "train.log_every=2",
        "train.eval_every=3",
        "train.checkpoint_every=3",
    ),
    *("evaluation.queries=16", "evaluation.fit_clips=64", "evaluation.selection_clips=16"),
]


def in_container(videos: Path, folder: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in `folder` as a user of the container, with `videos` read-only."""
    namespaces = ["unshare", "--mount", "--net", "sh", "-c", INSIDE, "sh", str(videos), str(folder)]
    return subprocess.run([*namespaces, *command], capture_output=True, text=True, timeout=300)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Videos of the demo, written outside the container."""
    folder = tmp_path / "videos"
    counts = ["--train", "256", "--selection", "64", "--test", "64"]
    script = str(REPO / "scripts" / "make_moving_mnist.py")
    subprocess.run([sys.executable, script, "--out", str(folder), *counts], check=True, capture_output=True)
    return folder


@pytest.fixture
def folder(tmp_path: Path, videos: Path) -> Path:
    """The working folder in the container; skips where namespaces cannot be made."""
    folder = tmp_path / "work"
    folder.mkdir()
    if sys.platform != "linux" or not shutil.which("unshare"):
        pytest.skip("needs Linux's unshare")
    if (probe := in_container(videos, folder, "id", "-u")).stdout.strip() != USER_ID:
        pytest.skip(f"namespaces cannot be made here: {probe.stderr.strip()[-200:]}")
    return folder


@pytest.mark.slow
def test_the_demo_runs_in_a_container(videos: Path, folder: Path) -> None:
    def run(script: str, *arguments: str) -> str:
        done = in_container(videos, folder, sys.executable, str(REPO / "scripts" / script), *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    denied = in_container(videos, folder, "touch", str(videos / "new"))
    assert denied.returncode and "Read-only" in denied.stderr
    run("make_moving_mnist.py", "--out", "more", "--train", "8", "--selection", "8", "--test", "8")
    for config in ("demo", "demo_byol"):
        yaml = str(REPO / "configs" / f"{config}.yaml")
        run("train.py", "--config", yaml, f"data.root={videos}", *REDUCED)
    run("evaluate.py", "--run", "runs/demo_byol")
    run("evaluate.py", "--run", "runs/demo", "--compare", "runs/demo_byol")
    query = ["--run", "runs/demo", "--video", str(videos / "test" / "000000.mp4")]
    run("rollout.py", *query, "--num-samples", "4", "--out", "futures.npz")
    run("surprise.py", *query, "--out", "surprises")

    assert json.loads((folder / "runs" / "demo" / "metrics.json").read_text())["forecasts"]["no_latent"]
    assert (folder / "runs" / "demo" / "report.html").stat().st_size > 100_000
    assert (folder / "futures.npz").is_file()
    assert list((folder / "surprises").iterdir())
