"""Rerun the tables of docs/results.md, and report which figures differ by more than their spread.

Without a name, list the tables with about the time that each takes on two CPU cores. The name of a table is the anchor
of its section in docs/results.md, followed by /NAME if the section has several. The beginning of a name is enough if it
fits one section. A section's name selects all its tables.

Commands run in --out, where tables share data and runs. The same command continues an interrupted reproduction. Figures
are printed, and written to OUT/tables/NAME/figures.md and figures.json. The exit code is 0 whether or not figures
differ, 1 if a command failed, and 2 if no table can be reproduced with the data and packages at hand.

examples:
  worldmodel reproduce
  worldmodel reproduce planning-two-rooms/fixed-wall --dry-run
  worldmodel reproduce known-factors --out reproduction
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipelines.errors import UserError
from data_pipelines.files import write_text
from worldmodel.commands.exits import EXIT_USER_ERROR
from worldmodel.commands.shared import add_out, make_out_folder, write_result

if TYPE_CHECKING:
    from worldmodel.reproduction.tables import Reproduction, Table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "tables", nargs="*", metavar="TABLE", help="names of tables; without one, the tables are listed"
    )
    add_out(parser, "the folder of data, runs and results", default=Path("reproduction"))
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and which of them are done")


def run(args: argparse.Namespace) -> int:
    from worldmodel.reproduction.tables import read_reproduction
    from worldmodel.training.session import Interrupted

    all_tables = read_reproduction()
    if not args.tables:
        print(overview(all_tables, args.out))
        return 0
    tables = list({table.address: table for name in args.tables for table in all_tables.select(name)}.values())
    at_hand = []
    for table in tables:
        if reason := missing(all_tables, table, args.out):
            print(f"{table.address} is left out: {reason}", file=sys.stderr)
        else:
            at_hand.append(table)
    if not at_hand:
        return EXIT_USER_ERROR
    if args.dry_run:
        print(commands(all_tables, at_hand, args.out))
        return 0
    try:
        return reproduce(all_tables, at_hand, args.out)
    except Interrupted as interrupted:
        print(f"stopped by {interrupted}: the same command continues", file=sys.stderr)
        return interrupted.exit_code


def missing(reproduction: Reproduction, table: Table, out: Path) -> str:
    """Return what is missing for a table, "" if nothing is missing."""
    from worldmodel.commands.steps import missing_for

    reasons = (missing_for(reproduction.steps[name], out) for name in reproduction.needed([table]))
    return next(filter(None, reasons), "")


def overview(reproduction: Reproduction, out: Path) -> str:
    """Return the list of all tables, with the time that each takes by itself, and what is missing."""
    lines = ["about    table"]
    for table in reproduction.tables:
        minutes = sum(reproduction.steps[name].minutes for name in reproduction.needed([table]))
        reason = missing(reproduction, table, out)
        lines.append(f"{_time(minutes):>8} {table.address}{f' (missing: {reason})' if reason else ''}")
    for anchor, section in reproduction.sections.items():
        if section.not_reproduced:
            lines.append(f"{'-':>8} {anchor} (not reproducible: {section.not_reproduced})")
        lines += [
            f"{'-':>8} {anchor}, the table from {part.rows[0]!r} on (not reproducible: {part.why})"
            for part in section.left_out
        ]
    minutes = sum(step.minutes for step in reproduction.steps.values())
    lines += ["", f"All tables take about {_time(minutes)} on two idle CPU cores: a step that several need runs once."]
    return "\n".join(lines)


def _time(minutes: float) -> str:
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def commands(reproduction: Reproduction, tables: Sequence[Table], out: Path) -> str:
    """Return the commands of tables, each with its time and "done" if it has ended."""
    from worldmodel.commands.steps import seconds_if_done

    lines = []
    for name in reproduction.needed(tables):
        step, seconds = reproduction.steps[name], seconds_if_done(reproduction.steps, name, out)
        state = f"about {step.minutes:g} min" if seconds is None else f"done in {seconds / 60:.1f} min"
        lines.append(f"# {name}, {state}\n{shlex.join(step.command)}")
    return "\n".join([f"# in {out}", *lines])


def reproduce(reproduction: Reproduction, tables: Sequence[Table], out: Path) -> int:
    """Run the steps of tables, compare their figures, and return an exit code.

    Raises:
        Interrupted: SIGINT or SIGTERM arrived.
        UserError: --out cannot be written.
    """
    from worldmodel.commands.jobs import only_writer
    from worldmodel.commands.steps import run_steps

    make_out_folder(out)
    with only_writer(out) as lock:
        failed = run_steps(reproduction.steps, reproduction.needed(tables), out.resolve(), lock)
        for table in tables:
            write_figures(reproduction, table, out)
    if failed:
        print(f"{len(failed)} steps failed: {', '.join(failed)}; the same command retries them", file=sys.stderr)
    return 1 if failed else 0


def write_figures(reproduction: Reproduction, table: Table, out: Path) -> None:
    """Compare the figures of a table; print them and write figures.md and figures.json.

    Raises:
        UserError: a file is damaged or cannot be written.
    """
    from worldmodel.commands.steps import seconds_if_done
    from worldmodel.reproduction.figures import as_json, as_markdown, compare_table

    compared = compare_table(table, out / "steps")
    names = reproduction.needed([table])
    found = {name: seconds_if_done(reproduction.steps, name, out) for name in names}
    seconds = {name: one for name, one in found.items() if one is not None}
    minutes = sum(reproduction.steps[name].minutes for name in names)
    took = (
        f"{len(seconds)} of {len(names)} steps took {sum(seconds.values()) / 60:.1f} min here; all take about "
        f"{minutes:g} min on two idle cores."
    )
    markdown = as_markdown(table, compared, took)
    folder = out / "tables" / table.address
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "figures.md", markdown)
        write_result(folder / "figures.json", as_json(table, compared, seconds))
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}") from error
    print(f"\n{markdown}\n{folder / 'figures.md'}\n{folder / 'figures.json'}")
