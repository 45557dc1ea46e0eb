"""The report: every number is the one in the metrics, and any part may be missing."""

import base64
import json
import math
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import CHART_DPI
from tests.worldmodel.report.pages import Page, report, text_of_headline
from tests.worldmodel.report.samples import (
    make_decoded,
    make_episodes,
    make_illustrations,
    make_metrics,
    make_planning,
    make_unlabelled_metrics,
    undeclared,
)
from worldmodel.evaluation.illustrations import NO_ILLUSTRATIONS, Illustrations
from worldmodel.report.headline import verdict
from worldmodel.report.run_charts import curve_pictures
from worldmodel.report.run_pictures import future_pictures
from worldmodel.report.tables import markdown_table, score_table
from worldmodel.runs.metrics import value_at


def test_every_number_with_a_path_is_the_one_in_the_metrics(full: tuple[str, Page]) -> None:
    metrics = json.loads(json.dumps(make_metrics(3) | {"planning": make_planning()}))
    shown = full[1].metrics
    assert {
        "forecasts.model.energy_score.0",
        "forecasts.simulator_oracle.energy_score.2",
        "forecasts.model.coverage.90.2.1",
        "embedding.retrieval.forecasts.model.hit_5.1",
        "embedding.forecasts.climatology.energy_score.0",
        "probes.embedding_and_r.velocity_change.mlp",
        "readout.r2.1",
        "kl_nats",
        "queries",
        "seed",
        "planning.success_rate",
        "planning.ci95.1",
        "planning.per_seed.2",
        "planning.path_ratio",
        "planning.curve.0.success_rate",
        "planning.random_floor.steps",
        "planning.oracle_ceiling.ms_per_decision",
    } <= set(shown)
    for path, texts in shown.items():
        for text in texts:
            plain = text.replace(",", "")
            decimals = len(plain.partition(".")[2])
            assert f"{value_at(metrics, path):.{decimals}f}" == plain, path
    assert "nan" not in full[1].text.lower()


def test_headline_names_the_scores_and_their_ratio_to_the_oracle(full: tuple[str, Page]) -> None:
    sentence = text_of_headline(make_metrics(3))
    assert sentence == (
        "Forecasts reach an Energy Score of 0.659 px at horizon 1 and 1.253 px at horizon 3, "
        "1.10 and 1.12 times those of the true law itself."
    ).replace("1.253 px", "1.253")
    assert sentence in full[1].text
    assert text_of_headline(make_metrics(1)).endswith("0.659 px, 1.10 times the 0.598 of the true law itself.")
    assert text_of_headline({}) == "This run has no forecast score."
    without = make_metrics(1)
    del without["forecasts"]["model"]["ratio_to_oracle"]
    without["forecasts"]["model"]["energy_score"] = [2 * 0.5982]
    assert "2.00 times" in text_of_headline(without)


def test_without_an_oracle_the_headline_prefers_climatology() -> None:
    scores = {"model": 0.3, "persistence": 1.2, "climatology": 0.6}
    forecasts = {name: {"energy_score": [score]} for name, score in scores.items()}
    sentence = text_of_headline({"forecasts": forecasts})
    assert sentence.endswith("0.300 in embedding space, 0.50 times the 0.600 of other clips' futures.")


def test_the_best_forecast_is_marked_and_an_oracle_never_is() -> None:
    metrics = make_metrics(1)
    (bold,) = [line for line in markdown_table(metrics).splitlines() if "**" in line]
    assert bold.startswith("| This run") and "**0.659**" in bold and "**1.10**" in bold
    metrics["forecasts"]["model"] |= {"energy_score": [0.9], "ratio_to_oracle": [1.5]}
    (bold,) = [line for line in markdown_table(metrics).splitlines() if "**" in line]
    assert "Shuffled r" in bold
    assert [row.label for row in score_table(metrics).rows if row.best] == ["Shuffled r"]


