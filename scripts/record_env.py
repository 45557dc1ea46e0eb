"""Record a Gymnasium environment: a folder of videos with the actions and states of each frame, ready for training.

python scripts/record_env.py --env data_pipelines.worlds.two_rooms:worldmodel/TwoRooms-v0 --past-end --out data/rooms
python scripts/record_env.py --import gym_pusht --env gym_pusht/PushT-v0 --policy drift --size-px 96 --out data/pusht
"""

import argparse
import os
import sys
from pathlib import Path

from data_pipelines.splits import SPLITS
from data_pipelines.worlds.recorder import POLICIES, Recording, parse_kwargs, record
from worldmodel.commands.shared import report_errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", required=True, metavar="ID", help="the environment; MODULE:ID imports MODULE first")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument(
        "--import", dest="imports", action="append", default=[], metavar="MODULE", help="import it first"
    )
    parser.add_argument("--env-kwargs", nargs="+", default=[], metavar="NAME=VALUE", help="for gymnasium.make")
    parser.add_argument("--train", type=int, default=1_000, help="training episodes (1,000)")
    parser.add_argument("--selection", type=int, default=100, help="episodes for choices during development (100)")
    parser.add_argument("--test", type=int, default=100, help="episodes for reported scores (100)")
    parser.add_argument("--steps", type=int, default=32, help="of an episode, which has one frame more (32)")
    parser.add_argument("--past-end", action="store_true", help="step on where the environment says that it is over")
    parser.add_argument(
        "--policy",
        choices=POLICIES,
        help="own: the environment's exploration_policy; random: a persistent heading; drift: a wandering target; "
        "uniform: each action anew (own where there is one, else random)",
    )
    parser.add_argument("--size-px", type=int, help="short side of the videos (as rendered)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--overwrite", action="store_true", help="replace another recording")
    args = parser.parse_args()
    counts = {split: getattr(args, split) for split in SPLITS}
    with report_errors():
        recording = Recording(
            env=args.env,
            imports=tuple(args.imports),
            kwargs=parse_kwargs(args.env_kwargs),
            policy=args.policy,
            num_steps=args.steps,
            past_end=args.past_end,
            size_px=args.size_px,
            seed=args.seed,
        )
        record(args.out, counts, recording, num_processes=args.num_processes, overwrite=args.overwrite)
        print(f"{sum(counts.values()):,} episodes in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
