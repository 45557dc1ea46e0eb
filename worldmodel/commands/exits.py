"""The end of a command: one-line errors, exit codes, safe output."""

import errno
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from data_pipelines.errors import UserError, one_line
from worldmodel.commands.terminal import safe_terminal

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

REFUSALS = frozenset(
    getattr(errno, name)
    for name in ("EACCES", "EPERM", "EROFS", "ENAMETOOLONG", "ELOOP", "ENOSPC", "EDQUOT", "EIO", "ESTALE")
)
"""Errors by which the system refuses a file for a reason that the user can mend."""


@contextmanager
def report_errors() -> Iterator[None]:
    """Print a UserError as one line and exit with code 2. Exit with 130 after Ctrl-C, with 141 if the reader has left.

    A file that the system refuses counts as a UserError: a folder without permission, a name that is too long, ...

    Inside the block, printed and logged text is made safe for a terminal (worldmodel/commands/terminal.py).
    """
    with safe_terminal():
        try:
            with named_refusals():
                yield
        except UserError as error:
            message = f"error: {error}"
            print(message, file=sys.stderr)
            if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
                # torchrun ends with a summary that names the cause if it finds it in this file.
                summary = {"message": message, "timestamp": int(time.time())}
                Path(error_file).write_text(json.dumps(summary), encoding="utf-8")
            leave(EXIT_USER_ERROR)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            leave(EXIT_INTERRUPTED)
        except BrokenPipeError:  # the reader, such as `head`, has left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
            leave(EXIT_BROKEN_PIPE)


@contextmanager
def named_refusals() -> Iterator[None]:
    """Raise an OSError of REFUSALS that names a file as a UserError, and so that of a full disk, which names none."""
    try:
        yield
    except OSError as error:
        if error.errno in REFUSALS and isinstance(error.filename, str | bytes):
            raise UserError(f"'{os.fsdecode(error.filename)}': {one_line(error)}") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"a file cannot be written: {one_line(error)}") from error
        raise


def leave(code: int) -> NoReturn:
    """End this process with an exit code. In a multi-process run, flush the output and end at once (os._exit).

    DDP keeps threads of Gloo after the process group is destroyed. A thread that frees a tensor during the shutdown of
    the interpreter aborts the process (https://github.com/pytorch/pytorch/issues/190489).
    """
    if os.environ.get("WORLD_SIZE", "1").strip() != "1":
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