def test_a_run_that_a_baseline_beats_says_so_first(tmp_path: Path, no_charts: None) -> None:
    metrics = make_metrics(4)
    clear = "This run is better than every baseline at every horizon (Energy Score)"
    assert verdict(metrics) == f"{clear}."
    skill = {
        "persistence": {"value": [0.3] * 4, "low": [0.2] * 4, "high": [0.4] * 4},
        "climatology": {"value": [0.3, 0.1, 0.1, 0.1], "low": [0.2, 0.0, -0.1, 0.01], "high": [0.4] * 4},
    }
    metrics["forecasts"]["model"]["skill"] = skill
    unclear = "not clearly better than climatology at horizons 2 to 3 (px): the interval of the skill reaches 0"
    assert verdict(metrics) == f"{clear}; {unclear}."
    model, baselines = metrics["forecasts"]["model"]["energy_score"], metrics["forecasts"]
    baselines["climatology"] = {"energy_score": [model[0], model[1] - 0.1, model[2] - 0.1, model[3] - 0.1]}
    baselines["linear_gaussian"] = {"energy_score": [model[0] - 0.1, model[1] + 0.1, model[2] - 0.1, model[3] + 0.1]}
    baselines["encode_decode_oracle"]["energy_score"] = [0.0] * 4  # knows the law
    metrics["embedding"]["forecasts"]["persistence"]["energy_score"][3] = 0.0
    sentence = (
        "This run is worse than climatology at horizons 2 to 4; linear-Gaussian at horizons 1 and 3 "
        "(Energy Score, px). "
        "This run is worse than persistence at horizon 4 (Energy Score, embedding space)."
    )
    assert verdict(metrics) == sentence
    assert text_of_headline(metrics).startswith(f"{sentence} Forecasts reach an Energy Score of ")
    assert sentence in report(tmp_path / "report.html", metrics=metrics)[1].text
    assert verdict({}) == "" and verdict({"forecasts": {"model": {"energy_score": [1.0]}}}) == ""


def test_a_score_that_is_missing_or_equal_is_not_better() -> None:
    def of(model: list[float], other: list[float]) -> Any:
        return {
            "horizon": len(model),
            "forecasts": {"model": {"energy_score": model}, "persistence": {"energy_score": other}},
        }

    assert verdict(of([0.1, math.nan], [0.2, 0.3])).startswith("This run is worse than persistence at horizon 2 ")
    assert verdict(of([math.nan, 0.1], [0.2, 0.3])).startswith("This run is worse than persistence at horizon 1 ")
    assert text_of_headline(of([math.nan] * 2, [0.2, 0.3])) == verdict(of([math.nan] * 2, [0.2, 0.3]))
    assert verdict(of([0.1, math.nan], [0.2, math.nan])) == (
        "This run has no finite Energy Score at horizon 2 (embedding space)."
    )
    equal = verdict(of([0.1, 0.3], [0.2, 0.3]))
    assert equal == (
        "No baseline is better than this run at any horizon (Energy Score); equal to it: persistence at horizon 2 "
        "(embedding space)."
    )
    assert verdict(of([0.1, 0.2], [0.2, math.nan])).startswith("This run is better than every baseline")


def test_fans_of_a_law_are_positions_in_px(no_charts: None) -> None:
    """Whatever the quantity is: that of the demo is a velocity."""
    metrics: Any = make_metrics(2)
    metrics["quantity"]["unit"] = "px/frame"
    ((_, fan),) = future_pictures(make_illustrations(queries=1, num_steps=2), metrics)
    assert fan is not None and "mean ± SD, in px. " in fan.alt
    illustrations = make_illustrations(queries=1, num_steps=2)
    assert illustrations.fans is not None
    labelled = replace(illustrations, fans=replace(illustrations.fans, law=None, on_frames=False))
    ((_, fan),) = future_pictures(labelled, metrics)
    assert fan is not None and "mean ± SD, in px/frame. " in fan.alt


def test_skill_scores_have_their_intervals(tmp_path: Path, no_charts: None) -> None:
    metrics = make_unlabelled_metrics(2)
    metrics["intervals"] = {"level": 0.9, "block_clips": 15, "num_blocks": 40, "resamples": 2000}
    skill = {"value": [0.25, None], "low": [-0.5, None], "high": [0.75, None]}
    metrics["forecasts"]["model"]["skill"] = {"climatology": skill}
    assert undeclared(metrics) == []
    table = [line for line in markdown_table(metrics).splitlines() if line.startswith(("| Skill", "| Climatology"))][
        -2:
    ]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in table] == [
        ["Skill of this run over (90% interval)", "h = 1", "h = 2"],
        ["Climatology", "0.25 (-0.50 to 0.75)", "–"],
    ]
    shown = report(tmp_path / "report.html", metrics=metrics)[1]
    metrics["intervals"]["num_blocks"] = 1
    assert "Skill of this run over (90% interval, too narrow: 1 block)" in markdown_table(metrics)
    assert shown.metrics["forecasts.model.skill.climatology.low.0"] == {"-0.50"}
    assert "This run over climatology" in shown.text


