"""Videos and labels that change between the sessions of a run: named and refused; copies of them are welcome."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines.errors import UserError
from worldmodel.config import Config
from worldmodel.runs.folder import RunFolder
from worldmodel.training.loop import train

ORACLE = ["model.latent=oracle", "model.latent.dim=2"]


@pytest.fixture
def root(world: Path, tmp_path: Path) -> Path:
    """A copy of the tiny world, in which the first two videos have the same size."""
    root = tmp_path / "videos"
    shutil.copytree(world, root)
    first, second = (root / "train" / f"00000{number}.mp4" for number in range(2))
    size_bytes = 100 + max(first.stat().st_size, second.stat().st_size)
    for path in (first, second):
        missing = size_bytes - path.stat().st_size
        with open(path, "ab") as file:  # a box that players pass over
            file.write(missing.to_bytes(4, "big") + b"free" + bytes(missing - 8))
        os.utime(path, ns=(1, 1))
    return root


def _resume(config: Config) -> Path:
    return train(config, resume=True)


def test_a_video_replaced_by_one_of_the_same_size_is_named(tiny_config: Callable[..., Config], root: Path) -> None:
    config = tiny_config(f"data.root={root}")
    run = train(config)
    shutil.copyfile(root / "train" / "000001.mp4", root / "train" / "000000.mp4")
    with pytest.raises(UserError, match=r"'000000.mp4' has other content$") as line:
        _resume(config)
    assert str(line.value).startswith(f"the videos of {run} have changed since its checkpoint: ")
    shutil.rmtree(run / "checkpoints")  # nothing was learned from the old ones yet
    _resume(config)
    _resume(config)


def test_a_video_that_is_gone_is_named(tiny_config: Callable[..., Config], root: Path) -> None:
    config = tiny_config(f"data.root={root}")
    train(config)
    (root / "train" / "000007.mp4").unlink()
    with pytest.raises(UserError, match=r"have changed since its checkpoint: '000007.mp4' is gone"):
        _resume(config)


def test_a_copy_of_the_data_is_as_good(tiny_config: Callable[..., Config], root: Path) -> None:
    config = tiny_config(f"data.root={root}")
    run = train(config)
    for number, path in enumerate(sorted((root / "train").iterdir())):
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(number, number))
    (root / "train" / ".worldmodel_index.jsonl").unlink(missing_ok=True)
    assert _resume(config) == run


def test_a_run_without_hashes_resumes_and_is_compared_from_then_on(
    tiny_config: Callable[..., Config], root: Path
) -> None:
    config = tiny_config(f"data.root={root}")
    run = train(config)
    RunFolder(run).contents.unlink()
    shutil.copyfile(root / "train" / "000001.mp4", root / "train" / "000000.mp4")
    _resume(config)
    shutil.copyfile(root / "train" / "000000.mp4", root / "train" / "000002.mp4")
    with pytest.raises(UserError, match=r"'000002.mp4' has other content"):
        _resume(config)
    RunFolder(run).contents.write_text("{}")
    with pytest.raises(UserError, match=r"videos.jsonl' is damaged"):
        _resume(config)


def _edit_label(root: Path, name: str) -> None:
    path = root / "train" / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows[5][name] = [value + 0.5 for value in rows[5][name]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_an_edited_label_is_named_if_the_run_learns_from_it(tiny_config: Callable[..., Config], root: Path) -> None:
    names = f"run_dir={root.parent / 'oracle'}", f"data.root={root}"
    oracle, plain = tiny_config(*names, *ORACLE), tiny_config(names[1])
    train(oracle)
    train(plain)
    _edit_label(root, "velocity_change")
    with pytest.raises(UserError, match="since its checkpoint: label 'velocity_change' has other values"):
        _resume(oracle)
    _resume(plain)
