"""Runs on the Hugging Face Hub: a small one on localhost, and fresh processes that push and load."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import worldmodel
from tests.conftest import REPO, script_environment
from tests.worldmodel.runs.hub_server import TOKEN, Hub, Repository, hub_server
from worldmodel.runs.hub import is_repository_name

CALLS = """
import json, os, sys
import torch
import worldmodel
from data_pipelines.errors import UserError
clip = torch.rand(2, 3, 1, 64, 64, generator=torch.Generator().manual_seed(0))
token = os.environ["HF_TOKEN"]
for case in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = case.pop("token", token)
    push_to, private = case.pop("push_to", None), case.pop("private", True)
    try:
        run = worldmodel.load(**case)
        if push_to:
            print(worldmodel.push(run, push_to, private=private))
        else:
            print(json.dumps([str(run.folder), run.forecast(clip, 2, 3).tolist()]))
    except UserError as error:
        print(error)
"""
CHECKPOINT = "checkpoints/step_00000006"
READ = {
    *("config.yaml", "metrics.json", "readout.safetensors", "surprise.safetensors", "checkpoints/index.json"),
    *(f"{CHECKPOINT}/{name}" for name in ("model.safetensors", "teacher.safetensors", "state.json")),
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as hub:
        yield hub


def python(home: Path, url: str, *arguments: str) -> str:
    """Run Python in a fresh process with its own home folder and the Hub at this URL, and return its output."""
    inherited = {key: value for key, value in script_environment().items() if not key.startswith("HF_")}
    ours = {"HF_ENDPOINT": url, "HF_TOKEN": TOKEN, "HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=REPO, env=inherited | ours, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def calls(home: Path, url: str, *cases: dict[str, Any]) -> list[str]:
    """Load runs in a fresh process, and push those with `push_to`. Return a line per case: the result or the error."""
    return python(home, url, "-c", CALLS, json.dumps(cases)).splitlines()


def test_a_pushed_run_loads_elsewhere(hub: Hub, evaluated_run: Path, tmp_path: Path) -> None:
    repository = hub.repositories["owner/demo"] = Repository(private=True)
    repository.commit({".gitattributes": b"", "checkpoints/step_00000002/model.safetensors": b"", "encoder.pt2": b""})
    printed = python(tmp_path, hub.url, "-m", "worldmodel", "push", str(evaluated_run), "owner/demo")
    assert printed == f"{hub.url}/owner/demo\n"
    pushed = list(repository.commits.values())[-1]
    assert set(pushed) == READ | {"README.md", ".gitattributes"}
    assert b'worldmodel.load("owner/demo")' in pushed["README.md"]

    # Other files of a repository are not downloaded.
    others = {"run.py": b"", "encoder.pt2": b"", f"{CHECKPOINT}/optimizer.safetensors": b"", "checkpoints/a.bin": b""}
    commit = repository.commit(pushed | others)
    folder, forecasts = json.loads(*calls(tmp_path, hub.url, {"run": "owner/demo"}))
    clip = torch.rand(2, 3, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.tensor(forecasts), worldmodel.load(evaluated_run).forecast(clip, 2, 3))
    assert hub.downloads == READ
    assert Path(folder) == tmp_path / ".cache" / "worldmodel" / "hub" / "owner" / "demo" / commit
    assert not any(path.is_symlink() for path in Path(folder).rglob("*"))

    # A commit that was downloaded before needs no network.
    nowhere = "http://127.0.0.1:9"
    again, error = calls(tmp_path, nowhere, {"run": "owner/demo", "revision": commit}, {"run": "owner/demo"})
    assert json.loads(again) == [folder, forecasts]
    assert error.startswith(
        "there is no folder 'owner/demo' here, and the Hugging Face Hub cannot be reached for 'owner/demo': check the "
        "name and the network ("
    )


def test_mistakes_are_one_line(hub: Hub, trained_run: Path, tmp_path: Path) -> None:
    index: dict[str, Any] = {"latest": "../../outside", "best": None, "kept": []}
    for name, files in {
        "empty": {},
        "hostile": {"config.yaml": b"", "checkpoints/index.json": json.dumps(index).encode()},
        "truncated": {
            "config.yaml": b"run_dir: run",
            "checkpoints/index.json": json.dumps(index | {"latest": "step_00000006"}).encode(),
        },
    }.items():
        hub.repositories[f"owner/{name}"] = Repository(private=False)
        hub.repositories[f"owner/{name}"].commit(files)
    run = str(trained_run)
    expected: list[tuple[dict[str, Any], str]] = [
        (
            {"run": "owner/absent"},
            "there is no folder 'owner/absent' here, and the Hugging Face Hub has no repository 'owner/absent': check "
            "the name; a private one needs `hf auth login` or HF_TOKEN",
        ),
        ({"run": "owner/empty", "revision": "absent"}, "the repository 'owner/empty' does not have this revision"),
        (
            {"run": "owner/empty"},
            "'owner/empty' does not hold a run: it lacks the latest checkpoint in checkpoints/index.json",
        ),
        ({"run": "owner/hostile"}, "names '../../outside', which is not a checkpoint of a run"),
        ({"run": "owner/truncated"}, f"{CHECKPOINT} is damaged: No such file or directory"),
        (
            {"run": "docs/reference", "revision": "main"},
            "revision='main' belongs to a repository on the Hub, but docs/reference is a folder",
        ),
        ({"run": "/absent/folder"}, "no run in /absent/folder"),
        ({"run": run, "push_to": "demo"}, "'demo' is not a valid name of a repository: give owner/name"),
        ({"run": run, "push_to": "owner/empty"}, "the repository 'owner/empty' is public: allow a public upload, or"),
        (
            {"run": run, "push_to": "owner/new", "token": "hf_wrong"},
            "the Hugging Face Hub answers 403 for 'owner/new': check the permissions of your token",
        ),
        ({"run": run, "push_to": "owner/open", "private": False}, f"{hub.url}/owner/open"),
        ({"run": run, "push_to": "owner/new", "token": ""}, "uploading needs a token of the Hugging Face Hub: run"),
    ]
    lines = calls(tmp_path, hub.url, *(case for case, _ in expected))
    assert len(lines) == len(expected), lines
    for line, (case, text) in zip(lines, expected, strict=True):
        assert text in line, case
    assert not hub.repositories["owner/open"].private and len(hub.repositories["owner/open"].commits) == 2
    assert "owner/new" not in hub.repositories and len(hub.repositories["owner/empty"].commits) == 1
    assert not any("outside" in str(path) for path in tmp_path.rglob("*"))


def test_names_of_repositories() -> None:
    assert all(map(is_repository_name, ("owner/name", "a/b-c.d_1")))
    assert not any(map(is_repository_name, ("name", "a/b/c", "../b", "a/..", "/a", "a/", "a/b c", "~/a", "a//b")))
