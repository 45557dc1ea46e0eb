"""Which images are pairs: all others of a class alike, never an image with itself, and files as they are written."""

from pathlib import Path

import numpy as np
import pytest

from data_pipelines.errors import UserError
from data_pipelines.formats.image_files import ImageFiles
from data_pipelines.images.relations import classes_of, listed_pairs, pairs_of_file, same_class, same_image
from data_pipelines.index import VideoIndex
from data_pipelines.split_folders import load_split
from tests.data_pipelines.images.conftest import WriteImages

CLASSES = np.array([2, 0, 2, 1, 0, 2, 7, 0])


def index_of(root: Path, split: str | None = None) -> VideoIndex:
    return load_split(str(root), split, format=ImageFiles())  # type: ignore[arg-type]


def pairs_file(folder: Path, text: str) -> Path:
    path = folder / "pairs.csv"
    path.write_text(text)
    return path


def test_targets_of_a_class_are_all_its_other_images_equally_often(caplog: pytest.LogCaptureFixture) -> None:
    relation = same_class(CLASSES)
    assert relation.contexts.tolist() == [0, 1, 2, 4, 5, 7]
    assert "2 of 8 images are the only ones of their class" in caplog.text
    grid = (np.arange(600) + 0.5) / 600
    for number, context in enumerate(relation.contexts):
        targets = relation.draw(np.full(600, number), grid)
        others = [i for i, kind in enumerate(CLASSES) if kind == CLASSES[context] and i != context]
        found, counts = np.unique(targets, return_counts=True)
        assert found.tolist() == others and set(counts) == {600 // len(others)}


def test_the_ends_of_the_uniform_numbers_are_valid() -> None:
    relation = same_class(CLASSES)
    for uniform in (0.0, np.nextafter(1.0, 0.0)):
        targets = relation.draw(np.arange(relation.num_pairs), np.full(relation.num_pairs, uniform))
        assert (CLASSES[targets] == CLASSES[relation.contexts]).all() and (targets != relation.contexts).all()


def test_an_image_is_its_own_target_as_two_views() -> None:
    relation = same_image(4)
    assert relation.draw(np.arange(4), np.full(4, 0.9)).tolist() == relation.contexts.tolist() == [0, 1, 2, 3]


def test_listed_pairs_keep_their_order_and_direction() -> None:
    relation = listed_pairs(np.array([[3, 1], [3, 2], [0, 3]]))
    assert relation.contexts.tolist() == [3, 3, 0]
    assert relation.draw(np.arange(3), np.full(3, 0.5)).tolist() == [1, 2, 3]


def test_relations_differ_in_their_hashes() -> None:
    relations = [same_class(CLASSES), same_class(CLASSES[::-1]), same_image(8), listed_pairs(np.array([[0, 1]]))]
    assert len({relation.content_hash() for relation in relations}) == 4
    assert same_class(CLASSES).content_hash() == same_class(CLASSES.copy()).content_hash()


def test_a_file_of_pairs_is_relative_to_the_root_of_all_splits(
    tmp_path: Path, write_images: WriteImages, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "set"
    for split in ("train", "test"):
        write_images(f"set/{split}", (3, 3))
    lines = ["first,second,note", "train/c0/01.png,train/c1/04.png,x", "test/c0/00.png,./test/c0/02.png,", ""]
    across = "train/c0/00.png,test/c0/00.png,"
    path = pairs_file(tmp_path, "\n".join([*lines[:-1], across]))
    assert pairs_of_file(path, root, index_of(root / "train")).tolist() == [[1, 4]]
    assert "1 pairs have one image in another split" in caplog.text
    assert pairs_of_file(path, root, index_of(root / "test")).tolist() == [[0, 2]]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a,b\n1,2\n", "has no column first: a file of pairs has the columns first,second"),
        ("first,second\nc0/00.png\n", "line 2 lacks a path: give first,second in each line"),
        ("first,second\nc0/00.png,c9/99.png\n", "line 2: 'c9/99.png' is not an image below"),
        ("first,second\n", "has no pair within the 6 images of a split: each split needs pairs"),
    ],
)
def test_mistakes_in_a_file_of_pairs(tmp_path: Path, write_images: WriteImages, text: str, told: str) -> None:
    root = write_images(counts=(3, 3))
    with pytest.raises(UserError) as caught:
        pairs_of_file(pairs_file(tmp_path, text), root, index_of(root))
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["{root}/c0/01.png", "../images/c0/01.png", "../other.png", "c0/../../other.png"])
def test_paths_in_a_file_of_pairs_that_are_not_below_the_root(
    tmp_path: Path, write_images: WriteImages, name: str
) -> None:
    root = write_images(counts=(3, 3))
    (tmp_path / "other.png").write_bytes((root / "c0" / "00.png").read_bytes())
    path = pairs_file(tmp_path, f"first,second\nc0/00.png,c0/02.png\nc0/00.png,{name.format(root=root)}\n")
    with pytest.raises(UserError, match=r"line 3: '.*' is not an image below '.*', as a path in it"):
        pairs_of_file(path, root, index_of(root))


def test_a_missing_file_of_pairs(tmp_path: Path, write_images: WriteImages) -> None:
    root = write_images(counts=(3, 3))
    with pytest.raises(UserError, match=r"cannot read '.*none.csv': No such file"):
        pairs_of_file(tmp_path / "none.csv", root, index_of(root))


def test_classes_are_whole_numbers_of_each_image(write_images: WriteImages) -> None:
    root = write_images(counts=(2, 2))
    index = index_of(root)
    assert classes_of(index, "label").tolist() == [0, 0, 1, 1]
    with pytest.raises(UserError, match=r"have no label 'species' \(they have label\): put them into a folder"):
        classes_of(index, "species")
    rows = "".join(f"c{i // 2}/0{i}.png,{i / 2},{'x' * i}\n" for i in range(4))
    (root / "metadata.csv").write_text(f"file_name,size,name\n{rows}")
    index = index_of(root)
    assert classes_of(index, "label").tolist() == [0, 0, 1, 1]  # of the folders, next to metadata without it
    with pytest.raises(UserError, match=r"'size' of .* is not a class: it must be one whole number per image"):
        classes_of(index, "size")
    with pytest.raises(UserError, match="the label 'name' cannot be used"):
        classes_of(index, "name")
