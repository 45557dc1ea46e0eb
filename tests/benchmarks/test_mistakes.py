"""A user's mistake ends a benchmark with one line, before its work."""

import importlib
import sys
from pathlib import Path
from unittest.mock import patch

import pytest


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("check_frames", "--every 0", "--every must be at least 1, not 0"),
        ("check_frames", "--seed -1", "--seed must be from 0 to"),
        ("check_frames", "--keep FILE", "cannot write to --keep FILE"),
        ("few_labels", "--run nowhere --dimension 1", "--dimension needs --bins"),
        ("gpu", "--out FILE", "cannot write to --out FILE"),
        ("growth", "--out FILE", "cannot write to --out FILE"),
        ("loaders", "--out FILE", "cannot write to --out FILE"),
        ("memory", "--clips 4479", "--clips must be at least 4,480, not 4479"),
        ("probe_conv3d", "--batch 0", "--batch must be at least 1, not 0"),
        ("probe_conv3d", "--threads -1", "--threads must be at least 1, not -1"),
        ("probe_conv3d", "--sizes 8 0", "--sizes must be at least 1, not 0"),
        ("probe_conv3d", "--frames 0", "--frames must be at least 1, not 0"),
        ("probe_conv3d", "--widths 0", "--widths must be above 0, not 0"),
        ("scaling", "--out FILE.json --processes 1 3", "data.batch_size=128 is not a multiple of the 3 processes"),
        ("stream", "--repeats 0", "--repeats must be at least 1, not 0"),
        ("stream", "--fraction 0", "--fraction must be above 0 and at most 1, not 0"),
        ("stream", "--fraction 1.5", "--fraction must be above 0 and at most 1, not 1.5"),
        ("stream", "--methods stream by_hand", "--methods by_hand: this machine has stream,"),
        ("surprise", "--run nowhere --device abacus", "--device abacus cannot be used here"),
    ],
)
def test_a_mistake_is_one_line(
    script: str,
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = importlib.import_module(f"benchmarks.{script}")
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(sys, "argv", [script, *arguments.replace("FILE", str(file)).split()])
    # `keep_freed_memory` would be for all tests to come.
    with patch.object(module, "keep_freed_memory", create=True), pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert line.startswith(f"error: {message.replace('FILE', str(file))}")