def test_page_is_whole_and_needs_nothing_else(full: tuple[str, Page]) -> None:
    html, page = full
    assert html.lstrip().startswith("<!DOCTYPE html>")
    assert "script" not in page.tags and "link" not in page.tags
    assert page.resources and all(r.startswith("data:image/") for r in page.resources)
    assert "http://" not in html and "https://" not in html
    assert "@import" not in html and "url(" not in html
    assert page.headings[0] == "h1" and page.headings.count("h1") == 1 and page.headings[1] == "h2"
    for heading in (
        "Sampled futures",
        "Over the horizon",
        "Calibration",
        "Content of r",
        "Retrieval",
        "Surprise",
        "Planning",
    ):
        assert heading in page.text


def test_every_image_has_words_of_its_own_and_a_size(full: tuple[str, Page]) -> None:
    alts = [image["alt"] or "" for image in full[1].images]
    assert len(set(alts)) == len(alts) > 20 and all(len(alt) > 20 for alt in alts)
    assert all(int(image["width"] or 0) > 0 and int(image["height"] or 0) > 0 for image in full[1].images)
    assert any("This run 0.66 to 1.25" in alt for alt in alts)
    assert any("90% intervals cover 89%" in alt for alt in alts)
    assert any("5.00 nats at frame 63, 2.52 s" in alt for alt in alts)


def test_the_animation_plays_all_frames_and_has_a_still(full: tuple[str, Page]) -> None:
    html, page = full
    (source,) = [i["src"] or "" for i in page.images if "under sampled paths" in (i["alt"] or "")]
    moving = Image.open(BytesIO(base64.b64decode(source.split(",")[1])))
    assert getattr(moving, "n_frames") == 4 * 3 and moving.info["loop"] == 0  # noqa: B009
    assert html.count("prefers-reduced-motion: reduce") == 1 + 2  # and two episodes of planning


@pytest.mark.parametrize("num_frames", [1, 7])
def test_unlabelled_colour_video(tmp_path: Path, no_charts: None, num_frames: int) -> None:
    metrics = make_unlabelled_metrics(2) | {"kl_nats": None, "embedding": {"effective_rank": math.nan}}
    drawn = make_illustrations(
        queries=1, num_steps=2, channels=3, num_frames=num_frames, size_px=24, labels=False, num_neighbours=1
    )
    _, page = report(tmp_path / "report.html", metrics=metrics, illustrations=drawn)
    assert "in embedding space" in page.text and "times those of other clips' futures" in page.text
    assert "Nearest real futures" in page.text and "true law" not in page.text and "probes" not in page.text
    assert "–" in page.words and "KL, nats" not in page.text


def test_quantities_that_are_no_positions_get_a_fan_chart_and_plain_frames(tmp_path: Path) -> None:
    drawn = make_illustrations(queries=1, num_steps=2, size_px=24, on_frames=False)
    _, page = report(tmp_path / "report.html", metrics={}, illustrations=drawn)
    alts = [image["alt"] or "" for image in page.images]
    assert any("against the horizon" in alt for alt in alts) and not any("under sampled paths" in alt for alt in alts)


def test_of_many_dimensions_the_first_are_drawn(tmp_path: Path) -> None:
    drawn = make_illustrations(queries=1, num_steps=2, size_px=24, on_frames=False)
    assert drawn.fans is not None
    many: Any = {
        name: np.concatenate([getattr(drawn.fans, name)] * 50, axis=-1) for name in ("origin", "samples", "true", "law")
    }
    fans = replace(drawn.fans, **many)
    quantity = {"name": "state", "dimensions": [f"number {k}" for k in range(fans.true.shape[-1])]}
    _, page = report(tmp_path / "report.html", metrics={"quantity": quantity}, illustrations=replace(drawn, fans=fans))
    (alt,) = [image["alt"] or "" for image in page.images if "against the horizon" in (image["alt"] or "")]
    assert "number 7" in alt and "number 8" not in alt


