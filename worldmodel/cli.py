"""What all command-line scripts share: one line for a user's mistake, no traceback."""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipelines.errors import UserError

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
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
