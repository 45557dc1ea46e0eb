"""Try randomly damaged inputs, and check that the library survives all of them.

python -m benchmarks.fuzz --minutes 60 --seed 0 [--kinds videos times ...]
python -m benchmarks.fuzz --kinds tar --seed 17 --repeat
python -m benchmarks.fuzz --files 1000

With --minutes, every round builds one input of a kind and gives it to the library in a child process. The library may
accept it, or refuse it with one line. A finding is any other exception, a crash, too much time or memory, a change
outside of its folder, a use of the network or of another program, or a wrong value. Its input is saved under --out, and
the command that repeats it is printed. The exit code is 1 if there is a finding. The same seeds give the same rounds.

With --files, many videos are damaged, then indexed and streamed together. The exit code is 1 if a file or a clip is
lost without a message, or comes twice.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.fuzz.accounting import account
from benchmarks.fuzz.rounds import KINDS, fuzz_for, repeat
from data_pipelines.errors import UserError
from worldmodel.commands.exits import report_errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="minutes of rounds of all kinds")
    parser.add_argument(
        "--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND", help="kinds (default: all)"
    )
    parser.add_argument("--repeat", action="store_true", help="run one round, of the given seed and kind")
    parser.add_argument(
        "--out", type=Path, default=Path("fuzz_findings"), help="folder for findings (default: fuzz_findings)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first round, or of the damage to --files (default: 0)"
    )
    parser.add_argument(
        "--files",
        type=int,
        default=1000,
        help="damaged files, with a fifth as many good ones among them (default: 1000)",
    )
    parser.add_argument("--decoder", default="auto", help="decoder of --files (default: auto)")
    args = parser.parse_args()
    with report_errors():
        if args.repeat:
            if len(args.kinds) != 1:
                raise UserError("--repeat needs the kind: --kinds KIND --seed N --repeat")
            return repeat(KINDS[args.kinds[0]], args.seed, args.out)
        if args.minutes is not None:
            if not 0 < args.minutes < float("inf"):
                raise UserError(f"--minutes {args.minutes:g} must be above 0")
            return fuzz_for(60 * args.minutes, args.seed, args.kinds, args.out)
        return account(args.files, args.seed, args.decoder)


if __name__ == "__main__":
    sys.exit(main())