def drop(metrics: Any, key: str) -> Any:
    return {k: v for k, v in metrics.items() if k != key}


@pytest.mark.parametrize("key", ["horizon", "quantity", "forecasts", "embedding", "readout", "probes", "train", "seed"])
@pytest.mark.parametrize("missing", ["absent", "null"])
def test_any_part_of_the_metrics_may_be_missing(tmp_path: Path, no_charts: None, key: str, missing: str) -> None:
    metrics = drop(make_metrics(2), key) | ({key: None} if missing == "null" else {})
    _, page = report(tmp_path / "report.html", metrics=metrics)
    assert "Run details" in page.text and ("Seed" in page.text) == (key != "seed")
    assert markdown_table(metrics)


def test_nothing_to_show_still_makes_a_page(tmp_path: Path) -> None:
    empty = make_illustrations(queries=0, labels=False)
    bare = Illustrations(empty.frames, 3, None, empty.neighbours[:, :0], (), None, None)
    _, page = report(tmp_path / "report.html", metrics={}, illustrations=bare)
    assert page.images == [] and "This run has no forecast score." in page.text


@pytest.mark.slow
@pytest.mark.parametrize("content", ["restless colour", "gray noise"])
def test_six_queries_of_any_content_stay_under_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setattr("worldmodel.report.drawing.CHART_DPI", CHART_DPI)
    channels = 3 if content == "restless colour" else 1
    drawn = make_illustrations(queries=1, size_px=128, channels=channels, texture=True, num_neighbours=4)
    drawn = replace(drawn, latents=None, timeline=None)  # one of each, however many queries
    if content == "gray noise":
        rng = np.random.default_rng(0)
        frames = rng.integers(0, 256, drawn.frames.shape, dtype=np.uint8)
        drawn = replace(drawn, frames=frames, neighbours=rng.integers(0, 256, drawn.neighbours.shape, dtype=np.uint8))
    html, _ = report(tmp_path / "report.html", metrics={}, illustrations=drawn)
    metrics = {"planning": make_planning(())}
    restless = make_episodes(1, size_px=128, num_steps=50, texture=True)
    planned, _ = report(tmp_path / "planned.html", metrics=metrics, illustrations=NO_ILLUSTRATIONS, episodes=restless)
    decoded = [make_decoded(future=32, channels=channels, side_px=128)]
    futures, _ = report(tmp_path / "futures.html", metrics={}, illustrations=NO_ILLUSTRATIONS, decoded=decoded)
    # Six queries, four episodes and three clips with decoded futures are the most that are drawn.
    assert 6 * len(html.encode()) + 4 * len(planned.encode()) + 3 * len(futures.encode()) < 5_000_000


def test_texts_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    metrics = {
        "run": evil,
        "quantity": {"name": evil, "unit": evil, "dimensions": [evil, evil]},
        "forecasts": {evil: {"energy_score": [1.0]}},
        "probes": {evil: {evil: {"linear": 1.0}}},
    }
    html, page = report(tmp_path / "r.html", title=evil, metrics=metrics, config_yaml=f"name: {evil}\n")
    assert "script" not in page.tags and "<script" not in html
    assert evil in page.text


def test_both_splits_of_the_history_are_drawn_and_the_later_row_of_a_step_counts(tmp_path: Path) -> None:
    rows = [{"step": s, "split": "train", "loss": v} for s, v in [(1, 9.0), (2, 8.0), (3, math.nan), (2, 4.25)]]
    rows += [{"step": 9, "split": "selection", "energy_score": 0.25}]
    # Rows of refinement are neither: their losses are others, and of training clips.
    rows += [{"step": s, "split": "refinement", "loss": 7.0, "energy_score": 3.0} for s in (1, 2, 20)]
    _, page = report(tmp_path / "report.html", metrics={}, history=rows)
    alts = " ".join(image["alt"] or "" for image in page.images)
    assert "Loss against training step; 4.250 at step 2, the last one drawn." in alts and "0.250 at step 9" in alts
    (_, picture), *_ = curve_pictures([{"step": 1, "split": "train", "loss": 0.00123}])
    assert "0.00123 at step 1" in picture.alt


def test_a_failed_write_keeps_the_report_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("before")

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        report(path, metrics={})
    assert path.read_text() == "before"
