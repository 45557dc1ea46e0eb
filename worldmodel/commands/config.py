"""Print the reference of the config: every key with its type, default and meaning.

examples:
  worldmodel config
  worldmodel config model.encoder
  worldmodel config train.lr
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("key", nargs="?", metavar="KEY", help="a section or a key, such as train.lr (default: all)")


def run(args: argparse.Namespace) -> None:
    from worldmodel.config.reference import reference

    print(reference(args.key))
