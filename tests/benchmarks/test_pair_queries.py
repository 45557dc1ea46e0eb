"""Queried pairs: the graph and what follows from it, the closed form by perturbations, and the whole program."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import pair_queries
from benchmarks.pair_queries import (
    STRATEGIES,
    Graph,
    Images,
    accuracies,
    compare,
    most_unsure,
    random_pairs,
    spectral_representation,
    table,
)


def pixels(count: int = 60, dim: int = 5) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, dim)) * np.array([4, 2, 1, 1, 0.5])


def test_what_follows_from_answers_is_known() -> None:
    graph = Graph.empty(6)
    graph.add(np.array([[0, 1], [2, 3], [1, 2], [4, 0]]), np.array([True, True, False, False]))
    assert [sorted(np.flatnonzero(graph.groups == group)) for group in np.unique(graph.groups)] == [
        [0, 1],
        [2, 3],
        [4],
        [5],
    ]
    # Within a group, and between groups that are apart, nothing is asked again.
    asked = np.array([[0, 1], [3, 0], [1, 4], [4, 2], [5, 0]])
    assert graph.unknown(asked).tolist() == [False, False, False, True, True]
    graph.add(np.array([[4, 5]]), np.array([True]))
    assert graph.unknown(asked).tolist() == [False, False, False, True, False]


def test_without_related_images_the_representation_is_principal_components() -> None:
    images = pixels()
    found = spectral_representation(images, np.arange(60), 2)
    centred = images - images.mean(axis=0)
    components = np.linalg.svd(centred, full_matrices=False)[0][:, :2]
    assert np.abs(np.corrcoef(found.T, components.T)[:2, 2:].diagonal()) == pytest.approx([1, 1], abs=1e-6)
    assert found.std(axis=0) == pytest.approx([1, 1])


def test_the_closed_form_is_stationary_for_the_ratio_of_variances() -> None:
    """No small change of the first direction raises the ratio of total variance to variance within groups."""
    images, rng = pixels(), np.random.default_rng(1)
    groups = np.arange(60) // 3
    found = spectral_representation(images, groups, 1)[:, 0]
    centred = images - images.mean(axis=0)
    prior = centred.var(axis=0).sum()

    def ratio(direction: np.ndarray) -> float:
        values = centred @ direction
        means = np.array([values[groups == group].mean() for group in groups])
        return float(values.var() / (np.sum((values - means) ** 2) + prior * direction @ direction))

    best = np.linalg.lstsq(centred, found, rcond=None)[0]
    assert all(ratio(best) >= ratio(best + 0.05 * rng.normal(size=5) * np.abs(best).max()) for _ in range(100))


def test_active_pairs_are_the_nearest_and_those_at_even_odds() -> None:
    representation = np.arange(10.0)[:, None] ** 1.5
    graph = Graph.empty(10)
    candidates = np.array([[0, 9], [0, 1], [3, 4], [2, 5], [0, 5], [1, 9]])
    assert most_unsure(representation, graph, candidates, 2).tolist() == [[0, 1], [3, 4]]
    graph.add(np.array([[0, 2], [2, 3], [0, 6], [1, 8]]), np.array([True, True, False, False]))
    chosen = most_unsure(representation, graph, candidates, 2).tolist()
    assert chosen[0] == [0, 1] and chosen[1] in ([2, 5], [0, 5])  # 1, and 8.4 or 11.2: related up to 2.8, not from 14.7


def test_random_pairs_are_of_different_images() -> None:
    pairs = random_pairs(4, 4000, np.random.default_rng(0))
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert np.unique(pairs, axis=0, return_counts=True)[1].min() > 250  # of 12 pairs


def test_pairs_that_are_left_are_those_of_groups_that_are_not_known_to_be_apart() -> None:
    graph = Graph.empty(5)
    graph.add(np.array([[1, 3], [3, 0]]), np.array([True, False]))
    assert graph.unknown_groups().tolist() == [[0, 2], [0, 4], [1, 2], [1, 4], [2, 4]]
    graph.add(np.array([[0, 2], [1, 4]]), np.array([True, True]))
    assert not len(graph.unknown_groups())


@pytest.mark.parametrize("candidates", [1, 4000])
def test_only_pairs_that_are_asked_about_are_counted(candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve images have 66 pairs, and the answers to all are known before that."""
    monkeypatch.setattr(pair_queries, "CANDIDATES", candidates)
    added: list[int] = []
    add = Graph.add

    def counting(graph: Graph, pairs: np.ndarray, answers: np.ndarray) -> None:
        added.append(len(pairs))
        add(graph, pairs, answers)

    monkeypatch.setattr(Graph, "add", counting)
    values, classes = pixels(12), np.arange(12) % 3
    images = Images((values, values, values), (classes, classes, classes))
    [row] = compare(lambda seed: images, (900,), 2, seeds=1)
    for strategy in STRATEGIES:
        added.clear()
        found = accuracies(strategy, images, (0, 5, 500, 900), 2, seed=0)
        assert [at["asked"] for at in found.values()] == [0, 5, sum(added), sum(added)]
        assert 9 < sum(added) <= 66 and found[900]["largest_group"] == 4
        assert 9 < row[f"{strategy}_asked"] <= 66
    assert f"{row['random_asked']:.0f} / {row['active_asked']:.0f}" in table([row], 0.5)


@pytest.mark.slow
def test_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(pair_queries, "BUDGETS", (0, 60))
    monkeypatch.setattr(sys, "argv", ["pair_queries", "--out", str(tmp_path), "--images", "120", "--seeds", "2"])
    assert pair_queries.main() == 0
    found = json.loads((tmp_path / "pair_queries.json").read_text())
    first, second = found["rows"]
    assert first["random"] == first["active"] and second["queries"] == 60
    assert second["active_related"] > second["random_related"]
    assert found["all_pairs"] > second["random"] and "queries" in capsys.readouterr().out
    assert (tmp_path / "pair_queries.png").read_bytes().startswith(b"\x89PNG")


def test_the_images_that_there_are_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, result in (("compare", []), ("probe_accuracy", 0.5), ("draw_figure", b"")):
        monkeypatch.setattr(pair_queries, name, lambda *_, result=result: result)
    monkeypatch.setattr(sys, "argv", ["pair_queries", "--out", str(tmp_path), "--images", "5000", "--seeds", "1"])
    assert pair_queries.main() == 0
    assert json.loads((tmp_path / "pair_queries.json").read_text())["images"] == 1297


@pytest.mark.parametrize(
    ("arguments", "tells"),
    [
        (["--dim", "0"], "--dim must be at least 1"),
        (["--dim", "257"], "--dim 257 must be at most 256, the number of pixels"),
        (["--images", "80"], "--images 80 have 3,160 pairs, fewer than 3,200 queries"),
    ],
)
def test_numbers_that_do_not_fit(
    arguments: list[str],
    tells: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["pair_queries", "--out", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as end:
        pair_queries.main()
    assert end.value.code == 2 and tells in capsys.readouterr().err and not (tmp_path / "out").exists()
