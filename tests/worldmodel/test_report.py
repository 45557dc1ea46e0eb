"""The report: every number it shows is the one in the metrics, and the file is whole, safe and readable."""

import base64
import math
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from worldmodel.evaluation.report import (
    ForecastExamples,
    duration,
    headline,
    markdown_table,
    number,
    write_report,
)

FORECASTS: dict[str, dict[str, Any]] = {
    "model": {
        "energy_score": 0.6591,
        "coverage_90": [0.881, 0.892],
        "width_90": [1.913, 1.874],
        "ratio_to_oracle": 1.1021,
    },
    "prior_mean": {"energy_score": 0.9137, "coverage_90": None, "width_90": None, "ratio_to_oracle": 1.5279},
    "no_latent": {"energy_score": 1.1343, "coverage_90": None, "width_90": None, "ratio_to_oracle": 1.8968},
    "persistence": {
        "energy_score": 2.2172,
        "coverage_90": None,
        "width_90": None,
        "ratio_to_oracle": math.nan,
    },
    "pixel_constant_velocity": {"energy_score": 0.7974, "ratio_to_oracle": 1.3334},
    "encode_decode_oracle": {
        "energy_score": 0.6218,
        "coverage_90": [0.912, 0.903],
        "ratio_to_oracle": 1.0398,
    },
    "simulator_oracle": {"energy_score": 0.5982, "coverage_90": [0.901, 0.898], "ratio_to_oracle": 1.0},
}
METRICS: dict[str, Any] = {
    "run": "demo",
    "seed": 17,
    "queries": 1024,
    "num_samples": 64,
    "train": {"seconds": 211.4, "steps": 1200},
    "kl_nats": 2.3456,
    "forecasts": FORECASTS,
    "probes": {"digit_accuracy": 0.9437, "velocity_r2": [0.9712, 0.9654]},
    "readout": {"strength": 0.01, "velocity_after_r2": [0.7123, 0.7254]},
    "beyond_fit_norm_99": 0.0125,
    "embedding": {
        "forecasts": {"model": {"energy_score": 0.4321}, "climatology": {"energy_score": 0.8765}},
        "effective_rank": 37.2111,
    },
}
HISTORY = [
    {"step": s, "split": "train", "loss": -s / 1200, "kl_nats": s / 500, "effective_rank": 30.0}
    for s in range(0, 1200, 10)
] + [{"step": s, "split": "selection", "loss": -s / 1300, "energy_score": 1 - s / 3000} for s in range(0, 1200, 300)]
VOID = {"meta", "img", "source", "br", "hr", "link", "input"}


def make_examples(
    *,
    queries: int = 2,
    num_frames: int = 3,
    channels: int = 1,
    size_px: int = 32,
    labels: bool = True,
    neighbours: int = 0,
) -> ForecastExamples:
    rng = np.random.default_rng(0)
    shape = (channels, size_px, size_px)
    frames = rng.integers(0, 256, (queries, 3 * num_frames, *shape), dtype=np.uint8)
    near = rng.integers(0, 256, (queries, neighbours, num_frames, *shape), dtype=np.uint8)
    velocity = rng.uniform(0, 3, (queries, 1, 2))
    return ForecastExamples(
        frames=frames,
        num_frames=num_frames,
        velocity_samples=velocity + rng.normal(0, 0.7, (queries, 64, 2)) if labels else None,
        velocity_law=velocity + rng.normal(0, 0.7, (queries, 128, 2)) if labels else None,
        velocity_true=velocity[:, 0] if labels else None,
        last_centre=rng.uniform(8, 16, (queries, 2)) if labels else None,
        neighbours=near if neighbours else None,
    )


