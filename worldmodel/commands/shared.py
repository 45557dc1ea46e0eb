"""Arguments that several commands share, and checks of arguments before the work begins."""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.errors import UserError, one_line, one_line_logger
from data_pipelines.files import check_writable, write_text
from data_pipelines.text_files import shown

if TYPE_CHECKING:
    import torch

    from worldmodel.runs.trained_run import TrainedRun

log = one_line_logger(__name__)

MAX_COUNT, MAX_SEED = 2**20, 10**18

# ------------------------------------------------------------------------------------------------------ arguments


def add_config(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add --config, which `load_config` takes, and --trust-code, which `trust_code` reads."""
    parser.add_argument(
        "--config", required=required, metavar="NAME", help="a shipped config, such as demo, or the path of a YAML file"
    )
    _add_trust_code(parser)


def add_run(parser: argparse.ArgumentParser, kind: str = "a trained run") -> None:
    """Add --run, --checkpoint, --device and --trust-code, with which `load_run` loads the run."""
    parser.add_argument("--run", type=Path, required=True, metavar="FOLDER", help=f"folder of {kind}")
    add_checkpoint(parser)
    parser.add_argument("--device", metavar="NAME", help="torch device (default: cuda if there is a GPU, else cpu)")


def _add_trust_code(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="run the classes that the config names as package.module:Class, also from the current folder",
    )


def add_video(parser: argparse.ArgumentParser) -> None:
    """Add --video, which `check_video` checks."""
    parser.add_argument("--video", type=Path, required=True, metavar="FILE", help="a video file")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add --checkpoint, and --trust-code, which `trust_code` reads."""
    parser.add_argument(
        "--checkpoint", choices=["latest", "best"], default="latest", help="checkpoint to load (default: latest)"
    )
    _add_trust_code(parser)


def add_programs(parser: argparse.ArgumentParser) -> None:
    """Add --programs."""
    parser.add_argument(
        "--programs", action="store_true", help="write the networks as programs of torch.export as well"
    )


def add_seed(parser: argparse.ArgumentParser, meaning: str) -> None:
    """Add --seed, which `check_seed` checks."""
    parser.add_argument("--seed", type=int, default=0, metavar="N", help=f"{meaning} (default: 0)")


def add_out(
    parser: argparse.ArgumentParser, meaning: str, *, metavar: str = "FOLDER", default: Path | None = None
) -> None:
    """Add --out: a folder to write into, or a file to write. It is required if there is no default."""
    parser.add_argument(
        "--out", type=Path, required=default is None, default=default, metavar=metavar, help=f"{meaning} to write"
    )


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Add --num-processes."""
    parser.add_argument(
        "--num-processes", type=int, metavar="N", help="processes that write videos (default: one per core)"
    )


def add_env(parser: argparse.ArgumentParser) -> None:
    """Add --env."""
    parser.add_argument(
        "--env", required=True, metavar="ID", help="id of the environment; MODULE:ID imports MODULE first"
    )


def add_env_kwargs(container: "argparse._ActionsContainer", meaning: str = "arguments of gymnasium.make") -> None:
    """Add --env-kwargs, which data_pipelines.worlds.recorder.parse_kwargs parses; None if it is not given."""
    container.add_argument("--env-kwargs", nargs="+", metavar="NAME=VALUE", help=meaning)


def add_overwrite(parser: argparse.ArgumentParser, what: str) -> None:
    """Add --overwrite."""
    parser.add_argument("--overwrite", action="store_true", help=f"replace {what}")


def add_overrides(parser: argparse.ArgumentParser, meaning: str, metavar: str = "key=value") -> None:
    """Add the positional arguments `overrides`."""
    parser.add_argument("overrides", nargs="*", metavar=metavar, help=meaning)


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add --data-root, which `load_run` reads, and --allow-remote, on which `check_remote` insists."""
    parser.add_argument(
        "--data-root", metavar="FOLDER", help="the run's videos, if they are no longer where its config says"
    )
    parser.add_argument(
        "--allow-remote", action="store_true", help="allow reading the run's videos from the URL in its config"
    )


# --------------------------------------------------------------------------------------------------------- checks


def trust_code(args: argparse.Namespace) -> bool:
    """Return True if the user allows code from outside of the project; it may then be in the current folder."""
    allowed: bool = args.trust_code
    if allowed and (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    return allowed


def load_run(args: argparse.Namespace) -> "TrainedRun":
    """Load the run of a command with `add_run`, on the videos of `add_data`, and warn if its training has not ended.

    Raises:
        UserError: this machine has no such device, or as `worldmodel.load`.
    """
    from worldmodel.runs.trained_run import load

    device = check_device(args.device)
    root = getattr(args, "data_root", None)
    run = load(args.run, which=args.checkpoint, device=device, trust_code=trust_code(args), data_root=root)
    warn_if_unfinished(args, run)
    return run


def warn_if_unfinished(args: argparse.Namespace, run: "TrainedRun") -> None:
    """Warn if the latest checkpoint of a run is not that of the end of its training."""
    if args.checkpoint == "latest" and (left := what_is_left(run)):
        log.warning("the training of %s has not ended: worldmodel train --resume continues it, with %s", args.run, left)


def what_is_left(run: "TrainedRun") -> str:
    """Return what is left of the training of a run, "" if nothing is."""
    train, step = run.config.train, run.state["step"]
    if step < train.steps:
        return f"{train.steps - step} of {train.steps} steps" + (" and the refinement" if train.refine_steps else "")
    return "the refinement" if train.refine_steps and not run.state.get("refined", False) else ""


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Check that these options, if given, are from 1 to MAX_COUNT.

    Raises:
        UserError: one is not.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if value is not None and value > MAX_COUNT:
            raise UserError(f"--{name.replace('_', '-')} must be at most {MAX_COUNT:,}, not {shown(value)}")


def check_seed(args: argparse.Namespace, name: str = "seed") -> None:
    """Check that this option is from 0 to MAX_SEED, as a random generator requires.

    Raises:
        UserError: it is not.
    """
    value = getattr(args, name)
    if not 0 <= value <= MAX_SEED:
        raise UserError(f"--{name.replace('_', '-')} must be from 0 to {MAX_SEED:,}, not {shown(value)}")


def check_device(name: str | None) -> "torch.device":
    """Return the device with this name; None chooses the GPU if there is one, otherwise the CPU.

    Raises:
        UserError: this machine has no such device.
    """
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.cpu()  # the device meta holds no values
        return probe.device
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"--device {name} cannot be used here: {one_line(error)}") from error


def check_video(path: Path) -> None:
    """Check that a path leads to a regular file.

    Raises:
        UserError: it does not.
    """
    try:
        is_file, exists = path.is_file(), path.exists()
    except (OSError, ValueError) as error:  # a name that is too long, or has a NUL
        raise UserError(f"--video {path}: {one_line(error)}") from error
    if not is_file:
        raise UserError(f"--video {path}: " + ("it is not a regular file" if exists else "there is no such file"))


def make_out_folder(path: Path, name: str = "") -> None:
    """Create the folder of the results before the work begins. Messages call it `name`, by default --out PATH.

    Raises:
        UserError: it cannot be created, or files cannot be written into it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        check_writable(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write to {name or f'--out {path}'}: {one_line(error)}") from error


def check_out_file(path: Path, suffix: str, option: str = "--out") -> None:
    """Create the folder of a result file before the work begins.

    suffix: the end of the file's name, such as ".npz", in lower or upper case.

    Raises:
        UserError: the name ends otherwise, or the file cannot be written.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"cannot write to {option} {path}: it is not a regular file")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write to {option} {path}: {one_line(error)}") from error
    if path.suffix.lower() != suffix:
        raise UserError(f"cannot write to {option} {path}: the name must end in {suffix}")
    make_out_folder(path.parent, f"{option} {path}")


def check_remote(url: str | None, is_allowed: bool) -> None:
    """Log the host from which a run's videos are read. The run may be a stranger's: the user must agree first.

    Raises:
        UserError: the videos are behind a URL, and the user has not agreed.
    """
    if url is None:
        return
    from data_pipelines.remote.stores import check_url, host_of

    check_url(url)
    host = host_of(url)
    if not is_allowed:
        raise UserError(
            f"the run's config names videos at {host!r}: --allow-remote reads them, with your credentials for that host"
        )
    log.info("reading videos from %s", host)


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a command's result as JSON.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        write_text(path, json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
