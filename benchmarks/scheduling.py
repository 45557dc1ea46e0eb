"""The scheduling of a benchmark that encodes AV1."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_scheduling() -> Iterator[None]:
    """Restore the scheduling of this thread: SVT-AV1, run by root, leaves its caller with real-time priority (Linux).

    The processes that the benchmark starts later would have it as well.
    """
    if not hasattr(os, "sched_setscheduler"):
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)
