"""Effects on the whole process: how the idle threads of OpenMP wait."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import REPO, script_environment
from worldmodel.commands.process import WAIT_POLICY, wait_passively

# Instead of torch: OpenMP reads its variables when the true one is loaded.
TORCH = f"""
import os, sys
print(*(f"{{name}}={{os.environ[name]}}" for name in {WAIT_POLICY} if name in os.environ), flush=True)
os._exit(0)
"""


def installed_command() -> list[str]:
    """The arguments of Python that do what the installed command `worldmodel` does."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
    module, _, function = project["project"]["scripts"]["worldmodel"].partition(":")
    return ["-c", f"from {module} import {function}; {function}()", "train"]


@pytest.mark.parametrize(
    "command",
    [installed_command(), ["-m", "worldmodel", "train"], [str(REPO / "scripts" / "train.py")]],
    ids=["worldmodel", "python -m worldmodel", "scripts/train.py"],
)
def test_threads_wait_passively_before_torch_is_imported(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(TORCH)
    environment = {name: value for name, value in script_environment().items() if name not in WAIT_POLICY}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(REPO)])
    for of_user, expected in (({}, "OMP_WAIT_POLICY=passive"), ({"GOMP_SPINCOUNT": "7"}, "GOMP_SPINCOUNT=7")):
        done = subprocess.run(
            [sys.executable, *command, "--config", "demo"],
            capture_output=True,
            text=True,
            cwd=REPO,
            env={**environment, **of_user},
        )
        assert done.stdout == f"{expected}\n", done.stderr


@pytest.mark.parametrize("name", WAIT_POLICY)
def test_the_waiting_that_a_user_chose_remains(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in WAIT_POLICY:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "a value of theirs")
    before = dict(os.environ)
    wait_passively()
    assert dict(os.environ) == before
