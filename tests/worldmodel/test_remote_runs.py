"""Runs whose videos lie behind a URL: nobody is asked for them before the user agrees."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from data_pipelines.errors import UserError
from data_pipelines.shards.packing import pack_videos
from tests.conftest import run_here, run_script, videos_of
from tests.data_pipelines.shard_server import ShardServer
from worldmodel.commands.shared import check_remote
from worldmodel.config import MovingMnistConfig
from worldmodel.runs.opening import load_run_config
from worldmodel.sources import make_source


@pytest.fixture
def server(world: Path, tmp_path: Path) -> Iterator[ShardServer]:
    for split in ("train", "selection", "test"):
        pack_videos(world / split, tmp_path / "packed" / split, progress=False)
    with ShardServer(tmp_path / "packed") as server:
        yield server


def _copy(trained_run: Path, folder: Path, root: str, **data: object) -> Path:
    shutil.copytree(trained_run, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    config["data"] |= {"root": root, **data}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("arguments", "label"),
    [
        (["evaluate.py"], None),
        (["plan.py", "--env", "no:such", "--labels", "10"], None),
        (["plan.py", "--env", "no:such"], "state"),  # imagined paths need a readout of the state
    ],
    ids=["evaluate", "plan", "plan, with paths"],
)
def test_a_run_that_names_a_url_is_refused(
    trained_run: Path, tmp_path: Path, server: ShardServer, arguments: list[str], label: str | None
) -> None:
    run = _copy(trained_run, tmp_path / "run", server.url.replace("//", "//me:secret@"))
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    config["evaluation"]["label"] = label
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    done = run_here(*arguments, "--run", str(run))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert errors == [
        f"error: the run's config names videos at '{server.url}': --allow-remote reads them, with your credentials for "
        "that host"
    ]
    assert not server.requests and "secret" not in done.stderr


def test_with_the_users_word_it_is_evaluated(trained_run: Path, tmp_path: Path, server: ShardServer) -> None:
    run = _copy(trained_run, tmp_path / "run", server.url, remote_cache_dir=str(tmp_path / "cache"))
    done = run_script("evaluate.py", "--run", str(run), "--allow-remote")
    assert done.returncode == 0, done.stderr
    assert f"reading videos from {server.url}" in done.stderr and (run / "report.html").is_file() and server.requests


def test_what_is_not_a_url_of_videos_needs_no_word(trained_run: Path) -> None:
    config = load_run_config(trained_run)
    for data in (config.data, MovingMnistConfig()):
        check_remote(make_source(replace(config, data=data)).url, False)
    with pytest.raises(UserError, match="'file:///etc' is not opened"):
        check_remote(make_source(replace(config, data=replace(videos_of(config), root="file:///etc"))).url, True)
