"""The comparison: means, SDs, table and figure of numbers that are worked out by hand."""

import json
import math
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from worldmodel.report.comparison import (
    RunScores,
    Stat,
    comparison_figure,
    comparison_markdown,
    comparison_table,
    dimensions_of,
    flat_numbers,
    format_stat,
    png,
    references,
    summarise,
    summarise_groups,
)
from worldmodel.report.comparison_page import group_horizon_cards, group_probe_tables, ranges
from worldmodel.report.drawing import Picture


def drawn(runs: list[RunScores]) -> Any:
    """The figure, which must be there; untyped, as Matplotlib's artists are."""
    figure = comparison_figure(runs)
    assert figure is not None
    return figure


def run(objective: str, latent: str, seed: int, ratio: float, **more: Any) -> RunScores:
    metrics = {
        "run": "text is no number",
        "forecasts": {
            "model": {"energy_score": [ratio * 0.5], "ratio_to_oracle": [ratio], "coverage": None},
            "pixel_constant_velocity": {"energy_score": [0.65], "ratio_to_oracle": [1.3]},
            "simulator_oracle": {"energy_score": [0.5], "ratio_to_oracle": [1.0]},
        },
        **more,
    }
    return RunScores(objective, latent, seed, flat_numbers(metrics))


RUNS = [
    run("infonce", "none", 0, 1.5),
    run("infonce", "gaussian", 0, 1.0, kl_nats=2.0),
    run("infonce", "gaussian", 1, 2.0, kl_nats=4.0),
    run("infonce", "gaussian", 5, 4.0, kl_nats=math.nan),
    run("byol", "none", 0, 1.25),
]


def test_numbers_by_path() -> None:
    metrics = {"a": {"b": [1, 2.5], "c": math.nan}, "name": "x", "flag": True, "d": None, "e": math.inf, "n": 3}
    assert flat_numbers(metrics) == {"a.b.0": 1.0, "a.b.1": 2.5, "a.c": None, "d": None, "e": None, "n": 3.0}
    assert json.dumps(flat_numbers(metrics), allow_nan=False)


def test_means_and_sample_sds_over_seeds() -> None:
    # 1, 2, 4: mean 7/3, squares of what is left 16/9 + 1/9 + 25/9 = 42/9, over n - 1 = 2: 21/9
    stat = summarise([1.0, 2.0, 4.0])
    assert stat is not None and stat.n == 3
    assert stat.mean == pytest.approx(7 / 3) and stat.sd == pytest.approx(math.sqrt(21 / 9))
    assert summarise([1.5]) == Stat(1.5, None, 1)
    assert summarise([None, 1.0, 2.0, 3.0]) == Stat(2.0, 1.0, 3)
    assert summarise([None]) is None and summarise([]) is None


def test_cells_are_in_the_order_given_with_objectives_together() -> None:
    cells = summarise_groups([*RUNS, run("infonce", "sparse", 0, 1.0)])
    assert [(cell.objective, cell.latent, cell.seeds) for cell in cells] == [
        ("infonce", "none", (0,)),
        ("infonce", "gaussian", (0, 1, 5)),
        ("infonce", "sparse", (0,)),
        ("byol", "none", (0,)),
    ]
    assert cells[1].stats["forecasts.model.ratio_to_oracle.0"].mean == pytest.approx(7 / 3)
    assert "kl_nats" not in cells[0].stats and cells[1].stats["kl_nats"].n == 2


def test_a_number_as_text() -> None:
    assert format_stat(Stat(1.1264, 0.0349, 3), 3, 3) == "1.126 ± 0.035"
    assert format_stat(Stat(1.1264, None, 1), 2, 1) == "1.13"
    assert format_stat(Stat(3.0, 1.0, 2), 0, 3) == "3 ± 1 (n=2)"
    assert format_stat(None, 2, 3) == "–"
    assert format_stat(Stat(6.1e-5, 1.2e-6, 2), 3, 2) == "6.10e-05 ± 1.20e-06"


def test_small_numbers_of_a_column_share_their_decimals() -> None:
    runs = [run("byol", "none", 0, 0.03), run("byol", "gaussian", 0, 0.0024)]
    cells = [[cell.strip() for cell in row.split("|")] for row in comparison_table(summarise_groups(runs)).splitlines()]
    assert [row[4:6] for row in cells[2:]] == [["0.0150", "0.0300"], ["0.0012", "0.0024"]]


