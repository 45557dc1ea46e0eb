"""Export a run into a folder that loads on any machine, and push it to the Hugging Face Hub.

An exported run is a run folder with what inference needs:

    config.yaml                       without the private paths of this machine
    checkpoints/                      one checkpoint without optimiser state
    metrics.json, readout.safetensors, recalibration.safetensors, surprise.safetensors
                                      if the run was evaluated at this checkpoint
    decoder.safetensors, decoder.json if the run has a decoder of this checkpoint
    README.md                         a model card
    encoder.pt2, rollout_step.pt2     on request, the networks as programs (worldmodel/runs/programs.py)
"""

import dataclasses
import tempfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from urllib.parse import urlsplit

from data_pipelines.errors import UserError, one_line_logger
from data_pipelines.files import remove, write_errors, write_text
from worldmodel.config import (
    Config,
    ImagesConfig,
    MovingMnistConfig,
    PairsFileConfig,
    PretrainedConfig,
    TrackingConfig,
    VideosConfig,
    to_yaml,
)
from worldmodel.evaluation.decoded import load_decoder, save_decoder, stored_facts
from worldmodel.evaluation.ordinary import load_ordinary, save_ordinary
from worldmodel.evaluation.readout import load_readout, save_readout
from worldmodel.evaluation.recalibration import load_recalibrations, save_recalibration
from worldmodel.runs.checkpoint import Checkpoint, export_checkpoint
from worldmodel.runs.folder import RunFolder
from worldmodel.runs.hub import check_upload, upload
from worldmodel.runs.metrics import Metrics, read_metrics, value_at, write_metrics
from worldmodel.runs.model_card import model_card
from worldmodel.runs.programs import write_programs
from worldmodel.runs.trained_run import TrainedRun

log = one_line_logger(__name__)


def export(run: TrainedRun, folder: str | Path, *, programs: bool = False) -> Path:
    """Write a loaded run into a new folder, from which `load` reads it on any machine.

    The optimiser state, the history of training and private paths are left out. Each omission is logged, and listed in
    README.md. The license is the user's to choose.

    Args:
        run: its loaded checkpoint is exported.
        folder: a new or an empty folder.
        programs: write encoder.pt2 and rollout_step.pt2 as well, which torch.export.load reads.

    Raises:
        UserError: the folder is not empty or cannot be written, or the networks cannot be exported as programs.

    Examples:
        >>> run = worldmodel.load("runs/demo", which="best")
        >>> worldmodel.export(run, "exported/demo")
        >>> worldmodel.load("exported/demo")
    """
    place = Path(folder).resolve()
    try:
        str(place).encode()
    except UnicodeEncodeError:
        raise UserError(f"{folder}: the name is not UTF-8, from which no run can be loaded: rename it") from None
    return _export(run, Path(folder), place.name, programs)


def push(run: TrainedRun, name: str, *, private: bool = True, programs: bool = False) -> str:
    """Export a loaded run and upload it to the Hugging Face Hub; return the URL of the repository.

    The repository is created if it does not exist. A run that it holds is replaced in a new commit. The token is that
    of `hf auth login` or of the variable HF_TOKEN.

    Args:
        run: its loaded checkpoint is uploaded.
        name: owner/name of the repository.
        private: True refuses a public repository. False creates a public one.
        programs: as in `export`.

    Raises:
        UserError: the name is not valid, there is no token, the upload fails, or as `export`.

    Examples:
        >>> worldmodel.push(worldmodel.load("runs/demo"), "owner/demo")
        >>> worldmodel.load("owner/demo")
    """
    check_upload(name)
    with tempfile.TemporaryDirectory() as temporary:
        return upload(_export(run, Path(temporary) / "run", name, programs), name, private=private)


def _export(run: TrainedRun, folder: Path, name: str, programs: bool) -> Path:
    """Export a run whose model card loads it by `name`."""
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: export to a new folder")
        config, left_out = portable_config(run.config, name.rpartition("/")[2])
        metrics, missing = _metrics_of(run)
        left_out += missing
        try:
            _write_files(run, folder, config, metrics, name, left_out)
            if programs:
                write_programs(folder, run.model, run.config.data)
        except (OSError, UserError):
            for path in folder.iterdir():  # the same call works once the cause is mended
                remove(path)
            raise
    for part in left_out:
        log.info("left out: %s", part)
    return folder


