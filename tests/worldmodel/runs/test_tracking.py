import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.errors import UserError
from worldmodel.config import Config
from worldmodel.runs import checkpoint as checkpoint_module
from worldmodel.runs.checkpoint import load_checkpoint
from worldmodel.runs.tracking import Tracker, read_history, versions
from worldmodel.training.loop import train


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_rows_are_written_at_once_and_a_resume_drops_those_that_run_again(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, start_step=0)
    for step in (1, 2, 3):
        tracker.log("train", step, {"loss": step / 10})
    assert [row["step"] for row in read_history(tmp_path)] == [1, 2, 3]
    tracker.close()
    Tracker(tmp_path, start_step=2).close()
    assert read_history(tmp_path) == [{"step": step, "split": "train", "loss": step / 10} for step in (1, 2)]


def test_a_row_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + '\n{"step": 2, "lo')
    assert read_history(tmp_path) == [{"step": 1}]


@pytest.mark.parametrize(
    "row",
    [
        *("[1]", "7", "null", '"step"', "{}", '{"step": "x"}', '{"step": 1e999}', '{"step": 1.5}', '{"step": true}'),
        *('{"step": -1}', f'{{"step": 1{"0" * 50}}}', f'{{"step": {"9" * 5000}}}', '{"step": 1, "split": 3}'),
        *('{"step": 1, "loss": "abc"}', '{"step": 1, "loss": 1e999}', '{"step": 1, "loss": -1e999}'),
        *(
            f'{{"step": 1, "loss": 1{"0" * 400}}}',
            '{"step": 1, "loss": [1]}',
            '{"step": 1, "loss": null}',
            "[" * 200_000,
        ),
        *('{"step": 1, "loss": \xff', "\0"),
    ],
    ids=lambda row: row[:30].encode("unicode_escape").decode(),
)
def test_a_row_that_is_not_valid_is_dropped_with_a_warning(
    row: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = ['{"step": 1, "split": "train", "loss": 0.5}', '{"step": 2, "split": "a\\u2028b", "loss": NaN}']
    path = tmp_path / "metrics.jsonl"
    path.write_bytes("\n".join([good[0], row, row, good[1], ""]).encode("latin-1"))
    Tracker(tmp_path, start_step=9).close()
    assert [json.dumps(json.loads(line)) for line in path.read_text().splitlines()] == good
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: dropped rows that are truncated or not valid: 2, first line 2"
    ]


class FullDisk(io.FileIO):
    """A file of at most 700 bytes."""

    def write(self, content: Any) -> int:
        room = 700 - os.fstat(self.fileno()).st_size
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(content[:room])


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk gets full while metrics.jsonl is written."""
    init = Tracker.__init__

    def limited(self: Tracker, run: Path, start_step: int) -> None:
        init(self, run, start_step)
        self._file = FullDisk(run / "metrics.jsonl", "a")

    monkeypatch.setattr(Tracker, "__init__", limited)


def test_a_full_disk_at_a_row_is_one_line_and_the_last_step_is_saved(
    full_disk: None, tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    line = rf"^cannot write a row of step (\d) to {path}: No space left on device; the checkpoint of step \1 is saved$"
    with pytest.raises(UserError, match=line) as caught:
        train(tiny_config("train.checkpoint_every=100"))
    step = int(str(caught.value).partition("row of step ")[2][0])
    assert 1 < step < 6 and path.read_bytes().endswith(b"\n"), "the part of a row that was written is taken back"
    assert [row["step"] for row in read_history(tmp_path / "run")] == list(range(1, step))
    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint is not None and checkpoint.state["step"] == step


def test_where_no_checkpoint_can_be_saved_either_both_reasons_are_in_the_line(
    full_disk: None, tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_module, "write_bytes", full)
    line = (
        r"^cannot write a row of step \d to .*: No space left on device; cannot save a checkpoint in .*: No space left"
    )
    with pytest.raises(UserError, match=line):
        train(tiny_config("train.checkpoint_every=100"))


def test_wandb_is_offline_by_default(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    run = train(tiny_config("train.steps=1", "tracking.wandb=offline"))
    assert list((run / "wandb").glob("offline-run-*"))


def test_online_without_a_login_is_one_line_and_no_prompt(tiny_config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match="nobody is logged in"):
        train(tiny_config("tracking.wandb=online"))


def test_versions_name_what_matters() -> None:
    assert {"python", "torch", "accelerate", "av"} <= versions().keys()
