"""Safe output: text from files and servers must not move the cursor of a terminal or change its colours."""

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

from data_pipelines.errors import printable

# The output of tqdm: a line that replaces the last one, or cursor moves alone.
_BAR = re.compile(r"(\r?)((?:\x1b\[A)*)(.*?)(\r?)", re.DOTALL)


class Terminal:
    """A text stream in front of another one. It escapes all characters that a terminal acts on, except line ends.

    A carriage return around a text, and a write that only moves the cursor up, pass: progress bars consist of them.
    Characters that the stream cannot encode are escaped as well.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if not text.isprintable():
            before, up, body, after = _BAR.fullmatch(text).groups()  # type: ignore[union-attr]
            if body and up:
                up, body = "", up + body
            text = before + up + "\n".join(map(printable, body.split("\n"))) + after
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def safe_terminal() -> Iterator[None]:
    """Pass printed text, log messages and progress bars through `Terminal`. The log level is INFO."""
    with redirect_stdout(Terminal(sys.stdout)), redirect_stderr(Terminal(sys.stderr)):
        handler = logging.StreamHandler()
        handler.setFormatter(_Formatter("%(levelname)s %(name)s: %(message)s"))
        logging.basicConfig(level=logging.INFO, handlers=[handler])
        yield


class _Formatter(logging.Formatter):
    """Format each message as one line. Tracebacks keep their lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)
