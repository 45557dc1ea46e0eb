"""Run `worldmodel videos moving-mnist`, or kicked-mnist with --world kicked."""

import argparse
import sys

from worldmodel.commands.main import run_command

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--world", choices=["single", "kicked"], default="single")
    chosen, sys.argv[1:] = parser.parse_known_args()
    run_command("videos", "moving-mnist" if chosen.world == "single" else "kicked-mnist")
