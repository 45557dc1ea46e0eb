"""The files of worldmodel/reproduction against docs/results.md: the same sections, the same values, real commands."""

import argparse
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPO
from worldmodel.commands.plan import planning_config
from worldmodel.config import load_config, to_dict
from worldmodel.reproduction.tables import NO_FIGURE, Reproduction, Step, Table, read_reproduction

HEADING = re.compile(r"^#+ (.+)$")
NUMBER = re.compile(r"(?<![\w.])-?(?:\d[\d,]*\.?\d*|\.\d+)")
PAGE = REPO / "docs" / "results.md"
FILES = read_reproduction()
TABLES = {table.address: table for table in FILES.tables}


@cache
def sections() -> dict[str, list[str]]:
    """Return the lines of each section of docs/results.md below its first heading, by anchor."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if (match := HEADING.match(line)) and not line.startswith("# "):
            anchor = re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", match[1]).strip().lower())
            lines = found.setdefault(anchor, [])
        else:
            lines.append(line)
    return found


def numbers(text: str) -> list[str]:
    return [number.rstrip(",.") for number in NUMBER.findall(text.replace("**", ""))]


def first_cell(row: str) -> str:
    return row.strip("| ").partition("|")[0].replace("**", "").strip()


def table_rows(lines: list[str]) -> list[str]:
    """Return the rows of all Markdown tables, without heads and rules."""
    rules = {i for i, line in enumerate(lines) if re.fullmatch(r"[|:\s-]+", line) and line.startswith("|")}
    return [line for i, line in enumerate(lines) if line.startswith("|") and i not in rules and i + 1 not in rules]


def paragraphs(lines: list[str]) -> Iterator[str]:
    yield from re.split(r"\n\s*\n", "\n".join(line for line in lines if not line.startswith("|")))


def holds(text: str, wanted: list[str]) -> bool:
    """True if the numbers appear in the text in this order; others may be between them."""
    rest = iter(numbers(text))
    return all(number in rest for number in wanted)


def values_of(cells: tuple[str, ...]) -> list[str]:
    return [number for cell in cells if cell != NO_FIGURE for number in numbers(cell)]


def places_of(table: Table, cells: tuple[str, ...]) -> list[str]:
    """Return the rows or paragraphs of the section that hold these values in this order."""
    lines = sections()[table.address.partition("/")[0]]
    return [part for part in [*table_rows(lines), *paragraphs(lines)] if holds(part, values_of(cells))]


def test_every_section_with_a_table_has_a_name_and_no_other() -> None:
    assert set(FILES.sections) == {anchor for anchor, lines in sections().items() if table_rows(lines)}


@pytest.mark.parametrize("address", TABLES)
def test_documented_values_are_those_of_the_page(address: str) -> None:
    table = TABLES[address]
    for row in table.entry.rows:
        # A row of the files may be one of two parts of a documented row, such as x and y of a coverage.
        assert places_of(table, row.values), f"{address}, {row.name}: {row.values} are not in a row of the section"


def test_every_documented_row_is_reproduced_or_left_out_with_a_reason() -> None:
    for anchor, section in FILES.sections.items():
        if section.not_reproduced:
            continue
        tables = [table for table in FILES.tables if table.address.partition("/")[0] == anchor]
        entries = [section.left_out, *(table.entry.left_out for table in tables)]
        out = {name for entry in entries for part in entry for name in part.rows}
        covered = {place for table in tables for row in table.entry.rows for place in places_of(table, row.values)}
        rows = table_rows(sections()[anchor])
        lost = [row for row in rows if row not in covered and not any(first_cell(row).startswith(o) for o in out)]
        assert not lost, f"{anchor}: {lost}"
        assert all(any(first_cell(row).startswith(name) for row in rows) for name in out), out


def test_every_section_names_the_command_that_makes_it() -> None:
    for anchor, section in FILES.sections.items():
        called = f"worldmodel reproduce {anchor}" in "\n".join(sections()[anchor])
        assert called != bool(section.not_reproduced), anchor


@pytest.mark.parametrize("name", FILES.steps)
def test_commands_exist_and_their_configs_are_valid(name: str) -> None:
    check_command(FILES, FILES.steps[name])


def check_command(files: Reproduction, step: Step) -> None:
    program, first, *arguments = step.command
    if program == "python":
        assert (REPO / first).is_file()
        options = (REPO / first).read_text(encoding="utf-8")
        assert all(f'"{word}"' in options for word in arguments if word.startswith("--"))
        return
    args = parsed(first, arguments)
    if first in ("train", "compare"):
        load_config(args.config, [value for value in args.overrides if ":" not in value])
    if first == "train":
        assert args.resume, "an interrupted training continues"
    if first == "plan":
        trained = [other for before in step.after if (other := files.steps[before]).command[1] == "train"]
        [config] = [config_of(other) for other in trained]
        assert Path(config["run_dir"]) == args.run == Path(step.folder)
        planning_config(config, args.overrides, trust_code=False)


def config_of(step: Step) -> dict[str, Any]:
    args = parsed(step.command[1], list(step.command[2:]))
    return to_dict(load_config(args.config, args.overrides))


def parsed(name: str, arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    module = import_module(f"worldmodel.commands.{name.replace('-', '_')}")
    module.add_arguments(parser)
    args = parser.parse_intermixed_args(arguments)
    if name == "compare":
        module.split_lists(args)
    return args


def test_figures_of_the_readme_and_the_guide_are_among_those_of_the_results() -> None:
    known = set(numbers(PAGE.read_text(encoding="utf-8")))
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    guide = (REPO / "docs" / "planning.md").read_text(encoding="utf-8")
    for page in (readme, guide):
        text = page.partition("## Results\n")[2].partition("\n## ")[0]
        rows = [row.partition("|")[2] for row in table_rows(text.splitlines())]
        assert rows
        decimals = {number for row in rows for number in numbers(row) if "." in number}
        assert not {number for number in decimals if number not in known and number.rstrip("0") not in known}, text
