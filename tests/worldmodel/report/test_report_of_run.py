"""The report of what lies in the folder of a run."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.errors import UserError
from data_pipelines.files import write_text
from tests.conftest import REPO
from tests.worldmodel.report.pages import Page
from tests.worldmodel.report.samples import (
    make_episodes,
    make_illustrations,
    make_metrics,
    make_planning,
)
from worldmodel.config import load_config, to_yaml
from worldmodel.evaluation.records import save_records
from worldmodel.report.run_page import report_of_run
from worldmodel.runs.folder import RunFolder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    run = tmp_path / "demo"
    run.mkdir()
    write_text(run / "config.yaml", to_yaml(load_config(REPO / "configs" / "objectives.yaml")))
    return run


def headings(run: Path) -> set[str]:
    page = Page(report_of_run(run).read_text(encoding="utf-8"))
    return {name for name in ("Forecasts", "Sampled futures", "Planning", "Episodes") if name in page.words}


def test_the_report_of_a_run_has_what_lies_in_its_folder(run_folder: Path, no_charts: None) -> None:
    assert headings(run_folder) == set()
    write_text(run_folder / "planning.json", json.dumps(make_planning()))
    assert headings(run_folder) == {"Planning"}
    save_records(RunFolder(run_folder).planned_episodes, make_episodes(1))
    assert headings(run_folder) == {"Planning", "Episodes"}
    write_text(run_folder / "metrics.json", json.dumps(make_metrics(2)))
    save_records(RunFolder(run_folder).illustrations, [make_illustrations(queries=1, num_steps=2, size_px=16)])
    assert headings(run_folder) == {"Forecasts", "Sampled futures", "Planning", "Episodes"}
    (run_folder / "planning.json").unlink()
    assert headings(run_folder) == {"Forecasts", "Sampled futures"}


def test_pictures_that_an_older_evaluation_did_not_keep_are_named(
    run_folder: Path, no_charts: None, caplog: pytest.LogCaptureFixture
) -> None:
    write_text(run_folder / "metrics.json", json.dumps(make_metrics(2)))
    assert headings(run_folder) == {"Forecasts"}
    assert "evaluate the run again" in caplog.text


@pytest.mark.parametrize("name", ["planning.json", "metrics.json"])
@pytest.mark.parametrize("content", ["{", "3"])
def test_damaged_results_are_one_line(run_folder: Path, name: str, content: str) -> None:
    write_text(run_folder / name, content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        report_of_run(run_folder)
    assert not (run_folder / "report.html").exists()


def test_a_report_that_cannot_be_written_is_one_line(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("worldmodel.report.run_page.write_page", full)
    with pytest.raises(UserError, match=f"cannot write to '{run_folder}': No space left on device"):
        report_of_run(run_folder)


def test_the_title_is_the_name_of_the_folder(
    run_folder: Path, no_charts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_folder)
    assert f"<title>{run_folder.name}" in report_of_run(Path(".")).read_text(encoding="utf-8")
