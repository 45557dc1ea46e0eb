"""Planning and decoded pictures in the report: tables, episodes and plans."""

import base64
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.worldmodel.report.pages import Page, report, text_of_headline
from tests.worldmodel.report.samples import (
    make_decoded,
    make_episodes,
    make_factors,
    make_metrics,
    make_planning,
    moving_image,
    undeclared,
)
from worldmodel.evaluation.illustrations import NO_ILLUSTRATIONS
from worldmodel.planning.planned_episodes import DecodedPlans
from worldmodel.report.animations import planning_animation
from worldmodel.report.decoded_pictures import decoded_pictures, still_image
from worldmodel.report.headline import protocol_facts, tiles
from worldmodel.report.numbers import text_of
from worldmodel.report.tables import factor_table, planning_table


def test_planning_of_another_checkpoint_and_refinement_are_named() -> None:
    metrics: Any = make_metrics(1) | {"planning": make_planning()}
    metrics["planning"]["protocol"]["step"] = 1200
    assert " Plans reach " in text_of_headline(metrics) and "At step" not in text_of_headline(metrics)
    metrics["train"]["refine_steps"] = 2000
    assert " At step 1,200 (the scores are of step 3,200): Plans reach " in text_of_headline(metrics)
    assert "of training, 1,200 steps and 2,000 of refinement" in dict(tiles(metrics))


def test_decoded_futures_are_shown_with_the_errors_of_the_decoder(tmp_path: Path) -> None:
    metrics = {"decoder": {"mse": 0.00123, "mean_picture_mse": 0.01, "last_frame_mse": 0.009}}
    decoded = make_decoded(2, samples=1, future=4)
    _, page = report(tmp_path / "report.html", metrics=metrics, illustrations=NO_ILLUSTRATIONS, decoded=[decoded])
    assert "Futures as pictures" in page.text and page.metrics["decoder.mse"] == {"0.00123"}
    assert "those of 64 sampled futures" in page.text
    words = "what came, a sampled future, and the mean and the spread of all 64."
    alts = [image["alt"] for image in page.images]
    assert alts == [f"Clip {clip}, {kind}: {words}" for clip in (1, 2) for kind in ("moving", "frame by frame")]
    (moving, still), _ = decoded_pictures(decoded)
    with moving_image(moving) as image:
        assert image.n_frames == 3 + 4 and image.size == (moving.width_px, moving.height_px)
    with moving_image(still) as image:
        assert image.size == (still.width_px, still.height_px)


def test_tiles_of_a_still_are_the_frames(tmp_path: Path) -> None:
    decoded = make_decoded(samples=2, future=3, side_px=112)
    image = np.asarray(still_image(decoded, 0))[..., 0]
    rows = [decoded.real, decoded.decoded_real, decoded.samples[:, 0], decoded.samples[:, 1], decoded.mean]
    for row, frames in enumerate(rows):
        for column in range(3):
            top, left = 16 + 116 * row, 86 + 116 * (3 + column) + 8
            np.testing.assert_array_equal(image[top : top + 112, left : left + 112], frames[0, column, 0])
    np.testing.assert_array_equal(image[16 : 16 + 112, 86 : 86 + 112], decoded.context[0, 0, 0])


def test_the_protocol_of_planning_is_shown_whole(full: tuple[str, Page]) -> None:
    facts = {
        "env": "data_pipelines.worlds.two_rooms:worldmodel/TwoRooms-v0",
        "env_kwargs": "–",
        "seeds": "3",
        "episodes": "1250",
        "budget": "50",
        "first_seed": "0",
        "planning.planner": "icem",
        "planning.horizon": "20",
        "planning.init_std": "0.5",
        "planning.risk_quantile": "–",
        "planning.num_samples": "4",
        "step": "3000",
        "labels": "10000",
    }
    assert dict(protocol_facts({"planning": make_planning()})) == facts
    assert " ".join(f"{name} {value}" for name, value in facts.items()) in full[1].text


def test_planning_is_reported_next_to_chance_and_the_ceiling(full: tuple[str, Page]) -> None:
    metrics: Any = {"planning": make_planning()}
    assert text_of_headline(metrics) == (
        "Plans reach 0.800 of their goals (95% interval 0.737 to 0.842), random actions 0.132."
    )
    assert "Plans reach 0.800 of their goals" in full[1].text
    table = planning_table(metrics)
    assert [row.label for row in table.rows] == [
        "This run, 100 labels",
        "This run, 1,000 labels",
        "This run, 10,000 labels",
        "Random actions",
        "Privileged planner",
    ]
    assert [text_of(cell) for cell in table.rows[2].cells] == [
        *("0.800", "0.737", "0.842", "1.23", "17.2", "9.88", "0.78 / 0.80 / 0.82")
    ]
    assert [text_of(cell) for cell in table.rows[0].cells[3:5]] == ["–", "–"]
    without: Any = make_planning(()) | {"oracle_ceiling": None}
    assert [row.label for row in planning_table({"planning": without}).rows] == ["This run", "Random actions"]
    assert planning_table({}).rows == []


