"""Print the reference of the config: every key with its type, default and meaning.

examples:
  worldmodel config
  worldmodel config model
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("section", nargs="?", metavar="SECTION", help="a section such as model (default: all)")


def run(args: argparse.Namespace) -> None:
    from worldmodel.config.reference import reference

    print(reference(args.section))
