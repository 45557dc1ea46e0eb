"""Pools of processes end with Ctrl-C."""

import multiprocessing
import time
from pathlib import Path

import pytest

from data_pipelines.processes import ending, spawned_pool

pytestmark = pytest.mark.usefixtures("no_other_workers")


def long_job(begun: Path) -> None:
    begun.touch()
    time.sleep(600)


def test_ctrl_c_ends_the_processes_of_a_pool_at_once(tmp_path: Path) -> None:
    """Without waiting for the job that runs, or the one that waits."""
    with pytest.raises(KeyboardInterrupt), ending(spawned_pool(1)) as pool:
        jobs = [pool.submit(long_job, tmp_path / name) for name in ("first", "second")]
        while not (tmp_path / "first").exists():
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert all(job.done() for job in jobs)
    assert not (tmp_path / "second").exists()
    assert not multiprocessing.active_children()
