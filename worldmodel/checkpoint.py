"""A run folder: the resolved config, metrics.jsonl and checkpoints.

    run/config.yaml                       the resolved config
    run/metrics.jsonl                     one row a log or evaluation
    run/videos.jsonl                      hashes of the videos and labels, compared on a resume (worldmodel/data.py)
    run/checkpoints/index.json            {"latest": name, "best": name, "kept": [names]}
    run/checkpoints/step_00001000/        model, teacher, optimizer (.safetensors), state.json

Everything is written aside, flushed to disk and renamed, so a kill or a full disk at any moment leaves the previous
checkpoint whole. Nothing here is ever unpickled.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor, nn

from data_pipelines.errors import UserError
from worldmodel.config import Config, flatten, to_dict, to_yaml, validate
from worldmodel.sharding import shared_like

# What may differ between a checkpoint's config and the one it is resumed with: nothing that changes the result.
RESUMABLE_CHANGES = frozenset(
    {
        "run_dir",
        "data.cache_mb",
        "data.num_workers",
        "model.checkpoint_activations",
        "train.log_every",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.timeout_s",
        "train.compile",
        "tracking.wandb",
        "tracking.project",
    }
)
_WEIGHT_FILES = ("model", "teacher", "optimizer")


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and the small state: step, train_seconds, stream fingerprint, best score."""

    model: dict[str, Tensor]
    teacher: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


# --------------------------------------------------------------------------------------------------- run folders


def open_run(config: Config, *, resume: bool = False, overwrite: bool = False) -> Path:
    """The folder for a training run, holding config.yaml.

    Raises:
        UserError: the folder holds another run and neither flag is given, holds something that is no run, or was
            made by another config than the one to resume with.
    """
    run = Path(config.run_dir)
    if run.is_dir() and any(run.iterdir()) and not (run / "config.yaml").is_file():
        raise UserError(f"run_dir={run} is not empty and holds no run: choose another folder")
    if (run / "config.yaml").is_file():
        if overwrite:
            shutil.rmtree(run)
        elif resume:
            _check_same_config(load_run_config(run), config, run)
        else:
            raise UserError(
                f"run_dir={run} already holds a run: pass --resume to go on with it, --overwrite to replace it"
            )
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_text(run / "config.yaml", to_yaml(config))
    except OSError as error:
        raise UserError(f"cannot write to run_dir={run}: {error.strerror}") from error
    return run


def load_run_config(run: str | Path) -> Config:
    """The resolved config of a run.

    Raises:
        UserError: no run is there, or its config is damaged.
    """
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise UserError(f"no run in {run}: {path} does not exist")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no valid YAML") from error
    return validate(tree, source=str(path))


def _check_same_config(saved: Config, given: Config, run: Path) -> None:
    before, now = flatten(to_dict(saved)), flatten(to_dict(given))
    for key in before:
        if before[key] != now[key] and key not in RESUMABLE_CHANGES:
            raise UserError(
                f"run_dir={run} was trained with {key}={before[key]!r}, the config says {now[key]!r}: "
                "resume with the same config, or choose another run_dir"
            )


# --------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(run: Path, checkpoint: Checkpoint, *, keep: int, is_best: bool) -> Path:
    """Write a checkpoint aside and rename it; then drop all but the last `keep` and the best.

    Raises:
        UserError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    folder = run / "checkpoints"
    name = f"step_{checkpoint.state['step']:08d}"
    aside = folder / f".{name}.partial"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for part in _WEIGHT_FILES:
            tensors = {key: value.detach().cpu().contiguous() for key, value in getattr(checkpoint, part).items()}
            write_bytes(aside / f"{part}.safetensors", serialise(tensors))
        write_text(aside / "state.json", json.dumps(checkpoint.state, indent=1))
        final = folder / name
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        index = _read_index(run)
        kept = [*(other for other in index["kept"] if other != name), name]
        best = name if is_best else index["best"]
        doomed = [other for other in kept[:-keep] if other != best]
        kept = [other for other in kept if other not in doomed]
        _write_index(run, {"latest": name, "best": best, "kept": kept})
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        before = _read_index(run)["latest"]
        intact = f"; the checkpoint {before} is intact" if before else ""
        raise UserError(f"cannot save a checkpoint in {folder}: {error.strerror or error}{intact}") from error
    for other in doomed:
        shutil.rmtree(folder / other, ignore_errors=True)
    return final


def load_checkpoint(run: Path, which: Literal["latest", "best"] = "latest") -> Checkpoint | None:
    """The checkpoint that index.json names, or None where there is none yet.

    Raises:
        UserError: a file of it is missing or damaged.
    """
    name = _read_index(run)[which]
    if name is None:
        return None
    folder = run / "checkpoints" / name
    try:
        tensors = {part: load_file(folder / f"{part}.safetensors") for part in _WEIGHT_FILES}
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"checkpoint {folder} is damaged: {error}") from error
    return Checkpoint(**tensors, state=state)


def _read_index(run: Path) -> dict[str, Any]:
    path = run / "checkpoints" / "index.json"
    if not path.is_file():
        return {"latest": None, "best": None, "kept": []}
    index = json.loads(path.read_text(encoding="utf-8"))
    for name in [index["latest"], index["best"], *index["kept"]]:
        # Names become paths: a run folder from elsewhere must not point outside itself.
        if name is not None and (not isinstance(name, str) or Path(name).name != name):
            raise UserError(f"{path} names a checkpoint outside the run: {name!r}")
    return index


def _write_index(run: Path, index: Mapping[str, Any]) -> None:
    write_text(run / "checkpoints" / "index.json", json.dumps(index, indent=1))


# ------------------------------------------------------------------------------------ optimiser state as tensors


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Optimiser state keyed "parameter name/state name", independent of the order of parameter groups."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`, for an optimiser that keeps its state on its parameters' device."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for name, tensor in tensors.items():
        parameter_name, key = name.rsplit("/", 1)
        parameter = parameters[parameter_name]
        if tensor.shape == parameter.shape:
            # Moments lie in memory as their parameter does: fused kernels walk both side by side.
            optimizer.state[parameter][key] = torch.empty_like(parameter).copy_(shared_like(tensor, parameter))
        else:
            optimizer.state[parameter][key] = tensor.to(parameter.device, copy=True)


# --------------------------------------------------------------------------------------------------------- files


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file as a whole: readers see the old content or the new, also after a crash."""
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
