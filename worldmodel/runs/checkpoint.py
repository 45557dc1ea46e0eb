"""The checkpoints of a run: writing, reading and removing them.

    run/checkpoints/index.json            {"latest": name, "best": name, "kept": [names]}
    run/checkpoints/step_00001000/        model, teacher, optimizer (.safetensors), state.json

Every file is written under a temporary name, flushed to disk and renamed. A kill or a full disk at any moment therefore
leaves the previous checkpoint intact. Nothing here is ever unpickled.

A run folder may be untrusted. Its entries become paths only if their names are those that a run gives, nothing is
written or removed through a link, and only files that are named here are removed.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from data_pipelines.errors import UserError, one_line
from data_pipelines.files import check_regular, read_text, remove, write_bytes, write_text
from data_pipelines.text_files import shown
from worldmodel.runs.folder import RunFolder
from worldmodel.training.finite import ADVICE, not_finite

_WEIGHT_FILES = ("model", "teacher", "optimizer")
_PART_NAMES = frozenset({*(f"{part}.safetensors" for part in _WEIGHT_FILES), "state.json"})
EXPORTED_FILES = ("model.safetensors", "teacher.safetensors", "state.json")
"""The files of a checkpoint that inference needs."""

_OPTIONAL_STATE = {
    "refined": bool,
    "awaits_evaluation": bool,
    "exported": bool,
    "scaler": dict,
    "step_flops": int | float,
    "num_threads": int,
    "num_cores": int,
}
"""Values of state.json that runs of earlier versions lack, by type."""

STEP_NAME = re.compile(r"step_\d{8,12}")
MAX_STATE_BYTES = 2**20


class VideosChangedError(UserError):
    """The videos of a run have changed since its checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and the state: step, updates, train_seconds, stream fingerprint, best score."""

    model: dict[str, Tensor]
    teacher: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def updates_of(state: Mapping[str, Any]) -> int:
    """Return the updates of training and refinement that a checkpoint has seen.

    Refined checkpoints of earlier versions do not state those of refinement, and neither do the results in their runs.
    """
    updates: int = state.get("updates", state["step"])
    return updates


def name_of(state: Mapping[str, Any]) -> str:
    """Return the name of a checkpoint's folder."""
    return f"step_{updates_of(state):08d}"


def save_checkpoint(run: Path, checkpoint: Checkpoint, *, keep: int, is_best: bool) -> Path:
    """Write a checkpoint under a temporary name and rename it. Then remove all but the last `keep` and the best.

    One with as many updates is kept under another name until the index is written: `remove_leftovers` puts it back
    after a kill in between.

    Raises:
        UserError: a value is not finite, or the disk is full or not writable. Earlier checkpoints stay intact.
    """
    check_finite(checkpoint.state["step"], **{part: getattr(checkpoint, part) for part in _WEIGHT_FILES})
    folder = RunFolder(run).checkpoints
    name = name_of(checkpoint.state)
    aside, replaced = folder / f".{name}.partial", folder / f".{name}.replaced"
    if folder.is_symlink():
        raise UserError(f"{folder} is a link, and checkpoints are not written through links: replace it by a folder")
    index = _read_index(run)
    try:
        remove(aside)
        aside.mkdir(parents=True)
        _write_parts(aside, checkpoint, _WEIGHT_FILES)
        final = folder / name
        if os.path.lexists(final):
            remove(replaced)
            final.rename(replaced)
        aside.rename(final)
        kept = [*(other for other in index["kept"] if other != name), name]
        best = name if is_best else index["best"]
        doomed = [other for other in kept[:-keep] if other != best]
        kept = [other for other in kept if other not in doomed]
        _write_index(run, {"latest": name, "best": best, "kept": kept})
    except OSError as error:
        with suppress(OSError):
            remove(aside)
            _put_back(replaced)
        before = _read_index(run)["latest"]
        intact = f"; the checkpoint {before} is intact" if before else ""
        raise UserError(f"cannot save a checkpoint in {folder}: {error.strerror or error}{intact}") from error
    with suppress(OSError):
        remove(replaced)
    for other in doomed:
        if _is_checkpoint(folder / other):
            with suppress(OSError):
                remove(folder / other)
    return final


def _put_back(replaced: Path) -> None:
    """Undo a save that was to replace a checkpoint of the same step, unless it had begun to remove the old one."""
    if not all((replaced / name).is_file() for name in _PART_NAMES):
        return
    final = replaced.with_name(replaced.name.removeprefix(".").removesuffix(".replaced"))
    remove(final)
    replaced.rename(final)


