"""Train a world model.

accelerate launch scripts/train.py --config configs/demo.yaml [key=value ...]
"""

import argparse
import sys

from data_pipelines.errors import UserError
from worldmodel.commands.process import prepare_process, stop_signals
from worldmodel.commands.shared import leave, report_errors
from worldmodel.config import load_config
from worldmodel.runs.checkpoint import RunExistsError, VideosChangedError
from worldmodel.runs.tracking import RowLostError
from worldmodel.training.launch import ConnectionLostError
from worldmodel.training.loop import train
from worldmodel.training.session import Interrupted

HINTS: dict[type[UserError], str] = {
    RunExistsError: "--resume continues it, --overwrite replaces it",
    VideosChangedError: "restore them, or start again with --overwrite",
    ConnectionLostError: "remove it, and continue with --resume",
    RowLostError: "make room, and continue with --resume",
}
"""What to do about an error, in terms of this command."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument("--resume", action="store_true", help="continue from the latest checkpoint, if there is one")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that run_dir holds")
    parser.add_argument("--profile", action="store_true", help="profile a few steps, into RUN/profile/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.lr=1e-3")
    args = parser.parse_intermixed_args()
    with report_errors():
        try:
            config = load_config(args.config, args.overrides)
            prepare_process(config.train)
            with stop_signals() as stop:
                train(config, resume=args.resume, overwrite=args.overwrite, profile=args.profile, stop=stop)
        except Interrupted as interrupted:
            print(f"stopped by {interrupted}; continue with --resume", file=sys.stderr)
            return interrupted.exit_code
        except tuple(HINTS) as error:
            raise UserError(f"{error}: {HINTS[type(error)]}") from error
    return 0


if __name__ == "__main__":
    leave(main())
