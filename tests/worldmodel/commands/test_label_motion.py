"""`worldmodel label-motion`: what it prints and draws, its warnings and its messages for mistakes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data_pipelines.conftest import _write_video as write_video
from tests.data_pipelines.motion.painted import line, painted, scenery
from worldmodel.commands.main import main

PATH = line(24, (20, 20), (100, 70))[:, None]
STILL = np.full((24, 1, 2), np.nan)


def test_labels_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "train" / "a.mp4", images=painted(scenery(), PATH, [10]))
    write_video(tmp_path / "test" / "b.mp4", images=painted(scenery(), PATH[::-1], [10]))
    assert main(["label-motion", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path}/train/a.mp4: 24 frames, 0.0% of the positions interpolated\n" in printed
    assert "position: 2 videos, 48 frames, 0.0% of the positions interpolated\n" in printed
    assert printed.endswith(f"{tmp_path}/motion.png: look whether the marks are on the objects\n")
    with Image.open(tmp_path / "motion.png") as picture:
        red = np.asarray(picture.convert("RGB")).astype(int) @ [1, -1, 0] > 100
    assert red.sum() > 2 * 12 * 10  # a mark on each of twelve frames of both, and curves
    assert main(["label-motion", str(tmp_path), "--picture", str(tmp_path / "new" / "p.png")]) == 0
    assert "2 videos were labelled before: --overwrite tracks them again\n" in capsys.readouterr().out
    assert (tmp_path / "new" / "p.png").is_file()
    assert main(["inspect", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("label     position: [2] numbers per frame, float32\n") == 2


def test_videos_without_a_label_end_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "a.mp4", images=painted(scenery(), PATH, [10]))
    write_video(tmp_path / "b.mp4", images=painted(scenery(), STILL, [10], noise=3))
    assert f"1 of 2 videos have no where, {ALL}: '{tmp_path}/b.mp4' (nothing moves)" in error(
        capsys, tmp_path, "--label", "where"
    )
    assert (tmp_path / "motion.png").is_file()  # of the other one
    assert f"2 of 2 videos have no where, {ALL}: '{tmp_path}/a.mp4' (1 of 2 moving objects are found), " in error(
        capsys, tmp_path, "--label", "where", "--objects", "2"
    )


ALL = "and the label can only be used if all have it: move them away, or change --objects"


def test_doubtful_positions_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hidden = PATH.copy()
    hidden[8:18] = np.nan
    write_video(tmp_path / "hidden.mp4", images=painted(scenery(), hidden, [10]))
    wide = np.kron(np.random.default_rng(0).uniform(60, 200, (12, 30)), np.ones((8, 8)))
    images = [painted(wide[:, 4 * n : 4 * n + 128], PATH[n : n + 1], [5])[0] for n in range(24)]
    write_video(tmp_path / "moving.mp4", images=images)
    assert main(["label-motion", str(tmp_path)]) == 0
    warnings = [record.getMessage() for record in caplog.records if record.name.endswith("label_motion")]
    assert len(warnings) == 2
    assert "hidden.mp4': 42% of the positions are interpolated" in warnings[0]
    assert "moving.mp4': " in warnings[1] and "looks like a moving camera" in warnings[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objects", "0"], "--objects must be at least 1, not 0"),
        (["--objects", "17"], "--objects must be at most 16, not 17"),
        (["--label", "file_name"], "--label 'file_name' is not a name for a label"),
        (["--label", "a b"], "--label 'a b' is not a name for a label"),
        (["--picture", "p.jpg"], "--picture p.jpg must be the name of a PNG file"),
        ([], "holds no video files"),
    ],
)
def test_mistakes(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error(capsys, tmp_path, *arguments)


def test_what_is_no_folder_of_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "missing is not a folder" in error(capsys, tmp_path / "missing")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "shards.jsonl").write_text("", encoding="utf-8")
    assert "only folders of video files or of images can be labelled" in error(capsys, tmp_path / "shards")
    assert "File name too long" in error(capsys, "x" * 300)


def error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command, which must fail with one line, and return the line."""
    with pytest.raises(SystemExit) as ended:
        main(["label-motion", *map(str, arguments)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert ended.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def test_a_line_break_in_a_name_is_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By all commands that list files."""
    moving = write_video(tmp_path / "a\nb.mp4", images=painted(scenery(), PATH, [10]))
    (tmp_path / "c\nd.mp4").write_text("bad")
    printed = {}
    for command in ("index", "inspect", "label-motion"):
        assert main([command, str(tmp_path)]) == 0
        printed[command] = capsys.readouterr().out
    moving.write_text("changed")
    with pytest.raises(SystemExit):
        main(["index", str(tmp_path), "--verify"])
    printed["verify"] = capsys.readouterr().out
    for command, text in printed.items():
        name = {"index": "c\\nd", "inspect": "c\\nd"}.get(command, "a\\nb")
        assert f"{name}.mp4" in text and "\nb.mp4" not in text and "\nd.mp4" not in text, text


def test_nothing_is_printed_about_no_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "a.mp4", images=painted(scenery(), STILL, [10]))
    with pytest.raises(SystemExit):
        main(["label-motion", str(tmp_path)])
    assert capsys.readouterr().out == ""
