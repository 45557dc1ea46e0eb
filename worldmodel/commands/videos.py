"""Write the videos of a known world as H.264 files: train/, selection/ and test/, each with its metadata.jsonl.

  moving-mnist   digits that move for 9 frames, with one random change of motion
  kicked-mnist   digits that move for 60 frames and are kicked every 3 frames
  occlusion      digits that move for 60 frames and pass behind a screen
  two-rooms      an agent in two rooms joined by a door, with its actions and states
  freeway, breakout, pong
                 Atari games with sticky actions, played by simple policies, with positions from the console's memory
  highway        a motorway with drivers who change speed and lane at random, with positions of cars
  digits         PNG images of single digits in folders, with measured slant, thickness and width (data.source=images)

The test and selection splits contain other digits, or other episodes, than the training split. Games need
pip install 'worldmodel[games]'.

examples:
  worldmodel videos moving-mnist --out data/moving_mnist
  worldmodel videos pong --out data/pong
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.errors import UserError
from worldmodel.commands.shared import (
    add_env_kwargs,
    add_out,
    add_overwrite,
    add_processes,
    add_seed,
    check_counts,
    check_seed,
)

if TYPE_CHECKING:
    from data_pipelines.splits import Split

GAMES = ("freeway", "breakout", "pong", "highway")  # those of data_pipelines.worlds.games, which imports torch
COUNTS: "dict[str, dict[Split, int]]" = {
    "moving-mnist": {"train": 16_384, "selection": 2_048, "test": 1_024},
    "kicked-mnist": {"train": 12_000, "selection": 512, "test": 512},
    "occlusion": {"train": 4_000, "selection": 512, "test": 512},
    "two-rooms": {"train": 4_000, "selection": 100, "test": 100},
    "digits": {"train": 1_297, "selection": 250, "test": 250},
    **{game: {"train": 200, "selection": 40, "test": 40} for game in GAMES},
}
OWN_OPTIONS = {
    "moving-mnist": ("setting", "mnist_dir"),
    "kicked-mnist": ("num_frames", "num_digits", "borders", "mnist_dir"),
    "occlusion": ("num_frames", "mnist_dir"),
    "two-rooms": ("env_kwargs",),
    "digits": ("mnist_dir",),
    **dict.fromkeys(GAMES, ("num_frames",)),
}
TWO_ROOMS = "data_pipelines.worlds.two_rooms:worldmodel/TwoRooms-v0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("world", choices=COUNTS, metavar="WORLD", help=", ".join(COUNTS))
    add_out(parser, "the folder")
    parser.add_argument("--train", type=int, metavar="N", help=f"training videos ({_defaults('train')})")
    parser.add_argument(
        "--selection", type=int, metavar="N", help=f"videos for choices during development ({_defaults('selection')})"
    )
    parser.add_argument("--test", type=int, metavar="N", help=f"videos for reported scores ({_defaults('test')})")
    add_seed(parser, "seed of the videos")
    add_processes(parser)
    add_overwrite(parser, "a world with other parameters")
    digits = parser.add_argument_group("moving-mnist, kicked-mnist, occlusion and digits")
    digits.add_argument(
        "--mnist-dir", type=Path, metavar="FOLDER", help="MNIST's IDX files (default: the digits of scikit-learn)"
    )
    moving = parser.add_argument_group("moving-mnist")
    moving.add_argument("--setting", choices=["A", "B"], help="distribution of the changed axis (default: A)")
    long = parser.add_argument_group("kicked-mnist, occlusion and games")
    long.add_argument(
        "--num-frames",
        type=int,
        metavar="N",
        help="frames per video (default: kicked-mnist 60, a multiple of 3; occlusion 60; games 250)",
    )
    kicked = parser.add_argument_group("kicked-mnist")
    kicked.add_argument("--num-digits", type=int, choices=[1, 2], help="digits per video (default: 1)")
    kicked.add_argument(
        "--borders", choices=["bounce", "crop"], help="whether digits bounce off the borders or leave (default: bounce)"
    )
    rooms = parser.add_argument_group("two-rooms")
    add_env_kwargs(rooms, "arguments of the environment, such as layout=random or slip=0.2")


def run(args: argparse.Namespace) -> None:
    check_counts(args, "train", "selection", "test")
    check_seed(args)
    if args.world == "digits" and args.num_processes is not None:
        raise UserError("digits are written by one process: leave out --num-processes")
    counts = {split: getattr(args, split) or count for split, count in COUNTS[args.world].items()}
    options = own_options(args)
    num_processes = args.num_processes if args.num_processes is not None else os.cpu_count() or 1
    if args.world == "two-rooms":
        from data_pipelines.worlds.recorder import Recording, parse_kwargs, record

        kwargs = parse_kwargs(options.get("env_kwargs", []))
        recording = Recording(env=TWO_ROOMS, kwargs=kwargs, past_end=True, seed=args.seed)
        record(args.out, counts, recording, num_processes=num_processes, overwrite=args.overwrite)
    elif args.world in GAMES:
        from data_pipelines.worlds.games import write_game

        write_game(
            args.out,
            args.world,
            counts,
            **options,
            seed=args.seed,
            num_processes=num_processes,
            overwrite=args.overwrite,
        )
    elif args.world == "digits":
        from data_pipelines.worlds.digit_images import write_digit_images

        write_digit_images(args.out, counts, **options, seed=args.seed, overwrite=args.overwrite)
    else:
        from data_pipelines.worlds import kicked_mnist, moving_mnist, occlusion

        writers: dict[str, Any] = {
            "moving-mnist": moving_mnist.write_moving_mnist,
            "kicked-mnist": kicked_mnist.write_kicked_mnist,
            "occlusion": occlusion.write_occlusion,
        }
        write = writers[args.world]
        write(args.out, counts, **options, seed=args.seed, num_processes=num_processes, overwrite=args.overwrite)
    print(f"{sum(counts.values()):,} {'images' if args.world == 'digits' else 'videos'} in {args.out}")


def own_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the given options that not every world has.

    Raises:
        UserError: the chosen world does not have one of them, or the frames of a video with kicks do not divide into
            segments.
    """
    from data_pipelines.worlds.moving_mnist import SEGMENT_FRAMES

    names = dict.fromkeys(name for names in OWN_OPTIONS.values() for name in names)
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    for name, value in given.items():
        if name not in OWN_OPTIONS[args.world]:
            raise UserError(f"--{name.replace('_', '-')} {value} is not an option of {args.world}")
    least = 2 * SEGMENT_FRAMES
    if args.world != "kicked-mnist":
        return given
    if (num_frames := given.get("num_frames", least)) < least or num_frames % SEGMENT_FRAMES:
        raise UserError(f"--num-frames {num_frames} must be a multiple of {SEGMENT_FRAMES}, at least {least}")
    return given


def _defaults(split: "Split") -> str:
    names = {world: "games" if world in GAMES else world for world in COUNTS}
    return "default: " + ", ".join(dict.fromkeys(f"{names[world]} {COUNTS[world][split]:,}" for world in COUNTS))