def test_table_of_the_columns_that_runs_have() -> None:
    assert comparison_table(summarise_groups(RUNS)).splitlines() == [
        "| objective | latent   | seeds |  Energy Score |      x oracle |          KL, nats |",
        "| --------- | -------- | ----: | ------------: | ------------: | ----------------: |",
        "| infonce   | none     |     1 |         0.750 |         1.500 |                 – |",
        "|           | gaussian |     3 | 1.167 ± 0.764 | 2.333 ± 1.528 | 3.00 ± 1.41 (n=2) |",
        "| byol      | none     |     1 |         0.625 |         1.250 |                 – |",
    ]


def test_coverage_has_a_column_for_each_dimension_by_its_name() -> None:
    def titles(*runs: tuple[list[float], list[str] | None]) -> list[str]:
        scores = []
        for k, (coverage, names) in enumerate(runs):
            model = {"energy_score": [1.0], "coverage": {"90": [coverage]}}
            metrics: Any = {"forecasts": {"model": model}, "quantity": names and {"dimensions": names}}
            scores.append(RunScores("byol", str(k), 0, flat_numbers(metrics), dimensions_of(metrics)))
        head = comparison_table(summarise_groups(scores)).splitlines()[0]
        return [title.strip() for title in head.split("|") if "coverage" in title]

    assert titles(([0.9], ["y"])) == titles(([0.9], None)) == ["90% coverage"]
    pong = ["ball x", "ball y", "player y", "opponent y"]
    assert titles(([0.9] * 4, pong)) == [f"90% coverage {name}" for name in pong]
    assert titles(([0.9] * 2, ["x", "y"]), ([0.9] * 3, pong[:3])) == [
        *("90% coverage, dimension 1", "90% coverage, dimension 2", "90% coverage, dimension 3")
    ]
    assert len(titles(([0.9] * 20, [f"joint {k}" for k in range(20)]))) == 8


def test_seeds_as_ranges() -> None:
    assert ranges({3, 0, 1, 2, 7, 9, 10}) == "0 to 3, 7, 9, 10"


def test_probes_of_labels_with_other_characters_than_letters() -> None:
    probes = {"embedding": {name: {"linear": 0.5} for name in ("head-angle", "pose.x", "speed")}}
    groups = summarise_groups([RunScores("byol", "none", 0, flat_numbers({"probes": probes}))])
    assert len(group_probe_tables(groups)) == 3


def test_the_oracle_has_a_name_among_many_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(value: float) -> dict[str, Any]:
        return {"energy_score": [value, value + 1]}

    runs = [
        RunScores("byol", str(k), 0, flat_numbers({"forecasts": {"model": scores(k), "simulator_oracle": scores(0.1)}}))
        for k in range(1, 13)
    ]
    seen: list[Any] = []

    def chart(lines: list[Any], **_: Any) -> Picture:
        seen.append(lines)
        return Picture("", "", "", 1, 1)

    monkeypatch.setattr("worldmodel.report.charts.horizon_chart", chart)
    group_horizon_cards(runs, summarise_groups(runs))
    (lines,) = seen
    assert lines[0].label == "Simulator oracle" and len({(line.colour, line.dashes) for line in lines}) == len(lines)
    assert not any(line.emphasised for line in lines)


def test_table_of_a_world_with_other_metrics() -> None:
    metrics = {
        "factors": {"in_distribution_r2": 0.9, "out_of_distribution_r2": 0.8},
        "dci": {"disentanglement": 0.7, "completeness": 0.6},
        "probes": {"embedding_and_r": {"velocity_change": {"linear": 0.5, "mlp": 0.4}}},
        "train": {"seconds": 12.4},
    }
    text = comparison_markdown([RunScores("byol", "sparse", 0, flat_numbers(metrics))])
    header, _, row = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines()[:3]]
    assert dict(zip(header, row, strict=True)) == {
        "objective": "byol",
        "latent": "sparse",
        "seeds": "1",
        "velocity change R², linear": "0.500",
        "velocity change R², MLP": "0.400",
        "factors R², in distribution": "0.900",
        "factors R², out of distribution": "0.800",
        "disentanglement": "0.700",
        "completeness": "0.600",
        "training, s": "12",
    }
    assert "Energy Score" not in text


