"""Record a Gymnasium environment as a folder of videos, with the actions and states of every frame as labels.

examples:
  worldmodel record --env CartPole-v1 --out data/cart_pole
  worldmodel record --env data_pipelines.worlds.two_rooms:worldmodel/TwoRooms-v0 --past-end --out data/two_rooms
  worldmodel record --env data_pipelines.worlds.push_t:worldmodel/PushT-v0 --policy expert=0.8 weak=0.2 --out data/t
"""

import argparse
import os
from typing import TYPE_CHECKING

from worldmodel.commands.shared import add_env, add_env_kwargs, add_out, add_overwrite, add_processes, add_seed

if TYPE_CHECKING:
    from data_pipelines.splits import Split

SPLITS: "tuple[Split, ...]" = ("train", "selection", "test")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_env(parser)
    add_env_kwargs(parser)
    add_out(parser, "the folder")
    parser.add_argument(
        "--import", dest="imports", action="append", default=[], metavar="MODULE", help="module to import first"
    )
    parser.add_argument("--train", type=int, default=1_000, metavar="N", help="training episodes (default: 1,000)")
    parser.add_argument(
        "--selection",
        type=int,
        default=100,
        metavar="N",
        help="episodes for choices during development (default: 100)",
    )
    parser.add_argument(
        "--test", type=int, default=100, metavar="N", help="episodes for reported scores (default: 100)"
    )
    parser.add_argument(
        "--steps", type=int, default=32, metavar="N", help="steps per episode, which has one frame more (default: 32)"
    )
    parser.add_argument("--past-end", action="store_true", help="keep stepping after the environment ends an episode")
    parser.add_argument(
        "--policy",
        nargs="+",
        metavar="NAME[=SHARE]",
        help="one of the environment's own policies, or random: a persistent heading; drift: a wandering target; "
        "uniform: an independent action per step; several share the episodes, as in expert=0.7 random=0.3 "
        "(default: the environment's first, otherwise random)",
    )
    parser.add_argument(
        "--size-px", type=int, metavar="PX", help="short side of the videos in pixels (default: as rendered)"
    )
    add_seed(parser, "seed of the episodes")
    add_processes(parser)
    add_overwrite(parser, "another recording")


def run(args: argparse.Namespace) -> None:
    from data_pipelines.worlds.recorder import Recording, parse_kwargs, record

    recording = Recording(
        env=args.env,
        imports=tuple(args.imports),
        kwargs=parse_kwargs(args.env_kwargs or []),
        policy=" ".join(args.policy) if args.policy else None,
        num_steps=args.steps,
        past_end=args.past_end,
        size_px=args.size_px,
        seed=args.seed,
    )
    num_processes = args.num_processes if args.num_processes is not None else os.cpu_count() or 1
    counts = {split: getattr(args, split) for split in SPLITS}
    record(args.out, counts, recording, num_processes=num_processes, overwrite=args.overwrite)
    print(f"{sum(counts.values()):,} episodes in {args.out}")
