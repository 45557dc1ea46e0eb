"""A whole report, and reports without charts."""

import pytest

from tests.worldmodel.report.pages import Page, report
from tests.worldmodel.report.samples import (
    make_episodes,
    make_history,
    make_illustrations,
    make_metrics,
    make_planning,
)
from worldmodel.report.drawing import Picture


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    return report(
        tmp_path_factory.mktemp("report") / "new" / "report.html",
        metrics=make_metrics(3) | {"planning": make_planning()},
        history=make_history(),
        illustrations=make_illustrations(queries=1, num_steps=3, size_px=32),
        episodes=make_episodes(2),
    )


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts take seconds and are drawn in other tests: here they are only asked for, with their words."""
    for module in ("charts", "run_pictures"):
        monkeypatch.setattr(
            f"worldmodel.report.{module}.chart",
            lambda draw, alt, **_: Picture("data:image/", "data:image/", alt, 1, 1),
        )
