"""Export a run and upload it to the Hugging Face Hub, into a private repository unless --public is given.

The repository is created if it does not exist. `hf auth login` stores the token that it needs; HF_TOKEN takes
precedence.

example:
  worldmodel push runs/demo owner/demo --checkpoint best

load it:
  python -c 'import worldmodel; print(worldmodel.load("owner/demo").folder)'
"""

import argparse
from pathlib import Path

from worldmodel.commands.shared import add_checkpoint, add_programs, trust_code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a trained run")
    parser.add_argument("name", metavar="OWNER/NAME", help="the repository")
    parser.add_argument("--public", action="store_true", help="create a public repository, or allow an existing one")
    add_programs(parser)
    add_checkpoint(parser)


def run(args: argparse.Namespace) -> None:
    from worldmodel.runs.trained_run import load
    from worldmodel.runs.travel import push

    loaded = load(args.run, which=args.checkpoint, trust_code=trust_code(args))
    print(push(loaded, args.name, private=not args.public, programs=args.programs))
