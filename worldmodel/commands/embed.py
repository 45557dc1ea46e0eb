"""Write the embeddings of all videos of a collection as Parquet files, with a trained run.

ROOT is what data.root accepts: a folder of videos or of shards, a LeRobot data set, or the URL of shards. Each segment
of a video is a row: file_name, first_frame, time_s, embedding. OUT gets a file for every 64 videos. The same command
continues after any interruption, with any engine, number of processes or hosts, and the rows are the same.

examples:
  worldmodel embed data/videos embeddings --run runs/mine
  worldmodel embed data/videos embeddings --run runs/mine --engine ray

on two hosts that share the folders:
  worldmodel embed data/videos embeddings --run runs/mine --host-index 0 --num-hosts 2
  worldmodel embed data/videos embeddings --run runs/mine --host-index 1 --num-hosts 2

overlapping segments, resampled videos, four decoding processes for each process:
  worldmodel embed data/videos embeddings --run runs/mine data.clip_step=1 data.fps=10 data.num_workers=4
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipelines.errors import UserError
from data_pipelines.processes import environment_int
from data_pipelines.shards.index_file import SHARDS_NAME
from data_pipelines.text_files import shown
from worldmodel.commands.shared import (
    add_overrides,
    add_run,
    check_counts,
    check_device,
    make_out_folder,
    trust_code,
    warn_if_unfinished,
)

if TYPE_CHECKING:
    from worldmodel.config import Config, VideosConfig

CUT_KEYS = ("size_px", "channels", "num_segments", "num_frames", "frame_stride")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", metavar="ROOT", help="a folder of videos or of shards, a LeRobot data set, or a URL")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    add_run(parser)
    parser.add_argument(
        "--engine",
        choices=("processes", "ray"),
        default="processes",
        help="processes of this host (default), or the tasks of a Ray cluster",
    )
    parser.add_argument(
        "--num-processes",
        type=int,
        metavar="N",
        help="processes that embed videos, each with one thread (default: one per core, with a GPU one, with Ray as "
        "many as the cluster has CPUs or GPUs)",
    )
    parser.add_argument(
        "--videos-per-part", type=int, default=64, metavar="N", help="videos in a file of OUT (default: 64)"
    )
    parser.add_argument(
        "--host-index", type=int, metavar="I", help="number of this host, from 0 (default: RANK of a launcher, or 0)"
    )
    parser.add_argument(
        "--num-hosts", type=int, metavar="N", help="hosts that share the work (default: WORLD_SIZE of a launcher, or 1)"
    )
    add_overrides(parser, "values that replace the config's, such as data.fps=10", metavar="data.KEY=VALUE")


def run(args: argparse.Namespace) -> None:
    check_counts(args, "num_processes", "videos_per_part", "num_hosts")
    host_index, num_hosts = share_of_host(args.host_index, args.num_hosts)
    check_pyarrow()
    device = device_of(args.device, args.engine)
    allowed = trust_code(args)

    from worldmodel.embeddings.embed import EmbedOptions, embed_collection
    from worldmodel.embeddings.parts import RunPlace, weights_of
    from worldmodel.runs.trained_run import load

    trained = load(args.run, which=args.checkpoint, trust_code=allowed)
    warn_if_unfinished(args, trained)
    data = data_of(trained.config, args.root, args.overrides, allowed)
    make_out_folder(args.out, str(args.out))
    result = embed_collection(
        RunPlace(args.run, args.checkpoint, device, allowed, weights_of(trained)),
        trained.num_updates,
        data,
        args.out,
        EmbedOptions(args.engine, args.num_processes, args.videos_per_part, host_index, num_hosts),
    )
    dim = trained.model.embedding_dim
    print(f"{args.out}: {result.num_rows:,} embeddings [{dim}] in {result.num_finished} of {result.num_parts} parts")
    if result.num_bad:
        print(f"{args.out / '_bad.jsonl'}: {result.num_bad:,} of {result.num_videos:,} videos lack segments")


def share_of_host(host_index: int | None, num_hosts: int | None) -> tuple[int, int]:
    """Return the number of this host and the number of hosts; None: as a launcher's environment says.

    Raises:
        UserError: only one is given, or the number of the host is not below the number of hosts.
    """
    if (host_index is None) != (num_hosts is None):
        raise UserError("--host-index and --num-hosts belong together: give both, or neither")
    if host_index is None or num_hosts is None:
        host_index, num_hosts = environment_int("RANK", 0), environment_int("WORLD_SIZE", 1, least=1)
    if not 0 <= host_index < num_hosts:
        raise UserError(f"--host-index {host_index} must be from 0 to {num_hosts - 1}, for --num-hosts {num_hosts}")
    return host_index, num_hosts


def check_pyarrow() -> None:
    """Raise UserError unless pyarrow, which writes Parquet, is installed."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UserError(
            "embed writes Parquet with pyarrow, which is not installed: pip install 'worldmodel[embed]'"
        ) from None


def device_of(name: str | None, engine: str) -> str:
    """Return the device that processes compute on. A launcher's processes take one GPU each, by LOCAL_RANK.

    With Ray, a named device is that of its hosts, each of whose tasks sees one GPU.

    Raises:
        UserError: this machine has no such device.
    """
    import torch

    if engine == "ray":
        return name or check_device(None).type
    if name in (None, "cuda") and torch.cuda.is_available():
        name = f"cuda:{environment_int('LOCAL_RANK', 0) % torch.cuda.device_count()}"
    return str(check_device(name))


def data_of(config: Config, root: str, overrides: Sequence[str], trust_code: bool) -> VideosConfig:
    """Return how a run's clips are read from other videos: one segment after the other, unless overrides differ.

    Raises:
        UserError: the run is not one of pictures, or an override is not one of data, is not valid, or names code from
            outside without `trust_code`.
    """
    from worldmodel.config import VideosConfig, apply_override, check_trust, to_dict, validate

    if (Path(root) / "train" / SHARDS_NAME).is_file():
        raise UserError(f"'{root}' holds shards of several splits: embed each of them, such as '{root}/train'")
    if config.data.content == "factors":
        raise UserError(f"embed needs a run on videos: this one has data.source={config.data.source}")
    tree = to_dict(config)
    if not isinstance(config.data, VideosConfig):
        tree["data"] = {"source": "videos", **{key: getattr(config.data, key) for key in CUT_KEYS}}
    tree["data"] |= {"root": root, "clip_step": None}
    for override in overrides:
        key = override.partition("=")[0]
        if not key.startswith("data.") or key in ("data.root", "data.source"):
            raise UserError(f"override {shown(override)}: data.KEY=VALUE can differ from the run's config, except ROOT")
        apply_override(tree, override)
    changed = validate(tree, source="the run's config", overrides=overrides)
    check_trust(changed, trust_code, source="the command")
    assert isinstance(changed.data, VideosConfig)
    return changed.data
