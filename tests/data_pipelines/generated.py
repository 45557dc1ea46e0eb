"""Inputs of the property tests: JSON of every shape, and the facts of videos that could exist."""

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from benchmarks.fuzz.sandbox import is_clean
from data_pipelines.errors import UserError
from data_pipelines.facts import Video

Result = TypeVar("Result")

# The same examples in every run, without a time limit for any: other processes share the cores.
EXAMPLES = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

NUMBERS = st.one_of(
    st.integers(-3, 20),
    st.integers(-(2**70), 2**70),
    st.sampled_from([2**63, -(2**63), 2**63 - 1, 10**400, -(10**400), 0.5, 1e39, 1e308]),
    st.floats(),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8))
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=10,
)
DEEP = tuple(opening * 100_000 for opening in ("[", '{"a":'))
"""JSON that is nested more deeply than Python's parser goes."""


def result_or_refusal(call: Callable[[], Result]) -> Result | None:
    """The result of a call; None where it refuses with a UserError, which must be one clean line."""
    try:
        return call()
    except UserError as error:
        if not is_clean(str(error)):
            pytest.fail(f"the refusal is not one clean line: {str(error)[:300]!r}")
        return None


@st.composite
def videos(draw: Any, path: str = "a.mp4") -> Video:
    """The facts of a video of up to 30 frames, of a constant or of a varying rate."""
    num_frames = draw(st.integers(1, 30))
    keyframes = (0, *sorted(draw(st.sets(st.integers(1, 29), max_size=4)) & set(range(1, num_frames))))
    first_pts = draw(st.none() | st.integers(-5000, 5000))
    keyframe_pts = () if first_pts is None else tuple(first_pts + 512 * frame for frame in keyframes)
    steps = draw(st.lists(st.integers(0, 20_000), min_size=num_frames - 1, max_size=num_frames - 1))
    varies = bool(keyframe_pts) and any(steps) and draw(st.booleans())
    fps = draw(st.sampled_from([1.0, 5.0, 24.0, 25.0, 30000 / 1001, 60.0]))
    return Video(
        path=path,
        size_bytes=draw(st.integers(30, 2**50)),
        mtime_ns=draw(st.integers(0, 2**62)),
        num_frames=num_frames,
        fps=fps,
        width=draw(st.integers(1, 8192)),
        height=draw(st.integers(1, 8192)),
        duration_s=sum(steps) / 1000 if varies else num_frames / fps,
        keyframes=keyframes if keyframe_pts else (0,),
        keyframe_pts=keyframe_pts,
        open_gop=draw(st.booleans()),
        tick_s=draw(st.sampled_from([0.0, 1 / 12800, 0.001])),
        frame_ms=tuple(steps) if varies else (),
        quarter_turns=draw(st.integers(0, 3)),
    )
