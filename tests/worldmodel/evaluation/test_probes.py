from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from worldmodel.evaluation import probes
from worldmodel.evaluation.probes import Splits, few_clips, fit_mlp, nearest_clips, probe, probe_all, probe_clips
from worldmodel.runs.record_types import MAX_NAMES

NAMES = {"linear", "knn", "mlp", "few_shot_1", "few_shot_5", "few_shot_10"}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(num_dims: int) -> Splits:
    return normal(1000, num_dims, seed=0), normal(300, num_dims, seed=1), normal(400, num_dims, seed=2)


def of(splits: Splits, outputs: list[Tensor]) -> Any:
    return probe(splits[0], outputs[0], splits[1], outputs[1], splits[2], outputs[2])


def test_a_linear_factor_is_read_by_a_linear_probe_and_better_from_more_labels() -> None:
    weight = normal(12, 2, seed=3)
    scores = of(inputs(12), [x @ weight + 2 * normal(len(x), 2, seed=4) for x in inputs(12)])
    assert set(scores) == NAMES
    assert scores["linear"] > 0.5 > scores["few_shot_1"] + 0.1
    assert scores["linear"] > scores["few_shot_10"] > scores["few_shot_1"]


def test_a_curved_factor_needs_the_neighbours_or_the_mlp() -> None:
    scores = of(inputs(2), [x.square().sum(dim=1, keepdim=True) for x in inputs(2)])
    assert scores["linear"] < 0.1 and scores["knn"] > 0.9 and scores["mlp"] > 0.5


def test_classes_are_scored_by_accuracy() -> None:
    """Four quadrants: every probe finds them; labels drawn at random: none does better than chance."""
    quadrants = [((x[:, 0] > 0) * 2 + (x[:, 1] > 0)).long() for x in inputs(2)]
    found = of(inputs(2), quadrants)
    assert set(found) == NAMES and min(found[name] for name in ("linear", "knn", "mlp", "few_shot_10")) > 0.85
    noise = [torch.randint(4, (len(x),), generator=torch.Generator().manual_seed(len(x))) for x in inputs(2)]
    for score in of(inputs(2), noise).values():
        assert score == pytest.approx(0.25, abs=0.08)


def test_scales_of_the_features_do_not_matter() -> None:
    """A loud dimension that tells nothing would drown the neighbours of the one that tells."""
    factor = [x[:, :1] for x in inputs(2)]
    loud = tuple(x * torch.tensor([1e-2, 1e3]) + 5 for x in inputs(2))
    assert of((loud[0], loud[1], loud[2]), factor) == pytest.approx(of(inputs(2), factor), abs=1e-3)


def test_hyperparameters_are_not_chosen_on_test_clips() -> None:
    """Noise as the selection outputs asks for many neighbours and much shrinkage, though test outputs ask for few."""
    truth = [x @ normal(4, 1, seed=3) for x in inputs(4)]
    honest = of(inputs(4), truth)
    misled = of(inputs(4), [truth[0], normal(300, 1, seed=9), truth[2]])
    assert misled["knn"] < honest["knn"] - 0.02 and misled["linear"] < honest["linear"] - 0.02
    assert misled["mlp"] == honest["mlp"]


def test_few_clips_take_each_class_alike_and_at_least_one() -> None:
    labels = torch.cat([torch.zeros(800), torch.ones(200), torch.full((3,), 2.0)]).long()
    assert labels[few_clips(labels, 1)].bincount().tolist() == [8, 2, 1]
    assert labels[few_clips(labels, 10)].bincount().tolist() == [80, 20, 1]
    assert torch.equal(few_clips(labels, 10), few_clips(labels, 10))
    assert len(few_clips(torch.zeros(1000, 2), 5)) == 50
    assert len(few_clips(torch.zeros(20, 2), 1)) == 2


def test_nearest_clips_are_in_order_and_no_more_than_there_are() -> None:
    fit = torch.tensor([[0.0], [1.0], [5.0]])
    assert nearest_clips(torch.tensor([[4.0], [-1.0]]), fit, 50).tolist() == [[2, 1, 0], [0, 1, 2]]


def test_an_mlp_of_one_output_keeps_its_dimension() -> None:
    assert fit_mlp(normal(60, 3, seed=0), normal(60, 1, seed=1), 2)(normal(7, 3, seed=2)).shape == (7, 1)


@pytest.mark.parametrize("count", [2, 3, 10, 11])
def test_an_mlp_is_fitted_to_few_clips(count: int) -> None:
    read = fit_mlp(normal(count, 3, seed=0), normal(count, 2, seed=1), 5)
    assert read(normal(4, 3, seed=2)).shape == (4, 2)


def test_no_more_labels_are_probed_for_than_metrics_hold(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    labels = {f"label_{number:03d}": normal(6, 1, seed=number) for number in range(MAX_NAMES + 5)}
    clips: Any = SimpleNamespace(backbone=normal(6, 3, seed=0), embedding=normal(6, 3, seed=0), r=torch.empty(6, 0))
    clips.labels = labels
    monkeypatch.setattr(probes, "probe_all", lambda representations, targets: dict(targets))
    assert list(probe_clips(None, clips, clips, clips)) == sorted(labels)[:MAX_NAMES]
    assert [record.message for record in caplog.records] == ["probes are fitted for the first 100 of 105 labels"]


def test_probe_all_pairs_every_representation_with_every_target() -> None:
    full = inputs(3)
    blind = (normal(1000, 2, seed=5), normal(300, 2, seed=6), normal(400, 2, seed=7))
    targets: dict[str, Splits] = {
        "sign": ((full[0][:, 0] > 0).long(), (full[1][:, 0] > 0).long(), (full[2][:, 0] > 0).long()),
        "position": (full[0][:, 1:], full[1][:, 1:], full[2][:, 1:]),
    }
    scores: Any = probe_all({"embedding": full, "r": blind}, targets)
    assert {name: set(row) for name, row in scores.items()} == {
        name: {"sign", "position"} for name in ("embedding", "r")
    }
    assert scores["embedding"]["position"]["linear"] > 0.99 and scores["r"]["position"]["linear"] < 0.05
    assert scores["embedding"]["sign"]["linear"] > 0.95 and scores["r"]["sign"]["linear"] < 0.6
