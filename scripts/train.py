"""Train a world model.

accelerate launch scripts/train.py --config configs/demo.yaml [key=value ...]
"""

import argparse
import sys

from worldmodel.commands.shared import leave, report_errors
from worldmodel.config import load_config
from worldmodel.training.loop import Interrupted, train


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint, if there is one")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that run_dir holds")
    parser.add_argument("--profile", action="store_true", help="profile a few steps, into RUN/profile/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.lr=1e-3")
    args = parser.parse_intermixed_args()
    with report_errors():
        try:
            config = load_config(args.config, args.overrides)
            train(config, resume=args.resume, overwrite=args.overwrite, profile=args.profile)
        except Interrupted as interrupted:
            print(f"stopped by {interrupted}; go on with --resume", file=sys.stderr)
            return interrupted.exit_code
    return 0


if __name__ == "__main__":
    leave(main())
