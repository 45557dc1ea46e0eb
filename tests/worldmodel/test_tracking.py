import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines.errors import UserError
from worldmodel.config import Config
from worldmodel.tracking import Tracker, read_metrics, versions


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_rows_are_written_at_once_and_a_resume_drops_those_that_run_again(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    tracker = Tracker(tmp_path, tiny_config(), start_step=0)
    for step in (1, 2, 3):
        tracker.log("train", step, {"loss": step / 10})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    tracker.close()
    Tracker(tmp_path, tiny_config(), start_step=2).close()
    assert read_metrics(tmp_path) == [{"step": step, "split": "train", "loss": step / 10} for step in (1, 2)]


def test_a_row_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + '\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_wandb_is_offline_by_default(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, tiny_config("tracking.wandb=offline"), start_step=0)
    tracker.log("train", 1, {"loss": 0.5})
    tracker.close()
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_online_without_a_login_is_one_line_and_no_prompt(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nobody is logged in"):
        Tracker(tmp_path, tiny_config("tracking.wandb=online"), start_step=0)


def test_versions_name_what_matters() -> None:
    assert {"python", "torch", "accelerate", "av"} <= versions().keys()
