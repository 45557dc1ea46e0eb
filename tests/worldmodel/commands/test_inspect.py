"""`worldmodel inspect`: what it says of data sets and runs, and of damaged ones."""

import argparse
import errno
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import worldmodel
from data_pipelines.indexing.index_file import INDEX_NAME
from data_pipelines.shards.index_file import SHARDS_NAME
from data_pipelines.shards.packing import pack_videos
from worldmodel.commands import inspect
from worldmodel.commands.inspect import common
from worldmodel.commands.main import main


def output(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command and return what it prints."""
    assert main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command, which must fail with one line, and return the line."""
    with pytest.raises(SystemExit) as ended:
        main(["inspect", *map(str, arguments)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert ended.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def test_splits_labels_and_a_contact_sheet(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, world, "--sheet", tmp_path / "sheet.png")
    for split, count in (("train", 64), ("selection", 32), ("test", 24)):
        assert f"{split}, {world / split}\n  files     {count}, " in text
    assert f"{64 * 9} frames" in text and "size      64x64\n" in text and "rate      10 frames/s\n" in text
    assert "label     velocity: [2] numbers per video, float32" in text
    assert text.endswith(f"{tmp_path / 'sheet.png'}\n")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG" and sheet.width == 8 * 100 and sheet.height == 12 * 114
        row = sheet.crop((0, 14, 96, 110)).convert("L")
        values = np.asarray(row)
        assert values.min() < 20 and values.max() > 200  # a white digit on black


def test_labels_of_frames_and_a_single_video(
    kicked_world: Path, long_video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = output(capsys, kicked_world / "train")
    assert "numbers per frame, float32" in text and "length    24 to 24 frames, median 24" in text
    assert "splits    of the time of each video: train 0% to 80%, selection 80% to 90%, test 90% to 100%" in text
    text = output(capsys, long_video, "--sheet", tmp_path / "sheet.png")
    assert "files     1, " in text and "36 frames" in text and (tmp_path / "sheet.png").is_file()


def test_bad_files_are_named(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "videos"
    shutil.copytree(world / "train", root)
    (root / "empty.mp4").write_bytes(b"")
    (root / "cut.mp4").write_bytes((root / "000000.mp4").read_bytes()[:500])
    text = output(capsys, root)
    assert "bad       2\n" in text and "empty.mp4: empty file (0 bytes)" in text and "cut.mp4: " in text
    assert "splits    by a hash of the paths: train 52, selection 6, test 6" in text


def test_shards(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack_videos(world / "test", tmp_path / "shards", siblings=(), shard_mb=0.01, seed=0)
    text = output(capsys, tmp_path / "shards", "--sheet", tmp_path / "sheet.png")
    tars = sorted((tmp_path / "shards").glob("*.tar"))
    assert "files     24, " in text and f"shards    {len(tars)}\n" in text and "label     velocity" in text
    alone = tmp_path / "alone.tar"
    shutil.copy(tars[0], alone)
    before = sorted(tmp_path.iterdir())
    with tarfile.open(alone) as tar:
        count = sum(name.endswith(".mp4") for name in tar.getnames())
    assert f"{alone}\n  files     {count}, " in output(capsys, alone, "--sheet", tmp_path / "sheet.png")
    assert sorted(tmp_path.iterdir()) == before  # nothing is written next to a single shard


def test_a_run(trained_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, trained_run)
    assert "    seed=3\n" in text and "train.steps=6\n" in text and "data.batch_size=16\n" in text
    assert "latest: step 6, " in text and "train, step 6: loss " in text and "config.yaml (" in text
    assert "not evaluated: worldmodel evaluate --run" in text
    assert "holds no videos" in error(capsys, trained_run, "--sheet", "sheet.png")


def test_the_index_that_is_left_in_a_folder_is_named(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "test"):
        shutil.copytree(world / split, tmp_path / "v" / split, ignore=shutil.ignore_patterns(INDEX_NAME))
    pack_videos(world / "test", tmp_path / "shards", siblings=(), shard_mb=0.01, seed=0)
    (tmp_path / "shards" / SHARDS_NAME).unlink()
    for root, folders, name in (("v", ("train", "test"), INDEX_NAME), ("shards", ("",), SHARDS_NAME)):
        before = set((tmp_path / root).rglob("*"))
        text = output(capsys, tmp_path / root)
        written = set((tmp_path / root).rglob("*")) - before
        assert written == {tmp_path / root / folder / name for folder in folders}
        assert all(f"\n  index     {path}, which training also reads\n" in text for path in written)
    assert "  index  " not in output(capsys, tmp_path / "v" / "train" / "000000.mp4")


def test_a_folder_of_runs_is_a_line_for_each(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    for name in ("a", "grid/byol-none/seed_0", "b"):
        shutil.copytree(trained_run, runs / name)
    scores = {"energy_score": [0.5], "ratio_to_oracle": [1.25]}
    (runs / "b" / "metrics.json").write_text(json.dumps({"forecasts": {"model": scores}}))
    (runs / "new").mkdir()
    shutil.copy(trained_run / "config.yaml", runs / "new")
    (runs / "broken").mkdir()
    (runs / "broken" / "config.yaml").write_text("a: [")
    (runs / "notes").mkdir()
    (runs / "link").symlink_to(trained_run)
    heading, *lines = output(capsys, runs).splitlines()
    assert heading == f"{runs}: 5 runs, each of which `worldmodel inspect RUN` describes"
    rows = dict(line.split(maxsplit=1) for line in lines)
    assert rows["a"] == rows["grid/byol-none/seed_0"] == "step 6 of 6, not evaluated"
    assert rows["b"] == "step 6 of 6, energy score of the first step: 0.500, ratio to the simulator's: 1.250"
    assert rows["new"] == "step 0 of 6, not evaluated" and rows["broken"].startswith("error: ") and len(rows) == 5
    assert "holds no videos" in error(capsys, runs, "--sheet", "sheet.png")


def test_videos_next_to_the_config_of_another_program_are_videos(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world / "test", tmp_path / "v")
    (tmp_path / "v" / "extra").mkdir()
    (tmp_path / "v" / "extra" / "config.yaml").write_text("a: 1")
    assert "videos" in output(capsys, tmp_path / "v") and "missing key run_dir" not in output(capsys, tmp_path / "v")


def test_one_run_with_a_name_of_two_lines_and_a_score_of_several_numbers(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "a\nb"
    shutil.copytree(trained_run, run)
    (run / "metrics.json").write_text(json.dumps({"forecasts": {"model": {"energy_score": [[1.0, 2.0]]}}}))
    heading, line = output(capsys, tmp_path / "runs").splitlines()
    assert ": 1 run, which `" in heading and line.endswith("energy score of the first step: 1.000 / 2.000")
    assert output(capsys, run).splitlines()[0] == f"{tmp_path}/runs/a\\nb"


def test_damaged_runs(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (name, content) in enumerate(
        {
            "config.yaml": b"a: [",
            "metrics.jsonl": b"\xff{\n{}\n",
            "metrics.json": b"{",
            "checkpoints/index.json": b'{"latest": "../../x", "best": null, "kept": []}',
            "checkpoints/step_00000006/model.safetensors": b"\xff" * 20,
        }.items()
    ):
        run = tmp_path / str(number)
        shutil.copytree(trained_run, run)
        (run / name).write_bytes(content)
        text = output(capsys, run)
        assert "Traceback" not in text and ("    error: " in text or name == "metrics.jsonl"), text
    bare = tmp_path / "bare"
    (bare / "checkpoints").mkdir(parents=True)
    shutil.copy(trained_run / "checkpoints" / "index.json", bare / "checkpoints")
    assert "error: no run in" in output(capsys, bare)


def test_videos_with_files_of_another_program(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(world / "test", tmp_path / "videos")
    (tmp_path / "videos" / "checkpoints").mkdir()
    (tmp_path / "videos" / "config.yaml").write_text("camera: front\n")
    assert "videos" in output(capsys, tmp_path / "videos").splitlines()[0]


def test_a_link_is_shown_under_its_own_name(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "alias.mp4").symlink_to(world / "test" / "000000.mp4")
    assert "9 frames" in output(capsys, tmp_path / "alias.mp4", "--sheet", str(tmp_path / "linked.png"))
    output(capsys, world / "test" / "000000.mp4", "--sheet", str(tmp_path / "direct.png"))
    sheets = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("linked", "direct")]
    rows = min(len(sheet) for sheet in sheets) // 2
    assert (sheets[0][-rows:] == sheets[1][-rows:]).all()


def test_an_exported_run_has_the_steps_of_its_weights(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worldmodel.export(worldmodel.load(trained_run), tmp_path / "runs" / "exported")
    assert "step 6 of 6, not evaluated" in output(capsys, tmp_path / "runs")


def test_inputs_that_are_no_data_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in {"text.mp4": b"text", "text.tar": b"text", "empty.tar": b"", "notes.txt": b"a\n"}.items():
        (tmp_path / name).write_bytes(content)
    with tarfile.open(tmp_path / "none.tar", "w") as tar:
        tar.add(tmp_path / "notes.txt", "notes.txt")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_bytes(b"x")
    (tmp_path / "lerobot" / "meta").mkdir(parents=True)
    (tmp_path / "lerobot" / "meta" / "info.json").write_text("{")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    names = ["text.mp4", "text.tar", "empty.tar", "none.tar", "notes.txt", "fifo", "folder", "bad", "lerobot", "loop"]
    for name in [*names, "missing", "x" * 300]:
        assert name[:100] in error(capsys, tmp_path / name) or name == "loop" or name.endswith(".tar")
    assert f"cannot write to --sheet {tmp_path}: it is not a" in error(capsys, tmp_path, "--sheet", tmp_path)
    for name in ("sheet", "sheet.jpg", ".png"):
        assert f"/{name}: the name must end in .png" in error(capsys, tmp_path, "--sheet", tmp_path / "new" / name)
    assert not (tmp_path / "new").exists()


def test_common_values() -> None:
    assert common(iter(["a"] * 3)) == "a"
    assert common(iter("aabcdef")) == "a (2), b (1), c (1), d (1), 2 more"


def test_a_reader_that_has_left_is_no_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not the folder that is broken: commands end with 141 then, without a message."""

    def left(path: Path) -> str:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.setattr("worldmodel.commands.inspect_run.describe_run", left)
    with pytest.raises(BrokenPipeError):
        inspect.run(argparse.Namespace(path=tmp_path, sheet=None, camera=[]))
