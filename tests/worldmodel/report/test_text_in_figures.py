"""Names of others in figures, tables and pages: formulas, control characters, glyphs that no font has, great length."""

import dataclasses
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from tests.worldmodel.report.samples import make_factors, make_illustrations, make_metrics, make_planning
from worldmodel.evaluation.illustrations import NO_ILLUSTRATIONS
from worldmodel.report import charts, drawing
from worldmodel.report.comparison import RunScores, comparison_figure, comparison_markdown, flat_numbers, png
from worldmodel.report.comparison_page import write_comparison_page
from worldmodel.report.drawing import save, short
from worldmodel.report.run_page import write_report
from worldmodel.report.tables import markdown_table
from worldmodel.report.timeline import timeline_figure

NAMES = {
    "formula": r"a$\frac{$",
    "formulas": r"cost $\x$",
    "price": "$5 or $6",
    "underscore": "_hidden",
    "backslash": "\\alpha \\",
    "escape": "bad\x1b[2Jname",
    "lines": "two\r\nlines\x85and\u2028more",
    "null": "a\0b",
    "direction": "\u202egp4.exe\u2066",
    "right_to_left": "שלום עולם",
    "glyphs": "日本語 😀",
    "bytes": "caf\udce9",
    "long": "x" * 5000,
    "words": "very long " * 500,
    "empty": "",
    "percent": "%s %(a)s {0} {x}",
    "html": "<script>document.title='x'</script><img src=x onerror=alert(1)>",
    "bar": "a|b",
}
# Of these, for what takes long to draw.
FEW = {
    key: NAMES[key] for key in ("formula", "formulas", "underscore", "escape", "direction", "glyphs", "bytes", "html")
}


@pytest.fixture(autouse=True)
def strict(tmp_path: Path) -> Iterator[None]:
    """Nothing is warned of, and a user's own settings do not matter."""
    with warnings.catch_warnings(), matplotlib.rc_context({"text.usetex": True, "font.family": ["serif"]}):
        warnings.simplefilter("error")
        yield


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


@pytest.mark.parametrize("name", FEW.values(), ids=FEW)
def test_the_picture_of_surprise(name: str) -> None:
    timeline = make_illustrations().timeline
    assert timeline is not None
    figure = timeline_figure(dataclasses.replace(timeline, video=name, unit=name))
    save(figure, io.BytesIO(), "png", dpi=20)
    assert all(len(line) < 120 and line.isprintable() for line in texts(figure).split("\n"))


def test_the_report(tmp_path: Path) -> None:
    """All names at once: of forecasts, probes, quantity, video and run."""
    names, joined = list(NAMES.values()), "".join(NAMES.values())
    metrics = make_metrics(2)
    metrics["forecasts"] |= {name: metrics["forecasts"]["persistence"] for name in names}
    metrics["probes"] |= {name: metrics["probes"]["r"] for name in names}
    metrics["planning"] = make_planning(()) | {"factors": make_factors(joined[:900])}
    metrics["quantity"] = {"name": joined, "unit": joined, "dimensions": [joined, NAMES["formula"]]}
    drawn = make_illustrations()
    assert drawn.timeline is not None and drawn.fans is not None
    words = dataclasses.replace(drawn.timeline, video=joined, unit=joined)
    write_report(
        tmp_path / "report.html",
        title=joined,
        metrics=metrics,
        config_yaml=f"run_dir: {joined}\n",
        history=[],
        illustrations=dataclasses.replace(NO_ILLUSTRATIONS, timeline=words),
        versions={"python": joined},
    )
    charts.fan_chart(drawn.fans, 0, [NAMES["formula"], joined], NAMES["html"], "")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>document" not in page and "<img src=x" not in page
    table = markdown_table(metrics | {"horizon": 1}).split("\n")
    assert len(table) == 2 + len(metrics["forecasts"])
    assert all(line.count("|") - line.count("\\|") == 5 and line.isprintable() for line in table)


def test_the_comparison(tmp_path: Path) -> None:
    runs = [RunScores(name, "gaussian", 0, flat_numbers(make_metrics(2))) for name in FEW.values()]
    figure = comparison_figure(runs)
    assert figure is not None and png(figure).startswith(b"\x89PNG")
    assert all(len(line) < 120 for line in texts(figure).split("\n"))
    write_comparison_page(tmp_path / "compare.html", title=NAMES["html"], runs=runs, histories=[[]] * len(runs))
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "<script>document" not in page and "<img src=x" not in page
    table = comparison_markdown(runs).split("\n\n")[0].split("\n")
    assert len(table) == 2 + len(runs) and all(line.isprintable() for line in table)


def test_a_name_is_drawn_letter_by_letter() -> None:
    assert short("$5 or $6") == "$5 or $6" and short(r"\alpha") == r"\alpha"
    assert short("bad\x1b[2J") == r"bad\x1b[2J" and short("a\u202eb") == r"a\u202eb"
    assert short("two\r\nlines") == "two lines" and short("_x") == " _x" and short("日本") == "□□"
    assert short("x" * 30 + "end") == "…" + "x" * 20 + "end" and short("abcdef", 3) == "…ef"
    with drawing.style(drawing.THEMES["light"]):
        figure = Figure()
        assert figure.text(0, 0, "$x$").get_parse_math() is False


def test_every_label_of_the_picture_of_surprise_is_plain() -> None:
    timeline = make_illustrations().timeline
    assert timeline is not None
    figure = timeline_figure(dataclasses.replace(timeline, video="$a$"))
    titles = [text for text in figure.findobj(Text) if text.get_text() == "$a$"]
    assert len(titles) == 1 and not titles[0].get_parse_math()
