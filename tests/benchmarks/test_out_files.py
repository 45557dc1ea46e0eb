"""Benchmarks that write one file create its folder, or end, before they measure."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest

from benchmarks import neighbours, rollout, scaling, stream, train_step


class Measured(Exception):
    """The measurement has begun."""


@pytest.fixture(params=[neighbours, rollout, scaling, stream, train_step], ids=lambda module: module.__name__)
def benchmark(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    with ExitStack() as patched:
        for name in ("bench", "plain_process"):
            patched.enter_context(patch.object(request.param, name, side_effect=Measured, create=True))
        patched.enter_context(patch.object(request.param, "keep_freed_memory", create=True))
        yield request.param


def test_the_folder_of_the_file_is_created_before_the_work(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--out", str(tmp_path / "new" / "folder" / "out.json")])
    with pytest.raises(Measured):
        benchmark.main()
    assert (tmp_path / "new" / "folder").is_dir()


def test_a_file_that_cannot_be_written_ends_it_before_the_work(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out.json"
    monkeypatch.setattr(sys, "argv", ["benchmark", "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        benchmark.main()
    assert end.value.code == 2
    assert f"cannot write to --out {out}" in capsys.readouterr().err
