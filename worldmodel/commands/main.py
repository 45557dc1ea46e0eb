"""The `worldmodel` command: find the named command, parse its arguments and run it.

To add a command, write a module in this folder with a docstring that contains an example, `add_arguments(parser)` and
`run(args)`, and add a line to COMMANDS; `label-motion` is the module `label_motion`. A module imports torch, and
everything that imports torch, inside `run`: `--help` must answer within a second.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import worldmodel
from data_pipelines.errors import UserError, did_you_mean
from worldmodel.commands.exits import leave, report_errors

COMMANDS = {
    "videos": "write a known world: moving-mnist, kicked-mnist, occlusion, ...",
    "record": "record a Gymnasium environment as videos with actions and states",
    "index": "index a folder of videos, in parts if it is large",
    "convert": "convert images, HDF5, npz, GIF, Lance or LeRobot v2 to videos",
    "shards": "pack a folder of videos into tar shards for streaming",
    "label-motion": "label videos with the positions of what moves in them",
    "inspect": "describe videos, shards, a LeRobot data set or a run; list runs",
    "config": "print the reference of the config keys",
    "train": "train a model from a config",
    "evaluate": "score the forecasts of a run and write its report",
    "rollout": "sample futures of a video, as embeddings",
    "embed": "write the embeddings of a collection of videos as Parquet",
    "surprise": "score every transition of a video by its surprise",
    "influence": "find the training clips that influenced a forecast",
    "decode": "train a decoder, and show sampled futures as pictures",
    "plan": "reach goal images in an environment by planning with a run",
    "export": "export a run into a folder that loads on any machine",
    "push": "upload a run to the Hugging Face Hub",
    "compare": "train and compare a grid of objectives, latents and seeds",
    "reproduce": "rerun the tables of docs/results.md and compare their figures",
}


def run_command(*first: str) -> NoReturn:
    """Run the command of sys.argv, preceded by the arguments `first`, and end this process with its exit code.

    Into a file or pipe, progress bars write a line every ten seconds. A user's own TQDM_MININTERVAL wins.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # read when a command imports tqdm
    leave(main([*first, *sys.argv[1:]]))


def main(argv: Sequence[str]) -> int:
    """Run a command and return its exit code.

    argv: the command's name and its arguments.

    Raises:
        SystemExit: the command ended early, with code 2 after a user's mistake.
    """
    with report_errors():
        name, *arguments = argv or ["--help"]
        if name in ("-h", "--help", "help"):
            print(overview())
            return 0
        if name == "--version":
            print(f"worldmodel {worldmodel.__version__}")
            return 0
        if name not in COMMANDS:
            hint = did_you_mean(name, COMMANDS)
            raise UserError(f"{name!r} is not a command{hint}: `worldmodel --help` lists the commands")
        module = import_module(f"worldmodel.commands.{name.replace('-', '_')}")
        parser = argparse.ArgumentParser(
            prog=f"worldmodel {name}",
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(parser)
        code: int | None = module.run(parsed(parser, arguments))
        return code or 0


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of a command: overrides may stand between options, and "--" precedes names such as -x.mp4."""
    if "--" in arguments:  # of which parse_intermixed_args forgets that it was there
        return parser.parse_args(arguments)
    return parser.parse_intermixed_args(arguments)


def overview() -> str:
    """Return the help of the command as a whole."""
    return "\n".join(
        [
            "usage: worldmodel COMMAND [ARGUMENT ...]",
            "Train stochastic world models on video, forecast and plan with them.",
            "",
            *(f"  {name:<12} {summary}" for name, summary in COMMANDS.items()),
            "worldmodel COMMAND --help describes a command and shows an example.",
        ]
    )
