"""Reproduced figures next to documented ones."""

import json
from pathlib import Path

import pytest

from data_pipelines.errors import UserError
from tests.worldmodel.reproduction.test_tables import STEPS, TABLE, write
from worldmodel.reproduction.figures import as_json, as_markdown, compare_table
from worldmodel.reproduction.records import number_at
from worldmodel.reproduction.tables import Table, read_reproduction

SEEDS = """
title: Seeds
tables:
  - source: plan/{seed}/planning.json
    seeds: [0, 1]
    spread: none
    columns: [{name: success, path: success_rate}, {name: ms, path: ms_per_decision}]
    rows: [{name: this run, values: [0.50 ± 0.10, '3']}]
"""


def planning(folder: Path, **content: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "planning.json").write_text(json.dumps(content))


def table_of(folder: Path, text: str = TABLE) -> Table:
    steps = STEPS.replace("results: [planning.json]", "results: ['*/planning.json', planning.json]")
    return read_reproduction(write(folder, text, steps)).tables[0]


def test_each_figure_differs_or_not(tmp_path: Path) -> None:
    planning(tmp_path / "plan", success_rate=0.9596, steps=12.0, random_floor={"success_rate": 0.2})
    compared = compare_table(table := table_of(tmp_path), tmp_path)
    assert [one.text for one in compared] == ["0.960", "12.0", "0.200"]
    assert [one.differs for one in compared] == [False, True, True]
    lines = as_markdown(table, compared, "It took 3 min.").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert rows[2:] == [
        ["this run, success", "0.984 (0.960 - 0.994)", "0.960 to 0.994", "0.960", "no"],
        ["this run, steps", "9.9", "8.9 to 10.9", "12.0", "yes"],
        ["random policy, success", "0.128 (0.092 - 0.175)", "0.092 to 0.175", "0.200", "yes"],
    ]
    assert "2 of 3 compared figures differ by more than their spread." in lines and lines[-1] == "It took 3 min."
    content = as_json(table, compared, {"plan": 5.0})
    assert json.loads(json.dumps(content)) == content and content["figures"][1]["here"] == [12.0]


def test_a_mean_over_seeds_needs_all_of_them(tmp_path: Path) -> None:
    table = table_of(tmp_path, SEEDS)
    planning(tmp_path / "plan" / "0", success_rate=0.55, ms_per_decision=2.0)
    assert [(one.text, one.differs) for one in compare_table(table, tmp_path)] == [("missing", None)] * 2
    planning(tmp_path / "plan" / "1", success_rate=0.67, ms_per_decision=4.0)
    success, ms = compare_table(table, tmp_path)
    assert success.text == "0.61 ± 0.08" and success.differs is True  # mean 0.61, sample SD 0.0849
    assert ms.text == "3 ± 1" and ms.differs is None
    assert "| not compared |" in as_markdown(table, [success, ms], "")


def test_the_best_of_several_places_counts() -> None:
    record = {"a": {"linear": 0.2, "mlp": [0.7, None]}, "flag": True}
    assert number_at(record, "a.linear | a.mlp.0") == 0.7
    assert number_at(record, "a.linear | a.mlp.1") == number_at(record, "a.linear | b.c") == 0.2
    assert number_at(record, "flag") is number_at(record, "a") is number_at(None, "a.linear") is None


def test_a_damaged_result_is_one_line(tmp_path: Path) -> None:
    table = table_of(tmp_path)
    (tmp_path / "plan").mkdir()
    for text in ("{", "[1]"):
        (tmp_path / "plan" / "planning.json").write_text(text)
        with pytest.raises(UserError, match=r"planning\.json (is not JSON|must hold keys and values, not list)"):
            compare_table(table, tmp_path)
