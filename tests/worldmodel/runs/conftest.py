"""A trained and evaluated run."""

import shutil
from pathlib import Path

import pytest

import worldmodel


@pytest.fixture(scope="session")
def evaluated_run(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny trained run with its evaluation. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(trained_run, folder)
    worldmodel.evaluate(worldmodel.load(folder))
    return folder
