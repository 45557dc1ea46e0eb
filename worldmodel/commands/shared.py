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

import torch

from data_pipelines.errors import UserError, one_line, one_line_logger
from data_pipelines.files import check_writable, write_text
from data_pipelines.remote.stores import check_url, host_of
from data_pipelines.text_files import shown
from worldmodel.commands.terminal import safe_terminal

log = one_line_logger(__name__)

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
MAX_COUNT, MAX_SEED = 2**20, 10**18


@contextmanager
def report_errors() -> Iterator[None]:
    """Turn a UserError into one line and exit code 2, Ctrl-C into exit code 130.

    What is printed and logged meanwhile is safe for a terminal (worldmodel/commands/terminal.py).
    """
    with safe_terminal():
        try:
            yield
        except UserError as error:
            message = f"error: {error}"
            print(message, file=sys.stderr)
            if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
                # The launcher of several processes ends with a summary of its own, which then names the cause.
                summary = {"message": message, "timestamp": int(time.time())}
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
    """Raises UserError: one of these options, where it is given, is below 1 or above MAX_COUNT."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if value is not None and value > MAX_COUNT:
            raise UserError(f"--{name.replace('_', '-')} must be at most {MAX_COUNT:,}, not {shown(value)}")


def check_seed(args: argparse.Namespace, name: str = "seed") -> None:
    """Raises UserError: this option is negative or too large for a generator."""
    value = getattr(args, name)
    if not 0 <= value <= MAX_SEED:
        raise UserError(f"--{name.replace('_', '-')} must be from 0 to {MAX_SEED:,}, not {shown(value)}")


def check_device(name: str) -> torch.device:
    """Return the device of this name. Raises UserError: there is no such device on this machine."""
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"--device {name} cannot be used here: {one_line(error)}") from error


def check_video(path: Path) -> None:
    """Raises UserError: no regular file is there."""
    try:
        is_file, exists = path.is_file(), path.exists()
    except (OSError, ValueError) as error:  # a name that is too long, or has a NUL
        raise UserError(f"--video {path}: {one_line(error)}") from error
    if not is_file:
        raise UserError(f"--video {path}: " + ("it is not a regular file" if exists else "there is no such file"))


def make_out_folder(path: Path, name: str = "") -> None:
    """Make the folder that results go to, before the work that leads to them; messages call it `name`, or --out.

    Raises:
        UserError: it cannot be made, or files cannot be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        check_writable(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write to {name or f'--out {path}'}: {one_line(error)}") from error


def check_out_file(path: Path) -> None:
    """Make the folder of the file that results go to. Raises UserError: such a file cannot be written there."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"cannot write to --out {path}: it is not a regular file")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write to --out {path}: {one_line(error)}") from error
    make_out_folder(path.parent, f"--out {path}")


def check_run_writable(run: Path) -> None:
    """Raise UserError where nothing can be written into the run folder, before hours of work are lost by it."""
    try:
        check_writable(run)
    except OSError as error:
        raise UserError(f"cannot write into {run}: {error.strerror or error}") from error


def add_allow_remote(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--allow-remote", action="store_true", help="read the run's videos from the URL in its config")


def check_remote(url: str | None, is_allowed: bool) -> None:
    """Report the host from which a run's videos are read. A run may come from a stranger: its user has to agree first.

    Raises:
        UserError: the videos lie behind a URL, and the user has not agreed.
    """
    if url is None:
        return
    check_url(url)
    host = host_of(url)
    if not is_allowed:
        raise UserError(
            f"the run's config names videos at {host!r}: --allow-remote reads them, with your credentials for that host"
        )
    log.info("reading videos from %s", host)


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write what a script found, as JSON.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        write_text(path, json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