class Page(HTMLParser):
    """Checks that tags balance; gathers images, resources, headings and the text outside of <style>."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.resources: list[str] = []
        self.tags: set[str] = set()
        self.headings: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag in {"h1", "h2", "h3"}:
            self.headings.append(tag)
        self.resources += [v or "" for k, v in attrs if k in {"src", "srcset", "href", "data", "poster", "action"}]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def report(
    path: Path,
    *,
    title: str = "demo",
    metrics: dict[str, Any] = METRICS,
    history: list[dict[str, Any]] = HISTORY,
    examples: ForecastExamples | None = None,
    config_yaml: str = "seed: 17\n",
) -> tuple[str, Page]:
    write_report(
        path,
        title=title,
        metrics=metrics,
        config_yaml=config_yaml,
        history=history,
        examples=examples or make_examples(),
        versions={"torch": "2.13.0"},
    )
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    examples = make_examples(neighbours=2)
    return report(tmp_path_factory.mktemp("report") / "new" / "report.html", examples=examples)


def test_every_number_of_the_table_is_the_one_in_the_metrics(full: tuple[str, Page]) -> None:
    _, page = full
    for forecast in FORECASTS.values():
        assert f"{forecast['energy_score']:.3f}" in page.words
        for key in ("coverage_90", "width_90"):
            if forecast.get(key):
                assert " / ".join(f"{v:.2f}" for v in forecast[key]) in page.words
    for ratio in ("1.10", "1.53", "1.90", "1.33", "1.04", "1.00"):
        assert ratio in page.words
    for value in (
        "0.944",
        "0.971 / 0.965",
        "37.211",
        "0.432",
        "0.876",
        "0.712 / 0.725",
        "0.013",
        "1,024",
        "of training, 1,200 steps",
        "3 min 31 s",
        "2.35",
    ):
        assert value in page.words, value
    assert "Seed 17." in page.text
    assert "nan" not in page.text.lower().replace("seed", "")


def test_headline_names_the_score_and_its_ratio_to_the_oracle(full: tuple[str, Page]) -> None:
    sentence = headline(METRICS)
    assert "0.659 px/frame" in sentence and "1.10 times" in sentence and "0.598" in sentence
    assert sentence in full[1].text
    missing = {**METRICS, "forecasts": {**FORECASTS, "model": {"energy_score": 2 * 0.5982}}}
    assert "2.00 times" in headline(missing)
    assert headline({}) == "This run has no forecast score."


def test_the_best_forecast_is_marked_and_an_oracle_never_is() -> None:
    lines = markdown_table(METRICS).splitlines()
    assert [line for line in lines if "**" in line] == [next(line for line in lines if line.startswith("| This run"))]
    worse = {**METRICS, "forecasts": {**FORECASTS, "model": {"energy_score": 0.9}}}
    bold = [line for line in markdown_table(worse).splitlines() if "**" in line]
    assert len(bold) == 1 and "Pixel constant velocity" in bold[0] and "**0.797**" in bold[0]


def test_markdown_table_is_aligned_and_shows_missing_numbers_as_dashes() -> None:
    lines = markdown_table(METRICS).splitlines()
    assert len(lines) == 2 + len(FORECASTS)
    assert len({len(line) for line in lines}) == 1
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["forecast", "ES px/frame", "x oracle", "90% coverage x / y"]
    assert ["This run", "**0.659**", "1.10", "0.88 / 0.89"] in cells
    assert ["Persistence", "2.217", "–", "–"] in cells
    assert cells[-1] == ["Simulator oracle", "0.598", "1.00", "0.90 / 0.90"]
    assert len(markdown_table({}).splitlines()) == 2


def test_page_is_whole_and_needs_nothing_else(full: tuple[str, Page]) -> None:
    html, page = full
    assert html.lstrip().startswith("<!DOCTYPE html>")
    assert len(html.encode()) < 5_000_000
    assert "script" not in page.tags and "link" not in page.tags
    assert page.resources and all(r.startswith("data:image/") for r in page.resources)
    assert "http://" not in html and "https://" not in html
    assert "@import" not in html and "url(" not in html
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html
    assert page.headings[0] == "h1" and page.headings.count("h1") == 1 and page.headings[1] == "h2"
    assert page.text.count("Example 2") == 3  # over the frames, velocities, neighbours


def test_every_image_has_alt_text_and_a_size(full: tuple[str, Page]) -> None:
    _, page = full
    # Two queries: context, target, velocities, and three strips of neighbours; then four curves.
    assert len(page.images) == 2 * (2 + 1 + 3) + 4
    for image in page.images:
        assert len(image["alt"] or "") > 20
        assert int(image["width"] or 0) > 0 and int(image["height"] or 0) > 0
    assert len({image["alt"] for image in page.images}) == len(page.images)


def test_the_true_path_is_drawn_where_the_frames_show_it(tmp_path: Path) -> None:
    """A white pixel moves along the true path: the ring must be drawn around it in every target frame."""
    centre, velocity, num_frames = np.array([20, 12]), np.array([4, 3]), 3
    frames = np.zeros((1, 9, 1, 64, 64), dtype=np.uint8)
    for k in range(1, num_frames + 1):
        x, y = centre + k * velocity
        frames[0, num_frames + k - 1, 0, y, x] = 255
    examples = ForecastExamples(
        frames=frames,
        num_frames=num_frames,
        velocity_samples=np.array([[[2.0, -2.0]]]),
        velocity_law=None,
        velocity_true=velocity[None].astype(float),
        last_centre=centre[None].astype(float),
        neighbours=None,
    )
    _, page = report(tmp_path / "report.html", history=[], examples=examples)
    source = next(i["src"] for i in page.images if "predicted paths" in (i["alt"] or "")) or ""
    image = Image.open(BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGB")
    pixels = np.asarray(image).astype(int)
    tile_px = image.height
    assert abs(image.width - num_frames * tile_px) < num_frames * 16
    for k in range(num_frames):
        left = round(k * (image.width - tile_px) / (num_frames - 1))
        tile = pixels[:, left : left + tile_px]
        white = np.argwhere((tile.min(axis=2) > 100) & (np.ptp(tile, axis=2) < 10))
        orange = np.argwhere((tile[..., 0] > 200) & (tile[..., 2] < 90))
        tip = orange.max(axis=0)  # velocity points right and down, so the ring's edge is the outermost orange
        middle = (white.min(axis=0) + white.max(axis=0)) / 2
        radius = tip - middle
        assert np.all(radius > 5) and abs(radius[0] - radius[1]) <= 2, (k, radius)


@pytest.mark.parametrize("num_frames", [1, 3, 7])
def test_unlabelled_colour_video(tmp_path: Path, num_frames: int) -> None:
    metrics = {
        "run": "mine",
        "seed": 0,
        "queries": 200,
        "kl_nats": None,
        "forecasts": {"model": {"energy_score": 0.4125}, "persistence": {"energy_score": 0.825}},
        "probes": None,
        "embedding": {"effective_rank": None, "energy_score": math.nan},
    }
    examples = make_examples(queries=1, channels=3, num_frames=num_frames, labels=False, neighbours=2)
    _, page = report(tmp_path / "report.html", metrics=metrics, history=[], examples=examples)
    assert "0.412 in embedding space, 0.50 times the 0.825" in page.text
    assert "Nearest real futures" in page.text and "Context and what followed" in page.text
    assert "velocities" not in page.text and "oracle's" not in page.text and "Probes" not in page.text
    assert "–" in page.words
    assert "ES embedding space" in markdown_table(metrics)


def test_without_an_oracle_the_headline_prefers_climatology() -> None:
    forecasts = {
        "model": {"energy_score": 0.3},
        "persistence": {"energy_score": 1.2},
        "climatology": {"energy_score": 0.6},
    }
    assert headline({"forecasts": forecasts}).endswith("0.50 times the 0.600 of other clips' futures.")


def test_both_splits_of_the_history_are_drawn(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "split": "train", "loss": 5.0},
        {"step": 9, "split": "selection", "energy_score": 0.25},
    ]
    _, page = report(tmp_path / "report.html", history=rows, examples=make_examples(queries=0))
    alts = [image["alt"] or "" for image in page.images]
    assert len(alts) == 2 and "5.000 at step 1" in alts[0] and "0.250 at step 9" in alts[1]


def test_nothing_to_show_still_makes_a_page(tmp_path: Path) -> None:
    examples = make_examples(queries=0, labels=False)
    _, page = report(tmp_path / "report.html", metrics={}, history=[], examples=examples)
    assert page.images == [] and "This run has no forecast score." in page.text


def test_large_noisy_colour_frames_stay_under_the_limit(tmp_path: Path) -> None:
    examples = make_examples(queries=1, num_frames=4, channels=3, size_px=224, neighbours=6)
    html, _ = report(tmp_path / "report.html", history=[], examples=examples)
    assert 6 * len(html.encode()) < 5_000_000  # six queries are the most that are drawn


def test_texts_are_escaped(tmp_path: Path) -> None:
    examples = make_examples(queries=0)
    evil = "<script>alert(1)</script>"
    forecasts = {**FORECASTS, evil: {"energy_score": 1.0}}
    metrics = {**METRICS, "run": evil, "forecasts": forecasts, "probes": {evil: evil}}
    config = f"name: {evil}\n"
    html, page = report(
        tmp_path / "r.html", title=evil, metrics=metrics, history=[], examples=examples, config_yaml=config
    )
    assert "script" not in page.tags and "<script" not in html
    assert evil in page.text


def test_a_resumed_history_counts_the_later_row_of_a_step(tmp_path: Path) -> None:
    rows = [{"step": s, "split": "train", "loss": v} for s, v in [(1, 9.0), (2, 8.0), (3, math.nan), (2, 4.25)]]
    _, page = report(tmp_path / "report.html", history=rows, examples=make_examples(queries=0))
    assert [i["alt"] for i in page.images if "Loss" in (i["alt"] or "")] == [
        "Loss against training step; 4.250 at step 2, the last one drawn."
    ]


def test_a_failed_write_keeps_the_report_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("before")

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        report(path, history=[], examples=make_examples(queries=0))
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


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
        ([], "–"),
        ("text", "text"),
        (True, "True"),
    ],
)
def test_number(value: Any, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (42.4, "42 s"), (211.4, "3 min 31 s"), (8177, "2 h 16 min"), (59.7, "1 min 0 s")],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
