"""Batches of pairs: a function of seed and number, the same for ranks, workers and resumes; each pixel is checked."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.batches import Batch
from data_pipelines.errors import UserError
from data_pipelines.formats.image_files import ImageFiles
from data_pipelines.images.relations import Relation, classes_of, same_class
from data_pipelines.images.stream import PairSettings, PairStream, labels_of_pairs, read_pairs
from data_pipelines.index import VideoIndex
from data_pipelines.split_folders import load_split
from tests.data_pipelines.images.conftest import WriteImages, level_of

SETTINGS = PairSettings(batch_size=6, size_px=8, channels=1, decoder="pyav")
Opened = tuple[VideoIndex, Relation]


@pytest.fixture
def opened(write_images: WriteImages) -> Opened:
    index = load_split(str(write_images()), None, format=ImageFiles())
    return index, same_class(classes_of(index, "label"))


def stream(
    opened: Opened, settings: PairSettings = SETTINGS, seed: int = 0, rank: int = 0, world_size: int = 1
) -> PairStream:
    return PairStream(*opened, settings, seed=seed, rank=rank, world_size=world_size)


def taken(pairs: PairStream, count: int, start: int = 0) -> list[Batch]:
    return list(islice(pairs.batches(start), count))


def images_of(batch: Batch) -> torch.Tensor:
    """The numbers of the images that are shown, [B, S], from their gray levels."""
    levels = batch["video"].float().mean(dim=(2, 3, 4))
    assert (levels == batch["video"][:, :, 0, 0, 0]).all()
    return ((levels - level_of(0)) / 2).round().long()


def equal(some: Sequence[Batch], others: Sequence[Batch]) -> bool:
    pairs = list(zip(some, others, strict=True))
    return all(torch.equal(a[name], b[name]) for a, b in pairs for name in ("video", "row", "clip_id"))


def test_pairs_are_of_one_class_and_the_third_image_is_the_second(opened: Opened) -> None:
    classes = opened[0].labels["label"]
    for batch in taken(stream(opened), 7):
        assert batch["video"].shape == (6, 3, 1, 8, 8) and batch["video"].dtype == torch.uint8
        context, target, later = images_of(batch).T
        assert (classes[context] == classes[target]).all() and (context != target).all()
        assert torch.equal(target, later) and torch.equal(batch["labels"]["label"], classes[context])
        assert torch.equal(batch["clip_id"], context)  # each image is a context here


def test_an_epoch_has_each_context_once_and_targets_change(opened: Opened) -> None:
    pairs = stream(opened)
    assert pairs.batches_per_epoch == 3
    epochs = [torch.cat([images_of(batch) for batch in taken(pairs, 3, start)]) for start in (0, 3)]
    for epoch in epochs:
        assert len(epoch[:, 0].unique()) == 18  # of 20 images: the last 20 % 6 are left out
    assert not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize("change", [{"num_workers": 1}, {"num_workers": 2}, {"cache_mb": 1}])
def test_batches_do_not_depend_on_workers_and_caches(opened: Opened, change: dict[str, int]) -> None:
    expected = taken(stream(opened), 8)
    assert equal(taken(stream(opened, replace(SETTINGS, **change)), 8), expected)  # type: ignore[arg-type]


def test_ranks_divide_a_batch_and_a_resume_continues_it(opened: Opened) -> None:
    expected = taken(stream(opened), 6)
    parts = [taken(stream(opened, rank=rank, world_size=3), 6) for rank in range(3)]
    for number, whole in enumerate(expected):
        assert torch.equal(torch.cat([part[number]["video"] for part in parts]), whole["video"])
        assert torch.cat([part[number]["row"] for part in parts]).tolist() == list(range(6))
    assert equal(taken(stream(opened), 2, start=4), expected[4:])
    with pytest.raises(UserError, match=r"data.batch_size=6 is not a multiple of the 4 processes"):
        stream(opened, world_size=4)


def test_the_fingerprint_names_seed_pairs_and_images(opened: Opened, write_images: WriteImages) -> None:
    index, relation = opened
    other = load_split(str(write_images("other", (5, 7, 9))), None, format=ImageFiles())
    streams = [
        stream(opened),
        stream(opened, seed=1),
        stream((index, same_class(np.zeros(20, np.int64)))),
        stream((other, relation)),
        stream(opened, replace(SETTINGS, batch_size=5)),
    ]
    assert len({each.fingerprint for each in streams}) == 5
    assert stream(opened, replace(SETTINGS, num_workers=2)).fingerprint == streams[0].fingerprint


def test_a_pass_takes_each_context_once_with_a_fixed_target(opened: Opened) -> None:
    def read(max_pairs: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> torch.Tensor:
        batches = read_pairs(*opened, SETTINGS, seed=seed, max_pairs=max_pairs, rank=rank, world_size=world_size)
        return torch.cat([images_of(batch) for batch in batches])

    whole = read(100)
    assert whole[:, 0].tolist() == list(range(20))
    some = read(7)
    assert torch.equal(some, whole[some[:, 0]]) and len(some) == 7
    assert torch.equal(torch.cat([read(7, rank=rank, world_size=2) for rank in range(2)]), some)
    assert not torch.equal(read(100, seed=1), whole)


def test_pairs_of_an_image_that_does_not_decode_are_left_out(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    index = opened[0]
    bad = index.root / index.videos[3].path
    content = bad.read_bytes()
    bad.write_bytes(content[: len(content) // 2])
    settings = replace(SETTINGS, max_bad_fraction=0.2)
    [batch] = taken(stream(opened, replace(settings, batch_size=20)), 1)
    images = images_of(batch)
    assert len(images) < 20 and not (images == 3).any() and torch.equal(images[:, 0], batch["clip_id"])
    assert torch.equal(batch["labels"]["label"], index.labels["label"][images[:, 0]])
    assert "c0/03.png" in caplog.text
    with pytest.raises(UserError, match=r"1 of 20 videos do not decode or have changed"):
        taken(stream(opened, replace(SETTINGS, batch_size=20, max_bad_fraction=0.0)), 1)


def test_more_images_than_pairs_are_needed_for_a_batch(opened: Opened) -> None:
    with pytest.raises(UserError, match=r"20 pairs are fewer than one batch of 21: add images, or lower"):
        stream(opened, replace(SETTINGS, batch_size=21))


def test_classes_are_those_of_the_context_and_measures_of_all_images(opened: Opened) -> None:
    labels = {"kind": torch.arange(20) % 3, "size": torch.arange(20.0), "place": torch.arange(40).view(20, 2)}
    index, images = replace(opened[0], labels=labels), np.array([[4, 7, 7], [19, 0, 0]])
    found = labels_of_pairs(index, images)
    assert found["kind"].tolist() == [1, 1]
    assert found["size"].tolist() == [[[4], [7], [7]], [[19], [0], [0]]]
    assert found["place"].shape == (2, 3, 2) and found["place"][0, 1].tolist() == [14, 15]


def test_images_keep_their_colour_and_are_cropped_about_the_centre(tmp_path: Path) -> None:
    from PIL import Image

    root = tmp_path / "colour"
    root.mkdir()
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:, 4:20] = (200, 100, 50)  # 16 px in the middle
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(root / name)
    index = load_split(str(root), None, format=ImageFiles())
    settings = replace(SETTINGS, batch_size=2, size_px=16, channels=3, num_segments=2)
    [batch] = taken(stream((index, same_class(np.zeros(2, np.int64))), settings), 1)
    assert batch["video"].shape == (2, 2, 3, 16, 16)
    assert (batch["video"] == torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None]).all()
