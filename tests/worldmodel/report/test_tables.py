from typing import Any

from tests.worldmodel.report.samples import make_metrics, make_unlabelled_metrics
from worldmodel.report.headline import headline
from worldmodel.report.numbers import marked_steps, text_of
from worldmodel.report.tables import markdown_table, retrieval_table, score_table


def test_the_best_of_each_column_is_bold() -> None:
    """The lowest mean over the horizon must not be bold where another row is lower."""
    metrics = make_unlabelled_metrics(3)
    metrics["forecasts"] = {
        "model": {"energy_score": [1.0, 2.0, 9.0]},
        "climatology": {"energy_score": [3.0, 3.0, 3.0]},
        "simulator_oracle": {"energy_score": [0.1, 0.1, 0.1]},
    }
    rows = {line.split("|")[1].strip(): line for line in markdown_table(metrics).splitlines()}
    assert rows["This run"].count("**") == 4 and "**1.000**" in rows["This run"] and "**2.000**" in rows["This run"]
    assert rows["Climatology"].count("**") == 2 and "**" not in rows["Simulator oracle"]
    assert [sorted(row.best) for row in score_table(metrics).rows] == [[0, 1], [2], []]


def test_all_of_several_equal_lowest_values_are_bold() -> None:
    scores = {"model": 0.5, "persistence": 0.5, "climatology": 0.7, "simulator_oracle": 0.5}
    metrics: Any = {"forecasts": {name: {"energy_score": [value]} for name, value in scores.items()}}
    bold = [line.split("|")[1].strip() for line in markdown_table(metrics).splitlines() if "**0.500**" in line]
    assert bold == ["This run", "Persistence"]
    assert [len(row.best) for row in score_table(metrics).rows] == [1, 1, 0, 0]


def test_small_scores_have_three_digits_in_words_and_in_aligned_columns() -> None:
    scores = {"model": [0.00149, 0.012], "persistence": [0.00261, 0.6]}
    metrics: Any = {"forecasts": {name: {"energy_score": values} for name, values in scores.items()}}
    rows = [[text_of(cell) for cell in row.cells] for row in score_table(metrics).rows]
    assert rows == [["0.00149", "0.012"], ["0.00261", "0.600"]]
    assert "| **0.00149** | **0.012** |" in markdown_table(metrics)
    words = "".join(part.text for part in headline(metrics))
    assert "0.00149 in embedding space at horizon 1 and 0.0120 at horizon 2" in words


def test_both_forecasts_of_the_run_are_marked_in_every_table() -> None:
    values = {key: [0.5] for key in ("mrr", "hit_1", "hit_5", "hit_10")}
    forecasts = dict.fromkeys(("model", "model_recalibrated", "persistence"), values)
    metrics: Any = {"horizon": 1, "embedding": {"retrieval": {"forecasts": forecasts}}}
    assert [row.kind for row in retrieval_table(metrics).rows] == ["model", "model", ""]


def test_markdown_of_one_step_is_one_aligned_table() -> None:
    lines = markdown_table(make_metrics(1)).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["forecast", "Energy Score, px", "x oracle", "90% coverage x / y"]
    assert ["This run", "**0.659**", "**1.10**", "0.88 / 0.89"] in cells
    assert ["Persistence", "1.619", "2.71", "–"] in cells
    assert len(markdown_table({}).splitlines()) == 2


def test_markdown_over_a_horizon_has_every_step() -> None:
    scores, ratios, coverage = markdown_table(make_metrics(8)).split("\n\n")
    assert scores.splitlines()[0].count("h = ") == 8 and "**2.736**" in scores
    assert "1.17" in ratios and "h = 8" in ratios
    assert "Prior mean" not in coverage and "0.84 / 0.85" in coverage


def test_table_of_the_page_at_the_first_a_middle_and_the_last_step() -> None:
    assert [marked_steps(n) for n in (1, 2, 3, 8)] == [[0], [0, 1], [0, 1, 2], [0, 3, 7]]
    table = score_table(make_metrics(8))
    assert table.groups == [("Energy Score, px", 3), ("× oracle", 3), ("90% coverage x / y", 2)]
    assert [text_of(cell) for cell in table.rows[0].cells] == [
        *("0.659", "1.549", "2.736", "1.10", "1.13", "1.17", "0.88 / 0.89", "0.84 / 0.85")
    ]
    assert [group for group, _ in score_table(make_metrics(1)).columns][-1] == "90% width x / y"
