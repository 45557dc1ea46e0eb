"""The parts of a kind of input: seeds that are prepared once, and a function that builds one case of them."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class WrongError(Exception):
    """The library accepted an input and derived something impossible or wrong from it."""


@dataclass(frozen=True)
class Case:
    """One input.

    attempt: calls the library; returns the reason of a refusal, or "" where the input was accepted. May raise
        UserError, which is a refusal too, and WrongError.
    is_good: the input is valid, so that a refusal is a finding.
    """

    attempt: Callable[[], str]
    is_good: bool = False


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    prepare: writes the seeds, valid files, into a folder.
    build: (random numbers, folder of the seeds, empty folder for the input) -> the case. Both folders exist.
    """

    name: str
    prepare: Callable[[Path], None]
    build: Callable[[random.Random, Path, Path], Case]
    cpu_s: int = 10
    """Seconds of one core that a case may take."""


def require(condition: bool, what: str) -> None:
    """Raise WrongError unless the condition holds."""
    if not condition:
        raise WrongError(what)
