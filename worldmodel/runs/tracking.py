"""The rows of a run: metrics.jsonl, and wandb alongside."""

import json
import os
import platform
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from data_pipelines.errors import UserError, one_line_logger
from data_pipelines.files import write_text
from worldmodel.runs.folder import RunFolder
from worldmodel.runs.wandb_tracking import WandbRun

logger = one_line_logger(__name__)

MAX_STEP = 10**12


class RowLostError(UserError):
    """A row of metrics.jsonl could not be written."""


def read_history(run: Path) -> list[dict[str, Any]]:
    """Return the valid rows of metrics.jsonl.

    Other rows, such as a last one that a kill truncated, are dropped with a warning.
    """
    path = RunFolder(run).history
    # Not splitlines, which also splits at characters inside of strings.
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n") if path.is_file() else []
    rows = [(number, _row(line)) for number, line in enumerate(lines, start=1) if line.strip()]
    if bad := [number for number, row in rows if row is None]:
        logger.warning("%s: dropped rows that are truncated or not valid: %d, first line %d", path, len(bad), bad[0])
    return [row for _, row in rows if row is not None]


def _row(line: str) -> dict[str, Any] | None:
    """Parse a line, which must be an object with a step and numbers. Return None if it is not valid."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not (isinstance(row, dict) and isinstance(row.get("split", ""), str)):
        return None
    step, numbers = row.get("step"), [value for key, value in row.items() if key != "split"]
    if isinstance(step, int) and 0 <= step < MAX_STEP and all(map(_is_number, numbers)):
        return row
    return None


def _is_number(value: Any) -> bool:
    """Return True for a number that fits into a float, and for NaN. json.loads reads 1e999 as infinity."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and (abs(value) <= sys.float_info.max or value != value)


class Tracker:
    """Writes rows of numbers to metrics.jsonl, and to `wandb` if a run of it is set.

    On a resume, rows after `start_step` are dropped, because their steps run again.

    Raises:
        UserError: metrics.jsonl cannot be written.
    """

    def __init__(self, run: Path, start_step: int) -> None:
        self._path = RunFolder(run).history
        rows = [row for row in read_history(run) if row["step"] <= start_step] if start_step else []
        try:
            write_text(self._path, "".join(json.dumps(row) + "\n" for row in rows))
            self._file = self._path.open("ab", buffering=0)  # unbuffered: a write fails here or not at all
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror or error}") from error
        self.wandb: WandbRun | None = None

    def log(self, split: str, step: int, values: dict[str, float]) -> None:
        """Write one row.

        Raises:
            RowLostError: the row cannot be written. Earlier rows are intact.
        """
        row = (json.dumps({"step": step, "split": split, **values}) + "\n").encode("utf-8")
        size_bytes = os.fstat(self._file.fileno()).st_size
        try:
            written = 0
            while written < len(row):
                written += self._file.write(row[written:])
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(size_bytes)
            raise RowLostError(
                f"cannot write a row of step {step} to {self._path}: {error.strerror or error}"
            ) from error
        if self.wandb is not None:
            self.wandb.log({f"{split}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Close metrics.jsonl, and wait for wandb."""
        with suppress(OSError):
            self._file.close()
        if self.wandb is not None:
            self.wandb.finish()


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and its main dependencies, with "-" for missing ones."""
    found = {"python": platform.python_version()}
    for name in ("worldmodel", "torch", "accelerate", "av", "decord2", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "-"
    return found
