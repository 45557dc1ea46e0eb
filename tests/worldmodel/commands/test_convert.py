"""`worldmodel convert`: what it prints, what it rejects, and training on what it wrote."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.splits import SPLITS
from tests.data_pipelines.conftest import _write_video
from tests.data_pipelines.convert.conftest import WRITERS, painted, write_lerobot, write_npz, write_robomimic
from worldmodel.commands.main import main
from worldmodel.config import Config
from worldmodel.runs.folder import RunFolder
from worldmodel.training.loop import train


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command and return its one line of error."""
    with pytest.raises(SystemExit) as ended:
        main(["convert", *map(str, arguments), "--num-processes", "1"])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("layout", WRITERS)
def test_ten_steps_of_training_on_every_layout(
    layout: str, tmp_path: Path, tiny_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = WRITERS[layout](tmp_path, _write_video), tmp_path / "out"
    assert main(["convert", str(source), str(out), "--num-processes", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"4 videos in {out}\n" in printed and "bit for bit" in printed
    for split in SPLITS:
        shutil.copytree(out, tmp_path / "data" / split)
    label = "label=null" if layout in ("gif", "webp") else "label=action"
    config = tiny_config(
        f"data.root={tmp_path / 'data'}", "data.channels=3", "data.batch_size=4", "data.num_lanes=2",
        "train.steps=10", "train.eval_every=10", f"evaluation.{label}",
    )  # fmt: skip
    run = train(config)
    rows = [json.loads(line) for line in RunFolder(run).history.read_text().splitlines()]
    assert max(row["step"] for row in rows) == 10


def test_quality_and_what_was_there_before_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_robomimic(tmp_path / "a.hdf5"), tmp_path / "out"
    for kept in ("", ", 4 of them from before"):
        assert main(["convert", str(source), str(out), "--crf", "20", "--num-processes", "1"]) == 0
        first, second = capsys.readouterr().out.splitlines()
        assert first == f"a robomimic data set: 4 videos in {out}{kept}"
        assert second.startswith("PSNR: mean ") and "dB, lowest " in second and "(a.hdf5:data/demo_" in second


def test_bad_episodes_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lerobot(tmp_path / "lerobot", _write_video)
    [path] = source.glob("data/*/episode_000002.parquet")
    path.write_bytes(b"nonsense")
    message = refused(capsys, source, tmp_path / "out")
    assert message.startswith("error: 1 of 4 episodes cannot be converted; the first is 'episode 2' (")
    assert main(["convert", str(source), str(tmp_path / "out"), "--skip-bad", "--num-processes", "1"]) == 0
    assert "1 episodes could not be converted" in capsys.readouterr().out


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_npz(tmp_path / "source.npz"), tmp_path / "out"
    for arguments, message in {
        ("--crf", "60"): "crf=60 must be from 0 (best) to 51",
        ("--fps", "0"): "fps=0 must be from 0.001 to 1000",
        ("--fps", "nan"): "fps=nan must be from 0.001 to 1000",
        ("--shards", "--shard-mb", "0"): "--shard-mb 0 must be more than 0",
        ("--shards", "--shard-mb", "inf"): "--shard-mb inf must be more than 0, and finite",
        ("--shard-mb", "8"): "--shard-mb 8 is of --shards",
        ("--frames", "rgb"): "it has no array 'rgb': it has frames uint8 [42, 48, 64, 3], action float32 [42, 2]",
        ("--bounds", "state"): "'state' is float64 [42, 3]: bounds are one number per row or episode",
        ("--labels", "missing"): "'missing' is not there: a label has numbers for each of the 42 rows of frames",
    }.items():
        assert message in refused(capsys, source, out, *arguments)
        assert not out.exists()
    assert f"'{tmp_path / 'nothing'}' does not exist" in refused(capsys, tmp_path / "nothing", out)
    (tmp_path / "file").write_text("mine")
    assert "is not empty and holds no conversion" in refused(capsys, source, tmp_path / "file")
    assert "cannot write to '/proc/out'" in refused(capsys, source, "/proc/out")


def test_the_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.lance").mkdir()
    (tmp_path / "a.h5").write_bytes(b"")
    for module, source, extra in (("h5py", "a.h5", "convert"), ("lance", "a.lance", "lance")):
        monkeypatch.setitem(sys.modules, module, None)
        assert f"pip install 'worldmodel[{extra}]'" in refused(capsys, tmp_path / source, tmp_path / "out")


def test_shards_of_one_camera(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", left=painted(0), right=255 - painted(0))
    arguments = ["convert", str(tmp_path / "a.npz"), str(tmp_path / "out"), "--num-processes", "1"]
    assert main([*arguments, "--frames", "right", "--shards"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["shard-000000.tar"]
    assert "other settings" in refused(capsys, *arguments[1:3], "--frames", "left", "--shards")
