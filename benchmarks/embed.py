"""Embed a collection with every engine, kill and continue, and compare the rows.

python benchmarks/embed.py FOLDER --videos 10000

Writes videos and a small run into FOLDER, then embeds the videos six times: by two processes; by two processes that
are killed (SIGKILL, all of them) several times and started again; by two hosts, which are commands with --host-index;
by local Ray; by local Ray that is killed several times and started again; and by a Ray cluster of two simulated hosts,
one of which is lost. The rows of all are compared bit for bit, and some embeddings with those of the same frames read
one by one. Without ray its steps are left out.

The same command continues after an interruption. --step makes one step only, so that each takes minutes.
"""

import argparse
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch

import worldmodel
from data_pipelines.decoders import read_frames
from data_pipelines.errors import UserError
from data_pipelines.files import write_text
from data_pipelines.transforms import to_float
from worldmodel.commands.exits import leave, report_errors
from worldmodel.commands.jobs import signal_group
from worldmodel.commands.shared import check_counts

COMMAND = [sys.executable, "-m", "worldmodel"]
TWO = ["--num-processes", "2"]
HALF = ["--num-processes", "1", "--num-hosts", "2"]
TRAINING = [
    *("train.steps=4", "train.warmup_steps=2", "train.eval_every=4", "data.batch_size=16", "data.num_lanes=4"),
    *("evaluation.selection_clips=32", "tracking.wandb=disabled"),
]
KILLS = 5
COMPARED_ONE_BY_ONE = 20
TOLERANCE = 1e-4  # of embeddings from batches of another size, which differ by rounding
POLL_S = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder for everything")
    parser.add_argument("--videos", type=int, default=10_000, metavar="N", help="videos to embed (default: 10000)")
    parser.add_argument("--step", choices=[*STEPS, "compare"], help="make only this step")
    args = parser.parse_args()
    with report_errors():
        check_counts(args, "videos")
        prepare(args.folder, args.videos)
        for name in [args.step] if args.step else [*STEPS, "compare"]:
            if name == "compare":
                return compare(args.folder)
            if "ray" in name and importlib.util.find_spec("ray") is None:
                print(f"{name}: left out, ray is not installed")
            elif (args.folder / f"{name}.json").exists():
                print(f"{name}: {(args.folder / f'{name}.json').read_text()}")
            else:
                report = STEPS[name](args.folder, args.folder / name)
                write_text(args.folder / f"{name}.json", json.dumps(report))
                print(f"{name}: {json.dumps(report)}", flush=True)
    return 0


