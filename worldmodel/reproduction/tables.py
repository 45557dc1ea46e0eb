"""The tables of docs/results.md and the steps that make them, read from YAML files and checked.

A table has columns and rows. Its cells are documented values: a value, a value with its standard deviation
("0.632 ± 0.003"), or a value with its interval ("0.984 (0.960 - 0.994)"). "-" is a cell without a figure. The
reproduced figure is found by two templates, of the row, otherwise of the column, otherwise of the table:

source   "STEP/FILE", a result of a step, such as "plan_two_rooms/planning.json". With "{seed}" in it, or with several
         of them separated by " | ", the mean over all is compared.
path     the dotted path in that file, such as "forecasts.model.energy_score.{h}"

The values for the braces come from `at` of the row and of the column.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from data_pipelines.errors import UserError, did_you_mean
from data_pipelines.text_files import read_yaml, shown
from worldmodel.reproduction.records import RECORDS
from worldmodel.runs.metrics import is_declared

FOLDER = Path(__file__).resolve().parent
NO_FIGURE = "-"
NOT_COMPARED = "none"
STRICT = ConfigDict(extra="forbid")

Text = Annotated[str, Field(min_length=1, max_length=2_000)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
Spread = Annotated[str, Field(pattern=r"^([0-9.]+ ?%?|none)$")]
Values = dict[str, str]

VALUE = re.compile(r"(-?[0-9]*\.?[0-9]+)(?: ± ([0-9.]+)| \((-?[0-9.]+) - (-?[0-9.]+)\))?")


@checked(frozen=True, config=STRICT)
class Step:
    """A command and the files that it writes.

    Attributes:
        command: `worldmodel` or `python` with its arguments. A program of `python` is a file of the repository;
            "{configs}" is the folder of the shipped configs.
        minutes: about how long it takes on two idle CPU cores.
        folder: where it writes, below the folder of the reproduction.
        results: patterns of files in `folder` that are kept under the step's name; a later step may replace them.
        after: steps that must have ended before.
        packages: modules that must be importable.
        files: what must be in the folder of the reproduction, which no step can make.
    """

    command: tuple[Text, ...]
    minutes: Annotated[float, Field(gt=0)]
    folder: Text = "."
    results: tuple[Text, ...] = ()
    after: tuple[Name, ...] = ()
    packages: tuple[Text, ...] = ()
    files: tuple[Text, ...] = ()


@checked(frozen=True, config=STRICT)
class Column:
    """A column; `spread` is for values that are documented without one."""

    name: Text
    source: str = ""
    path: str = ""
    at: Values = field(default_factory=dict)
    spread: Spread | None = None


@checked(frozen=True, config=STRICT)
class Row:
    """A row with a documented value in each column."""

    name: Text
    values: tuple[Text, ...]
    source: str = ""
    path: str = ""
    at: Values = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    spread: Spread | None = None


@checked(frozen=True, config=STRICT)
class LeftOut:
    """Rows of the documented table that are not reproduced; `rows` are their first cells."""

    rows: tuple[Text, ...]
    why: Text


@checked(frozen=True, config=STRICT)
class TableEntry:
    """A table as its file describes it.

    Attributes:
        name: names the table among those of its section; empty if it is the only one.
        spread: the spread of values that are documented without one: a number, a percentage, or "none" if values
            depend on the machine and are not compared.
        assumed: why this spread, if it was not measured.
        note: what else to know when comparing.
    """

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    name: str = ""
    source: str = ""
    path: str = ""
    seeds: tuple[int, ...] = ()
    spread: Spread | None = None
    assumed: str = ""
    note: str = ""
    left_out: tuple[LeftOut, ...] = ()


@checked(frozen=True, config=STRICT)
class Section:
    """The tables of a section, or the reason why none can be reproduced. `left_out` are whole tables."""

    title: Text
    tables: tuple[TableEntry, ...] = ()
    not_reproduced: str = ""
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True)
class Documented:
    """A documented value. low and high are the ends of its spread; None if it is not compared.

    decimals: those of the text, to which it was rounded.
    """

    text: str
    value: float
    low: float | None
    high: float | None
    decimals: int

    def differs(self, here: float) -> bool | None:
        """True if a value lies outside of the spread by more than the rounding of the text; None without a spread."""
        if self.low is None or self.high is None:
            return None
        rounding = 0.5 * 10**-self.decimals
        return not self.low - rounding <= here <= self.high + rounding


def parse_value(text: str, spread: str | None) -> Documented:
    """Parse a cell. spread: the one to use if the cell has none.

    Raises:
        ValueError: it is not a value, or there is no spread.
    """
    match = VALUE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a value, a value ± its SD, or a value (low - high)")
    value, decimals = float(match[1]), len(match[1].partition(".")[2])
    if match[3]:
        return Documented(text, value, float(match[3]), float(match[4]), decimals)
    if match[2]:
        half = float(match[2])
    elif spread is None:
        raise ValueError(f"{text!r} has no spread, and neither has its column, row or table")
    elif spread == NOT_COMPARED:
        return Documented(text, value, None, None, decimals)
    elif spread.endswith("%"):
        half = abs(value) * float(spread.rstrip(" %")) / 100
    else:
        half = float(spread)
    return Documented(text, value, value - half, value + half, decimals)


@dataclass(frozen=True)
class Figure:
    """A documented value and where it is reproduced.

    sources: "STEP/FILE" of each training seed, or one. path: as `records.number_at` takes it.
    """

    row: str
    column: str
    documented: Documented
    sources: tuple[str, ...]
    path: str


@dataclass(frozen=True)
class Table:
    """A table. address: the anchor of its section in docs/results.md, with "/" and a name if there are several."""

    address: str
    title: str
    entry: TableEntry

    @cached_property
    def figures(self) -> list[Figure]:
        """All figures in the order of the file.

        Raises:
            ValueError: a row has another number of cells than there are columns, a figure has no source or path, or
                `assumed` explains a spread that is missing.
        """
        if self.entry.assumed and self.entry.spread is None:
            raise ValueError(f"assumed: {self.entry.assumed!r} explains no spread; a note explains other things")
        return list(self._figures())

    def _figures(self) -> Iterator[Figure]:
        entry = self.entry
        for row in entry.rows:
            if len(row.values) != len(entry.columns):
                raise ValueError(f"row {row.name!r} has {len(row.values)} values, not {len(entry.columns)}")
            for column, text in zip(entry.columns, row.values, strict=True):
                if text == NO_FIGURE:
                    continue
                place = f"row {row.name!r}, column {column.name!r}"
                source = row.source or column.source or entry.source
                path = row.path or column.path or entry.path
                if not source or not path:
                    raise ValueError(f"{place} has no source or no path")
                try:
                    values = {**row.at, **column.at}
                    seeds = row.seeds or entry.seeds
                    sources = tuple(
                        part.format(**values, seed=seed)
                        for part in source.split(" | ")
                        for seed in (seeds if "{seed}" in part else (0,))
                    )
                    spread = row.spread or column.spread or entry.spread
                    figure = Figure(row.name, column.name, parse_value(text, spread), sources, path.format(**values))
                except KeyError as error:
                    raise ValueError(f"{place}: there is no value for {{{error.args[0]}}}") from None
                if not sources:
                    raise ValueError(f"{place} has no seeds")
                yield figure

    @cached_property
    def steps(self) -> list[str]:
        """The names of the steps from which figures are read."""
        return list(dict.fromkeys(source.partition("/")[0] for figure in self.figures for source in figure.sources))


@dataclass(frozen=True)
class Reproduction:
    """All sections by anchor, all tables, and all steps by name in an order in which they can run."""

    sections: Mapping[str, Section]
    tables: Sequence[Table]
    steps: Mapping[str, Step]

    def select(self, name: str) -> list[Table]:
        """Return the tables whose addresses begin with this name: those of a section, or some of its tables.

        Raises:
            UserError: there is none, the beginning fits several sections, or the section cannot be reproduced.
        """
        addresses = list(dict.fromkeys([*self.sections, *(table.address for table in self.tables)]))
        beginning = f"{name}/" if name in addresses else name
        chosen = [address for address in addresses if address == name or address.startswith(beginning)]
        of_sections = {address.partition("/")[0] for address in chosen}
        if len(of_sections) != 1:
            kind = f"may be {' or '.join(chosen)}" if chosen else f"is not a table{did_you_mean(name, addresses)}"
            raise UserError(f"{shown(name)} {kind}: `worldmodel reproduce` lists the tables")
        if (section := self.sections.get(chosen[0])) and section.not_reproduced:
            raise UserError(f"{chosen[0]} cannot be reproduced: {section.not_reproduced}")
        return [table for table in self.tables if table.address in chosen]

    def needed(self, tables: Sequence[Table]) -> list[str]:
        """Return the names of all steps that these tables need, in an order in which they can run."""
        wanted, waiting = set[str](), [step for table in tables for step in table.steps]
        while waiting:
            name = waiting.pop()
            if name not in wanted:
                wanted.add(name)
                waiting += self.steps[name].after
        return [name for name in self.steps if name in wanted]


def read_reproduction(folder: Path = FOLDER) -> Reproduction:
    """Read steps.yaml and tables/*.yaml of a folder. A table's file is named after the anchor of its section.

    Raises:
        UserError: a file is not as the classes above describe it, a step is unknown or comes before one that it needs,
            or a figure's file or path is not one of the project's records.
    """
    steps: dict[str, Step] = _read(folder / "steps.yaml", dict[Name, Step])
    for name, step in steps.items():
        earlier = list(steps)[: list(steps).index(name)]
        if missing := [before for before in step.after if before not in earlier]:
            raise UserError(f"{folder / 'steps.yaml'}: {name} is after {missing[0]}, which does not come before it")
        if step.command[0] not in ("worldmodel", "python"):
            raise UserError(f"{folder / 'steps.yaml'}: {name} runs {shown(step.command[0])}, not worldmodel or python")
    sections, tables = dict[str, Section](), list[Table]()
    for path in sorted((folder / "tables").glob("*.yaml")):
        section: Section = _read(path, Section)
        sections[path.stem] = section
        for entry in section.tables:
            table = Table(f"{path.stem}/{entry.name}" if entry.name else path.stem, section.title, entry)
            try:
                _check_figures(table, steps)
            except ValueError as error:
                raise UserError(f"{path}: {error}") from error
            tables.append(table)
        if bool(section.tables) == bool(section.not_reproduced):
            raise UserError(f"{path} needs either tables or not_reproduced")
    addresses = [table.address for table in tables]
    if len(set(addresses)) < len(addresses):
        raise UserError(f"{folder / 'tables'}: two tables of a section have one name")
    return Reproduction(sections, tables, steps)


def _read(path: Path, kind: Any) -> Any:
    try:
        return TypeAdapter(kind).validate_python(read_yaml(path, kind))
    except ValidationError as error:
        entry = error.errors(include_url=False)[0]
        raise UserError(
            f"{path}: {'.'.join(map(str, entry['loc']))}={shown(entry['input'])}: {entry['msg']}"
        ) from error


def _check_figures(table: Table, steps: Mapping[str, Step]) -> None:
    """Check that the figures of a table are read from results of steps, at places that their records declare.

    Raises:
        ValueError: they are not.
    """
    for figure in table.figures:
        where = f"row {figure.row!r}, column {figure.column!r}"
        for source in figure.sources:
            name, _, file = source.partition("/")
            if name not in steps:
                raise ValueError(f"{where}: there is no step {name!r}")
            if not any(Path(file).match(pattern) for pattern in steps[name].results):
                raise ValueError(f"{where}: {file} is not a result of {name}")
            record = RECORDS.get(Path(file).name)
            if record is None:
                raise ValueError(f"{where}: {file} is not one of {', '.join(RECORDS)}")
            for path in figure.path.split(" | "):
                if not is_declared(path, record):
                    raise ValueError(f"{where}: {Path(file).name} has no place {path!r}")