def _write_files(
    run: TrainedRun, folder: Path, config: Config, metrics: Metrics | None, name: str, left_out: list[str]
) -> None:
    teacher = {} if run.teacher is None else run.teacher.state_dict()
    export_checkpoint(folder, Checkpoint(run.training.state_dict(), teacher, {}, run.state))
    write_text(RunFolder(folder).config, to_yaml(config))
    if metrics is not None:
        write_metrics(folder, metrics)
        if RunFolder(run.folder).readout.is_file():
            save_readout(folder, *load_readout(run.folder, run.num_updates), run.num_updates)
        if spaces := load_recalibrations(run.folder, run.num_updates):
            save_recalibration(folder, spaces, run.num_updates)
        if (ordinary := load_ordinary(run.folder, run.num_updates)) is not None:
            save_ordinary(folder, ordinary, run.num_updates)
    facts = stored_facts(run.folder, run.num_updates)
    if facts is not None:
        save_decoder(folder, load_decoder(run.folder, run.config, run.num_updates), facts)
    write_text(folder / "README.md", model_card(run, config, metrics, name, left_out, facts is not None))


def _metrics_of(run: TrainedRun) -> tuple[Metrics | None, list[str]]:
    """Return the metrics of the loaded checkpoint, and what is left out."""
    always = ["the optimiser state, the history of training, and the hashes of the videos"]
    metrics = read_metrics(run.folder)
    if metrics is None:
        return None, [*always, "metrics: the run was not evaluated"]
    steps, refine_steps = value_at(metrics, "train.steps"), value_at(metrics, "train.refine_steps")
    if steps != run.state["step"]:
        return None, [*always, f"metrics: they belong to step {steps}, not to step {run.state['step']} of the weights"]
    if refine_steps not in (run.refine_steps, None):  # None: an earlier version evaluated it
        return None, [*always, f"metrics: they belong to {refine_steps} updates of refinement, not {run.refine_steps}"]
    return metrics, always


def portable_config(config: Config, name: str) -> tuple[Config, list[str]]:
    """Return the config without the private paths of this machine, and a list of what is left out.

    Of an absolute path only the last folder remains. A URL loses its user, password and query. `run_dir` becomes
    `name`, `train.encoder_cache` null, and the tracking settings the defaults.
    """
    data, left_out = config.data, []
    if isinstance(data, VideosConfig):
        root = data.root
        public = (
            public_path(root)
            if isinstance(root, str)
            else tuple(dataclasses.replace(part, path=public_path(part.path)) for part in root)
        )
        data = dataclasses.replace(data, root=public, remote_cache_dir=None)
    elif isinstance(data, ImagesConfig):
        relation = data.relation
        if isinstance(relation, PairsFileConfig):
            relation = dataclasses.replace(relation, path=public_path(relation.path))
        data = dataclasses.replace(data, root=public_path(data.root), relation=relation)
    elif isinstance(data, MovingMnistConfig) and data.mnist_dir is not None:
        data = dataclasses.replace(data, mnist_dir=public_path(data.mnist_dir))
    for key in ("root", "mnist_dir"):
        if getattr(data, key, None) != getattr(config.data, key, None):
            now = data.place if isinstance(data, VideosConfig) else getattr(data, key)
            left_out.append(f"the private part of data.{key}, which is now {now}")
    encoder = config.model.encoder
    if isinstance(encoder, PretrainedConfig) and encoder.path is not None and public_path(encoder.path) != encoder.path:
        log.warning("model.encoder.path=%s stays in config.yaml, because loading needs it", encoder.path)
    start_from = config.train.start_from and public_path(config.train.start_from)
    if start_from != config.train.start_from:
        left_out.append(f"the private part of train.start_from, which is now {start_from}")
    train = dataclasses.replace(config.train, encoder_cache=None, start_from=start_from)
    return dataclasses.replace(config, run_dir=name, data=data, train=train, tracking=TrackingConfig()), left_out


def public_path(path: str) -> str:
    """Return a path or URL without its private parts."""
    if "://" in path:
        parts = urlsplit(path)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(path).is_absolute() or kind(path).parts[:1] == ("~",) or ".." in kind(path).parts:
            return kind(path).name or "data"
    return path
