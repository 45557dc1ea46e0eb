"""The one exception for mistakes of the user, as opposed to mistakes of ours, and names as messages may show them."""

import logging


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, the value, what to do.

    Scripts print it without a traceback and exit with code 2. It may quote names and texts of strangers: characters
    that a terminal would act on are escaped.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(name: object) -> str:
    """Return the text of `name` on one line, with every character escaped that a terminal would act on.

    Those are control characters, line ends, marks that turn the direction of writing, and bytes that are not UTF-8.
    """
    text = str(name)
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def one_line_logger(name: str) -> logging.Logger:
    """Return the logger of a module, whose messages quote names of strangers as `printable` shows them."""
    logger = logging.getLogger(name)
    logger.addFilter(_escape)
    return logger


def _escape(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), ()
    return True


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
