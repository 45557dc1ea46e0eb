"""Train a model. Write checkpoints, metrics.jsonl and config.yaml into the config's run_dir.

example:
  worldmodel train --config demo data.root=data/moving_mnist train.steps=400

on two GPUs, and in two processes on CPUs, with DDP:
  accelerate launch --num_processes 2 -m worldmodel train --config demo
  torchrun --nproc_per_node 2 -m worldmodel train --config demo
"""

import argparse
import sys
from pathlib import Path
from shlex import quote

from data_pipelines.errors import UserError
from data_pipelines.processes import environment_int
from worldmodel.commands.process import prepare_process, stop_signals
from worldmodel.commands.shared import add_config, add_overrides, add_overwrite, trust_code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--resume", action="store_true", help="continue from the latest checkpoint, if there is one")
    add_overwrite(parser, "the run in run_dir")
    parser.add_argument("--profile", action="store_true", help="profile a few steps into RUN/profile/")
    add_overrides(parser, "values that replace the config's, such as train.lr=1e-3; `worldmodel config` lists the keys")


def run(args: argparse.Namespace) -> int:
    from worldmodel.config import load_config
    from worldmodel.training.loop import train
    from worldmodel.training.session import Interrupted

    config = load_config(args.config, args.overrides, trust_code=trust_code(args))
    check_folder(getattr(config.data, "root", None), args.config)
    hints = error_hints(Path(config.run_dir))
    try:
        prepare_process(config.train, Path(config.run_dir) if args.resume else None)
        with stop_signals() as stop:
            train(config, resume=args.resume, overwrite=args.overwrite, profile=args.profile, stop=stop)
        if environment_int("RANK", 0) == 0:
            print(f"{config.run_dir}: trained; worldmodel evaluate --run {quote(config.run_dir)} scores it")
    except Interrupted as interrupted:
        print(f"stopped by {interrupted}; continue with --resume", file=sys.stderr)
        return interrupted.exit_code
    except tuple(hints) as error:
        raise UserError(f"{error}: {hints[type(error)]}") from error
    return 0


def check_folder(root: object, config: str) -> None:
    """Check that the folder `data.root` exists, if a comment of the config has the command that writes it.

    Raises:
        UserError: the folder is missing; the message shows the command.
    """
    from worldmodel.config.shipped import command_for_data, find_config

    command = command_for_data(find_config(config)) or ""
    if isinstance(root, str) and f"--out {root} " in f"{command} " and not Path(root).exists():
        raise UserError(f"data root '{root}' does not exist: `{command}` writes it")


def error_hints(run: Path) -> dict[type[UserError], str]:
    """Return what to do about errors of training in a run folder, in terms of this command."""
    from worldmodel.runs.checkpoint import VideosChangedError
    from worldmodel.runs.folder import RunFolder
    from worldmodel.runs.opening import OtherConfigError, RunExistsError
    from worldmodel.runs.tracking import RowLostError
    from worldmodel.training.launch import ConnectionLostError

    return {
        RunExistsError: "--resume continues it, --overwrite replaces it",
        OtherConfigError: f"--config {RunFolder(run).config} continues it, or choose another run_dir",
        VideosChangedError: "restore them, or start again with --overwrite",
        ConnectionLostError: "remove it, and continue with --resume",
        RowLostError: "make room, and continue with --resume",
    }
