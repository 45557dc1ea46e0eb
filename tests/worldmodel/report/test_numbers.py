import math
from typing import Any

import numpy as np
import pytest

from worldmodel.report.numbers import duration, label, number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "–"),
        (np.float32("inf"), "–"),
        (12345, "12,345"),
        (np.int64(7), "7"),
        (0.12345, "0.123"),
        (np.float32(0.5), "0.500"),
        ([0.5, None], "0.500 / –"),
        (0.0, "0.000"),
        (-0.00061234, "-6.12e-04"),
        ([], "–"),
        ("text", "text"),
        (True, "True"),
    ],
)
def test_number(value: Any, text: str) -> None:
    assert number(value) == text


def test_labels_of_the_user_keep_their_capitals() -> None:
    assert [label(name) for name in ("pH", "EEG_power", "wrist_angle", "mrr")] == [
        *("pH", "EEG_power", "Wrist angle", "MRR")
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (42.4, "42 s"), (211.4, "3 min 31 s"), (8177, "2 h 16 min"), (59.7, "1 min 0 s")],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
