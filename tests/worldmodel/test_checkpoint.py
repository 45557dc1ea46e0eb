import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.errors import UserError
from worldmodel import checkpoint as checkpoint_module
from worldmodel import load
from worldmodel.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    open_run,
    optimizer_tensors,
    save_checkpoint,
)
from worldmodel.config import Config


def make(step: int) -> Checkpoint:
    weights = {"w": torch.full((3,), float(step))}
    return Checkpoint(model=weights, teacher=weights, optimizer={"w/step": torch.tensor(step)}, state={"step": step})


def saved_steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


def test_round_trip(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(5), keep=2, is_best=False)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded.state == {"step": 5}
    assert torch.equal(loaded.model["w"], torch.full((3,), 5.0))
    assert load_checkpoint(tmp_path, "best") is None


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        save_checkpoint(tmp_path, make(step), keep=2, is_best=step == 2)
    assert saved_steps(tmp_path) == ["step_00000002", "step_00000005", "step_00000006"]
    best = load_checkpoint(tmp_path, "best")
    assert best is not None and best.state["step"] == 2
    save_checkpoint(tmp_path, make(7), keep=2, is_best=True)
    assert saved_steps(tmp_path) == ["step_00000006", "step_00000007"]


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, make(1), keep=1, is_best=True)
    written: list[str] = []

    def full_after_one(path: Path, content: bytes) -> None:
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path.name)
        path.write_bytes(content)

    monkeypatch.setattr(checkpoint_module, "write_bytes", full_after_one)
    with pytest.raises(UserError, match="No space left on device; the checkpoint step_00000001 is intact"):
        save_checkpoint(tmp_path, make(2), keep=1, is_best=True)
    assert written == ["model.safetensors"]
    survivor = load_checkpoint(tmp_path)
    assert survivor is not None and survivor.state["step"] == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name != "index.json"] == [
        "step_00000001"
    ]


def test_what_a_kill_left_behind_is_ignored_and_replaced(tmp_path: Path) -> None:
    """Killed while writing aside, and killed between the rename and the index."""
    save_checkpoint(tmp_path, make(1), keep=1, is_best=False)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step_00000001", folder / ".step_00000002.partial")
    shutil.copytree(folder / "step_00000001", folder / "step_00000002")
    before = load_checkpoint(tmp_path)
    assert before is not None and before.state["step"] == 1
    save_checkpoint(tmp_path, make(2), keep=1, is_best=False)
    after = load_checkpoint(tmp_path)
    assert after is not None and after.state["step"] == 2
    assert torch.equal(after.model["w"], torch.full((3,), 2.0))


@pytest.mark.parametrize("damage", ["cut", "missing", "garbage"])
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, damage: str) -> None:
    weights = save_checkpoint(tmp_path, make(1), keep=1, is_best=False) / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:20] if damage == "cut" else b"\x80\x04garbage" * 9)
    with pytest.raises(UserError, match="is damaged") as caught:
        load_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_index_cannot_point_outside_the_run(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(1), keep=1, is_best=False)
    index: dict[str, Any] = {"latest": "../../elsewhere", "best": None, "kept": []}
    (tmp_path / "checkpoints" / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside the run"):
        load_checkpoint(tmp_path)


def test_optimizer_state_round_trip_by_name() -> None:
    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    first = network()
    optimizer = torch.optim.AdamW(first.parameters())
    step(first, optimizer)
    second = network()
    second.load_state_dict(first.state_dict())
    # Other groups, other order: names decide.
    parameters = list(second.parameters())
    restored = torch.optim.AdamW([{"params": parameters[2:]}, {"params": parameters[:2]}])
    load_optimizer_tensors(restored, second, optimizer_tensors(optimizer, first))
    step(first, optimizer)
    step(second, restored)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_folder_is_never_overwritten_unasked(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config()
    run = open_run(config)
    (run / "precious.txt").write_text("weights")
    with pytest.raises(UserError, match=r"already holds a run: pass --resume .* --overwrite"):
        open_run(config)
    assert open_run(config, resume=True) == run and (run / "precious.txt").exists()
    open_run(config, overwrite=True)
    assert not (run / "precious.txt").exists()


def test_a_folder_that_is_no_run_is_never_touched(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years")
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match="holds no run"):
            open_run(tiny_config(), **flags)
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years"


def test_resuming_with_another_config_names_the_key_and_both_values(
    tiny_config: Callable[..., Config],
) -> None:
    open_run(tiny_config())
    with pytest.raises(UserError, match=r"train.lr=0.002, the config says 0.5"):
        open_run(tiny_config("train.lr=0.5"), resume=True)
    open_run(tiny_config("data.num_workers=1", "train.log_every=2"), resume=True)


def test_loading_what_is_no_run(tmp_path: Path, tiny_config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match="no run in"):
        load(tmp_path)
    run = open_run(tiny_config())
    with pytest.raises(UserError, match="has no checkpoint yet"):
        load(run)


def test_state_holds_numbers_that_json_can_say(tmp_path: Path) -> None:
    state: dict[str, Any] = {"step": 3, "best_score": float("inf"), "scaler": None}
    save_checkpoint(tmp_path, Checkpoint({}, {}, {}, state), keep=1, is_best=False)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded.state == state
