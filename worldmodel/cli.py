"""What all command-line scripts share: one line for a user's mistake, no traceback."""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from data_pipelines.errors import UserError
from data_pipelines.files import check_writable, write_text

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


@contextmanager
def report_errors() -> Iterator[None]:
    """Log at INFO; turn a UserError into one line and exit code 2, Ctrl-C into exit code 130."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            # The launcher of several processes ends with a summary of its own, which then names the cause.
            summary = {"message": f"error: {error}", "timestamp": int(time.time())}
            Path(error_file).write_text(json.dumps(summary), encoding="utf-8")
        leave(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        leave(EXIT_INTERRUPTED)


def leave(code: int) -> NoReturn:
    """End this process with an exit code; one of several ends at once, when what it wrote is out.

    While the interpreter ends, a thread of Gloo that lets go of a tensor aborts the process
    (https://github.com/pytorch/pytorch/issues/190489), and DDP keeps those threads when the process group is destroyed.
    """
    if os.environ.get("WORLD_SIZE", "1").strip() != "1":
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Raises UserError: one of these options, where it is given, is below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")


def check_run_writable(run: Path) -> None:
    """Raise UserError where nothing can be written into the run folder, before hours of work are lost by it."""
    try:
        check_writable(run)
    except OSError as error:
        raise UserError(f"cannot write into {run}: {error.strerror or error}") from error


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write what a script found, as JSON.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        write_text(path, json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