def test_success_against_factors_is_drawn_and_listed(tmp_path: Path, no_charts: None) -> None:
    planning = make_planning(()) | {"factors": make_factors()}
    planning["factors"][0]["values"].append({"value": 30})  # a damaged file
    _, page = report(tmp_path / "report.html", metrics={"planning": planning})
    alts = [image["alt"] or "" for image in page.images]
    assert [words for words in alts if words.startswith("Success against")] == [
        "Success against noise, with 95% intervals: 0 0.900 (0.850 to 0.920); 10 0.700 (0.650 to 0.720); "
        "20 0.500 (0.450 to 0.520). Random: 0.132.",
        "Success against background, with 95% intervals: background 0.800 (0.737 to 0.842); "
        "background 0 0.900 (0.850 to 0.920); background 1 0.700 (0.650 to 0.720). Random: 0.132.",
    ]
    table = factor_table({"planning": planning})
    assert [row.label for row in table.rows] == [
        *("Undisturbed", "noise = 0", "noise = 10", "noise = 20", "background = background 0"),
        "background = background 1",
    ]
    assert [text_of(cell) for cell in table.rows[2].cells[:3]] == ["0.700", "0.650", "0.720"]
    assert page.metrics["planning.factors.0.values.1.success_rate"] == {"0.700"}
    assert "Undisturbed: 0." in page.text and undeclared({"planning": planning}) == []
    _, bare = report(tmp_path / "report.html", metrics={"planning": make_planning(())})
    assert "Factors of variation" in page.text and "Factors of variation" not in bare.text


@pytest.mark.parametrize(("labels", "drawn"), [((), False), ((100,), False), ((100, 1000), True)])
def test_success_against_labels_is_drawn_for_several_counts(
    tmp_path: Path, no_charts: None, labels: tuple[int, ...], drawn: bool
) -> None:
    _, page = report(tmp_path / "report.html", metrics={"planning": make_planning(labels)})
    alts = " ".join(image["alt"] or "" for image in page.images)
    assert ("100 labels 0.700 (0.637 to 0.742); 1,000 labels 0.800 (0.737 to 0.842)" in alts) == drawn
    assert ("Success against labels" in page.text) == drawn and "Planning" in page.text


def test_an_episode_moves_through_all_its_frames_and_says_what_came_of_it(full: tuple[str, Page]) -> None:
    reached, failed = [image for image in full[1].images if "the goal is" in (image["alt"] or "")]
    assert "Episode 1: the goal is reached after 6 steps, of at most 50." in (reached["alt"] or "")
    assert "and ends 0.0 px from it. The first plan is imagined to reach within" in (reached["alt"] or "")
    assert "Episode 2: the goal is not reached in 6 steps" in (failed["alt"] or "")
    moving = Image.open(BytesIO(base64.b64decode((reached["src"] or "").split(",")[1])))
    assert getattr(moving, "n_frames") == 6 + 1 and moving.info["loop"] == 0  # noqa: B009
    assert sum("the goal image" in (image["alt"] or "") for image in full[1].images) == 2


def test_episodes_without_positions_show_frames_only(tmp_path: Path) -> None:
    metrics = {"planning": make_planning(())}
    _, page = report(tmp_path / "report.html", metrics=metrics, episodes=make_episodes(1, positions=False))
    assert "the path so far" not in page.text and "px from it" not in (page.images[0]["alt"] or "")
    assert moving_image(planning_animation(make_episodes(1, positions=False)[0], "alt")).n_frames == 7


def test_decoded_plans_are_shown_between_the_present_and_the_goal(tmp_path: Path) -> None:
    (episode,) = make_episodes(1, size_px=32)
    levels = np.array([[60, 120, 180], [90, 150, 210]], np.uint8)
    shown = np.broadcast_to(levels[..., None, None, None], (2, 3, 3, 32, 32))
    frames, goal = np.full_like(episode.frames, 30), np.full_like(episode.goal, 240)
    plans = DecodedPlans(np.array([0, 5]), np.array([1, 3, 5]), shown)
    episode = replace(episode, frames=frames, goal=goal, plans=plans)
    metrics = {"planning": make_planning(())}
    _, page = report(tmp_path / "report.html", metrics=metrics, episodes=[episode])
    (image,) = [image for image in page.images if "as decoded pictures" in (image["alt"] or "")]
    assert "the plans at steps 0, 5 as decoded pictures, up to 5 steps ahead" in (image["alt"] or "")
    drawn = np.asarray(Image.open(BytesIO(base64.b64decode((image["src"] or "").split(",")[1]))).convert("L")).astype(
        int
    )
    centres = drawn[48 : 48 + 69 : 68, 88::68]
    assert np.abs(centres - [[30, 60, 120, 180, 240], [30, 90, 150, 210, 240]]).max() <= 1
    assert "imagined by the plan" not in report(tmp_path / "b.html", metrics=metrics, episodes=make_episodes(1))[1].text
