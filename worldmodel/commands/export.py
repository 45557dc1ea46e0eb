"""Export a run into a folder that loads on any machine, with a model card.

The folder holds the config without private paths, one checkpoint without optimiser state, the scores, the readout and
README.md. Python loads it by worldmodel.load, and the commands take it as --run.

example:
  worldmodel export runs/demo exported/demo --checkpoint best

with the encoder and a rollout step as programs, which torch.export.load reads:
  worldmodel export runs/demo exported/demo --programs
"""

import argparse
from pathlib import Path

from worldmodel.commands.shared import add_checkpoint, add_programs, trust_code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a trained run")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new folder to write")
    add_programs(parser)
    add_checkpoint(parser)


def run(args: argparse.Namespace) -> None:
    from worldmodel.runs.trained_run import load
    from worldmodel.runs.travel import export

    loaded = load(args.run, which=args.checkpoint, trust_code=trust_code(args))
    print(export(loaded, args.folder, programs=args.programs))
