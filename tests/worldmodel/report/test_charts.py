from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from worldmodel.evaluation.illustrations import Fans, Latents
from worldmodel.report import charts
from worldmodel.report.charts import (
    Line,
    fan_words,
    latent_charts,
    principal_components,
    series_style,
    spread_labels,
)
from worldmodel.report.drawing import THEMES, Picture


def test_points_of_an_interval_chart_are_to_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = Figure()
    monkeypatch.setattr("worldmodel.report.charts.chart", lambda draw, alt: draw(figure, THEMES["light"]))
    points = [(40, 0.2, 0.1, 0.3), (0, 0.9, 0.8, 1.0), (10, 0.5, 0.4, 0.6)]
    charts.interval_chart(points, ["forty", "none", "ten"], {"random": 0.125}, xlabel="noise", alt="")
    (axes,) = figure.axes
    level, rates = axes.lines
    assert np.array_equal(level.get_ydata(), [0.125] * 2)
    assert np.array_equal(rates.get_xydata(), [(0, 0.9), (10, 0.5), (40, 0.2)])
    (bars,) = axes.collections
    assert [np.asarray(bar.vertices)[:, 1].tolist() for bar in bars.get_paths()] == [[0.1, 0.3], [0.8, 1.0], [0.4, 0.6]]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["forty", "none", "ten"]


def test_labels_keep_their_distance_and_stay_in_the_frame() -> None:
    assert spread_labels([0.2, 0.8], 0.1) == [0.2, 0.8]
    assert spread_labels([0.5, 0.5, 0.52], 0.1) == pytest.approx([0.5, 0.6, 0.7])
    assert spread_labels([1.0, 0.99], 0.1) == pytest.approx([1.0, 0.9])


@pytest.mark.parametrize("count", [3, 30])
def test_all_lines_have_a_name_however_many_they_are(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []

    def draw_light(draw: Any, alt: str, *, size_in: tuple[float, float]) -> Picture:
        figures.append(Figure(figsize=size_in))
        draw(figures[-1], THEMES["light"])
        return Picture("", "", alt, 1, 1)

    monkeypatch.setattr("worldmodel.report.charts.chart", draw_light)
    lines = [Line(f"group {k}", np.array([1.0, k]), *series_style(k)) for k in range(count)]
    assert len({(line.colour, line.dashes) for line in lines}) == count
    charts.horizon_chart(lines, ylabel="", xlabel="", alt="")
    charts.calibration_chart([(line.label, [0.5, 0.9], [0.5, 0.9]) for line in lines], "")
    charts.curve_chart([(line, np.array([1, 2])) for line in lines], "")
    ends, calibration, curves = figures
    heights = sorted(float(text.xy[1]) for text in ends.axes[0].texts if isinstance(text, Annotation))
    assert len(heights) == count and heights[0] >= 0 and heights[-1] <= 1 + 1e-9
    assert np.diff(heights).min() * ends.get_figheight() > 0.16
    for figure in (calibration, curves):
        legend = figure.legends[0] if count > 6 else figure.axes[0].get_legend()
        assert legend is not None and len(legend.get_texts()) == count
        assert figure.get_figheight() > 0.19 * count + 2.6 or count <= 6


def test_the_leading_plane_of_r() -> None:
    line = np.outer(np.arange(5.0), [3.0, 4.0, 0.0])
    plane, held = principal_components(line)
    assert held == pytest.approx(1) and np.abs(plane[:, 0]) == pytest.approx([10, 5, 0, 5, 10])
    assert principal_components(np.arange(4.0)[:, None])[0].shape == (4, 2)


@pytest.mark.parametrize("has_law", [True, False])
def test_what_points_down_on_the_frames_points_down_in_a_fan_chart(
    has_law: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = Figure()
    monkeypatch.setattr("worldmodel.report.charts.chart", lambda draw, alt, **_: draw(figure, THEMES["light"]))
    values = np.zeros((1, 3, 2, 4))
    fans = Fans(values, values if has_law else None, values[:, 0], values[:, 0, 0], on_frames=has_law)
    charts.fan_chart(fans, 0, ["ball x", "ball y", "player y", "y"], "px", "")
    assert [axes.yaxis_inverted() for axes in figure.axes] == [False, has_law, has_law, has_law]


def test_words_about_small_numbers_have_decimals_for_them() -> None:
    def words(scale: float) -> str:
        values = scale * np.ones((1, 2, 1, 1))
        return fan_words(Fans(values, None, values[:, 0], values[:, 0, 0], on_frames=False), 0, ["k"], "m")

    assert "k 0.0123 ± 0.0000, true 0.0123." in words(0.01234) and "k 0.12 ± 0.00, true 0.12." in words(0.1234)
    assert "k 14.1 ± 0.0, true 14.1." in words(14.12) and "true 0.0." in words(0.0)


def test_inferred_r_that_is_not_finite_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worldmodel.report.charts.chart", lambda draw, alt, **_: Picture("", "", alt, 1, 1))
    r = np.random.default_rng(0).normal(size=(6, 2))
    r[1, 0] = np.nan
    ((_, plain),) = latent_charts(Latents(r, None, ""))
    ((_, coloured),) = latent_charts(Latents(r, np.array([[0.0], [1.0], [2.0], [3.0], [4.0], [np.inf]]), "change"))
    assert plain.alt.startswith("5 inferred r") and coloured.alt.startswith("4 inferred r")
    assert latent_charts(Latents(r[:3], None, "")) == []
