"""Open the folder of a run for training, and read its config."""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipelines.errors import UserError
from data_pipelines.files import remove, write_text
from data_pipelines.text_files import dump_yaml, shown
from worldmodel.config import Config, changed_keys, read_tree, to_dict, to_yaml, validate
from worldmodel.runs.checkpoint import STEP_NAME
from worldmodel.runs.folder import RunFolder

# Keys that a resume may change, because they do not change the result.
RESUMABLE_CHANGES = frozenset(
    {
        "run_dir",
        "data.cache_mb",
        "data.num_workers",
        "model.encoder.checkpoint_activations",
        "train.log_every",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.timeout_s",
        "train.compile",
        "train.encoder_cache_gb",
        "tracking.wandb",
        "tracking.project",
    }
)
MAX_CHANGES = 8  # of a config, in a message


class RunExistsError(UserError):
    """The run folder of a new training already holds a run."""


class OtherConfigError(UserError):
    """The run folder holds a run of another config."""


def open_run(run: Path, config: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False) -> None:
    """Create or open the folder of a run, and write its config.yaml.

    A run that ended before it learned anything, as by a mistake in its config, is replaced without `overwrite`. A
    config.yaml that a person wrote is not such a run, and `resume` leaves it as it is.

    Args:
        config: the resolved config, as nested dicts.
        resume: accept a folder that holds a run of the same config.
        overwrite: remove the run that the folder holds.

    Raises:
        RunExistsError: the folder holds a run, and neither flag is given.
        OtherConfigError: the folder holds a run of another config, and `resume` is given.
        UserError: the folder holds files that are not of a run, or cannot be written.
    """
    files = RunFolder(run)
    begun = {files.lock.name, f".{files.config.name}.partial"}  # a kill may leave these in a new folder
    if run.is_dir() and {path.name for path in run.iterdir()} - begun and not files.config.is_file():
        raise UserError(f"run_dir={run} is not empty and does not hold a run: choose another folder")
    try:
        if files.config.is_file():
            if overwrite or (_has_learned_nothing(files) and _has_resolved_config(files)):
                _remove_run(run)
            elif not resume:
                raise RunExistsError(f"run_dir={run} already holds a run")
            else:
                saved = to_dict(load_run_config(run))
                _check_same_config(saved, config, run)
                if saved == config:
                    return
        run.mkdir(parents=True, exist_ok=True)
        write_text(files.config, dump_yaml(config))
    except OSError as error:
        raise UserError(f"cannot write to run_dir={run}: {error.strerror or error}") from error


def _has_learned_nothing(files: RunFolder) -> bool:
    """Return whether a run folder holds no more than a training leaves that fails before its first row of metrics."""
    at_start = {files.config, files.lock, files.history, files.contents, files.wandb}
    return set(files.path.iterdir()) <= at_start and not (files.history.exists() and files.history.stat().st_size)


def _has_resolved_config(files: RunFolder) -> bool:
    """Return whether config.yaml is as a training writes it: with all keys, and without comments."""
    with suppress(UserError):
        return files.config.read_bytes() == to_yaml(load_run_config(files.path)).encode()
    return False


def _remove_run(run: Path) -> None:
    """Remove the files of a run from its folder, the config last. The lock stays.

    Raises:
        UserError: config.yaml is not valid, or the folder holds an entry that does not belong to a run.
    """
    load_run_config(run)
    entries = sorted(run.iterdir())
    files = RunFolder(run)
    foreign = [path for path in entries if not _is_of_a_run(files, path)] or _foreign_in(files.checkpoints)
    if foreign:
        raise UserError(
            f"run_dir={run} holds '{foreign[0].relative_to(run)}', which does not belong to a run: move it away, or "
            "choose another folder"
        )
    for path in sorted(entries, key=lambda path: path == files.config):
        if path != files.lock:
            remove(path)


def _is_of_a_run(files: RunFolder, path: Path) -> bool:
    is_partial = path.name.endswith(".partial")
    named = path.with_name(path.name.removeprefix(".").removesuffix(".partial")) if is_partial else path
    return (
        named in files.files
        or named == files.lock
        or named.name == "writable"
        or (named in files.folders and path.is_dir())
    )


def _foreign_in(checkpoints: Path) -> list[Path]:
    """Return the entries of the checkpoint folder that are not checkpoints."""
    if checkpoints.is_symlink():
        return [checkpoints]
    return [
        path
        for path in (sorted(checkpoints.iterdir()) if checkpoints.is_dir() else [])
        if not re.fullmatch(rf"\.?({STEP_NAME.pattern}|index\.json)(\.partial|\.replaced)?", path.name)
    ]


def load_run_config(run: str | Path) -> Config:
    """Read the resolved config of a run.

    Raises:
        UserError: the folder does not hold a run, or its config is damaged.
    """
    path = RunFolder(run).config
    if not path.is_file():
        raise UserError(f"no run in {run}: {path} does not exist")
    return validate(read_tree(path), source=str(path))


def _check_same_config(saved: Mapping[str, Any], given: Mapping[str, Any], run: Path) -> None:
    if changes := lasting_changes(saved, given):
        more = [f"and {len(changes) - MAX_CHANGES} more"] if len(changes) > MAX_CHANGES else []
        raise OtherConfigError(
            f"run_dir={run} was trained with another config: {'; '.join([*changes[:MAX_CHANGES], *more])}"
        )


def lasting_changes(saved: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Return the changes between two configs (`to_dict`) that prevent a resume, each as "key=before, now after"."""
    return [
        f"{key}={shown(before)}, now {shown(now)}"
        for key, (before, now) in changed_keys(saved, given).items()
        if key not in RESUMABLE_CHANGES
    ]