def prepare(folder: Path, num_videos: int) -> None:
    """Write the videos, index them and train a run, unless they exist."""
    held_out = max(1, num_videos // 100)
    counts = {"train": num_videos - 2 * held_out, "selection": held_out, "test": held_out}
    options = [word for split, count in counts.items() for word in (f"--{split}", str(count))]
    call("videos", "moving-mnist", *options, "--out", str(folder / "videos"))
    if not (folder / "run" / "config.yaml").exists():
        overrides = [f"data.root={folder / 'videos'}", f"run_dir={folder / 'run'}", *TRAINING]
        call("train", "--config", "objectives", *overrides)


def call(*arguments: str) -> None:
    """Run a command of worldmodel. Raises UserError: it failed; its message is on stderr."""
    if subprocess.run([*COMMAND, *arguments], stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"worldmodel {' '.join(arguments)} failed: see above")


@contextmanager
def started(
    folder: Path, out: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """Start to embed, in its own session, and kill what still runs at the end of the block, however it ends.

    environment: further variables.
    """
    command = [*COMMAND, "embed", str(folder / "videos"), str(out), "--run", str(folder / "run"), *arguments]
    variables = os.environ | (environment or {})
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, env=variables)
    try:
        yield process
    finally:
        if process.poll() is None:
            signal_group(process, signal.SIGKILL)
            process.wait()


def finish(*commands: "subprocess.Popen[bytes]") -> None:
    """Wait for commands. Raises UserError: one failed."""
    if any([command.wait() for command in commands]):
        raise UserError("a command failed: see above")


def finished_parts(out: Path) -> int:
    """Return the number of finished parts."""
    return len(list(out.glob("part-*.parquet")))


def timed(*of_commands: Sequence[str]) -> Callable[[Path, Path], dict]:
    """Return a step that runs commands next to each other, and measures the videos per second of their parts.

    of_commands: the further arguments of each.
    """

    def step(folder: Path, out: Path) -> dict:
        before, started_s = finished_parts(out), time.monotonic()
        with ExitStack() as running:
            finish(*[running.enter_context(started(folder, out, *arguments)) for arguments in of_commands])
        seconds, parts = time.monotonic() - started_s, finished_parts(out)
        num_videos = json.loads((out / "_manifest.json").read_text())["num_videos"] * (parts - before) / parts
        return {"seconds": round(seconds, 1), "videos_per_s": round(num_videos / seconds, 1)}

    return step


def killed(*arguments: str) -> Callable[[Path, Path], dict]:
    """Return a step that kills a command with all its processes KILLS times after some parts, and continues."""

    def step(folder: Path, out: Path) -> dict:
        chance = random.Random(0)
        at_kill = []
        for _ in range(KILLS):
            with started(folder, out, *arguments) as command:  # which is killed at the end
                goal = finished_parts(out) + chance.randint(1, 12)
                while command.poll() is None and finished_parts(out) < goal:
                    time.sleep(POLL_S)
                time.sleep(chance.uniform(0, 0.5))  # into the middle of a part
            at_kill.append(finished_parts(out))
        with started(folder, out, *arguments) as command:
            finish(command)
        return {"finished_parts_at_kills": at_kill, "parts": finished_parts(out)}

    return step


def ray_lost_host(folder: Path, out: Path) -> dict:
    """Embed on a Ray cluster of two simulated hosts with one core each, one of which is lost after some parts."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        second = cluster.add_node(num_cpus=1)
        goal = finished_parts(out) + 10
        with started(folder, out, "--engine", "ray", environment={"RAY_ADDRESS": cluster.address}) as command:
            while command.poll() is None and finished_parts(out) < goal:
                time.sleep(POLL_S)
            cluster.remove_node(second, allow_graceful=False)
            lost_at = finished_parts(out)
            finish(command)
    finally:
        cluster.shutdown()
    return {"finished_parts_at_loss": lost_at, "parts": finished_parts(out)}


STEPS: dict[str, Callable[[Path, Path], dict]] = {
    "processes": timed(TWO),
    "processes_killed": killed(*TWO),
    "two_hosts": timed(*([*HALF, "--host-index", str(host)] for host in range(2))),
    "ray": timed(["--engine", "ray", *TWO]),
    "ray_killed": killed("--engine", "ray", *TWO),
    "ray_lost_host": ray_lost_host,
}


def compare(folder: Path) -> int:
    """Compare the rows of all steps. Returns the exit code."""
    from pyarrow import parquet

    tables = {name: parquet.read_table(folder / name) for name in STEPS if (folder / f"{name}.json").exists()}
    if not tables:
        raise UserError(f"{folder} has no finished step to compare")
    first = next(iter(tables.values()))
    places = list(zip(first["file_name"].to_pylist(), first["first_frame"].to_pylist(), strict=True))
    videos = sorted(path.relative_to(folder / "videos").as_posix() for path in (folder / "videos").rglob("*.mp4"))
    run = worldmodel.load(folder / "run")
    num_frames = run.config.data.num_frames
    faults = [name for name, table in tables.items() if not table.equals(first)]
    # The videos have nine frames, and each segment once is an arithmetic fact.
    expected = [(video, first_frame) for video in videos for first_frame in range(0, 9 - num_frames + 1, num_frames)]
    if places != expected:
        faults.append("the segments are not those of the videos, each once")
    furthest = 0.0
    embeddings = np.stack(first["embedding"].to_numpy())
    for row in np.linspace(0, len(places) - 1, COMPARED_ONE_BY_ONE).astype(int).tolist():
        name, first_frame = places[row]
        frames = read_frames(
            folder / "videos" / name,
            first_frame,
            first_frame + num_frames,
            channels=run.config.data.channels,
            size_px=run.config.data.size_px,
        )
        alone = run.encode(to_float(torch.from_numpy(np.stack(list(frames))))[None])[0].numpy()
        furthest = max(furthest, float(np.abs(alone - embeddings[row]).max()))
    if furthest > TOLERANCE:
        faults.append(f"embeddings one by one differ by {furthest:.2g}")
    print(f"{len(videos):,} videos, {len(places):,} rows in each of {', '.join(tables)}")
    print(f"largest difference from embeddings one by one: {furthest:.2g}; faults: {', '.join(faults) or 'none'}")
    return int(bool(faults))


if __name__ == "__main__":
    leave(main())
