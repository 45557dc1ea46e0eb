"""The exception for a user's mistakes, and text of strangers as messages may show it.

Mistakes of our own are assertions.
"""

import difflib
import logging
from collections.abc import Iterable
from typing import Any

MAX_MISSPELT = 80  # characters of a name that is compared with others
MAX_MESSAGE = 4_000  # characters of an error or a log message


class UserError(Exception):
    """A mistake that the user can correct. The message is one line: what is wrong, the value, what to do.

    Commands print it without a traceback and exit with code 2. It may quote names and texts of strangers: characters
    that a terminal would act on are escaped, and the middle of a very long message is left out.
    """

    def __str__(self) -> str:
        return bounded(printable(super().__str__()))


def printable(name: object) -> str:
    """Return the text of `name` on one line, with every character escaped that a terminal would act on.

    These are control characters, line ends, marks that change the direction of writing, and bytes that are not UTF-8.
    """
    text = str(name)
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def bounded(message: str) -> str:
    """Return a message without its middle if it is longer than MAX_MESSAGE, as that of a damaged file may be."""
    if len(message) <= MAX_MESSAGE:
        return message
    half = MAX_MESSAGE // 2 - 20
    return f"{message[:half]} ... {len(message) - 2 * half:,} characters ... {message[-half:]}"


def one_line(error: BaseException) -> str:
    """Return an exception as one short line, without the path that messages of FFmpeg and the system repeat."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return printable(" ".join(str(text).split())[:200])


def did_you_mean(name: Any, names: Iterable[str], prefix: str = "") -> str:
    """Return " (did you mean PREFIXother?)" with the most similar of `names`; "" if none is similar."""
    if not isinstance(name, str) or len(name) > MAX_MISSPELT:
        return ""
    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {prefix}{near[0]}?)" if near else ""


def one_line_logger(name: str) -> logging.Logger:
    """Return the logger of a module, whose messages quote texts of strangers as those of `UserError` do."""
    logger = logging.getLogger(name)
    logger.addFilter(_escape)
    return logger


def _escape(record: logging.LogRecord) -> bool:
    record.msg, record.args = bounded(printable(record.getMessage())), ()
    return True


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
