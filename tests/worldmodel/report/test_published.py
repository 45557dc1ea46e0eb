"""Published figures: beside a run's own in its report, and in the documentation."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from tests.conftest import REPO
from tests.worldmodel.report.pages import report
from tests.worldmodel.report.samples import make_planning
from worldmodel.report.published import PUBLISHED, own_setting, published_for
from worldmodel.runs.metrics import RunMetrics

WORLDS = ("two_rooms", "swm_two_room", "push_t", "reacher", "cube", "point_mazes")
ROWS = [row for rows in PUBLISHED.values() for row in rows]


def planned(**protocol: Any) -> RunMetrics:
    planning = make_planning(())
    return RunMetrics(planning={**planning, "protocol": planning["protocol"] | protocol})


def test_they_are_of_environments_that_exist() -> None:
    for world in WORLDS:
        import_module(f"data_pipelines.worlds.{world}")
    assert set(PUBLISHED) <= set(gymnasium.registry)
    for env in PUBLISHED:
        assert published_for(planned(env=f"some.module:{env}")) == published_for(planned(env=env)) == PUBLISHED[env]
    assert published_for(planned(env="CartPole-v1")) == published_for({}) == ()


def test_every_figure_is_a_share_with_a_setting_and_a_source_of_its_own() -> None:
    for row in ROWS:
        assert re.fullmatch(r"(0\.\d+|1\.0+)( ± 0\.\d+)?", row.success), row
        assert float(row.success.split()[0]) <= 1 and ("episodes" in row.setting or "seeds" in row.setting), row
    of_one_setting = [(row.model, row.setting, row.source) for row in ROWS]
    assert len(set(of_one_setting)) == len(ROWS) > 20


def test_the_documentation_has_the_same_table() -> None:
    lines = (REPO / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    documented = [cells[1:] for cells in table if cells[0] in PUBLISHED]
    assert documented == [[row.model, row.success, row.setting, row.source] for row in ROWS]


def test_a_report_shows_them_below_the_figure_of_the_run(tmp_path: Path) -> None:
    _, page = report(tmp_path / "report.html", metrics=planned(policy="search", block=5))
    assert page.metrics["planning.success_rate"] == {"0.800"} and page.metrics["planning.ci95.1"] == {"0.842"}
    setting = (
        "TwoRooms-v0, drawn starts and goals, budget 50, 3 x 1,250 episodes; icem, 4 candidates, 20 steps of 5 actions"
    )
    rows = [row.model for row in PUBLISHED["worldmodel/TwoRooms-v0"]]
    places = [page.text.index(words) for words in ("Published figures", "This run 0.800 ( 0.737 to 0.842 )", *rows)]
    assert places == sorted(places), page.text[places[0] : places[0] + 2000]
    assert setting.replace("4 candidates", "– candidates") in page.text
    other = report(tmp_path / "other.html", metrics=planned(env="CartPole-v1"))[1]
    assert "Published figures" not in other.text and "eb_jepa" not in other.text


@pytest.mark.parametrize(
    ("protocol", "words"),
    [
        (
            {"protocol": "recorded", "offset": 25, "policy": "gc"},
            "TwoRooms-v0, goals 25 steps after starts, of held-out episodes, budget 50, 3 x 1,250 episodes; no search",
        ),
        (
            {
                "env_kwargs": {"layout": "random"},
                "planning": {"planner": {"name": "cem"}, "candidates": 7, "horizon": 2},
            },
            "TwoRooms-v0, layout=random, drawn starts and goals, budget 50, 3 x 1,250 episodes; cem, 7 candidates, 2 "
            "steps of 1 action, one step executed",
        ),
    ],
)
def test_the_setting_of_a_run_in_words(protocol: dict[str, Any], words: str) -> None:
    assert own_setting(planned(**protocol)) == words
    own_setting({})
