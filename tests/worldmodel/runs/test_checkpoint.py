"""Checkpoints: what is written, kept, removed and refused."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.errors import UserError
from tests.worldmodel.runs.checkpoints import make, make_state, saved_steps
from worldmodel import load
from worldmodel.config import Config
from worldmodel.runs import checkpoint as checkpoint_module
from worldmodel.runs.checkpoint import Checkpoint, checkpoint_name, load_checkpoint, remove_leftovers, save_checkpoint
from worldmodel.training.loop import train


def test_round_trip(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(5), keep=2, is_best=False)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded.state == make_state(5)
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
    with pytest.raises(UserError, match="not a checkpoint of a run"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name", ["..", "", ".", "/tmp", "step_1/../..", "Documents", "step_00000001\n", "step_x", 7, {}]
)
@pytest.mark.parametrize("key", ["latest", "best", "kept"])
def test_names_in_the_index_are_those_of_checkpoints(tmp_path: Path, key: str, name: Any) -> None:
    save_checkpoint(tmp_path, make(1), keep=1, is_best=False)
    index: dict[str, Any] = {"latest": "step_00000001", "best": None, "kept": ["step_00000001"]}
    index[key] = [name, "step_00000001"] if key == "kept" else name
    (tmp_path / "checkpoints" / "index.json").write_text(json.dumps(index))
    for action in (
        lambda: load_checkpoint(tmp_path),
        lambda: save_checkpoint(tmp_path, make(2), keep=1, is_best=False),
    ):
        with pytest.raises(UserError, match="not a checkpoint of a run") as caught:
            action()
        assert "\n" not in str(caught.value)


def test_only_folders_of_checkpoints_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save_checkpoint(tmp_path, make(1), keep=1, is_best=False)
    (folder / "step_00000007").mkdir()
    (folder / "step_00000007" / "thesis.tex").write_text("years")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "state.json").write_text("{}")
    (folder / "step_00000008").symlink_to(outside)
    kept = ["step_00000007", "step_00000008", "step_00000001"]
    (folder / "index.json").write_text(json.dumps({"latest": "step_00000001", "best": None, "kept": kept}))
    save_checkpoint(tmp_path, make(9), keep=1, is_best=False)
    assert (folder / "step_00000007" / "thesis.tex").exists() and (outside / "state.json").exists()
    assert not (folder / "step_00000001").exists() and (folder / "step_00000009").is_dir()


def test_checkpoints_are_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link"):
        save_checkpoint(tmp_path, make(1), keep=1, is_best=False)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_partial_checkpoints_that_are_links_are_removed_as_links(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("years")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in (".step_00000001.partial", "step_00000001"):
        (folder / name).symlink_to(victim)
    save_checkpoint(tmp_path, make(1), keep=1, is_best=False)
    assert (victim / "precious").exists() and not (folder / "step_00000001").is_symlink()


def test_null_is_no_checkpoint_to_keep(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(1), keep=1, is_best=False)
    index = {"latest": "step_00000001", "best": None, "kept": [None, "step_00000001"]}
    (tmp_path / "checkpoints" / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="names 'None', which is not a checkpoint of a run"):
        save_checkpoint(tmp_path, make(2), keep=1, is_best=False)


@pytest.mark.parametrize(
    "text",
    ["", "no JSON", "[]", "3", "{}", '{"latest": null}', '{"latest": null, "best": null, "kept": 7}', "[" * 100_000],
)
def test_a_damaged_index_is_one_line(tmp_path: Path, text: str) -> None:
    save_checkpoint(tmp_path, make(1), keep=1, is_best=False)
    (tmp_path / "checkpoints" / "index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json is damaged") as caught:
        load_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_checkpoints_whose_index_is_missing_are_not_taken_for_none(
    tiny_config: Callable[..., Config], trained_run: Path
) -> None:
    config = tiny_config()
    run = Path(config.run_dir)
    shutil.copytree(trained_run, run)
    index, history = run / "checkpoints" / "index.json", (run / "metrics.jsonl").read_text()
    index.unlink()
    message = r"index\.json, which names .* is missing, but 2 checkpoints are there, up to step_00000006: restore it"
    for use in (lambda: train(config, resume=True), lambda: load(run), lambda: load(run, which="best")):
        with pytest.raises(UserError, match=message):
            use()
    assert saved_steps(run) == ["step_00000004", "step_00000006"] and (run / "metrics.jsonl").read_text() == history
    shutil.rmtree(run / "checkpoints" / "step_00000004")  # a kill may leave one checkpoint without an index
    assert checkpoint_name(run) == checkpoint_name(run, "best") == "step_00000006"
    assert load(run).state["step"] == 6
    train(config, resume=True)
    assert (run / "metrics.jsonl").read_text() == history


@pytest.mark.parametrize("text", ["[]", "{}", '{"step": "x"}', "[" * 100_000, "\xff", '{"step": true}', '{"step": -1}'])
def test_a_damaged_state_is_one_line(tmp_path: Path, text: str) -> None:
    final = save_checkpoint(tmp_path, make(1), keep=1, is_best=False)
    (final / "state.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="is damaged") as caught:
        load_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("refined", "yes"),
        ("refined", 10**9),
        ("awaits_evaluation", []),
        ("exported", 1),
        ("step_flops", "x"),
        ("step_flops", {}),
        ("scaler", 7),
        ("num_threads", "2"),
        ("num_cores", 2.5),
    ],
)
def test_a_value_of_another_type_in_the_state_is_one_line(
    key: str, value: Any, tiny_config: Callable[..., Config], trained_run: Path
) -> None:
    config = tiny_config()
    run = Path(config.run_dir)
    shutil.copytree(trained_run, run)
    path = run / "checkpoints" / "step_00000006" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    for use in (lambda: train(config, resume=True), lambda: load(run)):
        with pytest.raises(UserError, match=rf"is damaged: state\.json has {key}="):
            use()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "../index.json"])
def test_what_is_not_a_regular_file_is_not_opened(tmp_path: Path, name: str) -> None:
    final = save_checkpoint(tmp_path, make(1), keep=1, is_best=False)
    (final / name).unlink()
    os.mkfifo(final / name)
    with pytest.raises(UserError, match="is not a regular file"):
        load_checkpoint(tmp_path)


def test_state_holds_numbers_that_json_can_say(tmp_path: Path) -> None:
    state = make_state(3) | {"scaler": None}
    save_checkpoint(tmp_path, Checkpoint({}, {}, {}, state), keep=1, is_best=False)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded.state == state


class Killed(BaseException):
    pass


def killed_at(call: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> bool:
    """Do the work, and stop before the n-th change of files, counted from 0. Returns True if it was stopped."""
    calls = 0

    def counted(change: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: Any, **options: Any) -> object:
            nonlocal calls
            if calls == call:
                raise Killed
            calls += 1
            return change(*arguments, **options)

        return wrapped

    with monkeypatch.context() as patch:
        for owner, name in ((os, "unlink"), (os, "rmdir"), (os, "rename"), (os, "replace"), (Path, "unlink")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(Path, "replace", counted(Path.replace))
        try:
            work()
        except Killed:
            return True
    return False


def test_a_kill_at_any_moment_of_replacing_a_checkpoint_leaves_the_old_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refined checkpoint has the step of the one before it. A second kill may come while the first is mended."""
    old, new = make(6), replace(make(6), model={"w": torch.full((3,), 9.0)}, state=make_state(6) | {"best_score": 0.5})
    ends: set[tuple[bool, str]] = set()
    for call in range(100):
        for again in (None, 0, 1, 2, 3):
            run = tmp_path / f"run_{call}_{again}"
            save_checkpoint(run, make(5), keep=2, is_best=True)
            save_checkpoint(run, old, keep=2, is_best=False)
            stopped = killed_at(call, monkeypatch, lambda: save_checkpoint(run, new, keep=2, is_best=True))  # noqa: B023
            if again is not None:
                killed_at(again, monkeypatch, lambda: remove_leftovers(run))  # noqa: B023
            remove_leftovers(run)
            loaded = load_checkpoint(run)
            assert loaded is not None
            is_new = bool(torch.equal(loaded.model["w"], new.model["w"]))
            assert is_new or torch.equal(loaded.model["w"], old.model["w"])
            best = checkpoint_name(run, "best")
            assert best == "step_00000006" or not is_new  # a new one is never there without its place in the index
            assert load_checkpoint(run, "best") is not None
            assert {path.name for path in (run / "checkpoints").iterdir()} - {"index.json"} <= {
                "step_00000005",
                "step_00000006",
            }
            # The training repeats the save.
            save_checkpoint(run, new, keep=2, is_best=True)
            repeated = load_checkpoint(run, "best")
            assert repeated is not None and torch.equal(repeated.model["w"], new.model["w"])
            ends.add((stopped, "new" if is_new else "old"))
        if not stopped:
            break
    assert ends >= {(True, "old"), (True, "new"), (False, "new")}
