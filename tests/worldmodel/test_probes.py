import pytest
import torch
from torch import Tensor

from worldmodel.evaluation.probes import few_clips, probe, probe_all

SIZES = (600, 200, 200)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def splits(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    fit, selection, test = values.split(SIZES)
    return fit, selection, test


def scores_of(inputs: Tensor, outputs: Tensor) -> dict[str, float]:
    (a, b, c), (x, y, z) = splits(inputs), splits(outputs)
    return probe(a, x, b, y, c, z)


def test_what_is_linear_is_read_by_every_probe_and_best_by_the_linear_one() -> None:
    inputs = normal(1000, 6)
    found = scores_of(inputs, inputs @ normal(6, 2, seed=1))
    assert set(found) == {"linear", "knn", "mlp", "few_shot_1", "few_shot_5", "few_shot_10"}
    assert found["linear"] > 0.999 and found["few_shot_5"] > 0.99
    assert 0.5 < found["knn"] < found["linear"] and found["mlp"] > 0.8


def test_what_is_not_linear_is_left_to_the_others() -> None:
    inputs = normal(1000, 2)
    classes = (inputs[:, 0] * inputs[:, 1] > 0).long()
    found = scores_of(inputs, classes)
    assert found["linear"] < 0.65 and found["knn"] > 0.85 and found["mlp"] > 0.85


def test_noise_tells_nothing_and_few_labels_tell_less() -> None:
    inputs = normal(1000, 40)
    assert scores_of(inputs, normal(1000, 1, seed=1))["linear"] < 0.05
    found = scores_of(inputs, inputs[:, :1] + normal(1000, 1, seed=2))
    assert found["few_shot_1"] < found["few_shot_10"] < found["linear"]


def test_scales_of_inputs_do_not_matter() -> None:
    inputs, outputs = normal(1000, 4), normal(1000, 1, seed=1)
    outputs = outputs + inputs[:, :1]
    scaled = scores_of(inputs * torch.tensor([1e3, 1.0, 1e-3, 5.0]) + 7, outputs)
    for name, score in scores_of(inputs, outputs).items():
        assert scaled[name] == pytest.approx(score, abs=0.02), name


def test_few_clips_are_of_each_class_alike() -> None:
    classes = torch.tensor([0] * 900 + [1] * 95 + [2] * 5)
    rows = few_clips(classes, 10)
    assert classes[rows].bincount().tolist() == [90, 10, 1]
    assert torch.equal(rows, few_clips(classes, 10))
    assert len(few_clips(normal(50, 2), 1)) == 2


def test_every_target_is_probed_from_every_representation() -> None:
    inputs = normal(1000, 3)
    found = probe_all({"a": splits(inputs), "b": splits(inputs.flip(1))}, {"sign": splits((inputs[:, 0] > 0).long())})
    assert set(found) == {"a", "b"} and found["a"]["sign"]["linear"] == pytest.approx(found["b"]["sign"]["linear"])
