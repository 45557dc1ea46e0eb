"""benchmarks/embed.py leaves no command behind; no test embeds anything."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import embed


@pytest.mark.parametrize(("name", "num_commands"), [("processes", 1), ("two_hosts", 2), ("processes_killed", 1)])
def test_an_interrupted_step_leaves_no_command(
    name: str, num_commands: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def recorded(*arguments: object, **options: object) -> "subprocess.Popen[bytes]":
        started.append(popen(*arguments, **options))  # type: ignore[call-overload]
        return started[-1]

    def interrupted(*_: object) -> None:
        if started:
            raise KeyboardInterrupt

    monkeypatch.setattr(embed, "COMMAND", [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(subprocess, "Popen", recorded)
    monkeypatch.setattr(embed, "finish", interrupted)
    monkeypatch.setattr(embed, "finished_parts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embed.STEPS[name](tmp_path, tmp_path / name)
    assert [process.returncode for process in started] == num_commands * [-signal.SIGKILL]
