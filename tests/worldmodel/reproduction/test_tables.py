"""Tables of results read from YAML: documented values and their spread, names, and mistakes in the files."""

from pathlib import Path

import pytest

from data_pipelines.errors import UserError
from worldmodel.reproduction.tables import FOLDER, parse_value, read_reproduction

STEPS = """
data: {command: [worldmodel, videos, two-rooms, --out, data/x], minutes: 1}
train: {command: [worldmodel, train, --config, two_rooms, --resume], minutes: 10, after: [data]}
plan:
  command: [worldmodel, plan, --run, runs/two_rooms, --env, X]
  minutes: 2.5
  folder: runs/two_rooms
  results: [planning.json]
  after: [train]
"""
TABLE = """
title: A table
tables:
  - name: first
    source: plan/planning.json
    path: "{what}"
    spread: 10%
    columns: [{name: success, at: {what: success_rate}}, {name: steps, at: {what: steps}}]
    rows:
      - {name: this run, values: [0.984 (0.960 - 0.994), '9.9']}
      - {name: random policy, path: 'random_floor.{what}', values: [0.128 (0.092 - 0.175), '-']}
"""


def write(folder: Path, table: str = TABLE, steps: str = STEPS, name: str = "a-section") -> Path:
    (folder / "tables").mkdir(exist_ok=True)
    (folder / "steps.yaml").write_text(steps)
    (folder / "tables" / f"{name}.yaml").write_text(table)
    return folder


@pytest.mark.parametrize(
    ("text", "spread", "inside", "outside"),
    [
        ("0.632 ± 0.003", None, (0.629, 0.632, 0.6352), (0.628, 0.6361)),
        ("0.984 (0.960 - 0.994)", None, (0.96, 0.994, 0.9597), (0.959, 0.995, 1.0)),
        ("1.72", "5%", (1.634, 1.806), (1.62, 1.82)),
        ("-0.03", "0.05", (-0.08, 0.02, 0.024), (-0.09, 0.03)),
        (".91", "0.04", (0.87, 0.95), (0.86, 0.96)),
        ("21", "10%", (18.9, 23.1), (18.0, 24.0)),
    ],
)
def test_a_value_differs_outside_of_its_spread_after_rounding(
    text: str, spread: str | None, inside: tuple[float, ...], outside: tuple[float, ...]
) -> None:
    documented = parse_value(text, spread)
    assert not any(documented.differs(value) for value in inside)
    assert all(documented.differs(value) for value in outside)


def test_a_value_without_a_spread_is_not_compared() -> None:
    documented = parse_value("28.0", "none")
    assert documented.differs(99.0) is None and documented.value == 28.0
    with pytest.raises(ValueError, match=r"'28\.0' has no spread"):
        parse_value("28.0", None)
    with pytest.raises(ValueError, match="'about 3' is not a value"):
        parse_value("about 3", "none")


def test_figures_know_their_files_and_steps_run_in_order(tmp_path: Path) -> None:
    files = read_reproduction(write(tmp_path))
    [table] = files.select("a-section")
    assert table.address == "a-section/first"
    assert [(one.row, one.column, one.sources, one.path) for one in table.figures] == [
        ("this run", "success", ("plan/planning.json",), "success_rate"),
        ("this run", "steps", ("plan/planning.json",), "steps"),
        ("random policy", "success", ("plan/planning.json",), "random_floor.success_rate"),
    ]
    assert files.needed([table]) == ["data", "train", "plan"]


def test_a_mean_has_the_sources_of_all_seeds(tmp_path: Path) -> None:
    source = TABLE.replace("plan/planning.json", "'plan/{seed}/planning.json | plan/planning.json'").replace(
        "    spread: 10%", "    spread: 10%\n    seeds: [1, 2]"
    )
    steps = STEPS.replace("results: [planning.json]", "results: [planning.json, '*/planning.json']")
    [table] = read_reproduction(write(tmp_path, source, steps)).tables
    assert table.figures[0].sources == ("plan/1/planning.json", "plan/2/planning.json", "plan/planning.json")
    assert table.steps == ["plan"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("9.9'", "9.9', '1'", "row 'this run' has 3 values, not 2"),
        ("spread: 10%", "spread: wide", "spread='wide': String should match"),
        ("    spread: 10%\n", "", "'9.9' has no spread"),
        ("    spread: 10%\n", "    assumed: a guess\n", "assumed: 'a guess' explains no spread"),
        ("source: plan/", "source: plant/", "there is no step 'plant'"),
        ("source: plan/planning.json", "source: plan/metrics.json", "metrics.json is not a result of plan"),
        ("what: steps", "what: stairs", "planning.json has no place 'stairs'"),
        ("random_floor.{what}", "random_floor.{which}", "there is no value for {which}"),
        ("title: A table", "titel: A table", "titel"),
        ("0.984 (", "about 0.984 (", "is not a value"),
        ("    path:", "    paths:", "paths"),
    ],
)
def test_a_mistake_in_a_table_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TABLE
    with pytest.raises(UserError, match=r"a-section\.yaml") as error:
        read_reproduction(write(tmp_path, TABLE.replace(old, new)))
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("after: [data]", "after: [plan]", "train is after plan, which does not come before it"),
        ("after: [data]", "after: [date]", "train is after date"),
        ("[worldmodel, videos", "[rm, videos", "data runs 'rm', not worldmodel or python"),
        ("minutes: 10", "minutes: 0", "train.minutes=0"),
        ("minutes: 1}", "minutes: 1, cost: 3}", "cost"),
        ("data: {", "data: &x {", "not valid YAML"),
    ],
)
def test_a_mistake_in_the_steps_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in STEPS
    with pytest.raises(UserError, match=r"steps\.yaml") as error:
        read_reproduction(write(tmp_path, steps=STEPS.replace(old, new)))
    assert message in str(error.value)


def test_a_section_has_tables_or_a_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs either tables or not_reproduced"):
        read_reproduction(write(tmp_path, "title: Nothing"))
    twice = TABLE + TABLE.partition("tables:\n")[2]
    with pytest.raises(UserError, match="two tables of a section have one name"):
        read_reproduction(write(tmp_path, twice))


def test_names_may_be_short_if_they_fit_one_section() -> None:
    files = read_reproduction(FOLDER)
    assert [table.address for table in files.select("known")] == [
        "known-factors-linear-readout-if-changes-depend-on-the-state"
    ]
    rooms = [table.address for table in files.select("planning-two-rooms")]
    assert rooms == [f"planning-two-rooms/{name}" for name in ("fixed-wall", "random-walls", "slips")]
    assert [table.address for table in files.select("planning-two-rooms/slips")] == rooms[2:]
    assert [table.address for table in files.select("planning-two-rooms/")] == rooms
    assert [table.address for table in files.select("planning-two-rooms/s")] == rooms[2:]
    for name, message in (
        ("planning-t", "may be planning-two"),
        ("gamse", "did you mean"),
        ("planning-published-figures", "cannot be reproduced: figures of others"),
    ):
        with pytest.raises(UserError, match=message):
            files.select(name)
