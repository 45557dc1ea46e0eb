"""Reproduced figures next to the documented ones, as a table and as JSON."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from worldmodel.report.tables import aligned_table
from worldmodel.reproduction.records import number_at, read_record
from worldmodel.reproduction.tables import Documented, Figure, Table

ANSWERS = {True: "yes", False: "no", None: "not compared"}
NO_ANSWER = "-"


@dataclass(frozen=True)
class Compared:
    """A figure and its values here, one per training seed; empty if a file lacks it."""

    figure: Figure
    here: tuple[float, ...]

    @property
    def differs(self) -> bool | None:
        """True if the mean lies outside of the documented spread; None if it cannot be compared."""
        return self.figure.documented.differs(fmean(self.here)) if self.here else None

    @property
    def text(self) -> str:
        """The mean, with the standard deviation over seeds, to the documented number of decimals; "missing"."""
        if not self.here:
            return "missing"
        decimals = self.figure.documented.decimals
        spread = f" ± {stdev(self.here):.{decimals}f}" if len(self.here) > 1 else ""
        return f"{fmean(self.here):.{decimals}f}{spread}"


def compare_table(table: Table, results: Path) -> list[Compared]:
    """Read all figures of a table from the results of steps: files `results`/STEP/FILE.

    A mean over seeds needs all of them: with one missing, the figure has no values.

    Raises:
        UserError: a file is damaged.
    """
    read = cache(lambda source: read_record(results / source))
    compared = []
    for figure in table.figures:
        numbers = [number_at(read(source), figure.path) for source in figure.sources]
        here = tuple(number for number in numbers if number is not None)
        compared.append(Compared(figure, here if len(here) == len(numbers) else ()))
    return compared


def as_markdown(table: Table, compared: Sequence[Compared], took: str) -> str:
    """Return the comparison as Markdown. took: a sentence about the time."""
    rows = [["figure", "documented", "compared with", "here", "differs"]]
    for one in compared:
        figure, documented = one.figure, one.figure.documented
        differs = ANSWERS[one.differs] if one.here else NO_ANSWER
        rows.append([f"{figure.row}, {figure.column}", documented.text, between(documented), one.text, differs])
    entry = table.entry
    notes = [
        f"Spread of values without a documented one, {entry.spread}: {entry.assumed}." if entry.assumed else "",
        entry.note,
        *(f"Not measured again: {', '.join(part.rows)}: {part.why}." for part in entry.left_out),
        summary(compared),
        took,
    ]
    return "\n\n".join([f"# {table.address}", table.title, aligned_table(rows), *filter(None, notes)]) + "\n"


def between(documented: Documented) -> str:
    """Return the ends of the spread with the decimals of the value, "" if it is not compared."""
    if documented.low is None or documented.high is None:
        return ""
    return f"{documented.low:.{documented.decimals}f} to {documented.high:.{documented.decimals}f}"


def summary(compared: Sequence[Compared]) -> str:
    """Return a sentence that counts the figures that differ."""
    answered = [one.differs for one in compared if one.differs is not None]
    missing = sum(not one.here for one in compared)
    also = f"; {missing} are missing" if missing else ""
    return f"{sum(answered)} of {len(answered)} compared figures differ by more than their spread{also}."


def as_json(table: Table, compared: Sequence[Compared], seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return the comparison as the content of figures.json. seconds: of each finished step."""
    return {
        "table": table.address,
        "seconds": dict(seconds),
        "figures": [
            {
                "row": one.figure.row,
                "column": one.figure.column,
                "sources": list(one.figure.sources),
                "path": one.figure.path,
                "documented": dataclasses.asdict(one.figure.documented),
                "here": list(one.here),
                "differs": one.differs,
            }
            for one in compared
        ],
    }