def test_over_a_horizon_the_first_and_the_last_step_have_columns_and_marks() -> None:
    numbers = {"energy_score": [0.5, 0.75, 2.0], "ratio_to_oracle": [1.0, 1.25, 1.5]}
    runs = [RunScores("byol", "none", 0, flat_numbers({"forecasts": {"model": numbers}}))]
    head, _, row = [
        [part.strip() for part in line.strip("|").split("|")] for line in comparison_markdown(runs).splitlines()[:3]
    ]
    assert dict(zip(head[3:], row[3:], strict=True)) == {
        "Energy Score": "0.500",
        "Energy Score at horizon 3": "2.000",
        "x oracle": "1.000",
        "x oracle at horizon 3": "1.500",
    }
    dots = artists(drawn(runs).axes[0], "seeds")
    assert [list(line.get_xdata()) for line in dots.values()] == [[1.0], [1.5]]


def test_what_no_run_forecasts_stands_below_the_table() -> None:
    assert references(RUNS) == [
        "Simulator oracle: Energy Score 0.500, 1.000 x oracle.",
        "Constant velocity: Energy Score 0.650, 1.300 x oracle.",
    ]
    assert comparison_markdown(RUNS).endswith(" ".join(references(RUNS)))


def artists(axes: Any, kind: str) -> dict[str, Any]:
    """The artists of "seeds" or "mean", by objective, latent and path."""
    found = [artist for artist in axes.get_children() if str(artist.get_gid()).startswith(f"{kind} ")]
    return {artist.get_gid().removeprefix(f"{kind} "): artist for artist in found}


def test_figure_shows_every_seed_their_mean_and_the_references() -> None:
    figure = drawn(RUNS)
    (axes,) = figure.axes
    path = "forecasts.model.ratio_to_oracle.0"
    dots, means = artists(axes, "seeds"), artists(axes, "mean")
    assert {name: list(line.get_xdata()) for name, line in dots.items()} == {
        f"infonce/none/{path}": [1.5],
        f"infonce/gaussian/{path}": [1.0, 2.0, 4.0],
        f"byol/none/{path}": [1.25],
    }
    assert means[f"infonce/gaussian/{path}"].get_segments()[0][:, 0] == pytest.approx([7 / 3, 7 / 3])
    heights = [line.get_ydata()[0] for line in dots.values()]
    assert heights == [0, 1, 3] and axes.yaxis_inverted()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["infonce", "byol"]
    assert list(axes.get_yticks()) == [0.5, 3]
    lines = {line.get_label(): (line.get_xdata()[0], line.get_linestyle()) for line in axes.lines}
    assert lines["simulator oracle"] == (1.0, "-") and lines["constant velocity"] == (pytest.approx(1.3), "--")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "latent none",
        "latent gaussian",
        "mean over seeds",
        "simulator oracle",
        "constant velocity",
    ]
    colours = {name: line.get_markeredgecolor() for name, line in dots.items()}
    assert colours[f"infonce/none/{path}"] == colours[f"byol/none/{path}"] != colours[f"infonce/gaussian/{path}"]


def test_figure_of_factors_in_and_out_of_distribution() -> None:
    numbers = flat_numbers({"factors": {"in_distribution_r2": 0.9, "out_of_distribution_r2": 0.7}})
    figure = drawn([RunScores("byol", "sparse", 0, numbers), RunScores("byol", "new", 0, numbers)])
    (axes,) = figure.axes
    dots = artists(axes, "seeds")
    inside, outside = (dots[f"byol/sparse/factors.{name}_distribution_r2"] for name in ("in", "out_of"))
    assert list(inside.get_xdata()) == [0.9] and list(outside.get_xdata()) == [0.7]
    assert inside.get_markerfacecolor() != outside.get_markerfacecolor()
    assert inside.get_ydata()[0] < outside.get_ydata()[0]
    assert "out of distribution" in [text.get_text() for text in axes.get_legend().get_texts()]


def test_figure_has_a_panel_for_each_kind_of_number_or_is_none() -> None:
    factors = {"in_distribution_r2": 0.9, "out_of_distribution_r2": 0.7}
    assert len(drawn([run("byol", "sparse", 0, 1.2, factors=factors)]).axes) == 2
    assert comparison_figure([RunScores("byol", "none", 0, {"train.seconds": 3.0})]) is None


def test_picture_is_as_wide_as_a_phone_needs_and_nothing_is_cut_off() -> None:
    pixels = np.asarray(Image.open(BytesIO(png(drawn(RUNS)))).convert("L"))
    assert pixels.shape[1] == 840
    edges = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
    assert all((edge == 255).all() for edge in edges) and (pixels < 128).any()