def export_checkpoint(run: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint without optimiser state into a new run folder, as its only one.

    Raises:
        OSError: it cannot be written.
    """
    name = name_of(checkpoint.state)
    folder = RunFolder(run).checkpoints / name
    folder.mkdir(parents=True)
    exported = dataclasses.replace(checkpoint, state=checkpoint.state | {"exported": True})
    _write_parts(folder, exported, ("model", "teacher"))
    _write_index(run, {"latest": name, "best": name, "kept": [name]})


def _write_parts(folder: Path, checkpoint: Checkpoint, parts: Sequence[str]) -> None:
    for part in parts:
        tensors = {key: value.detach().cpu().contiguous() for key, value in getattr(checkpoint, part).items()}
        write_bytes(folder / f"{part}.safetensors", serialise(tensors))
    write_text(folder / "state.json", json.dumps(checkpoint.state, indent=1))


def check_finite(step: int, **parts: Mapping[str, Tensor]) -> None:
    """Check the tensors of a checkpoint before it is saved.

    Raises:
        UserError: a value is not finite.
    """
    for part, tensors in parts.items():
        if name := not_finite(tensors):
            raise UserError(
                f"the {part} is not finite after step {step}, first in {name}: {ADVICE}; earlier checkpoints are intact"
            )


def _is_checkpoint(path: Path) -> bool:
    """Return True if this is a checkpoint that a run wrote."""
    is_named = STEP_NAME.fullmatch(path.name) is not None
    return is_named and path.is_dir() and not path.is_symlink() and (path / "state.json").is_file()


def remove_leftovers(run: Path) -> None:
    """Remove the leftovers of a kill from a run folder: temporary files, and checkpoints that the index does not name.

    A checkpoint whose replacement was not completed is put back. Call it while no training writes there. If the latest
    checkpoint of the index is missing, all checkpoints stay.

    Raises:
        UserError: the index is damaged.
    """
    folder = RunFolder(run).checkpoints
    aside = [path.with_name(f".{path.name}.partial") for path in RunFolder(run).files]
    leftovers = [path for path in aside if path.is_file() and not path.is_symlink()]
    if folder.is_dir() and not folder.is_symlink():
        index = _read_index(run)
        for path in list(folder.glob("*.replaced")):
            if _is_partial(path):
                with suppress(OSError):
                    _put_back(path)
        named = {index["latest"], index["best"], *index["kept"]}
        has_latest = index["latest"] is not None and _is_checkpoint(folder / index["latest"])
        for path in folder.iterdir():
            is_orphan = has_latest and path.name not in named and (_is_checkpoint(path) or _is_half_removed(path))
            if is_orphan or _is_partial(path):
                leftovers.append(path)
    for path in leftovers:
        with suppress(OSError):
            remove(path)


def _is_half_removed(path: Path) -> bool:
    """Return True if this is the rest of a checkpoint whose removal was interrupted."""
    return STEP_NAME.fullmatch(path.name) is not None and _holds_parts_only(path)


def _is_partial(path: Path) -> bool:
    """Return True if this is a file or folder that a run began to write."""
    if path.name == ".index.json.partial":
        return path.is_file() and not path.is_symlink()
    is_named = re.fullmatch(rf"\.{STEP_NAME.pattern}\.(partial|replaced)", path.name) is not None
    return is_named and _holds_parts_only(path)


def _holds_parts_only(path: Path) -> bool:
    """Return True for a folder that holds parts of a checkpoint only, complete or not."""
    is_folder = path.is_dir() and not path.is_symlink() and os.access(path, os.R_OK | os.X_OK)
    return is_folder and all(
        inner.name.removeprefix(".").removesuffix(".partial") in _PART_NAMES for inner in path.iterdir()
    )


def checkpoint_name(run: Path, which: Literal["latest", "best"] = "latest") -> str | None:
    """Return the name of a checkpoint's folder, or None if there is no checkpoint yet.

    Raises:
        UserError: the index is damaged.
    """
    name: str | None = _read_index(run)[which]
    return name


def load_checkpoint(
    run: Path, which: Literal["latest", "best"] = "latest", *, with_optimizer: bool = True
) -> Checkpoint | None:
    """Read the checkpoint that index.json names, or return None if there is none yet.

    with_optimizer: False leaves `optimizer` empty. Inference does not need it.

    Raises:
        UserError: a file of the checkpoint is missing or damaged, a weight is not finite, or the run was exported
            without the optimiser state that is asked for.
    """
    name = checkpoint_name(run, which)
    if name is None:
        return None
    folder = RunFolder(run).checkpoints / name
    parts = _WEIGHT_FILES if with_optimizer else ("model", "teacher")
    tensors: dict[str, dict[str, Tensor]] = {"optimizer": {}}
    with _damage_reported(folder):
        state = _read_state(folder)
        if with_optimizer and state.get("exported"):
            raise UserError(f"the run {run} was exported without optimiser state: its training cannot be continued")
        for part in parts:
            check_regular(folder / f"{part}.safetensors")
        tensors |= {part: load_file(folder / f"{part}.safetensors") for part in parts}
    if bad := not_finite(tensors["model"] | {f"teacher/{key}": value for key, value in tensors["teacher"].items()}):
        raise UserError(f"checkpoint {folder} holds weights that are not finite, first in {bad}: train the run again")
    return Checkpoint(**tensors, state=state)


def first_difference(
    here: Mapping[str, Tensor], there: Mapping[str, Tensor]
) -> tuple[str, list[int] | None, list[int] | None] | None:
    """Return the first name at which tensors differ in shape, and both shapes, or None. The shape of none is None."""
    for name in sorted(here.keys() | there.keys()):
        own, other = (list(tensors[name].shape) if name in tensors else None for tensors in (here, there))
        if own != other:
            return name, own, other
    return None


def check_shapes(
    described: Mapping[str, Tensor], stored: Mapping[str, Tensor], run: str | Path, without: str | None = None
) -> None:
    """Compare the shapes of stored tensors with those that the config describes. Names with `without` are left out.

    without: the beginning of these names.

    Raises:
        UserError: shapes or names differ.
    """
    compared = (
        {name: tensor for name, tensor in tensors.items() if without is None or not name.startswith(without)}
        for tensors in (described, stored)
    )
    if difference := first_difference(*compared):
        name, *shapes = difference
        ours, theirs = ("nothing" if shape is None else shape for shape in shapes)
        raise UserError(
            f"the checkpoint of {run} does not fit its config.yaml: it holds {theirs} for {name}, not {ours}"
        )


def check_fits(
    checkpoint: Checkpoint, model: Mapping[str, Tensor], teacher: Mapping[str, Tensor], run: str | Path
) -> None:
    """Compare a checkpoint with the networks that it is to be loaded into, whose state dicts are `model` and `teacher`.

    A fused optimiser steps through a weight and its moments together, and would read beyond moments that are smaller.

    Raises:
        UserError: shapes or names differ, as those of a run whose config.yaml was edited.
    """
    check_shapes(model, checkpoint.model, run)
    if teacher:
        check_shapes(teacher, checkpoint.teacher, run)
    scalar = torch.empty(())
    owners = {name: name.rpartition("/")[0] for name in checkpoint.optimizer}
    described = {
        name: scalar if name == f"{owner}/step" else model[owner] for name, owner in owners.items() if owner in model
    }
    check_shapes(described, checkpoint.optimizer, run)


def latest_state(run: Path) -> dict[str, Any] | None:
    """Return the state of the latest checkpoint of a run, or None without a checkpoint.

    Raises:
        UserError: state.json is missing or damaged.
    """
    name = checkpoint_name(run)
    if name is None:
        return None
    folder = RunFolder(run).checkpoints / name
    with _damage_reported(folder):
        return _read_state(folder)


@contextmanager
def _damage_reported(folder: Path) -> Iterator[None]:
    """Turn the errors of reading a checkpoint into one line. Raises UserError: a file of it is missing or damaged."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"checkpoint {folder} is damaged: {one_line(error)}") from error


def hash_of_tensors(tensors: Mapping[str, Tensor], kind: str = "") -> str:
    """Return 16 hexadecimal digits of a hash of the names, types, shapes and values of tensors, and of `kind`."""
    digest = hashlib.sha256(kind.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _read_state(folder: Path) -> dict[str, Any]:
    """Return the state of a checkpoint. Raises ValueError: it is not an object, or a value is missing or not valid."""
    state = json.loads(read_text(folder / "state.json", MAX_STATE_BYTES))
    if not isinstance(state, dict):
        raise ValueError("state.json is not a JSON object")
    counts = [state.get("step"), state.get("updates", state.get("step"))]
    is_step = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 10**12 for n in counts)
    is_number = all(isinstance(state.get(key), int | float) for key in ("train_seconds", "best_score"))
    if not (is_step and is_number and isinstance(state.get("stream"), str)):
        raise ValueError("state.json lacks a valid step, train_seconds, best_score or stream")
    for key, kind in _OPTIONAL_STATE.items():
        if not isinstance(state.get(key), kind | None):
            raise ValueError(f"state.json has {key}={shown(state[key])}")
    return state


def _read_index(run: Path) -> dict[str, Any]:
    path = RunFolder(run).checkpoint_index
    if not os.path.lexists(path):
        name = _only_checkpoint(path.parent)
        return {"latest": name, "best": name, "kept": [name] if name else []}
    try:
        index = json.loads(read_text(path, MAX_STATE_BYTES))
        kept = list(index["kept"])
        names = [*(name for name in (index["latest"], index["best"]) if name is not None), *kept]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {str(error)[:80]}): restore it") from error
    for name in names:
        # Names become paths: an untrusted run folder must not point outside itself.
        if not (isinstance(name, str) and STEP_NAME.fullmatch(name)):
            raise UserError(f"{path} names {str(name)[:80]!r}, which is not a checkpoint of a run")
    return {"latest": index["latest"], "best": index["best"], "kept": kept}


def _only_checkpoint(folder: Path) -> str | None:
    """Return the name of the checkpoint in a folder without an index, or None. A kill before its index leaves one.

    Raises:
        UserError: there are several checkpoints.
    """
    found = [path.name for path in sorted(filter(_is_checkpoint, folder.glob("step_*")))]
    if len(found) > 1:
        raise UserError(
            f"{folder / 'index.json'}, which names the latest and the best checkpoint, is missing, but {len(found)} "
            f"checkpoints are there, up to {found[-1]}: restore it, such as by copying the run again"
        )
    return found[0] if found else None


def _write_index(run: Path, index: Mapping[str, Any]) -> None:
    write_text(RunFolder(run).checkpoint_index, json.dumps(index, indent=1))
