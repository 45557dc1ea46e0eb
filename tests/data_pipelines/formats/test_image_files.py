"""Image files as an index: classes from folders, labels from metadata, splits, and files that are no images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipelines.decoders import read_frames
from data_pipelines.errors import UserError
from data_pipelines.formats.base import LoadOptions
from data_pipelines.formats.image_files import ImageFiles
from data_pipelines.split_folders import load_split
from data_pipelines.splits import SPLITS
from tests.data_pipelines.conftest import DECODERS

OPTIONS = LoadOptions(num_workers=0, progress=False, max_bad_fraction=0.5)


def write(path: Path, level: int = 9) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8), level, np.uint8)).save(path)


def test_classes_have_one_number_in_all_splits(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/c/2.jpg", "test/b/3.jpeg", "test/c/4.png"):
        write(tmp_path / name)
    train, test = (load_split(str(tmp_path), split, format=ImageFiles()) for split in (SPLITS[0], SPLITS[2]))
    assert test.labels["label"].tolist() == [1, 2]
    assert set(train.labels["label"].tolist()) <= {0, 2}  # a tenth of train/ is held out for selection


def test_images_are_frames_of_their_size_and_metadata_labels_them(tmp_path: Path) -> None:
    for name in ("1.png", "2.png", "odd %03d name.png"):
        write(tmp_path / name)
    (tmp_path / "metadata.csv").write_text("file_name,age\n1.png,3\n2.png,0.5\nodd %03d name.png,7\n")
    index = ImageFiles().load(str(tmp_path), OPTIONS)
    assert [(v.path, v.num_frames, v.width, v.height) for v in index.videos] == [
        ("1.png", 1, 8, 6), ("2.png", 1, 8, 6), ("odd %03d name.png", 1, 8, 6),
    ]  # fmt: skip
    assert index.labels["age"].tolist() == [3, 0.5, 7] and "label" not in index.labels
    assert len({video.digest for video in index.videos}) == 1  # equal pixels, equal digests


@pytest.mark.parametrize("name", ["a%d.png", "a%02d.png", "red%20dress.jpg", "a*.png", "a[0].png", "%*.png"])
@pytest.mark.parametrize("decoder", sorted({*DECODERS} - {"decord"}))  # decord refuses all images
def test_the_name_of_an_image_is_not_a_pattern(tmp_path: Path, name: str, decoder: str) -> None:
    for other in ("a0.png", "a00.png"):
        write(tmp_path / other, level=20)
    write(tmp_path / name, level=200)
    if decoder == "torchcodec" and "%" in name:
        with pytest.raises(UserError, match="torchcodec takes the % in its path for a pattern"):
            list(read_frames(tmp_path / name, channels=1, size_px=None, decoder=decoder))
        return
    [frame] = read_frames(tmp_path / name, channels=1, size_px=None, decoder=decoder)
    assert abs(int(frame[0, 0, 0]) - 200) <= 1


MAKE, ORIENTATION = 0x010F, 0x0112  # tags of EXIF


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_photographs_are_shown_as_their_exif_says(tmp_path: Path, suffix: str, orientation: int | None) -> None:
    picture = np.full((48, 64), 60, np.uint8)
    picture[:20, :24], picture[:10, 40:] = 200, 130  # which way up, and whether it is mirrored
    exif = Image.Exif()
    exif[MAKE] = "A maker"
    if orientation is not None:
        exif[ORIENTATION] = orientation
    path = tmp_path / f"1.{suffix}"
    Image.fromarray(picture).save(path, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)), dtype=int)
    [video] = ImageFiles().load(str(tmp_path), OPTIONS).videos
    assert (video.height, video.width) == expected.shape
    for decoder in set(DECODERS) - {"decord"}:  # decord refuses all images
        if decoder == "torchcodec" and orientation not in (None, 1):
            with pytest.raises(UserError, match="to be turned, which torchcodec ignores"):
                list(read_frames(path, channels=1, size_px=None, decoder=decoder))
            continue
        [frame] = read_frames(path, channels=1, size_px=None, decoder=decoder)
        assert frame.shape[1:] == expected.shape and np.abs(frame[0] - expected).mean() < 2


def test_files_that_are_no_images_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("1.png", "2.png"):
        write(tmp_path / name)
    (tmp_path / "3.png").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("no image")
    index = ImageFiles().load(str(tmp_path), OPTIONS)
    assert [video.path for video in index.videos] == ["1.png", "2.png"] and index.bad[0].path == "3.png"
    assert "'3.png'" in caplog.text


@pytest.mark.parametrize(("name", "told"), [("none", "is not a folder: give a folder that holds images"),
                                            ("empty", r"holds no image files \(.jpg .jpeg .png\)")])  # fmt: skip
def test_a_folder_without_images(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / "empty").mkdir()
    assert not ImageFiles().detect(str(tmp_path / name))
    with pytest.raises(UserError, match=told):
        ImageFiles().load(str(tmp_path / name), OPTIONS)
