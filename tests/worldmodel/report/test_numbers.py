import math
from typing import Any

import numpy as np
import pytest

from worldmodel.report.numbers import digits_for, duration, label, number


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


@pytest.mark.parametrize(
    ("values", "digits"),
    [
        ([0.5, 0.012], 3),
        ([12.0], 3),
        ([0.1], 3),
        ([0.0149, 0.0021], 4),
        ([[0.00149, 0.0004], None], 5),
        ([6e-5], 3),
        ([0.0], 3),
        ([], 3),
        ([math.nan], 3),
    ],
)
def test_small_numbers_of_a_column_have_decimals_for_the_largest(values: list[Any], digits: int) -> None:
    assert digits_for(values) == digits
    assert digits_for([0.5], 2) == 2 and digits_for([0.0149], 2) == 4 and digits_for([6e-5], 2) == 3
    assert [number(value, 5) for value in (0.00149, 0.0004, 2e-6)] == ["0.00149", "0.00040", "2.00e-06"]


def test_labels_of_the_user_keep_their_capitals() -> None:
    assert [label(name) for name in ("pH", "EEG_power", "wrist_angle", "mrr")] == [
        *("pH", "EEG_power", "Wrist angle", "MRR")
    ]
    assert [label(name, inside=True) for name in ("EEG_power", "persistence")] == ["EEG_power", "persistence"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (42.4, "42 s"), (211.4, "3 min 31 s"), (8177, "2 h 16 min"), (59.7, "1 min 0 s")],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
