from dataclasses import replace
from typing import Any

import numpy as np

from tests.worldmodel.report.samples import make_illustrations
from worldmodel.report.timeline import timeline_figure


def test_the_picture_of_surprise_has_the_frames_of_every_peak() -> None:
    timeline = make_illustrations(queries=1, size_px=16).timeline
    assert timeline is not None
    figure = timeline_figure(timeline)
    assert len(figure.axes) == 1 + 2 * 6
    assert "5.00 nats at frame 63, 2.52 s" in [text.get_text() for text in figure.texts]
    curve: Any = figure.axes[0].lines[0]
    assert np.array_equal(curve.get_ydata(), timeline.surprise)


def test_a_threshold_of_surprise_is_a_line_across() -> None:
    timeline = make_illustrations(queries=1, size_px=16).timeline
    assert timeline is not None
    with_threshold = timeline_figure(replace(timeline, threshold=4.5)).axes[0]
    flat = [line for line in with_threshold.lines if set(np.asarray(line.get_ydata())) == {4.5}]
    assert len(flat) == 1 and len(with_threshold.lines) == 1 + len(timeline_figure(timeline).axes[0].lines)
