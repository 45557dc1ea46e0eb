import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import few_labels
from benchmarks.few_labels import (
    Clips,
    Label,
    agree,
    augment,
    check_labels,
    draw_labelled,
    fine_tune,
    fit_head,
    in_bins,
    pixels,
    probe,
    self_train,
    summary,
    table,
    with_low_rank,
)
from data_pipelines.errors import UserError
from tests.conftest import normal
from worldmodel import load


def clusters(count: int, seed: int) -> Clips:
    """Three classes whose features are around different corners, seen by an encoder that takes the mean of a clip."""
    classes = torch.arange(count) % 3
    features = torch.eye(3)[classes] * 3 + normal(seed, count, 3)
    video = features.sigmoid()[:, None, :, None, None].expand(-1, 2, -1, 4, 4)
    return Clips(video, features, features + 0.1 * normal(seed + 1, count, 3), features, classes)


def accuracy(found: torch.Tensor, clips: Clips) -> float:
    torch.testing.assert_close(found.sum(dim=1), torch.ones(len(found)))
    return float((found.argmax(dim=1) == clips.classes).float().mean())


def test_labels_are_drawn_from_each_class() -> None:
    classes = torch.tensor([0, 1, 2, 1, 0, 2, 2, 1])
    rows = draw_labelled(classes, 2, torch.Generator().manual_seed(0))
    assert classes[rows].tolist() == [0, 0, 1, 1, 2, 2] and len(rows.unique()) == 6
    with pytest.raises(UserError, match="--labels 3: a class has only 2 training clips"):
        draw_labelled(classes, 3, torch.Generator())


def test_labels_that_leave_no_clip_are_refused() -> None:
    classes = torch.tensor([0, 1, 0, 1, 1])
    check_labels(classes, [1, 2])
    with pytest.raises(UserError, match="--labels 2: all 4 training clips would have one, and none is left"):
        check_labels(classes[:4], [1, 2])
    with pytest.raises(UserError, match="--labels 3: a class has only 2 training clips"):
        check_labels(classes, [1, 3])


def test_each_method_finds_clear_clusters_from_one_label() -> None:
    training, test = clusters(300, 0), clusters(300, 10)
    found = []
    for draw in range(5):
        chosen = draw_labelled(training.classes, 1, torch.Generator().manual_seed(draw))
        labelled, unlabelled = training.rows(chosen), training.rows(torch.arange(300))
        alone = probe(lambda clips: clips.features, labelled, labelled.classes, 3)
        others = self_train([alone], labelled, unlabelled, 3), agree(labelled, unlabelled, 3)
        found.append([accuracy(each(test), test) for each in (alone, *others)])
    assert torch.tensor(found).mean(dim=0).min() > 0.9
    assert accuracy(probe(pixels, training, training.classes, 3)(test), test) > 0.9


def test_a_head_is_the_logistic_regression_of_scikit_learn() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    clips = clusters(60, 0)
    inputs = StandardScaler().fit_transform(clips.features.numpy())
    expected = LogisticRegression(tol=1e-8).fit(inputs, clips.classes.numpy())
    head = fit_head(clips.features, clips.classes, 3)
    torch.testing.assert_close(head.linear.weight.detach(), torch.tensor(expected.coef_).float(), rtol=0, atol=1e-3)
    assert fit_head(clips.features[:1], clips.classes[:1], 3)(clips.features).isfinite().all()


def test_low_rank_updates_start_at_the_encoder_and_train_alone() -> None:
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(96, 5), torch.nn.BatchNorm1d(5))
    tuned, video = with_low_rank(encoder), clusters(6, 0).video
    torch.testing.assert_close(tuned(video), encoder.eval()(video))
    trainable = {name: weight.shape for name, weight in tuned.named_parameters() if weight.requires_grad}
    assert trainable == {
        "1.parametrizations.weight.0.down": (4, 96),
        "1.parametrizations.weight.0.up": (5, 4),
    }
    before = [weight.clone() for weight in encoder.parameters()]
    clips = clusters(30, 0)
    found = fine_tune(encoder, dataclass_with(clips, encoder), 3, 1, torch.Generator().manual_seed(0))
    assert accuracy(found(clips), clips) > 0.9
    assert all(torch.equal(a, b) for a, b in zip(before, encoder.parameters(), strict=True))


def dataclass_with(clips: Clips, encoder: torch.nn.Module) -> Clips:
    """Return the clips with the features of an encoder."""
    return Clips(clips.video, encoder(clips.video).detach(), clips.augmented, clips.embedding, clips.classes)


def test_augmented_clips_stay_clips() -> None:
    video = torch.rand(5, 3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    other = augment(video, 3, torch.Generator().manual_seed(0))
    assert other.shape == video.shape and other.min() >= 0 and other.max() <= 1 and not torch.equal(other, video)


def test_a_label_of_numbers_is_that_of_the_last_context_frame_in_bins_of_equal_size() -> None:
    numbers = normal(0, 400, 9, 2)
    found = Label("place", 1).of({"place": numbers}, 3)
    assert torch.equal(found, numbers[:, 2, 1])
    clips = clusters(400, 0).with_classes(found)
    training, test = in_bins(clips, clips.with_classes(torch.tensor([-9.0, 9.0]).repeat(200)), 4)
    assert training.classes.bincount().tolist() == [100] * 4 and test.classes.unique().tolist() == [0, 3]
    assert all(found[training.classes == k].max() < found[training.classes == k + 1].min() for k in range(3))
    with pytest.raises(UserError, match="--dimension 2 must be 0 to 1"):
        Label("place", 2).of({"place": numbers}, 3)
    with pytest.raises(UserError, match="--bins: --label digit is not numbers of each frame: these videos have digit"):
        Label("digit", 0).of({"digit": torch.zeros(4, dtype=torch.int64)}, 3)


def test_the_table_shows_mean_and_spread() -> None:
    scores = summary({"a_b": {"1": [0.5, 0.7]}, "c": {"1": [0.25]}})
    assert scores["a_b"]["1"]["mean"] == pytest.approx(0.6)
    assert [line.split() for line in table(scores).splitlines()] == [
        ["labels", "per", "class", "1"],
        ["a", "b", "0.600", "±", "0.141"],
        ["c", "0.250", "±", "0.000"],
    ]


def test_the_program(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(few_labels, "keep_freed_memory", lambda: None)  # would be for all tests to come
    monkeypatch.setattr(few_labels, "LORA_STEPS", 2)
    run = shutil.copytree(trained_run, tmp_path / "run")
    given = ["few_labels.py", "--run", str(run), "--labels", "1", "--draws", "2"]
    monkeypatch.setattr(sys, "argv", [*given, "--label", "velocity"])
    with pytest.raises(SystemExit):
        few_labels.main()
    assert "--label velocity is not a class of each video: these videos have axis" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", given)
    assert few_labels.main() == 0
    written = json.loads((run / "few_labels.json").read_text())
    assert written["step"] == load(run).state["step"] and set(written["accuracy"]) == {
        "pixels", "embedding", "features", "lora", "pseudo_labels", "ensemble", "consistency"
    }  # fmt: skip
    assert written["bins"] is written["dimension"] is None
    assert (written["clips"], written["test_clips"]) == (64, 24)  # all that there are
    assert f"{written['accuracy']['lora']['1']['mean']:.3f}" in capsys.readouterr().out
